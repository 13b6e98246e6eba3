"""The sum over examples of the absolute gradient of a matrix, without a gradient per example."""

import torch
from jaxtyping import Float
from torch import Tensor

# Numbers of scratch memory: what stays in the cache of a CPU core, and what fills a GPU.
CPU_SCRATCH = 2**19
GPU_SCRATCH = 2**26


def add_absolute(
    first: Float[Tensor, "batch pos a"],
    second: Float[Tensor, "batch pos b"],
    total: Float[Tensor, "a b"],
    *,
    scratch: int | None = None,
) -> None:
    """Add sum over examples x of |first_x^T second_x| to `total`."""
    n_examples = len(first)
    n_rows, n_columns = total.shape
    if scratch is None:
        scratch = CPU_SCRATCH if total.device.type == "cpu" else GPU_SCRATCH

    block_rows = min(n_rows, max(1, scratch // n_columns))
    # The same for few examples as for many, so that the memory for many can be told from few.
    block_examples = max(1, scratch // (block_rows * n_columns))
    # Made once: fresh memory costs more than the arithmetic.
    buffer = total.new_empty(block_examples, block_rows, n_columns)

    first = first.float().mT
    second = second.float()
    for row in range(0, n_rows, block_rows):
        total_block = total[row : row + block_rows]
        for start in range(0, n_examples, block_examples):
            left = first[start : start + block_examples, row : row + block_rows]
            right = second[start : start + block_examples]

            products = buffer[: len(left), : len(total_block)]
            torch.bmm(left, right, out=products).abs_()
            if block_examples == 1:
                total_block.add_(products[0])
            else:
                total_block.add_(products.sum(dim=0))
