"""The parts of a TransformerBridge that this package uses, and the bridge inside a model."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence


@runtime_checkable
class Bridge(Protocol):
    """The parts of TransformerLens's `TransformerBridge` that this package uses."""

    cfg: Any
    tokenizer: Any
    original_model: Any
    _weights_processed: bool

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Parts without a type: `blocks`, `hook_dict`, `hooks`, `run_with_cache` and others."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Logits [batch pos vocab] of tokens [batch pos]."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Every parameter of the Hugging Face model once."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter of the Hugging Face model once, with its Hugging Face name."""
        ...

    def buffers(self) -> Iterator[Tensor]:
        """Every buffer of the bridge's modules."""
        ...

    def modules(self) -> Iterator[nn.Module]:
        """The bridge's modules, which include most modules of the Hugging Face model."""
        ...


@runtime_checkable
class HasBridge(Protocol):
    """An object that holds a bridge: a `harmcircuits.Model`."""

    @property
    def bridge(self) -> Any:
        """The bridge."""


AnyModel = Bridge | HasBridge
"""Functions that work on a bridge take the bridge itself or the Model that holds it."""


def as_bridge(model: Any) -> Bridge:
    """The bridge of a model, or the bridge itself."""
    bridge = getattr(model, "bridge", model)
    # No other object has all three names. A stub in a test needs no more than these.
    if all(hasattr(bridge, name) for name in ("original_model", "blocks", "cfg")):
        return bridge

    actual = f"{type(bridge).__module__}.{type(bridge).__name__}"
    raise ValueError(
        f"expected a TransformerBridge or a harmcircuits.Model, got {actual}: open it with "
        "harmcircuits.open_model(...) or TransformerBridge.boot_transformers(folder)"
    )


@contextmanager
def unhooked(bridge: Bridge) -> Iterator[None]:
    """While open, `bridge.original_model` runs without hook points: the same function, faster."""
    # A bridge replaces each module that it wraps, and modules lie inside modules. A wrapper stays
    # if it holds copies of fused weights, because masks edit these copies.
    wrappers: list[tuple[nn.Module, str, nn.Module]] = []

    def unwrap(module: nn.Module) -> None:
        for name, child in list(module.named_children()):
            inner = child
            while (original := getattr(inner, "original_component", None)) is not None:
                inner = original
            if not _addresses(child) <= _addresses(inner):
                continue
            if inner is not child:
                wrappers.append((module, name, child))
                setattr(module, name, inner)
            unwrap(inner)

    try:
        unwrap(bridge.original_model)
        yield
    finally:
        for module, name, wrapper in wrappers:
            setattr(module, name, wrapper)


@contextmanager
def evaluating(bridge: Bridge) -> Iterator[None]:
    """While open, dropout is off."""
    # The bridge lacks some modules of the Hugging Face model, such as the outermost one.
    modules = [*bridge.modules(), *bridge.original_model.modules()]
    training_modules = [module for module in modules if module.training]
    try:
        for module in training_modules:
            module.training = False
        yield
    finally:
        for module in training_modules:
            module.training = True


def right_padded(
    bridge: Bridge,
    texts: Sequence[Sequence[int]],
    batch_size: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of token ids on the model's device, and the length of each text on the CPU."""
    for start in range(0, len(texts), batch_size):
        rows = [torch.tensor(text) for text in texts[start : start + batch_size]]
        lengths = torch.tensor([len(row) for row in rows])
        # Any token can be the padding: attention is causal, so no text attends to it.
        tokens = pad_sequence(rows, batch_first=True)
        yield tokens.to(bridge.cfg.device), lengths


def _addresses(module: nn.Module) -> set[int]:
    """The memory addresses of a module's weights."""
    return {weight.untyped_storage().data_ptr() for weight in module.parameters()}
