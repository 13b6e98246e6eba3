"""A score for every weight, and where it came from."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Source:
    """How scores or a mask were made: the model's fingerprint, the method with its settings, and what it was made from."""

    model: str
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    parents: tuple["Source", ...] = ()

    def to_json(self) -> str:
        """This source and its ancestors as one JSON object."""
        return json.dumps(_as_dict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Source":
        """The inverse of `to_json`."""
        return _from_dict(json.loads(text))


def _as_dict(source: Source) -> dict[str, Any]:
    parents = [_as_dict(parent) for parent in source.parents]
    return {"model": source.model, "method": source.method, "settings": dict(source.settings), "parents": parents}


def _from_dict(row: Mapping[str, Any]) -> Source:
    return Source(row["model"], row["method"], row["settings"], tuple(_from_dict(parent) for parent in row["parents"]))


@dataclass(frozen=True)
class WeightScores:
    """One float32 score per weight: `values[name]` has the shape of the weight as stored.

    Raises ValueError when a score is not finite, naming the weight.
    """

    values: Mapping[str, Float[Tensor, "..."]]
    source: Source

    def __post_init__(self) -> None:
        for name, value in self.values.items():
            # A sum is finite only if every term is; it needs no copy of the tensor.
            if not math.isfinite(value.sum(dtype=value.dtype).item()) and not value.isfinite().all():
                raise ValueError(f"WeightScores: {name} holds a score that is not finite; look at the loss and the dtype")
        object.__setattr__(self, "values", MappingProxyType(dict(self.values)))

    def __repr__(self) -> str:
        return f"WeightScores({self.source.method}, {sum(v.numel() for v in self.values.values()):,} weights)"

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every scored weight as stored."""
        return {name: tuple(value.shape) for name, value in self.values.items()}

    def __neg__(self) -> "WeightScores":
        """The scores with the opposite sign."""
        values = {name: -value for name, value in self.values.items()}
        return WeightScores(values, Source(self.source.model, "negative", {}, (self.source,)))


def mean_scores(parts: Sequence[WeightScores], weights: Sequence[float]) -> WeightScores:
    """The weighted mean of scores, sum_i w_i s_i / sum_i w_i: for instance of parts of the calibration data.

    A mean of gradients over all examples is this mean over parts, with the number of examples as weights; so bootstrap
    resamples of whole parts cost no further pass over the model. Exact for `removal_effect` and `sensitivity` after
    absolute values, not for `"before_abs"`. Raises ValueError for no parts, other than one weight each, weights that are
    negative or all zero, and parts of different weights or models.
    """
    if not parts or len(parts) != len(weights):
        raise ValueError(f"mean_scores: {len(parts)} scores and {len(weights)} weights; give one weight for each score")
    if min(weights) < 0 or sum(weights) <= 0:
        raise ValueError(f"mean_scores: weights {list(weights)[:8]}; expected non-negative ones, not all zero")
    first = parts[0]
    if any(part.shapes != first.shapes or part.source.model != first.source.model for part in parts):
        raise ValueError("mean_scores: the scores are of different models or weights")
    values = {name: torch.zeros_like(value) for name, value in first.values.items()}
    for part, weight in zip(parts, weights, strict=True):
        for name, total in values.items():
            if weight:
                total.add_(part.values[name], alpha=weight / sum(weights))
    settings = {"weights": [float(weight) for weight in weights]}
    return WeightScores(values, Source(first.source.model, "mean", settings, tuple(part.source for part in parts)))
