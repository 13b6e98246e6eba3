"""Figures out: a measurement with its 95 % interval, rows of them, and their files."""

import platform
import sys
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import version
from math import inf, isfinite, sqrt
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from scipy.stats import bootstrap, rankdata
from scipy.stats import t as student
from torch import Tensor

from harmcircuits.display import card, html_table, interval_mark, listed, note, number_text, plural
from harmcircuits.storage import append_lines, read_json, read_lines, write_json, write_lines

if TYPE_CHECKING:
    import pandas

Label = str | int | float
Labels = Mapping[str, Label]
Interval = tuple[float, float]

Z = 1.959964  # two-sided 95 % of a normal
ENDS = (0.025, 0.975)  # quantiles of a 95 % percentile interval
N_RESAMPLES = 2000
N_AUROC_RESAMPLES = 200  # each ranks all values again
PLAIN = (str, int, float)  # types of a label
ROWS_FILE = "the rows.jsonl of a study"  # in error messages
RATES = ("_rate", "_accuracy")  # how the names of shares end
SHOWN_ROWS = 20  # in a notebook
LIBRARIES = ("harmcircuits", "torch", "transformers", "transformer-lens", "circuitsvis", "plotly")


@dataclass(frozen=True)
class Measurement:
    """One figure: a mean over `n` examples with its 95 % interval, and what it was measured on.

    `f"{row:.0%}"` writes `77% [63%, 88%]`; an exact figure is written alone.

    >>> row = hc.Measurement("refusal_rate", {"model": "sft"}, mean=0.77, low=0.63, high=0.88)
    >>> f"{row:.0%}"
    '77% [63%, 88%]'

    Attributes:
        metric: what was measured, such as "harm_nll" (nats per token) or "refusal_rate" (a share).
        labels: model, mask, split and settings.
        mean: the figure.
        low: lower end of the interval; equal to `mean` where the figure is exact, such as a count.
        high: upper end.
        n: how many examples it is the mean of.
    """

    metric: str
    labels: Labels
    mean: float
    low: float
    high: float
    n: int = 1

    @classmethod
    def exact(cls, metric: str, labels: Labels, value: float) -> "Measurement":
        """A figure without sampling error, such as a count."""
        return cls(metric, labels, value, value, value)

    @classmethod
    def rate(
        cls,
        metric: str,
        labels: Labels,
        hits: Sequence[float],
        groups: Sequence[Hashable],
    ) -> "Measurement":
        """Share of hits with its Wilson interval, which counts each group once.

        With continuity correction: a count moves in steps, and without it what the interval holds
        falls to 92 % and less at some rates.

        Answers about one item are not independent, so the interval is that of as many examples as
        there are groups: conservative where examples within a group disagree. Where groups differ
        in size, the large ones decide, and it is that of (sum of sizes)^2 / sum of sizes^2
        examples. Source: Kish 1965, on weights.

        Args:
            metric: name of the rate.
            labels: what it was measured on.
            hits: 1 or 0 for each example, or a share.
            groups: what each example is about.

        Raises:
            ValueError: no examples, or not exactly one group for each.
        """
        _check(metric, hits, groups)
        mean = float(np.mean(hits))
        sizes = np.array([*Counter(groups).values()])
        n_effective = float(sizes.sum() ** 2 / (sizes**2).sum())
        low, high = wilson(mean, n_effective, half_step=0.5 / n_effective)
        # By rounding, an end can pass the mean or leave [0, 1].
        low = max(0.0, min(mean, low))
        high = min(1.0, max(mean, high))
        return cls(metric, labels, mean, low, high, len(hits))

    @classmethod
    def average(
        cls,
        metric: str,
        labels: Labels,
        values: Float[Tensor, " n"],
        groups: Sequence[Hashable],
        *,
        are_counts: bool = False,
        seed: int = 0,
    ) -> "Measurement":
        """Mean of the values with a bootstrap interval that resamples whole groups.

        Args:
            metric: name of the figure.
            labels: what it was measured on.
            values: the value of each example.
            groups: what each example is about.
            are_counts: of hits, or differences of such, so that the mean moves in steps.
            seed: draws the 2,000 resamples.

        Raises:
            ValueError: no examples, not exactly one group for each, or a value that is not finite.
        """
        _check(metric, values, groups)
        _refuse_not_finite(metric, values)
        # Groups are resampled by their sums and sizes:
        #
        #     groups    a  a  b        member    0  0  1
        #     values    1  3  5        sums      4  5        sizes    2  1
        _, member = np.unique([str(group) for group in groups], return_inverse=True)
        sums = np.bincount(member, values.cpu().double().numpy())
        sizes = np.bincount(member)
        mean = float(sums.sum() / sizes.sum())
        means = _resampled(_ratio, (sums, sizes), N_RESAMPLES, seed)
        step = step_of_means(sums, sizes) if are_counts else 0.0
        return cls.of_draws(
            metric,
            labels,
            means,
            mean=mean,
            n=len(values),
            n_groups=len(sizes),
            step=step,
        )

    @classmethod
    def auroc(
        cls,
        metric: str,
        labels: Labels,
        values: Float[Tensor, " n"],
        is_positive: Bool[Tensor, " n"],
        groups: Sequence[Hashable],
    ) -> "Measurement":
        """Area under the ROC curve with a bootstrap interval over whole groups.

        Groups that hold both kinds, as matched pairs do, are resampled apart from those of
        positives and from those of negatives alone, so that no resample lacks a kind. 200
        resamples, seed 0. Where the figure is 1, so is its interval, however few examples there
        are.

        Args:
            metric: name of the figure.
            labels: what it was measured on.
            values: the value of each example; higher should mean positive.
            is_positive: which examples are positive.
            groups: what each example is about.

        Raises:
            ValueError: no examples, not exactly one group for each, a value that is not finite, or
                examples of one kind only.
        """
        _check(metric, values, groups)
        _refuse_not_finite(metric, values)
        _, member = np.unique([str(group) for group in groups], return_inverse=True)
        n_groups = int(member.max()) + 1
        rows_of = [np.flatnonzero(member == number) for number in range(n_groups)]

        # A stratum for each mixture of kinds; one of a single group is the same in every resample.
        positive = is_positive.cpu().numpy()
        strata: dict[tuple[bool, bool], list[int]] = {}
        for number, rows in enumerate(rows_of):
            kinds = bool(positive[rows].any()), bool(positive[rows].all())
            strata.setdefault(kinds, []).append(number)
        drawn_from = []
        single = []
        for numbers in strata.values():
            if len(numbers) == 1:
                single += numbers
            else:
                drawn_from.append(np.array(numbers))

        def area(*drawn: ndarray) -> float:
            """Of the examples of these groups, by number; a group may be drawn twice."""
            numbers = [*single, *np.concatenate(drawn)] if drawn else single
            resample = np.concatenate([rows_of[number] for number in numbers])
            return auroc(values[resample], is_positive[resample])

        areas = _resampled(area, tuple(drawn_from), N_AUROC_RESAMPLES, seed=0, paired=False)
        mean = auroc(values, is_positive)
        return cls.of_draws(
            metric,
            labels,
            areas,
            mean=mean,
            n=len(values),
            n_groups=sum(map(len, drawn_from)),
            n_strata=len(drawn_from),
            bounds=(0.0, 1.0),
        )

    @classmethod
    def difference(
        cls,
        metric: str,
        labels: Labels,
        first: "Measurement",
        second: "Measurement",
    ) -> "Measurement":
        """How much higher the first rate is than the second, with Newcombe's hybrid-score interval.

        low = d - sqrt((p1 - low1)^2 + (high2 - p2)^2), and high likewise, from the rates' own
        Wilson intervals. It takes the rates as independent, so it is conservative for the same
        requests asked twice. Source: Newcombe 1998, method 11.

        Args:
            metric: name of the difference.
            labels: what it was measured on.
            first: a rate.
            second: the rate that is taken from it.
        """
        # The difference is lowest where the first rate is low and the second high.
        change = first.mean - second.mean
        below = sqrt((first.mean - first.low) ** 2 + (second.high - second.mean) ** 2)
        above = sqrt((first.high - first.mean) ** 2 + (second.mean - second.low) ** 2)
        n = min(first.n, second.n)
        return cls(metric, labels, change, low=change - below, high=change + above, n=n)

    @classmethod
    def of_draws(
        cls,
        metric: str,
        labels: Labels,
        draws: Sequence[float] | np.ndarray,
        *,
        mean: float | None = None,
        n: int | None = None,
        n_groups: int = 0,
        n_strata: int = 1,
        step: float = 0.0,
        bounds: Interval = (-inf, inf),
        method: Literal["linear", "inverted_cdf"] = "linear",
    ) -> "Measurement":
        """A figure whose 95 % interval is that of its draws, such as resamples or random masks.

        Resamples of few groups vary too little. Around a mean of them the interval is therefore
        wider than their quantiles by `student_widening`: 18 % for 8 groups, 12 % for 16, 6 % for
        32. Of a figure that moves in steps, its ends lie half a step further out.

        Args:
            metric: name of the figure.
            labels: what it was measured on.
            draws: the figure on each resample.
            mean: the figure itself; the mean of the draws by default. The interval holds it.
            n: how many examples are behind it; the number of draws by default.
            n_groups: how many groups each draw resamples; 0 for draws that are no resamples of a
                mean.
            n_strata: of how many kinds the groups are that are resampled apart.
            step: how far apart two values of the figure are at least: 1 / n for a rate among n.
            bounds: what the interval cannot pass, such as 0 and 1.
            method: of `numpy.quantile`.
        """
        low, high = np.quantile(np.asarray(draws), ENDS, method=method)
        if mean is None:
            mean = float(np.mean(draws))
        if n is None:
            n = len(draws)
        if n_groups:
            widening = student_widening(n_groups, n_strata)
            low = max(bounds[0], mean - widening * (mean - low) - step / 2)
            high = min(bounds[1], mean + widening * (high - mean) + step / 2)
        # Resamples may all lie on one side of the figure; the interval still holds it.
        low = min(mean, float(low))
        high = max(mean, float(high))
        return cls(metric, labels, mean, low, high, n)

    def labelled(self, **labels: Label) -> "Measurement":
        """The same figure with further labels, or other values of them."""
        return replace(self, labels={**self.labels, **labels})

    @property
    def is_exact(self) -> bool:
        """Whether the figure has no sampling error, such as a count."""
        return self.n == 1 and self.low == self.mean == self.high

    def __format__(self, spec: str) -> str:
        """The figure and its interval, each number by the format given."""
        if not spec:
            return str(self)
        if self.is_exact:
            return format(self.mean, spec)
        return f"{self.mean:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"

    def __str__(self) -> str:
        return f"{self.metric} {self:.3g}"

    def __repr__(self) -> str:
        labels = ", ".join(f"{name}={value!r}" for name, value in self.labels.items())
        return f"Measurement({self}{', ' if labels else ''}{labels})"

    def _repr_html_(self) -> str:
        return Rows([self])._card("Measurement")

    @property
    def _text(self) -> str:
        """The figure with its interval, in the unit of its metric."""
        if self.metric.endswith(RATES):
            return f"{self:.0%}"
        return number_text(self.mean) if self.is_exact else f"{self:.3g}"


