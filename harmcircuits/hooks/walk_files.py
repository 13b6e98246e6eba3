"""The folder in which a search keeps its walk, so that it can go on after an interruption."""

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

from jaxtyping import Float
from torch import Tensor

from harmcircuits.circuits.masks import WeightMask
from harmcircuits.measurements import Rows
from harmcircuits.storage import read_json, read_tensors, write_json, write_tensors

FORMAT = "harmcircuits.sums.1"
STATE = "walk.json"
UNFINISHED = ".unfinished-"


class KeptWalk(NamedTuple):
    """What a folder holds of a walk; of sums and masks those that there are."""

    state: Mapping[str, Any]
    sums: Mapping[str, Mapping[str, Float[Tensor, "..."]]]
    masks: Mapping[str, WeightMask]
    trace: Rows


def write_walk(folder: str | Path, key: str, walk: KeptWalk) -> None:
    """Keep a walk in a folder, in place of an earlier one."""
    folder = Path(folder)
    for left in folder.glob(f"{UNFINISHED}*"):  # of a search that was killed
        shutil.rmtree(left)
    unfinished = folder / f"{UNFINISHED}{uuid4().hex[:8]}"
    for name, tensors in walk.sums.items():
        write_tensors(unfinished / "sums" / f"{name}.safetensors", FORMAT, tensors, {})
    for name, mask in walk.masks.items():
        mask.save(unfinished / "masks" / f"{name}.safetensors")
    trace = [asdict(row) for row in walk.trace]
    write_json(unfinished / STATE, {"key": key, **walk.state, "trace": trace})

    earlier = _steps(folder)
    unfinished.rename(folder / f"step-{walk.state['step']:03}")
    for path in earlier:
        shutil.rmtree(path)


def read_walk(folder: str | Path, key: str) -> KeptWalk | None:
    """The furthest walk that a folder holds; None where it holds none."""
    steps = _steps(Path(folder))
    if not steps:
        return None
    state = read_json(steps[-1] / STATE, "the walk of a search; remove its folder")
    if state["key"] != key:
        raise ValueError(
            f"{folder} holds the walk of another search (other data, weights or options); "
            "give another folder, or remove it"
        )
    sums, masks = {}, {}
    for path in steps[-1].glob("sums/*.safetensors"):
        sums[path.stem], _ = read_tensors(path, FORMAT, "sum of a search")
    for path in steps[-1].glob("masks/*.safetensors"):
        masks[path.stem] = WeightMask.load(path)
    return KeptWalk(state, sums, masks, Rows.of_dicts(state["trace"]))


def forget_sums(folder: str | Path) -> None:
    """Leave only the masks and the trace of a walk: its sums are as large as the model."""
    for step in _steps(Path(folder)):
        shutil.rmtree(step / "sums", ignore_errors=True)


def _steps(folder: Path) -> list[Path]:
    """The folders of its steps, in order; others may lie beside them."""
    return sorted(path.parent for path in folder.glob(f"step-*/{STATE}"))
