"""Less tidy versions of a compiled organism, with the labels of their weights measured anew."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from support.removal import NEEDED, Texts, Weight, needed_by, needed_in_pairs, nonzero
from torch import Tensor

from harmcircuits.behaviours.model import Model
from harmcircuits.circuits.masks import WeightMask
from harmcircuits.circuits.scores import Source
from harmcircuits.hooks.weights import model_fingerprint, named_weights
from harmcircuits.organisms.compiled import BEHAVIOURS, PREFIX
from harmcircuits.organisms.shipped import open_organism

VERSIONS = ("as compiled", "noisy", "soft", "dense")
SOFTER = (0.1, 0.15, 0.2, 0.3, 0.5, 1.0)  # factors of the queries
CHUNK = 16  # noise weights that are added at once
WRITES = (".attn.o.weight", ".mlp.out.weight")  # to the residual stream, by columns


def version_of(organism: str, version: str, seed: int = 0) -> Model:
    """An organism that computes in a less tidy way; all its answers stay right."""
    model = open_organism(PREFIX + organism)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        if version == "soft":
            soften(model)
        if version == "noisy":
            add_noise(model, generator)
        if version == "dense":
            rotate(model, generator)
    return model


def soften(model: Model) -> None:
    """Multiply the queries by the smallest factor that leaves every answer right."""
    texts = Texts.of(model, every_string=True)
    weights = named_weights(model.bridge).items()
    queries = [weight for name, weight in weights if ".attn.q." in name]
    originals = [query.clone() for query in queries]
    for factor in SOFTER:
        for query, original in zip(queries, originals, strict=True):
            query.copy_(factor * original)
        if texts.are_right(model.bridge):
            return


def add_noise(model: Model, generator: torch.Generator) -> None:
    """Add as many weights as there are, of their sizes, at places of zero; no loss rises by them."""
    weights = {name: weight.view(-1) for name, weight in named_weights(model.bridge).items()}
    texts = Texts.of(model)
    bounds = texts.losses(model.bridge) + NEEDED
    real_weights = nonzero(model.bridge)
    sizes = torch.stack([weights[name][place].abs() for name, place in real_weights])
    zeros = shuffled_zeros(weights, generator)

    n_added = 0
    for start in range(0, len(zeros), CHUNK):
        chunk = zeros[start : start + CHUNK]
        numbers = torch.randint(len(sizes), (len(chunk),), generator=generator)
        signs = 2 * torch.randint(2, (len(chunk),), generator=generator) - 1
        for (name, place), value in zip(chunk, sizes[numbers] * signs, strict=True):
            weights[name][place] = value

        if (texts.losses(model.bridge) > bounds).any():
            for name, place in chunk:
                weights[name][place] = 0
            continue
        n_added += len(chunk)
        if n_added >= len(real_weights):
            return


def shuffled_zeros(weights: Mapping[str, Tensor], generator: torch.Generator) -> list[Weight]:
    """Every weight that is zero, in random order."""
    zeros = []
    for name, weight in weights.items():
        zeros += [(name, int(place)) for place in (weight == 0).nonzero()]
    order = torch.randperm(len(zeros), generator=generator).tolist()
    return [zeros[number] for number in order]


def rotate(model: Model, generator: torch.Generator) -> None:
    """Turn the residual stream into a random basis: the same function, by dense weights."""
    width = model.bridge.cfg.d_model
    basis, _ = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
    for name, weight in model.bridge.state_dict(keep_vars=True).items():
        if weight.ndim == 2:
            exact = weight.double()
            weight.copy_(basis @ exact if name.endswith(WRITES) else exact @ basis.T)


@dataclass(frozen=True)
class Truth:
    """The weights of a version that are not zero, and which behaviours need each."""

    weights: list[Weight]
    needed: Bool[Tensor, "weight behaviour"]
    n_alone: list[int]  # of the weights that each behaviour needs, those that are not one of a pair

    @property
    def is_alone(self) -> Bool[Tensor, " weight"]:
        """Whether harm needs a weight and nothing else does: it should be removed."""
        return self.needed[:, 0] & ~self.needed[:, 1:].any(dim=1)

    def chosen(self, where: Bool[Tensor, " weight"]) -> list[Weight]:
        """The weights at these places."""
        return [self.weights[number] for number in where.nonzero().flatten()]


def truth_of(model: Model, version: str) -> Truth:
    """The weights that each behaviour needs, measured by removal; of a dense version, by units."""
    weights = nonzero(model.bridge)
    if version == "dense":
        needed = needed_by_units(model, weights)
        return Truth(weights, needed, needed.sum(dim=0).tolist())
    texts = Texts.of(model)
    alone = needed_by(texts, model.bridge, weights)
    in_pairs = needed_in_pairs(texts, model.bridge, weights, alone)
    return Truth(weights, alone | in_pairs, alone.sum(dim=0).tolist())


def needed_by_units(model: Model, weights: Sequence[Weight]) -> Bool[Tensor, "weight behaviour"]:
    """Whether each behaviour needs the unit of each weight: a head's dimension, or a neuron.

    It needs a unit if, before the basis was turned, it needed a weight of this unit.
    """
    tidy = truth_of(open_organism(PREFIX + model.name), "as compiled")
    needed = defaultdict(lambda: torch.zeros(len(BEHAVIOURS), dtype=torch.bool))
    for unit, needed_weight in zip(units(model, tidy.weights), tidy.needed, strict=True):
        needed[unit] = needed[unit] | needed_weight
    return torch.stack([needed[unit] for unit in units(model, weights)])


def units(model: Model, weights: Sequence[Weight]) -> list[tuple[str, int]]:
    """The unit of each weight: a row that reads the residual stream, a column that writes to it."""
    widths = {name: weight.shape[1] for name, weight in named_weights(model.bridge).items()}
    unit_of_each = []
    for name, place in weights:
        row, column = divmod(place, widths[name])
        unit_of_each.append((name, column if name.endswith(WRITES) else row))
    return unit_of_each


def mask_of(model: Model, weights: Sequence[Weight]) -> WeightMask:
    """A mask of these weights."""
    places = defaultdict(list)
    for name, place in sorted(weights):
        places[name].append(place)
    removed = {name: torch.tensor(values) for name, values in places.items()}
    shapes = {name: tuple(weight.shape) for name, weight in named_weights(model.bridge).items()}
    source = Source(model_fingerprint(model.bridge), "by measured effect")
    return WeightMask(removed, shapes, source)
