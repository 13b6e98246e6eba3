"""Sparse sets of weights: chosen from scores, combined, saved, loaded."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import reduce
from importlib.metadata import version
from operator import or_
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor

from harmcircuits.circuits.scores import Source, WeightScores, read_shapes
from harmcircuits.circuits.selection import largest, largest_of_rows
from harmcircuits.circuits.sites import Site, by_place
from harmcircuits.display import card, facts, heat_strip, note, share
from harmcircuits.measurements import Rows
from harmcircuits.storage import MASK_FILE, mask_file, read_tensors, write_tensors

if TYPE_CHECKING:
    import pandas

Scope = Literal["weight", "model", "row"]

FORMAT = "harmcircuits.mask.1"
FRAME_COLUMNS = ("layer", "kind", "unit", "number", "row", "column", "weight")
N_BINS = 50  # of |W|, within which a random mask matches magnitudes


@dataclass(frozen=True, repr=False, eq=False)
class WeightMask:
    """A set of weights to remove.

    `a & b`, `a | b`, `a - b` and `~a` are set algebra; `len(a)` counts the weights; `a == b` says
    whether they are the same weights of the same model, however they were chosen.

    >>> scores = hc.removal_effect(bridge, harm)
    >>> first, second = (hc.top_fraction(scores, q, within="model") for q in (0.01, 0.02))
    >>> first, len(second - first), (first & ~second).fraction
    (WeightMask(top_fraction, 9,830 of 983,040 weights, 1.00%), 9831, 0.0)

    Attributes:
        removed: strictly increasing flat indices into each weight as stored; weights that lose
            nothing are left out.
        shapes: every weight the choice was made among.
        source: how the mask was made.
        trace: what a search tried on the way, where one found it (see `find_circuit`).
        file: what it was loaded from; empty for one made here.

    Raises:
        ValueError: indices that are unsorted, repeated or outside their weight.
    """

    removed: Mapping[str, Int[Tensor, " _"]]
    shapes: Mapping[str, tuple[int, ...]]
    source: Source
    trace: Rows = field(default_factory=Rows)
    file: str = ""

    def __post_init__(self) -> None:
        foreign = self.removed.keys() - self.shapes.keys()
        if foreign:
            raise ValueError(f"WeightMask: {min(foreign)} is not among the shapes")
        # In the order of the shapes: a file sorts them by name, and random masks that are drawn
        # like this one would be others.
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

    def __repr__(self) -> str:
        counts = f"{self.n_removed:,} of {self.n_weights:,} weights, {share(self.fraction)}"
        allowed = self.source.settings.get("n_allowed", self.n_removed)
        fewer = f"; of {allowed:,} allowed" if allowed > self.n_removed else ""
        return f"WeightMask({self.source.method}, {counts}{fewer})"

    def _repr_html_(self) -> str:
        counts, shapes = by_place(self.counts), by_place(self.shapes)
        shares, texts = {}, {}
        for place, n_removed in counts.items():
            layer, kind = place
            n_weights = math.prod(shapes[place])
            shares[place] = n_removed / n_weights
            text = f"{n_removed:,} of {n_weights:,}, {share(shares[place])}"
            texts[place] = f"layer {layer} {kind}: {text}"
        most = share(max(shares.values(), default=0.0))
        removed = f"{self.n_removed:,} of {self.n_weights:,} weights"
        return card(
            f"WeightMask: {self.source.method}, {share(self.fraction)}",
            facts({"removed": removed, **self.source.facts}),
            heat_strip(shares, texts),
            note(f"share of each matrix that is removed; the most: {most}"),
        )

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
        """How many weights are removed."""
        return sum(index.numel() for index in self.removed.values())

    @property
    def n_weights(self) -> int:
        """How many weights the choice was made among."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def fraction(self) -> float:
        """The share of the weights that is removed."""
        return self.n_removed / self.n_weights

    @property
    def counts(self) -> dict[str, int]:
        """Number of removed weights in every matrix, zeros included."""
        return {name: self._index(name).numel() for name in self.shapes}

    @property
    def digest(self) -> str:
        """Sixteen hex digits that another set of weights changes: SHA-256 of the indices."""
        digest = hashlib.sha256()
        for name in sorted(self.removed):
            index = self.removed[name]
            digest.update(f"{name} {len(index)} ".encode())
            digest.update(index.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def __and__(self, other: "WeightMask") -> "WeightMask":
        """Weights in both."""
        return self._combined(other, "intersection", lambda a, b: a[torch.isin(a, b)])

    def __or__(self, other: "WeightMask") -> "WeightMask":
        """Weights in either."""
        return self._combined(other, "union", lambda a, b: torch.cat([a, b]).unique())

    def __sub__(self, other: "WeightMask") -> "WeightMask":
        """Weights in this mask and not in the other."""
        return self._combined(other, "difference", lambda a, b: a[~torch.isin(a, b)])

    def __invert__(self) -> "WeightMask":
        """All other weights: under this mask, only the circuit itself is left. 8 bytes a weight."""
        removed = {}
        for name in self.shapes:
            is_left = ~self.dense(name).flatten()
            removed[name] = is_left.nonzero().flatten()
        source = Source(self.source.model, "complement", {}, (self.source,))
        return WeightMask(removed, self.shapes, source)

    def _combined(
        self, other: "WeightMask", method: str, combine: Callable[[Tensor, Tensor], Tensor]
    ) -> "WeightMask":
        refuse_others(self, other)
        removed = {name: combine(self._index(name), other._index(name)) for name in self.shapes}
        source = Source(self.source.model, method, {}, (self.source, other.source))
        return WeightMask(removed, self.shapes, source)

    def _index(self, name: str) -> Int[Tensor, " _"]:
        """The flat indices that a weight loses, none where it loses nothing."""
        return self.removed.get(name, torch.empty(0, dtype=torch.int64))

    def dense(self, name: str) -> Bool[Tensor, "..."]:
        """Bool tensor of the weight's shape, True where removed.

        Args:
            name: of a weight among `shapes`; a KeyError says it is not.
        """
        shape = self.shapes[name]
        flat = torch.zeros(math.prod(shape), dtype=torch.bool)
        flat[self._index(name)] = True
        return flat.view(shape)

    def frame(self, sites: Mapping[str, Site]) -> "pandas.DataFrame":
        """A line for each removed weight: its layer, kind, head or neuron, row and column.

        >>> mask = hc.top_fraction(hc.magnitude_scores(bridge), 1e-5, within="model")
        >>> list(mask.frame(hc.weight_sites(bridge)))
        ['layer', 'kind', 'unit', 'number', 'row', 'column', 'weight']

        Args:
            sites: `weight_sites` of the mask's model. "unit" is what its matrices are cut into:
                "head" (of q and o), "kv_head" (of k and v), "neuron" or "expert"; "number" says
                which. "row" and "column" count in the last two axes of the weight as stored, and
                "weight" is its value now.

        Raises:
            KeyError: sites that lack a matrix of the mask.
        """
        import pandas

        parts = []
        for name, index in self.removed.items():
            site = sites[name]
            parameter = site.parameter.detach()
            places = torch.unravel_index(index.to(parameter.device), self.shapes[name])
            *_, row, column = places
            columns = {
                "layer": site.layer,
                "kind": site.kind,
                "unit": site.unit,
                "number": site.units(index),
                "row": row.cpu(),
                "column": column.cpu(),
                "weight": parameter[places].float().cpu(),
            }
            parts.append(pandas.DataFrame(columns))
        if not parts:
            return pandas.DataFrame(columns=list(FRAME_COLUMNS))
        return pandas.concat(parts, ignore_index=True)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file with the indices, shapes, source and versions. Never pickle.

        Args:
            path: the file to write; one that is there is replaced, whole or not at all.

        Raises:
            OSError: it cannot be written, naming the file.
        """
        versions = {name: version(name) for name in ("torch", "transformer-lens", "harmcircuits")}
        metadata = {
            "shapes": json.dumps(dict(self.shapes)),
            "source": self.source.to_json(),
            "versions": json.dumps(versions),
            "trace": json.dumps([asdict(row) for row in self.trace]),
        }
        write_tensors(path, FORMAT, self.removed, metadata)

    @classmethod
    def load(cls, path: str | Path) -> "WeightMask":
        """The mask in a file written by `save`. Its digest is compared.

        Args:
            path: the file.

        Raises:
            ValueError: a missing file, one that holds no mask, or a damaged one.
        """
        removed, metadata = read_tensors(path, FORMAT, "mask")
        trace = Rows.of_dicts(json.loads(metadata["trace"]))
        source = Source.from_json(metadata["source"])
        return cls(removed, read_shapes(metadata["shapes"]), source, trace, str(path))

    @classmethod
    def from_hub(
        cls, source: str | Path, *, filename: str = MASK_FILE, revision: str | None = None
    ) -> "WeightMask":
        """The mask in a repository of the Hugging Face hub, where `push_mask` or `export` put it.

        A folder or file of this machine is read as it is, without a network.

        >>> mask = hc.top_fraction(hc.removal_effect(bridge, harm), 0.001)
        >>> folder = hc.push_mask(mask, "someone/mask", folder="look first")
        >>> hc.WeightMask.from_hub(folder).digest == mask.digest
        True

        Args:
            source: a hub id ("user/name"), a folder, or a file.
            filename: the file's path in the repository or folder.
            revision: branch, tag or commit of a repository; the newest by default.

        Raises:
            ValueError: no such repository, revision or file, no permission or no network; and as
                `load`.
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

    Halves are rounded up, and a positive fraction takes at least one weight of every scope, so that
    none drops out silently. Ties go to the earlier matrix and the lower flat index.

    >>> hc.top_fraction(hc.magnitude_scores(bridge), 0.001)
    WeightMask(top_fraction, 984 of 983,040 weights, 0.10%)

    Args:
        scores: of every weight.
        fraction: share of the weights.
        within: the scope. "weight": each matrix by itself (the published code). "model": all
            matrices ranked together. "row": each row (last axis) of the stored weight, as Wanda.
        exclude: weights that cannot be chosen; the count stays that of the whole scope.

    Raises:
        ValueError: a fraction outside [0, 1], another scope, an `exclude` of other weights, or
            fewer weights left in a scope than are to be chosen.
    """
    if within not in ("weight", "model", "row") or not 0 <= fraction <= 1:
        raise ValueError(
            f"top_fraction: fraction={fraction}, within={within!r}; expected a share in [0, 1] "
            'and "weight", "model" or "row"'
        )
    shapes = scores.shapes
    if exclude is not None:
        refuse_other_weights("top_fraction: `exclude`", exclude, scores.source.model, shapes)
    excluded = exclude.removed if exclude is not None else {}

    removed: dict[str, Tensor] = {}
    if within == "model":
        n_weights = sum(map(math.prod, shapes.values()))
        removed = largest(scores.values, _count(fraction, n_weights), excluded)
    elif within == "weight":
        for name, value in scores.values.items():
            count = _count(fraction, value.numel())
            removed |= largest({name: value}, count, excluded)
    else:
        for name, value in scores.values.items():
            count = _count(fraction, shapes[name][-1])
            removed[name] = largest_of_rows(value, count, excluded.get(name))

    settings = {"fraction": fraction, "within": within}
    parents = (scores.source,) if exclude is None else (scores.source, exclude.source)
    source = Source(scores.source.model, "top_fraction", settings, parents)
    return WeightMask(removed, shapes, source)


def _count(fraction: float, n: int) -> int:
    return max(1, int(fraction * n + 0.5)) if fraction else 0


def refuse_other_weights(
    what: str, mask: WeightMask, model: str, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Raises ValueError for a mask of another model than this, or of other weights of it."""
    if mask.source.model != model or dict(mask.shapes) != dict(shapes):
        odd = sorted(set(mask.shapes.items()) ^ set(shapes.items()))[:2]
        raise ValueError(
            f"{what} is a mask of model {mask.source.model}, expected one of {model} over the same "
            f"weights; they differ in {odd or 'no shape'}"
        )


def refuse_others(mask: WeightMask, other: WeightMask) -> None:
    """Raises ValueError for masks of two models, or of other weights of the same."""
    refuse_other_weights("the second mask", other, mask.source.model, mask.shapes)


def union(masks: Sequence[WeightMask]) -> WeightMask | None:
    """The weights in any of the masks; None for no masks."""
    return reduce(or_, masks) if masks else None


def random_like(
    mask: WeightMask, *, seed: int = 0, weights: Mapping[str, Tensor] | None = None
) -> WeightMask:
    """A random mask with as many weights in every matrix: the control that a circuit has to beat.

    >>> mask = hc.top_fraction(hc.magnitude_scores(bridge), 0.001)
    >>> hc.random_like(mask).counts == mask.counts
    True

    Args:
        mask: what it is like.
        seed: draws it.
        weights: the model's `named_weights`; with them the mask also matches magnitude: as many in
            each of 50 equal-sized bins of |W| of the matrix.

    Raises:
        KeyError: `weights` lack a matrix of the mask.
    """
    rng = np.random.default_rng(seed)
    removed = {}
    for name, index in mask.removed.items():
        size = math.prod(mask.shapes[name])
        if weights is None:
            drawn = rng.choice(size, len(index), replace=False, shuffle=False)
        else:
            magnitude = weights[name].detach().abs().flatten().float().cpu()
            drawn = _matched(magnitude.numpy(), index.numpy(), rng)
        removed[name] = torch.from_numpy(np.sort(drawn))
    settings = {"seed": seed, "matched": "count" if weights is None else "count and magnitude"}
    source = Source(mask.source.model, "random_like", settings, (mask.source,))
    return WeightMask(removed, mask.shapes, source)


def _matched(
    magnitude: Float[ndarray, " size"], index: Int[ndarray, " n"], rng: np.random.Generator
) -> Int[ndarray, " n"]:
    """As many random indices as given, in each bin of magnitude."""
    size = len(magnitude)
    ends = [math.ceil(number * size / N_BINS) for number in range(1, N_BINS)]
    edges = np.partition(magnitude, ends)[ends]  # linear, where a sort of billions takes hours
    wanted = np.bincount(np.searchsorted(edges, magnitude[index], side="right"), minlength=N_BINS)

    # The first of each bin among so many candidates in random order; more, where they are too few.
    n_candidates = 2 * N_BINS * len(index)
    while True:
        candidates = rng.choice(size, min(size, n_candidates), replace=False)
        bins = np.searchsorted(edges, magnitude[candidates], side="right")
        order = np.argsort(bins, kind="stable")
        in_order = bins[order]
        rank = np.arange(len(bins)) - np.searchsorted(in_order, in_order)  # within its bin
        drawn = candidates[order[rank < wanted[in_order]]]
        if len(drawn) == len(index):
            return drawn
        n_candidates *= 4
