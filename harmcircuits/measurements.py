"""Measurements with 95 % intervals, rows of measurements, and their files."""

import platform
import sys
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from math import inf, sqrt
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

Z = 1.959964  # the two-sided 95 % quantile of a normal distribution
ENDS = (0.025, 0.975)  # the quantiles of a 95 % percentile interval
N_RESAMPLES = 2000
N_AUROC_RESAMPLES = 200  # fewer, because each one ranks all values
RATES = ("_rate", "_accuracy")  # endings of metrics that are shares
SHOWN_ROWS = 20  # rows that a notebook shows
LIBRARIES = ("harmcircuits", "torch", "transformers", "transformer-lens", "circuitsvis")


@dataclass(frozen=True)
class Measurement:
    """One figure: a mean over `n` examples with its 95 % interval, and labels of its origin.

    `f"{row:.0%}"` writes `77% [63%, 88%]`; an exact figure is written alone.

    >>> row = hc.Measurement("refusal_rate", {"model": "sft"}, mean=0.77, low=0.63, high=0.88)
    >>> f"{row:.0%}"
    '77% [63%, 88%]'

    Attributes:
        metric: the name of the figure, such as "harm_nll" (nats per token) or "refusal_rate" (a
            share).
        labels: model, mask, split and settings.
        mean: the figure.
        low: the lower end of the interval; equal to `mean` if the figure is exact, such as a count,
            or one value by itself. Of several examples in one group it is the lowest possible
            value, because groups are the unit and one group has no spread.
        high: the upper end.
        n: the number of examples behind the mean.
    """

    metric: str
    labels: Labels
    mean: float
    low: float
    high: float
    n: int = 1

    @classmethod
    def exact(cls, metric: str, labels: Labels, value: float) -> "Measurement":
        """A figure without sampling error, such as a count.

        Args:
            metric: the name of the figure.
            labels: model, mask, split and settings.
            value: the figure.
        """
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

        The interval has a continuity correction, because a count moves in steps: without it the
        interval would hold only 92 % or less at some rates.

        Answers about one item are not independent. The interval is therefore that of as many
        examples as there are groups; for groups of unequal sizes, of (sum of sizes)^2 / sum of
        sizes^2 examples. Source: Kish 1965, on weights.

        Args:
            metric: the name of the rate.
            labels: model, mask, split and settings.
            hits: 1 or 0 for each example, or a share.
            groups: the item of each example.

        Raises:
            ValueError: no examples, or not exactly one group for each example.
        """
        _refuse_bad_values(metric, hits, groups)
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

        The interval of several examples in one group is from -inf to inf.

        Args:
            metric: the name of the figure.
            labels: model, mask, split and settings.
            values: the value of each example.
            groups: the item of each example.
            are_counts: whether the values are counts of hits or differences of counts, so that the
                mean moves in steps.

        Raises:
            ValueError: no examples, not exactly one group for each example, or a value that is not
                finite.
        """
        _refuse_bad_values(metric, values, groups)
        # Groups are resampled by their sums and sizes:
        #
        #     groups    a  a  b        member    0  0  1
        #     values    1  3  5        sums      4  5        sizes    2  1
        member = _members(groups)
        sums = np.bincount(member, values.cpu().double().numpy())
        sizes = np.bincount(member)
        n_groups = len(sizes)
        resamples = np.random.default_rng(0).integers(n_groups, size=(N_RESAMPLES, n_groups))
        totals = sums[resamples].sum(axis=1)
        draws = totals / sizes[resamples].sum(axis=1)
        mean = float(sums.sum() / sizes.sum())
        step = step_of_means(sums, sizes) if are_counts else 0.0
        n = len(values)
        interval = interval_of_draws(draws, mean, n_groups=n_groups if n > 1 else 0, step=step)
        return cls(metric, labels, mean, *interval, n)

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

        Groups of positives, groups of negatives and groups with both, such as matched pairs, are
        resampled separately, so that every resample has both kinds. If the area is 1, both ends are
        1, even for few examples. Without two groups to resample, the interval is from 0 to 1.

        Args:
            metric: the name of the figure.
            labels: model, mask, split and settings.
            values: the value of each example; a higher value should mean positive.
            is_positive: which examples are positive.
            groups: the item of each example.

        Raises:
            ValueError: no examples, not exactly one group for each example, or a value that is not
                finite.
            ZeroDivisionError: examples of one kind only.
        """
        _refuse_bad_values(metric, values, groups)
        member = _members(groups)
        strata: dict[tuple[bool, bool], list[ndarray]] = {}
        for number in range(member.max() + 1):
            rows = np.flatnonzero(member == number)
            kinds = is_positive[rows]
            key = bool(kinds.any()), bool(kinds.all())
            strata.setdefault(key, []).append(rows)

        generator = np.random.default_rng(0)
        resamples = []
        for stratum in strata.values():
            size = (N_AUROC_RESAMPLES, len(stratum))
            resamples.append(generator.integers(len(stratum), size=size))
        areas = []
        for number in range(N_AUROC_RESAMPLES):
            parts = []
            for stratum, members in zip(strata.values(), resamples, strict=True):
                parts += [stratum[group] for group in members[number]]
            rows = np.concatenate(parts)
            areas.append(auroc(values[rows], is_positive[rows]))

        # A stratum of one group is the same in every resample.
        sizes = [len(stratum) for stratum in strata.values() if len(stratum) > 1]
        mean = auroc(values, is_positive)
        low, high = interval_of_draws(
            areas,
            mean,
            n_groups=sum(sizes) or 1,
            n_strata=len(sizes),
        )
        return cls(metric, labels, mean, max(0.0, low), min(1.0, high), len(values))

    @classmethod
    def from_draws(
        cls,
        metric: str,
        labels: Labels,
        draws: Sequence[float] | np.ndarray,
        *,
        mean: float | None = None,
        n: int | None = None,
        n_groups: int = 0,
    ) -> "Measurement":
        """A figure with the 95 % interval of its draws, such as resamples or random masks.

        Resamples of few groups vary too little. For them the interval is therefore wider than the
        quantiles: 18 % wider for 8 groups, 12 % for 16, 6 % for 32. The interval of several
        examples in one group is from -inf to inf.

        Args:
            metric: the name of the figure.
            labels: model, mask, split and settings.
            draws: the figure in each draw.
            mean: the figure itself, which the interval always contains; by default the mean of the
                draws.
            n: the number of examples behind the figure; by default the number of draws.
            n_groups: the number of groups that each draw resamples; 0 if the draws are no resamples
                of a mean.
        """
        if mean is None:
            mean = float(np.mean(draws))
        n = n or len(draws)
        interval = interval_of_draws(draws, mean, n_groups=n_groups if n > 1 else 0)
        return cls(metric, labels, mean, *interval, n)

    def labelled(self, **labels: Label) -> "Measurement":
        """The same figure with further labels, or with other values of its labels.

        Args:
            labels: name and value of each label.
        """
        return replace(self, labels={**self.labels, **labels})

    @property
    def is_exact(self) -> bool:
        """Whether the figure has no sampling error, as a count has none."""
        return self.n == 1 and self.low == self.mean == self.high

    def __format__(self, spec: str) -> str:
        """The figure and its interval, each number in the format `spec`."""
        if not spec:
            return str(self)
        if self.is_exact:
            return format(self.mean, spec)
        return f"{self.mean:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"

    def __str__(self) -> str:
        return f"{self.metric} {self:.3g}"

    def __repr__(self) -> str:
        labels = [f"{name}={value!r}" for name, value in self.labels.items()]
        return f"Measurement({', '.join([str(self), *labels])})"

    def _repr_html_(self) -> str:
        return Rows([self])._repr_html_()

    @property
    def _text(self) -> str:
        """The figure with its interval; shares are in per cent."""
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
            path: a file that `append_to` wrote, such as a study's rows.jsonl. A last line that a
                killed run left unfinished is ignored.

        Raises:
            ValueError: a missing file, or a line that is no measurement.
        """
        lines = read_lines(path, "the rows.jsonl of a study")
        try:
            return cls.from_dicts(lines)
        except TypeError as error:
            raise ValueError(f"{path}: not a file of measurements ({error})") from None

    @classmethod
    def from_dicts(cls, rows: Iterable[Mapping[str, Any]]) -> "Rows":
        """The inverse of `to_dicts`.

        Args:
            rows: dicts with the fields of a `Measurement`.
        """
        return cls(Measurement(**row) for row in rows)

    def to_dicts(self) -> list[dict[str, Any]]:
        """The rows as dicts with the fields of a `Measurement`, as JSON holds them."""
        return [asdict(row) for row in self]

    def append_to(self, path: str | Path) -> None:
        """Append the rows to a JSON Lines file, one object a line: all of them or none.

        Args:
            path: the file, which is created if it does not exist.

        Raises:
            OSError: the file cannot be written; the error names it.
        """
        append_lines(path, self.to_dicts())

    def save(self, path: str | Path) -> None:
        """Write a JSON Lines file with exactly these rows, completely or not at all.

        Args:
            path: the file.

        Raises:
            OSError: the file cannot be written; the error names it.
        """
        write_lines(path, self.to_dicts())

    def where(self, metric: str = "", /, **labels: Label) -> "Rows":
        """The rows of this metric that have all these labels, in order.

        Args:
            metric: the metric's name; every metric by default.
            labels: name and value of each label.
        """
        rows = [row for row in self if metric in ("", row.metric)]
        return Rows(row for row in rows if labels.items() <= row.labels.items())

    def one(self, metric: str = "", /, **labels: Label) -> Measurement:
        """The only row of this metric with these labels.

        Args:
            metric: the metric's name; every metric by default.
            labels: name and value of each label.

        Raises:
            ValueError: no row or several rows; names the labels in which the nearest rows differ.
        """
        rows = self.where(metric, **labels)
        if len(rows) == 1:
            return rows[0]
        nearest = rows or self.where(metric) or self
        differences = [f"metric ({listed(nearest.metrics)})"]
        for name, values in nearest._values().items():
            if len(values) > 1:
                differences.append(f"{name} ({listed(values)})")
        conditions = [f"{name}={value!r}" for name, value in labels.items()]
        raise ValueError(
            f"{len(rows)} rows have {', '.join([metric, *conditions])}; "
            f"the nearest differ in {listed(differences)}"
        )

    def largest(self) -> Measurement:
        """The row with the largest mean, the first of several; ValueError without a row."""
        return max(self, key=lambda row: row.mean)

    def smallest(self) -> Measurement:
        """The row with the smallest mean, the first of several; ValueError without a row."""
        return min(self, key=lambda row: row.mean)

    def pool(self, over: str) -> "Rows":
        """One row for all rows that differ only in a label: their mean, with the widest ends.

        Args:
            over: the label, such as "seed".
        """

        def key(row: Measurement) -> Hashable:
            return row.metric, frozenset(_without(row.labels, over).items())

        return Rows(_pooled(rows, over) for rows in self._groups(key).values())

    def by(self, *names: str) -> "dict[Any, Rows]":
        """The rows of every value of a label, in the order of their first rows.

        Args:
            names: the labels. With one label the keys are its values, with several they are tuples.

        Raises:
            KeyError: a row without one of the labels.
        """

        def key(row: Measurement) -> Hashable:
            values = tuple(row.labels[name] for name in names)
            return values if len(names) > 1 else values[0]

        return self._groups(key)

    def _groups(self, key: Callable[[Measurement], Hashable]) -> "dict[Any, Rows]":
        groups: dict[Any, list[Measurement]] = {}
        for row in self:
            groups.setdefault(key(row), []).append(row)
        return {value: Rows(rows) for value, rows in groups.items()}

    def frame(
        self,
        *,
        index: str | Sequence[str] = (),
        columns: str | Sequence[str] = (),
        values: str = "mean",
    ) -> "pandas.DataFrame":
        """The rows as a table with a column for each label, or as a pivot table.

        Args:
            index: labels that name the rows of a pivot table.
            columns: labels that name its columns; "metric" counts as a label.
            values: the content of its cells: "mean", "low", "high" or "n".

        Raises:
            ValueError: several rows for one cell. Name the label in which they differ, or `pool`
                them first.
        """
        import pandas

        records = []
        for row in self:
            record = {
                "metric": row.metric,
                **row.labels,
                "mean": row.mean,
                "low": row.low,
                "high": row.high,
                "n": row.n,
            }
            records.append(record)
        table = pandas.DataFrame(records)
        if not index and not columns:
            return table
        index = [index] if isinstance(index, str) else list(index)
        columns = [columns] if isinstance(columns, str) else list(columns)
        cells = table.dropna(subset=index + columns)[index + columns]
        is_repeated = cells.duplicated()
        if is_repeated.any():
            raise ValueError(
                f"frame: several rows are of {dict(cells.loc[is_repeated.idxmax()])}; pool them "
                "first, or name the label in which they differ"
            )
        return table.pivot_table(index=index, columns=columns, values=values, sort=False)

    @property
    def metrics(self) -> list[str]:
        """The names of the metrics, in the order of the rows."""
        return list(dict.fromkeys(row.metric for row in self))

    def _values(self) -> dict[str, list[Label]]:
        """The values of every label, in the order of the rows; "" for a row without the label."""
        names: dict[str, None] = {}
        for row in self:
            names |= dict.fromkeys(row.labels)
        values = {}
        for name in names:
            column = [row.labels.get(name, "") for row in self]
            values[name] = list(dict.fromkeys(column))
        return values

    def _repr_html_(self) -> str:
        """The first rows as a table, below the labels that all rows have in common."""
        values = self._values()
        columns = [name for name in values if len(values[name]) > 1]
        common = [f"{name} {values[name][0]}" for name in values if name not in columns]
        body = []
        for row in self[:SHOWN_ROWS]:
            labels = [str(row.labels.get(name, "")) for name in columns]
            body.append([row.metric, *labels, row._text, f"{row.n:,}"])
        table = html_table(["metric", *columns, "mean [95 %]", "n"], body)
        n_hidden = len(self) - len(body)
        ending = note(f"and {n_hidden:,} more" if n_hidden else "")
        title = plural(len(self), "row")
        return card(title, note(", ".join(common)), table, ending)

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

    def __repr__(self) -> str:
        return f"Rows({len(self)}: {listed(self.metrics)})"

    def __str__(self) -> str:
        return "\n".join(str(row) for row in self)


