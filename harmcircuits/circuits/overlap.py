"""The overlap of two masks, compared with chance that is matched to them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import isnan, nan, prod

import numpy as np
from jaxtyping import Int, Int64

from harmcircuits.circuits.location import By, Place, matrix_counts
from harmcircuits.circuits.masks import NO_WEIGHTS, WeightMask
from harmcircuits.circuits.sites import Site
from harmcircuits.display import card, facts, number_text, share
from harmcircuits.measurements import Interval, student_quantile, wilson

BURN_IN = 20  # rounds of trades before the first sample of `marginal_null`
THINNING = 4  # rounds of trades between two samples


@dataclass(frozen=True, repr=False)
class Overlap:
    """The weights that two masks share, and the number expected by chance."""

    n_shared: int
    n_first: int
    n_second: int
    n_expected: float
    n_expected_marginal: float = nan
    resampled: tuple[float, ...] = ()

    @property
    def jaccard(self) -> float:
        """Shared weights over weights in either mask."""
        n_either = self.n_first + self.n_second - self.n_shared
        return self.n_shared / n_either

    @property
    def containment(self) -> tuple[float, float]:
        """Share of the first mask that is in the second, and of the second that is in the first."""
        return self.n_shared / self.n_first, self.n_shared / self.n_second

    @property
    def lift(self) -> float:
        """Fold enrichment: shared weights over those expected per matrix; 1 for unrelated masks."""
        return self._over(self.n_expected)

    @property
    def lift_marginal(self) -> float:
        """Fold enrichment over the number expected by chance per row and column."""
        return self._over(self.n_expected_marginal)

    @property
    def interval(self) -> Interval:
        """95 % interval of `lift`."""
        n = len(self.resampled)
        if n < 2:
            return self._wilson(self.n_expected)
        # The spread of the resamples, not their quantiles: a resample repeats examples, so its two
        # masks agree less than the masks from all examples do.
        half = student_quantile(n) * float(np.std(self.resampled, ddof=1))
        return max(0.0, self.lift - half), self.lift + half

    @property
    def interval_marginal(self) -> Interval:
        """95 % interval of `lift_marginal`: Wilson's, as `interval` without resamples."""
        return self._wilson(self.n_expected_marginal)

    def _over(self, n_expected: float) -> float:
        if not n_expected:  # no matrix loses weights in both masks
            return nan
        return self.n_shared / n_expected

    def _wilson(self, n_expected: float) -> Interval:
        if not n_expected > 0:
            return nan, nan
        n = min(self.n_first, self.n_second)
        low, high = wilson(self.n_shared / n, n)
        # From shares of the smaller mask to numbers of weights, then to fold enrichment.
        return low * n / n_expected, high * n / n_expected

    def __str__(self) -> str:
        lift = _with_interval(self.lift, self.interval)
        return f"{self.n_shared:,} shared, Jaccard {self.jaccard:.3f}, lift {lift}"

    def __repr__(self) -> str:
        return f"Overlap({self})"

    def _repr_html_(self) -> str:
        first_share, second_share = map(share, self.containment)
        marginal = ""
        if not isnan(self.n_expected_marginal):
            marginal = _with_interval(self.lift_marginal, self.interval_marginal)
        values = {
            "shared": f"{self.n_shared:,}; by chance {number_text(self.n_expected)}",
            "first": f"{self.n_first:,}, of which {first_share} are in the second",
            "second": f"{self.n_second:,}, of which {second_share} are in the first",
            "Jaccard": f"{self.jaccard:.3f}",
            "lift against chance in each matrix": _with_interval(self.lift, self.interval),
            "against chance in each row and column": marginal,
        }
        return card("Overlap of two masks", facts(values))


