"""Removing weights in place, and putting them back bit for bit."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor

from harmcircuits.circuits.masks import WeightMask
from harmcircuits.hooks.bridge import AnyModel, Bridge, as_bridge
from harmcircuits.hooks.layers import layers_on
from harmcircuits.hooks.overlay import Edit, Overlay, Values, overlays_on
from harmcircuits.hooks.provenance import warn_of_other_weights
from harmcircuits.hooks.weights import weights_and_fingerprint

Scale = float | Mapping[str, Tensor]
"""One factor for all weights of a mask, or a tensor for each matrix, ordered as `mask.removed`."""


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
    them: cast, moved and replaced parameters get the saved values too, and a change of their values
    is reported once they are back.

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
        ValueError: a mask of another model or other shapes, factors that do not fit it, a second
            thread, and as `named_weights`; then nothing is changed. On leaving: masked weights were
            changed, quantised, sharded or folded (`enable_compatibility_mode`) under the mask. An
            exception from the body gets a note instead.
    """
    bridge = as_bridge(bridge)
    edits = _edits(bridge, mask, scale, same_model)
    yield from Overlay(bridge, edits, hold=hold).during(bridge)


@contextmanager
def unmasked(bridge: AnyModel) -> Iterator[Bridge]:
    """Inside `masked`: the model as it was before the outermost mask, bit for bit."""
    bridge = as_bridge(bridge)
    edits = []
    lower = []
    # Where masks overlap, what the outermost has saved is from before them all.
    for overlay in overlays_on(bridge):
        edits += [edit.undone(lower) for edit in overlay.edits]
        lower += overlay.edits
    yield from Overlay(bridge, edits).during(bridge)


def masked_if_given(
    bridge: Bridge, mask: WeightMask | None, **options: Any
) -> AbstractContextManager[Bridge]:
    """`masked`, or the model as it is where there is no mask."""
    return nullcontext(bridge) if mask is None else masked(bridge, mask, **options)


def restore(bridge: AnyModel) -> None:
    """Take off every mask that is still on a model, and end every `fine_tuning` of it."""
    faults = []
    for layer in reversed(layers_on(as_bridge(bridge))):
        layer.take_off()
        faults += layer.faults
    if faults:
        raise ValueError(" ".join(faults))


def _edits(bridge: Bridge, mask: WeightMask, scale: Scale, same_model: bool) -> list[Edit]:
    """What `masked` will write; checks everything first."""
    if not isinstance(mask, WeightMask):
        raise ValueError(
            f"masked: expected a WeightMask, got {type(mask).__name__}; "
            "make one by find_circuit or top_fraction, or read one by WeightMask.load"
        )
    weights, fingerprint = weights_and_fingerprint(bridge)
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
    if same_model and mask.source.model != fingerprint:
        raise ValueError(
            f"the mask was made on model {mask.source.model}, this one is {fingerprint}; "
            "nothing was changed. "
            "Pass same_model=False to apply it to another checkpoint of the same shapes"
        )
    if same_model and not layers_on(bridge):  # under a mask the weights are others anyway
        warn_of_other_weights(bridge, mask)

    edits = []
    for name, index in mask.removed.items():
        new_values = _new_values(scale, name, len(index))
        edits.append(Edit(name, weights[name], index, new_values))
    return edits


def _new_values(scale: Scale, name: str, n: int) -> Callable[[Tensor], Values]:
    if not isinstance(scale, Mapping):
        return partial(_scaled, scale)
    factors = scale.get(name)
    if factors is None or tuple(factors.shape) != (n,):
        given = "none" if factors is None else f"a tensor {tuple(factors.shape)}"
        raise ValueError(
            f"masked: scale has {given} for {name}, of which the mask removes {n} weights; "
            "expected one factor for each, in the order of mask.removed; nothing was changed"
        )
    return partial(_scaled, factors)


def _scaled(factor: Values, saved: Tensor) -> Values:
    if isinstance(factor, Tensor):
        return (saved * factor.to(saved.device)).to(saved.dtype)
    return saved * factor if factor else 0.0
