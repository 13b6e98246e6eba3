"""Figures out: a measurement with its 95 % interval, rows of them, and their files."""

import platform
import sys
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from math import sqrt
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from scipy.stats import rankdata
from scipy.stats import t as student
from torch import Tensor

from harmcircuits.display import card, html_table, listed, note, number_text, plural
from harmcircuits.storage import append_lines, read_lines, write_json, write_lines

if TYPE_CHECKING:
    import pandas

Label = str | int | float
Labels = Mapping[str, Label]
Interval = tuple[float, float]

Z = 1.959964  # two-sided 95 % of a normal
ENDS = (0.025, 0.975)  # quantiles of a 95 % percentile interval
N_RESAMPLES = 2000
N_AUROC_RESAMPLES = 200  # each ranks all values again
RATES = ("_rate", "_accuracy")  # how the names of shares end
SHOWN_ROWS = 20  # in a notebook
LIBRARIES = ("harmcircuits", "torch", "transformers", "transformer-lens", "circuitsvis")


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
        cls, metric: str, labels: Labels, hits: Sequence[float], groups: Sequence[Hashable]
    ) -> "Measurement":
        """Share of hits with its Wilson interval, which counts each group once.

        With continuity correction: a count moves in steps, and without it what the interval holds
        falls to 92 % and less at some rates.

        Answers about one item are not independent, so the interval is that of as many examples as
        there are groups; where these differ in size, of (sum of sizes)^2 / sum of sizes^2. Source:
        Kish 1965, on weights.

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
    ) -> "Measurement":
        """Mean of the values with a bootstrap interval: 2,000 resamples of whole groups, seed 0.

        Args:
            metric: name of the figure.
            labels: what it was measured on.
            values: the value of each example.
            groups: what each example is about.
            are_counts: of hits, or differences of such, so that the mean moves in steps.

        Raises:
            ValueError: no examples, not exactly one group for each, or a value that is not finite.
        """
        _check(metric, values, groups)
        # Groups are resampled by their sums and sizes:
        #
        #     groups    a  a  b        member    0  0  1
        #     values    1  3  5        sums      4  5        sizes    2  1
        member = _members(groups)
        sums = np.bincount(member, values.cpu().double().numpy())
        sizes = np.bincount(member)
        n_groups = len(sizes)
        drawn = np.random.default_rng(0).integers(n_groups, size=(N_RESAMPLES, n_groups))
        return cls.of_draws(
            metric,
            labels,
            sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1),
            mean=float(sums.sum() / sizes.sum()),
            n=len(values),
            n_groups=n_groups,
            step=step_of_means(sums, sizes) if are_counts else 0.0,
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
        """Area under the ROC curve with a bootstrap interval: 200 resamples of groups, seed 0.

        Groups that hold both kinds, as matched pairs do, are resampled apart from those of
        positives and from those of negatives alone, so that no resample lacks a kind. Where the
        figure is 1, so is its interval, however few examples there are.

        Args:
            metric: name of the figure.
            labels: what it was measured on.
            values: the value of each example; higher should mean positive.
            is_positive: which examples are positive.
            groups: what each example is about.

        Raises:
            ValueError: no examples, not exactly one group for each, or a value that is not finite.
            ZeroDivisionError: examples of one kind only.
        """
        _check(metric, values, groups)
        member = _members(groups)
        strata: dict[tuple[bool, bool], list[ndarray]] = {}
        for number in range(member.max() + 1):
            rows = np.flatnonzero(member == number)
            kinds = bool(is_positive[rows].any()), bool(is_positive[rows].all())
            strata.setdefault(kinds, []).append(rows)

        generator = np.random.default_rng(0)
        draws = []
        for of_kind in strata.values():
            size = (N_AUROC_RESAMPLES, len(of_kind))
            draws.append(generator.integers(len(of_kind), size=size))
        areas = []
        for number in range(N_AUROC_RESAMPLES):
            resample = []
            for of_kind, drawn in zip(strata.values(), draws, strict=True):
                resample += [of_kind[group] for group in drawn[number]]
            rows = np.concatenate(resample)
            areas.append(auroc(values[rows], is_positive[rows]))

        # A stratum of one group is the same in every resample.
        sizes = [len(of_kind) for of_kind in strata.values() if len(of_kind) > 1]
        row = cls.of_draws(
            metric,
            labels,
            areas,
            mean=auroc(values, is_positive),
            n=len(values),
            n_groups=sum(sizes),
            n_strata=len(sizes),
        )
        return replace(row, low=max(0.0, row.low), high=min(1.0, row.high))

    @classmethod
    def difference(
        cls, metric: str, labels: Labels, first: "Measurement", second: "Measurement"
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
            method: of `numpy.quantile`.
        """
        low, high = np.quantile(np.asarray(draws), ENDS, method=method).tolist()
        if mean is None:
            mean = float(np.mean(draws))
        if n_groups:
            widening = student_widening(n_groups, n_strata)
            low = mean - widening * (mean - low) - step / 2
            high = mean + widening * (high - mean) + step / 2
        # Resamples may all lie on one side of the figure; the interval still holds it.
        return cls(metric, labels, mean, min(mean, low), max(mean, high), n or len(draws))

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
        return Rows([self])._repr_html_()

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
        lines = read_lines(path, "the rows.jsonl of a study")
        try:
            return cls.of_dicts(lines)
        except TypeError as error:
            raise ValueError(f"{path}: not a file of measurements ({error})") from None

    @classmethod
    def of_dicts(cls, rows: Iterable[Mapping[str, Any]]) -> "Rows":
        """The rows of objects, as JSON holds them.

        Args:
            rows: each with the fields of a `Measurement`.
        """
        return cls(Measurement(**row) for row in rows)

    def append_to(self, path: str | Path) -> None:
        """Add the rows to a JSON Lines file, one object a line, all or none.

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
        nearest = rows or self.where(metric) or self
        apart = [f"metric ({listed(nearest.metrics)})"]
        for name, values in nearest._values().items():
            if len(values) > 1:
                apart.append(f"{name} ({listed(values)})")
        wanted = ", ".join([metric, *(f"{name}={value!r}" for name, value in labels.items())])
        raise ValueError(f"{len(rows)} rows have {wanted}; the nearest differ in {listed(apart)}")

    def largest(self) -> Measurement:
        """The row with the largest mean, the first of several; ValueError where there is none."""
        return max(self, key=lambda row: row.mean)

    def smallest(self) -> Measurement:
        """The row with the smallest mean, the first of several; ValueError where there is none."""
        return min(self, key=lambda row: row.mean)

    def pool(self, over: str) -> "Rows":
        """One row for all rows that differ only in a label: their mean, with the widest ends.

        Args:
            over: the label, such as "seed".
        """
        together: dict[tuple, list[Measurement]] = {}
        for row in self:
            key = (row.metric, frozenset(_without(row.labels, over).items()))
            together.setdefault(key, []).append(row)
        return Rows(_pooled(rows, over) for rows in together.values())

    def by(self, *names: str) -> "dict[Any, Rows]":
        """The rows of every value of a label in turn, as they come.

        Args:
            names: the labels; keys are values of one label, tuples of values of several.

        Raises:
            KeyError: a row without one of the labels.
        """
        together: dict[Any, list[Measurement]] = {}
        for row in self:
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

        Raises:
            ValueError: several rows for one cell; name the label that tells them apart, or `pool`
                them first.
        """
        import pandas

        lines = []
        for row in self:
            figures = {"mean": row.mean, "low": row.low, "high": row.high, "n": row.n}
            lines.append({"metric": row.metric, **row.labels, **figures})
        table = pandas.DataFrame(lines)
        if not index and not columns:
            return table
        lines_of = [index] if isinstance(index, str) else list(index)
        columns_of = [columns] if isinstance(columns, str) else list(columns)
        names = lines_of + columns_of
        again = table.dropna(subset=names)[names].duplicated()
        if again.any():
            raise ValueError(
                f"frame: several rows are of {dict(table[names].loc[again.idxmax()])}; pool them "
                "first, or name the label that tells them apart"
            )
        return table.pivot_table(index=lines_of, columns=columns_of, values=values, sort=False)

    @property
    def metrics(self) -> list[str]:
        """The names of the metrics, as they come."""
        return list(dict.fromkeys(row.metric for row in self))

    def _values(self) -> dict[str, list[Label]]:
        """The values of every label, as they come; "" where a row lacks it."""
        names = dict.fromkeys(name for row in self for name in row.labels)
        return {name: list({row.labels.get(name, ""): None for row in self}) for name in names}

    def _repr_html_(self) -> str:
        """The first rows as a table; what all have in common stands above it."""
        values = self._values()
        differing = [name for name, of_name in values.items() if len(of_name) > 1]
        common = [f"{name} {values[name][0]}" for name in values if name not in differing]
        body = []
        for row in self[:SHOWN_ROWS]:
            labels = [str(row.labels.get(name, "")) for name in differing]
            body.append([row.metric, *labels, row._text, f"{row.n:,}"])
        table = html_table(["metric", *differing, "mean [95 %]", "n"], body)
        n_left = len(self) - len(body)
        more = note(f"and {n_left:,} more" if n_left else "")
        return card(plural(len(self), "row"), note(", ".join(common)), table, more)

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


