"""The benefit of removing each weight: step 1 of the search (see `circuit.py`)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from harmcircuits.circuits.masks import WeightMask
from harmcircuits.circuits.selection import Index, Indices, largest, positive
from harmcircuits.hooks.bridge import Bridge
from harmcircuits.hooks.checks import naming_data
from harmcircuits.hooks.masking import masked
from harmcircuits.search.accumulation import GradientSums
from harmcircuits.search.texts import TextGroup

PRICE_WEIGHT = 0.25  # of the penalty, `token_price`
SIGNS = {"target": -1.0, "preferred": 1.0, "avoided": -1.0}


@dataclass
class Benefits(Mapping[str, Tensor]):
    """W times a slope for every weight: the slope alone is stored, the product made when read."""

    slopes: GradientSums
    excluded: Indices

    def __getitem__(self, name: str) -> Tensor:
        slope = self.slopes.totals[name]
        weight = self.slopes.sites[name].parameter.detach()
        return slope * weight.to(slope)

    def __iter__(self) -> Iterator[str]:
        return iter(self.slopes.totals)

    def __len__(self) -> int:
        return len(self.slopes.totals)

    def add(self, bridge: Bridge, group: TextGroup, mask: WeightMask) -> None:
        """Add the benefit that these texts show under a mask."""
        if group.role == "protected":
            reduction = "per token"
            coefficient = -PRICE_WEIGHT
        else:
            reduction = "signed"
            coefficient = group.weight * SIGNS[group.role]
        # Scaled to 0 or -0, which keeps the weight's sign: the penalty is a sum of that sign.
        scale = {name: torch.zeros(len(index)) for name, index in mask.removed.items()}
        with masked(bridge, mask, scale=scale), naming_data(group.name):
            self.slopes.add(
                bridge,
                group.batches,
                group.objective,
                reduction,
                coefficient,
            )

    def best(self, n: int) -> dict[str, Index]:
        """The n weights of the largest benefit, of those whose benefit is positive."""
        n_free = 0
        for name, site in self.slopes.sites.items():
            n_free += site.parameter.numel()
            n_free -= len(self.excluded.get(name, ()))
        best = largest(self, min(n, n_free), self.excluded)
        return positive(self, best)