class Rows(Sequence[Measurement]):
    """Measurements in order, to select, pool, group and tabulate.

    >>> rows = model.measure(only=["benign", "recognition"])
    >>> rows.where("benign_nll")
    Rows(1: benign_nll)
    >>> f"{rows.one('recognition_accuracy'):.0%}"
    '100% [31%, 100%]'
    """

    def __init__(self, rows: Iterable[Measurement] = ()) -> None:
        self._rows = tuple(rows)

    @classmethod
    def read(cls, path: str | Path) -> "Rows":
        """The rows of a JSON Lines file, one object a line.

        Args:
            path: a file that `append_to` wrote, such as a study's rows.jsonl.

        Raises:
            ValueError: a missing file, or a line that is no measurement. Half a line at the end,
                which a killed run left, is left out.
        """
        try:
            return cls.of_dicts(read_lines(path, ROWS_FILE))
        except ValueError as error:
            name = str(path)
            raise error if name in str(error) else ValueError(f"{name}: {error}") from None

    @classmethod
    def of_dicts(cls, rows: Any) -> "Rows":
        """The rows of a list of objects, as JSON holds them.

        Args:
            rows: each with the fields of a `Measurement`.

        Raises:
            ValueError: no list, or an object that is no measurement, with its number.
        """
        if not isinstance(rows, list):
            raise ValueError(f"{type(rows).__name__}; expected a list of measurements")
        return cls(_measurement(row, f"row {number}") for number, row in enumerate(rows, start=1))

    def append_to(self, path: str | Path) -> None:
        """Add the rows to a JSON Lines file, one object a line, in one write (see `storage`).

        Args:
            path: the file, made if it is not there.

        Raises:
            OSError: it cannot be written, naming the file.
        """
        append_lines(path, [asdict(row) for row in self])

    def save(self, path: str | Path) -> None:
        """Write a JSON Lines file that holds these rows and no others, whole or not at all.

        Args:
            path: the file.

        Raises:
            OSError: it cannot be written, naming the file.
        """
        write_lines(path, [asdict(row) for row in self])

    def where(self, metric: str = "", /, **labels: Label) -> "Rows":
        """The rows of this metric that carry all these labels, in order.

        Args:
            metric: the metric's name; every metric by default.
            labels: name and value of each label.
        """
        wanted = labels.items()
        rows = []
        for row in self:
            is_of_metric = metric in ("", row.metric)
            if is_of_metric and wanted <= dict(row.labels).items():
                rows.append(row)
        return Rows(rows)

    def one(self, metric: str = "", /, **labels: Label) -> Measurement:
        """The only row of this metric with these labels.

        Args:
            metric: as in `where`.
            labels: as in `where`.

        Raises:
            ValueError: no row or several, with what tells the nearest ones apart.
        """
        rows = self.where(metric, **labels)
        if len(rows) == 1:
            return rows[0]

        conditions = [metric] if metric else []
        conditions += [f"{name}={value!r}" for name, value in labels.items()]
        wanted = ", ".join(conditions)
        if len(rows) > 1:
            raise ValueError(
                f"{len(rows)} rows have {wanted}; they differ in {rows._differences()}"
            )
        of_metric = self.where(metric)
        if not len(of_metric):
            metrics = listed(self.metrics) or "none"
            raise ValueError(f"no row has {wanted}; the metrics are {metrics}")
        differences = of_metric._differences() or "nothing"
        raise ValueError(
            f"no row has {wanted}; the rows of {metric or 'every metric'} differ in {differences}"
        )

    def largest(self) -> Measurement:
        """The row with the largest mean, the first of several.

        Raises:
            ValueError: no rows.
        """
        return max(self._some("largest"), key=lambda row: row.mean)

    def smallest(self) -> Measurement:
        """The row with the smallest mean, the first of several.

        Raises:
            ValueError: no rows.
        """
        return min(self._some("smallest"), key=lambda row: row.mean)

    def pool(self, over: str) -> "Rows":
        """One row for all rows that differ only in a label: their mean, with the widest ends.

        Args:
            over: the label, such as "seed".
        """
        together: dict[tuple, list[Measurement]] = {}
        for row in self:
            others = _without(row.labels, over)
            in_order = sorted(others.items(), key=str)
            key = (row.metric, *in_order)
            together.setdefault(key, []).append(row)
        return Rows(_pooled(rows, over) for rows in together.values())

    def by(self, *names: str) -> "dict[Any, Rows]":
        """The rows of every value of a label in turn, as they come.

        Args:
            names: the labels; keys are values of one label, tuples of values of several.

        Raises:
            ValueError: a row without one of the labels.
        """
        together: dict[Any, list[Measurement]] = {}
        for row in self:
            lacking = [name for name in names if name not in row.labels]
            if lacking:
                raise ValueError(
                    f"{row!r} has no label {lacking[0]!r}; select rows that have it first"
                )
            values = tuple(row.labels[name] for name in names)
            key = values if len(names) > 1 else values[0]
            together.setdefault(key, []).append(row)
        return {key: Rows(rows) for key, rows in together.items()}

    def frame(
        self,
        *,
        index: str | Sequence[str] = (),
        columns: str | Sequence[str] = (),
        values: str = "mean",
    ) -> "pandas.DataFrame":
        """The rows as a table: a line a row, a column a label; or pivoted.

        Args:
            index: labels that name the lines of a pivoted table.
            columns: labels that name its columns; "metric" is one of them.
            values: what its cells hold: "mean", "low", "high" or "n".
        """
        import pandas

        lines = []
        for row in self:
            lines.append({"metric": row.metric, **row.labels, **_figures(row)})
        table = pandas.DataFrame(lines)
        if not index and not columns:
            return table
        return table.pivot_table(
            index=[index] if isinstance(index, str) else list(index),
            columns=[columns] if isinstance(columns, str) else list(columns),
            values=values,
            sort=False,
        )

    @property
    def metrics(self) -> list[str]:
        """The names of the metrics, as they come."""
        return list(dict.fromkeys(row.metric for row in self))

    def _repr_html_(self) -> str:
        return self._card(plural(len(self), "row"))

    def _card(self, title: str) -> str:
        """The first rows as a table; what they have in common stands above it."""
        shown = self[:SHOWN_ROWS]
        common = self._common()
        differing = [name for name in self._values() if name not in common]
        ends = {metric: _ends(self.where(metric)) for metric in shown.metrics}
        body = []
        for row in shown:
            labels = [str(row.labels.get(name, "")) for name in differing]
            mark = _mark(row, *ends[row.metric])
            body.append([row.metric, *labels, row._text, mark, f"{row.n:,}"])
        table = html_table(["metric", *differing, "mean [95 %]", "", "n"], body) if body else ""
        everywhere = ", ".join(f"{name} {value}" for name, value in common.items())
        n_left = len(self) - len(shown)
        return card(title, note(everywhere), table, note(f"and {n_left:,} more" if n_left else ""))

    def _some(self, wanted: str) -> "Rows":
        """These rows, of which there must be one at least."""
        if not self._rows:
            raise ValueError(f"no rows, so none is the {wanted}; see what `where` was asked for")
        return self

    def _common(self) -> dict[str, Label]:
        """The labels that every row carries with the same value."""
        common = {}
        for name, values in self._values().items():
            # One that some rows lack tells them apart too.
            if len(values) == 1 and all(name in row.labels for row in self):
                (common[name],) = values
        return common

    def _values(self) -> dict[str, dict[Label, None]]:
        """The values of every label, as they come."""
        # Dictionaries as sets that keep their order.
        values: dict[str, dict[Label, None]] = {}
        for row in self:
            for name, value in row.labels.items():
                values.setdefault(name, {})[value] = None
        return values

    def _differences(self) -> str:
        """The labels in which these rows differ, with their values."""
        differing = []
        for name, of_name in self._values().items():
            if len(of_name) > 1:
                differing.append(f"{name} ({listed(of_name)})")
        return "; ".join(differing)

    @overload
    def __getitem__(self, index: int) -> Measurement: ...
    @overload
    def __getitem__(self, index: slice) -> "Rows": ...
    def __getitem__(self, index: int | slice) -> "Measurement | Rows":
        if isinstance(index, slice):
            return Rows(self._rows[index])
        return self._rows[index]

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Measurement]:
        return iter(self._rows)

    def __add__(self, other: Iterable[Measurement]) -> "Rows":
        return Rows((*self._rows, *other))

    def __radd__(self, other: Iterable[Measurement]) -> "Rows":
        return Rows((*other, *self._rows))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __repr__(self) -> str:
        return f"Rows({len(self)}: {listed(self.metrics)})"

    def __str__(self) -> str:
        return "\n".join(str(row) for row in self)


