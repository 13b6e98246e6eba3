"""Exact choice of the largest of many scores, without a sort and without a copy of the scores.

Float32 numbers are ordered as their bit patterns are, so a histogram of the high sixteen bits and one of the low sixteen
find the k-th largest number exactly. Scores are read a chunk at a time, from memory or from a file.
"""

from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

CHUNK = 2**18  # scores looked at together: a megabyte, which stays in cache
DIGITS = 2**16
EXCLUDED = -(2**31)  # below the key of every finite score

Indices = Mapping[str, Int[Tensor, " n"]]


def largest(
    scores: Mapping[str, Float[Tensor, "..."]], k: int, excluded: Indices, *, chunk: int = CHUNK
) -> dict[str, Int[Tensor, " n"]]:
    """Sorted flat indices of the k largest scores over all tensors; ties go to the earlier tensor and lower index.

    `scores`: float32, finite. `excluded`: sorted flat indices that cannot be chosen. Reads the scores three times. Scratch:
    some copies of `chunk` numbers, whatever the size of the scores. Raises ValueError when fewer than k can be chosen.
    """
    n_left = sum(value.numel() - len(excluded.get(name, ())) for name, value in scores.items())
    if k > n_left:
        raise ValueError(f"top_fraction: {k} weights to choose, but `exclude` leaves fewer ({n_left}); lower the fractions")
    if k == 0:
        return {name: torch.empty(0, dtype=torch.int64) for name in scores}
    threshold, n_ties = _kth_largest(scores, k, excluded, chunk)
    found = {}
    for name, value in scores.items():
        parts = [torch.empty(0, dtype=torch.int64, device=value.device)]
        for start, keys in _chunks(value, excluded.get(name), chunk):
            is_chosen = keys > threshold
            if n_ties:
                ties = (keys == threshold).nonzero().flatten()[:n_ties]
                is_chosen[ties] = True
                n_ties -= len(ties)
            parts.append(is_chosen.nonzero().flatten() + start)
        found[name] = torch.cat(parts)
    return found


def largest_of_rows(
    value: Float[Tensor, "... columns"], k: int, excluded: Int[Tensor, " n"] | None, *, chunk: int = CHUNK
) -> Int[Tensor, " n"]:
    """Sorted flat indices of the k largest scores of every row (last axis); ties go to the lower index.

    Sorts some rows at a time, about `chunk` scores together. Raises ValueError when fewer than k of a row can be chosen.
    """
    columns, found = value.shape[-1], [torch.empty(0, dtype=torch.int64, device=value.device)]
    for start, keys in _chunks(value, excluded, max(1, chunk // columns) * columns):
        rows = keys.view(-1, columns)
        order = rows.sort(dim=1, descending=True, stable=True).indices[:, :k]
        if (rows.gather(1, order) == EXCLUDED).any():
            raise ValueError(
                f"top_fraction: {k} weights to choose in a row, but `exclude` leaves fewer; lower the fractions"
            )
        first = torch.arange(start, start + keys.numel(), columns, device=value.device)
        found.append((order + first[:, None]).flatten().sort().values)
    return torch.cat(found)


def _kth_largest(scores: Mapping[str, Tensor], k: int, excluded: Indices, chunk: int) -> tuple[int, int]:
    """The key of the k-th largest score, and how many of the scores equal to it are among the k largest."""
    high, k = _kth_digit(scores, k, excluded, chunk, lambda keys: (keys >> 16) + DIGITS // 2)
    prefix = high - DIGITS // 2
    low, k = _kth_digit(scores, k, excluded, chunk, lambda keys: keys[keys >> 16 == prefix] & (DIGITS - 1))
    return (prefix << 16) + low, k


def _kth_digit(scores: Mapping[str, Tensor], k: int, excluded: Indices, chunk: int, digit) -> tuple[int, int]:
    """The digit of the k-th largest of the numbers that `digit` keeps, and its rank among those with the same digit."""
    counts = torch.zeros(DIGITS, dtype=torch.int64)
    for name, value in scores.items():
        for _, keys in _chunks(value, excluded.get(name), chunk):
            counts += torch.bincount(digit(keys), minlength=DIGITS).cpu()
    n_above = counts.flip(0).cumsum(0).flip(0) - counts
    found = int((n_above < k).int().argmax())  # the lowest digit with fewer than k numbers above it
    return found, k - int(n_above[found])


def _chunks(value: Float[Tensor, "..."], excluded: Tensor | None, chunk: int) -> Iterator[tuple[int, Int[Tensor, " n"]]]:
    """Int32 keys in the order of the scores, a chunk at a time with its first flat index; excluded ones are the lowest."""
    flat = value.flatten()
    for start in range(0, flat.numel(), chunk):
        bits = (flat[start : start + chunk] + 0.0).view(torch.int32)  # -0.0 + 0.0 is 0.0: the two zeros are a tie
        keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # below zero, a larger pattern is a smaller number
        if excluded is not None:
            first, last = torch.searchsorted(excluded, torch.tensor([start, start + chunk])).tolist()
            keys[(excluded[first:last] - start).to(keys.device)] = EXCLUDED
        yield start, keys
