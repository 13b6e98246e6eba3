"""Neurons, heads and rows: weights that are chosen together, so that a circuit can be read."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from harmcircuits.circuits.selection import Index, Indices, Scores
from harmcircuits.circuits.sites import Site
from harmcircuits.display import listed

Unit = Literal["weight", "neuron", "head", "row"]

# What the matrices of a unit are cut into (`Site.unit`).
CUT_INTO = {"neuron": ("neuron",), "head": ("head", "kv_head")}


@dataclass(frozen=True)
class Units:
    """The neurons, heads or rows that a choice is made among."""

    sites: Mapping[str, Site]
    first: Mapping[str, int]

    @classmethod
    def of(cls, sites: Mapping[str, Site], unit: Unit, within: Collection[str]) -> "Units":
        """The units of some of a model's matrices."""
        # The matrices that consist of the same units, together.
        families: dict[Any, dict[str, Site]] = {}
        if unit == "row":
            for name in within:
                families[name] = {name: _cut_into_rows(sites[name])}
        else:
            for name, site in sites.items():
                if site.unit in CUT_INTO[unit]:
                    # By number, since as many key-value heads as heads are the same heads.
                    families.setdefault((site.layer, site.n_units), {})[name] = site

        chosen, first = {}, {}
        n_units = 0
        for family in families.values():
            names = family.keys() & set(within)
            if not names:
                continue
            if len(names) < len(family):
                kinds = listed(site.kind for site in family.values())
                raise ValueError(f'unit="{unit}": each is in {kinds} together; name all or none')
            chosen |= family
            first |= dict.fromkeys(family, n_units)
            n_units += next(iter(family.values())).n_units
        if not chosen:
            kinds = listed(sorted({sites[name].kind for name in within}))
            raise ValueError(f'unit="{unit}": there are none in {kinds}; choose unit="weight"')
        return cls(chosen, first)

    @cached_property
    def sizes(self) -> Int[Tensor, " unit"]:
        """How many weights each unit has."""
        last = list(self.sites)[-1]
        sizes = torch.zeros(self.first[last] + self.sites[last].n_units, dtype=torch.int64)
        for name, site in self.sites.items():
            self._of(name, sizes).add_(site.parameter.numel() // site.n_units)
        return sizes

    def sums(self, scores: Scores) -> Float[Tensor, " unit"]:
        """The sum of the scores of each unit's weights, in float64."""
        sums = torch.zeros(len(self.sizes), dtype=torch.float64)
        for name, site in self.sites.items():
            along = scores[name].sum(dim=1 - site.unit_axis, dtype=torch.float64)
            slices = along.view(site.n_units, -1)
            self._of(name, sums).add_(slices.sum(dim=1).cpu())
        return sums

    def best(self, scores: Scores, n: int, excluded: Indices) -> Bool[Tensor, " unit"]:
        """The units with the highest mean score above zero: together at most n weights."""
        means = self.sums(scores) / self.sizes
        for name in excluded.keys() & self.sites.keys():
            touched = self.sites[name].units(excluded[name])
            self._of(name, means)[touched] = 0.0

        order = means.argsort(descending=True, stable=True)
        n_weights = self.sizes[order].cumsum(0)
        is_taken = (means[order] > 0) & (n_weights <= n)
        is_chosen = torch.zeros(len(means), dtype=torch.bool)
        is_chosen[order[is_taken]] = True
        return is_chosen

    def largest(self, scores: Scores, n: int, excluded: Indices) -> dict[str, Index]:
        """The weights of the `best` units."""
        return self.weights(self.best(scores, n, excluded))

    def numbers(self, name: str, flat: Index) -> Index:
        """The unit of each of these weights of a matrix."""
        return self.first[name] + self.sites[name].units(flat)

    def random(self, weights: Indices, *, seed: int) -> dict[str, Index]:
        """The weights of as many units in every layer as some weights are of, drawn at random."""
        is_given = torch.zeros(len(self.sizes), dtype=torch.bool)
        for name in weights.keys() & self.sites.keys():
            units = self.sites[name].units(weights[name])
            self._of(name, is_given)[units] = True

        generator = torch.Generator().manual_seed(seed)
        is_drawn = torch.zeros(len(self.sizes), dtype=torch.bool)
        matrices = {first: name for name, first in self.first.items()}  # one for each number
        for name in matrices.values():
            n_given = int(self._of(name, is_given).sum())
            order = torch.randperm(self.sites[name].n_units, generator=generator)
            self._of(name, is_drawn)[order[:n_given]] = True
        return self.weights(is_drawn)

    def weights(self, is_chosen: Bool[Tensor, " unit"]) -> dict[str, Index]:
        """The weights of these units."""
        weights = {}
        for name, site in self.sites.items():
            # Two heads of three rows each, the second of them chosen:
            #
            #     slices    False                 True
            #     rows      False False False     True True True
            shape = site.parameter.shape
            slices = self._of(name, is_chosen)
            rows = slices.repeat_interleave(shape[site.unit_axis] // site.n_units)
            is_removed = rows.unsqueeze(1 - site.unit_axis).expand(shape)
            weights[name] = is_removed.flatten().nonzero().flatten()
        return weights

    def _of(self, name: str, values: Tensor) -> Tensor:
        """Of one value a unit, those of a matrix's slices."""
        first = self.first[name]
        return values[first : first + self.sites[name].n_units]


def _cut_into_rows(site: Site) -> Site:
    """The matrix with its outputs for units."""
    if not site.is_hooked:
        raise ValueError(f'unit="row": {site.name} is of experts or their router; leave it out')
    output_axis = 0 if site.input_axis == 1 else 1
    n_outputs = site.parameter.shape[output_axis]
    return replace(site, unit_axis=output_axis, n_units=n_outputs)
