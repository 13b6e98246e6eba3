"""A score for every weight, and the source of the scores."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from harmcircuits.display import card, facts, listed, plural, settings_text
from harmcircuits.storage import empty_folder, read_tensors, write_tensors

if TYPE_CHECKING:
    from harmcircuits.circuits.masks import WeightMask

Shapes = Mapping[str, tuple[int, ...]]

SCORES_FORMAT = "harmcircuits.scores.1"
SHARD_BYTES = 2**31  # the limit of a file's size, because a file is copied in memory
SCORE_BYTES = 4  # of a float32


def not_finite(values: Mapping[str, Tensor]) -> str:
    """The name of a tensor that is not finite; empty if all are finite."""
    # A finite sum has finite terms only, and a sum needs no copy; but finite terms may overflow.
    # All sums are read together, because each reading waits for a GPU.
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
    weights_digest: str = field(default="", compare=False)

    def child(self, method: str, /, *parents: "Source", **settings: Any) -> "Source":
        """The source of a result that `method` makes from this and from further parents."""
        return Source(self.model, method, settings, (self, *parents))

    @property
    def all_weights(self) -> set[str]:
        """The digests of the weights on which this and its ancestors were made."""
        digests = {self.weights_digest} if self.weights_digest else set()
        for parent in self.parents:
            digests |= parent.all_weights
        return digests

    @property
    def facts(self) -> dict[str, str]:
        """The texts that a notebook shows, by title."""
        return {
            "settings": settings_text(self.settings),
            "from": listed(parent.method for parent in self.parents),
            "model": self.model,
        }

    def to_json(self) -> str:
        """This source and its ancestors as one JSON object."""
        return json.dumps(asdict(self, dict_factory=_file_row), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Source":
        """The inverse of `to_json`."""
        return _from_file_row(json.loads(text))


def _file_row(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """The fields as a file names them: the digest is "weights", and absent if it is empty."""
    row = dict(items)
    digest = row.pop("weights_digest")
    return {**row, "weights": digest} if digest else row


def _from_file_row(row: Mapping[str, Any]) -> Source:
    parents = tuple(_from_file_row(parent) for parent in row["parents"])
    digest = row.get("weights", "")
    return Source(row["model"], row["method"], row["settings"], parents, digest)


@dataclass(frozen=True, repr=False)
class WeightScores:
    """One float32 score for each weight.

    Loaded scores stay in their file, which is mapped into memory, so they occupy no memory.

    >>> scores = hc.removal_effect(bridge, harm)
    >>> scores, -scores
    (WeightScores(removal_effect of 24 examples, 983,040 weights),
     WeightScores(negative, 983,040 weights))

    Attributes:
        values: a tensor of scores for each weight, in the shape of the stored weight.
        source: how the scores were made.

    Raises:
        ValueError: scores of another dtype, or a score that is not finite; names the weight.
    """

    values: Mapping[str, Float[Tensor, "..."]]
    source: Source

    def __post_init__(self) -> None:
        for name, value in self.values.items():
            # The selection reads the bits of float32 numbers.
            if value.dtype != torch.float32:
                raise ValueError(
                    f"WeightScores: {name} is {value.dtype}; expected torch.float32, so convert "
                    "it with .float()"
                )
        name = not_finite(self.values)
        if name:
            raise ValueError(
                f"WeightScores: {name} has a score that is not finite; check the loss and the dtype"
            )
        values = MappingProxyType(dict(self.values))
        object.__setattr__(self, "values", values)

    def __reduce__(self) -> tuple[Any, ...]:
        # A read-only mapping can be neither pickled nor deep-copied.
        return WeightScores, (dict(self.values), self.source)

    def __repr__(self) -> str:
        n_examples = self.source.settings.get("n_examples")
        data = f" of {plural(n_examples, 'example')}" if n_examples else ""
        return f"WeightScores({self.source.method}{data}, {self._n_weights:,} weights)"

    def _repr_html_(self) -> str:
        weights = f"{self._n_weights:,} in {len(self.shapes)} matrices"
        table = facts({"weights": weights, **self.source.facts})
        return card(f"WeightScores: {self.source.method}", table)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every scored weight as stored."""
        return {name: tuple(value.shape) for name, value in self.values.items()}

    @property
    def _n_weights(self) -> int:
        return sum(value.numel() for value in self.values.values())

    def sum_over(self, mask: "WeightMask") -> float:
        """The sum of the scores of a mask's weights.

        For scores of `removal_effect`, the sum predicts to first order how the objective changes
        under the mask.

        Args:
            mask: a mask of the same model.

        Raises:
            ValueError: a mask of another model.
        """
        if mask.source.model != self.source.model:
            raise ValueError(
                f"sum_over: the mask is of model {mask.source.model}, but the scores are of "
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
        return WeightScores(values, self.source.child("negative"))

    def save(self, folder: str | Path) -> None:
        """Write the scores, shapes and source as safetensors files. No file is a pickle.

        Args:
            folder: a new or empty folder.

        Raises:
            ValueError: a folder that is not empty.
        """
        folder = empty_folder(folder)
        metadata = {"shapes": json.dumps(self.shapes), "source": self.source.to_json()}
        shards = _shards(self.shapes)
        for number, names in enumerate(shards, start=1):
            path = folder / f"scores-{number:05}-of-{len(shards):05}.safetensors"
            tensors = {name: self.values[name] for name in names}
            write_tensors(path, SCORES_FORMAT, tensors, metadata)

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
                f"{folder}: no scores there; expected a folder that WeightScores.save wrote"
            )
        # Every shard describes all scores, so that a missing or foreign shard is noticed.
        values: dict[str, Tensor] = {}
        headers = []
        for path in paths:
            tensors, header = read_tensors(path, SCORES_FORMAT, "scores")
            values |= tensors
            headers.append(header)

        header = headers[0]
        shapes = read_shapes(header["shapes"])
        is_foreign = any(other != header for other in headers)
        if is_foreign or values.keys() != shapes.keys():
            raise ValueError(
                f"{folder}: a shard is missing or of other scores; "
                "save them again into an empty folder"
            )
        values = {name: values[name] for name in shapes}
        return cls(values, Source.from_json(header["source"]))


def _shards(shapes: Shapes) -> list[list[str]]:
    """The names of the weights in each file, in order."""
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
    """The shapes of the weights of saved scores or of a saved mask, in their order."""
    return {name: tuple(shape) for name, shape in json.loads(text).items()}


def mean_scores(parts: Sequence[WeightScores], weights: Sequence[float]) -> WeightScores:
    """The weighted mean of scores, sum_i w_i s_i / sum_i w_i."""
    first = parts[0]
    for part in parts:
        if part.shapes != first.shapes or part.source.model != first.source.model:
            raise ValueError("mean_scores: the scores are of different models or weights")
    values = {name: torch.zeros_like(value) for name, value in first.values.items()}
    for part, weight in zip(parts, weights, strict=True):
        share = weight / sum(weights)
        if not share:  # a part that a resample omits need not be read
            continue
        for name, total in values.items():
            total.add_(part.values[name], alpha=share)
    sources = [part.source for part in parts[1:]]
    settings = {"weights": [float(weight) for weight in weights]}
    return WeightScores(values, first.source.child("mean", *sources, **settings))