@dataclass(frozen=True)
class Manifest:
    """What made a set of rows: command, settings, versions and machine."""

    settings: Mapping[str, Any]
    command: tuple[str, ...] = field(default_factory=lambda: ("harmcircuits", *sys.argv[1:]))
    python: str = platform.python_version()
    machine: str = f"{platform.system()} {platform.machine()}"
    versions: Mapping[str, str] = field(
        default_factory=lambda: {name: version(name) for name in LIBRARIES}
    )

    def save(self, path: str | Path) -> None:
        """Write this manifest as indented JSON, with its checksum."""
        write_json(path, asdict(self), indent=2)

    @staticmethod
    def settings_of(path: str | Path) -> dict[str, Any]:
        """The settings in a manifest file."""
        manifest = read_json(path, "the manifest.json of a run")
        settings = manifest.get("settings")
        if not isinstance(settings, dict):
            raise ValueError(f"{path}: no settings in it; expected the manifest.json of a run")
        return settings


def resumed(folder: str | Path, settings: Labels) -> Rows:
    """The rows of an unfinished run, none in a new one; makes the folder and its manifest."""
    folder = Path(folder)
    manifest, rows = folder / "manifest.json", folder / "rows.jsonl"
    if manifest.is_file():
        before = Manifest.settings_of(manifest)
        if before != dict(settings):
            raise ValueError(
                f"{folder} holds a run with {before}, not {dict(settings)}; "
                "give another folder or remove it"
            )
    Manifest(settings).save(manifest)
    if not rows.is_file():
        return Rows()
    return Rows.read(rows)


