"""`add_absolute` as one Triton kernel: a tile of the matrix runs over all examples and is written once."""

# pyright: reportMissingImports=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE, POSITIONS = 128, 32


def add_absolute_fused(first: Tensor, second: Tensor, total: Tensor) -> None:
    """`harmcircuits.hooks.absolute.add_absolute` for CUDA tensors; `total` must be contiguous.

    Products are of the inputs' dtype and exact in float32; float32 inputs are not rounded to TensorFloat-32.
    """
    if first.dtype != second.dtype:
        first, second = first.float(), second.float()
    n_examples, n_positions, n_rows = first.shape
    n_columns = second.shape[2]
    grid = (triton.cdiv(n_rows, TILE), triton.cdiv(n_columns, TILE))
    with torch.cuda.device_of(total):
        _kernel[grid](
            first, second, total, n_examples, n_positions, n_rows, n_columns,
            *first.stride(), *second.stride(), TILE, POSITIONS, num_warps=8,
        )  # fmt: skip


@triton.jit
def _kernel(
    first, second, total, n_examples, n_positions, n_rows, n_columns,
    first_example, first_position, first_row, second_example, second_position, second_column,
    TILE: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * TILE + tl.arange(0, TILE)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    is_row, is_column = rows < n_rows, columns < n_columns
    absolute = tl.zeros((TILE, TILE), dtype=tl.float32)
    for example in range(n_examples):
        gradient = tl.zeros((TILE, TILE), dtype=tl.float32)
        for start in range(0, n_positions, POSITIONS):
            positions = start + tl.arange(0, POSITIONS)
            is_position = positions < n_positions
            left = tl.load(
                first + example * first_example + positions[None, :] * first_position + rows[:, None] * first_row,
                mask=is_row[:, None] & is_position[None, :], other=0.0,
            )  # fmt: skip
            right = tl.load(
                second + example * second_example + positions[:, None] * second_position + columns[None, :] * second_column,
                mask=is_position[:, None] & is_column[None, :], other=0.0,
            )  # fmt: skip
            gradient = tl.dot(left, right, gradient, input_precision="ieee")
        absolute += tl.abs(gradient)
    where = total + rows[:, None].to(tl.int64) * n_columns + columns[None, :]
    is_inside = is_row[:, None] & is_column[None, :]
    tl.store(where, tl.load(where, mask=is_inside, other=0.0) + absolute, mask=is_inside)
