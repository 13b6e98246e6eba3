"""Every file that the package writes, damaged at random: refused by its name, or read as it was.

Would catch: a checksum that leaves something out, a truncated file that is read in part, an error of
another library that does not name the file, a reader that takes what another one wrote. Its twin:
the same files undamaged are read. `--damaged 1500` damages more of them.
"""

import random
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from harmcircuits.behaviours.probe import Probe
from harmcircuits.circuits.masks import WeightMask
from harmcircuits.circuits.scores import Source, WeightScores
from harmcircuits.hooks.walk_files import KeptWalk, read_walk, write_walk
from harmcircuits.measurements import Manifest, Measurement, Rows

SOURCE = Source("model", "test", {"seed": 1}, (Source("model", "parent"),), "0123456789abcdef")
SHAPES = {"a": (3, 4), "b": (2, 5)}
TRACE = Rows([Measurement.exact("weights_removed", {"step": step}, 3 * step) for step in range(4)])
ROWS = Rows([Measurement("harm_nll", {"split": f"{n}é"}, n / 7, n / 8, n / 6, 9) for n in range(9)])


class Format(NamedTuple):
    """A kind of file, or of folder.

    Attributes:
        write: writes one, given its path.
        read: what is in it, in a form that can be compared.
    """

    write: Callable[[Path], Any]
    read: Callable[[Path], Any]


def mask() -> WeightMask:
    removed = {"a": torch.tensor([0, 5, 11]), "b": torch.tensor([3])}
    return WeightMask(removed, SHAPES, SOURCE, TRACE)


def mask_content(loaded: WeightMask) -> Any:
    removed = {name: index.tolist() for name, index in loaded.removed.items()}
    return removed, dict(loaded.shapes), loaded.source.to_json(), loaded.trace


def scores() -> WeightScores:
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return WeightScores(values, SOURCE)


def scores_content(folder: Path) -> Any:
    loaded = WeightScores.load(folder)
    values = {name: loaded.values[name].tolist() for name in loaded.values}
    return values, loaded.shapes, loaded.source.to_json()


def probe_content(path: Path) -> Any:
    loaded = Probe.load(path)
    direction = loaded.direction.tolist()
    return loaded.layers, direction, loaded.bias, loaded.threshold, loaded.rows, loaded.model


def write_a_walk(folder: Path) -> None:
    state = {"step": 2, "rung": 1, "target_loss": 0.25, "best": []}
    sums = {"benefit": dict(scores().values), "price": {}}
    write_walk(folder, "key", KeptWalk(state, sums, {"accepted": mask(), "refused": None}, TRACE))


def walk_content(folder: Path) -> Any:
    walk = read_walk(folder, "key")
    assert walk is not None
    sums = {name: {k: v.tolist() for k, v in of.items()} for name, of in walk.sums.items()}
    masks = {name: m and mask_content(m) for name, m in walk.masks.items()}
    return walk.state, sums, masks, walk.trace


def a_probe() -> Probe:
    direction = torch.linspace(-1, 1, 12).view(2, 6)
    return Probe((1, 3), direction, 0.5, 0.25, TRACE, "0123")


FORMATS = {
    "mask": Format(
        lambda path: mask().save(path), lambda path: mask_content(WeightMask.load(path))
    ),
    "scores": Format(lambda path: scores().save(path, shard_bytes=1), scores_content),
    "probe": Format(lambda path: a_probe().save(path), probe_content),
    "walk": Format(write_a_walk, walk_content),
    "rows": Format(lambda path: ROWS.save(path), lambda path: list(map(asdict, Rows.read(path)))),
    "manifest": Format(
        lambda path: Manifest({"size": 0.1, "seeds": [0, 1]}).save(path), Manifest.settings_of
    ),
}


# Faults: bytes in, bytes out. Others of the damaged file's kind are what may be mixed into it.


def truncated(raw: bytes, draw: random.Random, foreign: bytes) -> bytes:
    return raw[: draw.randrange(len(raw))]


def flipped(raw: bytes, draw: random.Random, foreign: bytes) -> bytes:
    damaged = bytearray(raw)
    for _ in range(draw.choice((1, 1, 1, 2, 8))):
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
    return bytes(damaged)


