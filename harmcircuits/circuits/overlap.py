"""What two masks share, against chance that is matched to them.

A uniform null makes any two circuits look alike: both prefer the same few matrices. Chance here keeps every mask's count in
each matrix and, as the stricter null, in each row and column of each matrix.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import rankdata

from harmcircuits.circuits.location import By, Place, pieces
from harmcircuits.circuits.masks import WeightMask
from harmcircuits.circuits.scores import WeightScores
from harmcircuits.circuits.sites import Site
from harmcircuits.measurements import wilson

Interval = tuple[float, float]


@dataclass(frozen=True)
class Overlap:
    """What two masks share.

    `n_expected`: shared weights if each mask fell at random with its count in every matrix (or place) kept.
    `n_expected_marginal`: the same with its row and column counts kept (nan when it was not sampled). `resampled`: lifts of
    the pairs of masks that resampled calibration data gave; empty without them.
    """

    n_shared: int
    n_first: int
    n_second: int
    n_expected: float
    n_expected_marginal: float = float("nan")
    resampled: tuple[float, ...] = ()

    @property
    def jaccard(self) -> float:
        """Shared weights over weights in either mask."""
        return self.n_shared / (self.n_first + self.n_second - self.n_shared)

    @property
    def containment(self) -> Interval:
        """Share of the first mask that is in the second, and of the second that is in the first."""
        return self.n_shared / self.n_first, self.n_shared / self.n_second

    @property
    def lift(self) -> float:
        """Shared weights over those expected by chance per matrix: 1 for unrelated masks."""
        return self.n_shared / self.n_expected if self.n_expected else float("nan")

    @property
    def lift_marginal(self) -> float:
        """Shared weights over those expected by chance per row and column: 1 when the same rows and columns explain all."""
        return self.n_shared / self.n_expected_marginal if self.n_expected_marginal else float("nan")

    @property
    def interval(self) -> Interval:
        """95 % interval of `lift`.

        With resamples: their percentiles, widened to hold the lift itself, which repeated examples pull down. Without:
        Wilson's interval of the share of the smaller mask, over the expected share; it describes these two masks and not
        the calibration data behind them.
        """
        if self.resampled:
            low, high = np.quantile(self.resampled, [0.025, 0.975])
            return min(float(low), self.lift), max(float(high), self.lift)
        return self._wilson(self.n_expected)

    @property
    def interval_marginal(self) -> Interval:
        """95 % interval of `lift_marginal`: Wilson's, as `interval` without resamples."""
        return self._wilson(self.n_expected_marginal)

    def _wilson(self, expected: float) -> Interval:
        if not expected > 0:
            return float("nan"), float("nan")
        n = min(self.n_first, self.n_second)
        low, high = wilson(self.n_shared / n, n)
        return max(0.0, low * n / expected), high * n / expected

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.n_shared:,} shared, Jaccard {self.jaccard:.3f}, lift {self.lift:.2f} [{low:.2f}, {high:.2f}]"


def overlap(
    mask: WeightMask,
    other: WeightMask,
    *,
    resamples: Iterable[tuple[WeightMask, WeightMask]] = (),
    n_samples: int = 0,
    seed: int = 0,
) -> Overlap:
    """Shared weights of two masks of one model against matched chance.

    E[shared] = sum over matrices of n_first n_second / n. `resamples`: the same two masks found again on resampled
    calibration examples, for the interval. `n_samples` > 0 also samples the stricter null (see `marginal_null`). Raises
    ValueError for masks of different models or weights, and for a mask that removes nothing.
    """
    found = _overlap(mask, other)
    lifts = tuple(_overlap(first, second).lift for first, second in resamples)
    expected = float(marginal_null(mask, other, n_samples=n_samples, seed=seed).mean()) if n_samples else float("nan")
    return Overlap(found.n_shared, found.n_first, found.n_second, found.n_expected, expected, lifts)


def overlap_by(mask: WeightMask, other: WeightMask, sites: Mapping[str, Site], by: By) -> dict[Place, Overlap]:
    """The overlap within every layer, matrix, head or neuron from which both masks remove something.

    Chance keeps each mask's count in every matrix of the place (in every head's or neuron's part of it). Raises ValueError
    as `overlap` and `counts_by`.
    """
    _check(mask, other)
    parts: dict[Place, np.ndarray] = {}
    three = (pieces(found, sites, by) for found in (mask, other, mask & other))
    for (place, first, size), (_, second, _), (_, shared, _) in zip(*three, strict=True):
        parts[place] = parts.get(place, np.zeros(4)) + np.array([shared, first, second, first * second / size])
    return {
        place: Overlap(int(shared), int(first), int(second), float(expected))
        for place, (shared, first, second, expected) in parts.items()
        if first and second
    }


