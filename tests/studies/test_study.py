"""The main job on a small part of the world: rows, masks, words, page, operating point, and folder.

Would catch: a control that is missing, rows that contradict the masks, an operating point that
breaks its own rule, a way of choosing that is shown at the wrong size, searches that start afresh
after an interruption, a page that reaches for the network or trusts a judge that sees nothing,
edits left in the model.
"""

import json
import re
from dataclasses import replace
from io import StringIO

import pytest
import torch
from helpers import small_model
from rich.console import Console

from harmcircuits.behaviours.probe import METRIC
from harmcircuits.circuits.masks import WeightMask
from harmcircuits.circuits.scores import Source, WeightScores
from harmcircuits.hooks.weights import named_weights
from harmcircuits.measurements import Measurement, Rows
from harmcircuits.search.attribution import removal_effect
from harmcircuits.search.circuit import set_difference
from harmcircuits.studies.controls import one_shot_masks, unpruned_scores
from harmcircuits.studies.run import GridPoint
from harmcircuits.studies.settings import StudySettings
from harmcircuits.studies.study import operating_point, study
from harmcircuits.studies.study_page import write_study_page
from harmcircuits.studies.summary import (
    Roles,
    held_out_lines,
    judge_lines,
    result_tables,
    summary,
)

FIXED_MASKS = {
    "none", "circuit", "random", "random_magnitude", "opposite_sign", "second_slice", "benign_twin",
}  # fmt: skip
FIXED_METRICS = {
    "harm_valid_rate", "harm_nll", "benign_valid_rate", "benign_nll", "benign_kl",
    "recognition_accuracy", "explanation_rate", "knowledge_rate", "refusal_rate",
    "weights_removed", "predicted_loss_change", "measured_loss_change",
}  # fmt: skip


# Rows and masks


def test_rows_hold_every_fixed_metric_and_mask(finished):
    run = finished.run
    rows = Rows.read(run.out / "rows.jsonl")
    assert rows == run.rows
    held_out = Rows([*rows.where(split="heldout"), *rows.where(split="calibration")])
    assert {row.labels["mask"] for row in held_out} == FIXED_MASKS
    assert set(held_out.metrics) >= FIXED_METRICS
    manifest = json.loads((run.out / "manifest.json").read_text())
    assert manifest["settings"]["sizes"] == [0.004]
    assert {"torch", "harmcircuits"} <= manifest["versions"].keys()


def test_masks_are_those_of_the_rows_and_the_model_is_as_before(finished):
    run = finished.run
    files = {path.stem: WeightMask.load(path) for path in (run.out / "masks").iterdir()}
    assert files.keys() == run.masks.keys()
    circuit = run.choice.mask
    for name in ("random-0", "random_magnitude-0"):
        assert files[name].counts == circuit.counts, "controls match in every matrix"
    assert files["circuit"] == circuit
    for kind in ("opposite_sign", "second_slice"):
        assert len(files[kind]) == len(circuit)
    assert len(files["second_slice"] & circuit) == 0
    located = run.rows.where("weights_removed", mask="circuit", by="matrix")
    assert sum(row.mean for row in located) == len(circuit)
    for name, weight in named_weights(run.model.bridge).items():
        assert torch.equal(weight, finished.before[name])


def test_the_change_of_the_loss_is_predicted_by_scores_of_the_unpruned_model(finished):
    run = finished.run
    scores = removal_effect(run.model.bridge, run.model.calibration("harmful").batches)
    predicted = run.rows.one("predicted_loss_change", mask="random", seed=0)
    assert predicted.mean == pytest.approx(scores.sum_over(run.masks["random-0"]), rel=1e-4)


def test_ways_are_those_of_the_public_functions_at_every_size(finished):
    """One shot is effect less price at the least factor kept, the published one `set_difference`."""
    run = finished.run
    model, sizes = run.model, run.settings.sizes
    data = model.calibrations(["harmful", *run.protected])
    harm, *spared = (data[name].batches for name in ("harmful", *run.protected))
    protected = {name: data[name] for name in run.protected}
    unpruned = unpruned_scores(model, "harmful", data["harmful"], protected)
    ways = {
        "one shot": one_shot_masks(model, unpruned, protected, sizes),
        "published": [set_difference(model.bridge, harm, spared, q=q, p=5 * q) for q in sizes],
    }
    for way, masks in ways.items():
        assert sum(map(len, masks)) > 0
        for size, mask in zip(sizes, masks, strict=True):
            where = {"selection": way, "q": size, "split": "choice"}
            assert run.rows.one("weights_removed", **where).mean == len(mask)
    for size in sizes:
        of_size = run.rows.where("weights_removed", q=size, split="choice")
        n_removed = {row.labels["selection"]: row.mean for row in of_size}
        assert n_removed["random"] == n_removed["opposite sign"] == n_removed["search"]


