"""Weight masks: sparse sets of weights, with set algebra, selection from scores, and files."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from importlib.metadata import version
from operator import or_
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor

from harmcircuits.circuits.scores import Shapes, Source, WeightScores, read_shapes
from harmcircuits.circuits.selection import Index, Indices, largest, largest_of_rows
from harmcircuits.circuits.sites import Site, by_place
from harmcircuits.display import card, facts, heat_strip, note, share
from harmcircuits.measurements import Rows
from harmcircuits.storage import MASK_FILE, mask_file, read_tensors, write_tensors

if TYPE_CHECKING:
    import pandas

Scope = Literal["weight", "model", "row"]

MASK_FORMAT = "harmcircuits.mask.1"
FRAME_COLUMNS = ("layer", "kind", "unit", "number", "row", "column", "weight")
N_MAGNITUDE_BINS = 50  # bins of |W| in which `random_like` matches counts
# Of Qwen2.5-Coder-0.5B-Instruct, found by analyses/few_weights.py.
SHIPPED_MASKS = ("products", "language")
NO_WEIGHTS = torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True, repr=False, eq=False)
class WeightMask:
    """A set of weights to remove: a subnetwork, or *circuit*.

    `a & b`, `a | b`, `a - b` and `~a` are set algebra; `len(a)` counts the weights; `a == b` tests
    for the same weights of the same model, whatever method chose them.

    >>> scores = hc.removal_effect(bridge, harm)
    >>> first, second = (hc.top_fraction(scores, q, within="model") for q in (0.01, 0.02))
    >>> first, len(second - first), (first & ~second).fraction
    (WeightMask(top_fraction, 9,830 of 983,040 weights, 1.00%), 9831, 0.0)

    Attributes:
        removed: for each weight its removed entries: strictly increasing flat indices into the
            weight as stored. A weight that loses no entry is absent.
        shapes: the shapes of all weights that the choice considered.
        source: how the mask was made.
        trace: the rows of the search that made the mask (see `find_circuit`); else empty.
        file: the file that the mask was loaded from; else empty.

    Raises:
        ValueError: indices that are unsorted, repeated or outside their weight.
    """

    removed: Indices
    shapes: Shapes
    source: Source
    trace: Rows = field(default_factory=Rows)
    file: str = ""

    def __post_init__(self) -> None:
        foreign = self.removed.keys() - self.shapes.keys()
        if foreign:
            raise ValueError(f"WeightMask: {min(foreign)} is not among the shapes")
        # In the order of the shapes. A file sorts its tensors by name, and in another order
        # `random_like` would draw other weights.
        removed = {}
        for name, shape in self.shapes.items():
            index = self._index(name).to("cpu", torch.int64)
            if not len(index):
                continue
            size = math.prod(shape)
            is_sorted = bool((index.diff() > 0).all())
            if index[0] < 0 or index[-1] >= size or not is_sorted:
                raise ValueError(
                    f"WeightMask: indices of {name} must increase strictly within [0, {size})"
                )
            removed[name] = index
        object.__setattr__(self, "removed", MappingProxyType(removed))
        object.__setattr__(self, "shapes", MappingProxyType(dict(self.shapes)))

    def __reduce__(self) -> tuple[Any, ...]:
        # A read-only mapping can be neither pickled nor deep-copied.
        removed = dict(self.removed)
        return WeightMask, (removed, dict(self.shapes), self.source, self.trace, self.file)

    def __repr__(self) -> str:
        n_allowed = self.source.settings.get("n_allowed", len(self))
        limit = f"; of {n_allowed:,} allowed" if n_allowed > len(self) else ""
        return f"WeightMask({self.source.method}, {self._counts}, {share(self.fraction)}{limit})"

    def _repr_html_(self) -> str:
        shapes = by_place(self.shapes)
        shares = {}
        texts = {}
        for place, n_removed in by_place(self.counts).items():
            layer, kind = place
            n_weights = math.prod(shapes[place])
            shares[place] = n_removed / n_weights
            percent = share(shares[place])
            texts[place] = f"layer {layer} {kind}: {n_removed:,} of {n_weights:,}, {percent}"

        largest_share = share(max(shares.values(), default=0.0))
        return card(
            f"WeightMask: {self.source.method}, {share(self.fraction)}",
            facts({"removed": self._counts, **self.source.facts}),
            heat_strip(shares, texts),
            note(f"share of each matrix that is removed; the largest: {largest_share}"),
        )

    @property
    def _counts(self) -> str:
        return f"{len(self):,} of {self.n_weights:,} weights"

    def __len__(self) -> int:
        return self.n_removed

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, WeightMask):
            return NotImplemented
        return self._identity == other._identity and self.shapes == other.shapes

    def __hash__(self) -> int:
        return hash(self._identity)

    @property
    def _identity(self) -> tuple[str, str]:
        return self.source.model, self.digest

    @property
    def n_removed(self) -> int:
        """The number of removed weights."""
        return sum(index.numel() for index in self.removed.values())

    @property
    def n_weights(self) -> int:
        """The number of weights that the choice considered."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def fraction(self) -> float:
        """The share of the weights that is removed, from 0 to 1."""
        return self.n_removed / self.n_weights

    @property
    def counts(self) -> dict[str, int]:
        """The number of removed weights in every matrix, zeros included."""
        return {name: self._index(name).numel() for name in self.shapes}

    @property
    def digest(self) -> str:
        """SHA-256 of the indices, 16 hex digits: equal masks have equal digests."""
        digest = hashlib.sha256()
        for name in sorted(self.removed):
            index = self.removed[name]
            digest.update(f"{name} {len(index)} ".encode())
            digest.update(index.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def __and__(self, other: "WeightMask") -> "WeightMask":
        """The weights in both masks."""
        return self._combined(other, "intersection", lambda a, b: a[torch.isin(a, b)])

    def __or__(self, other: "WeightMask") -> "WeightMask":
        """The weights in either mask."""
        return self._combined(other, "union", lambda a, b: torch.cat([a, b]).unique())

    def __sub__(self, other: "WeightMask") -> "WeightMask":
        """The weights in this mask and not in the other."""
        return self._combined(other, "difference", lambda a, b: a[~torch.isin(a, b)])

    def __invert__(self) -> "WeightMask":
        """All other weights, at 8 bytes each; under it only the weights of this mask remain."""
        removed = {}
        for name in self.shapes:
            is_left = ~self.dense(name).flatten()
            removed[name] = is_left.nonzero().flatten()
        return WeightMask(removed, self.shapes, self.source.child("complement"))

    def _combined(
        self,
        other: "WeightMask",
        method: str,
        combine: Callable[[Tensor, Tensor], Tensor],
    ) -> "WeightMask":
        refuse_other_weights("the second mask", other, self.source.model, self.shapes)
        removed = {}
        for name in self.shapes:
            removed[name] = combine(self._index(name), other._index(name))
        return WeightMask(removed, self.shapes, self.source.child(method, other.source))

    def _index(self, name: str) -> Index:
        """The flat indices that a weight loses; empty if it loses nothing."""
        return self.removed.get(name, NO_WEIGHTS)

    def dense(self, name: str) -> Bool[Tensor, "..."]:
        """A tensor of the weight's shape, True where an entry is removed.

        Args:
            name: the name of a weight among `shapes`.

        Raises:
            KeyError: a name that is not among `shapes`.
        """
        shape = self.shapes[name]
        flat = torch.zeros(math.prod(shape), dtype=torch.bool)
        flat[self._index(name)] = True
        return flat.view(shape)

    def frame(self, sites: Mapping[str, Site]) -> "pandas.DataFrame":
        """A table with a row for each removed weight: its layer, kind, unit, row, column and value.

        >>> mask = hc.top_fraction(hc.magnitude_scores(bridge), 1e-5, within="model")
        >>> list(mask.frame(hc.weight_sites(bridge)))
        ['layer', 'kind', 'unit', 'number', 'row', 'column', 'weight']

        Args:
            sites: `weight_sites` of the mask's model. "unit" names the equal parts of the matrix:
                "head" (of q and o), "kv_head" (of k and v), "neuron" or "expert"; "number" is the
                number of the part. "row" and "column" count in the last two axes of the weight as
                stored, and "weight" is its current value.

        Raises:
            KeyError: `sites` lack a matrix of the mask.
        """
        import pandas

        parts = []
        for name, index in self.removed.items():
            site = sites[name]
            parameter = site.parameter.detach()
            position = torch.unravel_index(index.to(parameter.device), self.shapes[name])
            *_, row, column = position
            columns = {
                "layer": site.layer,
                "kind": site.kind,
                "unit": site.unit,
                "number": site.units(index),
                "row": row.cpu(),
                "column": column.cpu(),
                "weight": parameter[position].float().cpu(),
            }
            parts.append(pandas.DataFrame(columns))
        if not parts:
            return pandas.DataFrame(columns=list(FRAME_COLUMNS))
        return pandas.concat(parts, ignore_index=True)

    def save(self, path: str | Path) -> None:
        """Write the indices, shapes, source, trace and versions as a safetensors file, no pickle.

        Args:
            path: the file to write. A file at this path is replaced completely or not at all.

        Raises:
            OSError: the file cannot be written; the error names it.
        """
        libraries = ("torch", "transformer-lens", "harmcircuits")
        versions = {name: version(name) for name in libraries}
        metadata = {
            "shapes": json.dumps(dict(self.shapes)),
            "source": self.source.to_json(),
            "versions": json.dumps(versions),
            "trace": json.dumps(self.trace.to_dicts()),
        }
        write_tensors(path, MASK_FORMAT, self.removed, metadata)

    @classmethod
    def load(cls, path: str | Path) -> "WeightMask":
        """The mask in a file written by `save`, or one that ships. Its digest is compared.

        >>> hc.WeightMask.load("products")
        WeightMask(circuit, 268 of 357,826,560 weights, ...)

        Args:
            path: the file; or "products" or "language", masks of Qwen2.5-Coder-0.5B-Instruct
                without which it adds where it should multiply, and answers in English.

        Raises:
            ValueError: a missing file, one that holds no mask, or a damaged one.
        """
        if path in SHIPPED_MASKS:
            path = Path(__file__).parent / "shipped" / f"{path}.safetensors"
        removed, metadata = read_tensors(path, MASK_FORMAT, "mask")
        trace = Rows.from_dicts(json.loads(metadata["trace"]))
        source = Source.from_json(metadata["source"])
        return cls(removed, read_shapes(metadata["shapes"]), source, trace, str(path))

    @classmethod
    def from_hub(
        cls,
        source: str | Path,
        *,
        filename: str = MASK_FILE,
        revision: str | None = None,
    ) -> "WeightMask":
        """The mask in a repository of the Hugging Face hub, as `push_mask` or `export` wrote it.

        A local folder or file is read without a network.

        >>> mask = hc.top_fraction(hc.removal_effect(bridge, harm), 0.001)
        >>> folder = hc.push_mask(mask, "someone/mask", folder="look first")
        >>> hc.WeightMask.from_hub(folder).digest == mask.digest
        True

        Args:
            source: a hub id ("user/name"), a folder, or a file.
            filename: the path of the file within the repository or folder.
            revision: a branch, tag or commit of the repository; the newest commit by default.

        Raises:
            ValueError: no such repository, revision or file, no permission or no network; and the
                errors of `load`.
        """
        return cls.load(mask_file(source, filename, revision))


def top_fraction(
    scores: WeightScores,
    fraction: float,
    *,
    within: Scope = "weight",
    exclude: WeightMask | None = None,
) -> WeightMask:
    """The weights with the highest scores: exactly `round(fraction * n)` of each scope's n weights.

    Halves are rounded up, and a positive fraction takes at least one weight of every scope. Among
    equal scores, the earlier matrix and the lower flat index come first.

    >>> hc.top_fraction(hc.magnitude_scores(bridge), 0.001)
    WeightMask(top_fraction, 984 of 983,040 weights, 0.10%)

    Args:
        scores: a score for each weight.
        fraction: the share of the weights, from 0 to 1.
        within: the scope. "weight": each matrix by itself (as the published code). "model": all
            matrices ranked together. "row": each row (last axis) of the stored weight, as Wanda.
        exclude: weights that cannot be chosen; they still count among the n weights of a scope.

    Raises:
        ValueError: a fraction outside [0, 1], another scope, an `exclude` of other weights, or a
            scope with too few weights outside `exclude`.
    """
    if within not in ("weight", "model", "row") or not 0 <= fraction <= 1:
        raise ValueError(
            f"top_fraction: fraction={fraction}, within={within!r}; expected a share in [0, 1] "
            'and "weight", "model" or "row"'
        )
    shapes = scores.shapes
    source = scores.source.child("top_fraction", fraction=fraction, within=within)
    excluded: Indices = {}
    if exclude is not None:
        refuse_other_weights("top_fraction: `exclude`", exclude, source.model, shapes)
        source = replace(source, parents=(scores.source, exclude.source))
        excluded = exclude.removed

    removed: dict[str, Tensor] = {}
    if within == "row":
        for name, value in scores.values.items():
            count = _count(fraction, value.shape[-1])
            removed[name] = largest_of_rows(value, count, excluded.get(name))
        return WeightMask(removed, shapes, source)

    groups = [scores.values]
    if within == "weight":
        groups = [{name: value} for name, value in scores.values.items()]
    for group in groups:
        n_weights = sum(value.numel() for value in group.values())
        removed |= largest(group, _count(fraction, n_weights), excluded)
    return WeightMask(removed, shapes, source)


def _count(fraction: float, n: int) -> int:
    return max(1, int(fraction * n + 0.5)) if fraction else 0


def refuse_other_weights(
    name: str,
    mask: WeightMask,
    model: str,
    shapes: Shapes,
) -> None:
    """Refuse a mask of another model, or of other weights of this model."""
    if mask.source.model != model or dict(mask.shapes) != dict(shapes):
        difference = set(mask.shapes.items()) ^ set(shapes.items())
        examples = sorted(difference)[:2]
        raise ValueError(
            f"{name} is a mask of model {mask.source.model}, expected one of {model} over the same "
            f"weights; they differ in {examples or 'no shape'}"
        )


def union(masks: Sequence[WeightMask]) -> WeightMask | None:
    """The weights in any of the masks; None without a mask."""
    return reduce(or_, masks) if masks else None


def random_like(
    mask: WeightMask,
    *,
    seed: int = 0,
    weights: Mapping[str, Tensor] | None = None,
) -> WeightMask:
    """A random mask with as many weights in every matrix: a matched control for the mask.

    >>> mask = hc.top_fraction(hc.magnitude_scores(bridge), 0.001)
    >>> hc.random_like(mask).counts == mask.counts
    True

    Args:
        mask: the mask whose counts are matched.
        seed: the seed of the random choice.
        weights: the model's `named_weights`. With them the control also matches magnitude: it has
            as many weights in each of 50 equal-sized bins of |W| of every matrix.

    Raises:
        KeyError: `weights` lack a matrix of the mask.
    """
    rng = np.random.default_rng(seed)
    removed = {}
    for name, index in mask.removed.items():
        if weights is None:
            size = math.prod(mask.shapes[name])
            sample = rng.choice(size, len(index), replace=False, shuffle=False)
        else:
            magnitude = weights[name].detach().abs().flatten().float().cpu()
            sample = _sample_like(magnitude.numpy(), index.numpy(), rng)
        removed[name] = torch.from_numpy(np.sort(sample))
    criterion = "count" if weights is None else "count and magnitude"
    source = mask.source.child("random_like", seed=seed, matched=criterion)
    return WeightMask(removed, mask.shapes, source)


def _sample_like(
    magnitude: Float[ndarray, " size"],
    index: Int[ndarray, " n"],
    rng: np.random.Generator,
) -> Int[ndarray, " n"]:
    """Random indices, as many as `index` has in each bin of magnitude."""
    size = len(magnitude)
    numbers = range(1, N_MAGNITUDE_BINS)
    ends = [math.ceil(number * size / N_MAGNITUDE_BINS) for number in numbers]
    # A partition takes linear time; a sort of billions of numbers would take hours.
    edges = np.partition(magnitude, ends)[ends]

    def bins(places: Int[ndarray, " m"]) -> Int[ndarray, " m"]:
        return np.searchsorted(edges, magnitude[places], side="right")

    n_in_bin = np.bincount(bins(index), minlength=N_MAGNITUDE_BINS)

    # Take the first candidates of each bin, in random order; draw more if a bin has too few.
    n_candidates = 2 * N_MAGNITUDE_BINS * len(index)
    while True:
        candidates = rng.choice(size, min(size, n_candidates), replace=False)
        bin_of_candidate = bins(candidates)
        order = np.argsort(bin_of_candidate, kind="stable")
        sorted_bins = bin_of_candidate[order]
        start = np.searchsorted(sorted_bins, sorted_bins)
        rank = np.arange(len(candidates)) - start  # within its bin
        is_first = rank < n_in_bin[sorted_bins]
        sample = candidates[order[is_first]]
        if len(sample) == len(index):
            return sample
        n_candidates *= 4
