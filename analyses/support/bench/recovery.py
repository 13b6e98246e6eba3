"""How well scores, and what the search ranks by, find a circuit that is known."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors.torch import load_file
from support.bench.methods import Calibrations, batches
from support.ground_truth import all_scores, ground_truth_rows

from harmcircuits.behaviours.behaviour import TARGET
from harmcircuits.behaviours.model import Model
from harmcircuits.circuits.masks import WeightMask
from harmcircuits.circuits.scores import WeightScores, mean_scores
from harmcircuits.hooks.attribution import removal_effect, token_price
from harmcircuits.hooks.weights import named_weights
from harmcircuits.measurements import Labels, Rows

SIZE = 0.004  # share of the weights up to which the search walks


def recovery(model: Model, data: Calibrations, labels: Labels) -> Rows:
    """AUROC and precision of every score against the planted circuit."""
    truth = true_circuit(model)
    target, others = batches(data)
    effect = removal_effect(model.bridge, target)
    prices = [token_price(model.bridge, spared) for spared in others]
    price = mean_scores(prices, [1.0] * len(prices))  # the mean of them
    scores = all_scores(model.bridge, target, effect)
    scores["less its price"] = less(effect, price.values, len(prices))
    scores["walk's sums"] = walked(model, data, effect)
    return ground_truth_rows(scores, truth, named_weights(model.bridge), labels)


def less(scores: WeightScores, price: Mapping, factor: float) -> WeightScores:
    """Scores less a factor times a price."""
    values = {name: value - factor * price[name] for name, value in scores.values.items()}
    return WeightScores(values, scores.source)


def walked(model: Model, data: Calibrations, like: WeightScores) -> WeightScores:
    """What the walk ranks weights by after its last step: benefit less factor times price."""
    with TemporaryDirectory() as kept:
        mask = model.find_circuit(TARGET, size=SIZE, calibrations=data, folder=kept)
        (last,) = Path(kept).glob("step-*")
        benefit = load_file(last / "sums" / "benefit.safetensors")
        price = load_file(last / "sums" / "price.safetensors")
    return less(WeightScores(benefit, like.source), price, mask.source.settings["factor"])


def true_circuit(model: Model) -> WeightMask:
    """The planted circuit."""
    if model.ground_truth is None:
        raise ValueError(f"{model.name} has no planted circuit; give a folder with one")
    return model.ground_truth
