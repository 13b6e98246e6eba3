"""Removing weights in place, and putting them back bit for bit."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformer_lens.model_bridge import TransformerBridge

from harmcircuits.circuits.masks import WeightMask
from harmcircuits.hooks.weights import model_fingerprint, named_weights


class _Edit(NamedTuple):
    parameter: nn.Parameter
    flat: Int[Tensor, " n"]
    saved: Float[Tensor, " n"]

    def write(self, values: Tensor | float) -> None:
        tensor, where = _places(self.parameter, self.flat)
        tensor[where] = values

    def without(self, gradient: Tensor) -> Tensor:
        return gradient.flatten().index_fill(0, self.flat, 0.0).view(gradient.shape)


def _places(parameter: nn.Parameter, index: Int[Tensor, " n"]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A view of the parameter and where in it the flat indices are."""
    tensor = parameter.detach()
    if tensor.is_contiguous():
        return tensor.view(-1), (index,)
    return tensor, torch.unravel_index(index, tensor.shape)  # ten times as slow, but a flat view would be a copy


@contextmanager
def masked(
    bridge: TransformerBridge, mask: WeightMask, *, scale: float = 0.0, same_model: bool = True
) -> Iterator[TransformerBridge]:
    """The model with the mask's weights multiplied by `scale` (0: removed), restored bit for bit on any exit.

    In place, so hooks, caches, generation and patching all see the edited model; the cost is that of the mask, not of the
    model. Nests: leave in the reverse order of entering, as `with` does. `same_model=False` allows another checkpoint of
    the same shapes. Raises ValueError, with nothing changed, for a mask of another model or other shapes, and as
    `named_weights`.
    """
    edits = _edits(bridge, mask, same_model)
    try:
        for edit in edits:
            edit.write(edit.saved * scale if scale else 0.0)
        yield bridge
    finally:
        _restore(edits)


@contextmanager
def held(bridge: TransformerBridge, mask: WeightMask, *, same_model: bool = True) -> Iterator[TransformerBridge]:
    """As `masked`, and the weights are zero again after every `step()` of any torch optimiser while this is open.

    Works with momentum and weight decay, because it writes the zeros after the step. Weights that require a gradient get
    none at these entries, so that neither a norm nor a factorised weight (see `fine_tuning`) learns from them. The saved
    values come back on exit; all other weights keep what training gave them. Raises ValueError as `masked`.
    """
    edits = _edits(bridge, mask, same_model)

    def zero(*_: object) -> None:
        for edit in edits:
            edit.write(0.0)

    hooks = [register_optimizer_step_post_hook(zero)]
    hooks += [edit.parameter.register_hook(edit.without) for edit in edits if edit.parameter.requires_grad]
    try:
        zero()
        yield bridge
    finally:
        for hook in hooks:
            hook.remove()
        _restore(edits)


def _edits(bridge: TransformerBridge, mask: WeightMask, same_model: bool) -> list[_Edit]:
    weights = named_weights(bridge)
    for name, shape in mask.shapes.items():
        if name not in weights:
            raise ValueError(f"the mask is of another model: it has {name}, which this model lacks; nothing was changed")
        if tuple(weights[name].shape) != tuple(shape):
            has, expected = tuple(weights[name].shape), tuple(shape)
            raise ValueError(f"the mask is of another model: {name} is {has}, the mask's {expected}; nothing was changed")
    if same_model and mask.source.model != (fingerprint := model_fingerprint(bridge)):
        raise ValueError(
            f"the mask was made on model {mask.source.model}, this one is {fingerprint}; nothing was changed. "
            "Pass same_model=False to apply it to another checkpoint of the same shapes"
        )
    edits = []
    for name, index in mask.removed.items():
        parameter = weights[name]
        index = index.to(parameter.device)
        tensor, where = _places(parameter, index)
        edits.append(_Edit(parameter, index, tensor[where]))
    return edits


def _restore(edits: list[_Edit]) -> None:
    try:
        for edit in edits:
            edit.write(edit.saved)
    except KeyboardInterrupt:  # a second Ctrl-C must not leave the model half edited
        for edit in edits:
            edit.write(edit.saved)
        raise
