"""A claim: the experiment that tests it, the rule that judges it, and its key numbers.

One scale for all claims. A case is one model and seed (of some claims a ladder, a run or a pair), and
the claim's rule says of each whether it bears the claim out, wholly or in part. Then the claim

- *holds* if every case bears it out,
- *holds in part* if at least half of the cases do, wholly or in part,
- *does not hold here* otherwise,
- is *undecided*, whatever the count, if a confound that it names explains the cases.

An ability is *kept* (`curves.KEPT_RATE`, `KEPT_NLL`) where its rate falls by at most 5 points and the loss on benign answers rises by
at most 0.1 nats a token, both in the mean. One of 64 items is 1.6 points and of 48 items 2.1, so this is
three or two items. An interval's end cannot be the limit: where no item of 64 is lost, it reaches 7.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, make_dataclass, replace
from functools import partial
from inspect import Parameter, getdoc, signature
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_type_hints

import tyro
from rich.console import Console, ConsoleOptions
from rich.table import Table
from rich.text import Text
from support.jobs import CPU, DONE, Job, run_jobs
from support.models import ModelSpec, RunOptions
from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes

from harmcircuits.cli import in_one_sentence
from harmcircuits.measurements import Rows
from harmcircuits.storage import write_text
from harmcircuits.views.circuitsvis import Panels, Visual, circuitsvis_script
from harmcircuits.views.figures import Picture
from harmcircuits.views.page import frame, plot, section, visual, write_page
from harmcircuits.views.tables import DASH, frame_table

if TYPE_CHECKING:
    import pandas

AnyFigure = TypeVar("AnyFigure", Picture, Visual, Panels)

Outcome = Literal["holds", "holds in part", "does not hold here", "undecided"]
HOLDS: Outcome = "holds"
IN_PART: Outcome = "holds in part"
FAILS: Outcome = "does not hold here"
UNDECIDED: Outcome = "undecided"
# What a rule says of a case: borne out or not, in part, or of each of several in it.
CaseOutcome = bool | Outcome | Mapping[str, Outcome]
CASE = ("ladder", "model", "seed")
INTERVALS = "In brackets 95 % intervals, the widest over seeds."
SMALL_EVERY = 16  # of the requests are asked in a small run: two items of each topic of an organism


def verdict(cases: Sequence[Outcome]) -> Outcome:
    """Of all cases together, by the scale above."""
    if cases and set(cases) == {HOLDS}:
        return HOLDS
    n_borne_out = sum(case in (HOLDS, IN_PART) for case in cases)
    return IN_PART if cases and 2 * n_borne_out >= len(cases) else FAILS


@dataclass(frozen=True)
class ClaimResult:
    """What its rows say of a claim."""

    name: str
    text: str
    outcome: Outcome | None
    cases: "pandas.DataFrame"
    key_numbers: "pandas.DataFrame"

    @property
    def title(self) -> str:
        """The claim and its outcome in a line."""
        title = f"{self.name}. {self.text}"
        return f"{title}: {self.outcome} ({self.count})" if self.outcome else title

    @property
    def line(self) -> str:
        """The claim and its outcome as a line of a Markdown table."""
        return f"| {self.name} | {self.text} | **{self.outcome}** | {self.count} |"

    @property
    def count(self) -> str:
        """In how many of all cases it is borne out, and in how many in part."""
        outcomes = list(self.cases["outcome"]) if len(self.cases) else []
        text = f"{outcomes.count(HOLDS)} of {len(outcomes)}"
        n_in_part = outcomes.count(IN_PART)
        return f"{text}, {n_in_part} in part" if n_in_part else text

    @property
    def sections(self) -> list[str]:
        """Both tables, as parts of a page."""
        parts = []
        if len(self.key_numbers):
            parts.append(section("Key numbers", INTERVALS, frame(self.key_numbers)))
        if self.outcome:
            parts.append(section("Each case", "By the rule, fixed beforehand.", frame(self.cases)))
        return parts

    def __repr__(self) -> str:
        tables = [data for data in (self.key_numbers, self.cases) if len(data)]
        return "\n\n".join([self.title, *(data.to_string(index=False) for data in tables)])

    def _repr_html_(self) -> str:
        return section(self.title, "", "".join(self.sections))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text | Table]:
        """The claim with its outcome, and the key numbers."""
        yield Text(self.title, style="bold")
        yield frame_table(self.key_numbers)


@dataclass(frozen=True)
class Experiment:
    """A function of an analysis that measures one model, or every model of a ladder, and a seed."""

    run: Callable[..., Rows]
    is_of_ladder: bool = False

    @property
    def options(self) -> type:
        """Its keyword-only parameters as the fields of a dataclass, described by its docstring."""
        hints = get_type_hints(self.run)
        options = []
        for name, parameter in signature(self.run).parameters.items():
            if parameter.kind is Parameter.KEYWORD_ONLY:
                options.append((name, hints[name], field(default=parameter.default)))
        text = {"__doc__": getdoc(self.run)}
        return make_dataclass("Options", options, frozen=True, namespace=text)

    def jobs(
        self, specs: Sequence[ModelSpec], seeds: Sequence[int], options: Mapping[str, Any]
    ) -> Iterator[Job]:
        """A job for every model, or ladder, and seed."""
        for together in self._groups(specs):
            for seed in seeds:
                labels: dict[str, Any] = {"ladder": together[0].labels["ladder"]}
                if not self.is_of_ladder:
                    labels["model"] = together[0].labels["model"]
                labels |= {"seed": seed, "part": self.run.__name__}
                yield Job(labels, partial(self.measured, together, seed, options, labels))

    def measured(
        self,
        specs: Sequence[ModelSpec],
        seed: int,
        options: Mapping[str, Any],
        labels: Mapping[str, Any],
    ) -> Rows:
        """The rows of one job, with its labels."""
        models = {spec.labels["model"]: spec.open(seed=seed) for spec in specs}
        subject = models if self.is_of_ladder else next(iter(models.values()))
        rows = self.run(subject, seed, **options)
        return Rows(row.labelled(**{**labels, **row.labels}) for row in rows)

    def _groups(self, specs: Sequence[ModelSpec]) -> list[list[ModelSpec]]:
        if not self.is_of_ladder:
            return [[spec] for spec in specs]
        ladders: dict[str, list[ModelSpec]] = {}
        for spec in specs:
            ladders.setdefault(spec.labels["ladder"], []).append(spec)
        return list(ladders.values())


@dataclass(frozen=True)
class ClaimOptions(RunOptions):
    """What every analysis of a claim takes.

    Attributes:
        seeds: how many seeds; by default as many as were committed.
        small: few requests and one seed: a first look.
    """

    seeds: int = 0
    small: bool = False


@dataclass
class Claim:
    """A claim, and what an analysis registers with it."""

    name: str
    text: str
    models: Sequence[str]
    small: Mapping[str, Any] = field(default_factory=dict)
    seeds: int = 1
    small_models: Sequence[str] = ()
    experiment: Experiment = field(init=False)
    figures: dict[str, Picture | Visual | Panels] = field(
        default_factory=dict, init=False, repr=False
    )
    _rule: Callable[[Rows], CaseOutcome] | None = field(default=None, init=False, repr=False)
    _over: tuple[str, ...] = field(default=CASE, init=False, repr=False)
    _confound: Callable[[Rows], bool] | None = field(default=None, init=False, repr=False)
    _key_numbers: Callable[[Rows], Mapping[str, str]] | None = field(
        default=None, init=False, repr=False
    )
    # Where a script's run is, and what it gave.
    _out: Path | None = field(default=None, init=False, repr=False)
    _rows: Rows = field(default_factory=Rows, init=False, repr=False)

    def job(self, run: Callable[..., Rows]) -> Callable[..., Rows]:
        """Decorates `run(model, seed, **options) -> Rows`, called for every model and seed."""
        self.experiment = Experiment(run)
        return run

    def ladder_job(self, run: Callable[..., Rows]) -> Callable[..., Rows]:
        """Decorates `run(models, seed, **options) -> Rows`, called for every ladder and seed."""
        self.experiment = Experiment(run, is_of_ladder=True)
        return run

    def rule(self, *over: str) -> Callable:
        """Decorates the rule, which was fixed before the experiment was run."""

        def decorate(rule: Callable[[Rows], CaseOutcome]) -> Callable[[Rows], CaseOutcome]:
            self._rule, self._over = rule, over or CASE
            return rule

        return decorate

    def confound(self, explains: Callable[[Rows], bool]) -> Callable[[Rows], bool]:
        """Decorates what says whether something else than the claim explains its cases."""
        self._confound = explains
        return explains

    def key_numbers(
        self, numbers: Callable[[Rows], Mapping[str, str]]
    ) -> Callable[[Rows], Mapping[str, str]]:
        """Decorates what gives the numbers to know of one model, or of one ladder as the rule is."""
        self._key_numbers = numbers
        return numbers

    def figure(self, title: str, figure: AnyFigure) -> AnyFigure:
        """The same figure, kept for the page."""
        self.figures[title] = figure
        return figure

    def rows(
        self,
        out: str | Path | None = None,
        *,
        models: Sequence[str] = (),
        seeds: int = 0,
        small: bool = False,
        workers: int = 1,
        **options: Any,
    ) -> Rows:
        """The rows of the experiment: committed, or of a run; its workers are where joblib is told."""
        if self._is_script:
            return self._of_command_line()
        if out is None and not small:
            return self._committed()
        with TemporaryDirectory() as temporary:
            run = ClaimOptions(
                Path(out or temporary), tuple(models), workers=workers, seeds=seeds, small=small
            )
            return self._run(run, options)

    def result(self, rows: Rows) -> ClaimResult:
        """What the rule says of each case and of all together, and the key numbers."""
        import pandas

        numbers = self._table_of_numbers(rows)
        if self._rule is None:
            return ClaimResult(self.name, self.text, None, pandas.DataFrame(), numbers)
        lines = []
        for values, of_case in self._cases(rows, self._over).items():
            case = dict(zip(self._over, values, strict=True))
            borne_out = self._rule(of_case)
            if isinstance(borne_out, bool):
                borne_out = HOLDS if borne_out else FAILS
            if isinstance(borne_out, str):
                lines.append({**case, "outcome": borne_out})
                continue
            for name, outcome in borne_out.items():
                lines.append({**case, "of": name, "outcome": outcome})
        outcome = verdict([line["outcome"] for line in lines])
        if self._confound is not None and self._confound(rows):
            outcome = UNDECIDED
        return ClaimResult(self.name, self.text, outcome, pandas.DataFrame(lines), numbers)

    def _table_of_numbers(self, rows: Rows) -> "pandas.DataFrame":
        """The key numbers: a line for each, a column for each model."""
        import pandas

        if self._key_numbers is None:
            return pandas.DataFrame()
        columns = {}
        over = [name for name in self._over if name in ("ladder", "model")]
        for values, of_model in self._cases(rows, over).items():
            columns[_name_of(values)] = self._key_numbers(of_model)
        # In the order of the model that has most of them.
        names = dict.fromkeys(chain(*sorted(columns.values(), key=len, reverse=True)))
        table = pandas.DataFrame(columns, index=list(names)).fillna(DASH)
        return table.rename_axis("").reset_index()

    def main(self) -> None:
        """As a script, print the result and write the page; else nothing."""
        if self._out is None:
            return
        result = self.result(self._rows)
        page = self._out / f"{self.name}.html"
        parts = [*result.sections, *self._sections()]
        write_page(page, result.title, parts, script=self._script)
        if result.outcome:
            write_text(self._out / "summary.md", result.line + "\n")

        console = Console()
        console.print(result)
        console.print(f"Page: {page}", highlight=False, soft_wrap=True, markup=False)

    def _sections(self) -> list[str]:
        """The figures as parts of the page."""
        sections = []
        for title, figure in self.figures.items():
            is_picture = isinstance(figure, Picture)
            content = (
                plot(figure, label=title) if is_picture else visual(figure.html(), label=title)
            )
            sections.append(section(title, "", content))
        return sections

    @property
    def _script(self) -> str:
        """circuitsvis' own, where a figure needs it."""
        needs_it = any(isinstance(figure, Visual | Panels) for figure in self.figures.values())
        return circuitsvis_script() if needs_it else ""

    @property
    def _is_script(self) -> bool:
        """Whether the analysis is what Python was told to run, outside a notebook."""
        if self.experiment.run.__module__ != "__main__":
            return False
        ipython = sys.modules.get("IPython")
        return ipython is None or ipython.get_ipython() is None

    def _cases(self, rows: Rows, names: Sequence[str]) -> dict[tuple, Rows]:
        """The rows by the values of these labels; those that lack one belong to no case."""
        labelled = Rows(row for row in rows if set(names) <= set(row.labels))
        if len(names) > 1:
            return labelled.by(*names)
        return {(value,): of_case for value, of_case in labelled.by(*names).items()}

    def _committed(self) -> Rows:
        """The rows that are committed beside the analysis."""
        # A notebook's functions lie in a temporary file, but it runs in the notebook's folder.
        analysis = Path(self.experiment.run.__code__.co_filename)
        folders = [analysis.parent, Path.cwd(), Path.cwd() / "analyses"]
        for folder in folders:
            path = folder / "rows" / f"{self.name}.jsonl"
            if path.is_file():
                return _measured(Rows.read(path))
        raise ValueError(
            f"{self.name}: no rows/{self.name}.jsonl in {folders[0]} or {folders[1]}; "
            "give out=FOLDER to run the experiment, or small=True for a first look"
        )

    def _run(self, run: ClaimOptions, options: Mapping[str, Any]) -> Rows:
        """Run what is missing in a folder."""
        usual = self.experiment.options()
        unknown = [name for name in options if name not in vars(usual)]
        if unknown:
            raise ValueError(
                f"{self.name} has no option {unknown[0]!r}; it has {list(vars(usual))}"
            )
        specs = run.specs((run.small and self.small_models) or self.models)
        if run.small:
            specs = [replace(spec, every=SMALL_EVERY) for spec in specs]
            options = {**self.small, **options}
        n_seeds = run.seeds or (1 if run.small else self.seeds)

        jobs = list(self.experiment.jobs(specs, range(n_seeds), options))
        settings: dict[str, Any] = {"claim": self.name, "small": run.small}
        settings["options"] = repr(sorted(options.items()))
        if run.own.arguments["prompts"]:
            settings["own"] = repr(run.own)
        rows = run_jobs(run.out, jobs, settings, workers=run.workers, name=self.name)
        return _measured(rows)

    def _of_command_line(self) -> Rows:
        """Run what the command line asks for; ends the script where it only asks for help."""
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # of transformers, between ours
        options = self.experiment.options
        parts = [
            ("run", OmitArgPrefixes[ClaimOptions]),
            ("experiment", OmitArgPrefixes[options], field(default_factory=options)),
        ]
        given: Any = tyro.cli(make_dataclass("Command", parts), config=(FlagCreatePairsOff,))
        usual = options()
        changed = {}
        for name, value in vars(given.experiment).items():
            if value != getattr(usual, name):
                changed[name] = value
        with in_one_sentence():
            self._rows = self._run(given.run, changed)
        self._out = given.run.out
        return self._rows


def _name_of(values: tuple[str, ...]) -> str:
    """A ladder and a model, or a ladder alone, as the title of a column; "shipped" goes unsaid."""
    ladder, *model = values
    if not model:
        return ladder
    return model[0] if ladder == "shipped" else f"{model[0]} of {ladder}"


def _measured(rows: Rows) -> Rows:
    """Without the times of jobs."""
    return Rows(row for row in rows if row.metric not in (DONE, CPU))
