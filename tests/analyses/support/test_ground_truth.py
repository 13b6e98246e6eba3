"""The planted bench on cases with known answers.

Would catch: an area that is upside down, a matched area that magnitude can still move.
"""

import torch
from pytest import approx
from support.ground_truth import ground_truth_rows

from harmcircuits.circuits.masks import WeightMask
from harmcircuits.circuits.scores import Source, WeightScores

SOURCE = Source("m", "test")


def test_the_truth_scores_one_its_opposite_zero_and_magnitude_nothing_at_equal_magnitude():
    """Weights, and a true set that prefers large ones: |W| alone finds it in part."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(200, 200, generator=generator)
    inside = torch.rand(200, 200, generator=generator) < 0.2 * weights.abs().clamp(max=2)
    truth = WeightMask({"a": inside.flatten().nonzero().flatten()}, {"a": (200, 200)}, SOURCE)

    def figures(scores: torch.Tensor) -> dict[str, float]:
        scored = {"x": WeightScores({"a": scores}, SOURCE)}
        rows = ground_truth_rows(scored, truth, {"a": weights}, {})
        return {row.metric: row.mean for row in rows.where(method="x")}

    of_truth, of_opposite = figures(inside.float()), figures(-inside.float())
    assert of_truth == approx(dict.fromkeys(of_truth, 1.0))
    assert of_opposite == approx(dict.fromkeys(of_opposite, 0.0))
    of_magnitude = figures(weights.abs())
    assert of_magnitude["recovery_auroc"] > 0.6
    # 6,000 true weights: a standard error of 0.004; what is left is the slope within a fiftieth
    # of |W|.
    assert of_magnitude["recovery_matched_auroc"] == approx(0.5, abs=0.02)
