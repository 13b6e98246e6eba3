"""A score for every weight, and where it came from."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from harmcircuits.display import plural

if TYPE_CHECKING:
    from harmcircuits.circuits.masks import WeightMask

FORMAT = "harmcircuits.scores.1"
SHARD_BYTES = 2**31


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


@dataclass(frozen=True, repr=False)
class WeightScores:
    """One float32 score per weight: `values[name]` has the shape of the weight as stored.

    Loaded scores stay in their file: each `values[name]` is read when it is asked for, so that a selection never holds more
    than one matrix. Raises ValueError when a score is not finite, naming the weight.
    """

    values: Mapping[str, Float[Tensor, "..."]]
    source: Source

    def __post_init__(self) -> None:
        if isinstance(self.values, _Saved):  # checked before they were written
            return
        for name, value in self.values.items():
            # A sum is finite only if every term is; it needs no copy of the tensor.
            if not math.isfinite(value.sum(dtype=value.dtype).item()) and not value.isfinite().all():
                raise ValueError(f"WeightScores: {name} holds a score that is not finite; look at the loss and the dtype")
        object.__setattr__(self, "values", MappingProxyType(dict(self.values)))

    def __repr__(self) -> str:
        n_weights = sum(map(math.prod, self.shapes.values()))
        examples = self.source.settings.get("n_examples")
        data = f" of {plural(examples, 'example')}" if examples else ""
        return f"WeightScores({self.source.method}{data}, {n_weights:,} weights)"

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every scored weight as stored."""
        if isinstance(self.values, _Saved):
            return dict(self.values.shapes)
        return {name: tuple(value.shape) for name, value in self.values.items()}

    def sum_over(self, mask: "WeightMask") -> float:
        """The sum of the scores of a mask's weights.

        Of `removal_effect` it is the first-order prediction of the objective's change under the mask.

        Args:
            mask: over the same weights.
        """
        total = 0.0
        for name, index in mask.removed.items():
            total += self.values[name].flatten()[index].double().sum().item()
        return total

    def __neg__(self) -> "WeightScores":
        """The scores with the opposite sign."""
        values = {name: -value for name, value in self.values.items()}
        return WeightScores(values, Source(self.source.model, "negative", {}, (self.source,)))

    def save(self, folder: str | Path, *, shard_bytes: int = SHARD_BYTES) -> None:
        """Write safetensors shards with the shapes and the source into a new or empty folder. Never pickle.

        A shard holds whole matrices, about `shard_bytes` of them. Raises ValueError for a folder that holds something.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise ValueError(f"{folder} is not empty; give a new folder for the scores")
        shards: list[list[str]] = [[]]
        size = 0
        for name, shape in self.shapes.items():
            if shards[-1] and size + 4 * math.prod(shape) > shard_bytes:
                shards.append([])
                size = 0
            shards[-1].append(name)
            size += 4 * math.prod(shape)
        metadata = {"format": FORMAT, "shapes": json.dumps(self.shapes), "source": self.source.to_json()}
        for number, names in enumerate(shards, start=1):
            path = folder / f"scores-{number:05}-of-{len(shards):05}.safetensors"
            save_file({name: self.values[name].contiguous() for name in names}, path, metadata=metadata)

    @classmethod
    def load(cls, folder: str | Path) -> "WeightScores":
        """The scores in a folder written by `save`, read from their file as they are used.

        Raises ValueError for a folder without scores, a file that is none of them, and a missing or foreign shard.
        """
        paths = sorted(Path(folder).glob("*.safetensors"))
        if not paths:
            raise ValueError(f"{folder}: no scores there; expected a folder written by WeightScores.save")
        places: dict[str, Path] = {}
        described = set()
        for path in paths:
            try:
                with safe_open(path, framework="pt") as file:
                    metadata = file.metadata() or {}
                    places |= dict.fromkeys(file.keys(), path)
            except SafetensorError as error:
                raise ValueError(f"{path}: not a safetensors file ({error}); expected scores") from None
            if metadata.get("format") != FORMAT:
                raise ValueError(f"{path}: no scores of harmcircuits (format {metadata.get('format')!r})")
            described.add((metadata["shapes"], metadata["source"]))
        shapes = {name: tuple(shape) for name, shape in json.loads(next(iter(described))[0]).items()}
        if len(described) > 1 or places.keys() != shapes.keys():
            raise ValueError(f"{folder}: a shard is missing or of other scores; save them again into an empty folder")
        return cls(_Saved(shapes, places), Source.from_json(next(iter(described))[1]))


@dataclass(frozen=True)
class _Saved(Mapping[str, Tensor]):
    """Tensors in safetensors files, in the order of `shapes`; each is mapped into memory when it is asked for."""

    shapes: Mapping[str, tuple[int, ...]]
    places: Mapping[str, Path]

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self.places[name], framework="pt") as file:
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def mean_scores(parts: Sequence[WeightScores], weights: Sequence[float]) -> WeightScores:
    """The weighted mean of scores, sum_i w_i s_i / sum_i w_i: for instance of parts of the calibration data.

    A mean of gradients over all examples is this mean over parts, with the number of examples as weights; so bootstrap
    resamples of whole parts cost no further pass over the model. Exact for `removal_effect` and `snip_scores` after
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
