"""Exact choice of the largest of many scores, without a sort and without a copy of the scores.

Float32 numbers are ordered as their bit patterns are. One pass over the scores makes a histogram of the high sixteen bits,
which says in which bin the k-th largest lies; a second takes all above that bin and the best of those inside it. Scores are
read a chunk at a time, from memory or from a file.
"""

from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Scores looked at together: what stays in the cache of a CPU core, and what fills a GPU.
CHUNK = {"cpu": 2**18, "cuda": 2**26}
DIGITS = 2**16
EXCLUDED = -(2**31)  # below the key of every finite score

Indices = Mapping[str, Int[Tensor, " n"]]


def largest(
    scores: Mapping[str, Float[Tensor, "..."]], k: int, excluded: Indices, *, chunk: int | None = None
) -> dict[str, Int[Tensor, " n"]]:
    """Sorted flat indices of the k largest scores over all tensors; ties go to the earlier tensor and lower index.

    `scores`: float32, finite. `excluded`: sorted flat indices that cannot be chosen. Reads the scores twice, a tensor at a
    time. Scratch: some copies of `chunk` numbers and of what is chosen, whatever the size of the scores and however many
    tie. Raises ValueError when fewer than k can be chosen.
    """
    counts, n_left = torch.zeros(DIGITS, dtype=torch.int64), 0
    for name, value in scores.items():
        n_left += value.numel() - len(excluded.get(name, ()))
        for _, keys in _chunks(value, excluded.get(name), chunk):
            counts += torch.bincount(_bins(keys), minlength=DIGITS).cpu()
    if k > n_left:
        raise ValueError(f"top_fraction: {k} weights to choose, but `exclude` leaves fewer ({n_left}); lower the fractions")
    if k == 0:
        return {name: torch.empty(0, dtype=torch.int64) for name in scores}
    n_above = counts.flip(0).cumsum(0).flip(0) - counts
    edge = int((n_above < k).int().argmax())  # the lowest bin with fewer than k numbers above it
    found: dict[str, list[Tensor]] = {name: [] for name in scores}
    inside = _Best(k - int(n_above[edge]))
    for number, (name, value) in enumerate(scores.items()):
        for start, keys in _chunks(value, excluded.get(name), chunk):
            bins = _bins(keys)
            found[name].append((bins > edge).nonzero().flatten().cpu() + start)
            index = (bins == edge).nonzero().flatten()
            inside.add(number, index.cpu() + start, keys[index].cpu())
    tensor, index = inside.prune()
    for number, name in enumerate(scores):
        found[name].append(index[tensor == number])
    return {name: torch.cat(parts).sort().values for name, parts in found.items()}


class _Best:
    """The n largest of all keys added, the earlier of equal ones; holds at most twice as many and those of a chunk."""

    def __init__(self, n: int) -> None:
        self.n, self.least, self.n_held = n, EXCLUDED, 0
        self.parts: list[tuple[Tensor, Tensor, Tensor]] = []  # number of the tensor, flat index, key

    def add(self, number: int, index: Int[Tensor, " m"], keys: Int[Tensor, " m"]) -> None:
        """The keys at these flat indices of a tensor, in the order of the tensors and of the indices."""
        is_better = keys > self.least  # a later one that ties with the least of n would lose to it
        index = index[is_better]
        if len(index):
            self.parts.append((torch.full_like(index, number), index, keys[is_better]))
            self.n_held += len(index)
        if self.n_held > 2 * self.n:
            self.prune()

    def prune(self) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
        """Leaves the n best, in the order they came in, and gives the numbers of their tensors and their indices."""
        tensor, index, keys = (torch.cat(parts) for parts in zip(*self.parts, strict=True))
        best = keys.sort(descending=True, stable=True).indices[: self.n].sort().values
        self.parts = [(tensor[best], index[best], keys[best])]
        self.n_held, self.least = len(best), int(keys[best].min())
        return tensor[best], index[best]


def largest_of_rows(
    value: Float[Tensor, "... columns"], k: int, excluded: Int[Tensor, " n"] | None, *, chunk: int | None = None
) -> Int[Tensor, " n"]:
    """Sorted flat indices of the k largest scores of every row (last axis); ties go to the lower index.

    Sorts some rows at a time, about `chunk` scores together. Raises ValueError when fewer than k of a row can be chosen.
    """
    columns, found = value.shape[-1], [torch.empty(0, dtype=torch.int64, device=value.device)]
    for start, keys in _chunks(value, excluded, max(1, (chunk or _chunk(value)) // columns) * columns):
        rows = keys.view(-1, columns)
        order = rows.sort(dim=1, descending=True, stable=True).indices[:, :k]
        if (rows.gather(1, order) == EXCLUDED).any():
            raise ValueError(
                f"top_fraction: {k} weights to choose in a row, but `exclude` leaves fewer; lower the fractions"
            )
        first = torch.arange(start, start + keys.numel(), columns, device=value.device)
        found.append((order + first[:, None]).flatten().sort().values)
    return torch.cat(found)


def _bins(keys: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """The high sixteen bits of the keys, from 0; no score lies in bin 0, where the excluded ones are."""
    return (keys >> 16) + DIGITS // 2


def _chunk(value: Tensor) -> int:
    return CHUNK.get(value.device.type, CHUNK["cpu"])


def _chunks(
    value: Float[Tensor, "..."], excluded: Tensor | None, chunk: int | None
) -> Iterator[tuple[int, Int[Tensor, " n"]]]:
    """Int32 keys in the order of the scores, a chunk at a time with its first flat index; excluded ones are the lowest."""
    flat, chunk = value.flatten(), chunk or _chunk(value)
    for start in range(0, flat.numel(), chunk):
        bits = (flat[start : start + chunk] + 0.0).view(torch.int32)  # -0.0 + 0.0 is 0.0: the two zeros are a tie
        keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # below zero, a larger pattern is a smaller number
        if excluded is not None:
            first, last = torch.searchsorted(excluded, torch.tensor([start, start + chunk])).tolist()
            keys[(excluded[first:last] - start).to(keys.device)] = EXCLUDED
        yield start, keys
