"""Where a mask's weights sit: by layer, matrix, head and neuron, and how concentrated they are."""

from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from harmcircuits.circuits.masks import WeightMask
from harmcircuits.circuits.sites import Site

By = Literal["layer", "matrix", "head", "neuron"]


class Place(NamedTuple):
    """A part of the model.

    `part`: empty for a whole layer; the kind of a matrix; `"head"` (query heads: q and o), `"kv_head"` (key-value heads:
    k and v), `"neuron"` (gate, in and out of one hidden unit) or `"expert"` (router and expert), counted by `number`.
    """

    layer: int
    part: str = ""
    number: int = 0


class Count(NamedTuple):
    """How many weights of a place are removed, of how many."""

    n_removed: int
    n_weights: int


def counts_by(mask: WeightMask, sites: Mapping[str, Site], by: By) -> dict[Place, Count]:
    """Removed weights of every layer, matrix, head or neuron (expert, in a mixture), zeros included.

    `sites`: `weight_sites` of the mask's model. Heads hold attention weights only, neurons MLP weights only. Raises
    ValueError for another `by`, and for sites that lack a matrix of the mask.
    """
    found: dict[Place, Count] = {}
    for place, n_removed, n_weights in pieces(mask, sites, by):
        before = found.get(place, Count(0, 0))
        found[place] = Count(before.n_removed + n_removed, before.n_weights + n_weights)
    return found


def pieces(mask: WeightMask, sites: Mapping[str, Site], by: By) -> Iterator[tuple[Place, int, int]]:
    """(place, removed, weights) of every part of a matrix that lies in one place; a place can have several such parts.

    Raises ValueError as `counts_by`.
    """
    if by not in ("layer", "matrix", "head", "neuron"):
        raise ValueError(f'by={by!r}; expected "layer", "matrix", "head" or "neuron"')
    missing = sorted(set(mask.shapes) - set(sites))
    if missing:
        raise ValueError(f"sites lack {missing[0]}; give weight_sites(bridge) of the mask's model")
    for name in mask.shapes:
        site, index = sites[name], mask.removed.get(name, torch.empty(0, dtype=torch.int64))
        size = site.parameter.numel()
        if by in ("layer", "matrix"):
            yield Place(site.layer, site.kind if by == "matrix" else ""), index.numel(), size
        elif (by == "head") == site.kind.startswith("attn"):
            part = "head" if site.kind in ("attn.q", "attn.o") else "kv_head"
            if by == "neuron":
                part = "neuron" if site.kind in ("mlp.gate", "mlp.in", "mlp.out") else "expert"
            for unit, n_removed in enumerate(site.units(index).bincount(minlength=site.n_units).tolist()):
                yield Place(site.layer, part, unit), n_removed, size // site.n_units


class Concentration(NamedTuple):
    """How unequally a mask falls on heads or neurons.

    `gini`: 0 when every unit loses the same share of its weights, near 1 when one loses all. `top_share`: the share of the
    mask's weights (of this sort) in the twentieth of units that loses most. `n_removed`: how many there are.
    """

    gini: float
    top_share: float
    n_removed: int


def concentration(mask: WeightMask, sites: Mapping[str, Site], by: Literal["head", "neuron"]) -> Concentration:
    """Gini coefficient and top share of the mask over heads or neurons. Compare with masks from `random_like`.

    A sparse mask is unequal by chance alone, so neither figure means anything without that comparison. Raises ValueError
    as `counts_by`, and for a mask that removes nothing there.
    """
    found = list(counts_by(mask, sites, by).values())
    n_removed = sum(count.n_removed for count in found)
    if not n_removed:
        raise ValueError(f"concentration: the mask removes no weight of any {by}")
    removed = np.sort([count.n_removed for count in found])
    n_top = max(1, round(len(found) / 20))
    return Concentration(
        gini(torch.tensor([count.n_removed / count.n_weights for count in found])),
        float(removed[-n_top:].sum() / n_removed),
        n_removed,
    )


def gini(values: Float[Tensor, " n"] | Int[Tensor, " n"]) -> float:
    """Gini coefficient of non-negative values: sum_ij |x_i - x_j| / (2 n sum_i x_i). Raises ValueError for no mass."""
    if not len(values) or values.min() < 0 or values.sum() == 0:
        raise ValueError("gini: expected non-negative values that are not all zero")
    x, n = values.double().sort().values, len(values)
    rank = torch.arange(1, n + 1, dtype=torch.float64)
    return float(2 * (rank * x).sum() / (n * x.sum()) - (n + 1) / n)
