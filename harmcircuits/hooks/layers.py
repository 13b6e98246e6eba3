"""Changes that lie over a live model one on another, each of which comes off at any time."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from threading import get_ident
from typing import NamedTuple, TypeVar
from weakref import WeakKeyDictionary

from jaxtyping import Int
from torch import Tensor, nn

from harmcircuits.hooks.bridge import Bridge

Given = TypeVar("Given")


class Patch(NamedTuple):
    """Values at flat indices of a parameter; without indices those of all its entries."""

    parameter: nn.Parameter
    flat: Int[Tensor, " n"] | None
    values: Tensor | float


class Layer:
    """A change of a live model, and what is underneath."""

    trains = False

    def __init__(self, bridge: Bridge) -> None:
        self.bridge = bridge
        self.thread = get_ident()
        self.faults: list[str] = []
        self._is_leaving = False

    @property
    def is_on(self) -> bool:
        """Whether it has been put on, and not yet taken off to the end."""
        return self in _ON.get(self.bridge, ())

    def during(self, given: Given) -> Iterator[Given]:
        """The body of a context manager: on at the `yield`, off on any exit."""
        try:
            try:
                self.put_on()
                yield given
            finally:
                self.take_off()
        except BaseException as error:
            self.take_off()  # again, where an interrupt has cut the first one short
            for fault in self.faults:
                error.add_note(fault)
            raise
        if self.faults:
            raise ValueError(" ".join(self.faults))

    def put_on(self) -> None:
        """Change the model."""
        layers = _ON.setdefault(self.bridge, [])
        for layer in layers[::-1]:
            if layer._is_leaving:  # a third interrupt has stopped it
                layer.take_off()

        # Before anything is written: what is on this list can be taken off.
        layers.append(self)
        if any(layer.thread != self.thread for layer in layers):
            layers.remove(self)
            raise ValueError(
                "another thread has a mask on this model, or trains it, and both would write the "
                "same weights; use one thread, or a bridge of its own for each"
            )
        self._begin()
        self._lay()

    def take_off(self) -> None:
        """Put the model back."""
        layers = _ON.get(self.bridge, [])
        if self not in layers:
            return
        self._is_leaving = True

        # Contexts that are left in another order than `with` does, as generators may be: those
        # above have saved what this one wrote.
        above = layers[layers.index(self) + 1 :]
        is_trained = any(layer.trains for layer in above)
        for layer in reversed(above):
            if not layer.trains:
                layer._lift(is_trained)
        self._lift(is_trained)

        patches = self._underneath()
        for layer in above:
            if layer.trains:
                layer._correct(patches)
            else:
                layer._lay()
                patches += layer._written()

        self._end()
        layers.remove(self)

    @abstractmethod
    def _begin(self) -> None:
        """Register hooks."""

    @abstractmethod
    def _end(self) -> None:
        """Remove them."""

    @abstractmethod
    def _lay(self) -> None:
        """Save what is there, and write over it."""

    @abstractmethod
    def _lift(self, is_trained: bool, /) -> None:
        """Write what was there; where nothing trains, report what no longer lay over it."""

    @abstractmethod
    def _underneath(self) -> list[Patch]:
        """What was there."""

    def _written(self) -> list[Patch]:
        """What was written over it."""
        return []

    def _correct(self, patches: Sequence[Patch]) -> None:
        """Write the patches into what was there."""


# The layers of every bridge that are on, the first one lowest. Not kept on the bridge itself,
# which may be copied.
_ON: WeakKeyDictionary[Bridge, list[Layer]] = WeakKeyDictionary()


def layers_on(bridge: Bridge) -> list[Layer]:
    """The layers that are on, the lowest first."""
    return list(_ON.get(bridge, ()))
