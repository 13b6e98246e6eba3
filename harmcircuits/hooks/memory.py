"""What a scoring run will need, told beforehand from one and two examples."""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformer_lens.model_bridge import TransformerBridge

from harmcircuits.hooks.accumulation import BYTES, accumulate, groups
from harmcircuits.hooks.distributed import Processes
from harmcircuits.hooks.objectives import Objective, completion_loss
from harmcircuits.hooks.weights import weight_sites
from harmcircuits.prompts import Batch


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of tensors at the peak of a scoring run, all devices together.

    `weights`: the model as it stands. `accumulators`: float32 scores of the largest group of matrices. `activations`: all
    that comes and goes with a batch, scratch included.
    """

    weights: int
    accumulators: int
    activations: int

    @property
    def total(self) -> int:
        """All three."""
        return self.weights + self.accumulators + self.activations

    def __str__(self) -> str:
        parts = (f"{getattr(self, name) / 2**30:.2f} GiB {name}" for name in ("weights", "accumulators", "activations"))
        return f"{self.total / 2**30:.2f} GiB: {', '.join(parts)}"


def estimate_memory(
    bridge: TransformerBridge,
    batches: Sequence[Batch],
    objective: Objective = completion_loss,
    *,
    absolute: bool = False,
    max_memory: int | None = None,
) -> MemoryEstimate:
    """The bytes that `removal_effect` needs on these batches, or with `absolute` `sensitivity`.

    The activations are those of the batch with the most tokens, by a line through what one and two of its examples need:
    these run forward and backward, everything else is counted. Tensors only: libraries and what an allocator holds back
    come on top. Raises ValueError for no batches, as `groups` and as `weight_sites`.
    """
    if not batches:
        raise ValueError("estimate_memory: no batches; expected at least one (see tokenize)")
    sites = weight_sites(bridge)
    largest = max(sum(site.parameter.numel() for site in group.values()) for group in groups(sites, max_memory))
    tensors = {t.untyped_storage().data_ptr(): t for t in chain(bridge.parameters(), bridge.buffers())}
    weights = sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())
    batch = max(batches, key=lambda one: one.tokens.numel())
    first, further = _activations(bridge, batch, objective, absolute)
    return MemoryEstimate(weights, BYTES * largest, first + (len(batch) - 1) * further)


def fitting_batches(
    bridge: TransformerBridge,
    batches: Sequence[Batch],
    max_activations: int,
    objective: Objective = completion_loss,
    *,
    absolute: bool = False,
) -> list[Batch]:
    """The batches split so that the activations of each take at most so many bytes, by `estimate_memory`'s line.

    As many examples together as fit of the longest; the order stays, and so do the scores up to rounding. Give large
    batches of examples of like length. Raises ValueError for no batches, one example that does not fit, and as
    `weight_sites`.
    """
    if not batches:
        raise ValueError("fitting_batches: no batches; expected at least one (see tokenize)")
    longest = max(batches, key=lambda one: one.tokens.shape[1])
    first, further = _activations(bridge, longest, objective, absolute)
    if first > max_activations:
        raise ValueError(
            f"fitting_batches: max_activations={max_activations:,} bytes, but one example of {longest.tokens.shape[1]} "
            f"tokens takes {first:,}; give as many, or shorter examples"
        )
    size = 1 + (max_activations - first) // further
    pairs = ((batch.tokens.split(size), batch.is_target.split(size)) for batch in batches)
    return [Batch(*both) for tokens, is_target in pairs for both in zip(tokens, is_target, strict=True)]


def _activations(bridge: TransformerBridge, batch: Batch, objective: Objective, absolute: bool) -> tuple[int, int]:
    """The bytes that one example of a batch takes on its way forward and back, and that each further one adds."""
    sites = weight_sites(bridge)
    # One accumulator for all matrices of a shape: what is added up here is thrown away.
    kinds = {(site.parameter.shape, site.parameter.device) for site in sites.values()}
    total = {kind: torch.zeros(kind[0], device=kind[1]) for kind in kinds}
    into = {name: total[site.parameter.shape, site.parameter.device] for name, site in sites.items()}
    processes, peaks = Processes(list(sites), bridge.cfg.device), []
    for rows in ([0], [0, 1 % len(batch)]):
        part = Batch(batch.tokens[rows], batch.is_target[rows])
        with _LiveBytes() as live:
            accumulate(bridge, [part], objective, sites, into, absolute, processes)
        peaks.append(live.peak)
    return peaks[0], peaks[1] - peaks[0]


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made while it is open; `peak` is the most that were alive at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in given | self._alive:
                self._now += storage.nbytes()
                self._alive.add(storage._cdata)
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self._now)
        return result

    def _free(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self._now -= size