def write_manifest(path: str | Path, settings: Mapping[str, Any]) -> None:
    """Record the origin of a set of rows: command, settings, versions and machine."""
    manifest = {
        "settings": settings,
        "command": ["harmcircuits", *sys.argv[1:]],
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "versions": {name: version(name) for name in LIBRARIES},
    }
    write_json(path, manifest, indent=2)


def interval_of_draws(
    draws: Sequence[float] | np.ndarray,
    mean: float,
    *,
    n_groups: int = 0,
    n_strata: int = 1,
    step: float = 0.0,
    method: Literal["linear", "inverted_cdf"] = "linear",
) -> Interval:
    """The 95 % interval of draws, which contains the mean.

    The interval of resamples of `n_groups` groups in `n_strata` strata is wider than their
    quantiles by `student_widening`; of one group it is unknown. Each end lies half a `step` further
    out: the smallest difference of two values of the figure, such as 1 / n for a rate among n.
    `method` is that of `numpy.quantile`.
    """
    if n_groups == 1:
        return -inf, inf
    low, high = np.quantile(np.asarray(draws), ENDS, method=method).tolist()
    if n_groups:
        widening = student_widening(n_groups, n_strata)
        low = mean - widening * (mean - low)
        high = mean + widening * (high - mean)
    # All resamples may lie on one side of the mean.
    return min(mean, low - step / 2), max(mean, high + step / 2)