def zeroed(raw: bytes, draw: random.Random, foreign: bytes) -> bytes:
    start = draw.randrange(len(raw))
    n = min(draw.choice((1, 16, 512)), len(raw) - start)
    return raw[:start] + bytes(n) + raw[start + n :]


def cut_out(raw: bytes, draw: random.Random, foreign: bytes) -> bytes:
    start = draw.randrange(len(raw))
    return raw[:start] + raw[start + draw.randint(1, 64) :]


def oversized(raw: bytes, draw: random.Random, foreign: bytes) -> bytes:
    return raw + draw.randbytes(draw.choice((1, 100, 10_000)))


def repeated(raw: bytes, draw: random.Random, foreign: bytes) -> bytes:
    lines = raw.splitlines(keepends=True)
    place = draw.randrange(len(lines))
    return b"".join([*lines[: place + 1], *lines[place:]])


def of_another_format(raw: bytes, draw: random.Random, foreign: bytes) -> bytes:
    return foreign


FAULTS = (truncated, flipped, zeroed, cut_out, oversized, repeated, of_another_format)


def members(path: Path) -> list[Path]:
    """The files of a file or folder."""
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


@pytest.fixture
def written(tmp_path) -> dict[str, Path]:
    paths = {}
    for name, kind in FORMATS.items():
        paths[name] = tmp_path / "whole" / name
        kind.write(paths[name])
    return paths


def outcome(name: str, path: Path, expected: Any) -> str:
    """What becomes of a damaged file; an assertion fails where it is read wrong."""
    try:
        content = FORMATS[name].read(path)
    except ValueError as error:
        assert path.name in str(error), f"{name}: the error does not name the file: {error}"
        return "refused"
    if content == expected:
        return "harmless"  # such as another blank
    raise AssertionError(f"{name}: read otherwise than it was written")


@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_file_is_refused_or_read_as_it_was(
    tmp_path, written, damaged_files, name, unchecked
):
    """Twin: the whole file is read."""
    draw = random.Random(name)
    expected = FORMATS[name].read(written[name])
    assert expected, "undamaged"
    outcomes = Counter()
    for number in range(damaged_files // len(FORMATS) + 1):
        fault = FAULTS[number % len(FAULTS)]
        path = tmp_path / f"damaged-{number}" / name
        path.parent.mkdir()
        (shutil.copytree if written[name].is_dir() else shutil.copy)(written[name], path)
        file = draw.choice(members(path))
        others = [
            member for other in written if other != name for member in members(written[other])
        ]
        file.write_bytes(fault(file.read_bytes(), draw, draw.choice(others).read_bytes()))
        outcomes[fault.__name__, outcome(name, path, expected)] += 1
        shutil.rmtree(path.parent)
    for (fault, result), n in sorted(outcomes.items()):
        print(f"| {name} | {fault} | {n} | {result} |")
    assert sum(n for (_, result), n in outcomes.items() if result == "refused")


def test_files_that_grow_are_refused_in_part_and_resumed_without_it(tmp_path):
    """A run that was killed while it wrote: nothing of the block counts."""
    from harmcircuits.measurements import resumed

    folder = tmp_path / "run"
    resumed(folder, {"size": 0.1})
    path = folder / "rows.jsonl"
    ROWS[:4].append_to(path)
    whole = path.stat().st_size
    ROWS[4:].append_to(path)
    raw = path.read_bytes()
    for end in range(whole + 1, len(raw) - 1, 17):
        path.write_bytes(raw[:end])
        with pytest.raises(
            ValueError, match=r"rows\.jsonl: not a file of measurements \((before )?line"
        ):
            Rows.read(path)
        assert resumed(folder, {"size": 0.1}) == ROWS[:4]
        assert Rows.read(path) == ROWS[:4], "what was cut off is gone"
    ROWS[4:].append_to(path)
    assert Rows.read(path) == ROWS


def test_a_row_that_is_there_twice_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    ROWS.append_to(path)
    ROWS[2:3].append_to(path)
    with pytest.raises(
        ValueError, match=r"rows\.jsonl.*line 10 is the row of line 3 again, harm_nll"
    ):
        Rows.read(path)
