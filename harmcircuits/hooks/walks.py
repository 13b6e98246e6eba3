"""What a walk over a whole model found, kept until the model is put together otherwise.

A walk costs tens of milliseconds on a deep model, an edit of some weights a few: so that an edit does not pay for the
model, its walks are kept on the bridge and used again while nothing they looked at is another object.
"""

from collections.abc import Callable
from functools import wraps
from itertools import chain
from operator import is_
from typing import Any, TypeVar

from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

Found = TypeVar("Found")


def kept_while_same(walk: Callable[[TransformerBridge], Found]) -> Callable[[TransformerBridge], Found]:
    """`walk`, run anew only when the bridge has other modules, parameters or buffers than the last time.

    Another object, name, memory, dtype or shape counts as other; values do not. For walks that look at no values, and whose
    results the caller does not change. An error is not kept.
    """

    @wraps(walk)
    def again(bridge: TransformerBridge) -> Found:
        kept = vars(bridge).setdefault("_harmcircuits_walks", {})
        if walk not in kept or not kept[walk][0].is_of(bridge):
            kept.pop(walk, None)
            kept[walk] = _Structure(bridge), walk(bridge)
        return kept[walk][1]

    return again


class _Structure:
    """Which modules, parameters and buffers a bridge consists of, and where their memory is."""

    def __init__(self, bridge: TransformerBridge) -> None:
        self.root = bridge.original_model  # no registered module of the bridge
        modules = {id(module): module for module in chain(bridge.modules(), self.root.modules())}.values()
        # The modules' own tables: looked at again, they are what the model consists of now. Most are empty.
        self.tables = [table for m in modules for table in (m._parameters, m._buffers, m._modules)]
        self.sizes = list(map(len, self.tables))
        self.filled = [table for table in self.tables if table]
        self.names, self.members = self._contents()
        self.memory = _memory(self.members)

    def is_of(self, bridge: TransformerBridge) -> bool:
        """Whether the bridge still consists of the very same things."""
        if bridge.original_model is not self.root or list(map(len, self.tables)) != self.sizes:
            return False
        names, members = self._contents()
        return names == self.names and all(map(is_, members, self.members)) and _memory(members) == self.memory

    def _contents(self) -> tuple[list[str], list[Any]]:
        return list(chain.from_iterable(self.filled)), list(chain.from_iterable(map(dict.values, self.filled)))


def _memory(members: list[Any]) -> list[Any]:
    return [(one.data_ptr(), one.dtype, one.shape) for one in members if isinstance(one, Tensor)]
