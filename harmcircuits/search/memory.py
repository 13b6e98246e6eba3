"""The memory that scores take, and the memory that is free for them."""

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
from harmcircuits.search.descent import CANDIDATES

GIB = 2**30
SPARE = 1.25  # of the activations, which are an estimate
CANDIDATE_BYTES = 110  # at the peak of a step: index, weight, gate, momentum, and copies of these


def free_for_scores(
    bridge: AnyModel, batches: Sequence[Batch], objective: Objective = completion_loss
) -> int | None:
    """Bytes that are free for scores beside a pass over these batches; None where all scores fit.

    The free memory of the model's device, less 1.25 times the pass's estimated activations.
    `removal_effect` and other functions take the result as `max_memory`.

    >>> hc.free_for_scores(bridge, harm) is None
    True

    Args:
        bridge: the model.
        batches: the calibration data.
        objective: one value for each example.

    Raises:
        ValueError: as `estimate_memory`.
    """
    estimate = estimate_memory(bridge, batches, objective)
    room = free_memory(as_bridge(bridge)) - round(SPARE * estimate.activations)
    return None if estimate.scores <= room else max(0, room)


def free_memory(bridge: Bridge) -> int:
    """The free bytes of a model's device; of several devices, of the one with the fewest."""
    return min(map(_free_on, {parameter.device for parameter in bridge.parameters()}))


def _free_on(device: torch.device) -> int:
    if device.type != "cuda":
        return psutil.virtual_memory().available
    free, _ = torch.cuda.mem_get_info(device)
    # Torch keeps the memory of freed tensors for the next ones.
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of tensors at the peak of a scoring run or a search, all devices together."""

    weights: int
    scores: int
    activations: int
    candidates: int
    on_disk: int

    @property
    def total(self) -> int:
        """All of them but the bytes on disk."""
        return self.weights + self.scores + self.activations + self.candidates

    def __str__(self) -> str:
        parts = []
        for name in ("weights", "scores", "activations", "candidates"):
            n_bytes = getattr(self, name)
            if n_bytes:
                parts.append(f"{n_bytes / GIB:.2f} GiB {name}")
        on_disk = f"; on disk {self.on_disk / GIB:.2f} GiB" if self.on_disk else ""
        return f"{self.total / GIB:.2f} GiB: {', '.join(parts)}{on_disk}"


def estimate_memory(
    bridge: AnyModel,
    batches: Sequence[Batch],
    objective: Objective = completion_loss,
    *,
    max_memory: int | None = None,
    size: float = 0.0,
) -> MemoryEstimate:
    """The bytes that `removal_effect` needs on these batches, or a search for their circuit.

    weights as stored + 4 bytes for each block weight + the activations of the batch with the most
    tokens: the tensors that the backward pass of its longest example needs and half as much again,
    times its examples; of a search also 110 bytes, in the host's memory, for each of its
    candidates, which are up to 22 times the weights that it removes. Activations and candidates are
    estimates. Tensors only: libraries and the reserve of an allocator come on top.

    >>> print(hc.estimate_memory(bridge, harm))
    0.0... GiB: 0.00 GiB weights, 0.00 GiB scores, 0.0... GiB activations

    Args:
        bridge: the model.
        batches: the calibration data; of a search, also those of the retain sets.
        objective: one value for each example.
        max_memory: the run's bound on scores in memory, in bytes; the rest is on disk.
        size: of a search, the share of the block weights that its largest mask removes.

    Raises:
        ValueError: no batches, a matrix larger than `max_memory`, and as `named_weights`.
    """
    bridge = as_bridge(bridge)
    refuse_batches("estimate_memory", bridge, batches)
    sizes = []
    for group in memory_groups(weight_sites(bridge), max_memory):
        sizes.append(sum(BYTES * site.parameter.numel() for site in group.values()))

    is_bounded = max_memory is not None
    n_weights = sum(sizes) // BYTES
    n_candidates = min(n_weights, round(1.1 * CANDIDATES * size * n_weights))
    largest_batch = max(batches, key=lambda batch: batch.tokens.numel())
    return MemoryEstimate(
        weights=sum(_memory([*bridge.parameters(), *bridge.buffers()]).values()),
        scores=max(sizes) if is_bounded else sum(sizes),
        activations=_activations(bridge, largest_batch, objective),
        candidates=CANDIDATE_BYTES * n_candidates,
        on_disk=sum(sizes) if is_bounded else 0,
    )


def _activations(bridge: Bridge, batch: Batch, objective: Objective) -> int:
    """The bytes that a batch takes on its way forward and back, from one example."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    hooked = {name: site for name, site in weight_sites(bridge).items() if site.is_hooked}
    with torch.enable_grad(), hook_pairs(bridge, hooked, lambda *_: None):
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = objective(bridge, longest_example(batch)).sum()
        sizes = _memory(saved)
        for address in _memory([*bridge.parameters(), *bridge.buffers()]):
            sizes.pop(address, None)
        loss.backward()

    # The passes make further tensors and free them: half as much as the blocks save, and the
    # logits twice more. On nine models the whole is 0.9 to 1.2 of the peak.
    n_bytes = 1.5 * sum(sizes.values()) + 2 * max(sizes.values())
    return round(n_bytes * len(batch))


def longest_example(batch: Batch) -> Batch:
    """The text of a batch with the most targets, made as long as the longest."""
    row = int(batch.is_target.sum(dim=1).argmax())
    is_target = batch.is_target[row : row + 1].clone()
    is_target[:, batch.n_read] = True
    return Batch(batch.tokens[row : row + 1], is_target)


def _memory(tensors: Iterable[Tensor]) -> dict[int, int]:
    """The bytes of every block of memory that holds some of the tensors, by its address."""
    sizes = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
    return sizes
