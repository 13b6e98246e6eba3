"""A score for every weight, and where it came from."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from harmcircuits.circuits.sites import by_place
from harmcircuits.display import (
    card,
    facts,
    heat_strip,
    html_table,
    listed,
    note,
    number_text,
    plural,
    settings_text,
)
from harmcircuits.storage import empty_folder, read_tensors, write_tensors

FORMAT = "harmcircuits.scores.1"
SHARD_BYTES = 2**31
SCORE_BYTES = 4  # of a float32
SHOWN_WEIGHTS = 2**30  # more are not read for a picture: it would take seconds
SHOWN_MATRICES = 5


@runtime_checkable
class Removed(Protocol):
    """Something that holds the flat indices of removed weights by name: a mask."""

    @property
    def removed(self) -> Mapping[str, Int[Tensor, " _"]]:
        """The indices."""
        ...


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
        return json.dumps(_as_dict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Source":
        """The inverse of `to_json`."""
        try:
            return _from_dict(json.loads(text))
        except RecursionError:
            raise ValueError("source: nested too deeply; expected one of harmcircuits") from None


def _as_dict(source: Source) -> dict[str, Any]:
    row: dict[str, Any] = {
        "model": source.model,
        "method": source.method,
        "settings": dict(source.settings),
        "parents": [_as_dict(parent) for parent in source.parents],
    }
    if source.weights:
        row["weights"] = source.weights
    return row


SOURCE_TYPES = {"model": str, "method": str, "settings": dict, "parents": list}


def _from_dict(row: Any) -> Source:
    for name, kind in SOURCE_TYPES.items():
        if not isinstance(row, dict) or not isinstance(row.get(name), kind):
            raise ValueError(f"source: {name} is no {kind.__name__}; expected one of harmcircuits")
    parents = [_from_dict(parent) for parent in row["parents"]]
    return Source(
        row["model"],
        row["method"],
        row["settings"],
        tuple(parents),
        str(row.get("weights", "")),
    )


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

    def _repr_html_(self) -> str:
        n_weights = sum(map(math.prod, self.shapes.values()))
        source = self.source
        table = facts(
            {
                "weights": f"{n_weights:,} in {len(self.shapes)} matrices",
                **source.facts,
            }
        )
        title = f"WeightScores: {source.method}"
        if n_weights > SHOWN_WEIGHTS:
            return card(title, table, note("too many to read for a picture"))
        return card(title, table, *self._largest())

    def _largest(self) -> list[str]:
        """The largest score of every matrix as a picture, and the largest of them as a table."""
        largest, places = {}, {}
        for name, value in self.values.items():
            if not value.numel():
                continue
            flat = value.flatten()
            index = flat.argmax()
            largest[name] = flat[index].item()
            places[name] = [int(axis) for axis in torch.unravel_index(index, value.shape)]
        ordered = sorted(largest, key=lambda name: -largest[name])[:SHOWN_MATRICES]
        body = [[name, number_text(largest[name]), str(places[name])] for name in ordered]
        by_kind = by_place(largest)
        texts = {}
        for (layer, kind), value in by_kind.items():
            texts[layer, kind] = f"layer {layer} {kind}: at most {value:.3g}"
        caption = note("largest score of each matrix") if by_kind else ""
        head = ["largest in", "score", "at"]
        return [heat_strip(by_kind, texts), caption, html_table(head, body)]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every scored weight as stored."""
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
        folder = empty_folder(folder)
        metadata = {
            "shapes": json.dumps(self.shapes),
            "source": self.source.to_json(),
        }
        shards = _shards(self.shapes, shard_bytes)
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
                foreign shard, and a damaged one. Shards of earlier versions have no digest and are
                read as they are.
        """
        if Path(folder).is_file():
            raise ValueError(f"{folder}: a file, not a folder; give the folder of saved scores")
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


def read_shapes(text: str) -> dict[str, tuple[int, ...]]:
    """The shapes of all weights that a file of scores or a mask names, in their order."""
    return {name: tuple(shape) for name, shape in json.loads(text).items()}


def mean_scores(parts: Sequence[WeightScores], weights: Sequence[float]) -> WeightScores:
    """The weighted mean of scores, sum_i w_i s_i / sum_i w_i."""
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
