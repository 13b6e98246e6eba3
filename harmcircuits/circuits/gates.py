"""Gates over weights: how far each candidate is removed, and how a step moves them."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from harmcircuits.circuits.masks import WeightMask

OPEN = 0.5  # of the gate that is open most: a search of few steps opens none to the end
DECAY, STRIDE_DECAY = 0.85, 0.97  # of the momentum; of what a full stride is measured by


@dataclass
class Gates:
    """Candidate weights, and a gate for each: 0 keeps, 1 removes."""

    numbers: Int[Tensor, " gate"]  # of the weights in the model, increasing
    mask: WeightMask  # all of them
    values: Float[Tensor, " gate"]
    gate: Float[Tensor, " gate"]
    momentum: Float[Tensor, " gate"]
    stride: float = 0.0  # the momentum that moves a gate at the full rate

    def __len__(self) -> int:
        return len(self.numbers)

    def by_matrix(self, values: Tensor) -> dict[str, Tensor]:
        """The values of all gates, cut into those of each matrix."""
        index = self.mask.removed
        parts = values.split([len(flat) for flat in index.values()])
        return dict(zip(index, parts, strict=True))

    def gain(self, gradients: Mapping[str, Float[Tensor, " _"]]) -> Float[Tensor, " gate"]:
        """What opening each gate gains: W dL/dW."""
        return self.values * torch.cat([gradients[name] for name in self.mask.removed])

    def hard(self, n: int) -> Float[Tensor, " gate"]:
        """One for the n gates that are open furthest, zero elsewhere."""
        most = self.gate.max() if len(self) else 0.0
        is_open = (self.gate > OPEN * most).nonzero().flatten()
        order = is_open[self.gate[is_open].argsort(descending=True, stable=True)]
        hard = torch.zeros_like(self.gate)
        hard[order[:n]] = 1.0
        return hard

    def removed(self, n: int) -> dict[str, Int[Tensor, " _"]]:
        """The weights of the n gates that are open furthest, by matrix."""
        is_removed = self.by_matrix(self.hard(n) > 0)
        return {name: self.mask.removed[name][flags] for name, flags in is_removed.items()}

    def move(self, gain: Float[Tensor, " gate"], n: int, rate: float) -> None:
        """One step uphill, within n weights."""
        self.momentum.mul_(DECAY).add_(gain, alpha=1 - DECAY)
        # In units of the weakest of as many as can be open: these all move at the full rate.
        n_open = min(len(self), max(1, n))
        weakest = self.momentum.abs().topk(n_open).values[-1].item()
        # Decays slowly: once all is reached, what remains are small gradients and small strides.
        self.stride = max(weakest, STRIDE_DECAY * self.stride, 1e-20)
        step = rate * (self.momentum / self.stride).clamp(-1, 1)
        self.gate = projected(self.gate + step, n)

    def inherit(self, before: "Gates") -> None:
        """Gates that were there before stay as they were, and so does the stride."""
        self.stride = before.stride
        if not len(before):
            return
        place = torch.searchsorted(before.numbers, self.numbers).clamp(max=len(before) - 1)
        is_known = before.numbers[place] == self.numbers
        self.gate[is_known] = before.gate[place[is_known]]
        self.momentum[is_known] = before.momentum[place[is_known]]


def projected(gate: Float[Tensor, " gate"], n: int) -> Float[Tensor, " gate"]:
    """The nearest gates within 0 and 1 whose sum is at most n."""

    def moved(by: float) -> Float[Tensor, " gate"]:
        return (gate - by).clamp(0, 1)

    if moved(0.0).sum() <= n:
        return moved(0.0)
    # The sum falls as all of them are moved down, so the move is found by bisection.
    low, high = 0.0, float(gate.max())
    for _ in range(40):
        middle = (low + high) / 2
        if moved(middle).sum() > n:
            low = middle
        else:
            high = middle
    return moved(high)
