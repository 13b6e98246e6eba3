"""Removing weights in place, and putting them back bit for bit."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from harmcircuits.circuits.masks import WeightMask
from harmcircuits.hooks.bridge import AnyModel, Bridge, as_bridge
from harmcircuits.hooks.provenance import warn_of_other_weights
from harmcircuits.hooks.weights import model_fingerprint, named_weights


@contextmanager
def masked(
    bridge: AnyModel,
    mask: WeightMask,
    *,
    scale: float = 0.0,
    hold: bool = False,
    same_model: bool = True,
) -> Iterator[Bridge]:
    """The model with the mask's weights multiplied by `scale`, restored bit for bit on any exit.

    In place, so hooks, caches, generation and patching all see the edited model; the cost is that
    of the mask, not of the model. Nests: leave in the reverse order of entering, as `with` does.

    >>> mask = hc.top_fraction(hc.removal_effect(bridge, harm), 0.001)
    >>> before = hc.completion_nll(bridge, harm)
    >>> with hc.masked(bridge, mask):
    ...     during = hc.completion_nll(bridge, harm)
    >>> during.mean() > before.mean(), (hc.completion_nll(bridge, harm) == before).all()
    (tensor(True), tensor(True))

    Args:
        bridge: a TransformerBridge, or a `Model`, whose bridge is edited.
        mask: the weights to remove.
        scale: what they are multiplied by; 0 removes them.
        hold: write them again after every `step()` of any torch optimiser, so that training
            cannot change them. Those that require a gradient get none. All other weights
            keep what training gave them.
        same_model: False applies the mask to another checkpoint of the same shapes.

    Raises:
        ValueError: a mask of another model or other shapes, and as `named_weights`; then nothing
            is changed.
    """
    bridge = as_bridge(bridge)
    edits = _edits(bridge, mask, same_model)

    def write(*_: object) -> None:
        for edit in edits:
            edit.write(edit.saved * scale if scale else 0.0)

    # From the first write on, whatever happens ends in `_write_all`.
    hooks = []
    try:
        _ACTIVE.setdefault(bridge, []).append(edits)
        if hold:
            # After the step, so that neither momentum nor weight decay moves what is held.
            hooks.append(register_optimizer_step_post_hook(write))
            hooks += _without_gradients(edits)
        write()
        yield bridge
    finally:
        for hook in hooks:
            hook.remove()
        _write_all(edits, [edit.saved for edit in edits])
        _forget(bridge, edits)


@contextmanager
def unmasked(bridge: AnyModel) -> Iterator[Bridge]:
    """Inside `masked`: the model as it was before the outermost mask, bit for bit.

    For what must read the unpruned model while a mask is on, such as a judge of the answers. On any
    exit the masked weights are again what they were, also where they were changed under the mask.
    All other weights stay as they are, and without a mask nothing happens. Not for training: a
    mask that is held is written again after every step.

    >>> mask = hc.top_fraction(hc.removal_effect(bridge, harm), 0.001)
    >>> before = hc.completion_nll(bridge, harm)
    >>> with hc.masked(bridge, mask), unmasked(bridge):
    ...     during = hc.completion_nll(bridge, harm)
    >>> (during == before).all()
    tensor(True)

    Args:
        bridge: a TransformerBridge, or a `Model`, whose bridge it is.
    """
    bridge = as_bridge(bridge)
    edits = list(chain.from_iterable(_ACTIVE.get(bridge, [])))
    masked_values = [edit.read() for edit in edits]
    try:
        # The outermost mask last: where masks overlap, its values are those from before them all.
        inner_first = edits[::-1]
        _write_all(inner_first, [edit.saved for edit in inner_first])
        yield bridge
    finally:
        _write_all(edits, masked_values)


def masked_if_given(
    bridge: Bridge, mask: WeightMask | None, *, hold: bool = False
) -> AbstractContextManager[Bridge]:
    """`masked`, or the model as it is where there is no mask."""
    return nullcontext(bridge) if mask is None else masked(bridge, mask, hold=hold)


class _Edit(NamedTuple):
    """The entries of one parameter that a mask edits.

    Attributes:
        parameter: The live weight.
        flat: Flat indices of the entries.
        saved: Their values before, from which they are restored: no arithmetic undoes an edit.
    """

    parameter: nn.Parameter
    flat: Int[Tensor, " n"]
    saved: Float[Tensor, " n"]

    def read(self) -> Float[Tensor, " n"]:
        """A copy of the entries as they are now."""
        tensor, where = _places(self.parameter, self.flat)
        return tensor[where]  # advanced indexing copies

    def write(self, values: Tensor | float) -> None:
        tensor, where = _places(self.parameter, self.flat)
        tensor[where] = values

    def without(self, gradient: Tensor) -> Tensor:
        """The gradient with zeros at the edited entries."""
        flat = gradient.flatten()
        return flat.index_fill(0, self.flat, 0.0).view(gradient.shape)


# The edits of every mask that is on, outermost first. Not on the bridge, which may be copied.
_ACTIVE: WeakKeyDictionary[Bridge, list[list[_Edit]]] = WeakKeyDictionary()


def _without_gradients(edits: Sequence[_Edit]) -> list[RemovableHandle]:
    """Hooks that take the gradients of what is held, where it has any.

    Else they would count in a gradient norm that is clipped, and would train the factors of a
    low-rank adapter (see `fine_tuning`).
    """
    learning = [edit for edit in edits if edit.parameter.requires_grad]
    return [edit.parameter.register_hook(edit.without) for edit in learning]


def _forget(bridge: Bridge, edits: list[_Edit]) -> None:
    # By identity: two contexts may hold equal edits.
    active = _ACTIVE.get(bridge, [])
    active[:] = [others for others in active if others is not edits]


def _places(parameter: nn.Parameter, index: Int[Tensor, " n"]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A view of the parameter, and where in it the flat indices are."""
    tensor = parameter.detach()
    if tensor.is_contiguous():
        return tensor.view(-1), (index,)
    # A transposed or split weight. Ten times as slow, but to write into a flat copy of it would
    # edit nothing.
    return tensor, torch.unravel_index(index, tensor.shape)