def step_of_means(
    sums: Float[ndarray, " groups"],
    sizes: Int[ndarray, " groups"],
) -> float:
    """The smallest difference between the unequal means of two resamples of groups."""
    gaps = np.diff(np.unique(sums.round(9)))  # shares of hits differ in the last bit
    smallest = gaps.min() if len(gaps) else sizes.max()
    return float(smallest / sizes.sum())


def student_widening(n_groups: int, n_strata: int = 1) -> float:
    """The width of Student's 95 % interval of a mean over the width of its resamples' interval."""
    n_free = n_groups - n_strata
    if n_free < 1:
        return 1.0
    return student_quantile(n_free + 1) / Z * sqrt(n_groups / n_free)


def student_quantile(n: int) -> float:
    """Half of Student's 95 % interval of a mean of n >= 2 values, in standard errors."""
    return float(student.ppf(ENDS[1], n - 1))


def wilson(share: float, n: float, *, half_step: float = 0.0) -> Interval:
    """Wilson's 95 % score interval of a share among n.

    Not scipy's, which takes a whole number of hits: a request with several sampled answers counts
    as a fraction of a hit.
    """
    low = _wilson_end(max(0.0, share - half_step), n, -1) if share > 0 else 0.0
    high = _wilson_end(min(1.0, share + half_step), n, 1) if share < 1 else 1.0
    # Rounding can move an end past the share or out of [0, 1].
    return max(0.0, min(share, low)), min(1.0, max(share, high))


