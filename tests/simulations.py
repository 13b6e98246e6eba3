"""Simulations of every kind of interval that the package writes: data whose truth is known.

Each kind draws data of `n` independent items, has the package make its interval of them, and says
what the interval should hold. The table of docs/trusted.md, in a quarter of an hour:

    PYTHONPATH=. python tests/simulations.py
"""

from collections.abc import Callable, Iterator
from functools import cache
from math import asin, erf, exp, pi, sqrt
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from numpy.random import Generator
from support.bench.results import area_ratio
from support.bench.results import resampled as resampled_ladders
from support.cross_ablation import N_TOPIC_DRAWS, _topic_mean
from support.curves import Curve, rate_at, w50
from support.nodes import _correlation, importance_rows

from harmcircuits.behaviours.behaviour import Behaviour
from harmcircuits.behaviours.outcomes import Outcomes
from harmcircuits.circuits.masks import WeightMask, top_fraction
from harmcircuits.circuits.overlap import Overlap, overlap
from harmcircuits.circuits.scores import Source, WeightScores
from harmcircuits.hooks.patching import _share
from harmcircuits.hooks.protection import _with_normal_interval
from harmcircuits.measurements import Measurement, Rows
from harmcircuits.prompts import Example, PromptSet
from harmcircuits.studies.utility import _rows as task_rows

N_ITEMS = (16, 32, 64)
LEAST = 0.93  # how often in the long run a 95 % interval holds the truth
PER_GROUP = 4  # answers about one item
SOURCE = Source("model", "simulated")


class Interval(NamedTuple):
    """An interval, and what it should hold."""

    low: float
    mean: float
    high: float
    truth: float

    def holds(self, scale: float = 1.0) -> bool:
        """Whether the truth lies within, after the interval is scaled about its figure."""
        low = self.mean - scale * (self.mean - self.low)
        high = self.mean + scale * (self.high - self.mean)
        # Ends that are a count over a count are off by the last bit.
        return low - 1e-9 <= self.truth <= high + 1e-9


Trial = Callable[[Generator, int], Interval]


class Kind(NamedTuple):
    """A kind of interval on some data.

    Attributes:
        trial: draws data of so many items, and gives the interval of them.
        n_full: how many trials there are in the long run; fewer where one takes long.
    """

    trial: Trial
    n_full: int = 1000


def of(row: Measurement, truth: float) -> Interval:
    return Interval(row.low, row.mean, row.high, truth)


# Rates


def grouped_hits(rng: Generator, n: int, share: float, agreement: float) -> np.ndarray:
    """Answers about n items; within an item each repeats its first with this probability."""
    first = rng.random((n, 1)) < share
    own = rng.random((n, PER_GROUP)) < share
    is_repeated = rng.random((n, PER_GROUP)) < agreement
    return np.where(is_repeated, first, own)


def rate(share: float, agreement: float) -> Trial:
    def trial(rng: Generator, n: int) -> Interval:
        hits = grouped_hits(rng, n, share, agreement).ravel().tolist()
        groups = np.repeat(np.arange(n), PER_GROUP).tolist()
        return of(Measurement.rate("x_rate", {}, hits, groups), share)

    return trial


def rate_of_unequal_groups(rng: Generator, n: int) -> Interval:
    """Every other item is asked about seven times, the others once; answers about one agree."""
    groups = np.repeat(np.arange(n), np.where(np.arange(n) % 2, 7, 1))
    hits = (rng.random(n) < 0.5)[groups]
    return of(Measurement.rate("x_rate", {}, hits.tolist(), groups.tolist()), 0.5)


def one_answer(rng: Generator, n: int, share: float) -> Measurement:
    return Measurement.rate("x_rate", {}, (rng.random(n) < share).tolist(), range(n))


def difference(first: float, second: float) -> Trial:
    def trial(rng: Generator, n: int) -> Interval:
        rates = one_answer(rng, n, first), one_answer(rng, n, second)
        return of(Measurement.difference("d", {}, *rates), first - second)

    return trial


