"""Overlap of masks against closed forms and full enumeration.

Would catch: chance pooled over matrices, a null that ignores rows and columns, biased trades, an
interval that misses its own figure, places whose parts do not add up to the whole.
"""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, hypergeom, spearmanr

from harmcircuits.circuits.masks import WeightMask, random_like, top_fraction
from harmcircuits.circuits.overlap import (
    Overlap,
    _Chain,
    marginal_null,
    overlap,
    overlap_by,
    rank_correlation,
)
from harmcircuits.circuits.scores import Source, WeightScores
from harmcircuits.hooks.attribution import random_scores
from harmcircuits.hooks.weights import weight_sites

SHAPES = {f"blocks.{layer}.mlp.in.weight": (128, 64) for layer in range(4)}


def mask_of(removed, shapes=SHAPES, model="m") -> WeightMask:
    removed = {
        name: torch.as_tensor(sorted(index), dtype=torch.int64) for name, index in removed.items()
    }
    return WeightMask(removed, shapes, Source(model, "test"))


def random_mask(seed: int, *, n: int = 200, rows: int = 128, matrices: int = 4) -> WeightMask:
    """`n` random weights in the first `rows` rows of each of the first matrices."""
    rng = np.random.default_rng(seed)
    return mask_of(
        {name: rng.choice(rows * 64, n, replace=False).tolist() for name in list(SHAPES)[:matrices]}
    )


def test_counts_by_hand():
    first = mask_of({"blocks.0.mlp.in.weight": [0, 1, 2, 3], "blocks.1.mlp.in.weight": [5, 6]})
    second = mask_of({"blocks.0.mlp.in.weight": [2, 3, 4], "blocks.2.mlp.in.weight": [5]})
    shared = overlap(first, second)
    assert (shared.n_shared, shared.n_first, shared.n_second) == (2, 6, 4)
    assert shared.n_expected == pytest.approx(4 * 3 / (128 * 64))
    assert shared.jaccard == 2 / 8
    assert shared.containment == (2 / 6, 2 / 4)
    assert shared.lift == pytest.approx(2 * 128 * 64 / 12)
    assert "2 shared" in str(shared)


def test_a_mask_with_itself():
    mask = random_mask(0)
    shared = overlap(mask, mask)
    assert shared.jaccard == 1
    assert shared.containment == (1, 1)
    assert shared.lift == pytest.approx(mask.n_removed / shared.n_expected)


def test_chance_is_the_mean_of_the_hypergeometric():
    first, second = random_mask(0, n=300), random_mask(1, n=500)
    assert overlap(first, second).n_expected == pytest.approx(
        4 * hypergeom(128 * 64, 300, 500).mean()
    )


@pytest.mark.parametrize(
    "confined", [{}, {"matrices": 2}, {"rows": 12}], ids=["free", "two matrices", "twelve rows"]
)
def test_random_masks_have_lift_one(confined):
    """Nominal 95 % intervals: of 20 pairs, fewer than 16 covering would have a chance of 0.0003."""
    covered, lifts, ratios = 0, [], []
    for seed in range(20):
        masks = random_mask(2 * seed, **confined), random_mask(2 * seed + 1, **confined)
        shared = overlap(*masks, n_samples=20, seed=seed)
        low, high = shared.interval_marginal
        covered += low <= 1 <= high
        lifts.append(shared.lift_marginal)
        ratios.append(shared.n_expected_marginal / shared.n_expected)
    assert covered >= 16
    assert np.mean(lifts) == pytest.approx(1, abs=0.07)
    if "rows" not in confined:
        assert np.mean(ratios) == pytest.approx(1, abs=0.07), (
            "without structure the two nulls agree"
        )


def test_counts_per_matrix_are_fooled_by_rows_and_the_stricter_null_is_not():
    shared = overlap(random_mask(0, rows=12), random_mask(1, rows=12), n_samples=30)
    assert shared.interval[0] > 5, (
        "masks in the same rows look alike when only matrices are matched"
    )
    assert shared.interval_marginal[0] < 1 < shared.interval_marginal[1]


def test_planted_overlap_is_found_beyond_rows_and_columns():
    rng = np.random.default_rng(0)
    common = set(rng.choice(128 * 64, 100, replace=False).tolist())
    masks = []
    for _ in range(2):
        rest = rng.choice(sorted(set(range(128 * 64)) - common), 300, replace=False).tolist()
        masks.append(mask_of({"blocks.0.mlp.in.weight": common | set(rest)}))
    shared = overlap(*masks, n_samples=30)
    assert shared.n_shared >= 100
    assert shared.interval[0] > 3
    assert shared.interval_marginal[0] > 3


def test_trades_keep_rows_and_columns():
    mask = random_mask(0, n=700)
    chain = _Chain(mask, np.random.default_rng(0))
    before = {name: mask.dense(name) for name in mask.shapes}
    chain.trade(5)
    cells = torch.from_numpy(np.sort(chain.cells))
    assert len(cells.unique()) == mask.n_removed
    together = torch.cat(list(before.values()))
    traded = torch.zeros_like(together).flatten().index_fill(0, cells, True).view_as(together)
    assert (traded.sum(1) == together.sum(1)).all()
    for number, dense in enumerate(before.values()):
        assert (traded[128 * number : 128 * (number + 1)].sum(0) == dense.sum(0)).all()
    assert not (traded == together).all()