def marginal_null(mask: WeightMask, other: WeightMask, *, n_samples: int = 100, seed: int = 0) -> np.ndarray:
    """Int64[n_samples]: shared weights of random masks that keep every row count and every column count of each matrix.

    Two masks that prefer the same rows or columns share weights by that alone; what exceeds this null is agreement on
    single weights. Sampled by curveball trades between disjoint random pairs of rows, which draws uniformly from all masks
    with these counts (Carstens, Hamann, Meyer, Penschuck, Tran, Wagner 2018, arXiv 1804.08487). Raises ValueError as
    `overlap`.
    """
    _check(mask, other)
    rng = np.random.default_rng(seed)
    chains = [_Chain(found, rng) for found in (mask, other)]
    for chain in chains:
        chain.trade(20)
    shared = np.empty(n_samples, dtype=np.int64)
    for number in range(n_samples):
        for chain in chains:
            chain.trade(4)
        shared[number] = np.isin(chains[0].cells, chains[1].cells, assume_unique=True).sum()
    return shared


def rank_correlation(scores: WeightScores, other: WeightScores) -> float:
    """Spearman correlation of two scores within each matrix, averaged over matrices by their number of weights.

    Within matrices, because the matrices' different scales alone would correlate any two scores. Raises ValueError for
    scores of different weights.
    """
    if scores.shapes != other.shapes:
        raise ValueError("rank_correlation: the scores are of different weights")
    total, n_weights = 0.0, 0
    for name, value in scores.values.items():
        total += value.numel() * spearman(*(found.flatten().cpu().numpy() for found in (value, other.values[name])))
        n_weights += value.numel()
    return total / n_weights


def spearman(first: ArrayLike, second: ArrayLike) -> float:
    """Spearman's rank correlation of two equally long lists of numbers."""
    return float(np.corrcoef(rankdata(first), rankdata(second))[0, 1])


def _overlap(mask: WeightMask, other: WeightMask) -> Overlap:
    _check(mask, other)
    first, second = mask.counts, other.counts
    expected = sum(first[name] * second[name] / int(np.prod(shape)) for name, shape in mask.shapes.items())
    return Overlap((mask & other).n_removed, mask.n_removed, other.n_removed, expected)


def _check(mask: WeightMask, other: WeightMask) -> None:
    for found in (mask, other):
        if not found.n_removed:
            raise ValueError(f"overlap: {found} removes nothing; choose at least one weight")
    if mask.shapes != other.shapes or mask.source.model != other.source.model:
        raise ValueError(
            f"overlap: the masks are of different models or weights ({mask.source.model}, {other.source.model})"
        )


class _Chain:
    """A mask as entries (row, column) that trades columns between rows of the same matrix."""

    def __init__(self, mask: WeightMask, rng: np.random.Generator) -> None:
        self.rng = rng
        rows, columns, owner, first_row = [], [], [], 0
        self.width = max(shape[-1] for shape in mask.shapes.values())
        for name, shape in mask.shapes.items():
            if name in mask.removed:
                row, column = np.divmod(mask.removed[name].numpy(), shape[-1])
                rows.append(first_row + row)
                columns.append(column)
                # Stacked experts are matrices of their own.
                owner.append(first_row + row // shape[-2] * shape[-2])
            first_row += int(np.prod(shape[:-1]))
        self.row, self.column = np.concatenate(rows), np.concatenate(columns)
        # Only rows that hold entries can trade.
        self.used, first = np.unique(self.row, return_index=True)
        self.matrix = np.concatenate(owner)[first]
        self.position = np.searchsorted(self.used, self.row)

    @property
    def cells(self) -> np.ndarray:
        """One number for each entry's place."""
        return self.used[self.position] * self.width + self.column

    def trade(self, n_rounds: int) -> None:
        """In each round, pair up the rows of each matrix at random; the columns that only one of a pair holds are dealt
        out again at random, each row keeping its count."""
        starts = np.searchsorted(self.matrix, self.matrix)
        for _ in range(n_rounds):
            order = np.lexsort((self.rng.random(len(self.used)), self.matrix))
            within = np.empty(len(order), dtype=np.int64)
            within[order] = np.arange(len(order)) - starts
            leader = starts + within - within % 2  # a pair's first place in `order`
            pair, side = leader[self.position], (within % 2)[self.position]
            key = pair * self.width + self.column
            _, inverse, times = np.unique(key, return_inverse=True, return_counts=True)
            free = np.flatnonzero(times[inverse] == 1)
            dealt = free[np.lexsort((self.rng.random(len(free)), pair[free]))]
            rank = np.arange(len(dealt)) - np.searchsorted(pair[dealt], pair[dealt])
            n_first = np.bincount(pair[free][side[free] == 0], minlength=len(order))
            self.position[dealt] = order[pair[dealt] + (rank >= n_first[pair[dealt]])]
