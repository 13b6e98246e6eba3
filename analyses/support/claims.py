"""A claim: the experiment that tests it, the two tests that judge it, and its key numbers.

All claims are judged on one scale, twice, from the same rows. The *effect* is what the paper reports.
*With controls* asks for the effect, and for what this project's rule adds. A case is one model and seed
(for some claims a ladder, a run or a pair). A training run shows a claim if each of its cases does; a
claim is shown in k of n training runs, and nothing stronger is said. It is undecided with controls,
whatever the count, if a confound that it names explains the cases.

Until 7 December 2026 each claim had one verdict (holds, holds in part, does not hold here), over cases
of one training run as if they were independent. The tests are parts of the same rules; F6 got its chance
floor that day. The rows did not change.

Since their amendments F1, F3, F4, F6 and the attacks were run again by the search of 30 November 2026
(gates): three ladders, one seed; and once more after the search had begun to score fresh answers under
its mask, a change that F2's rows called for.

An ability is *kept* (`curves.KEPT_RATE`, `KEPT_NLL`) if its rate falls by at most 5 points and the
loss on benign answers rises by at most 0.1 nats a token, both in the mean. One of 64 items is 1.6
points and one of 48 items is 2.1, so 5 points are three or two items. The limit cannot be the end
of an interval: if no item of 64 is lost, the interval still reaches 7 points.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, wraps
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, TypeVar

import pandas
import tyro
from rich.console import Console, ConsoleOptions
from rich.table import Table
from rich.text import Text
from support.jobs import CPU_SECONDS, JOB_SECONDS, Job, run_jobs
from support.models import ModelSpec, RunOptions
from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes, arg

from harmcircuits.cli import in_one_sentence
from harmcircuits.measurements import Rows
from harmcircuits.storage import write_text
from harmcircuits.views.circuitsvis import Panels, Visual, circuitsvis_script
from harmcircuits.views.figures import Picture
from harmcircuits.views.page import frame, plot, section, visual, write_page
from harmcircuits.views.tables import DASH, frame_table

AnyFigure = TypeVar("AnyFigure", Picture, Visual, Panels)

# The answer of a test for a case: yes or no, or that for each of its parts.
CaseAnswer = bool | Mapping[str, bool]
Experiment = Callable[..., Rows]
Rule = Callable[[Rows], CaseAnswer]
Confound = Callable[[Rows], bool]
KeyNumbers = Callable[[Rows], Mapping[str, str]]

CASE = ("ladder", "model", "seed")
EFFECT, WITH_CONTROLS = "effect", "with controls"
UNDECIDED = "undecided (a confound)"
INTERVALS = "In brackets 95 % intervals, the widest over seeds."
SMALL_EVERY = 16  # a small run asks every 16th request: two items of each topic of an organism


def in_runs(cases: Mapping[str, Sequence[bool]]) -> str:
    """How many training runs show a claim in each of their cases; and how many cases, if they are more."""
    n_runs, n_cases = len(cases), sum(len(answers) for answers in cases.values())
    n_shown = sum(all(answers) for answers in cases.values())
    text = f"{n_shown or 'none'} of {n_runs}"
    n_yes = sum(sum(answers) for answers in cases.values())
    return text if n_cases == n_runs else f"{text} ({n_yes} of {n_cases} cases)"


@dataclass(frozen=True)
class ClaimResult:
    """What the rows of a claim say: `cases` has a line for each, with the answer of each test."""

    name: str
    text: str
    cases: pandas.DataFrame
    key_numbers: pandas.DataFrame
    is_confounded: bool = False

    @property
    def effect(self) -> str:
        """How many training runs show the paper's effect; a dash for a question of our own."""
        return self._in_runs(EFFECT) if EFFECT in self.cases else DASH

    @property
    def with_controls(self) -> str:
        """How many training runs show the claim with this project's controls."""
        return UNDECIDED if self.is_confounded else self._in_runs(WITH_CONTROLS)

    def _in_runs(self, test: str) -> str:
        answers = self.cases.groupby("ladder", sort=False)[test].apply(list)
        return in_runs(answers.to_dict())

    @property
    def verdict(self) -> str:
        """Both counts, in words; one for a rule without an effect, nothing without a rule."""
        if not len(self.cases):
            return ""
        if EFFECT not in self.cases:
            return f"training runs: {self.with_controls}"
        return f"training runs: {self.effect}; with controls: {self.with_controls}"

    @property
    def title(self) -> str:
        """The claim and what the rows say, in a line."""
        title = f"{self.name}. {self.text}"
        return f"{title}: {self.verdict}" if self.verdict else title

    @property
    def line(self) -> str:
        """The claim and both counts as a line of a Markdown table."""
        return f"| {self.name} | {self.text} | {self.effect} | {self.with_controls} |"

    @property
    def sections(self) -> list[str]:
        """Both tables, as parts of a page."""
        parts = []
        if len(self.key_numbers):
            parts.append(section("Key numbers", INTERVALS, frame(self.key_numbers)))
        if len(self.cases):
            parts.append(section("Each case", "By the rule of the analysis.", frame(self.cases)))
        return parts

    def __repr__(self) -> str:
        texts = [self.title]
        for table in (self.key_numbers, self.cases):
            if len(table):
                texts.append(table.to_string(index=False))
        return "\n\n".join(texts)

    def _repr_html_(self) -> str:
        return section(self.title, "", "".join(self.sections))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text | Table]:
        yield Text(self.title, style="bold")
        yield frame_table(self.key_numbers)


