"""From an analysis to its result: jobs, rows, an outcome by a rule fixed beforehand, a page."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

import typer
from rich.console import Console

from harmcircuits.measurements import Rows
from harmcircuits.organisms import FOLDER
from harmcircuits.studies.jobs import CPU, DONE, Job, run_jobs
from harmcircuits.studies.models import ModelSpec
from harmcircuits.studies.options import (
    Option,
    quiet,
    refused,
    show_files,
    specs,
    takes_custom_model,
    with_options,
)
from harmcircuits.views.page import paragraphs, write_page

Outcome = Literal["holds", "holds in part", "does not hold here"]


@dataclass(frozen=True)
class Plan:
    """What an analysis is run on: models, seeds, and how circuits are chosen.

    Attributes:
        specs: the models.
        seeds: each draws the calibration sample, reference answers, random masks, and training
            texts and order.
        size: share of the weights in a circuit; curves run around it.
        protect_share: share of the weights that each protected behaviour keeps out of reach.
        rounds: in how many steps a circuit grows.
        options: settings of the analysis itself, by name; those that are as usual are left out.
    """

    specs: tuple[ModelSpec, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    size: float = 0.006
    protect_share: float = 0.005
    rounds: int = 10
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, str | int | float]:
        """What must not change when a run is resumed, but for `options`.

        More models or seeds may be added.
        """
        texts = {}
        custom = sorted({repr(spec.settings) for spec in self.specs if spec.files})
        if custom:
            texts["custom"] = "; ".join(custom)
        sampled = sorted({repr(spec.sampling) for spec in self.specs if spec.sampling})
        if sampled:
            texts["sampling"] = "; ".join(sampled)
        chosen = {
            "size": self.size,
            "protect_share": self.protect_share,
            "rounds": self.rounds,
        }
        return {**chosen, **texts}

    def jobs(self, run: Callable[[ModelSpec, "Plan", int], Rows]) -> list[Job]:
        """`run(spec, plan, seed)` for every model and seed; see `Job` on what it may be."""
        jobs = []
        for spec in self.specs:
            for seed in self.seeds:
                jobs.append(Job({**spec.labels, "seed": seed}, partial(run, spec, self, seed)))
        return jobs


@dataclass(frozen=True)
class ClaimResult:
    """What an analysis says of a claim.

    Attributes:
        name: of the claim, such as "F1".
        claim: in a few words.
        outcome: by the rule fixed beforehand.
        words: a paragraph in plain words.
        evidence: the figures in one line.
    """

    name: str
    claim: str
    outcome: Outcome
    words: str
    evidence: str


@runtime_checkable
class Analysis(Protocol):
    """A module of `analyses/`: one claim, and everything needed to judge it.

    `MODELS`: the organisms it is run on by default. `OPTIONS`, where there is one: those of its own
    settings that its command line takes, by name. A setting that is for a small run only may be
    given in `Plan.options` without being among them.
    """

    NAME: str
    CLAIM: str
    MODELS: tuple[str, ...]

    def jobs(self, plan: Plan) -> list[Job]:
        """The parts of the experiment."""
        ...

    def result(self, rows: Rows) -> ClaimResult:
        """The outcome by the module's stated rule, from rows only."""
        ...

    def reported(self, rows: Rows) -> Rows:
        """The few rows that `result` uses, which the README's table keeps."""
        ...

    def sections(self, rows: Rows) -> list[str]:
        """The page's parts (see `page.section`)."""
        ...


AnyAnalysis = Analysis | ModuleType


def conclude(
    plans: Sequence[tuple[AnyAnalysis, Plan]], out: str | Path, *, workers: int = 1
) -> list[ClaimResult]:
    """Run what is missing of each analysis and write its page `NAME.html`; the results, in order.

    The jobs of all analyses share the workers and one `rows.jsonl`; every row carries its analysis'
    name as `finding`. `summary.jsonl` holds the rows that the results need, `summary.md` their
    table.

    Args:
        plans: analyses, and what each is run on.
        out: folder for all of it.
        workers: processes.

    Raises:
        ValueError: plans with different settings, and as `run_jobs`.
    """
    common = plans[0][1].settings
    settings = dict(common)
    for analysis, plan in plans:
        if plan.settings != common:
            raise ValueError(
                f"conclude: plans with settings {common} and {plan.settings}; "
                "give each an out folder of its own"
            )
        if plan.options:
            settings[f"options of {analysis.NAME}"] = repr(dict(plan.options))
    out = Path(out)
    jobs = []
    for analysis, plan in plans:
        jobs += [_named(job, analysis.NAME) for job in analysis.jobs(plan)]
    rows = run_jobs(out, jobs, settings, workers=workers)

    results, reported = [], Rows()
    for analysis, _ in plans:
        of_analysis = rows.where(finding=analysis.NAME)
        measured = Rows(row for row in of_analysis if row.metric not in (DONE, CPU))
        result = analysis.result(measured)
        results.append(result)
        reported += analysis.reported(measured)
        title = f"{result.name}. {result.claim}: {result.outcome}"
        sections = [paragraphs(result.words), *analysis.sections(measured)]
        write_page(out / f"{result.name}.html", title, sections)
    (out / "summary.jsonl").unlink(missing_ok=True)
    reported.append_to(out / "summary.jsonl")
    (out / "summary.md").write_text(summary_table(results) + "\n", encoding="utf-8")
    return results