def step_of_means(sums: Float[ndarray, " groups"], sizes: Int[ndarray, " groups"]) -> float:
    """How far apart the means of two resamples of groups are at least, if they differ."""
    gaps = np.diff(np.unique(sums.round(9)))  # shares of hits are off by the last bit
    smallest = gaps.min() if len(gaps) else sizes.max()
    return float(smallest / sizes.sum())


def student_widening(n_groups: int, n_strata: int = 1) -> float:
    """By how much Student's 95 % interval of a mean is wider than that of its resamples."""
    free = n_groups - n_strata
    if free < 1:
        return 1.0
    return student_quantile(free + 1) / Z * sqrt(n_groups / free)


def student_quantile(n: int) -> float:
    """Half of Student's 95 % interval of a mean of n values, two or more, in standard errors."""
    return float(student.ppf(ENDS[1], n - 1))


def wilson(share: float, n: float, *, half_step: float = 0.0) -> Interval:
    """Wilson's 95 % score interval of a share among n."""
    lowest = max(0.0, share - half_step)
    highest = min(1.0, share + half_step)
    low = _score_ends(lowest, n)[0] if share > 0 else 0.0
    high = _score_ends(highest, n)[1] if share < 1 else 1.0
    # The share lies within by definition; of 0 and 1 the ends are so only up to rounding.
    return min(share, low), max(share, high)