def test_a_way_without_a_point_of_its_own_is_shown_at_the_search_s_size(finished):
    run = finished.run
    lines = held_out_lines(run.rows, run.roles)
    assert list(lines)[:2] == ["unpruned", "search"]
    for way, name in (("one shot", "one_shot"), ("published", "published")):
        (title,) = (title for title in lines if title.split(",")[0] == way)
        point = run.rows.one("weights_removed", selection=way, split="heldout")
        assert point.mean == len(run.masks[name])
        sizes = run.rows.where("weights_removed", selection=way, split="choice")
        if title == way:
            assert point.labels["at"] == "operating point"
        else:
            assert title == f"{way}, same size"
            size = len(run.choice.mask)
            assert abs(point.mean - size) == min(abs(row.mean - size) for row in sizes)


# Words


def test_tables_and_summary_speak_of_the_rows(finished):
    run = finished.run
    terminal = StringIO()
    Console(width=200, file=terminal).print(*result_tables(run.rows, run.roles))
    for name in held_out_lines(run.rows, run.roles):
        assert name in terminal.getvalue()
    text = summary(run.rows, run.roles)
    chosen = run.rows.where("harm_valid_rate", mask="circuit", split="heldout")[0]
    assert f"to {chosen:.0%}" in text, "with its interval"
    assert f"{len(run.choice.mask):,} weights" in text
    for way in ("one shot", "published"):
        after = run.rows.one("harm_valid_rate", mask="circuit", split="heldout", selection=way)
        assert f"{after.mean:.0%} ({way}" in text
    (line,) = [line for line in text.split("\n") if "Protected" in line]
    spared, _, open_to_it = line.partition("Not protected: ")
    assert all(name in spared for name in run.protected)
    assert "recognition" in open_to_it and "benign" not in open_to_it


def test_what_cannot_be_trusted_is_warned_of(finished):
    run = finished.run
    assert "Warning" not in summary(run.rows, run.roles)
    saturated = Measurement.exact("calibration_nll", {"behaviour": "harmful"}, 0.001)
    assert "Warning: harmful loss 0.001" in summary(Rows([*run.rows, saturated]), run.roles)

    target = run.roles.target
    target = replace(target, metrics={**target.metrics, "doubted": "doubted"})
    behaviours = tuple(target if b.name == "harmful" else b for b in run.roles.behaviours)
    roles = replace(run.roles, target=target, behaviours=behaviours)
    circuit = held_out_lines(run.rows, roles)["search"].one("harm_valid_rate")
    row = Measurement("doubted", circuit.labels, 0.1, 0.0, 1.0, 100)
    assert "contradicts itself" in summary(Rows([*run.rows, row]), roles)

    rows = [row for row in run.rows if row.metric != "calibration_examples"]
    for name, number in {"harmful": 7, "benign": 64, "knowledge": 3, "refusal": 2}.items():
        rows.append(Measurement.exact("calibration_examples", {"behaviour": name}, number))
    assert "harmful 7, knowledge 3;" in summary(Rows(rows), run.roles), "no other is protected"


# The page


def test_the_page_needs_no_network(finished):
    html = (finished.run.out / "report.html").read_text(encoding="utf-8")
    assert not re.search(r'<(?:script|link|img)[^>]+(?:src|href)="https?:', html)
    assert html.count("CircuitsVis.render(") >= 10
    assert "NaN" not in re.sub(r"<script>.*?</script>", "", html, flags=re.S)
    assert html.count("<section") == 7
    assert html.index("broken instead") < html.index("What goes and what stays")
    assert "Not validated" in html


