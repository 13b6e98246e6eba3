"""A score for every weight, and where it came from."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from harmcircuits.display import plural

FORMAT = "harmcircuits.scores.1"
SHARD_BYTES = 2**31
SCORE_BYTES = 4  # of a float32


@runtime_checkable
class Removed(Protocol):
    """Something that holds the flat indices of removed weights by name: a mask.

    A protocol, because masks are made of scores and their module imports this one.
    """

    @property
    def removed(self) -> Mapping[str, Int[Tensor, " _"]]:
        """The indices."""
        ...


@dataclass(frozen=True)
class Source:
    """How scores or a mask were made.

    Attributes:
        model: the model's fingerprint.
        method: what made them, such as "removal_effect".
        settings: its settings.
        parents: what they were made from.
    """

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
    return {
        "model": source.model,
        "method": source.method,
        "settings": dict(source.settings),
        "parents": [_as_dict(parent) for parent in source.parents],
    }


def _from_dict(row: Mapping[str, Any]) -> Source:
    parents = [_from_dict(parent) for parent in row["parents"]]
    return Source(
        row["model"],
        row["method"],
        row["settings"],
        tuple(parents),
    )


@dataclass(frozen=True, repr=False)
class WeightScores:
    """One float32 score per weight.

    Loaded scores stay in their file: each `values[name]` is read when it is needed, so that a
    selection never holds more than one matrix.

    >>> scores = hc.removal_effect(bridge, harm)
    >>> scores, -scores
    (WeightScores(removal_effect of 24 examples, 983,040 weights),
     WeightScores(negative, 983,040 weights))

    Attributes:
        values: for each weight a tensor that has the shape of the weight as stored.
        source: how they were made.

    Raises:
        ValueError: a score that is not finite, with the name of the weight.
    """

    values: Mapping[str, Float[Tensor, "..."]]
    source: Source

    def __post_init__(self) -> None:
        if isinstance(self.values, _Saved):  # checked before they were written
            return
        for name, value in self.values.items():
            # A sum is finite only if every term is, and it needs no copy of the tensor. Finite
            # terms can overflow to an infinite sum, so then each of them is checked.
            total = value.sum(dtype=value.dtype).item()
            if not math.isfinite(total) and not value.isfinite().all():
                raise ValueError(
                    f"WeightScores: {name} holds a score that is not finite; "
                    "look at the loss and the dtype"
                )
        values = MappingProxyType(dict(self.values))
        object.__setattr__(self, "values", values)

    def __repr__(self) -> str:
        sizes = map(math.prod, self.shapes.values())
        examples = self.source.settings.get("n_examples")
        data = f" of {plural(examples, 'example')}" if examples else ""
        return f"WeightScores({self.source.method}{data}, {sum(sizes):,} weights)"

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every scored weight as stored."""
        if isinstance(self.values, _Saved):
            return dict(self.values.shapes)
        return {name: tuple(value.shape) for name, value in self.values.items()}

    def sum_over(self, mask: Removed) -> float:
        """The sum of the scores of a mask's weights.

        Of `removal_effect` it is the first-order prediction of the objective's change under the
        mask.

        Args:
            mask: over the same weights.
        """
        total = 0.0
        for name, index in mask.removed.items():
            scores = self.values[name].flatten()[index]
            # In float64, because first-order effects of both signs cancel.
            total += scores.double().sum().item()
        return total

    def __neg__(self) -> "WeightScores":
        """The scores with the opposite sign."""
        values = {name: -value for name, value in self.values.items()}
        source = Source(self.source.model, "negative", {}, (self.source,))
        return WeightScores(values, source)

    def save(
        self,
        folder: str | Path,
        *,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        """Write safetensors shards with the shapes and the source into a folder. Never pickle.

        Args:
            folder: a new or empty one.
            shard_bytes: about how large a shard is; each holds whole matrices.

        Raises:
            ValueError: a folder that holds something.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise ValueError(f"{folder} is not empty; give a new folder for the scores")
        metadata = {
            "format": FORMAT,
            "shapes": json.dumps(self.shapes),
            "source": self.source.to_json(),
        }
        shards = _shards(self.shapes, shard_bytes)
        for number, names in enumerate(shards, start=1):
            path = folder / f"scores-{number:05}-of-{len(shards):05}.safetensors"
            tensors = {name: self.values[name].contiguous() for name in names}
            save_file(tensors, path, metadata=metadata)

    @classmethod
    def load(cls, folder: str | Path) -> "WeightScores":
        """The scores in a folder written by `save`, read from their file as they are used.

        Args:
            folder: the folder.

        Raises:
            ValueError: a folder without scores, a file that holds something else, and a missing or
                foreign shard.
        """
        paths = sorted(Path(folder).glob("*.safetensors"))
        if not paths:
            raise ValueError(
                f"{folder}: no scores there; expected a folder written by WeightScores.save"
            )
        # Every shard describes the whole, so a missing or foreign one shows.
        places: dict[str, Path] = {}
        descriptions = set()
        for path in paths:
            names, shapes, source = _header(path)
            places |= dict.fromkeys(names, path)
            descriptions.add((shapes, source))

        shapes_text, source_text = next(iter(descriptions))
        stored = json.loads(shapes_text)
        shapes = {name: tuple(shape) for name, shape in stored.items()}
        if len(descriptions) > 1 or places.keys() != shapes.keys():
            raise ValueError(
                f"{folder}: a shard is missing or of other scores; "
                "save them again into an empty folder"
            )
        return cls(_Saved(shapes, places), Source.from_json(source_text))


def _shards(shapes: Mapping[str, tuple[int, ...]], shard_bytes: int) -> list[list[str]]:
    """The names that each shard holds, in order."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        n_bytes = SCORE_BYTES * math.prod(shape)
        if shards[-1] and size + n_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += n_bytes
    return shards


def _header(path: Path) -> tuple[list[str], str, str]:
    """The names in a shard, and the shapes and the source of all scores as JSON."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = list(file.keys())
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file ({error}); expected scores") from None
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path}: no scores of harmcircuits (format {metadata.get('format')!r})")
    return names, metadata["shapes"], metadata["source"]


@dataclass(frozen=True)
class _Saved(Mapping[str, Tensor]):
    """Tensors in safetensors files; each is mapped into memory when it is needed.

    Attributes:
        shapes: of every tensor, in their order.
        places: the file that holds each.
    """

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
    """The weighted mean of scores, sum_i w_i s_i / sum_i w_i.

    A mean of gradients over all examples is this mean over parts of them, with the number of
    examples as weights; so bootstrap resamples of whole parts cost no further pass over the model.
    Exact for `removal_effect` and `snip_scores` after absolute values, not for `"before_abs"`.

    Args:
        parts: the scores, for instance of parts of the calibration data.
        weights: the weight of each of them.

    Raises:
        ValueError: no parts, not exactly one weight for each, weights that are negative or all
            zero, and parts of different models or matrices.
    """
    _refuse_parts(parts, weights)
    first = parts[0]
    model = first.source.model
    values = {name: torch.zeros_like(value) for name, value in first.values.items()}
    for part, weight in zip(parts, weights, strict=True):
        if not weight:  # a part that a resample did not draw need not be read
            continue
        for name, total in values.items():
            total.add_(part.values[name], alpha=weight / sum(weights))
    settings = {"weights": [float(weight) for weight in weights]}
    parents = tuple(part.source for part in parts)
    return WeightScores(values, Source(model, "mean", settings, parents))


def _refuse_parts(parts: Sequence[WeightScores], weights: Sequence[float]) -> None:
    if not parts or len(parts) != len(weights):
        raise ValueError(
            f"mean_scores: {len(parts)} scores and {len(weights)} weights; "
            "give one weight for each score"
        )
    if min(weights) < 0 or sum(weights) <= 0:
        raise ValueError(
            f"mean_scores: weights {list(weights)[:8]}; expected non-negative ones, not all zero"
        )
    first = parts[0]
    model = first.source.model
    is_same = [part.shapes == first.shapes and part.source.model == model for part in parts]
    if not all(is_same):
        raise ValueError("mean_scores: the scores are of different models or weights")
