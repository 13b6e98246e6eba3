"""Where a mask's weights sit: by layer, matrix, head and neuron, and how concentrated they are."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from harmcircuits.circuits.masks import WeightMask, random_like
from harmcircuits.circuits.sites import Site
from harmcircuits.measurements import Labels, Measurement, Rows

By = Literal["layer", "matrix", "head", "neuron"]

NONE = torch.empty(0, dtype=torch.int64)
N_NULL = 20  # random masks behind an interval of chance


class Place(NamedTuple):
    """A part of the model."""

    # Fewer fields for a larger place: Place(3), Place(3, "attn.q"), Place(3, "head", 1).
    layer: int
    part: str = ""
    number: int = 0


class Count(NamedTuple):
    """How many weights of a place are removed, of how many."""

    n_removed: int
    n_weights: int


Piece = tuple[Place, int, int]  # place, removed weights, weights


def counts_by(
    mask: WeightMask,
    sites: Mapping[str, Site],
    by: By,
) -> dict[Place, Count]:
    """Removed weights of every layer, matrix, head or neuron, zeros included."""
    counts: dict[Place, Count] = {}
    for place, n_removed, n_weights in pieces(mask, sites, by):
        before = counts.get(place, Count(0, 0))
        counts[place] = Count(before.n_removed + n_removed, before.n_weights + n_weights)
    return counts


def pieces(
    mask: WeightMask,
    sites: Mapping[str, Site],
    by: By,
) -> Iterator[Piece]:
    """(place, removed, weights) of every part of a matrix that lies in one place."""
    if by not in get_args(By):
        raise ValueError(f"by={by!r}; expected one of {', '.join(get_args(By))}")
    for name, n_removed in mask.counts.items():
        site = sites[name]
        n_weights = site.parameter.numel()
        is_attention = site.kind.startswith("attn")
        if by == "layer":
            yield Place(site.layer), n_removed, n_weights
        elif by == "matrix":
            yield Place(site.layer, site.kind), n_removed, n_weights
        elif by == ("head" if is_attention else "neuron"):
            units = site.units(mask.removed.get(name, NONE))
            for number, n_of_unit in enumerate(units.bincount(minlength=site.n_units).tolist()):
                place = Place(site.layer, site.unit, number)
                yield place, n_of_unit, n_weights // site.n_units


def most_removed(
    mask: WeightMask,
    sites: Mapping[str, Site],
    by: Literal["head", "neuron"],
    n: int,
) -> list[tuple[int, int]]:
    """(layer, number) of the heads or neurons that lose most weights, the most first."""
    removed = {place: count.n_removed for place, count in counts_by(mask, sites, by).items()}
    n_units = Counter((place.layer, place.part) for place in removed)
    lost: dict[tuple[int, int], int] = {}
    for place, n_removed in removed.items():
        if place.part != by:
            continue
        if by == "head":
            # Of 4 heads and 2 key-value heads, heads 0 and 1 read key-value head 0.
            n_heads, n_kv_heads = n_units[place.layer, "head"], n_units[place.layer, "kv_head"]
            read = Place(place.layer, "kv_head", place.number * n_kv_heads // n_heads)
            n_removed += removed.get(read, 0)
        if n_removed:
            lost[place.layer, place.number] = n_removed
    return sorted(lost, key=lambda unit: -lost[unit])[:n]


class Concentration(NamedTuple):
    """How unequally a mask falls on heads or neurons."""

    gini: float
    top_share: float
    n_removed: int


def concentration(
    mask: WeightMask,
    sites: Mapping[str, Site],
    by: Literal["head", "neuron"],
) -> Concentration:
    """Gini coefficient and top share of the mask over heads or neurons.

    A sparse mask is unequal by chance alone, so neither figure means anything without those of
    masks from `random_like`. Of a mask that removes nothing there, both are NaN.

    >>> mask = hc.top_fraction(hc.removal_effect(bridge, harm), 0.01, within="model")
    >>> hc.concentration(mask, hc.weight_sites(bridge), "neuron")
    Concentration(gini=0..., top_share=0..., n_removed=...)

    Args:
        mask: as in `counts_by`.
        sites: as in `counts_by`.
        by: "head" or "neuron".
    """
    counts = list(counts_by(mask, sites, by).values())
    removed = np.sort([count.n_removed for count in counts])
    n_removed = int(removed.sum())
    shares = torch.tensor([count.n_removed / count.n_weights for count in counts])
    n_top = max(1, round(len(counts) / 20))
    n_in_top = removed[-n_top:].sum()
    return Concentration(
        gini=gini(shares),
        top_share=float(n_in_top / n_removed),
        n_removed=n_removed,
    )


def gini(values: Float[Tensor, " n"] | Int[Tensor, " n"]) -> float:
    """Gini coefficient of non-negative values: sum_ij |x_i - x_j| / (2 n sum_i x_i)."""
    # With the values sorted, sum_ij |x_i - x_j| = 2 sum_i (2 i - n - 1) x_i: x_i is the larger one
    # of i - 1 pairs and the smaller one of n - i. Divided by 2 n sum_i x_i this gives
    # 2 sum_i i x_i / (n sum_i x_i) - (n + 1) / n.
    n = len(values)
    x, _ = values.double().sort()
    rank = torch.arange(1, n + 1, dtype=torch.float64)
    weighted = 2 * (rank * x).sum() / (n * x.sum())
    return float(weighted - (n + 1) / n)


def location_rows(mask: WeightMask, sites: Mapping[str, Site], labels: Labels) -> Rows:
    """Where a mask's weights sit, as rows."""
    rows = Rows()
    for by in ("matrix", "head"):
        for place, count in counts_by(mask, sites, by).items():
            where = {
                **labels,
                "by": by,
                "layer": place.layer,
                "kind": place.part,
                "index": place.number,
                "of": count.n_weights,
            }
            rows += [Measurement.exact("weights_removed", where, count.n_removed)]

    random = [random_like(mask, seed=seed) for seed in range(N_NULL)]
    for by in ("head", "neuron"):
        counts = counts_by(mask, sites, by).values()
        if any(count.n_removed for count in counts):
            rows += _concentration_rows(mask, random, sites, by, labels)
    return rows


