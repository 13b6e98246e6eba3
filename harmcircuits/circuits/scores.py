"""A score for every weight, and where it came from."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from harmcircuits.display import card, facts, listed, plural, settings_text
from harmcircuits.storage import empty_folder, read_tensors, write_tensors

FORMAT = "harmcircuits.scores.1"
SHARD_BYTES = 2**31  # a file is copied in memory before it is written
SCORE_BYTES = 4  # of a float32


@runtime_checkable
class Removed(Protocol):
    """Something that holds the flat indices of removed weights by name: a mask."""

    @property
    def removed(self) -> Mapping[str, Int[Tensor, " _"]]:
        """The indices."""
        ...

    @property
    def source(self) -> "Source":
        """How it was made."""
        ...


def not_finite(values: Mapping[str, Tensor]) -> str:
    """The name of a tensor that is not finite, or none."""
    # A sum is finite only if every term is, and needs no copy; that of finite terms may overflow.
    # All sums are read together, since each reading waits for a GPU.
    sums = [value.sum() for value in values.values()]
    if not sums or torch.stack([total.to(sums[0].device) for total in sums]).isfinite().all():
        return ""
    for name, value in values.items():
        if not value.isfinite().all():
            return name
    return ""


@dataclass(frozen=True)
class Source:
    """How scores or a mask were made."""

    model: str
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    parents: tuple["Source", ...] = ()
    weights: str = field(default="", compare=False)

    @property
    def all_weights(self) -> set[str]:
        """The digests of the weights that this or an ancestor was made on."""
        digests = {self.weights} if self.weights else set()
        for parent in self.parents:
            digests |= parent.all_weights
        return digests

    @property
    def facts(self) -> dict[str, str]:
        """What a notebook shows of it, by title."""
        return {
            "settings": settings_text(self.settings),
            "from": listed(parent.method for parent in self.parents),
            "model": self.model,
        }

    def to_json(self) -> str:
        """This source and its ancestors as one JSON object."""
        row = asdict(self, dict_factory=_without_empty_weights)
        return json.dumps(row, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Source":
        """The inverse of `to_json`."""
        return _from_row(json.loads(text))


def _without_empty_weights(items: list[tuple[str, Any]]) -> dict[str, Any]:
    # What is derived, as `-scores` is, names the weights by its parents alone.
    return {name: value for name, value in items if (name, value) != ("weights", "")}


def _from_row(row: Any) -> Source:
    parents = tuple(_from_row(parent) for parent in row["parents"])
    return Source(**{**row, "parents": parents})


@dataclass(frozen=True, repr=False)
class WeightScores:
    """One float32 score per weight.

    Loaded scores stay in their file, which is mapped into memory: they need none that must be kept.

    >>> scores = hc.removal_effect(bridge, harm)
    >>> scores, -scores
    (WeightScores(removal_effect of 24 examples, 983,040 weights),
     WeightScores(negative, 983,040 weights))

    Attributes:
        values: for each weight a tensor that has the shape of the weight as stored.
        source: how they were made.

    Raises:
        ValueError: scores of another dtype, or one that is not finite, with the name of the weight.
    """

    values: Mapping[str, Float[Tensor, "..."]]
    source: Source

    def __post_init__(self) -> None:
        for name, value in self.values.items():
            # The selection reads their bits.
            if value.dtype != torch.float32:
                raise ValueError(
                    f"WeightScores: {name} is {value.dtype}; expected torch.float32: "
                    "give its .float()"
                )
        name = not_finite(self.values)
        if name:
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

    def _repr_html_(self) -> str:
        n_weights = sum(map(math.prod, self.shapes.values()))
        weights = f"{n_weights:,} in {len(self.shapes)} matrices"
        table = facts({"weights": weights, **self.source.facts})
        return card(f"WeightScores: {self.source.method}", table)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every scored weight as stored."""
        return {name: tuple(value.shape) for name, value in self.values.items()}

    def sum_over(self, mask: Removed) -> float:
        """The sum of the scores of a mask's weights.

        Of `removal_effect` it is the first-order prediction of the objective's change under the
        mask.

        Args:
            mask: of the same model.

        Raises:
            ValueError: a mask of another model.
        """
        if mask.source.model != self.source.model:
            raise ValueError(
                f"sum_over: a mask of model {mask.source.model}, the scores are of "
                f"{self.source.model}"
            )
        total = 0.0
        for name, index in mask.removed.items():
            scores = self.values[name].flatten()[index].cpu()  # not every device has float64
            # In float64, because first-order effects of both signs cancel.
            total += scores.double().sum().item()
        return total

    def __neg__(self) -> "WeightScores":
        """The scores with the opposite sign."""
        values = {name: -value for name, value in self.values.items()}
        source = Source(self.source.model, "negative", {}, (self.source,))
        return WeightScores(values, source)

    def save(self, folder: str | Path) -> None:
        """Write safetensors files with the shapes and the source into a folder. Never pickle.

        Args:
            folder: a new or empty one.

        Raises:
            ValueError: a folder that holds something.
        """
        folder = empty_folder(folder)
        metadata = {"shapes": json.dumps(self.shapes), "source": self.source.to_json()}
        shards = _shards(self.shapes)
        for number, names in enumerate(shards, start=1):
            path = folder / f"scores-{number:05}-of-{len(shards):05}.safetensors"
            tensors = {name: self.values[name] for name in names}
            write_tensors(path, FORMAT, tensors, metadata)

    @classmethod
    def load(cls, folder: str | Path) -> "WeightScores":
        """The scores in a folder written by `save`, mapped into memory.

        Args:
            folder: the folder.

        Raises:
            ValueError: a folder without scores, a file that holds something else, a missing or
                foreign shard, and a damaged one.
        """
        paths = sorted(Path(folder).glob("*.safetensors"))
        if not paths:
            raise ValueError(
                f"{folder}: no scores there; expected a folder written by WeightScores.save"
            )
        # Every shard describes the whole, so a missing or foreign one shows.
        values: dict[str, Tensor] = {}
        descriptions = []
        for path in paths:
            tensors, metadata = read_tensors(path, FORMAT, "scores")
            values |= tensors
            descriptions.append((metadata["shapes"], metadata["source"]))

        stored_shapes, stored_source = descriptions[0]
        shapes = read_shapes(stored_shapes)
        if len(set(descriptions)) > 1 or values.keys() != shapes.keys():
            raise ValueError(
                f"{folder}: a shard is missing or of other scores; "
                "save them again into an empty folder"
            )
        in_order = {name: values[name] for name in shapes}
        return cls(in_order, Source.from_json(stored_source))