def _score_ends(share: float, n: float) -> Interval:
    # Written out, because scipy takes a whole number of hits, and answers sampled several times
    # count as fractions.
    scale = 1 + Z**2 / n
    variance = share * (1 - share) / n + Z**2 / (4 * n**2)
    centre = (share + Z**2 / (2 * n)) / scale
    half = Z / scale * sqrt(variance)
    return centre - half, centre + half


def auroc(values: Float[Tensor, " n"], is_positive: Bool[Tensor, " n"]) -> float:
    """Chance that a positive's value exceeds a negative's, ties counted half."""
    n = len(is_positive)
    n_positive = int(is_positive.sum())
    n_negative = n - n_positive
    if not n_positive or not n_negative:
        raise ValueError(
            f"auroc: {n_positive} positives among {n}; expected at least one of each kind"
        )
    # The rank of a positive counts the examples up to it, of both kinds. Without the ranks that the
    # positives have among themselves, the pairs are left in which a positive exceeds a negative.
    # scipy's mannwhitneyu gives the same, ten times slower: a bootstrap asks 200 times.
    #
    #     values    .2  .5  .9  .4        ranks of the positives    3 + 4 = 7
    #     kind       -   +   +   -        among themselves          1 + 2 = 3        4 of 4 pairs
    ranks = rankdata(values.cpu().numpy())
    rank_sum = ranks[is_positive.cpu().numpy()].sum()
    own_rank_sum = n_positive * (n_positive + 1) / 2
    return float((rank_sum - own_rank_sum) / (n_positive * n_negative))


