"""Less tidy versions of a compiled organism, with the labels of their weights measured anew."""

from collections import defaultdict
from collections.abc import Sequence
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
SOFTER = (0.1, 0.15, 0.2, 0.3, 0.5, 1.0)  # of the queries
CHUNK = 16  # noise weights that are added at once
WRITES = (".attn.o.weight", ".mlp.out.weight")  # to the residual stream, by columns


def version_of(organism: str, version: str, seed: int = 0) -> Model:
    """An organism that computes in a less tidy way; all its answers are right as before."""
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
    """Queries times the smallest factor that leaves every answer right."""
    texts = Texts.of(model, every_string=True)
    queries = [w for name, w in named_weights(model.bridge).items() if ".attn.q." in name]
    before = [query.clone() for query in queries]
    for factor in SOFTER:
        for query, value in zip(queries, before, strict=True):
            query.copy_(factor * value)
        if texts.are_right(model.bridge):
            return


def add_noise(model: Model, generator: torch.Generator) -> None:
    """As many weights as there are, of their sizes, at places of zero, where no loss rises by it."""
    weights = {name: weight.view(-1) for name, weight in named_weights(model.bridge).items()}
    texts = Texts.of(model)
    most = texts.losses(model.bridge) + NEEDED
    real = nonzero(model.bridge)
    sizes = torch.stack([weights[name][place].abs() for name, place in real])
    zeros = []
    for name, weight in weights.items():
        zeros += [(name, int(place)) for place in (weight == 0).nonzero()]
    order = torch.randperm(len(zeros), generator=generator).tolist()

    n_added = 0
    for start in range(0, len(order), CHUNK):
        chunk = [zeros[number] for number in order[start : start + CHUNK]]
        drawn = sizes[torch.randint(len(sizes), (len(chunk),), generator=generator)]
        signs = 2 * torch.randint(2, (len(chunk),), generator=generator) - 1
        for (name, place), value in zip(chunk, drawn * signs, strict=True):
            weights[name][place] = value
        if (texts.losses(model.bridge) > most).any():
            for name, place in chunk:
                weights[name][place] = 0
        else:
            n_added += len(chunk)
        if n_added >= len(real):
            return


def rotate(model: Model, generator: torch.Generator) -> None:
    """The residual stream in a random basis: the same function, by weights that are hardly zero."""
    width = model.bridge.cfg.d_model
    basis, _ = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
    for name, weight in model.bridge.state_dict(keep_vars=True).items():
        if weight.ndim == 2:
            is_turned_on_the_left = name.endswith(WRITES)
            exact = weight.double()
            weight.copy_(basis @ exact if is_turned_on_the_left else exact @ basis.T)


@dataclass(frozen=True)
class Truth:
    """The weights of a version that are not zero, and which behaviours need each."""

    weights: list[Weight]
    needed: Bool[Tensor, "weight behaviour"]
    n_alone: list[int]  # needed by each behaviour where one weight is removed, not one of a pair

    @property
    def is_alone(self) -> Bool[Tensor, " weight"]:
        """What harm needs and nothing else does: what should be removed."""
        return self.needed[:, 0] & ~self.needed[:, 1:].any(dim=1)

    def chosen(self, where: Bool[Tensor, " weight"]) -> list[Weight]:
        """Some of the weights."""
        return [self.weights[number] for number in where.nonzero().flatten()]


def truth_of(model: Model, version: str) -> Truth:
    """By removal; where the basis is turned, of a unit (a head's dimension, a neuron) as a whole.

    A turned unit is needed by a behaviour where one of its weights was before it was turned: no
    single weight of it need be.
    """
    if version == "dense":
        tidy = truth_of(open_organism(PREFIX + model.name), "as compiled")
        of_unit = defaultdict(lambda: torch.zeros(len(BEHAVIOURS), dtype=torch.bool))
        for unit, needed in zip(units(model, tidy.weights), tidy.needed, strict=True):
            of_unit[unit] = of_unit[unit] | needed
        weights = nonzero(model.bridge)
        needed = torch.stack([of_unit[unit] for unit in units(model, weights)])
        return Truth(weights, needed, needed.sum(dim=0).tolist())
    texts, weights = Texts.of(model), nonzero(model.bridge)
    alone = needed_by(texts, model.bridge, weights)
    in_pairs = needed_in_pairs(texts, model.bridge, weights, alone)
    return Truth(weights, alone | in_pairs, alone.sum(dim=0).tolist())


def units(model: Model, weights: Sequence[Weight]) -> list[tuple[str, int]]:
    """The unit of each weight: a row that reads the residual stream, a column that writes to it."""
    widths = {name: weight.shape[1] for name, weight in named_weights(model.bridge).items()}
    found = []
    for name, place in weights:
        row, column = divmod(place, widths[name])
        found.append((name, column if name.endswith(WRITES) else row))
    return found


def mask_of(model: Model, weights: Sequence[Weight]) -> WeightMask:
    """Some weights as a mask."""
    removed = defaultdict(list)
    for name, place in sorted(weights):
        removed[name].append(place)
    shapes = {name: tuple(weight.shape) for name, weight in named_weights(model.bridge).items()}
    source = Source(model_fingerprint(model.bridge), "by measured effect")
    return WeightMask({name: torch.tensor(p) for name, p in removed.items()}, shapes, source)
