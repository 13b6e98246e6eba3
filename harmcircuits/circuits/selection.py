"""The largest of many scores: an exact choice without sorting or copying all scores."""

from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Number of scores in a chunk: small enough for the cache of a CPU core, large enough for a GPU.
CHUNK_SIZES = {"cpu": 2**18, "cuda": 2**26}
N_KEY_BINS = 2**16
EXCLUDED = -(2**31)  # the key of an excluded weight, below the key of every finite score

Scores = Mapping[str, Float[Tensor, "..."]]
Index = Int[Tensor, " _"]
Indices = Mapping[str, Index]


def largest(scores: Scores, k: int, excluded: Indices) -> dict[str, Index]:
    """Sorted flat indices of the k largest scores over all tensors."""
    # First pass: count the keys in each bin.
    counts = _histogram(scores, excluded)
    n_left = int(counts[1:].sum())  # bin 0 holds the excluded weights only
    if k > n_left:
        raise ValueError(
            f"top_fraction: {k} weights to choose, but `exclude` leaves fewer ({n_left}); "
            "lower the fractions"
        )
    if k == 0:
        return {name: torch.empty(0, dtype=torch.int64) for name in scores}

    # Second pass. Keys above the edge bin are chosen, keys below it are not, and the keys inside it
    # compete for the remaining places:
    #
    #     bins     0 ... edge - 1  |  edge  |  edge + 1 ... 65535
    #     chosen        none       | k - n_above |    all, n_above
    parts: dict[str, list[Index]] = {name: [] for name in scores}
    edge, n_above = _edge(counts, k)
    best = _Best(k - n_above)
    for number, name in enumerate(scores):
        value = scores[name]
        for start, keys in _chunks(value, excluded.get(name), _chunk_size(value)):
            bins = _bins(keys)
            above = (bins > edge).nonzero().flatten()
            parts[name].append(start + above.cpu())

            inside = (bins == edge).nonzero().flatten()
            best.add(
                number,
                start + inside.cpu(),
                keys[inside].cpu(),
            )

    tensor, index = best.prune()
    for number, name in enumerate(scores):
        parts[name].append(index[tensor == number])

    removed = {}
    for name in scores:
        removed[name], _ = torch.cat(parts[name]).sort()
    return removed


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
    # A chunk holds whole rows, at least one.
    n_rows = _chunk_size(value) // columns
    whole_rows = max(1, n_rows) * columns

    parts = []
    for start, keys in _chunks(value, excluded, whole_rows):
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


class _Best:
    """The n largest of all added keys; the earlier ones among equal keys."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.n_held = 0
        self.threshold = EXCLUDED  # a further key must exceed it
        # Three rows: the number of the key's tensor, its flat index in the tensor, and the key.
        self.parts: list[Int[Tensor, "3 _"]] = []

    def add(
        self,
        number: int,
        index: Int[Tensor, " m"],
        keys: Int[Tensor, " m"],
    ) -> None:
        """Add the keys at flat indices of a tensor; tensors and indices come in rising order."""
        is_better = keys > self.threshold  # a key equal to it comes later and would lose
        index = index[is_better]
        if len(index):
            numbers = torch.full_like(index, number)
            self.parts.append(torch.stack([numbers, index, keys[is_better]]))
            self.n_held += len(index)
        # At 2 n rather than n, so that a sort happens only once for n new keys.
        if self.n_held > 2 * self.n:
            self.prune()

    def prune(self) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
        """The numbers of the tensors and the flat indices of the n best, in the order of adding."""
        entries = torch.cat(self.parts, dim=1)
        # The first sort is stable, so the earlier ones among equal keys are the best. The second
        # sort restores the order of adding, on which later ties depend.
        order = entries[2].argsort(descending=True, stable=True)
        best, _ = order[: self.n].sort()

        entries = entries[:, best]
        numbers, index, keys = entries
        self.parts = [entries]
        self.n_held = len(best)
        self.threshold = int(keys.min())
        return numbers, index


def _histogram(scores: Scores, excluded: Indices) -> Int[Tensor, " bins"]:
    """The number of keys in every bin."""
    counts = torch.zeros(N_KEY_BINS, dtype=torch.int64)
    for name, value in scores.items():
        for _, keys in _chunks(value, excluded.get(name), _chunk_size(value)):
            bins = _bins(keys)
            counts += bins.bincount(minlength=N_KEY_BINS).cpu()
    return counts


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
    is_high_enough = (n_above < k).int()
    edge = int(is_high_enough.argmax())
    return edge, int(n_above[edge])


def _bins(keys: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """The high sixteen bits of the keys, counted from 0; bin 0 holds excluded weights only."""
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


def _chunks(
    value: Float[Tensor, "..."],
    excluded: Index | None,
    size: int,
) -> Iterator[tuple[int, Index]]:
    """The chunks in order, as (first flat index, keys); excluded weights get the lowest key."""
    flat = value.flatten()
    for start in range(0, flat.numel(), size):
        end = start + size
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


def _chunk_size(value: Tensor) -> int:
    kind = value.device.type
    return CHUNK_SIZES.get(kind, CHUNK_SIZES["cpu"])
