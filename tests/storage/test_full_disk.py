"""A disk without room, and memory that does not suffice: the file is named, and the work goes on.

Would catch: a write that takes a part and is taken for whole, an error of another library, half a
file that stops the next run, a model left with hooks or edits. Twin: the same work with room enough.

A limit on the size of files stands in for the disk: as there, a write takes what fits, and the next
one fails.
"""

import errno
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from helpers import random_batch, small_model
from support.jobs import Job, run_jobs

from harmcircuits.behaviours.generation_cache import GenerationCache
from harmcircuits.circuits.masks import WeightMask, top_fraction
from harmcircuits.export import export
from harmcircuits.hooks.attribution import magnitude_scores, removal_effect
from harmcircuits.hooks.search import find_circuit
from harmcircuits.hooks.walk import Walk
from harmcircuits.measurements import Manifest, Measurement, Rows, resumed
from harmcircuits.storage.lines import append_lines
from harmcircuits.studies.settings import StudySettings
from harmcircuits.studies.study import study
from harmcircuits.views.page import write_view

resource = pytest.importorskip("resource", reason="limits on the size of files are of Unix")

ROWS = Rows([Measurement("harm_nll", {"n": n}, n / 7, n / 8, n / 6, 9) for n in range(40)])
TARGET, SPARED = [random_batch()], [random_batch(2, 7, seed=1)]


@contextmanager
def room_for(n_bytes: int) -> Iterator[None]:
    """No file may grow beyond this size."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("n_bytes", [0, 1, 1000, 3000])
def test_rows_that_do_not_fit_are_an_error_and_the_run_goes_on(tmp_path, n_bytes):
    """Rows of before are whole; of the addition nothing counts, however much of it was written."""
    folder = tmp_path / "run"
    path = folder / "rows.jsonl"
    resumed(folder, {"size": 0.1})
    ROWS[:4].append_to(path)
    with (
        room_for(path.stat().st_size + n_bytes),
        pytest.raises(OSError, match=r"rows\.jsonl"),
    ):
        ROWS[4:].append_to(path)
    assert resumed(folder, {"size": 0.1}) == ROWS[:4]
    ROWS[4:].append_to(path)
    assert Rows.read(path) == ROWS


def test_a_device_that_is_full_is_named():
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    with pytest.raises(OSError, match="/dev/full") as error:
        append_lines(full, [{"a": 1}])
    assert error.value.errno == errno.ENOSPC


WHOLE = {
    "rows": lambda path: ROWS.save(path),
    "manifest": lambda path: Manifest({"size": 0.1}).save(path),
    "view": lambda path: write_view(path, "A view", "text" * 1000),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_file_that_does_not_fit_leaves_the_one_that_was_there(tmp_path, name):
    path = tmp_path / "file"
    path.write_text("before")
    with room_for(100), pytest.raises(OSError, match=str(path)):
        WHOLE[name](path)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
    WHOLE[name](path)
    assert path.read_text() != "before"


def test_a_mask_and_scores_that_do_not_fit_are_an_error(llama, tmp_path):
    scores = magnitude_scores(llama)
    with room_for(1000):
        with pytest.raises(OSError, match="mask"):
            top_fraction(scores, 0.5).save(tmp_path / "mask")
        with pytest.raises(OSError, match="scores-00001"):
            scores.save(tmp_path / "scores")
    assert [path.name for path in tmp_path.rglob("*")] == ["scores"], "an empty folder"
    scores.save(tmp_path / "scores")


def test_scores_of_a_bounded_run_that_do_not_fit_are_an_error(llama, tmp_path, monkeypatch):
    """Not the end of the process, as a mapping is that finds no room later."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    expected = removal_effect(llama, TARGET)
    with room_for(1000), pytest.raises(OSError, match=r"temporary files \(TMPDIR sets"):
        removal_effect(llama, TARGET, max_memory=8000)
    assert not list(tmp_path.iterdir())
    assert not any(point.fwd_hooks or point.bwd_hooks for point in llama.hook_dict.values())
    bounded = removal_effect(llama, TARGET, max_memory=8000)
    assert all(torch.equal(bounded.values[name], value) for name, value in expected.values.items())


def test_an_export_that_does_not_fit_leaves_nothing(llama, tmp_path):
    mask = top_fraction(magnitude_scores(llama), 0.01)
    before = {name: weight.clone() for name, weight in llama.state_dict().items()}
    for n_bytes in (0, 1000, 20_000):
        with room_for(n_bytes), pytest.raises(OSError, match=str(tmp_path)):
            export(llama, mask, tmp_path / "out")
        assert not list(tmp_path.iterdir())
    assert all(torch.equal(weight, before[name]) for name, weight in llama.state_dict().items())
    assert export(llama, mask, tmp_path / "out").is_dir()


