"""The largest of many scores: an exact choice without sorting or copying all scores."""

from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Number of scores in a chunk: small enough for the cache of a CPU core, large enough for a GPU.
CHUNK_SIZES = {"cpu": 2**18, "cuda": 2**26}
N_KEY_BINS = 2**16
LOW_BITS = N_KEY_BINS - 1
EXCLUDED = -(2**31)  # the key of an excluded weight, below the key of every finite score

Scores = Mapping[str, Float[Tensor, "..."]]
Index = Int[Tensor, " _"]
Indices = Mapping[str, Index]


def largest(scores: Scores, k: int, excluded: Indices) -> dict[str, Index]:
    """Sorted flat indices of the k largest scores over all tensors."""
    # First pass: the high bits of the k-th largest key, the edge.
    counts = torch.zeros(N_KEY_BINS, dtype=torch.int64)
    for _, _, keys in _all_chunks(scores, excluded):
        counts += _histogram(_high_bits(keys))
    n_left = int(counts[1:].sum())  # bin 0 holds the excluded weights only
    if k > n_left:
        raise ValueError(
            f"top_fraction: {k} weights to choose, but `exclude` leaves fewer ({n_left}); "
            "lower the fractions"
        )
    if k == 0:
        return {name: torch.empty(0, dtype=torch.int64) for name in scores}
    high, n_above = _edge(counts, k)
    n_inside = k - n_above

    # Second pass: the low bits of the edge, among the keys with its high bits.
    counts.zero_()
    for _, _, keys in _all_chunks(scores, excluded):
        is_inside = _high_bits(keys) == high
        inside = keys[is_inside]
        counts += _histogram(inside & LOW_BITS)
    low, n_above = _edge(counts, n_inside)
    n_ties = n_inside - n_above

    # Third pass: all keys above the edge are chosen, and the first ones of those that equal it.
    edge = (high - N_KEY_BINS // 2) * N_KEY_BINS + low
    parts: dict[str, list[Index]] = {name: [] for name in scores}
    for name, start, keys in _all_chunks(scores, excluded):
        is_chosen = keys > edge
        ties = (keys == edge).nonzero().flatten()[:n_ties]
        is_chosen[ties] = True
        n_ties -= len(ties)
        index = is_chosen.nonzero().flatten()
        parts[name].append(start + index.cpu())
    return {name: torch.cat(indices) for name, indices in parts.items()}


def positive(scores: Scores, indices: Indices) -> dict[str, Index]:
    """The weights among `indices` with a score above zero."""
    above = {}
    for name, index in indices.items():
        values = scores[name].flatten()
        is_above = values[index.to(values.device)] > 0
        above[name] = index[is_above.cpu()]
    return above


def largest_of_rows(
    value: Float[Tensor, "... columns"],
    k: int,
    excluded: Index | None,
) -> Index:
    """Sorted flat indices of the k largest scores of every row (last axis)."""
    columns = value.shape[-1]
    parts = []
    for start, keys in _chunks(value, excluded, columns):
        rows = keys.view(-1, columns)
        # A stable sort, so that the lower index comes first among equal keys.
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
        parts.append(flat.flatten())
    return torch.cat(parts)


def _histogram(bins: Int[Tensor, " n"]) -> Int[Tensor, " bins"]:
    """The number of keys in every bin."""
    return bins.bincount(minlength=N_KEY_BINS).cpu()


def _edge(counts: Int[Tensor, " bins"], k: int) -> tuple[int, int]:
    """The bin of the k-th largest key, and the number of keys above that bin."""
    # The higher the bin, the fewer keys lie above it. The k-th largest key is in the first bin with
    # fewer than k keys above it. With k = 4:
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
    is_high_enough = n_above < k
    edge = int(is_high_enough.int().argmax())
    return edge, int(n_above[edge])


def _high_bits(keys: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """The high sixteen bits of the keys, counted from 0, which excluded weights alone have."""
    # key 0x3f80_0000 of 1.0     high bits  0x3f80     bin 0xbf80
    # key 0xc07f_ffff of -1.0    high bits -0x3f81     bin 0x407f
    # EXCLUDED    0x8000_0000    high bits -0x8000     bin 0
    return (keys >> 16) + N_KEY_BINS // 2


def _keys(scores: Float[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Int32 numbers in the order of the scores; equal scores have equal numbers."""
    #     score    bits           sign           key            key as int32
    #      2.0     0x4000_0000    0x0000_0000    0x4000_0000     1073741824
    #      1.0     0x3f80_0000    0x0000_0000    0x3f80_0000     1065353216
    #      0.0     0x0000_0000    0x0000_0000    0x0000_0000              0
    #     -1.0     0xbf80_0000    0xffff_ffff    0xc07f_ffff    -1065353217
    #     -2.0     0xc000_0000    0xffff_ffff    0xbfff_ffff    -1073741825
    scores = scores + 0.0  # -0.0 + 0.0 is 0.0: the two zeros are a tie
    bits = scores.view(torch.int32)
    sign = bits >> 31  # the sign bit in all 32 positions
    return bits ^ (sign & 0x7FFFFFFF)


def _all_chunks(
    scores: Scores,
    excluded: Indices,
) -> Iterator[tuple[str, int, Index]]:
    """The chunks of all tensors in order, as (name, first flat index, keys)."""
    for name, value in scores.items():
        for start, keys in _chunks(value, excluded.get(name)):
            yield name, start, keys


def _chunks(
    value: Float[Tensor, "..."],
    excluded: Index | None,
    columns: int = 1,
) -> Iterator[tuple[int, Index]]:
    """Whole rows in order, as (first flat index, keys); excluded weights get the lowest key."""
    kind = value.device.type
    size = CHUNK_SIZES.get(kind, CHUNK_SIZES["cpu"])
    whole_rows = max(1, size // columns) * columns
    flat = value.flatten()
    for start in range(0, flat.numel(), whole_rows):
        end = start + whole_rows
        keys = _keys(flat[start:end])
        if excluded is not None:
            # They are sorted, so a chunk's excluded weights are neighbours. The chunk from 8 to 16:
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
