"""From an analysis to its finding: jobs, rows, a verdict by a rule fixed beforehand, a page, a line of the README's table."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Protocol

import typer
from rich.console import Console
from transformers.utils import logging

from harmcircuits import options
from harmcircuits.jobs import Job, run_jobs
from harmcircuits.organisms import FOLDER
from harmcircuits.records import Measurement
from harmcircuits.report import paragraphs, write_page
from harmcircuits.subjects import SubjectSpec

Verdict = Literal["holds", "holds in part", "does not hold here"]


@dataclass(frozen=True)
class Plan:
    """What an analysis is run on: models, seeds, and how circuits are chosen.

    `q`: share of the weights in a circuit; curves run around it. `p`: share protected for each other behaviour. A seed draws
    the calibration sample, reference answers, random masks, and training texts and order.
    """

    specs: tuple[SubjectSpec, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    q: float = 0.006
    p: float = 0.005
    rounds: int = 10

    @property
    def settings(self) -> dict[str, str | int | float]:
        """What must not change when a run is resumed; more models or seeds may be added."""
        return {"q": self.q, "p": self.p, "rounds": self.rounds}


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


def conclude(analysis: Analysis, plan: Plan, out: Path, *, workers: int = 1) -> Finding:
    """Run what is left of an analysis and write its page; returns its finding. Raises ValueError as `run_jobs`."""
    rows = run_jobs(out, analysis.jobs(plan), plan.settings, workers=workers, name=analysis.NAME)
    found = analysis.finding(rows)
    write_page(
        out / "page.html",
        f"{found.name} {found.claim}: {found.verdict}",
        [paragraphs(found.words), *analysis.sections(rows)],
    )
    return found


def summary(findings: Sequence[Finding]) -> str:
    """A Markdown table of findings: claim, verdict, figures."""
    head = ["| | claim | verdict | measured |", "|---|---|---|---|"]
    return "\n".join([*head, *(f"| {f.name} | {f.claim} | **{f.verdict}** | {f.evidence} |" for f in findings)])


def command(analysis: Analysis) -> Callable[..., None]:
    """The command line of an analysis, for `typer.run`."""

    def main(
        out: Annotated[Path, typer.Option(help="Folder for rows.jsonl, manifest.json and page.html.")],
        model: Annotated[list[str] | None, typer.Option(help="Model; repeat.", show_default=str(analysis.MODELS))] = None,
        organisms: Annotated[
            list[Path] | None, typer.Option(help="Ladder; repeat.", show_default="the shipped one")
        ] = None,
        seeds: Annotated[int, typer.Option(help="How many seeds.")] = 3,
        q: Annotated[float, typer.Option(help="Share of weights in a circuit.")] = Plan.q,
        p: Annotated[float, typer.Option(help="Share of weights protected for each other behaviour.")] = Plan.p,
        rounds: Annotated[int, typer.Option(help="Rounds in which a circuit is chosen.")] = Plan.rounds,
        workers: Annotated[int, typer.Option(help="Processes of one thread each.")] = 2,
        device: Annotated[str, typer.Option(help="Torch device, such as cpu or cuda.")] = "cpu",
        harmful: options.Harmful = "",
        benign: options.Benign = "",
        harmful_heldout: options.HarmfulHeldout = "",
        benign_heldout: options.BenignHeldout = "",
        pairs: options.Pairs = "",
        borderline: options.Borderline = "",
        wording: options.WordingFile = "",
        limit: options.Limit = 0,
        template: options.Template = "chat",
        judge: options.JudgeName = "local",
        dtype: options.Dtype = "",
    ) -> None:
        logging.disable_progress_bar()
        texts = {
            "harmful": harmful, "benign": benign, "harmful_heldout": harmful_heldout, "benign_heldout": benign_heldout,
            "pairs": pairs, "borderline": borderline, "wording": wording, "limit": limit,
            "template": template, "judge": judge, "dtype": dtype,
        }  # fmt: skip
        specs = options.specs(model or analysis.MODELS, organisms or [FOLDER], device, **texts)
        plan = Plan(specs, tuple(range(seeds)), q, p, rounds)
        found = conclude(analysis, plan, out, workers=workers)
        console = Console()
        console.print(f"{found.name} {found.claim}: [bold]{found.verdict}[/]", highlight=False)
        console.print(found.words, highlight=False, markup=False)
        console.print(f"Page: {out / 'page.html'}", highlight=False, soft_wrap=True)

    return main