def _with_interval(value: float, interval: Interval) -> str:
    low, high = interval
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def overlap(
    first: WeightMask,
    second: WeightMask,
    *,
    resamples: Iterable[tuple[WeightMask, WeightMask]] = (),
    n_samples: int = 0,
    seed: int = 0,
) -> Overlap:
    """Shared weights of two masks of one model, compared with matched chance.

    E[shared] = sum over matrices of n_first n_second / n: the expected number for two random masks
    that remove as many weights of every matrix.

    >>> first = hc.top_fraction(hc.removal_effect(bridge, harm), 0.01)
    >>> second = hc.top_fraction(hc.removal_effect(bridge, benign), 0.01)
    >>> hc.overlap(first, second)
    Overlap(... shared, Jaccard 0..., lift ... [..., ...])

    Args:
        first: the first mask.
        second: the second mask.
        resamples: pairs of the same two masks, each from resampled calibration examples. They
            give the interval of the lift.
        n_samples: number of samples of the stricter null that keeps the counts of every row and
            column; no sample by default.
        seed: seed of these samples.

    Raises:
        ValueError: masks of different models or weights, or a mask that removes nothing.
    """
    result = _closed_form(first, second)
    lifts = [_closed_form(*pair).lift for pair in resamples]
    result = replace(result, resampled=tuple(lifts))
    if n_samples:
        null = marginal_null(first, second, n_samples=n_samples, seed=seed)
        result = replace(result, n_expected_marginal=float(null.mean()))
    return result


def overlap_by(
    first: WeightMask,
    second: WeightMask,
    sites: Mapping[str, Site],
    by: By,
) -> dict[Place, Overlap]:
    """The overlap within every layer, matrix, head or neuron that both masks touch.

    Chance keeps each mask's count in every matrix of the place, or in the part of the matrix that
    belongs to the head or neuron.

    >>> first = hc.top_fraction(hc.removal_effect(bridge, harm), 0.01)
    >>> second = hc.top_fraction(hc.removal_effect(bridge, benign), 0.01)
    >>> list(hc.overlap_by(first, second, hc.weight_sites(bridge), "layer"))[0]
    Place(layer=0, part='', number=0)

    Args:
        first: the first mask.
        second: the second mask.
        sites: `weight_sites` of their model.
        by: "layer", "matrix", "head" or "neuron".

    Raises:
        ValueError: another `by`; masks of different models or weights, or a mask that removes
            nothing.
    """
    masks = (first, second, _shared(first, second))
    # The counts of the three masks come in the same order.
    counts = [matrix_counts(mask, sites, by) for mask in masks]
    places: dict[Place, Overlap] = {}
    for (place, in_first), (_, in_second), (_, in_both) in zip(*counts, strict=True):
        n_expected = in_first.n_removed * in_second.n_removed / in_first.n_weights
        total = places.get(place, Overlap(0, 0, 0, 0.0))
        places[place] = Overlap(
            total.n_shared + in_both.n_removed,
            total.n_first + in_first.n_removed,
            total.n_second + in_second.n_removed,
            total.n_expected + n_expected,
        )
    return {place: total for place, total in places.items() if total.n_first and total.n_second}


def marginal_null(
    first: WeightMask, second: WeightMask, *, n_samples: int = 100, seed: int = 0
) -> Int64[np.ndarray, " n_samples"]:
    """Shared weights of random masks that keep every row and every column count of each matrix."""
    rng = np.random.default_rng(seed)
    # Both chains draw from one generator, so the order of the trades below is part of the result.
    chains = _Chain(first, rng), _Chain(second, rng)
    for chain in chains:
        chain.trade(BURN_IN)

    n_shared = []
    for _ in range(n_samples):
        for chain in chains:
            chain.trade(THINNING)
        is_shared = np.isin(chains[0].cells, chains[1].cells, assume_unique=True)
        n_shared.append(is_shared.sum())
    return np.array(n_shared, dtype=np.int64)


def _closed_form(first: WeightMask, second: WeightMask) -> Overlap:
    """The overlap, with the expected number in closed form."""
    n_shared = len(_shared(first, second))
    n_first, n_second = first.counts, second.counts
    n_expected = 0.0
    for name, shape in first.shapes.items():
        # Each of the n_first weights is in the second mask with probability n_second / n.
        n_expected += n_first[name] * n_second[name] / prod(shape)
    return Overlap(n_shared, len(first), len(second), n_expected)


