"""Removing weights in place, and putting them back bit for bit."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Protocol, TypeVar, runtime_checkable
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from harmcircuits.circuits.masks import WeightMask
from harmcircuits.display import listed
from harmcircuits.hooks.bridge import AnyModel, Bridge, as_bridge
from harmcircuits.hooks.weights import (
    named_weights,
    refuse_other_model,
    warn_of_other_weights,
)

Scale = float | Mapping[str, Tensor]
"""One factor for all weights of a mask, or a tensor for each matrix, ordered as `mask.removed`."""

Places = tuple[Tensor, ...]
Given = TypeVar("Given")


@contextmanager
def masked(
    bridge: AnyModel,
    mask: WeightMask,
    *,
    scale: Scale = 0.0,
    hold: bool = False,
    same_model: bool = True,
) -> Iterator[Bridge]:
    """The model with the mask's weights multiplied by `scale`, restored bit for bit on any exit.

    In place, so hooks, caches, generation and patching all see the edited model; the cost is that
    of the mask, not of the model. Nests, within one thread.

    Weights outside the mask stay as they are left. The masked ones come back whatever was done to
    their values, and a change of them is reported once they are back.

    >>> mask = hc.top_fraction(hc.removal_effect(bridge, harm), 0.001)
    >>> before = hc.completion_nll(bridge, harm)
    >>> with hc.masked(bridge, mask):
    ...     during = hc.completion_nll(bridge, harm)
    >>> during.mean() > before.mean(), (hc.completion_nll(bridge, harm) == before).all()
    (tensor(True), tensor(True))

    Args:
        bridge: a TransformerBridge, or a `Model`, whose bridge is edited.
        mask: the weights to remove.
        scale: what they are multiplied by; 0 removes them. Or factors for each matrix by name, in
            the order of `mask.removed`.
        hold: write them again after every `step()` of any torch optimiser, so that training
            cannot change them. Those that require a gradient get none. All other weights
            keep what training gave them.
        same_model: False applies the mask to another checkpoint of the same shapes.

    Raises:
        ValueError: a mask of another model or other shapes, and as `named_weights`; then nothing
            is changed. On leaving: masked weights were changed or replaced under the mask. An
            exception from the body gets a note instead.
    """
    bridge = as_bridge(bridge)
    edits = _edits(bridge, mask, scale, same_model)
    yield from during(bridge, Edits(bridge, edits, hold=hold), bridge)


@contextmanager
def unmasked(bridge: AnyModel) -> Iterator[Bridge]:
    """Inside `masked`: the model as it was before the outermost mask, bit for bit."""
    bridge = as_bridge(bridge)
    edits = []
    for layer in reversed(_ON.get(bridge.original_model, [])):
        if isinstance(layer, Edits):
            edits += [edit.undone() for edit in reversed(layer.edits)]
    yield from during(bridge, Edits(bridge, edits), bridge)


def masked_if_given(
    bridge: Bridge, mask: WeightMask | None, **options: Any
) -> AbstractContextManager[Bridge]:
    """`masked`, or the model as it is where there is no mask."""
    return nullcontext(bridge) if mask is None else masked(bridge, mask, **options)


def restore(bridge: AnyModel) -> None:
    """Take off whatever an interrupt has left on a model: masks and fine-tuning."""
    layers = _ON.get(as_bridge(bridge).original_model, [])
    if layers:
        _take_off(layers, layers[0])


def is_edited(bridge: Bridge) -> bool:
    """Whether a mask or a fine-tuning is on."""
    return bool(_ON.get(bridge.original_model))


@runtime_checkable
class Layer(Protocol):
    """A change of a live model that lies over those that were made before it."""

    def put_on(self) -> None:
        """Change the model. All is checked before."""

    def take_off(self) -> None:
        """Put it back, as often as it is called; also where `put_on` was cut short."""

    @property
    def fault(self) -> str:
        """What keeps the model from being as it was."""
        ...


# The layers of every Hugging Face model, over which two bridges may lie, the lowest first. Not kept
# on the model itself, which may be copied.
_ON: WeakKeyDictionary[nn.Module, list[Layer]] = WeakKeyDictionary()


def during(bridge: Bridge, layer: Layer, given: Given) -> Iterator[Given]:
    """The body of a context manager: the layer is on at the `yield`, and off on any exit."""
    layers = _ON.setdefault(bridge.original_model, [])
    try:
        try:
            layers.append(layer)
            layer.put_on()
            yield given
            if layer not in layers:
                raise ValueError(
                    "a mask or fine-tuning came off before its end, since one below it was left: "
                    "leave those of one model in the order of `with`, the last one first"
                )
        finally:
            _take_off(layers, layer)
    except BaseException as error:
        _take_off(layers, layer)  # again, where an interrupt has cut the first one short
        if layer.fault:
            error.add_note(layer.fault)
        raise
    if layer.fault:
        raise ValueError(layer.fault)


def _take_off(layers: list[Layer], layer: Layer) -> None:
    # Those above it have saved what this one wrote, so they come off first.
    while layer in layers:
        layers[-1].take_off()
        layers.pop()


class Edit:
    """New values over some entries of a parameter."""

    def __init__(
        self,
        name: str,
        parameter: nn.Parameter,
        index: Int[Tensor, " n"],
        new_values: Callable[[Tensor], Tensor],
    ) -> None:
        self.name = name
        self.parameter = parameter
        self.index = index
        self.new_values = new_values
        self.saved: Tensor | None = None
        self.new = torch.empty(0)

    def lay(self) -> None:
        """Save what is there, and write over it."""
        weight, places = self._places()
        saved = weight[places]
        self.new = self.new_values(saved)
        self.saved = saved  # from now on it can be lifted
        weight[places] = self.new

    def lay_again(self) -> None:
        """Write over what has changed since, if it lies there still."""
        if self.saved is not None:
            weight, places = self._places()
            weight[places] = self.new.to(weight)

    def lift(self) -> bool:
        """Write back what was there. Returns whether others had changed what lay over it."""
        if self.saved is None:
            return False
        weight, places = self._places()
        is_changed = not torch.equal(weight[places], self.new.to(weight))
        weight[places] = self.saved.to(weight)
        self.saved = None
        return is_changed

    def undone(self) -> "Edit":
        """An edit that writes what was there before this one."""
        saved = self.saved
        assert saved is not None
        return Edit(self.name, self.parameter, self.index, lambda _: saved)

    def without(self, gradient: Tensor) -> Tensor:
        """The gradient with zeros at the entries."""
        index = self.index.to(gradient.device)
        return gradient.flatten().index_fill(0, index, 0.0).view(gradient.shape)

    def _places(self) -> tuple[Tensor, Places]:
        """The parameter, and where in it the entries are."""
        weight = self.parameter.detach()
        index = self.index.to(weight.device)  # the model may have been moved meanwhile
        if weight.is_contiguous():
            return weight.view(-1), (index,)
        # A split weight. Five times as slow, but to write into a flat copy would edit nothing.
        return weight, torch.unravel_index(index, weight.shape)


class Edits:
    """Edits of a live model that are on together."""

    def __init__(self, bridge: Bridge, edits: Sequence[Edit], *, hold: bool = False) -> None:
        self.bridge = bridge
        self.edits = edits
        self.hold = hold
        self.changed: set[str] = set()
        self._hooks: list[RemovableHandle] = []

    def put_on(self) -> None:
        for edit in self.edits:
            edit.lay()
        if not self.hold:
            return
        # After the step, so that neither momentum nor weight decay moves what is held.
        self._hooks.append(register_optimizer_step_post_hook(self._lay_again))
        # Gradients of what is held would count in a gradient norm that is clipped, and would train
        # the factors of a low-rank adapter (see `fine_tuning`).
        for edit in self.edits:
            if edit.parameter.requires_grad:
                self._hooks.append(edit.parameter.register_hook(edit.without))

    def take_off(self) -> None:
        for hook in self._hooks:
            hook.remove()
        live = {id(parameter) for parameter in self.bridge.blocks.parameters()}
        for edit in reversed(self.edits):
            is_changed = edit.lift()
            if is_changed or id(edit.parameter) not in live:
                self.changed.add(edit.name)

    @property
    def fault(self) -> str:
        if not self.changed:
            return ""
        names = listed(sorted(self.changed))
        return (
            f"masked weights of {names} were changed or replaced while the mask was on. What was "
            "changed is again as before the mask, what was replaced is not. Train under "
            "masked(..., hold=True) or by fine_tuning; load, merge, fold and quantise weights "
            "outside the mask."
        )

    def _lay_again(self, *_: object) -> None:
        for edit in self.edits:
            edit.lay_again()


def _edits(bridge: Bridge, mask: WeightMask, scale: Scale, same_model: bool) -> list[Edit]:
    """What `masked` will write; checks everything first."""
    if not isinstance(mask, WeightMask):
        raise ValueError(f"masked: expected a WeightMask, got {type(mask).__name__}")
    weights = named_weights(bridge)
    for name, shape in mask.shapes.items():
        actual = tuple(weights[name].shape) if name in weights else "not there"
        if actual != tuple(shape):
            raise ValueError(
                f"the mask is of another model: {name} is {actual} in this one, in the mask "
                f"{tuple(shape)}; nothing was changed"
            )
    if same_model:
        refuse_other_model(bridge, mask)
        if not is_edited(bridge):  # under a mask the weights are others anyway
            warn_of_other_weights(bridge, mask)

    edits = []
    for name, index in mask.removed.items():
        factor = scale[name] if isinstance(scale, Mapping) else scale
        edits.append(Edit(name, weights[name], index, partial(_scaled, factor)))
    return edits


def _scaled(factor: Any, saved: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    if isinstance(factor, Tensor):
        return (saved * factor.to(saved.device)).to(saved.dtype)
    # Not a product: -1 times 0 is -0, and infinity times 0 is NaN.
    return saved * factor if factor else torch.zeros_like(saved)
