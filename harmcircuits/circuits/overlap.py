"""What two masks share, against chance that is matched to them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import isnan, nan, prod

import numpy as np
from jaxtyping import Int, Int64

from harmcircuits.circuits.location import By, Place, pieces
from harmcircuits.circuits.masks import WeightMask, refuse_others
from harmcircuits.circuits.sites import Site
from harmcircuits.display import card, facts, number_text, share
from harmcircuits.measurements import Interval, student_quantile, wilson

BURN_IN = 20  # rounds of trades before the first sample of the stricter null
THINNING = 4  # rounds of trades between two samples


@dataclass(frozen=True, repr=False)
class Overlap:
    """What two masks share."""

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
        of_first = self.n_shared / self.n_first
        of_second = self.n_shared / self.n_second
        return of_first, of_second

    @property
    def lift(self) -> float:
        """Shared weights over those expected by chance per matrix: 1 for unrelated masks."""
        return self._over(self.n_expected)

    @property
    def lift_marginal(self) -> float:
        """Shared weights over those expected by chance per row and column."""
        return self._over(self.n_expected_marginal)

    @property
    def interval(self) -> Interval:
        """95 % interval of `lift`."""
        n = len(self.resampled)
        if n < 2:
            return self._wilson(self.n_expected)
        # Not their quantiles: a resample repeats examples, so its masks agree less than those of
        # all examples do. How far resamples differ from each other is what those of other examples
        # would.
        half = student_quantile(n) * float(np.std(self.resampled, ddof=1))
        return max(0.0, self.lift - half), self.lift + half

    @property
    def interval_marginal(self) -> Interval:
        """95 % interval of `lift_marginal`: Wilson's, as `interval` without resamples."""
        return self._wilson(self.n_expected_marginal)

    def _over(self, n_expected: float) -> float:
        if not n_expected:  # no matrix from which both masks remove something
            return nan
        return self.n_shared / n_expected

    def _wilson(self, n_expected: float) -> Interval:
        if not n_expected > 0:
            return nan, nan
        n = min(self.n_first, self.n_second)
        low, high = wilson(self.n_shared / n, n)
        # From shares of the smaller mask to numbers of weights, and over those expected.
        low_lift = low * n / n_expected
        high_lift = high * n / n_expected
        return max(0.0, low_lift), high_lift

    def __str__(self) -> str:
        lift = _with_interval(self.lift, self.interval)
        return f"{self.n_shared:,} shared, Jaccard {self.jaccard:.3f}, lift {lift}"

    def __repr__(self) -> str:
        return f"Overlap({self})"

    def _repr_html_(self) -> str:
        of_first, of_second = self.containment
        stricter = ""
        if not isnan(self.n_expected_marginal):
            stricter = _with_interval(self.lift_marginal, self.interval_marginal)
        values = {
            "shared": f"{self.n_shared:,}; by chance {number_text(self.n_expected)}",
            "first": f"{self.n_first:,}, of which {share(of_first)} are in the second",
            "second": f"{self.n_second:,}, of which {share(of_second)} are in the first",
            "Jaccard": f"{self.jaccard:.3f}",
            "lift against chance in each matrix": _with_interval(self.lift, self.interval),
            "against chance in each row and column": stricter,
        }
        return card("Overlap of two masks", facts(values))


def _with_interval(value: float, interval: Interval) -> str:
    low, high = interval
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def overlap(
    mask: WeightMask,
    other: WeightMask,
    *,
    resamples: Iterable[tuple[WeightMask, WeightMask]] = (),
    n_samples: int = 0,
    seed: int = 0,
) -> Overlap:
    """Shared weights of two masks of one model against matched chance.

    E[shared] = sum over matrices of n_first n_second / n.

    >>> first = hc.top_fraction(hc.removal_effect(bridge, harm), 0.01)
    >>> second = hc.top_fraction(hc.removal_effect(bridge, benign), 0.01)
    >>> hc.overlap(first, second)
    Overlap(... shared, Jaccard 0..., lift ... [..., ...])

    Args:
        mask: the first mask.
        other: the second.
        resamples: the same two masks from resampled calibration examples, for the interval.
        n_samples: samples of the stricter null (see `marginal_null`); none by default.
        seed: draws them.

    Raises:
        ValueError: masks of different models or weights, and a mask that removes nothing.
    """
    lifts = [_counted(first, second).lift for first, second in resamples]
    n_expected = nan
    if n_samples:
        n_expected = float(marginal_null(mask, other, n_samples=n_samples, seed=seed).mean())
    return replace(_counted(mask, other), n_expected_marginal=n_expected, resampled=tuple(lifts))


