"""Estimate the memory of a scoring run or a search from one and two examples."""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from harmcircuits.circuits.sites import Site
from harmcircuits.hooks.accumulation import BYTES, Kind, accumulate, memory_groups
from harmcircuits.hooks.bridge import AnyModel, Bridge, as_bridge
from harmcircuits.hooks.objectives import Objective, completion_loss
from harmcircuits.hooks.protection import Protect, priced_batches
from harmcircuits.hooks.weights import weight_sites
from harmcircuits.prompts import Batch

GIB = 2**30


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of tensors at the peak of a scoring run or a search, all devices together."""

    weights: int
    accumulators: int
    activations: int
    sums: int = 0
    on_disk: int = 0

    @property
    def total(self) -> int:
        """All that takes memory."""
        return self.weights + self.accumulators + self.activations + self.sums

    def __str__(self) -> str:
        sums = f", {self.sums / GIB:.2f} GiB sums" if self.sums else ""
        on_disk = f"; on disk {self.on_disk / GIB:.2f} GiB" if self.on_disk else ""
        return (
            f"{self.total / GIB:.2f} GiB: {self.weights / GIB:.2f} GiB weights, "
            f"{self.accumulators / GIB:.2f} GiB accumulators, "
            f"{self.activations / GIB:.2f} GiB activations{sums}{on_disk}"
        )


def estimate_memory(
    bridge: AnyModel,
    batches: Sequence[Batch],
    objective: Objective = completion_loss,
    *,
    absolute: bool = False,
    protect: Protect | None = None,
    max_memory: int | None = None,
) -> MemoryEstimate:
    """The bytes that a scoring run needs on these batches: `removal_effect`, or absolute scores.

    Or, with `protect`, those that `find_circuit` needs.

    The activations are those of the batch with the most tokens, extrapolated linearly from one and
    two of its examples. These run forward and backward; everything else is counted. Tensors only:
    libraries and what an allocator holds back come on top.

    >>> print(hc.estimate_memory(bridge, harm))
    0.0... GiB: 0.00 GiB weights, 0.00 GiB accumulators, 0.0... GiB activations
    >>> print(hc.estimate_memory(bridge, harm, protect=[benign]))
    0.0... GiB: 0.00 GiB weights, 0.00 GiB accumulators, 0.0... GiB activations, 0.01 GiB sums

    Args:
        bridge: The `TransformerBridge`, or a `harmcircuits.Model` with one.
        batches: The calibration data.
        objective: What the run explains.
        absolute: Whether the run takes the absolute gradient of every example.
        protect: What a search for these batches' circuit protects, () for nothing; batches that
            it has renewed count as no larger than these. Without it, the run is no search.
        max_memory: The run's bound on accumulators, in bytes.

    Raises:
        ValueError: For no batches; for an absolute search; as `memory_groups` and `weight_sites`.
    """
    if not batches:
        raise ValueError("estimate_memory: no batches; expected at least one (see tokenize)")
    if absolute and protect is not None:
        raise ValueError(
            "estimate_memory: absolute=True with protect=...; a search takes no absolute gradients "
            "of examples, so leave one of them out"
        )
    bridge = as_bridge(bridge)
    sites = weight_sites(bridge)
    largest_group = max(_n_weights(group) for group in memory_groups(sites, max_memory))

    activations = _activations(bridge, batches, objective, "per example" if absolute else "signed")
    sums = 0
    of_all_weights = BYTES * _n_weights(sites)
    if protect is not None:
        priced = priced_batches(protect)
        for of_behaviour in priced:
            of_price = _activations(bridge, of_behaviour, completion_loss, "per token")
            activations = max(activations, of_price)
        sums = (1 + bool(priced)) * of_all_weights  # the benefit and the price

    # Under a bound all that is finished is on disk: the scores of a run, or of a step of a search.
    is_bounded = max_memory is not None
    return MemoryEstimate(
        weights=_stored_bytes(bridge),
        accumulators=BYTES * largest_group,
        activations=activations,
        sums=0 if is_bounded else sums,
        on_disk=sums + of_all_weights if is_bounded else 0,
    )


def _n_weights(sites: dict[str, Site]) -> int:
    return sum(site.parameter.numel() for site in sites.values())


def _stored_bytes(bridge: Bridge) -> int:
    """The bytes of all parameters and buffers; memory that several of them share counts once."""
    storages = {}
    for tensor in chain(bridge.parameters(), bridge.buffers()):
        storage = tensor.untyped_storage()
        # An outline's storages have no address.
        storages[storage.data_ptr() or storage._cdata] = storage.nbytes()
    return sum(storages.values())


def _activations(
    bridge: Bridge,
    batches: Sequence[Batch],
    objective: Objective,
    kind: Kind,
) -> int:
    """The bytes that the batch with the most tokens takes on its way forward and back."""
    batch = max(batches, key=lambda batch: batch.tokens.numel())
    sites = weight_sites(bridge)
    totals = shared_totals(sites)

    peaks = []
    for rows in ([0], [0, 1 % len(batch)]):
        examples = Batch(batch.tokens[rows], batch.is_target[rows])
        with _LiveBytes() as live:
            accumulate(bridge, [examples], objective, sites, totals, kind)
        peaks.append(live.peak)

    peak_of_one, peak_of_two = peaks
    return peak_of_one + (len(batch) - 1) * (peak_of_two - peak_of_one)


def shared_totals(sites: dict[str, Site]) -> dict[str, Tensor]:
    """One accumulator for all matrices of a shape: what is added up in it is thrown away."""
    by_shape: dict[Any, Tensor] = {}
    totals = {}
    for name, site in sites.items():
        shape = site.parameter.shape
        device = site.parameter.device
        if (shape, device) not in by_shape:
            by_shape[shape, device] = torch.zeros(shape, device=device)
        totals[name] = by_shape[shape, device]
    return totals


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made while it is open."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live_bytes = 0
        self._live_storages: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Any = (),
        kwargs: Any = None,
    ) -> Any:
        given = {storage._cdata for storage in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))

        for storage in _storages(result):
            is_new = storage._cdata not in given and storage._cdata not in self._live_storages
            if is_new:
                self._count(storage)
        self.peak = max(self.peak, self._live_bytes)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        size = storage.nbytes()
        self._live_bytes += size
        self._live_storages.add(key)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._live_storages.discard(key)
        self._live_bytes -= size


def _storages(values: Any) -> list[torch.UntypedStorage]:
    """The memory of every tensor in a nested structure."""
    tensors = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
    return [tensor.untyped_storage() for tensor in tensors]
