"""The memory that scores take, and what is free for them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from harmcircuits.batches import Batch
from harmcircuits.hooks.bridge import AnyModel, Bridge, as_bridge
from harmcircuits.hooks.checks import refuse_batches
from harmcircuits.hooks.gradients import hook_pairs
from harmcircuits.hooks.objectives import Objective, completion_loss
from harmcircuits.hooks.weights import weight_sites
from harmcircuits.search.accumulation import BYTES, memory_groups

GIB = 2**30
SPARE = 1.25  # of the activations, which are an estimate


def free_for_scores(
    bridge: AnyModel, batches: Sequence[Batch], objective: Objective = completion_loss
) -> int | None:
    """Bytes that are free for scores beside a pass over these batches; None where all fit."""
    estimate = estimate_memory(bridge, batches, objective)
    room = free_memory(as_bridge(bridge)) - round(SPARE * estimate.activations)
    return None if estimate.scores <= room else max(0, room)


def free_memory(bridge: Bridge) -> int:
    """The bytes that are free where a model is; of several devices, where it is least."""
    return min(map(_free_on, {parameter.device for parameter in bridge.parameters()}))


def _free_on(device: torch.device) -> int:
    if device.type != "cuda":
        return psutil.virtual_memory().available
    free, _ = torch.cuda.mem_get_info(device)
    # What torch keeps of freed tensors is there for the next ones.
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of tensors at the peak of a scoring run or a search, all devices together."""

    weights: int
    scores: int
    activations: int
    on_disk: int

    @property
    def total(self) -> int:
        """All that takes memory."""
        return self.weights + self.scores + self.activations

    def __str__(self) -> str:
        on_disk = f"; on disk {self.on_disk / GIB:.2f} GiB" if self.on_disk else ""
        return (
            f"{self.total / GIB:.2f} GiB: {self.weights / GIB:.2f} GiB weights, "
            f"{self.scores / GIB:.2f} GiB scores, "
            f"{self.activations / GIB:.2f} GiB activations{on_disk}"
        )


def estimate_memory(
    bridge: AnyModel,
    batches: Sequence[Batch],
    objective: Objective = completion_loss,
    *,
    max_memory: int | None = None,
) -> MemoryEstimate:
    """The bytes that `removal_effect` needs on these batches, or a search for their circuit.

    weights as stored + 4 bytes for each block weight + the activations of the batch with the most
    tokens: what one example of its full length keeps for the backward pass and half as much again,
    times its examples. That part is an estimate. Tensors only: libraries and what an allocator
    holds back come on top.

    >>> print(hc.estimate_memory(bridge, harm))
    0.0... GiB: 0.00 GiB weights, 0.00 GiB scores, 0.0... GiB activations

    Args:
        bridge: the model.
        batches: the calibration data; of a search, also what it protects.
        objective: what is scored.
        max_memory: the run's bound on scores in memory, in bytes; the rest is on disk.

    Raises:
        ValueError: no batches, a matrix larger than `max_memory`, and as `named_weights`.
    """
    bridge = as_bridge(bridge)
    refuse_batches("estimate_memory", bridge, batches)
    sites = weight_sites(bridge)
    sizes = []
    for group in memory_groups(sites, max_memory):
        sizes.append(sum(BYTES * site.parameter.numel() for site in group.values()))

    is_bounded = max_memory is not None
    largest_batch = max(batches, key=lambda batch: batch.tokens.numel())
    return MemoryEstimate(
        weights=sum(_sizes([*bridge.parameters(), *bridge.buffers()]).values()),
        scores=max(sizes) if is_bounded else sum(sizes),
        activations=_activations(bridge, largest_batch, objective),
        on_disk=sum(sizes) if is_bounded else 0,
    )


def _activations(bridge: Bridge, batch: Batch, objective: Objective) -> int:
    """The bytes that a batch takes on its way forward and back, from one example."""
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    def unchanged(tensor: Tensor) -> Tensor:
        return tensor

    # As long as the longest and with as many targets as any: its first alone may be short.
    row = int(batch.is_target.sum(dim=1).argmax())
    is_target = batch.is_target[row : row + 1].clone()
    is_target[:, batch.n_read] = True
    example = Batch(batch.tokens[row : row + 1], is_target)
    hooked = {name: site for name, site in weight_sites(bridge).items() if site.is_hooked}
    with torch.enable_grad(), hook_pairs(bridge, hooked, lambda *_: None):
        with saved_tensors_hooks(keep, unchanged):
            loss = objective(bridge, example).sum()
        sizes = _sizes(kept)
        for storage in _sizes([*bridge.parameters(), *bridge.buffers()]):
            sizes.pop(storage, None)
        loss.backward()

    # What the passes make besides and free again: half as much as is kept in the blocks, and the
    # logits twice more. Counted on nine models, the whole is 0.9 to 1.2 of the peak.
    n_bytes = 1.5 * sum(sizes.values()) + 2 * max(sizes.values())
    return round(n_bytes * len(batch))


def _sizes(tensors: Iterable[Tensor]) -> dict[int, int]:
    """The bytes of every piece of memory that some tensors lie in."""
    sizes = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
    return sizes
