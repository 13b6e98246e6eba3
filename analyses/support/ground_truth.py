"""How well scores find a circuit that is known, such as that of the planted organism."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from harmcircuits.batches import Batch
from harmcircuits.circuits.masks import WeightMask
from harmcircuits.circuits.scores import WeightScores
from harmcircuits.hooks.bridge import Bridge
from harmcircuits.measurements import Labels, Measurement, Rows, auroc
from harmcircuits.search.attribution import (
    magnitude_scores,
    random_scores,
    snip_scores,
    wanda_scores,
)

# Scores can find only the part of a circuit that the behaviour uses. So precision is also taken among
# the weights of this many highest scores, beside as many as the circuit has.
N_TOP = 1000
N_BINS = 50  # of |W|, within which weights are compared


def ground_truth_rows(
    scores: Mapping[str, WeightScores],
    truth: WeightMask,
    weights: Mapping[str, Tensor],
    labels: Labels,
) -> Rows:
    """AUROC and precision of each of the scores against the true circuit S."""
    # All matrices in one vector: [weights of the model], True in S.
    names = list(truth.shapes)
    is_true = torch.cat([truth.dense(name).flatten() for name in names])
    rows = Rows()
    for method, weight_scores in scores.items():
        flat = {name: weight_scores.values[name].flatten().cpu() for name in names}
        values = torch.cat(list(flat.values()))
        order = values.argsort(descending=True, stable=True)
        is_true_in_order = is_true[order].float()
        figures = {
            "recovery_auroc": auroc(values, is_true),
            "recovery_matched_auroc": _matched_auroc(flat, truth, weights),
            "recovery_precision": is_true_in_order[: truth.n_removed].mean().item(),
            "recovery_precision_few": is_true_in_order[:N_TOP].mean().item(),
        }
        where = {**labels, "method": method, "n_true": truth.n_removed}
        for metric, value in figures.items():
            rows += [Measurement.exact(metric, where, value)]
    return rows


def all_scores(
    bridge: Bridge, batches: Sequence[Batch], removal: WeightScores
) -> dict[str, WeightScores]:
    """Every score of a behaviour's weights, by name: the methods of `ground_truth_rows`."""
    return {
        "removal effect": removal,
        "SNIP, after abs": snip_scores(bridge, batches),
        "SNIP, before abs": snip_scores(bridge, batches, average="before_abs"),
        "Wanda": wanda_scores(bridge, batches),
        "magnitude": magnitude_scores(bridge),
        "random": random_scores(bridge),
    }


def _matched_auroc(
    scores: Mapping[str, Float[Tensor, " _"]],
    truth: WeightMask,
    weights: Mapping[str, Float[Tensor, "..."]],
) -> float:
    """AUROC among weights of one matrix and about one |W|, averaged by the true ones among them."""
    total = 0.0
    n_compared = 0
    for name, values in scores.items():
        is_true: Bool[Tensor, " _"] = truth.dense(name).flatten()
        magnitude = weights[name].detach().abs().flatten().cpu()
        # From the smallest |W| to the largest, in fifty groups of about equal number.
        for members in magnitude.argsort().chunk(N_BINS):
            n_true = int(is_true[members].sum())
            if 0 < n_true < len(members):  # without both kinds there is no pair to compare
                total += n_true * auroc(values[members], is_true[members])
                n_compared += n_true
    return total / n_compared