def _shared(first: WeightMask, second: WeightMask) -> WeightMask:
    """The weights in both masks, neither of which may be empty."""
    for mask in (first, second):
        if not len(mask):
            raise ValueError(f"overlap: {mask} removes nothing; choose at least one weight")
    return first & second


class _Chain:
    """A mask as entries (row, column), and trades of columns between rows of the same matrix."""

    def __init__(self, mask: WeightMask, rng: np.random.Generator) -> None:
        self.rng = rng
        self.width = max(shape[-1] for shape in mask.shapes.values())
        rows = []
        columns = []
        first_rows: list[int] = []  # of each matrix; each stacked expert is a matrix
        n_rows = 0
        for name, shape in mask.shapes.items():
            index = mask.removed.get(name, NO_WEIGHTS)
            row, column = np.divmod(index.numpy(), shape[-1])
            rows.append(n_rows + row)
            columns.append(column)
            end = n_rows + prod(shape[:-1])
            first_rows += range(n_rows, end, shape[-2])
            n_rows = end

        self.column = np.concatenate(columns)
        self.rows, self.row = np.unique(np.concatenate(rows), return_inverse=True)
        self.matrix = np.searchsorted(first_rows, self.rows, side="right")
        self.start = np.searchsorted(self.matrix, self.matrix)

    @property
    def cells(self) -> Int[np.ndarray, " entries"]:
        """One number for each entry's place."""
        row = self.rows[self.row]
        return row * self.width + self.column

    def trade(self, n_rounds: int) -> None:
        """Trade columns between random pairs of rows, `n_rounds` times."""
        for _ in range(n_rounds):
            self._trade_once()

    def _trade_once(self) -> None:
        """Pair up the rows of each matrix at random; each pair deals out its columns again."""
        # A matrix has four rows with entries, 0 to 3, in the shuffled order 2, 0, 3, 1:
        #
        #     slot            0   1 | 2   3
        #     order[slot]     2   0 | 3   1     rows 2 and 0 are a pair, and so are 3 and 1
        #     side            0   1 | 0   1     a pair's first row and its second
        #     pair            0   0 | 2   2     its first slot identifies a pair
        #
        #     row 2:   a  b  .  d               b stays: both rows hold it
        #     row 0:   .  b  c  .               a, d and c are free
        #
        # Shuffled to c, a, d, the free columns go to row 2 up to its old count (c, a), and the rest
        # to row 0 (d). The last of an odd number of rows is a pair by itself and does not change.
        n_rows = len(self.rows)
        order = self._shuffled(self.matrix)
        place = np.empty_like(self.start)  # of a row among the shuffled rows of its matrix
        place[order] = np.arange(n_rows) - self.start
        side_of_row = place % 2
        pair_of_row = self.start + place - side_of_row

        # From here on by entry. The three free entries of the pair of rows 2 and 0:
        #
        #     row, column        2 a   2 d   0 c      n_first of the pair is 2
        #     after the shuffle  0 c   2 a   2 d
        #     rank               0     1     2
        #     side               0     0     1        rank >= n_first
        #     new row            2     2     0        order[pair + side]
        pair = pair_of_row[self.row]
        free = self._free(pair)
        row, pair = self.row[free], pair[free]
        is_first = side_of_row[row] == 0
        n_first = np.bincount(pair[is_first], minlength=n_rows)

        shuffle = self._shuffled(pair)
        pair = pair[shuffle]  # sorted by the shuffle
        start = np.searchsorted(pair, pair)  # the first position of the pair
        rank = np.arange(len(pair)) - start
        side = rank >= n_first[pair]
        self.row[free[shuffle]] = order[pair + side]

    def _shuffled(self, groups: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """The numbers 0 to n - 1, group after group, in random order within a group."""
        noise = self.rng.random(len(groups))
        return np.lexsort((noise, groups))

    def _free(self, pair: Int[np.ndarray, " entries"]) -> Int[np.ndarray, " free"]:
        """The entries whose column the other row of their pair does not hold."""
        # One number for each column of a pair; it occurs twice if both rows hold the column.
        key = pair * self.width + self.column
        _, number, times = np.unique(
            key,
            return_inverse=True,
            return_counts=True,
        )
        return np.flatnonzero(times[number] == 1)
