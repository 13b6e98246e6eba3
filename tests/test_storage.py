"""Files are written whole or not at all, and read whole or refused by their name.

Would catch: half a file after a full disk or a kill, a row lost or doubled when a run goes on, a
flipped bit that passes, a file without a digest that opens.
"""

import gc
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from helpers import random_batch
from safetensors import safe_open
from safetensors.torch import save_file

from harmcircuits.behaviours.probe import Probe
from harmcircuits.circuits.masks import WeightMask
from harmcircuits.circuits.scores import Source, WeightScores
from harmcircuits.measurements import Measurement, Rows
from harmcircuits.search.attribution import removal_effect
from harmcircuits.search.circuit import find_circuit
from harmcircuits.search.descent import Search
from harmcircuits.search.folder import SearchFolder
from harmcircuits.storage import append_lines, mapped_copy, read_json, read_lines, read_text
from harmcircuits.views.page import write_page

resource = pytest.importorskip("resource", reason="limits on the size of files are of Unix")

SHAPES = {"a": (3, 4), "b": (2, 5)}
SOURCE = Source("model", "test", {"seed": 1}, (Source("model", "parent"),), "0123456789abcdef")
ROWS = Rows(
    [Measurement("nll", {"split": f"{n}\u2028é"}, n / 7, n / 8, n / 6, 9) for n in range(9)]
)
MASK = WeightMask({"a": torch.tensor([0, 5, 11]), "b": torch.tensor([3])}, SHAPES, SOURCE, ROWS)
SCORES = WeightScores({"a": torch.randn(3, 4), "b": torch.randn(2, 5)}, SOURCE)
PROBE = Probe((1, 3), torch.linspace(-1, 1, 12).view(2, 6), 0.5, 0.25, ROWS)
TARGET, SPARED = [random_batch()], [random_batch(2, 7, seed=1)]


