"""Gates over weights: how far each candidate is removed, and how a step moves them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from harmcircuits.circuits.masks import WeightMask

OPEN = 0.5  # of the gate that is open most: a search of few steps opens none to the end
DECAY, STRIDE_DECAY = 0.85, 0.97  # of the momentum; of what a full stride is measured by

Gradients = Iterable[tuple[str, Float[Tensor, " _"]]]  # of the candidates, by matrix


@dataclass
class Gates:
    """Candidate weights in units that open together, and a gate for each: 0 keeps, 1 removes."""

    units: Int[Tensor, " gate"]  # their numbers in the model, increasing
    sizes: Int[Tensor, " gate"]  # weights of each
    mask: WeightMask  # the weights of all
    gate_of: Mapping[str, Int[Tensor, " _"]]  # the gate of each weight of the mask
    weights: Mapping[str, Float[Tensor, " _"]]  # their values
    gate: Float[Tensor, " gate"]
    momentum: Float[Tensor, " gate"]
    stride: float = 0.0  # the momentum that moves a gate at the full rate

    def __len__(self) -> int:
        return len(self.units)

    def per_weight(self, values: Float[Tensor, " gate"]) -> dict[str, Float[Tensor, " _"]]:
        """A value of each gate, for every weight of it."""
        return {name: values[gates] for name, gates in self.gate_of.items()}

    def gain(self, gradients: Gradients) -> Float[Tensor, " gate"]:
        """What opening each gate gains: the sum of W dL/dW over its weights."""
        gain = torch.zeros_like(self.gate)
        for name, gradient in gradients:
            gain.index_add_(0, self.gate_of[name], self.weights[name] * gradient)
        return gain

    def hard(self, n: int) -> Float[Tensor, " gate"]:
        """One for the gates that are open furthest and have n weights together, zero elsewhere."""
        most = self.gate.max() if len(self) else 0.0
        is_open = (self.gate > OPEN * most).nonzero().flatten()
        order = is_open[self.gate[is_open].argsort(descending=True, stable=True)]
        fits = self.sizes[order].cumsum(0) <= n
        hard = torch.zeros_like(self.gate)
        hard[order[fits]] = 1.0
        return hard

    def removed(self, n: int) -> dict[str, Int[Tensor, " _"]]:
        """The weights of the gates that are open furthest, n in all, by matrix."""
        is_removed = self.per_weight(self.hard(n))
        return {name: self.mask.removed[name][flags > 0] for name, flags in is_removed.items()}

    def move(self, gain: Float[Tensor, " gate"], n: int, rate: float) -> None:
        """One step uphill, within n weights."""
        self.momentum.mul_(DECAY).add_(gain / self.sizes, alpha=1 - DECAY)
        # In units of the weakest of as many as can be open: these all move at the full rate.
        n_open = min(len(self), max(1, round(n / self.sizes.float().mean().item())))
        weakest = self.momentum.abs().topk(n_open).values[-1].item()
        # Decays slowly: once all is reached, what remains are small gradients and small strides.
        self.stride = max(weakest, STRIDE_DECAY * self.stride, 1e-20)
        step = rate * (self.momentum / self.stride).clamp(-1, 1)
        self.gate = self.projected(self.gate + step, n)

    def projected(self, gate: Float[Tensor, " gate"], n: int) -> Float[Tensor, " gate"]:
        """The nearest gates within 0 and 1 that take at most n weights together."""

        def moved(by: float) -> Float[Tensor, " gate"]:
            return (gate - by).clamp(0, 1)

        if (moved(0.0) * self.sizes).sum() <= n:
            return moved(0.0)
        # What they take falls as all of them are moved down, so the move is found by bisection.
        low, high = 0.0, float(gate.max())
        for _ in range(40):
            middle = (low + high) / 2
            if (moved(middle) * self.sizes).sum() > n:
                low = middle
            else:
                high = middle
        return moved(high)

    def inherit(self, before: "Gates") -> None:
        """Gates that were there before stay as they were, and so does the stride."""
        self.stride = before.stride
        if not len(before):
            return
        place = torch.searchsorted(before.units, self.units).clamp(max=len(before) - 1)
        is_known = before.units[place] == self.units
        self.gate[is_known] = before.gate[place[is_known]]
        self.momentum[is_known] = before.momentum[place[is_known]]