@dataclass(frozen=True)
class ClaimOptions(RunOptions):
    """What every analysis of a claim takes.

    Attributes:
        seeds: how many seeds; by default as many as were committed.
        small: few requests and one seed: a first look.
    """

    seeds: int = 0
    small: bool = False


class Claim:
    """A claim, and what an analysis registers with it."""

    experiment: Experiment

    def __init__(
        self,
        name: str,
        text: str,
        models: Sequence[str],
        *,
        small: Mapping[str, Any] | None = None,
        seeds: int = 1,
        small_models: Sequence[str] = (),
    ) -> None:
        self.name = name
        self.text = text
        self.models = models
        self.small = small or {}
        self.seeds = seeds
        self.small_models = small_models or models
        self.figures: dict[str, Picture | Visual | Panels] = {}
        self._is_of_ladder = False
        self._effect: Rule | None = None
        self._rule: Rule | None = None
        self._over: tuple[str, ...] = CASE
        self._confound: Confound | None = None
        self._key_numbers: KeyNumbers | None = None
        # The folder and the rows of a script's run.
        self._out: Path | None = None
        self._rows = Rows()

    def job(self, experiment: Experiment) -> Experiment:
        """Decorates `experiment(model, seed, **options)`, called for every model and seed."""
        self.experiment = experiment
        return experiment

    def ladder_job(self, experiment: Experiment) -> Experiment:
        """Decorates `experiment(models, seed, **options)`, called for every ladder and seed."""
        self._is_of_ladder = True
        return self.job(experiment)

    def effect(self, effect: Rule) -> Rule:
        """Decorates the test of the paper's effect alone, on the cases of the rule."""
        self._effect = effect
        return effect

    def rule(self, *over: str) -> Callable[[Rule], Rule]:
        """Decorates the test with controls; `over` are the labels that tell cases apart."""

        def decorate(rule: Rule) -> Rule:
            self._rule = rule
            self._over = over or CASE
            return rule

        return decorate

    def confound(self, confound: Confound) -> Confound:
        """Decorates a test whether something other than the claim explains the effect."""
        self._confound = confound
        return confound

    def key_numbers(self, key_numbers: KeyNumbers) -> KeyNumbers:
        """Decorates a function that gives the key numbers of one model or one ladder."""
        self._key_numbers = key_numbers
        return key_numbers

    def figure(self, title: str, figure: AnyFigure) -> AnyFigure:
        """The same figure, which the page shows too."""
        self.figures[title] = figure
        return figure

    @property
    def options(self) -> dict[str, Any]:
        """The options of the experiment, with their defaults."""
        return self.experiment.__kwdefaults__ or {}

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
        """The rows of the experiment: the committed ones, or those of a run.

        Workers run on this machine, or on the backend that joblib was given.
        """
        if self._is_script:
            return self._run_script()
        if out is None and not small:
            return self._committed()
        with TemporaryDirectory() as temporary:
            folder = Path(out or temporary)
            run = ClaimOptions(folder, tuple(models), workers=workers, seeds=seeds, small=small)
            return self._run(run, options)

    def result(self, rows: Rows) -> ClaimResult:
        """Whether each case shows the effect, and with controls; and the key numbers."""
        numbers = self._number_table(rows)
        if self._rule is None:
            return ClaimResult(self.name, self.text, pandas.DataFrame(), numbers)
        lines = []
        for values, case_rows in _cases(rows, self._over).items():
            case = dict(zip(self._over, values, strict=True))
            lines += [{**case, **line} for line in self._answers(case_rows)]
        is_confounded = self._confound is not None and self._confound(rows)
        return ClaimResult(self.name, self.text, pandas.DataFrame(lines), numbers, is_confounded)

    def _answers(self, rows: Rows) -> list[dict[str, Any]]:
        """The answers of both tests for a case, or for each of its parts."""
        assert self._rule is not None
        controlled = self._rule(rows)
        if self._effect is None:
            return [{WITH_CONTROLS: controlled}]
        effect = self._effect(rows)
        if isinstance(controlled, bool):
            return [{EFFECT: effect, WITH_CONTROLS: effect and controlled}]
        assert isinstance(effect, Mapping)
        lines = []
        for part, answer in controlled.items():
            is_shown = effect[part]
            lines.append({"of": part, EFFECT: is_shown, WITH_CONTROLS: is_shown and answer})
        return lines

    def _number_table(self, rows: Rows) -> pandas.DataFrame:
        """The key numbers: a line for each, a column for each model."""
        if self._key_numbers is None:
            return pandas.DataFrame()
        columns = {}
        over = [name for name in self._over if name in ("ladder", "model")]
        for values, model_rows in _cases(rows, over).items():
            columns[_title(values)] = self._key_numbers(model_rows)
        # In the order of the model that has most of them.
        names = dict.fromkeys(chain(*sorted(columns.values(), key=len, reverse=True)))
        table = pandas.DataFrame(columns, index=list(names)).fillna(DASH)
        return table.rename_axis("").reset_index()

    def main(self) -> None:
        """In a script, print the result and write the page; elsewhere nothing."""
        if self._out is None:
            return
        result = self.result(self._rows)
        page = self._out / f"{self.name}.html"
        is_visual = [not isinstance(figure, Picture) for figure in self.figures.values()]
        script = circuitsvis_script() if any(is_visual) else ""
        write_page(page, result.title, [*result.sections, *self._sections()], script=script)
        if result.verdict:
            write_text(self._out / "summary.md", result.line + "\n")

        console = Console()
        console.print(result)
        console.print(f"Page: {page}", highlight=False, soft_wrap=True, markup=False)

    def _sections(self) -> list[str]:
        """The figures as parts of the page."""
        sections = []
        for title, figure in self.figures.items():
            if isinstance(figure, Picture):
                content = plot(figure, label=title)
            else:
                content = visual(figure.html(), label=title)
            sections.append(section(title, "", content))
        return sections

    @property
    def _is_script(self) -> bool:
        """Whether Python runs the analysis as its script, outside a notebook."""
        if self.experiment.__module__ != "__main__":
            return False
        ipython = sys.modules.get("IPython")
        return ipython is None or ipython.get_ipython() is None

    def _committed(self) -> Rows:
        """The rows that are committed beside the analysis."""
        # A notebook's functions lie in a temporary file, but it runs in the notebook's folder.
        analysis = Path(self.experiment.__code__.co_filename)
        folders = [analysis.parent, Path.cwd(), Path.cwd() / "analyses"]
        for folder in folders:
            path = folder / "rows" / f"{self.name}.jsonl"
            if path.is_file():
                return _without_times(Rows.read(path))
        raise ValueError(
            f"{self.name}: no rows/{self.name}.jsonl in {folders[0]} or {folders[1]}; "
            "give out=FOLDER to run the experiment, or small=True for a first look"
        )

    def _run(self, run: ClaimOptions, options: Mapping[str, Any]) -> Rows:
        """The rows of a run in a folder, whose finished jobs are not run again."""
        unknown = [name for name in options if name not in self.options]
        if unknown:
            raise ValueError(
                f"{self.name} has no option {unknown[0]!r}; it has {list(self.options)}"
            )
        specs = run.specs(self.small_models if run.small else self.models)
        if run.small:
            specs = [replace(spec, every=SMALL_EVERY) for spec in specs]
            options = {**self.small, **options}
        n_seeds = run.seeds or (1 if run.small else self.seeds)

        settings: dict[str, Any] = {"claim": self.name, "small": run.small}
        settings["options"] = repr(sorted(options.items()))
        if run.own.arguments["prompts"]:
            settings["own"] = repr(run.own)
        jobs = self._jobs(specs, n_seeds, options)
        rows = run_jobs(run.out, jobs, settings, workers=run.workers, name=self.name)
        return _without_times(rows)

    def _jobs(
        self, specs: Sequence[ModelSpec], n_seeds: int, options: Mapping[str, Any]
    ) -> list[Job]:
        """A job for every model, or ladder, and seed."""
        subjects: Sequence[ModelSpec | list[ModelSpec]] = specs
        if self._is_of_ladder:
            ladders: dict[str, list[ModelSpec]] = {}
            for spec in specs:
                ladders.setdefault(spec.labels["ladder"], []).append(spec)
            subjects = list(ladders.values())

        jobs = []
        for subject in subjects:
            if isinstance(subject, ModelSpec):
                names = {name: subject.labels[name] for name in ("ladder", "model")}
            else:
                names = {"ladder": subject[0].labels["ladder"]}
            for seed in range(n_seeds):
                labels = {**names, "seed": seed, "part": self.experiment.__name__}
                run = partial(_job_rows, self.experiment, subject, seed, options, labels)
                jobs.append(Job(labels, run))
        return jobs

    def _run_script(self) -> Rows:
        """The rows of the run that the command line asks for."""
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # of transformers, between ours

        @wraps(self.experiment)
        def changed_options(*_: Any, **options: Any) -> dict[str, Any]:
            return {name: value for name, value in options.items() if value != self.options[name]}

        # The options of the experiment without its model and its seed.
        parser: Any = arg(constructor=partial(changed_options, None, 0))

        def command(
            run: OmitArgPrefixes[ClaimOptions],
            experiment: OmitArgPrefixes[Annotated[Any, parser]],
        ) -> tuple[ClaimOptions, dict[str, Any]]:
            return run, experiment

        run, options = tyro.cli(command, config=(FlagCreatePairsOff,))
        with in_one_sentence():
            self._rows = self._run(run, options)
        self._out = run.out
        return self._rows