@contextmanager
def room_for(n_bytes: int) -> Iterator[None]:
    """No file may grow beyond this size: as on a full disk, a write takes what fits."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


WRITERS = {
    "rows": ROWS.save,
    "page": lambda path: write_page(path, "A page", ["text" * 1000]),
    "mask": MASK.save,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_does_not_fit_leaves_the_one_that_was_there(tmp_path, name):
    path = tmp_path / "file"
    path.write_text("before")
    with room_for(100), pytest.raises(OSError, match=str(path)):
        WRITERS[name](path)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
    WRITERS[name](path)
    assert path.read_bytes() != b"before"


@pytest.mark.parametrize(
    ("content", "read", "word"),
    [
        (None, read_text, "No such file"),
        ("é".encode("latin-1"), read_text, "UTF-8"),
        (b"[1]", read_json, "holds no JSON object"),
        (b"{", read_json, "holds no JSON object"),
        (b'{"a": 1}\n{"a": 1\n{"a": 2}\n', read_lines, "line 2"),
        (b'{"a": 1}\n[1]\n', read_lines, "line 2"),
    ],
)
def test_what_is_no_such_file_is_refused_by_its_name(tmp_path, content, read, word):
    path = tmp_path / "file"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        read(path, "a thing")
    assert str(path) in str(error.value)
    assert word in str(error.value)


def test_a_killed_run_goes_on_behind_its_last_whole_row(tmp_path):
    """The file is cut at every third byte of what was written last."""
    path = tmp_path / "rows.jsonl"
    ROWS[:4].append_to(path)
    whole = path.stat().st_size
    ROWS[4:5].append_to(path)
    raw = path.read_bytes()
    for end in range(whole, len(raw) + 1, 3):
        path.write_bytes(raw[:end])
        is_whole = end >= len(raw) - 1
        kept = Rows.read(path)
        assert kept == ROWS[: 4 + is_whole]
        ROWS[len(kept) :].append_to(path)
        assert Rows.read(path) == ROWS


def test_rows_that_do_not_fit_are_an_error_and_none_of_them_counts(tmp_path):
    path = tmp_path / "rows.jsonl"
    ROWS[:4].append_to(path)
    before = path.read_bytes()
    with room_for(len(before) + 100), pytest.raises(OSError, match=r"rows\.jsonl"):
        ROWS[4:].append_to(path)
    assert path.read_bytes() == before
    ROWS[4:].append_to(path)
    assert Rows.read(path) == ROWS


def test_a_mark_at_the_beginning_and_empty_lines_are_no_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    mark = "\ufeff"  # as spreadsheets begin a file
    path.write_text(f'{mark}{{"a": 1}}\n\n{{"a": 2}}\n')
    append_lines(path, [{"a": 3}])
    assert read_lines(path, "rows") == [{"a": 1}, {"a": 2}, {"a": 3}]


READERS = {"mask": (MASK, WeightMask), "probe": (PROBE, Probe), "scores": (SCORES, WeightScores)}


def content(value) -> list:
    if isinstance(value, WeightScores):
        return [value.source, {name: of.tolist() for name, of in value.values.items()}]
    if isinstance(value, WeightMask):
        return [value, value.source, value.trace]
    return [value.layers, value.direction.tolist(), value.bias, value.rows]


@pytest.mark.parametrize("name", READERS)
def test_one_digest_tells_every_changed_bit(tmp_path, name):
    """One bit in each of 40 bytes, of the header and of the values. Twin: undamaged, it is read."""
    value, kind = READERS[name]
    path = tmp_path / "file"
    value.save(path)
    loaded = kind.load(path)
    assert content(loaded) == content(value)
    if name == "scores":
        assert all(is_mapped(scores, tmp_path) for scores in loaded.values.values())

    file = next(path.iterdir()) if path.is_dir() else path
    raw = file.read_bytes()
    for place in range(8, len(raw), len(raw) // 40):
        damaged = bytearray(raw)
        damaged[place] ^= 1
        file.write_bytes(bytes(damaged))
        with pytest.raises(ValueError, match=file.name):
            kind.load(path)
    for end in (0, 7, len(raw) // 2, len(raw) - 1):
        file.write_bytes(raw[:end])
        with pytest.raises(ValueError, match=file.name):
            kind.load(path)


@pytest.mark.parametrize("name", READERS)
def test_a_file_without_a_digest_is_refused(tmp_path, name):
    value, kind = READERS[name]
    path = tmp_path / "file"
    value.save(path)
    file = next(path.iterdir()) if path.is_dir() else path
    with safe_open(file, framework="pt") as stored:
        header = stored.metadata()
        tensors = {key: stored.get_tensor(key).clone() for key in stored.keys()}  # noqa: SIM118
    assert len(header.pop("digest")) == 32
    save_file(tensors, file, metadata=header)
    with pytest.raises(ValueError, match=r"its digest \(none\)"):
        kind.load(path)


@pytest.fixture
def temporary(tmp_path, monkeypatch) -> Path:
    """Where temporary files lie."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def is_mapped(tensor: torch.Tensor, folder: Path) -> bool:
    """Whether the memory of a tensor is a file of this folder."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("mappings are listed as Linux does")
    for line in maps.read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= tensor.data_ptr() < end:
            return str(folder) in line
    raise AssertionError("no mapping holds the tensor")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copy_is_the_same_and_changes_alone(temporary, dtype):
    tensor = torch.randn(2, 3, 4).to(dtype).transpose(0, -1)
    before = tensor.clone()
    copy = mapped_copy(tensor)
    assert not list(temporary.iterdir()), "its file has no name any more"
    gc.collect()
    assert is_mapped(copy, temporary)
    copy.add_(1)
    assert copy.dtype == dtype and torch.equal(copy, before + 1)
    assert torch.equal(tensor, before)


def test_scores_and_sums_are_on_disk_under_a_bound_only(llama, temporary, monkeypatch):
    bounded = removal_effect(llama, TARGET, max_memory=8000)
    assert all(is_mapped(value, temporary) for value in bounded.values.values())
    free = removal_effect(llama, TARGET)
    assert not any(is_mapped(value, temporary) for value in free.values.values())

    sums = []

    def save(folder: SearchFolder, search: Search) -> None:
        slopes = search.benefits.slopes.totals.values()
        sums.extend(is_mapped(value, temporary) for value in slopes)
        plain_save(folder, search)

    plain_save = SearchFolder.save
    monkeypatch.setattr(SearchFolder, "save", save)
    options = {"size": 0.05, "steps": 2, "folder": temporary / "walk"}
    find_circuit(llama, TARGET, [SPARED], max_memory=8000, **options)
    assert sums and all(sums)
    assert [path.name for path in temporary.iterdir()] == ["walk"], "no file is left behind"


def test_scores_of_a_bounded_run_that_do_not_fit_are_an_error(llama, temporary):
    """Not the end of the process, as a mapping is that finds no room later."""
    with room_for(1000), pytest.raises(OSError, match="TMPDIR"):
        removal_effect(llama, TARGET, max_memory=8000)
    assert not list(temporary.iterdir())
