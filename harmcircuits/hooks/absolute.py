"""The sum over examples of the absolute gradient of a matrix, without ever holding the gradients of a batch."""

from importlib.util import find_spec

import torch
from jaxtyping import Float
from torch import Tensor

# Numbers of scratch: what stays in the cache of a CPU core, and what fills a GPU.
SCRATCH = {"cpu": 2**19, "cuda": 2**26}

First = Float[Tensor, "batch pos a"]
Second = Float[Tensor, "batch pos b"]


def add_absolute(first: First, second: Second, total: Float[Tensor, "a b"]) -> None:
    """Add sum_x |first_x^T second_x| to `total`, in float32 whatever the inputs' dtype.

    On CUDA one fused kernel, where Triton is installed; elsewhere blocks of the matrix in a scratch buffer.
    """
    if total.is_cuda and find_spec("triton"):
        from harmcircuits.hooks.absolute_triton import add_absolute_fused

        add_absolute_fused(first, second, total)
    else:
        add_absolute_in_blocks(first, second, total)


def add_absolute_in_blocks(
    first: First, second: Second, total: Float[Tensor, "a b"], *, scratch: int | None = None
) -> None:
    """`add_absolute` in plain torch: some examples of some rows at a time, as many as `scratch` numbers hold."""
    n_examples, (n_rows, n_columns) = len(first), total.shape
    scratch = scratch or SCRATCH.get(total.device.type, SCRATCH["cuda"])
    rows = min(n_rows, max(1, scratch // n_columns))
    # As much for few examples as for many, so that what many need can be told from few.
    at_once = max(1, scratch // (rows * n_columns))
    buffer = total.new_empty(at_once, rows, n_columns)  # once: fresh memory costs more than the arithmetic
    first, second = first.float().mT, second.float()
    for row in range(0, n_rows, rows):
        part = total[row : row + rows]
        for example in range(0, n_examples, at_once):
            left, right = first[example : example + at_once, row : row + rows], second[example : example + at_once]
            block = torch.bmm(left, right, out=buffer[: len(left), : len(part)]).abs_()
            part.add_(block[0] if at_once == 1 else block.sum(dim=0))
