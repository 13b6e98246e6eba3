"""Weights are removed in place, and restored bit for bit."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
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

Value = TypeVar("Value")


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

    The edit is in place, so hooks, caches, generation and patching all use the edited model; the
    cost is that of the mask, not of the model. Nests, within one thread.

    Weights outside the mask keep any change. The masked weights are restored whatever was done to
    their values; an error then reports the change.

    >>> mask = hc.top_fraction(hc.removal_effect(bridge, harm), 0.001)
    >>> before = hc.completion_nll(bridge, harm)
    >>> with hc.masked(bridge, mask):
    ...     during = hc.completion_nll(bridge, harm)
    >>> during.mean() > before.mean(), (hc.completion_nll(bridge, harm) == before).all()
    (tensor(True), tensor(True))

    Args:
        bridge: the model.
        mask: the weights to remove.
        scale: the factor of the weights; 0 removes them. Or factors for each matrix by name, in the
            order of `mask.removed`.
        hold: write the weights again after every `step()` of any torch optimiser, so that training
            cannot change them. They get no gradient. All other weights keep what they learn.
        same_model: False applies the mask to another checkpoint of the same shapes.

    Raises:
        ValueError: a mask of another model or other shapes, and as `named_weights`; then nothing
            is changed. On exit: masked weights were changed or replaced under the mask. If the body
            raised an exception, that exception gets a note instead.
    """
    bridge = as_bridge(bridge)
    edits = _edits(bridge, mask, scale, same_model)
    yield from during(bridge, Edits(bridge, edits, hold=hold), bridge)


@contextmanager
def unmasked(bridge: AnyModel) -> Iterator[Bridge]:
    """Inside `masked`: the model without any mask, bit for bit."""
    bridge = as_bridge(bridge)
    edits = []
    for change in reversed(_CHANGES.get(bridge.original_model, [])):
        if isinstance(change, Edits):
            edits += [edit.inverse() for edit in reversed(change.edits) if edit.is_on]
    yield from during(bridge, Edits(bridge, edits), bridge)


def masked_if_given(
    bridge: Bridge, mask: WeightMask | None, **options: Any
) -> AbstractContextManager[Bridge]:
    """`masked`, or the model as it is if there is no mask."""
    return nullcontext(bridge) if mask is None else masked(bridge, mask, **options)


def restore(bridge: AnyModel) -> None:
    """Take off the masks and fine-tunings that an interrupt has left on a model."""
    changes = _CHANGES.get(as_bridge(bridge).original_model, [])
    if changes:
        _take_off(changes, changes[0])


def is_edited(bridge: Bridge) -> bool:
    """Whether a mask or a fine-tuning is on."""
    return bool(_CHANGES.get(bridge.original_model))


@runtime_checkable
class WeightChange(Protocol):
    """A change of a live model's weights that can be taken off."""

    def put_on(self) -> None:
        """Change the model. Everything is checked before."""

    def take_off(self) -> None:
        """Restore the model; may be called again, and after an interrupted `put_on`."""

    @property
    def fault(self) -> str:
        """Why the model could not be restored; empty if it could."""
        ...


# The changes of each Hugging Face model that are on, the oldest first. Two bridges may share such a
# model. They are not attributes of the model, because a model may be copied.
_CHANGES: WeakKeyDictionary[nn.Module, list[WeightChange]] = WeakKeyDictionary()


def during(bridge: Bridge, change: WeightChange, value: Value) -> Iterator[Value]:
    """The body of a context manager: the change is on at the `yield`, and off on any exit."""
    changes = _CHANGES.setdefault(bridge.original_model, [])
    try:
        try:
            changes.append(change)
            change.put_on()
            yield value
            if change not in changes:
                raise ValueError(
                    "a mask or fine-tuning was removed early, because an outer `with` ended first; "
                    "leave those of one model in reverse order, the last one first"
                )
        finally:
            _take_off(changes, change)
    except BaseException as error:
        _take_off(changes, change)  # again: an interrupt may have cut the first call short
        if change.fault:
            error.add_note(change.fault)
        raise
    if change.fault:
        raise ValueError(change.fault)


def _take_off(changes: list[WeightChange], change: WeightChange) -> None:
    # Later changes have saved the values that this one wrote, so they come off first.
    while change in changes:
        changes[-1].take_off()
        changes.pop()