def _shards(shapes: Mapping[str, tuple[int, ...]]) -> list[list[str]]:
    """The names that each file holds, in order."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        n_bytes = SCORE_BYTES * math.prod(shape)
        if shards[-1] and size + n_bytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += n_bytes
    return shards


def read_shapes(text: str) -> dict[str, tuple[int, ...]]:
    """The shapes of all weights that a file of scores or a mask names, in their order."""
    return {name: tuple(shape) for name, shape in json.loads(text).items()}


def mean_scores(parts: Sequence[WeightScores], weights: Sequence[float]) -> WeightScores:
    """The weighted mean of scores, sum_i w_i s_i / sum_i w_i."""
    first = parts[0]
    model = first.source.model
    for part in parts:
        if part.shapes != first.shapes or part.source.model != model:
            raise ValueError("mean_scores: the scores are of different models or weights")
    values = {name: torch.zeros_like(value) for name, value in first.values.items()}
    for part, weight in zip(parts, weights, strict=True):
        share = weight / sum(weights)
        if not share:  # a part that a resample did not draw need not be read
            continue
        for name, total in values.items():
            total.add_(part.values[name], alpha=share)
    settings = {"weights": [float(weight) for weight in weights]}
    parents = tuple(part.source for part in parts)
    return WeightScores(values, Source(model, "mean", settings, parents))
