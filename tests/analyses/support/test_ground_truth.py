"""The planted bench on cases with known answers.

Would catch: an area that is upside down, a matched area that magnitude can still move, precision
over the wrong ranking.
"""

import pytest
import torch
from support.ground_truth import ground_truth_rows

from harmcircuits.circuits.masks import WeightMask
from harmcircuits.circuits.scores import Source, WeightScores

SOURCE = Source("m", "test")


def figures(scores: torch.Tensor, inside: torch.Tensor, weights: torch.Tensor) -> dict[str, float]:
    truth = WeightMask(
        {"a": inside.flatten().nonzero().flatten()}, {"a": tuple(inside.shape)}, SOURCE
    )
    rows = ground_truth_rows({"x": WeightScores({"a": scores}, SOURCE)}, truth, {"a": weights}, {})
    return {row.metric: row.mean for row in rows.where(method="x")}


@pytest.fixture
def planted() -> tuple[torch.Tensor, torch.Tensor]:
    """Weights, and a true set that prefers large ones: |W| alone finds it in part."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(200, 200, generator=generator)
    return weights, torch.rand(200, 200, generator=generator) < 0.2 * weights.abs().clamp(max=2)


def test_the_truth_itself_scores_one(planted):
    weights, inside = planted
    recovered = figures(inside.float(), inside, weights)
    assert recovered == pytest.approx(dict.fromkeys(recovered, 1.0))


def test_the_opposite_scores_zero(planted):
    weights, inside = planted
    recovered = figures(-inside.float(), inside, weights)
    assert recovered == pytest.approx(dict.fromkeys(recovered, 0.0))


def test_magnitude_knows_nothing_at_equal_magnitude(planted):
    weights, inside = planted
    recovered = figures(weights.abs(), inside, weights)
    assert recovered["recovery_auroc"] > 0.6
    # 6,000 true weights: a standard error of 0.004; what is left is the slope within a fiftieth
    # of |W|.
    assert recovered["recovery_matched_auroc"] == pytest.approx(0.5, abs=0.02)
