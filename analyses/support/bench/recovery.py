"""How well scores find a circuit that is known."""

from collections.abc import Mapping

from support.bench.methods import Calibrations, batches
from support.ground_truth import all_scores, ground_truth_rows

from harmcircuits.behaviours.model import Model
from harmcircuits.circuits.masks import WeightMask
from harmcircuits.circuits.scores import WeightScores, mean_scores
from harmcircuits.hooks.weights import named_weights
from harmcircuits.measurements import Labels, Rows
from harmcircuits.search.attribution import removal_effect, token_price


def recovery(model: Model, data: Calibrations, labels: Labels) -> Rows:
    """AUROC and precision of every score against the planted circuit."""
    truth = true_circuit(model)
    target, others = batches(data)
    effect = removal_effect(model.bridge, target)
    prices = [token_price(model.bridge, spared) for spared in others]
    price = mean_scores(prices, [1.0] * len(prices))  # the mean of them
    scores = all_scores(model.bridge, target, effect)
    scores["less its price"] = less(effect, price.values, len(prices))
    return ground_truth_rows(scores, truth, named_weights(model.bridge), labels)


def less(scores: WeightScores, price: Mapping, factor: float) -> WeightScores:
    """Scores less a factor times a price."""
    values = {name: value - factor * price[name] for name, value in scores.values.items()}
    return WeightScores(values, scores.source)


def true_circuit(model: Model) -> WeightMask:
    """The planted circuit."""
    if model.ground_truth is None:
        raise ValueError(f"{model.name} has no planted circuit; give a folder with one")
    return model.ground_truth