def test_answers_that_do_not_fit_are_an_error_and_the_others_are_kept(tmp_path):
    model = small_model("sft")
    prompts = model.behaviours["benign"].prompts("heldout")
    options = {"max_new_tokens": 9, "batch_size": 5}
    expected = GenerationCache(tmp_path / "whole", model.bridge)(model.bridge, prompts, **options)
    (whole,) = (tmp_path / "whole").iterdir()

    cache = GenerationCache(tmp_path / "full", model.bridge)
    with (
        room_for(whole.stat().st_size // 2),
        pytest.raises(OSError, match=whole.name),
    ):
        cache(model.bridge, prompts, **options)
    assert GenerationCache(tmp_path / "full", model.bridge)(model.bridge, prompts, **options) == (
        expected
    )


def test_jobs_whose_rows_do_not_fit_run_again(tmp_path):
    runs = []

    def job(number: int) -> Rows:
        runs.append(number)
        return Rows(row.labelled(job=number) for row in ROWS)

    jobs = [Job({"number": number}, lambda number=number: job(number)) for number in range(3)]
    with room_for(12_000), pytest.raises(OSError, match=r"rows\.jsonl"):
        run_jobs(tmp_path, jobs, {"a": 1})
    assert runs == [0, 1], "the rows of two do not fit"
    rows = run_jobs(tmp_path, jobs, {"a": 1})
    assert runs == [0, 1, 1, 2]
    assert Rows.read(tmp_path / "rows.jsonl") == rows


# A search


ERRORS = {
    "no memory": MemoryError(),
    "no memory on the device": torch.OutOfMemoryError("CUDA out of memory"),
    "a device that failed": RuntimeError("CUDA error: device-side assert"),
}


@pytest.mark.parametrize("name", ["no room", *ERRORS])
def test_a_search_that_lacks_something_goes_on(llama, tmp_path, monkeypatch, name):
    """In its third step of four, while it scores; or, without room, after that."""
    options = {"size": 0.02, "steps": 4}
    before = {name: weight.clone() for name, weight in llama.state_dict().items()}
    expected = find_circuit(llama, TARGET, [SPARED], **options)
    keep, n_backward = Walk.keep, 0

    def keep_in_little_room(walk: Walk, folder: Path, step: int) -> None:
        with room_for(2**40 if step < 3 else 5000):
            keep(walk, folder, step)

    def backward(tensor, *args, **options):
        nonlocal n_backward
        n_backward += 1
        if n_backward == 6:  # of the target and of what is protected, in each step
            raise ERRORS[name]
        return plain_backward(tensor, *args, **options)

    plain_backward = torch.Tensor.backward
    with monkeypatch.context() as patch:
        if name in ERRORS:
            patch.setattr(torch.Tensor, "backward", backward)
        else:
            patch.setattr(Walk, "keep", keep_in_little_room)
        with pytest.raises((OSError, MemoryError, RuntimeError)):
            find_circuit(llama, TARGET, [SPARED], folder=tmp_path, **options)
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-002"]
    assert all(torch.equal(weight, before[name]) for name, weight in llama.state_dict().items())
    assert not any(point.fwd_hooks or point.bwd_hooks for point in llama.hook_dict.values())
    mask = find_circuit(llama, TARGET, [SPARED], folder=tmp_path, **options)
    assert (mask.digest, mask.trace) == (expected.digest, expected.trace)


@pytest.mark.slow
def test_a_study_without_room_goes_on_to_the_same_rows(tmp_path):
    """Manifest, rows or scores are what does not fit; the page is in tests/studies/test_study.py."""
    model = small_model("sft", every=16)
    settings = StudySettings(
        sizes=(0.02,), steps=2, budget=1.0, tolerance=1.0, decides="loss", n_random=1
    )
    options = {"protect": ["benign"], "page": True}
    expected = study(model, settings, out=tmp_path / "whole", **options)
    named = set()
    for n_bytes in (500, 5_000, 200_000):
        with room_for(n_bytes), pytest.raises(OSError) as error:
            study(model, settings, out=tmp_path / "full", resume=True, **options)
        named.add(Path(error.value.filename or str(error.value).split(":")[0]).name)
    run = study(model, settings, out=tmp_path / "full", resume=True, **options)
    assert run.rows == expected.rows
    assert Rows.read(tmp_path / "full" / "rows.jsonl") == expected.rows
    digests = []
    for folder in ("whole", "full"):
        paths = sorted((tmp_path / folder / "masks").iterdir())
        digests.append([(path.name, WeightMask.load(path).digest) for path in paths])
    assert digests[0] == digests[1]
    assert named == {"manifest.json", "rows.jsonl", "scores-00001-of-00001.safetensors"}