def overlap_by(
    mask: WeightMask,
    other: WeightMask,
    sites: Mapping[str, Site],
    by: By,
) -> dict[Place, Overlap]:
    """The overlap within every layer, matrix, head or neuron that both masks touch.

    Chance keeps each mask's count in every matrix of the place (in every head's or neuron's part of
    it).

    >>> first = hc.top_fraction(hc.removal_effect(bridge, harm), 0.01)
    >>> second = hc.top_fraction(hc.removal_effect(bridge, benign), 0.01)
    >>> list(hc.overlap_by(first, second, hc.weight_sites(bridge), "layer"))[0]
    Place(layer=0, part='', number=0)

    Args:
        mask: the first mask.
        other: the second.
        sites: `weight_sites` of their model.
        by: as in `counts_by`.

    Raises:
        ValueError: as `overlap` and `counts_by`.
    """
    _check(mask, other)
    # The same pieces in the same order for all three, so that they can be read side by side.
    parts: dict[Place, Overlap] = {}
    masks = (mask, other, mask & other)
    of_masks = [pieces(each, sites, by) for each in masks]
    for first, second, both in zip(*of_masks, strict=True):
        place, n_first, n_weights = first
        _, n_second, _ = second
        _, n_shared, _ = both
        before = parts.get(place, Overlap(0, 0, 0, 0.0))
        parts[place] = Overlap(
            before.n_shared + n_shared,
            before.n_first + n_first,
            before.n_second + n_second,
            before.n_expected + n_first * n_second / n_weights,
        )
    return {place: part for place, part in parts.items() if part.n_first and part.n_second}


def marginal_null(
    mask: WeightMask, other: WeightMask, *, n_samples: int = 100, seed: int = 0
) -> Int64[np.ndarray, " n_samples"]:
    """Shared weights of random masks that keep every row and every column count of each matrix."""
    _check(mask, other)
    rng = np.random.default_rng(seed)
    # Both chains draw from one generator, so the order of the trades below is part of the result.
    first = _Chain(mask, rng)
    second = _Chain(other, rng)
    first.trade(BURN_IN)
    second.trade(BURN_IN)

    n_shared = []
    for _ in range(n_samples):
        first.trade(THINNING)
        second.trade(THINNING)
        is_shared = np.isin(first.cells, second.cells, assume_unique=True)
        n_shared.append(is_shared.sum())
    return np.array(n_shared, dtype=np.int64)


def _counted(mask: WeightMask, other: WeightMask) -> Overlap:
    """What they share, and the expectation in closed form."""
    _check(mask, other)
    first, second = mask.counts, other.counts
    n_expected = 0.0
    for name, shape in mask.shapes.items():
        # Each of the n_first weights is in the other mask with probability n_second / n.
        n_expected += first[name] * second[name] / prod(shape)
    return Overlap(
        (mask & other).n_removed,
        mask.n_removed,
        other.n_removed,
        n_expected,
    )


def _check(mask: WeightMask, other: WeightMask) -> None:
    for each in (mask, other):
        if not each.n_removed:
            raise ValueError(f"overlap: {each} removes nothing; choose at least one weight")
    refuse_others(mask, other)


