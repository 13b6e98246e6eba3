"""Files that a person gives, damaged at random or in another encoding: an error names the file.

They hold no checksum, so a changed letter cannot show; what can is refused as a ValueError with the
file's name, never by an error from deep inside. Twin: undamaged, each is read.
"""

import json
import random

import pyarrow
import pytest
from pyarrow.parquet import write_table
from test_damaged_files import FAULTS

from harmcircuits.behaviours.own import OwnBehaviour
from harmcircuits.behaviours.questions import QuestionTemplates
from harmcircuits.prompt_files import read_requests
from harmcircuits.storage.text import read_text

REQUESTS = [{"prompt": f"paint wall {n} é", "category": f"c{n % 3}"} for n in range(12)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in REQUESTS)
CSV = "prompt,category\n" + "".join(f'"{r["prompt"]}",{r["category"]}\n' for r in REQUESTS)
BEHAVIOUR = {"name": "paints", "prompts": [row["prompt"] for row in REQUESTS], "title": "wände"}
TEXTS = {
    "a.jsonl": (LINES, read_requests),
    "a.json": (json.dumps(REQUESTS, ensure_ascii=False), read_requests),
    "a.csv": (CSV, read_requests),
    "a.tsv": (CSV.replace(",", "\t"), read_requests),
    "a.txt": ("".join(row["prompt"] + "\n" for row in REQUESTS), read_requests),
    "questions.json": ('{"recognition": "ok to {request}? é"}', QuestionTemplates.from_file),
    "own.json": (json.dumps(BEHAVIOUR, ensure_ascii=False), OwnBehaviour.of),
    "own.toml": ('name = "paints"\nprompts = ["paint é", "b", "c", "d"]\n', OwnBehaviour.of),
    "plain.txt": ("A text é.\n" * 9, lambda path: read_text(path, "a text for perplexity")),
}
PARQUET = "a.parquet"


@pytest.fixture
def given(tmp_path):
    """(path, reader) by name."""
    files = {}
    for name, (text, read) in TEXTS.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        files[name] = tmp_path / name, read
    write_table(pyarrow.Table.from_pylist(REQUESTS), tmp_path / PARQUET)
    files[PARQUET] = tmp_path / PARQUET, read_requests
    return files


@pytest.mark.parametrize("name", [*TEXTS, PARQUET])
def test_an_error_names_the_file(given, damaged_files, name, unchecked):
    path, read = given[name]
    raw = path.read_bytes()
    assert read(path), "undamaged"
    draw = random.Random(name)
    refused = 0
    for number in range(damaged_files // len(given) + 1):
        fault = FAULTS[number % len(FAULTS)]
        path.write_bytes(fault(raw, draw, draw.randbytes(300)))
        try:
            read(path)
        except ValueError as error:
            assert path.name in str(error) or "paints" in str(error), f"{fault.__name__}: {error}"
            refused += 1
    assert refused


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_another_encoding_is_named_with_its_line(given, name, encoding):
    path, read = given[name]
    path.write_text(TEXTS[name][0], encoding=encoding)
    with pytest.raises(ValueError, match=rf"{path.name}, line \d+: not UTF-8 \(byte 0x.*save"):
        read(path)


@pytest.mark.parametrize("name", TEXTS)
def test_missing_files_and_folders_are_told_apart(given, tmp_path, name):
    path, read = given[name]
    path.unlink()
    with pytest.raises(ValueError, match=rf"{path.name}: no such file; (give|expected)"):
        read(path)
    path.mkdir()
    with pytest.raises(ValueError, match=rf"{path.name}: a folder, not a file; (give|expected)"):
        read(path)
