"""Intervals hold the truth as often as they say; p-values are uniform under the null.

Would catch: an interval of rows in place of items, a quantile or a variance off by a factor, a null
that is too narrow. Each kind's negative twin is a third of its interval.
"""

from collections.abc import Callable
from math import erf, sqrt

import numpy as np
import pytest
import torch
from numpy.random import Generator
from scipy.stats import binom
from support.curves import rate_difference

from harmcircuits.circuits.masks import WeightMask
from harmcircuits.circuits.overlap import marginal_null, overlap
from harmcircuits.circuits.scores import Source
from harmcircuits.measurements import Measurement

ERROR = 0.001  # how often a right interval or p-value fails its bound, by the binomial
N_ITEMS, N_TRIALS, PER_ITEM = 16, 60, 4
LEAST = 0.93  # how often in the long run a 95 % interval holds the truth
SHAPES = {"a": (32, 64), "b": (64, 32)}
ITEMS = np.repeat(np.arange(N_ITEMS), PER_ITEM).tolist()


# Kinds of intervals: each draws data of 16 items and gives an interval and its true value


def rate_of_unequal_groups(rng: Generator) -> tuple[Measurement, float]:
    """Every other item is asked about seven times, the others once; answers about one agree."""
    groups = np.repeat(np.arange(N_ITEMS), np.where(np.arange(N_ITEMS) % 2, 7, 1))
    hits = (rng.random(N_ITEMS) < 0.5)[groups]
    return Measurement.rate("x_rate", {}, hits.tolist(), groups.tolist()), 0.5


def difference(rng: Generator) -> tuple[Measurement, float]:
    rates = []
    for share in (0.7, 0.4):
        hits = (rng.random(N_ITEMS) < share).tolist()
        rates.append(Measurement.rate("x_rate", {}, hits, range(N_ITEMS)))
    return rate_difference("d", {}, *rates), 0.7 - 0.4


def average(rng: Generator) -> tuple[Measurement, float]:
    """Half of the variance is shared by the answers about an item."""
    values = rng.normal(size=(N_ITEMS, 1)) + rng.normal(size=(N_ITEMS, PER_ITEM))
    return Measurement.average("x", {}, torch.from_numpy(values.ravel()), ITEMS), 0.0


def area_of_pairs(rng: Generator) -> tuple[Measurement, float]:
    """Pairs with a common shift. Two values of one item are in order more often than of two items."""
    values = rng.normal(size=(N_ITEMS, 1)) + rng.normal(size=(N_ITEMS, 2)) + [0.0, 1.0]
    groups = np.repeat(np.arange(N_ITEMS), 2).tolist()
    is_positive = torch.tensor([False, True]).repeat(N_ITEMS)
    row = Measurement.auroc("x", {}, torch.from_numpy(values.ravel()), is_positive, groups)
    across, within = (0.5 * (1 + erf(1 / sqrt(4 * v))) for v in (2, 1))
    return row, ((N_ITEMS - 1) * across + within) / N_ITEMS


def lift(rng: Generator) -> tuple[Measurement, float]:
    shares = overlap(*random_masks(rng, n=80))
    low, high = shares.interval
    return Measurement("lift", {}, shares.lift, low, high), 1.0


@pytest.mark.parametrize("kind", [rate_of_unequal_groups, difference, average, area_of_pairs, lift])
def test_an_interval_holds_the_truth(kind: Callable):
    """A right interval at 93 % falls below the bound in 0.1 % of such runs."""
    rng = np.random.default_rng(0)
    n_held, n_held_by_thirds = 0, 0
    for _ in range(N_TRIALS):
        row, truth = kind(rng)
        n_held += row.low <= truth <= row.high
        third = row.mean + (row.low - row.mean) / 3, row.mean + (row.high - row.mean) / 3
        n_held_by_thirds += third[0] <= truth <= third[1]
    bound = binom.ppf(ERROR, N_TRIALS, LEAST)
    assert n_held >= bound
    assert n_held_by_thirds < bound, "the comparison must be able to fail"


def random_masks(rng: Generator, *, rows: int = 64, n: int = 200) -> list[WeightMask]:
    """Two masks of n random weights in the first rows of each matrix; in all rows by default."""
    masks = []
    for _ in range(2):
        removed = {}
        for name, (n_rows, n_columns) in SHAPES.items():
            indices = rng.choice(min(rows, n_rows) * n_columns, n, replace=False)
            removed[name] = torch.from_numpy(np.sort(indices))
        masks.append(WeightMask(removed, SHAPES, Source("model", "random")))
    return masks


@pytest.mark.slow
def test_p_values_of_chance_within_rows_and_columns_are_uniform():
    """Masks in the same eight rows. Twin: by chance within matrices all of them look related."""
    values = []
    for seed in range(40):
        masks = random_masks(np.random.default_rng(seed), rows=8, n=100)
        samples = marginal_null(*masks, n_samples=99, seed=seed)
        observed = overlap(*masks)
        assert observed.interval[0] > 1
        values.append((1 + (samples >= observed.n_shared).sum()) / 100)
    # At each level as many lie below as it says; fewer by one step, since counts are whole.
    for level in (0.05, 0.1, 0.25, 0.5, 0.75):
        n_below = (np.array(values) <= level).sum()
        assert binom.ppf(ERROR, 40, max(0.0, level - 0.12)) <= n_below
        assert n_below <= binom.ppf(1 - ERROR, 40, level)
