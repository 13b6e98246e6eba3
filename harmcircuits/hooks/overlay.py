"""New values over some entries of a live model's weights, and what brings its own values back."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeGuard

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from harmcircuits.hooks.bridge import Bridge
from harmcircuits.hooks.layers import Layer, Patch, layers_on
from harmcircuits.hooks.weights import FLOAT_DTYPES, named_weights, stored_tensors

Values = Tensor | float
Places = Tensor | tuple[Tensor, ...]


class Edit:
    """New values for entries of one parameter."""

    def __init__(
        self,
        name: str,
        parameter: nn.Parameter,
        flat: Int[Tensor, " n"],
        new_values: Callable[[Tensor], Values],
    ) -> None:
        self.name = name
        self.parameter = parameter
        self.flat = flat
        self.new_values = new_values
        self.shape = parameter.shape
        self.saved: Tensor | None = None
        self.written: Values = 0.0
        self.left: Tensor | None = None

    def lay(self) -> None:
        """Save what is there, and write over it."""
        tensor, where = self._places()
        saved = _read(tensor, where)
        self.left = None
        self.written = self.new_values(saved)
        self.saved = saved  # from now on it can be lifted
        _write(tensor, where, self.written)

    def lift(self) -> None:
        """Write back what was there, as often as it is called."""
        if self.saved is None:
            return
        tensor, where = self._places()
        if self.left is None:
            self.left = _read(tensor, where)
        _write(tensor, where, self.saved)

    def lay_again(self) -> None:
        """Write over what has changed since."""
        _write(*self._places(), self.written)

    def undone(self, lower: Sequence["Edit"]) -> "Edit":
        """An edit that writes what was there before this one, but where `lower` ones lie below."""
        assert self.saved is not None
        is_own = torch.ones_like(self.flat, dtype=torch.bool)
        for edit in lower:
            if edit.name == self.name:
                is_own &= ~torch.isin(self.flat, edit.flat)
        before = self.saved[is_own.to(self.saved.device)]
        return Edit(self.name, self.parameter, self.flat[is_own], lambda _: before)

    def n_changed(self) -> int:
        """How many entries were no longer what was written."""
        assert self.left is not None
        written = torch.as_tensor(self.written).to(self.left.device, self.left.dtype)
        both_nan = self.left.isnan() & written.isnan()
        return int(((self.left != written) & ~both_nan).sum())

    def without(self, gradient: Tensor) -> Tensor:
        """The gradient with zeros at the entries."""
        flat = gradient.flatten()
        return flat.index_fill(0, self.flat.to(flat.device), 0.0).view(gradient.shape)

    def _places(self) -> tuple[Tensor, Places]:
        """A view of the parameter, and where in it the entries are."""
        tensor = self.parameter.detach()
        flat = self.flat
        if flat.device != tensor.device:
            flat = flat.to(tensor.device)
        if tensor.is_contiguous():
            return tensor.view(-1), flat
        # A transposed or split weight. Ten times as slow, but to write into a flat copy of it
        # would edit nothing.
        return tensor, torch.unravel_index(flat, tensor.shape)


def _read(tensor: Tensor, where: Places) -> Float[Tensor, " n"]:
    if isinstance(where, Tensor):
        return tensor.index_select(0, where)
    return tensor[where]  # advanced indexing copies


def _write(tensor: Tensor, where: Places, values: Values) -> None:
    # The model may have been cast or moved while the edit was on.
    if isinstance(values, Tensor) and (values.dtype, values.device) != (
        tensor.dtype,
        tensor.device,
    ):
        values = values.to(tensor.device, tensor.dtype)
    if not isinstance(where, Tensor):
        tensor[where] = values
    elif isinstance(values, Tensor):
        tensor.index_copy_(0, where, values)
    else:
        tensor.index_fill_(0, where, values)


class Overlay(Layer):
    """Edits of a live model that are on together."""

    def __init__(self, bridge: Bridge, edits: Sequence[Edit], *, hold: bool = False) -> None:
        """Args: bridge: The model. edits: What is written. hold: Write it again after every step of
        any torch optimiser.
        """
        super().__init__(bridge)
        self.edits = list(edits)
        self.hold = hold
        self._hooks: list[RemovableHandle] = []
        self._is_laid = False  # all is written, and nothing is lifted yet

    def _begin(self) -> None:
        if not self.hold:
            return
        # After the step, so that neither momentum nor weight decay moves what is held.
        self._hooks.append(register_optimizer_step_post_hook(self._write_again))

        # Gradients of what is held would count in a gradient norm that is clipped, and would train
        # the factors of a low-rank adapter (see `fine_tuning`).
        for edit in self.edits:
            if edit.parameter.requires_grad:
                hook = partial(self._without, edit)
                self._hooks.append(edit.parameter.register_hook(hook))

    def _end(self) -> None:
        for hook in self._hooks:
            hook.remove()

    # An interrupt between a hook's registration and the next bytecode leaves it without a handle
    # to remove it by. So both do nothing where the overlay is off.

    def _write_again(self, *_: object) -> None:
        if self.is_on:
            for edit in self.edits:
                edit.lay_again()

    def _without(self, edit: Edit, gradient: Tensor) -> Tensor:
        return edit.without(gradient) if self.is_on else gradient

    def _lay(self) -> None:
        for edit in self.edits:
            edit.lay()
        self._is_laid = True

    def _lift(self, is_trained: bool, /) -> None:
        if self._is_laid:
            self._follow()

        failure = None
        for edit in self.edits:
            try:
                edit.lift()
            except RuntimeError as error:
                failure = failure or error
                failure.add_note(
                    f"{edit.name}: what was under a mask could not be written back; "
                    "harmcircuits.hooks.masking.restore(bridge) tries again"
                )
        if failure:
            raise failure

        if self._is_laid and not is_trained:
            self._compare()
        self._is_laid = False

    def _underneath(self) -> list[Patch]:
        patches = []
        for edit in self.edits:
            if edit.saved is not None:
                patches.append(Patch(edit.parameter, edit.flat, edit.saved))
        return patches

    def _written(self) -> list[Patch]:
        return [Patch(edit.parameter, edit.flat, edit.written) for edit in self.edits]

    def _follow(self) -> None:
        """Point the edits at the parameters that the model consists of by now."""
        if self.bridge._weights_processed:
            self._report(
                "enable_compatibility_mode was switched on while a mask was on: it has folded the "
                "masked weights into others, which cannot be undone. Open the model again, and "
                "switch it on outside the mask."
            )
            self.edits = []
            return

        live = _live_tensors(self.bridge)
        usable = []
        for edit in self.edits:
            tensor = live.get(edit.name)
            if tensor is not edit.parameter and _is_writable(edit.parameter, edit):
                edit.lift()  # somebody may hold the old parameter still
                edit.left = None
            if _is_writable(tensor, edit):
                edit.parameter = tensor
                usable.append(edit)
            else:
                self._report(
                    f"{edit.name} {tuple(edit.shape)} became {_described(tensor)} while a mask "
                    "was on, so what the mask removed cannot be put back. Open the model again, "
                    "and quantise or shard it outside the mask."
                )
        self.edits = usable

    def _compare(self) -> None:
        """Report entries that were changed by others."""
        if not self._is_any_changed():
            return
        names = []
        n_changed = 0
        for edit in self.edits:
            if n := edit.n_changed():
                n_changed += n
                names.append(edit.name)
        if not names:
            return
        rest = f" and {len(names) - 1} other matrices" if len(names) > 1 else ""
        self._report(
            f"{n_changed} masked weights of {names[0]}{rest} were changed while the mask "
            "was on. They are again what they were before the mask, and all other weights "
            "are as you left them. Train under masked(..., hold=True) or by fine_tuning, and load "
            "or merge weights outside the mask."
        )

    def _is_any_changed(self) -> bool:
        # One question for all: on a GPU every answer waits for the device.
        left = [edit.left for edit in self.edits if edit.left is not None]
        if not left:
            return False
        device = left[0].device
        written = []
        for edit in self.edits:
            if isinstance(edit.written, Tensor):
                written.append(edit.written)
        values = torch.cat([part.to(device) for part in left])
        if not written:  # all zero
            return bool(values.any())
        return not torch.equal(values, torch.cat([part.to(values) for part in written]))

    def _report(self, fault: str) -> None:
        if fault not in self.faults:
            self.faults.append(fault)


def _live_tensors(bridge: Bridge) -> dict[str, Tensor]:
    try:
        return dict(named_weights(bridge))
    except ValueError:  # a block is quantised, sharded or another one by now
        return stored_tensors(bridge)


def _is_writable(tensor: Tensor | None, edit: Edit) -> TypeGuard[nn.Parameter]:
    """Whether the edit's saved values fit into a tensor of the model."""
    return (
        isinstance(tensor, nn.Parameter)
        and tensor.shape == edit.shape
        and tensor.dtype in FLOAT_DTYPES
        and not tensor.is_meta
    )


def _described(tensor: Tensor | None) -> str:
    if tensor is None:
        return "no weight of the model"
    return f"a {type(tensor).__name__} of {tensor.dtype} {tuple(tensor.shape)}"


def overlays_on(bridge: Bridge) -> list[Overlay]:
    """The overlays that are on, the lowest first."""
    return [layer for layer in layers_on(bridge) if isinstance(layer, Overlay)]
