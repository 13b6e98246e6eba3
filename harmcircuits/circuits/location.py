"""The location of a mask's weights: by layer, matrix, head and neuron, and how concentrated."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from harmcircuits.circuits.masks import NO_WEIGHTS, WeightMask, random_like
from harmcircuits.circuits.sites import Site
from harmcircuits.measurements import Label, Labels, Measurement, Rows

By = Literal["layer", "matrix", "head", "neuron"]
Unit = Literal["head", "neuron"]

# Attention matrices are counted by head, all others by neuron.
UNITS = {"head": ("head", "kv_head"), "neuron": ("neuron", "expert")}
N_RANDOM = 20  # random masks for the interval of a figure by chance


class Place(NamedTuple):
    """A part of the model."""

    # A larger place has fewer fields: Place(3), Place(3, "attn.q"), Place(3, "head", 1).
    layer: int
    part: str = ""
    number: int = 0


class Count(NamedTuple):
    """The number of removed weights in a place, and the number of its weights."""

    n_removed: int
    n_weights: int


def counts_by(
    mask: WeightMask,
    sites: Mapping[str, Site],
    by: By,
) -> dict[Place, Count]:
    """The removed weights of every layer, matrix, head or neuron, zeros included."""
    counts: dict[Place, Count] = {}
    for place, count in matrix_counts(mask, sites, by):
        n_removed, n_weights = counts.get(place, (0, 0))
        counts[place] = Count(n_removed + count.n_removed, n_weights + count.n_weights)
    return counts


def matrix_counts(
    mask: WeightMask,
    sites: Mapping[str, Site],
    by: By,
) -> Iterator[tuple[Place, Count]]:
    """The removed weights of every part of a matrix that lies in one place, matrix by matrix."""
    if by not in get_args(By):
        raise ValueError(f"by={by!r}; expected one of {', '.join(get_args(By))}")
    for name, n_removed in mask.counts.items():
        site = sites[name]
        n_weights = site.parameter.numel()
        count = Count(n_removed, n_weights)
        if by == "layer":
            yield Place(site.layer), count
        elif by == "matrix":
            yield Place(site.layer, site.kind), count
        elif site.unit in UNITS[by]:
            for number, n in enumerate(_unit_counts(mask, site).tolist()):
                place = Place(site.layer, site.unit, number)
                yield place, Count(n, n_weights // site.n_units)


def _unit_counts(mask: WeightMask, site: Site) -> Int[Tensor, " unit"]:
    """The number of removed weights in each head, neuron or expert of a matrix."""
    index = mask.removed.get(site.name, NO_WEIGHTS)
    return site.units(index).bincount(minlength=site.n_units)


def most_removed(
    mask: WeightMask,
    sites: Mapping[str, Site],
    by: Unit,
    n: int,
) -> list[tuple[int, int]]:
    """(layer, number) of the n heads or neurons that lose most weights, in falling order."""
    counts = counts_by(mask, sites, by)
    n_units = Counter((place.layer, place.part) for place in counts)
    totals = Counter[tuple[int, int]]()
    for (layer, part, number), count in counts.items():
        if part != by:
            continue
        totals[layer, number] = count.n_removed
        if (layer, "kv_head") in n_units:
            # Of 4 heads and 2 key-value heads, heads 0 and 1 read key-value head 0.
            n_heads = n_units[layer, "head"]
            n_kv_heads = n_units[layer, "kv_head"]
            kv_head = Place(layer, "kv_head", number * n_kv_heads // n_heads)
            totals[layer, number] += counts[kv_head].n_removed

    return [unit for unit, total in totals.most_common(n) if total]


class Concentration(NamedTuple):
    """How unequally a mask is distributed over heads or neurons."""

    gini: float
    top_share: float
    n_removed: int


def concentration(
    mask: WeightMask,
    sites: Mapping[str, Site],
    by: Unit,
) -> Concentration:
    """Gini coefficient and top share of the mask over heads or neurons.

    The Gini coefficient is that of each unit's share of removed weights; the top share is the
    share of the removed weights that lies in the 5 % of units that lose most. A sparse mask is
    unequal by chance alone, so compare both figures with those of masks from `random_like`. Both
    are NaN if the mask removes no weight of such a unit.

    >>> mask = hc.top_fraction(hc.removal_effect(bridge, harm), 0.01, within="model")
    >>> hc.concentration(mask, hc.weight_sites(bridge), "neuron")
    Concentration(gini=0..., top_share=0..., n_removed=...)

    Args:
        mask: the mask.
        sites: `weight_sites` of its model.
        by: "head" or "neuron".

    Raises:
        ValueError: another `by`.
        KeyError: `sites` lack a matrix of the mask.
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


def location_rows(
    mask: WeightMask,
    sites: Mapping[str, Site],
    labels: Labels,
) -> Rows:
    """The location of a mask's weights, as rows."""
    rows = Rows()
    for by in ("matrix", "head"):
        for place, count in counts_by(mask, sites, by).items():
            where = {
                **labels,
                "by": by,
                "layer": place.layer,
                "kind": place.part,
                "index": place.number,
            }
            rows += [_count_row(where, count)]

    random_masks = [random_like(mask, seed=seed) for seed in range(N_RANDOM)]
    for by in ("head", "neuron"):
        counts = counts_by(mask, sites, by).values()
        if any(count.n_removed for count in counts):
            actual = concentration(mask, sites, by)
            by_chance = [concentration(random, sites, by) for random in random_masks]
            rows += _concentration_rows(actual, by_chance, {**labels, "by": by})
    return rows


def _concentration_rows(
    actual: Concentration,
    by_chance: Sequence[Concentration],
    labels: Labels,
) -> Rows:
    rows = Rows()
    for metric in ("gini", "top_share"):
        value = getattr(actual, metric)
        rows += [Measurement.exact(metric, {**labels, "chance": "no"}, value)]

        values = [getattr(figures, metric) for figures in by_chance]
        rows += [Measurement.from_draws(metric, {**labels, "chance": "yes"}, values)]
    return rows


def component_rows(
    mask: WeightMask,
    sites: Mapping[str, Site],
    *,
    n_units: int = 8,
) -> Rows:
    """The number of weights that each matrix loses, and each of its units that lose most."""
    matrices = Rows()
    units = Rows()
    for name, n_removed in mask.counts.items():
        site = sites[name]
        n_weights = site.parameter.numel()
        where = {"layer": site.layer, "kind": site.kind}
        matrices += [_count_row({**where, "by": "matrix"}, Count(n_removed, n_weights))]

        removed = _unit_counts(mask, site)
        order = removed.argsort(descending=True, stable=True)[:n_units]
        for number in order[removed[order] > 0].tolist():
            unit = {**where, "by": "unit", "unit": site.unit, "index": number}
            count = Count(int(removed[number]), n_weights // site.n_units)
            units += [_count_row(unit, count)]
    return matrices + units


def _count_row(labels: Mapping[str, Label], count: Count) -> Measurement:
    where = {**labels, "of": count.n_weights}
    return Measurement.exact("weights_removed", where, count.n_removed)
