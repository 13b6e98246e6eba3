"""How well scores find a circuit that is known, such as that of the planted organism."""

from collections.abc import Mapping, Sequence
from functools import reduce
from operator import or_

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

# Scores can find only the part of a circuit that the behaviour uses. So precision is taken among
# few weights too, not only among as many as the circuit has.
FEW = 1000
N_BINS = 50  # of |W|, within which weights are compared


def ground_truth_rows(
    scores: Mapping[str, WeightScores],
    truth: WeightMask,
    weights: Mapping[str, Tensor],
    labels: Labels,
) -> Rows:
    """Rows for each named scores against the true circuit S."""
    # All matrices in a row: [weights of the model], True in S.
    names = list(truth.shapes)
    is_true = torch.cat([truth.dense(name).flatten() for name in names])
    rows = Rows()
    for method, of_method in scores.items():
        flat = {name: of_method.values[name].flatten().cpu() for name in names}
        together = torch.cat(list(flat.values()))
        ranking = together.argsort(descending=True, stable=True)
        is_true_ranked = is_true[ranking]
        figures = {
            "recovery_auroc": auroc(together, is_true),
            "recovery_matched_auroc": _matched_auroc(flat, truth, weights),
            "recovery_precision": _share(is_true_ranked[: truth.n_removed]),
            "recovery_precision_few": _share(is_true_ranked[:FEW]),
        }
        where = {**labels, "method": method, "n_true": truth.n_removed}
        for metric, value in figures.items():
            rows += [Measurement.exact(metric, where, value)]
    return rows


def all_scores(
    bridge: Bridge,
    batches: Sequence[Batch],
    removal: WeightScores,
    protected: Sequence[WeightMask] = (),
    *,
    seed: int = 0,
) -> dict[str, WeightScores]:
    """Every way to score a behaviour's weights, by name: what `ground_truth_rows` compares."""
    scores = {"removal effect": removal}
    if protected:
        union = reduce(or_, protected)
        lowest = min(value.min().item() for value in removal.values.values())
        last = {}
        for name, value in removal.values.items():
            last[name] = value.masked_fill(union.dense(name).to(value.device), lowest)
        scores["removal effect, unprotected"] = WeightScores(last, removal.source)
    return scores | {
        "SNIP, after abs": snip_scores(bridge, batches),
        "SNIP, before abs": snip_scores(bridge, batches, average="before_abs"),
        "Wanda": wanda_scores(bridge, batches),
        "magnitude": magnitude_scores(bridge),
        "random": random_scores(bridge, seed=seed),
    }


def _share(is_true: Bool[Tensor, " _"]) -> float:
    return is_true.float().mean().item()


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
        # Cut into fifty pieces of about equal number, from the smallest |W| to the largest.
        for members in magnitude.argsort().chunk(N_BINS):
            n_true = int(is_true[members].sum())
            if 0 < n_true < len(members):  # else there is no pair to compare
                total += n_true * auroc(values[members], is_true[members])
                n_compared += n_true
    return total / n_compared
