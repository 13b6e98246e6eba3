"""A TransformerBridge from a folder or hub id, and the memory that its scores take."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from harmcircuits.hooks.accumulation import BYTES, memory_groups
from harmcircuits.hooks.bridge import AnyModel, Bridge, as_bridge
from harmcircuits.hooks.checks import refuse_batches
from harmcircuits.hooks.gradients import hook_pairs
from harmcircuits.hooks.objectives import Objective, completion_loss
from harmcircuits.hooks.weights import weight_sites
from harmcircuits.prompts import Batch

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GIB = 2**30


def refuse_device(device: str) -> None:
    """Raises ValueError for a device that this machine has not, before anything is loaded."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise ValueError(
            f"device={device!r}: this machine has no such device; give device='cpu' or 'cuda:0'"
        ) from None


def load_model(
    model: str,
    *,
    dtype: str = "",
    device: str = "cpu",
    device_map: str = "",
) -> "TransformerBridge":
    """The model of a folder or hub id as a TransformerBridge.

    >>> from harmcircuits.organisms import FOLDER
    >>> type(hc.load_model(str(FOLDER / "base"))).__name__
    'TransformerBridge'

    Args:
        model: the folder or id.
        dtype: "float32", "bfloat16" or "float16"; as stored by default.
        device: a torch device.
        device_map: "auto" or "balanced" spreads the model over several devices instead.

    Raises:
        ValueError: another dtype, a model that cannot be loaded, an adapter that is not merged, and
            weights that cannot be scored (see `named_weights`).
    """
    # Imported here: opening a model is what TransformerLens, which takes seconds, is needed for.
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoConfig

    if dtype and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}; expected one of {', '.join(DTYPES)}")
    refuse_device(device)
    where: dict[str, Any] = {"device": device}
    if device_map:
        where = {"device_map": device_map}
    try:
        # The bridge would load in float32 whatever the file holds.
        stored = AutoConfig.from_pretrained(model).dtype or torch.float32
        chosen = DTYPES[dtype] if dtype else stored
        bridge = TransformerBridge.boot_transformers(model, dtype=chosen, **where)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    # A damaged file of a model ends in an error of the library that reads it, whichever that is.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"model {model!r} cannot be loaded; expected a folder or a hub id of a causal language "
            "model that TransformerLens opens, an adapter merged into its base (merge_and_unload): "
            f"{reason}"
        ) from error
    weight_sites(bridge)  # refuses what cannot be scored, before anything is measured
    return bridge


def wrap_model(model: Any, tokenizer: Any = None) -> "TransformerBridge":
    """A Hugging Face model that is already loaded as a TransformerBridge over the same weights."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoTokenizer

    origin = getattr(model.config, "_name_or_path", "")
    if tokenizer is None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(origin)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"no tokenizer is stored at {origin!r}, where the model came from; "
                f"give tokenizer=... ({error})"
            ) from None
    bridge = TransformerBridge.boot_transformers(
        origin,
        hf_model=model,
        tokenizer=tokenizer,
        dtype=model.dtype,
        device=str(model.device),
    )
    weight_sites(bridge)
    return bridge


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
    search: bool = False,
    max_memory: int | None = None,
) -> MemoryEstimate:
    """The bytes that `removal_effect` needs on these batches, or a search for their circuit.

    weights as stored + 4 bytes for each block weight (a search: 12, the two sums and what a step
    adds to them) + the activations of the batch with the most tokens: what one example of its full
    length keeps for the backward pass and half as much again, times its examples. That part is an
    estimate. Tensors only: libraries and what an allocator holds back come on top.

    >>> print(hc.estimate_memory(bridge, harm))
    0.0... GiB: 0.00 GiB weights, 0.00 GiB scores, 0.0... GiB activations
    >>> print(hc.estimate_memory(bridge, [*harm, *benign], search=True))
    0.0... GiB: 0.00 GiB weights, 0.01 GiB scores, 0.0... GiB activations

    Args:
        bridge: the model.
        batches: the calibration data; of a search, also what it protects.
        objective: what is scored.
        search: whether the run is a search.
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

    n_kept = 3 if search else 1
    is_bounded = max_memory is not None
    largest_batch = max(batches, key=lambda batch: batch.tokens.numel())
    return MemoryEstimate(
        weights=sum(_sizes([*bridge.parameters(), *bridge.buffers()]).values()),
        scores=max(sizes) if is_bounded else n_kept * sum(sizes),
        activations=_activations(bridge, largest_batch, objective),
        on_disk=n_kept * sum(sizes) if is_bounded else 0,
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
