"""Overlap of masks against closed forms and full enumeration (`tests/oracle.py`).

Would catch: chance pooled over matrices, a null that ignores rows and columns, biased trades.
"""

from collections import Counter

import helpers
import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from harmcircuits.circuits.masks import WeightMask
from harmcircuits.circuits.overlap import _Chain, marginal_null, overlap, overlap_by
from harmcircuits.circuits.scores import Source
from harmcircuits.hooks.weights import weight_sites

SHAPES = {f"blocks.{layer}.mlp.in.weight": (128, 64) for layer in range(4)}
SMALL = {"a": (3, 4), "b": (2, 5)}


def mask_of(removed, shapes=SHAPES, model="m") -> WeightMask:
    indices = {name: torch.tensor(sorted(index)).long() for name, index in removed.items()}
    return WeightMask(indices, shapes, Source(model, "test"))


def random_mask(seed: int) -> WeightMask:
    """200 random weights of each matrix."""
    rng = np.random.default_rng(seed)
    return mask_of({name: rng.choice(128 * 64, 200, replace=False).tolist() for name in SHAPES})


indices = st.fixed_dictionaries(
    {"a": st.sets(st.integers(0, 11), min_size=1), "b": st.sets(st.integers(0, 9))}
)


@settings(max_examples=60, deadline=None)
@given(indices, indices)
def test_an_overlap_is_what_sets_and_enumeration_say(first_indices, second_indices):
    first, second = mask_of(first_indices, SMALL), mask_of(second_indices, SMALL)
    shared = overlap(first, second)
    in_first, in_second = oracle.removed_weights(first), oracle.removed_weights(second)
    in_both = in_first & in_second
    assert shared.n_shared == len(in_both)
    assert shared.jaccard == len(in_both) / len(in_first | in_second)
    assert shared.containment == (len(in_both) / len(in_first), len(in_both) / len(in_second))
    expected = oracle.shared_by_chance(first, second)
    assert shared.n_expected == pytest.approx(expected)
    assert shared.lift == pytest.approx(len(in_both) / expected)
    assert f"{len(in_both)} shared" in str(shared)


def test_the_stricter_null_is_the_mean_over_all_masks_of_the_same_rows_and_columns():
    """To three standard errors of 600 samples; twin: chance in each matrix says another figure."""
    first = mask_of({"a": [0, 1, 5, 6, 8, 9], "b": [0, 5, 6]}, SMALL)
    second = mask_of({"a": [0, 1, 4, 9], "b": [0, 1, 5, 7]}, SMALL)
    expected = oracle.shared_by_rows_and_columns(first, second)
    null = marginal_null(first, second, n_samples=600)
    error = null.std() / np.sqrt(len(null))
    assert abs(null.mean() - expected) < 3 * error
    assert abs(oracle.shared_by_chance(first, second) - expected) > 3 * error


def test_trades_draw_uniformly():
    """A p-value of 0.001 fails a right sampler once in a thousand seeds."""
    start = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [1, 0, 0, 1]])
    mask = mask_of({"w": start.flatten().nonzero().flatten().tolist()}, {"w": (3, 4)})
    chain = _Chain(mask, np.random.default_rng(0))
    seen = Counter()
    for _ in range(2000):
        chain.trade(3)
        seen[tuple(np.sort(chain.cells).tolist())] += 1
    assert len(seen) == len(oracle.all_like(start))
    assert chisquare(list(seen.values())).pvalue > 0.001


def test_the_stricter_null_is_the_seed_s():
    masks = random_mask(0), random_mask(1)
    samples = marginal_null(*masks, n_samples=5, seed=3)
    assert samples.tolist() == [12, 18, 21, 19, 20]
    assert (samples != marginal_null(*masks, n_samples=5, seed=4)).any()


def test_resamples_make_the_interval():
    mask, other = random_mask(0), random_mask(1)
    resamples = [(random_mask(seed), random_mask(seed + 50)) for seed in range(2, 12)]
    shared = overlap(mask, other, resamples=resamples)
    lifts = [overlap(*pair).lift for pair in resamples]
    half = 2.262157 * np.std(lifts, ddof=1)  # Student's quantile for 9 degrees of freedom
    assert shared.interval == pytest.approx((shared.lift - half, shared.lift + half))


def test_places_add_up(llama):
    sites = weight_sites(llama)
    first, second = (helpers.random_mask(llama, 0.3, seed=seed) for seed in (0, 1))
    whole = overlap(first, second)
    for by in ("layer", "matrix"):
        places = overlap_by(first, second, sites, by)
        assert sum(part.n_shared for part in places.values()) == whole.n_shared
        assert sum(part.n_expected for part in places.values()) == pytest.approx(whole.n_expected)


def test_what_cannot_be_compared_is_refused():
    mask = random_mask(0)
    with pytest.raises(ValueError, match="removes nothing"):
        overlap(mask, mask_of({}))
    with pytest.raises(ValueError, match="of model x, expected one of m"):
        overlap(mask, mask_of({"blocks.0.mlp.in.weight": [1]}, model="x"))
