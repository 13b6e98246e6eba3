"""Exact choice of the largest of many scores, without a sort and without a copy of the scores."""

from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Scores looked at together: what stays in the cache of a CPU core, and what fills a GPU.
CHUNK = {"cpu": 2**18, "cuda": 2**26}
N_BINS = 2**16
EXCLUDED = -(2**31)  # a key below that of every finite score

Scores = Mapping[str, Float[Tensor, "..."]]
Index = Int[Tensor, " _"]
Indices = Mapping[str, Index]


def largest(
    scores: Scores,
    k: int,
    excluded: Indices,
    *,
    chunk: int | None = None,
) -> dict[str, Index]:
    """Sorted flat indices of the k largest scores over all tensors."""
    # First pass: how many keys lie in each bin.
    counts = _histogram(scores, excluded, chunk)
    n_left = int(counts[1:].sum())  # bin 0 holds the excluded ones, and no score
    if k > n_left:
        raise ValueError(
            f"top_fraction: {k} weights to choose, but `exclude` leaves fewer ({n_left}); "
            "lower the fractions"
        )
    if k == 0:
        return {name: torch.empty(0, dtype=torch.int64) for name in scores}

    # Second pass. A key above the edge bin is chosen, one below it is not, and those inside it
    # compete for the places that are left:
    #
    #     bins     0 ... edge - 1  |  edge  |  edge + 1 ... 65535
    #     chosen        none       | k - n_above |    all, n_above
    chosen: dict[str, list[Index]] = {name: [] for name in scores}
    edge, n_above = _edge(counts, k)
    best = _Best(k - n_above)
    for number, name in enumerate(scores):
        value = scores[name]
        for start, keys in _chunks(value, excluded.get(name), chunk):
            bins = _bins(keys)
            above = (bins > edge).nonzero().flatten()
            chosen[name].append(start + above.cpu())

            inside = (bins == edge).nonzero().flatten()
            best.add(
                number,
                start + inside.cpu(),
                keys[inside].cpu(),
            )

    tensor, index = best.prune()
    for number, name in enumerate(scores):
        is_of_tensor = tensor == number
        chosen[name].append(index[is_of_tensor])

    removed = {}
    for name, parts in chosen.items():
        removed[name], _ = torch.cat(parts).sort()
    return removed


def positive(scores: Scores, chosen: Indices) -> dict[str, Index]:
    """Of some weights those whose score is above zero."""
    above = {}
    for name, index in chosen.items():
        values = scores[name].flatten()
        is_above = values[index.to(values.device)] > 0
        above[name] = index[is_above.cpu()]
    return above


def largest_of_rows(
    value: Float[Tensor, "... columns"],
    k: int,
    excluded: Index | None,
    *,
    chunk: int | None = None,
) -> Index:
    """Sorted flat indices of the k largest scores of every row (last axis)."""
    columns = value.shape[-1]
    # A chunk must not cut a row, and holds at least one.
    n_rows = (chunk or _chunk_size(value)) // columns
    whole_rows = max(1, n_rows) * columns

    chosen = []
    for start, keys in _chunks(value, excluded, whole_rows):
        rows = keys.view(-1, columns)
        # Stable, so that of equal keys the one with the lower index comes first.
        order = rows.argsort(dim=1, descending=True, stable=True)
        best, _ = order[:, :k].sort(dim=1)  # [rows, k], columns in increasing order
        best_keys = rows.gather(1, best)
        if (best_keys == EXCLUDED).any():
            raise ValueError(
                f"top_fraction: {k} weights to choose in a row, but `exclude` leaves fewer; "
                "lower the fractions"
            )
        row_numbers = torch.arange(len(rows), device=value.device)
        first = start + columns * row_numbers  # flat index of each row's first score
        flat = first[:, None] + best
        chosen.append(flat.flatten())
    return torch.cat(chosen)


