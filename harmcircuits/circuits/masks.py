"""Sparse sets of weights: chosen from scores, combined, saved, loaded."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from importlib.metadata import version
from operator import or_
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from harmcircuits.circuits.scores import Source, WeightScores
from harmcircuits.circuits.selection import Indices, largest, largest_of_rows

Scope = Literal["weight", "model", "row"]


@dataclass(frozen=True)
class WeightMask:
    """A set of weights to remove.

    `removed[name]`: Int64[n], strictly increasing flat indices into the weight as stored; weights that lose nothing are
    left out. `shapes`: every weight the choice was made among. Raises ValueError for indices that are unsorted, repeated
    or outside their weight.
    """

    removed: Mapping[str, Int[Tensor, " n"]]
    shapes: Mapping[str, tuple[int, ...]]
    source: Source

    def __post_init__(self) -> None:
        removed = {}
        for name, index in self.removed.items():
            if name not in self.shapes:
                raise ValueError(
                    f"WeightMask: {name} is not among the shapes; expected one of {sorted(self.shapes)[:3]} ..."
                )
            if not index.numel():
                continue
            size = torch.Size(self.shapes[name]).numel()
            index = index.to("cpu", torch.int64)
            if index[0] < 0 or index[-1] >= size or (index[1:] <= index[:-1]).any():
                raise ValueError(f"WeightMask: indices of {name} must increase strictly within [0, {size})")
            removed[name] = index
        object.__setattr__(self, "removed", MappingProxyType(removed))
        object.__setattr__(self, "shapes", MappingProxyType(dict(self.shapes)))

    def __repr__(self) -> str:
        return f"WeightMask({self.source.method}, {self.n_removed:,} of {self.n_weights:,} weights)"

    @property
    def n_removed(self) -> int:
        """How many weights are removed."""
        return sum(index.numel() for index in self.removed.values())

    @property
    def n_weights(self) -> int:
        """How many weights the choice was made among."""
        return sum(torch.Size(shape).numel() for shape in self.shapes.values())

    @property
    def counts(self) -> dict[str, int]:
        """Number of removed weights in every matrix, zeros included."""
        return {name: self.removed[name].numel() if name in self.removed else 0 for name in self.shapes}

    def __and__(self, other: "WeightMask") -> "WeightMask":
        """Weights in both."""
        return self._combined(other, "intersection", lambda a, b: a[torch.isin(a, b)])

    def __or__(self, other: "WeightMask") -> "WeightMask":
        """Weights in either."""
        return self._combined(other, "union", lambda a, b: torch.cat([a, b]).unique())

    def __sub__(self, other: "WeightMask") -> "WeightMask":
        """Weights in this mask and not in the other."""
        return self._combined(other, "difference", lambda a, b: a[~torch.isin(a, b)])

    def _combined(self, other: "WeightMask", method: str, combine) -> "WeightMask":
        if self.shapes != other.shapes:
            odd = sorted(set(self.shapes.items()) ^ set(other.shapes.items()))[:2]
            raise ValueError(f"masks of different models or weights cannot be combined; they differ in {odd}")
        if self.source.model != other.source.model:
            raise ValueError(f"masks of two models ({self.source.model}, {other.source.model}) cannot be combined")
        none = torch.empty(0, dtype=torch.int64)
        removed = {n: combine(self.removed.get(n, none), other.removed.get(n, none)) for n in self.shapes}
        return WeightMask(removed, self.shapes, Source(self.source.model, method, {}, (self.source, other.source)))

    def dense(self, name: str) -> Tensor:
        """Bool tensor of the weight's shape, True where removed. Raises KeyError for a weight outside the mask's shapes."""
        flat = torch.zeros(torch.Size(self.shapes[name]).numel(), dtype=torch.bool)
        if name in self.removed:
            flat[self.removed[name]] = True
        return flat.view(self.shapes[name])

    def save(self, path: str | Path) -> None:
        """Write a safetensors file with the indices, the shapes, the source and the versions. Never pickle."""
        metadata = {
            "format": "harmcircuits.mask.1",
            "shapes": json.dumps(dict(self.shapes)),
            "source": self.source.to_json(),
            "versions": json.dumps({name: version(name) for name in ("torch", "transformer-lens", "harmcircuits")}),
        }
        save_file(dict(self.removed), Path(path), metadata=metadata)

    @classmethod
    def load(cls, path: str | Path) -> "WeightMask":
        """The mask in a file written by `save`. Raises ValueError for a missing file or one that holds no mask."""
        if not Path(path).is_file():
            raise ValueError(f"{path}: no such file; give the path of a saved mask")
        try:
            with safe_open(Path(path), framework="pt") as file:
                metadata = file.metadata() or {}
                removed = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except SafetensorError as error:
            raise ValueError(
                f"{path}: not a safetensors file ({error}); expected a mask written by WeightMask.save"
            ) from None
        if metadata.get("format") != "harmcircuits.mask.1":
            raise ValueError(f"{path}: a safetensors file, but no mask of harmcircuits (format {metadata.get('format')!r})")
        shapes = {name: tuple(shape) for name, shape in json.loads(metadata["shapes"]).items()}
        return cls(removed, shapes, Source.from_json(metadata["source"]))


def top_fraction(
    scores: WeightScores, fraction: float, *, within: Scope = "weight", exclude: WeightMask | None = None
) -> WeightMask:
    """The weights with the highest scores: exactly `round(fraction * n)` of each scope's n weights, halves rounded up.

    Scopes: each matrix (`"weight"`, the published code), all matrices ranked together (`"model"`), or each row (last axis)
    of the stored weight (`"row"`, as Wanda). A positive fraction takes at least one weight of every scope, so that none
    drops out silently. Ties go to the earlier matrix and the lower flat index. Weights in `exclude` cannot be chosen; the
    count stays that of the whole scope. Raises ValueError for a fraction outside [0, 1], an unknown scope, an `exclude` of
    other weights, or fewer weights left in a scope than are to be chosen.
    """
    if within not in ("weight", "model", "row"):
        raise ValueError(f'top_fraction: within={within!r}; expected "weight", "model" or "row"')
    if exclude is not None and exclude.shapes != scores.shapes:
        raise ValueError("top_fraction: `exclude` is a mask over other weights than the scores")
    removed = _best(scores.values, scores.shapes, fraction, within, exclude.removed if exclude is not None else {})
    settings = {"fraction": fraction, "within": within}
    parents = (scores.source,) if exclude is None else (scores.source, exclude.source)
    return WeightMask(removed, scores.shapes, Source(scores.source.model, "top_fraction", settings, parents))


def top_fractions(
    scores: WeightScores, fractions: Sequence[float], *, within: Scope = "weight", exclude: WeightMask | None = None
) -> list[WeightMask]:
    """`top_fraction` for each of several fractions, in their order: the same masks, for the reading of one.

    The largest is chosen among all scores, the others among what it chose. Raises ValueError for no fractions, and as
    `top_fraction`.
    """
    if not fractions:
        raise ValueError("top_fractions: no fractions; expected at least one")
    widest = top_fraction(scores, max(fractions), within=within, exclude=exclude)
    best = {name: scores.values[name].flatten()[index] for name, index in widest.removed.items()}
    if within == "row":
        best = {name: value.view(math.prod(widest.shapes[name][:-1]), -1) for name, value in best.items()}
    masks = []
    for fraction in fractions:
        places = _best(best, widest.shapes, fraction, within, {})
        removed = {name: widest.removed[name][place.cpu()] for name, place in places.items()}
        source = replace(widest.source, settings={"fraction": fraction, "within": within})
        masks.append(WeightMask(removed, widest.shapes, source))
    return masks


def shared_by(masks: Sequence[WeightMask], at_least: int) -> WeightMask:
    """The weights that at least so many of the masks remove: their union for 1, their intersection for all of them.

    Raises ValueError for a number outside 1 to the number of masks, and as `|` for masks of different models.
    """
    if not 1 <= at_least <= len(masks):
        raise ValueError(f"shared_by: at_least={at_least} of {len(masks)} masks; expected 1 to their number")
    union = reduce(or_, masks)
    removed = {}
    for name in union.removed:
        index, times = torch.cat([mask.removed[name] for mask in masks if name in mask.removed]).unique(return_counts=True)
        removed[name] = index[times >= at_least]
    parents = tuple(mask.source for mask in masks)
    return WeightMask(removed, union.shapes, Source(union.source.model, "shared_by", {"at_least": at_least}, parents))


def random_like(mask: WeightMask, *, seed: int = 0, weights: Mapping[str, Tensor] | None = None) -> WeightMask:
    """A random mask with the same number of weights in every matrix: the control that a circuit has to beat.

    With `weights` (see `named_weights`) it also matches magnitude: as many in each of 50 equal-sized bins of |W| of the
    matrix. Raises ValueError when `weights` lacks a matrix of the mask.
    """
    generator = torch.Generator().manual_seed(seed)
    removed = {}
    for name, index in mask.removed.items():
        size = torch.Size(mask.shapes[name]).numel()
        if weights is None:
            chosen = torch.randperm(size, generator=generator)[: index.numel()]
        elif name not in weights:
            raise ValueError(f"random_like: weights lack {name}; give named_weights of the mask's model")
        else:
            chosen = _matched(weights[name].detach().abs().flatten().cpu(), index, generator)
        removed[name] = chosen.sort().values
    settings = {"seed": seed, "matched": "count" if weights is None else "count and magnitude"}
    return WeightMask(removed, mask.shapes, Source(mask.source.model, "random_like", settings, (mask.source,)))


def _matched(magnitude: Float[Tensor, " size"], index: Tensor, generator: torch.Generator, n_bins: int = 50) -> Tensor:
    bins = torch.argsort(magnitude, stable=True).argsort() * n_bins // magnitude.numel()
    wanted = torch.bincount(bins[index], minlength=n_bins)
    order = torch.randperm(magnitude.numel(), generator=generator)
    members = [order[bins[order] == number] for number in range(n_bins)]
    return torch.cat([member[:count] for member, count in zip(members, wanted.tolist(), strict=True)])


def _best(
    values: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], fraction: float, within: Scope, excluded: Indices
) -> dict[str, Tensor]:
    """Flat indices into `values`, the scores of some or all weights: as many as the fraction gives for the shapes."""
    if within == "model":
        return largest(values, _count(fraction, sum(map(math.prod, shapes.values()))), excluded)
    if within == "row":
        counts = {name: _count(fraction, shapes[name][-1]) for name in values}
        return {name: largest_of_rows(values[name], count, excluded.get(name)) for name, count in counts.items()}
    found = {}
    for name in values:
        found |= largest({name: values[name]}, _count(fraction, math.prod(shapes[name])), excluded)
    return found


def _count(fraction: float, n: int) -> int:
    if not 0 <= fraction <= 1:
        raise ValueError(f"top_fraction: fraction={fraction}; expected a share in [0, 1]")
    return max(1, int(fraction * n + 0.5)) if fraction > 0 else 0