@dataclass(eq=False)
class Edit:
    """New values for some entries of a parameter."""

    name: str
    parameter: nn.Parameter
    index: Int[Tensor, " n"]
    new_values: Callable[[Tensor], Tensor]
    old: Tensor = field(init=False)
    new: Tensor = field(init=False)
    is_on: bool = False

    def put_on(self) -> None:
        """Save the entries, and write the new values."""
        weight, places = self._entries()
        self.old = weight[places]
        self.new = self.new_values(self.old)
        self.is_on = True  # before the write, which an interrupt may cut short
        weight[places] = self.new

    def put_on_again(self) -> None:
        """Write the new values again, over the changes of an optimiser."""
        weight, places = self._entries()
        weight[places] = self.new.to(weight)

    def take_off(self) -> bool:
        """Restore the entries. Returns whether other code had changed the new values."""
        if not self.is_on:
            return False
        weight, places = self._entries()
        is_changed = not torch.equal(weight[places], self.new.to(weight))
        weight[places] = self.old.to(weight)
        self.is_on = False
        return is_changed

    def inverse(self) -> "Edit":
        """An edit that writes the old values of this one."""
        return Edit(self.name, self.parameter, self.index, lambda _: self.old)

    def zero_gradient(self, gradient: Tensor) -> Tensor:
        """The gradient with zeros at the entries."""
        index = self.index.to(gradient.device)
        return gradient.flatten().index_fill(0, index, 0.0).view(gradient.shape)

    def _entries(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The parameter's values, and the index of the edited entries."""
        weight = self.parameter.detach()
        index = self.index.to(weight.device)  # the model may have moved since
        if weight.is_contiguous():
            return weight.view(-1), (index,)
        # A split weight. Five times as slow, but a write into a flat copy would edit nothing.
        return weight, torch.unravel_index(index, weight.shape)


@dataclass(eq=False)
class Edits:
    """The edits of one mask on a live model."""

    bridge: Bridge
    edits: Sequence[Edit]
    hold: bool = False
    conflicts: set[str] = field(default_factory=set)
    hooks: list[RemovableHandle] = field(default_factory=list)

    def put_on(self) -> None:
        for edit in self.edits:
            edit.put_on()
        if not self.hold:
            return
        # After the step, so that neither momentum nor weight decay moves the weights.
        self.hooks.append(register_optimizer_step_post_hook(self._put_on_again))
        # Their gradients would count in the norm for gradient clipping, and would train the factors
        # of a low-rank adapter (see `fine_tuning`).
        for edit in self.edits:
            if edit.parameter.requires_grad:
                self.hooks.append(edit.parameter.register_hook(edit.zero_gradient))

    def take_off(self) -> None:
        for hook in self.hooks:
            hook.remove()
        live = {id(parameter) for parameter in self.bridge.blocks.parameters()}
        for edit in reversed(self.edits):
            is_changed = edit.take_off()
            if is_changed or id(edit.parameter) not in live:
                self.conflicts.add(edit.name)

    @property
    def fault(self) -> str:
        if not self.conflicts:
            return ""
        names = listed(sorted(self.conflicts))
        return (
            f"masked weights of {names} were changed or replaced while the mask was on. Changed "
            "weights are restored, replaced weights are not. Train under masked(..., hold=True) or "
            "by fine_tuning; load, merge, fold and quantise weights outside the mask."
        )

    def _put_on_again(self, *_: object) -> None:
        for edit in self.edits:
            edit.put_on_again()


def _edits(bridge: Bridge, mask: WeightMask, scale: Scale, same_model: bool) -> list[Edit]:
    """The edits that `masked` will write, after all checks."""
    if not isinstance(mask, WeightMask):
        raise ValueError(f"masked: expected a WeightMask, got {type(mask).__name__}")
    weights = named_weights(bridge)
    for name, shape in mask.shapes.items():
        actual = tuple(weights[name].shape) if name in weights else "missing"
        if actual != tuple(shape):
            raise ValueError(
                f"the mask is of another model: {name} is {actual} in this model, and "
                f"{tuple(shape)} in the mask; nothing was changed"
            )
    if same_model:
        refuse_other_model(bridge, mask)
        if not is_edited(bridge):  # a mask or fine-tuning changes the digest anyway
            warn_of_other_weights(bridge, mask)

    edits = []
    for name, index in mask.removed.items():
        factor = scale[name] if isinstance(scale, Mapping) else scale
        edits.append(Edit(name, weights[name], index, partial(_scaled, factor)))
    return edits


def _scaled(factor: Any, values: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    if isinstance(factor, Tensor):
        return (values * factor.to(values.device)).to(values.dtype)
    # Not a product: -1 times 0 is -0, and infinity times 0 is NaN.
    return values * factor if factor else torch.zeros_like(values)
