"""From an analysis to its finding: jobs, rows, a verdict by a rule fixed beforehand, a page, a line of a table."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, Protocol

import typer
from rich.console import Console
from rich.markup import escape
from transformers.utils import logging

from harmcircuits.hooks.finetuning import Lora
from harmcircuits.measurements import Measurement, append_rows, select
from harmcircuits.organisms import FOLDER
from harmcircuits.studies import options
from harmcircuits.studies.jobs import CPU, DONE, Job, run_jobs
from harmcircuits.studies.models import SubjectSpec
from harmcircuits.studies.narrow_finetuning import NarrowTexts
from harmcircuits.views.page import paragraphs, write_page

Verdict = Literal["holds", "holds in part", "does not hold here"]


@dataclass(frozen=True)
class Plan:
    """What an analysis is run on: models, seeds, and how circuits are chosen.

    `q`: share of the weights in a circuit; curves run around it. `p`: share protected for each other behaviour. A seed
    draws the calibration sample, reference answers, random masks, and training texts and order. `narrow`: what models of
    one's own are fine-tuned on, for the analysis that needs it. `attacker`: adapters of the attacker that fine-tunes; None
    where every parameter learns.
    """

    specs: tuple[SubjectSpec, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    q: float = 0.006
    p: float = 0.005
    rounds: int = 10
    narrow: NarrowTexts | None = None
    attacker: Lora | None = None

    @property
    def settings(self) -> dict[str, str | int | float]:
        """What must not change when a run is resumed; more models or seeds may be added."""
        own = sorted({repr(spec.settings) for spec in self.specs if spec.texts})
        texts = {"own": "; ".join(own)} if own else {}
        sampled = sorted({repr(spec.sampling) for spec in self.specs if spec.sampling})
        if sampled:
            texts["sampling"] = "; ".join(sampled)
        if self.narrow:
            texts["narrow"] = repr(self.narrow)
        if self.attacker:
            texts["attacker"] = repr(self.attacker)
        return {"q": self.q, "p": self.p, "rounds": self.rounds, **texts}

    def jobs(self, run: Callable[[SubjectSpec, "Plan", int], list[Measurement]]) -> list[Job]:
        """`run(spec, plan, seed)` for every model and seed; see `Job` on what it may be."""
        return [
            Job({**spec.labels, "seed": seed}, partial(run, spec, self, seed)) for spec in self.specs for seed in self.seeds
        ]


@dataclass(frozen=True)
class Finding:
    """What an analysis says of a claim: the verdict, a paragraph in plain words, and the figures in one line."""

    name: str
    claim: str
    verdict: Verdict
    words: str
    evidence: str


class Analysis(Protocol):
    """A module of `analyses/`: one claim, and everything needed to judge it.

    `MODELS`: the organisms it is run on by default. `jobs(plan)`: the parts of the experiment. `finding(rows)`: the verdict
    by the module's stated rule, from rows only. `needed(rows)`: the few rows that `finding` uses, which the README's table
    keeps. `sections(rows)`: the page's parts (see `report.section`).
    """

    NAME: str
    CLAIM: str
    MODELS: tuple[str, ...]

    def jobs(self, plan: Plan) -> list[Job]: ...  # noqa: D102
    def finding(self, rows: Sequence[Measurement]) -> Finding: ...  # noqa: D102
    def needed(self, rows: Sequence[Measurement]) -> list[Measurement]: ...  # noqa: D102
    def sections(self, rows: Sequence[Measurement]) -> list[str]: ...  # noqa: D102


def conclude(plans: Sequence[tuple[Analysis | ModuleType, Plan]], out: str | Path, *, workers: int = 1) -> list[Finding]:
    """Run what is left of each analysis and write its page `NAME.html`; returns the findings in the order given.

    The jobs of all analyses share the workers and one `rows.jsonl`; every row carries its analysis' name as `finding`.
    `summary.jsonl` holds the rows that the findings need, `summary.md` their table. Raises ValueError as `run_jobs`, and
    for plans with different settings.
    """
    settings = plans[0][1].settings
    other = [plan.settings for _, plan in plans if plan.settings != settings]
    if other:
        raise ValueError(f"conclude: plans with settings {settings} and {other[0]}; give each an out folder of its own")
    out = Path(out)
    jobs = [_named(job, analysis.NAME) for analysis, plan in plans for job in analysis.jobs(plan)]
    rows = run_jobs(out, jobs, settings, workers=workers)
    found, kept = [], []
    for analysis, _ in plans:
        mine = [row for row in select(rows, finding=analysis.NAME) if row.metric not in (DONE, CPU)]
        found.append(one := analysis.finding(mine))
        kept += analysis.needed(mine)
        title = f"{one.name}. {one.claim}: {one.verdict}"
        write_page(out / f"{one.name}.html", title, [paragraphs(one.words), *analysis.sections(mine)])
    (out / "summary.jsonl").unlink(missing_ok=True)
    append_rows(out / "summary.jsonl", kept)
    (out / "summary.md").write_text(summary(found) + "\n", encoding="utf-8")
    return found


def _named(job: Job, name: str) -> Job:
    return Job({"finding": name, **job.labels}, partial(_labelled, job.run, name))


def _labelled(run: Callable[[], list[Measurement]], name: str) -> list[Measurement]:
    return [replace(row, labels={"finding": name, **row.labels}) for row in run()]


def summary(findings: Sequence[Finding]) -> str:
    """A Markdown table of findings: claim, verdict, figures."""
    head = ["| | claim | verdict | measured |", "|---|---|---|---|"]
    return "\n".join([*head, *(f"| {f.name} | {f.claim} | **{f.verdict}** | {f.evidence} |" for f in findings)])


def command(*analyses: Analysis | ModuleType) -> Callable[..., None]:
    """The command line of these analyses, for `typer.run`."""
    models = "; ".join(f"{analysis.NAME}: {', '.join(analysis.MODELS)}" for analysis in analyses)

    @options.takes_own_model
    def main(
        *,
        out: Annotated[Path, typer.Option(help="Folder for rows.jsonl, manifest.json, pages and the summary.")],
        model: Annotated[list[str] | None, typer.Option(help="Model; repeat.", show_default=models)] = None,
        organisms: Annotated[
            list[Path] | None, typer.Option(help="Ladder; repeat.", show_default="the shipped one")
        ] = None,
        seeds: Annotated[int, typer.Option(help="How many seeds.")] = 3,
        q: Annotated[float, typer.Option(help="Share of weights in a circuit.")] = Plan.q,
        p: Annotated[float, typer.Option(help="Share of weights protected for each other behaviour.")] = Plan.p,
        rounds: Annotated[int, typer.Option(help="Rounds in which a circuit is chosen.")] = Plan.rounds,
        workers: Annotated[int, typer.Option(help="Processes of one thread each.")] = 2,
        device: Annotated[str, typer.Option(help="Torch device, such as cpu or cuda.")] = "cpu",
        own: dict[str, Any],
        narrow: options.Narrow = "",
        elsewhere: options.Elsewhere = "",
        rank: options.Rank = NarrowTexts.rank,
        alpha: options.Alpha = NarrowTexts.alpha,
        lr: options.LearningRate = NarrowTexts.lr,
        epochs: options.Epochs = NarrowTexts.epochs,
        attack_rank: options.AttackRank = 0,
    ) -> None:
        logging.disable_progress_bar()

        def plan(analysis: Analysis | ModuleType) -> Plan:
            specs = options.specs(model or (), analysis.MODELS, organisms or [FOLDER], device, **own)
            trained = NarrowTexts(narrow, elsewhere, rank, alpha, lr, epochs) if narrow or elsewhere else None
            attacker = Lora(attack_rank, 2.0 * attack_rank) if attack_rank else None
            asked = {one.NAME for one in analyses}
            if trained and "F5" not in asked:
                raise ValueError(f"--narrow is for F5 (emergent_misalignment.py), not {analysis.NAME}; leave it out")
            if attacker and "Attacks" not in asked:
                raise ValueError(f"--attack-rank is for Attacks (attacks.py), not {analysis.NAME}; leave it out")
            return Plan(specs, tuple(range(seeds)), q, p, rounds, trained, attacker)

        console = Console()
        try:
            found = conclude([(analysis, plan(analysis)) for analysis in analyses], out, workers=workers)
        except ValueError as error:
            Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
            raise typer.Exit(2) from None
        for one in found:
            console.print(f"[bold]{one.name}[/]. {one.claim}: [bold]{one.verdict}[/]", highlight=False)
            console.print(one.words + "\n", highlight=False, markup=False)
        console.print(f"Pages and summary: {out}", highlight=False, soft_wrap=True, markup=False)

    return main
