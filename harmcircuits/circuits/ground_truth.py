"""How well scores find a circuit that is known: the planted organism's bench."""

from collections.abc import Mapping, Sequence
from functools import reduce
from operator import or_

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from harmcircuits.circuits.masks import WeightMask
from harmcircuits.circuits.scores import WeightScores
from harmcircuits.hooks.attribution import activation_norm, magnitude_scores, random_scores, sensitivity
from harmcircuits.hooks.losses import Labels, auroc, exact
from harmcircuits.hooks.objectives import completion_loss
from harmcircuits.measurements import Measurement
from harmcircuits.prompts import Batch

FEW = 1000  # only the part of a circuit that the behaviour uses can be found, so precision is read at a few weights too
BINS = 50


def recovery(
    scores: Mapping[str, WeightScores], truth: WeightMask, weights: Mapping[str, Tensor], labels: Labels
) -> list[Measurement]:
    """Rows for each named scores against the true circuit S.

    All matrices ranked together: `recovery_auroc` (chance that a weight of S outscores one outside, 0.5 for chance),
    `recovery_precision` and `recovery_precision_few` (share of S among the top |S| and the top 1,000; |S| / n for chance).
    `recovery_matched_auroc` compares only weights of the same matrix and the same fiftieth of its |W|, averaged by the
    number of S among them: magnitude alone knows nothing there. Raises KeyError when scores or weights lack a matrix of S.
    """
    names = list(truth.shapes)
    is_true = torch.cat([truth.dense(name).flatten() for name in names])
    rows = []
    for method, found in scores.items():
        flat = {name: found.values[name].flatten().cpu() for name in names}
        together = torch.cat(list(flat.values()))
        order = together.argsort(descending=True, stable=True)
        figures = {
            "recovery_auroc": auroc(together, is_true),
            "recovery_matched_auroc": _matched_auroc(flat, truth, weights),
            "recovery_precision": is_true[order[: truth.n_removed]].float().mean().item(),
            "recovery_precision_few": is_true[order[:FEW]].float().mean().item(),
        }
        where = {**labels, "method": method, "n_true": truth.n_removed}
        rows += [exact(metric, where, value) for metric, value in figures.items()]
    return rows


def every_score(
    bridge: TransformerBridge,
    target: Sequence[Batch],
    harm: WeightScores,
    protected: Sequence[WeightMask],
    *,
    seed: int = 0,
) -> dict[str, WeightScores]:
    """Every way to score the target's weights, by name, for `recovery`.

    `harm` is its `removal_effect`; "unprotected" ranks last what any mask of `protected` holds, as a circuit is chosen.
    """
    scores = {"removal effect": harm}
    if protected:
        together = reduce(or_, protected)
        lowest = min(value.min().item() for value in harm.values.values())
        last = {name: value.masked_fill(together.dense(name), lowest) for name, value in harm.values.items()}
        scores["removal effect, unprotected"] = WeightScores(last, harm.source)
    return scores | {
        "sensitivity, after abs": sensitivity(bridge, target, completion_loss),
        "sensitivity, before abs": sensitivity(bridge, target, completion_loss, average="before_abs"),
        "activation norm": activation_norm(bridge, target),
        "magnitude": magnitude_scores(bridge),
        "random": random_scores(bridge, seed=seed),
    }


def _matched_auroc(
    scores: Mapping[str, Float[Tensor, " n"]], truth: WeightMask, weights: Mapping[str, Float[Tensor, "..."]]
) -> float:
    total, n_compared = 0.0, 0
    for name, values in scores.items():
        is_true: Bool[Tensor, " n"] = truth.dense(name).flatten()
        by_magnitude = weights[name].detach().abs().flatten().cpu().argsort()
        for members in by_magnitude.chunk(BINS):
            n_true = int(is_true[members].sum())
            if 0 < n_true < len(members):
                total += n_true * auroc(values[members], is_true[members])
                n_compared += n_true
    return total / n_compared
