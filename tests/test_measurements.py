"""Rows and manifests as files.

Would catch: rows overwritten instead of added, a figure rounded on its way through a file, labels that lose their type, a
selection that ignores a label, a foreign or truncated file read as measurements, a manifest without settings or versions.
"""

import json
import math
from importlib.metadata import version

import pytest

from harmcircuits.measurements import LIBRARIES, Manifest, Measurement, Rows
from harmcircuits.studies.claims import by_model

ROWS = [
    Measurement("harm_valid_rate", {"model": "dpo", "mask": "none", "split": "heldout"}, 0.1 + 0.2, 0.25, 1 / 3, 256),
    Measurement("harm_valid_rate", {"model": "dpo", "mask": "circuit", "seed": 3, "fraction": 1e-5}, 0.0, 0.0, 0.01, 256),
    Measurement("weights_removed", {"model": "sft", "mask": "circuit", "seed": 3}, 42_000, 42_000, 42_000),
]


def test_rows_round_trip(tmp_path):
    path = tmp_path / "rows.jsonl"
    Rows(ROWS[:1]).append_to(path)
    Rows([]).append_to(path)
    Rows(iter(ROWS[1:])).append_to(path)
    assert Rows.read(path) == ROWS
    lines = path.read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[0]) == {
        "metric": "harm_valid_rate",
        "labels": {"model": "dpo", "mask": "none", "split": "heldout"},
        "mean": 0.1 + 0.2,
        "low": 0.25,
        "high": 1 / 3,
        "n": 256,
    }
    assert len(lines) == 3


def test_what_is_not_a_number_survives(tmp_path):
    Rows([Measurement("x", {}, math.nan, -math.inf, math.inf)]).append_to(tmp_path / "rows.jsonl")
    (row,) = Rows.read(tmp_path / "rows.jsonl")
    assert math.isnan(row.mean)
    assert (row.low, row.high, row.n) == (-math.inf, math.inf, 1)


def test_a_measurement_prints_its_interval():
    assert str(ROWS[0]) == "harm_valid_rate 0.3 [0.25, 0.333]"


def test_selection_is_by_metric_and_all_labels():
    assert ROWS.where() == ROWS
    assert ROWS.where("harm_valid_rate") == ROWS[:2]
    assert ROWS.where("harm_valid_rate", mask="circuit") == ROWS[1:2]
    assert ROWS.where(mask="circuit", seed=3) == ROWS[1:]
    assert iter(ROWS).where(fraction=1e-5) == ROWS[1:2]
    assert ROWS.where(mask="circuit", seed="3") == [], "a label keeps its type"
    assert ROWS.where("harm_valid", mask="none") == []
    assert ROWS.where(absent="x") == []


@pytest.mark.parametrize(
    "text",
    [
        '{"metric": "x", "labels": {}, "mean": 1.0}\n',
        '{"metric": "x", "labels": {}, "mean": 1, "low": 1, "high": 1, "n": 1, "color": "red"}\n',
        "[1, 2]\n",
        "3\n",
        '{"metric": "x", "labels": {}, "mean": 1, "low": 1, "hi',
        "hello\n",
    ],
    ids=["key missing", "key too many", "list", "number", "truncated", "text"],
)
def test_foreign_files_are_refused(tmp_path, text):
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(ValueError, match="not a file of measurements"):
        Rows.read(tmp_path / "rows.jsonl")


def test_missing_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"rows\.jsonl: no such file"):
        Rows.read(tmp_path / "rows.jsonl")


def test_a_manifest_says_what_made_the_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/harmcircuits", "study", "--out", "x"])
    Manifest({"fraction": 1e-5, "seeds": [0, 1]}).save(tmp_path / "manifest.json")
    content = json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8"))
    assert content.keys() == {"settings", "command", "python", "machine", "versions"}
    assert content["settings"] == {"fraction": 1e-5, "seeds": [0, 1]}
    assert content["command"] == ["harmcircuits", "study", "--out", "x"]
    assert content["versions"] == {name: version(name) for name in LIBRARIES}
    assert content["python"].startswith("3.")
    assert content["machine"]


def test_pooling_averages_over_one_label_only():
    rows = [
        Measurement("x", {"model": "a", "seed": 0}, 0.2, 0.1, 0.3, 10),
        Measurement("x", {"model": "a", "seed": 1}, 0.4, 0.35, 0.9, 10),
        Measurement("x", {"model": "b", "seed": 0}, 0.7, 0.6, 0.8, 5),
        Measurement("y", {"model": "a"}, 1.0, 1.0, 1.0),
    ]
    found = rows.pool("seed")
    assert [(row.metric, dict(row.labels), row.low, row.high, row.n) for row in found] == [
        ("x", {"model": "a"}, 0.1, 0.9, 20),
        ("x", {"model": "b"}, 0.6, 0.8, 5),
        ("y", {"model": "a"}, 1.0, 1.0, 1),
    ]
    assert [row.mean for row in found] == pytest.approx([0.3, 0.7, 1.0])


def test_rows_are_told_apart_by_model_and_ladder():
    pairs = [("sft", "shipped"), ("sft", "seed-1"), ("dpo", "shipped")]
    rows = [Measurement("a", {"model": model, "ladder": ladder}, 1.0, 1.0, 1.0) for model, ladder in pairs] * 2
    found = by_model(rows)
    assert list(found) == ["sft", "sft of seed-1", "dpo"]
    assert all(len(mine) == 2 for mine in found.values())
    assert found["sft of seed-1"][0].labels["ladder"] == "seed-1"


def test_rows_are_grouped_by_labels():
    rows = [
        Measurement("m", {"model": model, "seed": seed, "step": step}, 0, 0, 0)
        for step in (0, 1)
        for seed in (1, 0)
        for model in "ba"
    ]
    found = list(rows.by(*(("model", "seed"))).values())
    assert [(one[0].labels["model"], one[0].labels["seed"]) for one in found] == [("b", 1), ("a", 1), ("b", 0), ("a", 0)]
    assert all([row.labels["step"] for row in one] == [0, 1] for one in found)
    assert list(Rows([]).by(*(("model",))).values()) == []
