"""Bridges: what this package needs of a model, and the bridge of what a user passes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor, nn

REMEDY = "open it with harmcircuits.open_model(...) or TransformerBridge.boot_transformers(folder)"


@runtime_checkable
class Bridge(Protocol):
    """What this package needs of TransformerLens's `TransformerBridge`."""

    cfg: Any
    tokenizer: Any
    original_model: Any
    _weights_processed: bool

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """`blocks` and other components, which a bridge has as modules and does not declare."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Logits [batch pos vocab] of tokens [batch pos]."""

    @property
    def hook_dict(self) -> Any:
        """Every hook point by name."""

    def hooks(self, fwd_hooks: Any = ..., bwd_hooks: Any = ...) -> Any:
        """A context manager under which functions are called at hook points."""

    def run_with_cache(self, *args: Any, **kwargs: Any) -> Any:
        """Logits, and the activations at hook points by name."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Every parameter of the Hugging Face model once."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter of the Hugging Face model once, by its Hugging Face name."""
        ...

    def buffers(self) -> Iterator[Tensor]:
        """Every buffer of the bridge's modules."""
        ...

    def modules(self) -> Iterator[nn.Module]:
        """The bridge's modules, among which are most of the Hugging Face model's."""
        ...

    def state_dict(self, *, keep_vars: bool = False) -> Any:
        """The tensors by clean TransformerLens name; with `keep_vars` the live parameters."""


@runtime_checkable
class HasBridge(Protocol):
    """What holds a bridge: a `harmcircuits.Model`."""

    @property
    def bridge(self) -> Any:
        """The bridge."""


AnyModel = Bridge | HasBridge
"""Functions that work on a bridge take either the bridge itself or the Model that holds it."""


def as_bridge(model: Any) -> Bridge:
    """The bridge of a model, or the bridge itself."""
    bridge = getattr(model, "bridge", model)
    # Three names that nothing else has together. A stub in a test need not have more.
    if all(hasattr(bridge, name) for name in ("original_model", "blocks", "cfg")):
        return bridge

    given = f"{type(bridge).__module__}.{type(bridge).__name__}"
    raise ValueError(f"expected a TransformerBridge or a harmcircuits.Model, not {given}: {REMEDY}")


@contextmanager
def unhooked(bridge: Bridge) -> Iterator[None]:
    """While open, `bridge.original_model` runs without hook points: the same function, faster."""
    # A bridge stands in the place of each module that it wraps, and modules lie within modules.
    # It stays where it holds copies of what was fused: these are the weights that masks edit.
    wrapped: list[tuple[nn.Module, str, nn.Module]] = []

    def unwrap(module: nn.Module) -> None:
        for name, child in list(module.named_children()):
            inner = child
            while (original := getattr(inner, "original_component", None)) is not None:
                inner = original
            if not _memory(child) <= _memory(inner):
                continue
            if inner is not child:
                wrapped.append((module, name, child))
                setattr(module, name, inner)
            unwrap(inner)

    try:
        unwrap(bridge.original_model)
        yield
    finally:
        for module, name, child in wrapped:
            setattr(module, name, child)


def _memory(module: nn.Module) -> set[int]:
    """Where its weights lie."""
    return {weight.untyped_storage().data_ptr() for weight in module.parameters()}
