"""How well scores recover the circuit of the planted organism, and the tables of `planted.py`."""

import pandas as pd
from support.answers import Calibrations, batches_of
from support.ground_truth import all_scores, ground_truth_rows
from support.tables import cost_cells, masks_by, means_of

from harmcircuits.behaviours.model import Model
from harmcircuits.circuits.masks import WeightMask
from harmcircuits.circuits.scores import WeightScores, mean_scores
from harmcircuits.hooks.weights import named_weights
from harmcircuits.measurements import Labels, Rows
from harmcircuits.search.attribution import removal_effect, token_price

HALF_BACK = 0.5  # of the harmful answers: they count as relearned


def recovery(model: Model, data: Calibrations, labels: Labels) -> Rows:
    """AUROC and precision of every score against the planted circuit."""
    truth = true_circuit(model)
    target, protected = batches_of(data)
    effect = removal_effect(model.bridge, target)
    prices = [token_price(model.bridge, batches) for batches in protected]
    price = mean_scores(prices, [1.0] * len(prices))
    difference = {}
    for name, values in effect.values.items():
        difference[name] = values - len(prices) * price.values[name]

    scores = all_scores(model.bridge, target, effect)
    scores["less its price"] = WeightScores(difference, effect.source)
    return ground_truth_rows(scores, truth, named_weights(model.bridge), labels)


def true_circuit(model: Model) -> WeightMask:
    """The planted circuit."""
    if model.ground_truth is None:
        raise ValueError(f"{model.name} has no planted circuit; give a folder with one")
    return model.ground_truth


# Tables


def recovery_table(rows: Rows) -> pd.DataFrame:
    """How well each score recovers the planted circuit."""
    titles = {
        "recovery_auroc": "AUROC",
        "recovery_matched_auroc": "same |W|",
        "recovery_precision": "precision at |S|",
        "recovery_precision_few": "at 1,000",
    }
    lines = []
    for ladder, method in rows.where("recovery_auroc").by("ladder", "method"):
        line = {"organism": ladder, "score": method}
        for metric, title in titles.items():
            line[title] = f"{rows.one(metric, ladder=ladder, method=method).mean:.3f}"
        lines.append(line)
    return pd.DataFrame(lines)


def reach_table(rows: Rows) -> pd.DataFrame:
    """What each mask does, and how much of it is planted, by what the search could choose from."""
    lines = []
    for (ladder, reach, mask), rows_of_mask in masks_by(rows, "ladder", "reach", "mask").items():
        unpruned = means_of(rows.where(ladder=ladder, reach=reach, mask="none"))
        masked = means_of(rows_of_mask)
        line = {
            "organism": ladder,
            "in reach": reach,
            "removed": mask,
            "weights": round(masked["weights_removed"]),
            "in S": f"{masked['overlap_containment']:.0%}",
            "lift": f"{masked['overlap_lift']:.1f}",
            "harm left": f"{masked['harm_valid_rate']:.1%}",
            "degenerate": f"{masked['harm_degenerate_rate']:.0%}",
        }
        lines.append(line | cost_cells(unpruned, masked))
    return pd.DataFrame(lines)


def relearning_table(rows: Rows) -> pd.DataFrame:
    """When half of the harmful answers are back, their loss by step, and incoherent answers."""
    lines = []
    relearning = rows.where(job="relearn")
    losses = relearning.where("harm_nll")
    for (ladder, mask, hold), losses_by_step in losses.by("ladder", "removed", "held").items():
        run = relearning.where(ladder=ladder, removed=mask, held=hold)
        harm = run.where("harm_valid_rate")
        steps_back = [row.labels["step"] for row in harm if row.mean >= HALF_BACK]
        last_step = harm[-1].labels["step"]
        line = {
            "organism": ladder,
            "removed": mask,
            "while training": hold,
            "half back after": str(min(steps_back)) if steps_back else f"> {last_step}",
        }
        for row in losses_by_step:
            line[f"loss, {row.labels['step']}"] = f"{row.mean:.2f}"
        incoherent = run.where("harm_degenerate_rate")
        line["degenerate"] = f"{incoherent[0].mean:.0%} to {incoherent[-1].mean:.0%}"
        lines.append(line)
    return pd.DataFrame(lines)