def _edits(bridge: Bridge, mask: WeightMask, same_model: bool) -> list[_Edit]:
    """What `masked` will write, with the values that it will restore; checks everything first."""
    if not isinstance(mask, WeightMask):
        raise ValueError(
            f"masked: expected a WeightMask, got {type(mask).__name__}; "
            "make one by find_circuit or top_fraction, or read one by WeightMask.load"
        )
    weights = named_weights(bridge)
    for name, shape in mask.shapes.items():
        if name not in weights:
            raise ValueError(
                f"the mask is of another model: it has {name}, which this model lacks; "
                "nothing was changed"
            )
        actual = tuple(weights[name].shape)
        if actual != tuple(shape):
            raise ValueError(
                f"the mask is of another model: {name} is {actual}, the mask's {tuple(shape)}; "
                "nothing was changed"
            )
    fingerprint = model_fingerprint(bridge)
    if same_model and mask.source.model != fingerprint:
        raise ValueError(
            f"the mask was made on model {mask.source.model}, this one is {fingerprint}; "
            "nothing was changed. "
            "Pass same_model=False to apply it to another checkpoint of the same shapes"
        )
    if same_model and not _ACTIVE.get(bridge):  # under a mask the weights are others anyway
        warn_of_other_weights(bridge, mask)

    edits = []
    for name, index in mask.removed.items():
        parameter = weights[name]
        index = index.to(parameter.device)
        tensor, where = _places(parameter, index)
        saved = tensor[where]  # advanced indexing copies
        edits.append(_Edit(parameter, index, saved))
    return edits


def _write_all(edits: Sequence[_Edit], values: Sequence[Tensor]) -> None:
    pairs = list(zip(edits, values, strict=True))
    try:
        for edit, value in pairs:
            edit.write(value)
    except KeyboardInterrupt:  # a second Ctrl-C must not leave the model half edited
        for edit, value in pairs:
            edit.write(value)
        raise
