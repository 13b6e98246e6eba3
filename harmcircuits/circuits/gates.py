"""Learned gates: how far each candidate weight is removed, and how a step moves the gates."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from harmcircuits.circuits.masks import WeightMask
from harmcircuits.circuits.sites import Site

OPEN_SHARE = 0.5  # of the most open gate: a search of few steps opens no gate to the end
MOMENTUM = 0.85  # share of the momentum that a step keeps
STRIDE_DECAY = 0.97
MIN_STRIDE = 1e-20
BISECTIONS = 40

PerGate = Float[Tensor, " gate"]


@dataclass
class Gates:
    """A gate z in [0, 1] for each candidate weight W, which the model uses as W (1 - z)."""

    candidates: WeightMask
    weights: PerGate
    z: PerGate
    momentum: PerGate
    stride: float = 0.0  # the momentum that moves a gate at the full rate

    @classmethod
    def over(cls, candidates: WeightMask, sites: Mapping[str, Site]) -> "Gates":
        """Closed gates over the weights of a mask."""
        weights = [torch.empty(0)]
        for name, index in candidates.removed.items():
            flat = sites[name].parameter.detach().flatten()
            entries = flat[index.to(flat.device)]
            weights.append(entries.float().cpu())

        closed = torch.zeros(len(candidates))
        return cls(
            candidates,
            weights=torch.cat(weights),
            z=closed,
            momentum=closed.clone(),
        )

    def __len__(self) -> int:
        return len(self.z)

    def by_matrix(self, values: Tensor) -> dict[str, Tensor]:
        """A value for each gate, cut into the values of each matrix."""
        index = self.candidates.removed
        lengths = [len(flat) for flat in index.values()]
        parts = values.split(lengths)
        return dict(zip(index, parts, strict=True))

    def gain(self, gradients: Mapping[str, Tensor]) -> PerGate:
        """-dL/dz = W dL/dW: how fast the loss falls as each gate opens."""
        in_order = [gradients[name] for name in self.candidates.removed]
        return self.weights * torch.cat(in_order)

    def hard(self, n: int) -> PerGate:
        """1 for the n most open gates, if more than half as open as the first of them; else 0."""
        hard = torch.zeros_like(self.z)
        if len(self):
            threshold = OPEN_SHARE * self.z.max()
            is_open = (self.z > threshold).nonzero().flatten()
            order = self.z[is_open].argsort(descending=True, stable=True)
            first = is_open[order[:n]]
            hard[first] = 1.0
        return hard

    def where(self, flags: Bool[Tensor, " gate"]) -> WeightMask:
        """The candidates whose flag is set."""
        removed = {}
        for name, is_removed in self.by_matrix(flags).items():
            index = self.candidates.removed[name]
            removed[name] = index[is_removed]
        return replace(self.candidates, removed=removed)

    def largest(self, n: int) -> WeightMask:
        """The candidates whose gates are `hard`."""
        return self.where(self.hard(n) > 0)

    def move(self, gain: PerGate, n: int, rate: float) -> None:
        """One step uphill, projected onto gates whose sum is at most n."""
        self.momentum.mul_(MOMENTUM)
        self.momentum.add_(gain, alpha=1 - MOMENTUM)
        # The stride is the n-th largest momentum, so n gates move at the full rate. It decays
        # slowly: once every loss is where it should be, the steps get small.
        n_open = min(len(self), max(1, n))
        largest = self.momentum.abs().topk(n_open).values
        weakest = largest[-1].item()
        self.stride = max(weakest, STRIDE_DECAY * self.stride, MIN_STRIDE)

        direction = (self.momentum / self.stride).clamp(-1, 1)
        self.z = projected(self.z + rate * direction, n)

    def inherit(self, earlier: "Gates") -> None:
        """Take over the stride, and the gates of weights that are candidates again."""
        self.stride = earlier.stride
        is_old = self._is_in(earlier.candidates)
        is_candidate = earlier._is_in(self.candidates)
        self.z[is_old] = earlier.z[is_candidate]
        self.momentum[is_old] = earlier.momentum[is_candidate]

    def _is_in(self, mask: WeightMask) -> Bool[Tensor, " gate"]:
        flags = [torch.empty(0, dtype=torch.bool)]
        for name, index in self.candidates.removed.items():
            members = mask.removed.get(name, index[:0])
            is_member = torch.isin(index, members)
            flags.append(is_member)
        return torch.cat(flags)


def projected(z: PerGate, n: int) -> PerGate:
    """The nearest gates that lie in [0, 1] and whose sum is at most n."""
    nearest = z.clamp(0, 1)
    if nearest.sum() <= n:
        return nearest

    # All gates are lowered by one shift and clamped. The sum falls as the shift grows.
    low = 0.0
    high = float(z.max())
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        nearest = (z - middle).clamp(0, 1)
        if nearest.sum() > n:
            low = middle
        else:
            high = middle
    return (z - high).clamp(0, 1)