def write_manifest(path: str | Path, settings: Mapping[str, Any]) -> None:
    """Say what made a set of rows: command, settings, versions and machine."""
    manifest = {
        "settings": settings,
        "command": ["harmcircuits", *sys.argv[1:]],
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "versions": {name: version(name) for name in LIBRARIES},
    }
    write_json(path, manifest, indent=2)


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
    """Wilson's 95 % score interval of a share among n.

    Written out, because scipy takes a whole number of hits, and answers sampled several times count
    as fractions.
    """
    ends = []
    for value, sign in ((max(0.0, share - half_step), -1), (min(1.0, share + half_step), 1)):
        scale = 1 + Z**2 / n
        variance = value * (1 - value) / n + Z**2 / (4 * n**2)
        ends.append((value + Z**2 / (2 * n)) / scale + sign * (Z / scale * sqrt(variance)))
    low = ends[0] if share > 0 else 0.0
    high = ends[1] if share < 1 else 1.0
    # By rounding, an end can pass the share or leave [0, 1].
    return max(0.0, min(share, low)), min(1.0, max(share, high))


def auroc(values: Float[Tensor, " n"], is_positive: Bool[Tensor, " n"]) -> float:
    """Chance that a positive's value exceeds a negative's, ties counted half."""
    n_positive = int(is_positive.sum())
    n_negative = len(is_positive) - n_positive
    # By ranks: sklearn's roc_auc_score takes ten times as long, and a bootstrap asks 200 times.
    ranks = rankdata(values.cpu().numpy())
    rank_sum = ranks[is_positive.cpu().numpy()].sum()
    own_rank_sum = n_positive * (n_positive + 1) / 2  # of the positives among themselves
    # Of Python, in which zero of either kind is an error; of numpy it would be NaN.
    return float(rank_sum - own_rank_sum) / (n_positive * n_negative)


def _members(groups: Sequence[Hashable]) -> Int[ndarray, " n"]:
    """The number of each example's group."""
    _, member = np.unique([str(group) for group in groups], return_inverse=True)
    return member


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


def _check(metric: str, values: Sequence[Any] | Tensor, groups: Sequence[Hashable]) -> None:
    if not len(values) or len(groups) != len(values):
        raise ValueError(
            f"{metric}: {len(groups)} groups for {len(values)} values; "
            "expected at least one value, and a group for each"
        )
    if isinstance(values, Tensor) and not values.isfinite().all():
        places = (~values.isfinite()).nonzero().flatten().tolist()
        raise ValueError(
            f"{metric}: the values of examples {listed(places)} are NaN or infinite, of "
            f"{len(values)}; leave these examples out, or look at where the values come from"
        )
