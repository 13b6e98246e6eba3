"""Sites: block matrices and the meaning of their axes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor, nn

# Every kind of block matrix, in the order in which a block uses it.
MATRIX_KINDS = (
    "attn.q",
    "attn.k",
    "attn.v",
    "attn.o",
    "mlp.gate",
    "mlp.in",
    "mlp.out",
    "mlp.router",
    "mlp.experts.gate_up_proj",
    "mlp.experts.down_proj",
)
MLP_MATRICES = ("mlp.gate", "mlp.in", "mlp.out")

Value = TypeVar("Value")


@dataclass(frozen=True)
class Site:
    """One block matrix: its live parameter and the meaning of its axes."""

    name: str
    layer: int
    kind: str
    parameter: nn.Parameter
    input_axis: Literal[0, 1, 2]
    unit_axis: Literal[0, 1]
    n_units: int
    is_hooked: bool = True

    @property
    def hook_in(self) -> str:
        """The hook point of the matrix's input."""
        return self.name.removesuffix("weight") + "hook_in"

    @property
    def hook_out(self) -> str:
        """The hook point of the matrix's output."""
        return self.name.removesuffix("weight") + "hook_out"

    @property
    def unit(self) -> str:
        """The name of the matrix's equal parts: "head", "kv_head", "neuron" or "expert"."""
        if self.kind.startswith("attn"):
            return "head" if self.kind in ("attn.q", "attn.o") else "kv_head"
        return "neuron" if self.kind in MLP_MATRICES else "expert"

    def units(self, flat: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """The head, neuron or expert that each weight belongs to."""
        # Example: attn.q has 2 heads of 3 rows each, [6, d_model]; the weights lie in rows 1 and 5.
        #
        #     position    1  5
        #     unit        0  1
        shape = self.parameter.shape
        position = torch.unravel_index(flat, shape)[self.unit_axis]
        unit_size = shape[self.unit_axis] // self.n_units
        return position // unit_size


def place_of(name: str) -> tuple[int, str]:
    """The layer and the kind of a matrix, from its name alone."""
    _, layer, part = name.split(".", maxsplit=2)
    kind = part.removesuffix(".weight")
    return int(layer), kind


def by_place(values: Mapping[str, Value]) -> dict[tuple[int, str], Value]:
    """The values of block matrices by layer and kind, in the order of the kinds."""
    places = {}
    for name, value in values.items():
        if name.startswith("blocks."):
            places[place_of(name)] = value
    order = sorted(places, key=lambda place: MATRIX_KINDS.index(place[1]))
    return {place: places[place] for place in order}
