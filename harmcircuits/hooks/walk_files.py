"""The folder in which a search keeps its walk, so that it can go on after an interruption."""

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

from harmcircuits.circuits.masks import WeightMask
from harmcircuits.display import listed
from harmcircuits.measurements import Rows
from harmcircuits.storage import read_json, read_tensors, write_json, write_tensors

Sums = Mapping[str, Mapping[str, Float[Tensor, "..."]]]
Masks = Mapping[str, WeightMask | None]


FORMAT = "harmcircuits.sums.1"
ENTRIES = {"key", "state", "masks", "sums", "trace"}  # of walk.json
EXPECTED = "the walk of a search; remove its folder to start afresh"


class KeptWalk(NamedTuple):
    """What a folder holds of a walk."""

    state: Mapping[str, Any]
    sums: Sums
    masks: Masks
    trace: Rows


def write_walk(folder: str | Path, key: str, walk: KeptWalk) -> None:
    """Keep a walk in a folder, in place of an earlier one."""
    folder = Path(folder)
    unfinished = folder / "unfinished"
    if unfinished.exists():
        shutil.rmtree(unfinished)
    unfinished.mkdir(parents=True)

    for name, tensors in walk.sums.items():
        write_tensors(unfinished / f"{name}.safetensors", FORMAT, tensors, {})
    for name, mask in walk.masks.items():
        if mask is not None:
            mask.save(unfinished / f"{name}-mask.safetensors")
    state = {
        "key": key,
        "state": dict(walk.state),
        "masks": {name: mask is not None for name, mask in walk.masks.items()},
        "sums": list(walk.sums),
        "trace": [asdict(row) for row in walk.trace],
    }
    write_json(unfinished / "walk.json", state)

    earlier = list(folder.glob("step-*"))
    unfinished.rename(folder / f"step-{walk.state['step']:03}")
    for path in earlier:
        shutil.rmtree(path)


def forget_sums(folder: str | Path) -> None:
    """Leave only the masks and the trace of a walk: its sums are as large as the model."""
    for path in Path(folder).glob("step-*/walk.json"):
        state = _state(path)
        names, state["sums"] = state["sums"], []
        write_json(path, state)
        for name in names:
            path.with_name(f"{name}.safetensors").unlink(missing_ok=True)


def _state(path: Path) -> dict[str, Any]:
    """What `write_walk` wrote into walk.json; raises ValueError for anything else."""
    state = read_json(path, EXPECTED)
    if state.keys() != ENTRIES:
        raise ValueError(f"{path}: it holds {listed(state)}; expected {EXPECTED}")
    return state


def read_walk(folder: str | Path, key: str) -> KeptWalk | None:
    """The furthest walk that a folder holds; None where it holds none."""
    steps = sorted(Path(folder).glob("step-*"))
    if not steps:
        return None
    latest = steps[-1]
    content = _state(latest / "walk.json")
    if content["key"] != key:
        raise ValueError(
            f"{folder} holds the walk of another search (other data, weights or options); "
            "give another folder, or remove it"
        )
    sums = {}
    for name in content["sums"]:
        path = latest / f"{name}.safetensors"
        sums[name], _ = read_tensors(path, FORMAT, "sum of a search")
    masks: dict[str, WeightMask | None] = {}
    for name, is_there in content["masks"].items():
        path = latest / f"{name}-mask.safetensors"
        masks[name] = WeightMask.load(path) if is_there else None
    return KeptWalk(content["state"], sums, masks, Rows.of_dicts(content["trace"]))