def _resampled(
    statistic: Callable[..., Any],
    samples: tuple[ndarray, ...],
    n_resamples: int,
    seed: int,
    *,
    paired: bool = True,
) -> ndarray:
    """The statistic of resamples of groups, drawn with replacement; paired: all drawn alike."""
    if not samples or len(samples[0]) == 1:  # nothing to resample, which scipy refuses
        return np.array([statistic(*samples)])
    result = bootstrap(
        samples,
        statistic,
        n_resamples=n_resamples,
        paired=paired,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return result.bootstrap_distribution


def _ratio(sums: ndarray, sizes: ndarray, axis: int = -1) -> Any:
    """Mean of groups of different sizes."""
    return sums.sum(axis=axis) / sizes.sum(axis=axis)


def _figures(row: Measurement) -> dict[str, float]:
    return {"mean": row.mean, "low": row.low, "high": row.high, "n": row.n}


def _mark(row: Measurement, start: float, end: float) -> str:
    """The figure and its interval on a line; nothing for what is exact or not a number."""
    if row.is_exact or not isfinite(row.low + row.mean + row.high):
        return ""
    return interval_mark(row.low, row.mean, row.high, (start, end))


def _ends(rows: Rows) -> Interval:
    """Where a line begins and ends on which these figures of one metric are drawn."""
    if rows[0].metric.endswith(RATES):
        return 0.0, 1.0
    lows = [row.low for row in rows]
    highs = [row.high for row in rows]
    return min(0.0, *lows), max(0.0, *highs)


def _without(labels: Labels, name: str) -> dict[str, Label]:
    return {key: value for key, value in labels.items() if key != name}


def _pooled(rows: Sequence[Measurement], over: str) -> Measurement:
    return replace(
        rows[0],
        labels=_without(rows[0].labels, over),
        mean=fmean(row.mean for row in rows),
        low=min(row.low for row in rows),
        high=max(row.high for row in rows),
        n=sum(row.n for row in rows),
    )


def _measurement(row: Any, place: str) -> Measurement:
    """The measurement of an object; raises ValueError, with the place, where it is none."""
    names = [field.name for field in fields(Measurement)]
    if not isinstance(row, dict) or row.keys() != set(names):
        stored = listed(row) if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"{place}: {stored}; expected {listed(names)}")
    if not isinstance(row["metric"], str):
        raise ValueError(f"{place}: metric {row['metric']!r}; expected text")
    labels = row["labels"]
    is_plain = isinstance(labels, dict)
    is_plain = is_plain and all(isinstance(value, PLAIN) for value in labels.values())
    if not is_plain:
        raise ValueError(f"{place}: labels {labels!r}; expected names with texts or numbers")
    for name in ("mean", "low", "high", "n"):
        value = row[name]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{place}: {name} is {value!r}; expected a number")
    return Measurement(**row)


def _check(metric: str, values: Sequence[Any] | Tensor, groups: Sequence[Hashable]) -> None:
    if not len(values):
        raise ValueError(f"{metric}: no examples to measure; expected at least one")
    if len(groups) != len(values):
        raise ValueError(
            f"{metric}: {len(groups)} groups for {len(values)} values; give one for each"
        )


def _refuse_not_finite(metric: str, values: Tensor) -> None:
    is_bad = ~values.isfinite()
    if is_bad.any():
        places = is_bad.nonzero().flatten().tolist()
        raise ValueError(
            f"{metric}: the values of examples {listed(places)} are NaN or infinite, of "
            f"{len(values)}; leave these examples out, or look at where the values come from"
        )