class _Best:
    """The n largest of all keys added; of equal keys the earlier ones."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.n_held = 0
        self.least = EXCLUDED  # what a further key must exceed
        # Three lists side by side: of every key the number of its tensor and its flat index there.
        self.tensors: list[Index] = []
        self.indices: list[Index] = []
        self.keys: list[Index] = []

    def add(
        self,
        number: int,
        index: Int[Tensor, " m"],
        keys: Int[Tensor, " m"],
    ) -> None:
        """The keys at these flat indices of a tensor, in the order of the tensors and indices."""
        is_better = keys > self.least  # one that ties with the least comes later and would lose
        index = index[is_better]
        if len(index):
            numbers = torch.full_like(index, number)
            self.tensors.append(numbers)
            self.indices.append(index)
            self.keys.append(keys[is_better])
            self.n_held += len(index)
        # At 2 n rather than n, so that each sort is paid for by n new keys.
        if self.n_held > 2 * self.n:
            self.prune()

    def prune(self) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
        """The n best, as they came in: the numbers of their tensors, and their indices."""
        keys = torch.cat(self.keys)
        # The first sort is stable, so among equal keys the earlier ones are the best. The second
        # brings the best back into the order in which they came, on which later ties depend.
        order = keys.argsort(descending=True, stable=True)
        best, _ = order[: self.n].sort()

        tensor = torch.cat(self.tensors)[best]
        index = torch.cat(self.indices)[best]
        keys = keys[best]
        self.tensors = [tensor]
        self.indices = [index]
        self.keys = [keys]
        self.n_held = len(best)
        self.least = int(keys.min())
        return tensor, index


def _histogram(
    scores: Scores,
    excluded: Indices,
    chunk: int | None,
) -> Int[Tensor, " bins"]:
    """How many keys lie in every bin."""
    counts = torch.zeros(N_BINS, dtype=torch.int64)
    for name, value in scores.items():
        for _, keys in _chunks(value, excluded.get(name), chunk):
            bins = _bins(keys)
            counts += bins.bincount(minlength=N_BINS).cpu()
    return counts


def _edge(counts: Int[Tensor, " bins"], k: int) -> tuple[int, int]:
    """The bin that holds the k-th largest key, and how many keys lie above that bin."""
    # The higher the bin, the fewer keys lie above it. The k-th largest is in the first bin above
    # which there are fewer than k. With k = 4:
    #
    #     bin            0   1   2   3   4
    #     counts         0   3   5   2   1
    #     n_up_to        0   3   8  10  11
    #     n_above       11   8   3   1   0
    #     n_above < k    .   .   x   x   x      the edge is bin 2, with 3 keys above it
    #
    # `argmax` gives the first True.
    n_up_to = counts.cumsum(0)
    n_above = counts.sum() - n_up_to
    is_high_enough = (n_above < k).int()
    edge = int(is_high_enough.argmax())
    return edge, int(n_above[edge])


def _bins(keys: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """The high sixteen bits of the keys, counted from 0; bin 0 holds the excluded and no score."""
    # key 0x3f80_0000 of 1.0     high bits  0x3f80     bin 0xbf80
    # key 0xc07f_ffff of -1.0    high bits -0x3f81     bin 0x407f
    # EXCLUDED    0x8000_0000    high bits -0x8000     bin 0
    return (keys >> 16) + N_BINS // 2


def _keys(scores: Float[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Int32 numbers in the order of the scores, equal where those are equal."""
    #     score    bits           sign           key            key as int32
    #      2.0     0x4000_0000    0x0000_0000    0x4000_0000     1073741824
    #      1.0     0x3f80_0000    0x0000_0000    0x3f80_0000     1065353216
    #      0.0     0x0000_0000    0x0000_0000    0x0000_0000              0
    #     -1.0     0xbf80_0000    0xffff_ffff    0xc07f_ffff    -1065353217
    #     -2.0     0xc000_0000    0xffff_ffff    0xbfff_ffff    -1073741825
    scores = scores + 0.0  # -0.0 + 0.0 is 0.0: the two zeros are a tie
    bits = scores.view(torch.int32)
    sign = bits >> 31  # the sign bit in all 32 places
    return bits ^ (sign & 0x7FFFFFFF)


def _chunks(
    value: Float[Tensor, "..."],
    excluded: Index | None,
    chunk: int | None,
) -> Iterator[tuple[int, Index]]:
    """(first flat index, keys) of one chunk after another; excluded weights have the lowest key."""
    flat = value.flatten()
    size = chunk or _chunk_size(value)
    for start in range(0, flat.numel(), size):
        end = start + size
        keys = _keys(flat[start:end])
        if excluded is not None:
            # They are sorted, so those of a chunk are neighbours. For the chunk from 8 to 16:
            #
            #     excluded    3 | 9  14 | 20
            #     position    0   1   2   3      first = 1, last = 3
            #     inside          1   6          counted from the start of the chunk
            ends = torch.tensor([start, end])
            first, last = torch.searchsorted(excluded, ends)
            inside = excluded[first:last] - start
            inside = inside.to(keys.device)
            keys[inside] = EXCLUDED
        yield start, keys


def _chunk_size(value: Tensor) -> int:
    kind = value.device.type
    return CHUNK.get(kind, CHUNK["cpu"])