class _Chain:
    """A mask as entries (row, column) that trades columns between rows of the same matrix."""

    def __init__(self, mask: WeightMask, rng: np.random.Generator) -> None:
        self.rng = rng
        self.width = max(shape[-1] for shape in mask.shapes.values())
        rows = []
        columns = []
        matrices = []
        first_row = 0
        for name, shape in mask.shapes.items():
            if name in mask.removed:
                flat = mask.removed[name].numpy()
                row, column = np.divmod(flat, shape[-1])
                rows.append(first_row + row)
                columns.append(column)
                # A matrix is known by its first row. Each stacked expert is a matrix.
                n_rows = shape[-2]
                matrices.append(first_row + row // n_rows * n_rows)
            first_row += prod(shape[:-1])

        row_of_entry = np.concatenate(rows)
        matrix_of_entry = np.concatenate(matrices)
        self.column = np.concatenate(columns)
        self.used, entry_of_row = np.unique(row_of_entry, return_index=True)
        # Both arrays are sorted, so the place of a number in them is its new number.
        self.row = np.searchsorted(self.used, row_of_entry)
        self.matrix = matrix_of_entry[entry_of_row]
        self.start = np.searchsorted(self.matrix, self.matrix)

    @property
    def cells(self) -> Int[np.ndarray, " entries"]:
        """One number for each entry's place."""
        row = self.used[self.row]
        return row * self.width + self.column

    def trade(self, n_rounds: int) -> None:
        """Trade columns between random pairs of rows, `n_rounds` times."""
        for _ in range(n_rounds):
            self._trade_once()

    def _trade_once(self) -> None:
        """Pair up the rows of each matrix at random; each pair deals out its columns again."""
        # A matrix of four used rows, 0 to 3, that are shuffled to the order 2, 0, 3, 1:
        #
        #     slot            0   1 | 2   3
        #     order[slot]     2   0 | 3   1     rows 2 and 0 are a pair, and so are 3 and 1
        #     side            0   1 | 0   1     a pair's first row and its second
        #     pair            0   0 | 2   2     a pair is known by its first slot
        #
        #     row 2:   a  b  .  d               b stays: both rows hold it
        #     row 0:   .  b  c  .               a, d and c are free
        #
        # Shuffled to c, a, d, the free ones go to row 2 until it holds as many as before (c, a),
        # and then to row 0 (d). An odd row out is a pair by itself and takes back its own.
        n_rows = len(self.used)
        order = self._shuffled(self.matrix)
        place = np.empty_like(self.start)  # of a row among the shuffled rows of its matrix
        place[order] = np.arange(n_rows) - self.start
        side_of_row = place % 2
        pair_of_row = self.start + place - side_of_row

        # From here on by entry. The three free ones of the pair of rows 2 and 0:
        #
        #     row, column        2 a   2 d   0 c      n_of_first of the pair is 2
        #     after the shuffle  0 c   2 a   2 d
        #     rank               0     1     2
        #     side               0     0     1        rank >= n_of_first
        #     new row            2     2     0        order[pair + side]
        pair = pair_of_row[self.row]
        free = self._free(pair)
        row, pair = self.row[free], pair[free]
        is_of_first = side_of_row[row] == 0
        n_of_first = np.bincount(pair[is_of_first], minlength=n_rows)

        shuffle = self._shuffled(pair)
        pair = pair[shuffle]  # sorted now
        first = np.searchsorted(pair, pair)  # of the pair in the shuffle
        rank = np.arange(len(pair)) - first
        side = rank >= n_of_first[pair]
        self.row[free[shuffle]] = order[pair + side]

    def _shuffled(self, groups: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """The numbers 0 to n - 1, group after group, at random within each."""
        noise = self.rng.random(len(groups))
        return np.lexsort((noise, groups))

    def _free(self, pair: Int[np.ndarray, " entries"]) -> Int[np.ndarray, " free"]:
        """The entries whose column the other row of their pair does not hold."""
        # One number for a column of a pair: it occurs twice where both rows hold the column.
        key = pair * self.width + self.column
        _, number, times = np.unique(
            key,
            return_inverse=True,
            return_counts=True,
        )
        return np.flatnonzero(times[number] == 1)