def _job_rows(
    experiment: Experiment,
    subject: ModelSpec | Sequence[ModelSpec],
    seed: int,
    options: Mapping[str, Any],
    labels: Mapping[str, Any],
) -> Rows:
    """The rows of one job, with its labels."""
    if isinstance(subject, ModelSpec):
        model = subject.open(seed=seed)
    else:
        model = {spec.labels["model"]: spec.open(seed=seed) for spec in subject}
    rows = experiment(model, seed, **options)
    return Rows(row.labelled(**{**labels, **row.labels}) for row in rows)


def _cases(rows: Rows, names: Sequence[str]) -> dict[tuple, Rows]:
    """The rows by the values of these labels; a row that lacks one belongs to no case."""
    labelled = Rows(row for row in rows if set(names) <= set(row.labels))
    if len(names) > 1:
        return labelled.by(*names)
    return {(value,): case_rows for value, case_rows in labelled.by(*names).items()}


def _title(values: tuple[str, ...]) -> str:
    """A ladder and a model, or a ladder alone, as the title of a column; "shipped" goes unsaid."""
    ladder, *model = values
    if not model:
        return ladder
    return model[0] if ladder == "shipped" else f"{model[0]} of {ladder}"


def _without_times(rows: Rows) -> Rows:
    return Rows(row for row in rows if row.metric not in (JOB_SECONDS, CPU_SECONDS))
