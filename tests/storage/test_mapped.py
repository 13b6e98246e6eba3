"""Numbers in a mapped file are those that were given, and take no memory that must be kept.

Would catch: a copy in memory after all, a change that reaches the original or is lost, a file that
is left behind, a full disk that is noticed only when the process dies of it.
"""

import gc
import tempfile
from pathlib import Path

import pytest
import torch
from helpers import random_batch

from harmcircuits.hooks.attribution import removal_effect
from harmcircuits.hooks.search import find_circuit
from harmcircuits.hooks.walk import Walk
from harmcircuits.storage.mapped import mapped_copy

MAPS = Path("/proc/self/maps")
TARGET, SPARED = [random_batch()], [random_batch(2, 7, seed=1)]

needs_maps = pytest.mark.skipif(not MAPS.exists(), reason="mappings are listed as Linux does")


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch) -> Path:
    """Where temporary files lie."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def is_mapped(tensor: torch.Tensor, folder: Path) -> bool:
    """Whether the memory of a tensor is a file of this folder."""
    for line in MAPS.read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= tensor.data_ptr() < end:
            return str(folder) in line
    raise AssertionError("no mapping holds the tensor")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 3, 4)])
def test_a_copy_is_the_same_and_changes_alone(temporary, dtype, shape):
    given = torch.randn(shape).mul(100).to(dtype)
    before = given.clone()
    copy = mapped_copy(given)
    assert copy.dtype == dtype and torch.equal(copy, given)
    assert not list(temporary.iterdir()), "its file has no name any more"

    gc.collect()
    copy.add_(1)
    assert torch.equal(copy, before + 1)
    assert torch.equal(given, before)


def test_a_copy_of_what_lies_in_another_order(temporary):
    given = torch.randn(4, 6).T
    assert torch.equal(mapped_copy(given), given)
    assert torch.equal(mapped_copy(given[1:3]), given[1:3])


@needs_maps
def test_a_file_goes_with_the_last_tensor_that_uses_it(temporary):
    copy = mapped_copy(torch.randn(4096))
    part = copy[:8]
    assert is_mapped(copy, temporary)
    del copy
    gc.collect()
    assert is_mapped(part, temporary)
    del part
    gc.collect()
    assert str(temporary) not in MAPS.read_text()


@needs_maps
def test_scores_and_sums_are_on_disk_under_a_bound_only(llama, temporary, monkeypatch):
    bounded = removal_effect(llama, TARGET, max_memory=8000)
    assert all(is_mapped(value, temporary) for value in bounded.values.values())
    free = removal_effect(llama, TARGET)
    assert not any(is_mapped(value, temporary) for value in free.values.values())

    sums = []

    def keep(walk: Walk, folder: Path, step: int) -> None:
        for values in (walk.benefit, walk.price):
            sums.extend(is_mapped(value, temporary) for value in values.values())
        plain_keep(walk, folder, step)

    plain_keep = Walk.keep
    monkeypatch.setattr(Walk, "keep", keep)
    options = {"size": 0.05, "steps": 2, "folder": temporary / "walk"}
    find_circuit(llama, TARGET, [SPARED], max_memory=8000, **options)
    assert sums and all(sums)
    assert [path.name for path in temporary.iterdir()] == ["walk"], "no file is left behind"

    sums.clear()
    find_circuit(llama, TARGET, [SPARED], **{**options, "folder": temporary / "free"})
    assert sums and not any(sums)


def test_a_walk_goes_on_under_a_bound_as_without_one(llama, temporary, monkeypatch):
    """Two of four steps without a bound, the others with one."""
    options = {"size": 0.05, "steps": 4}
    expected = find_circuit(llama, TARGET, [SPARED], **options)
    folder = temporary / "walk"
    keep = Walk.keep

    def interrupted(walk: Walk, folder: Path, step: int) -> None:
        keep(walk, folder, step)
        if step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Walk, "keep", interrupted)
        with pytest.raises(KeyboardInterrupt):
            find_circuit(llama, TARGET, [SPARED], folder=folder, **options)
    mask = find_circuit(llama, TARGET, [SPARED], folder=folder, max_memory=8000, **options)
    assert (mask.digest, mask.trace) == (expected.digest, expected.trace)
