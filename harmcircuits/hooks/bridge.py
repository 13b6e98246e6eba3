"""Bridges: what this package needs of a model, and the bridge of what a user passes."""

from collections.abc import Iterator
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