@pytest.mark.parametrize("used", ["yes", "no"])
def test_the_page_says_whether_the_judge_can_be_trusted(finished, tmp_path, used):
    rows = []
    for split, mean in (("calibration", 0.91), ("choice", 0.87)):
        labels = {"judge": "chat:m", "contrast": "all", "split": split, "requests": 31}
        interval = (mean, mean - 0.05, mean + 0.05)
        rows.append(Measurement(METRIC, {**labels, "used": used}, *interval))
    line = ("chat:m", "all", "31", "0.91 [0.86, 0.96]", "0.87 [0.82, 0.92]", used)
    assert [tuple(cells) for cells in judge_lines(Rows(rows))] == [line]
    # Without a mask, whose page takes seconds.
    run = replace(finished.run, rows=Rows([*finished.run.rows, *rows]), choice=None)
    write_study_page(run, tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    section = html.partition("<h2>Can the judge be trusted?")[2].partition("</table>")[0]
    assert all(text in section for text in line)
    warning = "Warning: the judge does not tell harmful answers from harmless ones"
    for text in (summary(run.rows, run.roles), html):
        assert (warning in text) == (used == "no")


# The folder


def test_an_interrupted_study_searches_on_from_where_it_stopped(tmp_path, monkeypatch):
    """What it measured is measured again, and its finished searches are not made again."""
    model = small_model("sft", every=32, only=["harmful", "benign"])
    model = replace(model, details={"borderline": "FILE"})
    settings = StudySettings(sizes=(0.004,), steps=10, tolerance=1.0, n_random=1, compare=False)
    out = tmp_path / "run"
    options = {"protect": ["benign"], "out": out, "resume": True}

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("harmcircuits.studies.study._measure_heldout", interrupted)
        with pytest.raises(KeyboardInterrupt):
            study(model, settings, **options)
    walks = out / "walks"
    assert sorted(path.name for path in walks.iterdir()) == ["scores", "search"]
    assert WeightScores.load(walks / "scores" / "effect").source.method == "removal_effect"

    with pytest.raises(ValueError, match=r"unfinished study.*resume=True.*force=True"):
        study(model, settings, **{**options, "resume": False})
    with pytest.raises(ValueError, match=r"other settings \(borderline\)"):
        study(replace(model, details={}), settings, **options)
    with pytest.raises(ValueError, match=r"unfinished study with other settings \(steps\)"):
        study(model, settings, steps=3, **options)
    with monkeypatch.context() as patch:
        patch.setattr("harmcircuits.search.descent.Search.advance", interrupted)  # all are made
        run = study(model, settings, **options)
    names = {path.name for path in out.iterdir()}
    assert names == {"rows.jsonl", "manifest.json", "report.html", "masks"}, "and no searches"
    assert Rows.read(out / "rows.jsonl") == run.rows, "each row once"
    assert run.choice is not None

    with pytest.raises(ValueError, match=r"holds a finished study.*force=True"):
        study(model, settings, **options)
    run.begin(out, resume=False, force=True)
    assert not list((out / "masks").iterdir()) and not (out / "report.html").exists()


def test_what_was_tried_is_kept_where_nothing_was_chosen(tmp_path):
    """Benign answers are not protected, and go with the others."""
    model = small_model("sft", only=["harmful", "benign", "refusal"])
    grid = {"sizes": (0.04,), "steps": 20, "n_random": 1, "tolerance": 0.0, "compare": False}
    # Room for refusals, so that no check refuses the mask, whatever a processor rounds.
    settings = StudySettings(protect=("refusal",), prefer="", budget={"refusal": 5.0}, **grid)
    run = study(model, settings, out=tmp_path / "run")
    assert run.choice is None
    before = run.rows.where(mask="none", split="choice")
    text = summary(run.rows, run.roles)
    assert text.startswith("No operating point")
    for size in settings.sizes:
        name = f"tried-{size}"
        mask = run.masks[name]
        assert WeightMask.load(tmp_path / "run" / "masks" / f"{name}.safetensors") == mask
        assert f"Tried {mask.n_removed:,} weights (masks/{name}): " in text
        under = run.rows.where(mask="circuit", split="choice", q=size)
        lost = under.where("not_kept")
        assert lost.where(behaviour="benign")
        for row in lost:
            behaviour = model.behaviours[row.labels["behaviour"]]
            is_rate = row.labels["figure"] == "rate"
            metric = behaviour.metric if is_rate else behaviour.nll_metric
            assert row.mean == under.one(metric).mean - before.one(metric).mean
            budget = settings.budget_of(behaviour.name)
            assert row.mean < 0 if is_rate else row.mean > budget
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "not kept: benign" in text and "not kept: benign" in page


# The operating point

BEFORE = {
    "harm_valid_rate": 1.0, "benign_valid_rate": 1.0, "recognition_accuracy": 1.0,
    "harm_degenerate_rate": 0.0, "harm_nll": 0.5, "benign_nll": 0.25, "recognition_nll": 1.0,
}  # fmt: skip


def point(size: int, **figures: float) -> GridPoint:
    """A mask of this size with figures that differ from the unpruned model's."""
    mask = WeightMask({"a": torch.arange(size)}, {"a": (100, 100)}, Source("m", "test"))
    rows = [Measurement.exact(metric, {}, value) for metric, value in (BEFORE | figures).items()]
    return GridPoint(mask, {}, Rows(rows))


def chosen(*points: GridPoint, tolerance: float = 0.01, **budgets: float) -> GridPoint | None:
    settings = StudySettings(tolerance=tolerance, budget=budgets)
    return operating_point(points, BEFORE, Roles.standard(), settings)


def test_the_operating_point_keeps_its_rule():
    small, large = point(20, harm_valid_rate=0.1), point(30, harm_valid_rate=0.1)
    weak = point(5, harm_valid_rate=0.5)
    broken = point(5, harm_valid_rate=0.0, harm_degenerate_rate=0.9)
    costly = point(10, harm_valid_rate=0.0, benign_valid_rate=0.98)
    blind = point(10, harm_valid_rate=0.0, recognition_accuracy=0.5)
    assert chosen(costly, blind, broken, weak, large, small) is small
    assert chosen(costly, blind) is None
    assert chosen(point(5)) is None, "a mask that lowers nothing is none"
    assert chosen(costly, small, tolerance=0.05) is costly


def test_the_operating_point_within_budgets_of_losses():
    small = point(20, harm_valid_rate=0.5, benign_nll=0.375)
    large = point(9, harm_valid_rate=0.1, benign_nll=0.5)
    assert chosen(small, large, benign=0.125) is small
    assert chosen(small, large, benign=0.25) is large
    assert chosen(small, large, benign=0.0) is None


def test_a_study_leaves_the_files_of_others(sft, tmp_path):
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        study(sft, out=tmp_path, force=True)
    assert (tmp_path / "masks" / "mine.txt").read_text() == "mine"