def test_trades_draw_uniformly():
    """All 3 x 4 zero-one matrices with these sums, enumerated.

    A p-value of 0.001 fails a right sampler once in a thousand seeds.
    """
    start = np.array([[1, 1, 0, 0], [0, 1, 1, 0], [1, 0, 0, 1]])
    rows, columns = start.sum(1), start.sum(0)
    every = [
        matrix
        for bits in itertools.product((0, 1), repeat=12)
        if ((matrix := np.array(bits).reshape(3, 4)).sum(1) == rows).all()
        and (matrix.sum(0) == columns).all()
    ]
    mask = mask_of({"w": np.flatnonzero(start).tolist()}, {"w": (3, 4)})
    chain = _Chain(mask, np.random.default_rng(0))
    seen = Counter()
    for _ in range(3000):
        chain.trade(3)
        seen[tuple(np.sort(chain.cells).tolist())] += 1
    assert len(seen) == len(every)
    assert chisquare(list(seen.values())).pvalue > 0.001


def test_marginal_null_is_reproducible():
    masks = random_mask(0), random_mask(1)
    assert (
        marginal_null(*masks, n_samples=5, seed=3) == marginal_null(*masks, n_samples=5, seed=3)
    ).all()
    assert (
        marginal_null(*masks, n_samples=5, seed=3) != marginal_null(*masks, n_samples=5, seed=4)
    ).any()


def test_resamples_make_the_interval():
    mask, other = random_mask(0), random_mask(1)
    resamples = [(random_mask(seed), random_mask(seed + 50)) for seed in range(2, 12)]
    shared = overlap(mask, other, resamples=resamples)
    lifts = [overlap(*pair).lift for pair in resamples]
    half = 2.262157 * np.std(lifts, ddof=1)  # Student's quantile for 9 degrees of freedom
    assert shared.interval == pytest.approx((shared.lift - half, shared.lift + half))

    without = overlap(mask, other).interval
    assert shared.interval != without
    assert overlap(mask, other, resamples=resamples[:1]).interval == without, "one has no spread"


def test_places_add_up(llama):
    sites = weight_sites(llama)
    scores = [random_scores(llama, seed=seed) for seed in (0, 1)]
    first, second = (top_fraction(each, 0.3, within="model") for each in scores)
    whole = overlap(first, second)
    for by in ("layer", "matrix"):
        places = overlap_by(first, second, sites, by)
        assert sum(part.n_shared for part in places.values()) == whole.n_shared
        assert sum(part.n_expected for part in places.values()) == pytest.approx(whole.n_expected)
    heads, neurons = (overlap_by(first, second, sites, by) for by in ("head", "neuron"))
    assert sum(part.n_shared for part in (*heads.values(), *neurons.values())) == whole.n_shared
    by_matrix = overlap_by(first, second, sites, "matrix")
    assert {(place.layer, place.part) for place in by_matrix} == {
        (site.layer, site.kind) for site in sites.values()
    }


def test_rank_correlation_is_spearman_within_matrices():
    generator = torch.Generator().manual_seed(0)
    values = [
        {n: torch.rand(s, generator=generator) for n, s in {"a": (5, 4), "b": (10, 8)}.items()}
        for _ in range(2)
    ]
    first, second = (WeightScores(each, Source("m", "test")) for each in values)
    each = [
        spearmanr(values[0][name].flatten(), values[1][name].flatten()).statistic
        for name in ("a", "b")
    ]
    assert rank_correlation(first, second) == pytest.approx((20 * each[0] + 80 * each[1]) / 100)
    assert rank_correlation(first, first) == pytest.approx(1)
    assert rank_correlation(first, -first) == pytest.approx(-1)
    scaled = WeightScores(
        {name: 4 * value for name, value in values[0].items()}, Source("m", "test")
    )
    assert rank_correlation(first, scaled) == pytest.approx(1), "a scale of its own must not matter"


def test_a_random_control_of_a_mask_has_lift_one():
    mask = random_mask(0)
    low, high = overlap(mask, random_like(mask, seed=1)).interval
    assert low < 1 < high


def test_errors_name_what_is_wrong():
    mask, empty = random_mask(0), mask_of({})
    with pytest.raises(ValueError, match="removes nothing"):
        overlap(mask, empty)
    with pytest.raises(ValueError, match="different models"):
        overlap(mask, mask_of({"blocks.0.mlp.in.weight": [1]}, model="other"))
    with pytest.raises(ValueError, match="different models or weights"):
        marginal_null(mask, mask_of({"w": [1]}, {"w": (3, 4)}))
    with pytest.raises(ValueError, match="different weights"):
        values = {"a": torch.ones(2, 2)}
        rank_correlation(
            WeightScores(values, Source("m", "t")),
            WeightScores({"b": torch.ones(2, 2)}, Source("m", "t")),
        )


def test_without_expectation_lift_is_not_a_number():
    shared = Overlap(0, 3, 2, 0.0)
    assert np.isnan(shared.lift)
    assert all(np.isnan(end) for end in shared.interval)