def summary_table(results: Sequence[ClaimResult]) -> str:
    """A Markdown table of results: claim, outcome, figures."""
    lines = ["| | claim | outcome | measured |", "|---|---|---|---|"]
    for result in results:
        cells = (result.name, result.claim, f"**{result.outcome}**", result.evidence)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def by_model(rows: Rows) -> dict[str, Rows]:
    """The rows of each model, by its name; of a ladder not shipped, by "NAME of LADDER"."""
    models = {}
    for (model, ladder), of_model in rows.by("model", "ladder").items():
        name = str(model) if ladder == "shipped" else f"{model} of {ladder}"
        models[name] = of_model
    return models


def command(*analyses: AnyAnalysis) -> Callable[..., None]:
    """The command line of these analyses, for `typer.run`."""
    usual = [f"{analysis.NAME}: {', '.join(analysis.MODELS)}" for analysis in analyses]
    options: dict[str, Option] = {}
    for analysis in analyses:
        options |= _options(analysis)

    @takes_custom_model
    @with_options("extra", options)
    def main(
        *,
        out: Annotated[
            Path, typer.Option(help="Folder for rows.jsonl, manifest.json, pages and the summary.")
        ],
        model: Annotated[
            list[str] | None, typer.Option(help="Model; repeat.", show_default="; ".join(usual))
        ] = None,
        organisms: Annotated[
            list[Path] | None, typer.Option(help="Ladder; repeat.", show_default="the shipped one")
        ] = None,
        seeds: Annotated[int, typer.Option(help="How many seeds.")] = 3,
        size: Annotated[float, typer.Option(help="Share of weights in a circuit.")] = Plan.size,
        protect_share: Annotated[
            float, typer.Option(help="Share of weights protected for each other behaviour.")
        ] = Plan.protect_share,
        rounds: Annotated[
            int, typer.Option(help="Rounds in which a circuit is chosen.")
        ] = Plan.rounds,
        workers: Annotated[int, typer.Option(help="Processes of one thread each.")] = 2,
        device: Annotated[str, typer.Option(help="Torch device, such as cpu or cuda.")] = "cpu",
        custom: dict[str, Any],
        extra: dict[str, Any],
    ) -> None:
        quiet()

        def plan(analysis: AnyAnalysis) -> Plan:
            folders = organisms or [FOLDER]
            models = specs(model or (), analysis.MODELS, folders, device, **custom)
            given = _given(_options(analysis), extra)
            return Plan(models, tuple(range(seeds)), size, protect_share, rounds, given)

        try:
            plans = [(analysis, plan(analysis)) for analysis in analyses]
            show_files(plans[0][1].specs, Console())
            results = conclude(plans, out, workers=workers)
        except ValueError as error:
            raise refused(error) from None
        _print(results, out)

    return main


def _print(results: Sequence[ClaimResult], out: Path) -> None:
    """Every outcome in words, and where the pages are."""
    console = Console()
    for result in results:
        title = f"[bold]{result.name}[/]. {result.claim}: [bold]{result.outcome}[/]"
        console.print(title, highlight=False)
        console.print(result.words + "\n", highlight=False, markup=False)
    text = f"Pages and summary: {out}"
    console.print(text, highlight=False, soft_wrap=True, markup=False)


def _options(analysis: AnyAnalysis) -> Mapping[str, Option]:
    """The options of its own that the analysis takes on the command line."""
    return getattr(analysis, "OPTIONS", {})


def _given(options: Mapping[str, Option], values: Mapping[str, Any]) -> dict[str, Any]:
    """The options of an analysis that are not as usual."""
    given = {}
    for name, option in options.items():
        value = values[name]
        if value != option.default:
            given[name] = tuple(value) if isinstance(value, list) else value
    return given


def _named(job: Job, name: str) -> Job:
    return Job({"finding": name, **job.labels}, partial(_labelled, job.run, name))


def _labelled(run: Callable[[], Rows], name: str) -> Rows:
    labelled = []
    for row in run():
        labelled.append(replace(row, labels={"finding": name, **row.labels}))
    return Rows(labelled)