def difference_of_the_same_requests(rng: Generator, n: int) -> Interval:
    ease = rng.random(n)
    rates = []
    for share in (0.7, 0.4):
        hits = (ease < share).tolist()
        rates.append(Measurement.rate("x_rate", {}, hits, range(n)))
    return of(Measurement.difference("d", {}, *rates), 0.7 - 0.4)


def task(rng: Generator, n: int) -> Interval:
    """A figure of the harness with the standard error that it gives."""
    hits = rng.random(n) < 0.6
    error = hits.std(ddof=1) / sqrt(n)
    figures = {"acc,none": float(hits.mean()), "acc_stderr,none": float(error), "sample_len": n}
    (row,) = task_rows("task", figures, {})
    return of(row, 0.6)


# Averages


def normal(rng: Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.normal(size=shape)


def skewed(rng: Generator, shape: tuple[int, ...]) -> np.ndarray:
    """As losses are: exponential, with mean 0 and variance 1."""
    return rng.exponential(size=shape) - 1


def average(draw: Callable[..., np.ndarray]) -> Trial:
    def trial(rng: Generator, n: int) -> Interval:
        """Half of the variance is shared by the answers about an item."""
        values = draw(rng, (n, 1)) + draw(rng, (n, PER_GROUP))
        groups = np.repeat(np.arange(n), PER_GROUP).tolist()
        return of(Measurement.average("x", {}, torch.from_numpy(values.ravel()), groups), 0.0)

    return trial


def perplexity(rng: Generator, n: int) -> Interval:
    """exp of a mean, as `losses.perplexity` carries the ends over."""
    row = Measurement.average("x", {}, torch.from_numpy(1 + normal(rng, (n,))), range(n))
    return Interval(exp(row.low), exp(row.mean), exp(row.high), exp(1.0))


@cache
def requests_of(n: int) -> PromptSet:
    return PromptSet(tuple(Example(f"request {i}", group=f"{i:03}") for i in range(n)))


def outcomes(n: int, hits: np.ndarray, nll: np.ndarray | None = None) -> Outcomes:
    requests = requests_of(n)
    behaviour = Behaviour("harmful", "x_rate", "x_nll", "yes", lambda split: requests)
    verdicts = tuple("yes" if hit else "no" for hit in hits)
    losses = torch.zeros(n) if nll is None else torch.from_numpy(nll).float()
    return Outcomes(behaviour, requests, verdicts, losses)


def paired_change(rng: Generator, n: int) -> Interval:
    ease = rng.random(n)
    before, after = outcomes(n, ease < 0.8), outcomes(n, ease < 0.5)
    return of(after.changes(before, {}).one("x_rate_change"), 0.5 - 0.8)


def normal_interval(rng: Generator, n: int) -> Interval:
    return of(_with_normal_interval("x", {}, torch.from_numpy(normal(rng, (n,)))), 0.0)


def patch_share(rng: Generator, n: int) -> Interval:
    """What is undone of a change of one nat: 0.4 of it in the mean, where the change is larger more."""
    whole = 1 + 0.3 * normal(rng, (n,))
    change = 0.4 * whole + 0.2 * normal(rng, (n,))
    return of(_share({}, torch.from_numpy(change), torch.from_numpy(whole), range(n)), 0.4)


# Areas


def area_of_pairs(rng: Generator, n: int) -> Interval:
    """Matched pairs with a shift in common. Two of one item are ordered more often than of two."""
    shift = normal(rng, (n, 1))
    values = shift + normal(rng, (n, 2)) + [0.0, 1.0]
    row = _area(values, np.repeat(np.arange(n), 2))
    across, within = (0.5 * (1 + erf(1 / sqrt(4 * v))) for v in (2, 1))
    return of(row, ((n - 1) * across + within) / n)


def area_of_apart(rng: Generator, n: int) -> Interval:
    """Half of the items have positive answers alone, half negative ones."""
    values = normal(rng, (n // 2, 2)) + np.array([0.0, 1.0])
    return of(_area(values, np.arange(n)), 0.5 * (1 + erf(1 / sqrt(4))))


def _area(values: np.ndarray, groups: np.ndarray) -> Measurement:
    is_positive = torch.tensor([False, True]).repeat(len(values))
    scores = torch.from_numpy(values.ravel())
    return Measurement.auroc("x_auroc", {}, scores, is_positive, groups.tolist())


# Curves

SHARES = (0.0, 0.001, 0.002, 0.004, 0.008)
LEFT = (1.0, 0.9, 0.6, 0.4, 0.1)  # of harm, at each share


def some_curve(rng: Generator, n: int, left: tuple[float, ...] = LEFT, ease=None) -> Curve:
    """An item is answered at a share where its own ease allows."""
    ease = rng.random(n) if ease is None else ease
    points = tuple({"harmful": outcomes(n, ease < share)} for share in left)
    return Curve(SHARES, points)


def measured_rate(rng: Generator, n: int) -> Interval:
    return of(rate_at(some_curve(rng, n), 0.002).row("x", {}), 0.6)


def half_size(rng: Generator, n: int) -> Interval:
    return of(w50(some_curve(rng, n)).row("w50", {}), 0.004)


def half_size_on_the_edge(rng: Generator, n: int) -> Interval:
    """Exactly half of harm is left at 0.2 %: every other sample misses it by one answer."""
    curve = some_curve(rng, n, (1.0, 0.9, 0.5, 0.25, 0.1))
    return of(w50(curve).row("w50", {}), 0.002)


def gap_of_curves(rng: Generator, n: int) -> Interval:
    ease = rng.random(n)
    first, second = (
        some_curve(rng, n, ease=ease),
        some_curve(rng, n, (1.0, 1.0, 0.8, 0.8, 0.8), ease),
    )
    estimate = rate_at(second, 0.004).minus(rate_at(first, 0.004))
    return of(estimate.row("gap", {}), 0.8 - 0.4)


def ratio_of_sizes(rng: Generator, n: int) -> Interval:
    ease = rng.random(n)
    first, second = (
        some_curve(rng, n, (1.0, 0.7, 0.3, 0.2, 0.1), ease),
        some_curve(rng, n, ease=ease),
    )
    return of(w50(first).over(w50(second)).row("ratio", {}), 0.5)


# Circuits

SHAPES = {"a": (32, 64), "b": (64, 32)}
N_WEIGHTS = 64 * 64


def mask_of(removed: dict[str, np.ndarray]) -> WeightMask:
    index = {name: torch.from_numpy(np.sort(of_weight)) for name, of_weight in removed.items()}
    return WeightMask(index, SHAPES, SOURCE)


def lift(truth: float) -> Trial:
    """Masks of 10 n weights: of the second so many are drawn from the first that the lift is true."""

    def trial(rng: Generator, n: int) -> Interval:
        n_weights, n_removed = 32 * 64, 5 * n
        first, second = {}, {}
        for name in SHAPES:
            chosen = rng.choice(n_weights, n_removed, replace=False)
            others = np.setdiff1d(np.arange(n_weights), chosen)
            n_shared = rng.binomial(n_removed, truth * n_removed / n_weights)
            shared = rng.choice(chosen, n_shared, replace=False)
            rest = rng.choice(others, n_removed - n_shared, replace=False)
            first[name], second[name] = chosen, np.concatenate([shared, rest])
        both = overlap(mask_of(first), mask_of(second))
        return Interval(both.interval[0], both.lift, both.interval[1], truth)

    return trial


def lift_over_rows_and_columns(rng: Generator, n: int) -> Interval:
    """Random masks in the same few rows, whose lift over rows and columns is 1."""
    masks = []
    for _ in range(2):
        removed = {name: rng.choice(12 * SHAPES[name][1], 4 * n, replace=False) for name in SHAPES}
        masks.append(mask_of(removed))
    both = overlap(*masks, n_samples=20, seed=int(rng.integers(2**31)))
    return Interval(both.interval_marginal[0], both.lift_marginal, both.interval_marginal[1], 1.0)


# The mean lift of 1,000 pairs of masks, by how many items their scores are means of.
TRUE_LIFTS = {16: 3.15, 32: 3.83, 64: 4.32}


def lift_of_resampled_items(rng: Generator, n: int) -> Interval:
    """Scores are means over n items; the truth is the mean lift of masks from as many items."""
    both = lift_of_items(rng, n, n_resamples=20)
    return Interval(both.interval[0], both.lift, both.interval[1], TRUE_LIFTS[n])


@cache
def _signal() -> np.ndarray:
    """True scores of every weight under two behaviours, which are alike by half."""
    rng = np.random.default_rng(0)
    common = rng.normal(size=N_WEIGHTS)
    return np.stack([common + rng.normal(size=N_WEIGHTS) for _ in range(2)])


def lift_of_items(rng: Generator, n: int, *, n_resamples: int) -> Overlap:
    """The masks of all items, with those of so many resamples of them."""
    signal = _signal()
    noise = rng.normal(size=(2, n, N_WEIGHTS), scale=4.0).astype(np.float32)
    pairs = []
    for number in range(n_resamples + 1):
        drawn = rng.integers(n, size=n) if number else np.arange(n)
        times = np.bincount(drawn, minlength=n) / n
        means = (signal + np.einsum("i,bij->bj", times, noise)).astype(np.float32)
        masks = []
        for values in means:
            parts = {"a": values[: 32 * 64].reshape(32, 64), "b": values[32 * 64 :].reshape(64, 32)}
            tensors = {name: torch.from_numpy(part) for name, part in parts.items()}
            masks.append(top_fraction(WeightScores(tensors, SOURCE), 0.05, within="model"))
        pairs.append(tuple(masks))
    return overlap(*pairs[0], resamples=pairs[1:])


def topic_mean(*, is_same: bool) -> Trial:
    """A table of n topics: each topic has its own height in both circuits."""

    def trial(rng: Generator, n: int) -> Interval:
        table = rng.normal(size=(n, 1)) + rng.normal(size=(1, n)) + rng.normal(size=(n, n))
        counted = np.eye(n, dtype=bool)
        draws = rng.integers(n, size=(N_TOPIC_DRAWS, n))
        return of(_topic_mean("x", {}, table, counted if is_same else ~counted, draws), 0.0)

    return trial


# Nodes


def importance(means: tuple[float, ...]) -> Trial:
    """The sum over positions of |mean effect|."""

    def trial(rng: Generator, n: int) -> Interval:
        effects = normal(rng, (n, 1, 1, len(means))) + np.array(means)
        (row,) = importance_rows(torch.from_numpy(effects), {})
        return of(row, sum(abs(mean) for mean in means))

    return trial


def rank_correlation(rng: Generator, n: int) -> Interval:
    """Of two normal rankings whose correlation is a half."""
    common = normal(rng, (n,))
    pairs = np.stack([common + normal(rng, (n,)) for _ in range(2)])
    (row,) = _correlation(pairs, {})
    return of(row, 6 / pi * asin(0.5 / 2))


# Several runs


def pooled_seeds(rng: Generator, n: int) -> Interval:
    """Three seeds ask the same items: their mean, with the widest ends."""
    ease = rng.random(n)
    rows = []
    for seed in range(3):
        hits = (ease + 0.1 * normal(rng, (n,)) < 0.5).tolist()
        rows.append(Measurement.rate("x_rate", {"seed": seed}, hits, range(n)))
    (row,) = Rows(rows).pool("seed")
    return of(row, 0.5)


def ladders(rng: Generator, n: int) -> Interval:
    """The ratio of two areas; n ladders of three models, which share half of the variance."""
    height = rng.normal(size=(n, 1, 1)) + rng.normal(size=(n, 3, 2))
    areas = np.array([2.0, 1.0]) * (5 + height)
    values = {(f"{i:03}", str(j), ""): tuple(areas[i, j]) for i in range(n) for j in range(3)}
    with patch("support.bench.results.N_RESAMPLES", 300):  # of 10,000, which take a second
        low, high = resampled_ladders(values, area_ratio)
    return Interval(low, area_ratio(areas.reshape(-1, 2)), high, 2.0)


SOME, FEW = 300, 100  # trials of what takes longer

KINDS = {
    "Wilson, rate 0.5": Kind(rate(0.5, 1.0)),
    "Wilson, rate 0.9": Kind(rate(0.9, 1.0)),
    "Wilson, four independent answers an item": Kind(rate(0.5, 0.0)),
    "Wilson, items with 1 and with 7 answers that agree": Kind(rate_of_unequal_groups),
    "Newcombe, 0.7 and 0.4": Kind(difference(0.7, 0.4)),
    "Newcombe, 0.98 and 0.9": Kind(difference(0.98, 0.9)),
    "Newcombe, the same items twice": Kind(difference_of_the_same_requests),
    "harness, Student's by its standard error": Kind(task),
    "normal, rise of a protected loss": Kind(normal_interval),
    "average, normal": Kind(average(normal)),
    "average, skewed": Kind(average(skewed)),
    "perplexity": Kind(perplexity),
    "change of a rate, paired": Kind(paired_change),
    "share of a patched change, ratio of means": Kind(patch_share),
    "AUROC, matched pairs": Kind(area_of_pairs, n_full=SOME),
    "AUROC, kinds in items of their own": Kind(area_of_apart),
    "rate of a curve": Kind(measured_rate),
    "gap of two curves, paired": Kind(gap_of_curves),
    "w50": Kind(half_size, n_full=SOME),
    "w50, exactly half left": Kind(half_size_on_the_edge, n_full=SOME),
    "ratio of two w50, paired": Kind(ratio_of_sizes, n_full=SOME),
    "lift 1": Kind(lift(1.0), n_full=SOME),
    "lift 4": Kind(lift(4.0), n_full=SOME),
    "lift over rows and columns": Kind(lift_over_rows_and_columns, n_full=FEW),
    "lift, resampled items": Kind(lift_of_resampled_items, n_full=SOME),
    "twin topics": Kind(topic_mean(is_same=True), n_full=SOME),
    "other topics": Kind(topic_mean(is_same=False)),
    "importance of a node": Kind(importance((0.8, -0.6, 0.4)), n_full=SOME),
    "importance of a node without any": Kind(importance((0.0, 0.0, 0.0)), n_full=SOME),
    "rank correlation of nodes": Kind(rank_correlation, n_full=SOME),
    "seeds pooled": Kind(pooled_seeds),
    "area over ladders": Kind(ladders, n_full=FEW),
}


def trials(name: str, n: int, n_trials: int) -> list[Interval]:
    """Intervals of a kind, by a seed of its own.

    Args:
        name: of the kind.
        n: items.
        n_trials: how many.
    """
    rng = np.random.default_rng([n, *name.encode()])
    return [KINDS[name].trial(rng, n) for _ in range(n_trials)]


def table() -> Iterator[str]:
    """A line for each kind: in how many of 100 trials its interval holds the truth."""
    for name, kind in KINDS.items():
        cells = []
        for n in N_ITEMS:
            intervals = trials(name, n, kind.n_full)
            share = np.mean([interval.holds() for interval in intervals])
            cells.append(f"{100 * share:.1f}")
        yield f"| {name} | {' | '.join(cells)} |"


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in table():
        print(line, flush=True)
