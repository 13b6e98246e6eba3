"""Recovery, reach and relearning of the planted organism, on few requests.

Would catch: a search with S out of reach that may take S, a score without its price, the walk's
sums of another factor, a curve measured under the wrong mask, a page that quotes other rows.
"""

from importlib import import_module
from pathlib import Path

import pytest
from helpers import small_model
from pages import text_of
from support.bench import recovery, tables

import harmcircuits as hc
from harmcircuits.behaviours.model import Model
from harmcircuits.measurements import Rows
from harmcircuits.organisms import FOLDER
from harmcircuits.views.tables import frame_markdown

analysis = import_module("planted")


@pytest.fixture(scope="module")
def model() -> Model:
    """Asked about two items of each topic, and two of its abilities."""
    model = small_model("planted", every=16)
    return model.with_behaviours(model.behaviour("harmful"), model.behaviour("benign"))


@pytest.fixture(autouse=True)
def opened(model, monkeypatch):
    monkeypatch.setattr(hc, "open_model", lambda *_, **__: model)
    data = {name: model.calibration(name) for name in ("harmful", "benign")}
    monkeypatch.setattr(Model, "calibrations", lambda *_, **__: data)
    return data


def test_every_score_is_held_against_s(model, monkeypatch, opened):
    settings = {"size": 0.004, "steps": 1}
    real = Model.find_circuit
    monkeypatch.setattr(
        Model, "find_circuit", lambda *args, **options: real(*args, **{**options, **settings})
    )
    rows = analysis.recovered(FOLDER, {"ladder": "shipped", "job": "recovery"})
    table = tables.recovery_table(rows).set_index("score")
    assert {"removal effect", "less its price", "walk's sums", "magnitude"} < set(table.index)
    assert float(table.loc["random", "AUROC"]) == pytest.approx(0.5, abs=0.01)
    assert float(table.loc["removal effect", "AUROC"]) > 0.52

    # After one step the sums are the scores of the unpruned model.
    effect = hc.removal_effect(model.bridge, opened["harmful"].batches)
    sums = recovery.walked(model, opened, effect)
    name = "blocks.1.mlp.in.weight"
    price = effect.values[name] - sums.values[name]
    assert price.min() >= -1e-6 and price.max() > 0


@pytest.mark.parametrize("reach", analysis.REACH)
def test_a_search_chooses_within_its_reach(model, monkeypatch, reach):
    scores = hc.random_scores(model.bridge)

    def find_circuit(*_, size, exclude=None, **__):
        return hc.top_fraction(scores, size, within="model", exclude=exclude)

    monkeypatch.setattr(Model, "find_circuit", find_circuit)
    labels = {"ladder": "shipped", "job": "search", "reach": reach}
    rows = analysis.searched(FOLDER, reach, labels)
    lines = tables.reach_table(rows).set_index("removed")
    shares = [row.mean for row in rows.where("overlap_containment") if row.labels["mask"] != "S"]
    low, high = {"all": (0.05, 0.15), "outside S": (0, 0), "inside S": (1, 1)}[reach]
    assert len(shares) == len(analysis.SIZES)
    assert all(low <= share <= high for share in shares)
    assert lines.loc["search, 0.1%", "ends"] == "no", "0.1 % at random do not end harm"
    if reach == "all":
        assert lines.loc["S", "ends"] == lines.loc["S", "spares"] == "yes", "as it was made"


def test_relearning_starts_where_the_mask_leaves_the_model(monkeypatch):
    monkeypatch.setattr(analysis, "STEPS", (0, 1))
    rows = Rows()
    for removed in ("none", "S"):
        labels = {"ladder": "shipped", "job": "relearn", "removed": removed}
        rows += analysis.relearned(FOLDER, removed, labels)
    table = tables.relearning_table(rows)
    assert list(table["while training"]) == ["held", "free"] * 2
    start = table["loss, 0"].astype(float)
    assert start[0] == start[1] < 1 < start[2] == start[3]
    assert float(table["loss, 1"][2]) < start[2], "what was removed is learned again"
    assert list(table["half back after"]) == ["0", "0", "> 1", "> 1"]


def test_the_page_quotes_the_committed_rows():
    folder = Path(analysis.__file__).parent
    rows = Rows.read(folder / "rows" / "planted.jsonl")
    text = text_of("planted.md")
    for table in (tables.recovery_table, tables.reach_table, tables.relearning_table):
        assert frame_markdown(table(rows)) in text