def _wilson_end(share: float, n: float, sign: int) -> float:
    scale = 1 + Z**2 / n
    variance = share * (1 - share) / n + Z**2 / (4 * n**2)
    middle = (share + Z**2 / (2 * n)) / scale
    return middle + sign * (Z / scale * sqrt(variance))


def auroc(
    values: Float[Tensor, " n"],
    is_positive: Bool[Tensor, " n"],
) -> float:
    """Probability that a positive's value exceeds a negative's; a tie counts half."""
    n_positive = int(is_positive.sum())
    n_negative = len(is_positive) - n_positive
    # By ranks, because a bootstrap needs 200 areas and sklearn's roc_auc_score is ten times slower.
    ranks = rankdata(values.cpu().numpy())
    rank_sum = ranks[is_positive.cpu().numpy()].sum()
    own_rank_sum = n_positive * (n_positive + 1) / 2  # of the ranks among the positives
    # Python's division raises an error without positives or negatives; numpy's would give NaN.
    return float(rank_sum - own_rank_sum) / (n_positive * n_negative)


def _members(groups: Sequence[Hashable]) -> Int[ndarray, " n"]:
    """The number of each example's group."""
    names = [str(group) for group in groups]
    _, member = np.unique(names, return_inverse=True)
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


def _refuse_bad_values(
    metric: str,
    values: Sequence[Any] | Tensor,
    groups: Sequence[Hashable],
) -> None:
    if not len(values) or len(groups) != len(values):
        raise ValueError(
            f"{metric}: {len(groups)} groups for {len(values)} values; "
            "expected at least one value, and a group for each"
        )
    if isinstance(values, Tensor) and not values.isfinite().all():
        is_bad = ~values.isfinite()
        places = is_bad.nonzero().flatten().tolist()
        raise ValueError(
            f"{metric}: the values of examples {listed(places)} of {len(values)} are NaN or "
            "infinite; remove these examples, or check the origin of the values"
        )
