"""The folder of a search: what it writes after every stage, and how the same search goes on."""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from harmcircuits.batches import Batch
from harmcircuits.circuits.gates import Gates
from harmcircuits.measurements import Rows
from harmcircuits.search.descent import Search
from harmcircuits.storage import read_tensors, write_tensors

FILE = "search.safetensors"
FORMAT = "harmcircuits.search.5"


def save(search: Search, folder: str | Path) -> None:
    """Write the state of a search; its slopes, which are large, as long as it needs them."""
    gates = search.gates
    answers = []
    for batch in search.groups[0].batches:
        answer = (batch.tokens.tolist(), batch.is_target.tolist())
        answers.append(answer)
    state = {
        "key": _key(search),
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
    write_tensors(Path(folder) / FILE, FORMAT, tensors, {"state": json.dumps(state)})


def resume(search: Search, folder: str | Path) -> None:
    """Take over the state in a folder, if it holds one."""
    path = Path(folder) / FILE
    if not path.exists():
        return
    tensors, metadata = read_tensors(path, FORMAT, "search")
    state = json.loads(metadata["state"])
    if state["key"] != _key(search):
        raise ValueError(
            f"{folder} holds another search (of other data, weights or options, or by another "
            "objective); give another folder, or remove this one"
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


def _key(search: Search) -> str:
    """What two searches must share for one to go on from the other."""
    source = search.gates.candidates.source.to_json()
    losses = []
    for group in search.groups:
        # The objective by its values: different functions may have the same name.
        first_batch = group.base_loss[: len(group.batches[0])]
        losses.append(f"{first_batch.mean():.3g}")
    return f"{source} {search.schedule.sizes} {losses}"


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: values for name, values in tensors.items()}


def _unprefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names start with a prefix, by the rest of the name."""
    suffixed = {}
    for name, values in tensors.items():
        if name.startswith(prefix):
            suffixed[name.removeprefix(prefix)] = values
    return suffixed
