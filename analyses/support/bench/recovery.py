"""How well scores recover the circuit of the planted organism."""

from support.bench.cases import Calibrations, batches_of
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
    target, others = batches_of(data)
    effect = removal_effect(model.bridge, target)
    prices = [token_price(model.bridge, batches) for batches in others]
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
