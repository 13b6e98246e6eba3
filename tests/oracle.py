"""What overlap is, written for reading."""

from itertools import product

import torch
from torch import Tensor

from harmcircuits.circuits.masks import WeightMask

# Overlap: what two masks share, weight by weight, and what by chance


def removed_weights(mask: WeightMask) -> set[tuple[str, int]]:
    """Every weight that a mask removes: the name of its matrix, and its place there."""
    weights = set()
    for name, index in mask.removed.items():
        for place in index.tolist():
            weights.add((name, place))
    return weights


def shared_by_chance(mask: WeightMask, other: WeightMask) -> float:
    """How many weights two random masks share that remove as many of each matrix.

    A weight is in a mask with the mask's share of its matrix, and in both with their product.
    """
    n_shared = 0.0
    for name in mask.shapes:
        first, second = mask.dense(name).double(), other.dense(name).double()
        n_shared += first.numel() * first.mean().item() * second.mean().item()
    return n_shared


def shared_by_rows_and_columns(mask: WeightMask, other: WeightMask) -> float:
    """How many weights two random masks share that remove as many of each row and each column.

    For matrices of a dozen weights, since all such masks are written down. The two are drawn apart.
    """
    n_shared = 0.0
    for name in mask.shapes:
        first = torch.stack(all_like(mask.dense(name).long())).double().mean(dim=0)
        second = torch.stack(all_like(other.dense(name).long())).double().mean(dim=0)
        n_shared += (first * second).sum().item()
    return n_shared


def all_like(dense: Tensor) -> list[Tensor]:
    """All matrices of zeros and ones with the sums of this one's rows and of its columns."""
    matrices = []
    for bits in product((0, 1), repeat=dense.numel()):
        matrix = torch.tensor(bits).view(dense.shape)
        if torch.equal(matrix.sum(0), dense.sum(0)) and torch.equal(matrix.sum(1), dense.sum(1)):
            matrices.append(matrix)
    return matrices
