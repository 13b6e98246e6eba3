"""The folder of a search: what it writes after every stage, and how the same search goes on."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import ceil
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from harmcircuits.batches import Batch
from harmcircuits.circuits.gates import Gates
from harmcircuits.circuits.masks import WeightMask
from harmcircuits.hooks.bridge import evaluating
from harmcircuits.hooks.masking import masked
from harmcircuits.measurements import Rows
from harmcircuits.search.descent import Search
from harmcircuits.storage import read_tensors, write_tensors

FILE = "search.safetensors"
FORMAT = "harmcircuits.search.6"
# Objectives are compared on a model of which a few weights are many times as large.
PROBE_SHARE = 1e-3  # of each matrix
PROBE_SCALE = 30.0
# Of a loss, or nats per token below one: another machine rounds otherwise. In bfloat16 another
# number of threads moves the losses of the probe by up to 4 % (Qwen2.5-Coder-0.5B, 96 texts).
TOLERANCE = 0.1


class Identity(NamedTuple):
    """The parts that two searches must share for one to go on from the other."""

    settings: str
    fresh_answers: str  # a digest of those of the unpruned model
    losses: list[float]  # before the search, and with a probe


def identity_of(search: Search) -> Identity:
    """The identity of a search that has not begun."""
    bridge, no_weights = search.bridge, search.gates.candidates
    dtype = next(iter(bridge.parameters())).dtype
    settings = f"{no_weights.source.to_json()} {search.schedule.sizes} {dtype}"
    answers = []
    if search.fresh_answers is not None:
        answers = [batch.tokens.tolist() for batch in search.fresh_answers()]

    # Functions are told apart by their values: different objectives may have one name, and be
    # equal on the unpruned model.
    losses: list[float] = []
    probe = masked(bridge, _probe(search), scale=PROBE_SCALE, same_model=False)
    with torch.no_grad(), evaluating(bridge), probe:
        for group in search.groups:
            batch = group.batches[0]
            probe_loss = group.objective(bridge, batch).float()
            losses += [*group.base_loss[: len(batch)].tolist(), *probe_loss.tolist()]
    return Identity(settings, hashlib.sha256(repr(answers).encode()).hexdigest(), losses)


def _probe(search: Search) -> WeightMask:
    """A few random weights of each matrix, the same in every search."""
    generator = torch.Generator().manual_seed(0)
    removed = {}
    for name, site in search.benefits.slopes.sites.items():
        n_weights = site.parameter.numel()
        n = ceil(PROBE_SHARE * n_weights)
        removed[name] = torch.randint(n_weights, (n,), generator=generator).unique()
    return replace(search.gates.candidates, removed=removed)


def _is_same(first: Identity, second: Identity) -> bool:
    if first[:2] != second[:2] or len(first.losses) != len(second.losses):
        return False
    losses = torch.tensor(first.losses)
    difference = losses - torch.tensor(second.losses)
    return bool((difference.abs() <= TOLERANCE * losses.abs().clamp(min=1)).all())


@dataclass(frozen=True)
class SearchFolder:
    """The file of a search, and the identity of the search that may use it."""

    file: Path
    identity: Identity

    @classmethod
    def of(cls, search: Search, folder: str | Path) -> "SearchFolder":
        """The folder of a search that has not begun."""
        return cls(Path(folder) / FILE, identity_of(search))

    def save(self, search: Search) -> None:
        """Write the state of a search; its slopes, which are large, as long as it needs them."""
        gates = search.gates
        answers = []
        for batch in search.groups[0].batches:
            answer = (batch.tokens.tolist(), batch.is_target.tolist())
            answers.append(answer)
        state = {
            "identity": self.identity,
            "stage": search.stage,
            "step": search.step,
            "stride": gates.stride,
            "trace": [asdict(row) for row in search.trace],
            "groups": [(group.multiplier, group.mean_rise, group.queue) for group in search.groups],
            "answers": answers,
        }
        tensors = {
            "z": gates.z,
            "momentum": gates.momentum,
            "generator": search.generator.get_state(),
            **_prefixed("candidates ", gates.candidates.removed),
        }
        for share, mask in search.masks.items():
            tensors |= _prefixed(f"mask {share} ", mask.removed)
        if search.stage < search.schedule.n_stages:
            tensors |= _prefixed("slope ", search.benefits.slopes.totals)
        write_tensors(self.file, FORMAT, tensors, {"state": json.dumps(state)})

    def resume(self, search: Search) -> None:
        """Take over the state in a folder, if it holds one."""
        if not self.file.exists():
            return
        tensors, metadata = read_tensors(self.file, FORMAT, "search")
        state = json.loads(metadata["state"])
        if not _is_same(Identity(*state["identity"]), self.identity):
            raise ValueError(
                f"{self.file.parent} holds another search (of other data, weights or options, by "
                "another objective, or with other fresh answers); give another folder, or remove "
                "this one"
            )
        search.stage = state["stage"]
        search.step = state["step"]
        search.trace = [*Rows.from_dicts(state["trace"])]
        search.generator.set_state(tensors["generator"])

        target = search.groups[0]
        fresh = state["answers"][len(target.batches) :]
        for tokens, is_target in fresh:
            batch = Batch(torch.tensor(tokens), torch.tensor(is_target))
            target.extend(search.bridge, [batch])
        for group, values in zip(search.groups, state["groups"], strict=True):
            group.multiplier, group.mean_rise, group.queue = values

        no_weights = search.gates.candidates
        for size in search.schedule.sizes:
            removed = _unprefixed(f"mask {size.share} ", tensors)
            search.masks[size.share] = replace(no_weights, removed=removed)
        slopes = search.benefits.slopes
        if search.stage < search.schedule.n_stages:
            for name in slopes.sites:
                slopes.start(name, tensors[f"slope {name}"])
        removed = _unprefixed("candidates ", tensors)
        candidates = replace(no_weights, removed=removed)
        search.gates = Gates.over(candidates, slopes.sites)
        search.gates.z = tensors["z"]
        search.gates.momentum = tensors["momentum"]
        search.gates.stride = state["stride"]


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: values for name, values in tensors.items()}


def _unprefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names start with a prefix, by the rest of the name."""
    suffixed = {}
    for name, values in tensors.items():
        if name.startswith(prefix):
            suffixed[name.removeprefix(prefix)] = values
    return suffixed