def component_rows(
    mask: WeightMask,
    sites: Mapping[str, Site],
    labels: Labels | None = None,
    *,
    n_units: int = 8,
) -> Rows:
    """How many weights each matrix loses, and those of its heads or neurons that lose most."""
    rows = Rows()
    for place, count in counts_by(mask, sites, "matrix").items():
        where = {**(labels or {}), "layer": place.layer, "kind": place.part}
        of_matrix = {**where, "by": "matrix", "of": count.n_weights}
        rows += [Measurement.exact("weights_removed", of_matrix, count.n_removed)]
    for name, index in mask.removed.items():
        site = sites[name]
        where = {**(labels or {}), "layer": site.layer, "kind": site.kind, "unit": site.unit}
        removed = site.units(index).bincount(minlength=site.n_units)
        order = removed.argsort(descending=True, stable=True)[:n_units]
        of = site.parameter.numel() // site.n_units
        for number in order[removed[order] > 0].tolist():
            of_unit = {**where, "by": "unit", "index": number, "of": of}
            rows += [Measurement.exact("weights_removed", of_unit, int(removed[number]))]
    return rows


def _concentration_rows(
    mask: WeightMask,
    random: Sequence[WeightMask],
    sites: Mapping[str, Site],
    by: Literal["head", "neuron"],
    labels: Labels,
) -> Rows:
    actual = concentration(mask, sites, by)
    chance = [concentration(other, sites, by) for other in random]
    rows = Rows()
    for metric in ("gini", "top_share"):
        value = getattr(actual, metric)
        where = {**labels, "by": by, "chance": "no"}
        rows += [Measurement.exact(metric, where, value)]

        values = [getattr(other, metric) for other in chance]
        where = {**labels, "by": by, "chance": "yes"}
        rows += [Measurement.of_draws(metric, where, values)]
    return rows
