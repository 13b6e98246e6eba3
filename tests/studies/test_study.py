"""The main job on a small part of the world: rows, masks, page, operating point, and its errors.

Would catch: a control that is missing, rows that contradict the masks, an operating point that
breaks its own rule, a way of choosing that is shown at the wrong size, searches that start afresh
after an interruption, a page that reaches for the network or trusts a judge that sees nothing,
edits left in the model.
"""

import errno
import json
import re
from dataclasses import replace
from io import StringIO

import pytest
import torch
from helpers import small_model
from rich.console import Console
from typer.testing import CliRunner

from harmcircuits.behaviours.validation import METRIC
from harmcircuits.circuits.masks import WeightMask
from harmcircuits.circuits.scores import Source, WeightScores
from harmcircuits.cli import app
from harmcircuits.hooks.attribution import removal_effect
from harmcircuits.hooks.search import set_difference
from harmcircuits.hooks.weights import named_weights
from harmcircuits.measurements import Measurement, Rows
from harmcircuits.studies.grid import operating_point
from harmcircuits.studies.run import Point
from harmcircuits.studies.settings import StudySettings
from harmcircuits.studies.study import study
from harmcircuits.studies.study_page import write_study_page
from harmcircuits.studies.summary import (
    StudyLines,
    headline,
    held_out_lines,
    result_tables,
    summary,
)
from harmcircuits.studies.terms import Terms

SIZES = (0.01, 0.04)
STEPS = 2
TERMS = Terms.standard()
FIXED_MASKS = {
    "none",
    "circuit",
    "random",
    "random_magnitude",
    "opposite_sign",
    "second_slice",
    "benign_twin",
}
FIXED_METRICS = {
    "harm_valid_rate",
    "harm_nll",
    "benign_valid_rate",
    "benign_nll",
    "benign_kl",
    "recognition_accuracy",
    "explanation_rate",
    "knowledge_rate",
    "refusal_rate",
    "weights_removed",
    "predicted_loss_change",
    "measured_loss_change",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A study of a small `planted`, its folder, and the model's weights before it."""
    model = small_model("planted")
    out = tmp_path_factory.mktemp("study")
    weights = named_weights(model.bridge)
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    settings = StudySettings(sizes=SIZES, steps=STEPS, n_random=2, tolerance=0.2)
    run = study(model, settings, out=out, max_memory=2**21)
    write_study_page(run, out / "report.html")
    return run, out, before


# A finished study


def test_rows_hold_every_fixed_metric_and_mask(finished):
    run, out, _ = finished
    rows = Rows.read(out / "rows.jsonl")
    assert rows == run.rows
    held_out = Rows([*rows.where(split="heldout"), *rows.where(split="calibration")])
    assert {row.labels["mask"] for row in held_out} == FIXED_MASKS
    assert set(held_out.metrics) >= FIXED_METRICS
    assert all(row.low <= row.mean <= row.high for row in rows)


def test_masks_are_those_of_the_rows(finished):
    run, out, _ = finished
    files = {path.stem: WeightMask.load(path) for path in (out / "masks").iterdir()}
    assert files.keys() == run.masks.keys()
    assert run.chosen is not None
    circuit = run.chosen.mask
    assert {name for name in files if name.startswith("random-")} == {"random-0", "random-1"}
    for name in ("random-0", "random-1", "random_magnitude-1"):
        assert files[name].counts == circuit.counts, "controls match in every matrix"
    assert len(files["circuit"] - circuit) == len(circuit - files["circuit"]) == 0
    for kind in ("opposite_sign", "second_slice"):
        assert len(files[kind]) == len(circuit)
    assert len(files["second_slice"] & circuit) == 0
    located = run.rows.where("weights_removed", mask="circuit", by="matrix")
    assert sum(row.mean for row in located) == len(circuit)


def test_the_change_of_the_loss_is_predicted_by_scores_of_the_unpruned_model(finished):
    run, _, _ = finished
    data = run.model.calibration("harmful")
    scores = removal_effect(run.model.bridge, data.batches)
    predicted = run.rows.one("predicted_loss_change", mask="random", seed=0)
    assert predicted.mean == pytest.approx(scores.sum_over(run.masks["random-0"]), rel=1e-4)


def test_the_model_is_as_before(finished):
    run, _, before = finished
    for name, weight in named_weights(run.model.bridge).items():
        assert torch.equal(weight, before[name])


def test_the_planted_circuit_is_compared(finished):
    run, _, _ = finished
    areas = run.rows.where("recovery_auroc")
    assert [row.labels["method"] for row in areas] == [
        "removal effect",
        "SNIP, after abs",
        "SNIP, before abs",
        "Wanda",
        "magnitude",
        "random",
        "removal effect, priced",
    ]
    # The standard error of an AUROC over 98,304 against 884,736 weights is about 0.001.
    assert areas.one(method="random").mean == pytest.approx(0.5, abs=0.005)


def test_the_page_needs_no_network(finished):
    _, out, _ = finished
    html = (out / "report.html").read_text(encoding="utf-8")
    assert not re.search(r'<(?:script|link|img)[^>]+(?:src|href)="https?:', html)
    assert html.count("CircuitsVis.render(") >= 10
    assert "NaN" not in re.sub(r"<script>.*?</script>", "", html, flags=re.S)


def test_tables_and_summary_speak_of_the_rows(finished):
    run, _, _ = finished
    terminal = StringIO()
    Console(width=80, file=terminal).print(*result_tables(run.rows, run.terms))
    for name in held_out_lines(run.rows, run.terms):
        assert name in terminal.getvalue()
    text = summary(run.rows, run.terms)
    chosen = run.rows.where("harm_valid_rate", mask="circuit", split="heldout")[0]
    assert chosen.labels["selection"] == "search"
    assert f"to {chosen:.0%}" in text, "with its interval"
    assert f"{len(run.chosen.mask):,} weights" in text
    for way in ("one shot", "published"):
        after = run.rows.one("harm_valid_rate", mask="circuit", split="heldout", selection=way)
        assert f"{after.mean:.0%} ({way}" in text


def test_only_abilities_that_the_model_shows_are_counted_as_kept(finished):
    run, _, _ = finished
    n_kept = len(run.terms.kept)
    assert f" {n_kept} kept abilities" in summary(run.rows, run.terms)
    without = Rows()
    for row in run.rows:
        is_never = row.metric == "knowledge_rate"
        without += [replace(row, mean=0.0, low=0.0, high=0.0) if is_never else row]
    assert f" {n_kept - 1} kept abilities" in summary(without, run.terms)


def test_three_ways_are_measured_at_every_size(finished):
    """The search and one shot by `find_circuit`, the published one by `set_difference`."""
    run, _, _ = finished
    model = run.model
    data = model.calibrations()
    spared = [data[name].batches for name in run.protected]
    options = {"size": SIZES, "calibrations": data}
    at_once = {"steps": 1, "reach": 1, "renew": False}
    masks = {
        "search": model.find_circuit("harmful", steps=STEPS, **options),
        "one shot": model.find_circuit("harmful", **at_once, **options),
        "published": [
            set_difference(model.bridge, data["harmful"].batches, spared, q=size, p=5 * size)
            for size in SIZES
        ],
    }
    for way, of_way in masks.items():
        assert sum(map(len, of_way)) > 0
        for size, mask in zip(SIZES, of_way, strict=True):
            where = {"selection": way, "q": size, "split": "choice"}
            assert run.rows.one("weights_removed", **where).mean == len(mask)
    for way in ("random", "opposite sign"):
        for size, mask in zip(SIZES, masks["search"], strict=True):
            where = {"selection": way, "q": size, "split": "choice"}
            assert run.rows.one("weights_removed", **where).mean == len(mask)


def test_a_way_without_a_point_of_its_own_is_shown_at_the_search_s_size(finished):
    run, _, _ = finished
    lines = held_out_lines(run.rows, run.terms)
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
            size = len(run.chosen.mask)
            assert abs(point.mean - size) == min(abs(row.mean - size) for row in sizes)


def test_an_interrupted_study_searches_on_from_where_it_stopped(tmp_path, monkeypatch):
    """What it measured is measured again, and its finished searches are not made again."""
    model = small_model("sft", every=16, only=["harmful", "benign"])
    settings = StudySettings(
        sizes=(0.02,), steps=2, budget=1.0, tolerance=1.0, decides="loss", n_random=1
    )
    options = {"protect": ["benign"], "out": tmp_path / "run", "resume": True}

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    def no_room(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("harmcircuits.studies.study.measure_heldout", interrupted)
        with pytest.raises(KeyboardInterrupt):
            study(model, settings, **options)
    walks = tmp_path / "run" / "walks"
    assert sorted(path.name for path in walks.iterdir()) == ["one_shot", "scores", "search"]
    scores = walks / "scores"
    assert WeightScores.load(scores / "effect").source.method == "removal_effect"
    (priced,) = WeightScores.load(scores / "price").source.parents
    assert priced.method == "token_price"

    with pytest.raises(ValueError, match=r"run holds an unfinished study.*resume=True.*force=True"):
        study(model, settings, **{**options, "resume": False})
    with pytest.raises(ValueError, match=r"unfinished study with other settings \(steps\); give"):
        study(model, replace(settings, steps=3), **options)
    with monkeypatch.context() as patch:
        patch.setattr("harmcircuits.hooks.walk.Walk.step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            study(model, settings, **options)  # the twin's search is the first that is not finished
    assert "twin" not in [path.name for path in walks.iterdir()]
    with monkeypatch.context() as patch:
        patch.setattr("harmcircuits.studies.study_page.write_study_page", no_room)
        with pytest.raises(OSError, match="No space"):
            study(model, settings, page=True, **options)
    with monkeypatch.context() as patch:
        patch.setattr("harmcircuits.hooks.walk.Walk.step", interrupted)  # all are made
        run = study(model, settings, page=True, **options)
    assert (tmp_path / "run" / "report.html").is_file()
    assert not walks.exists(), "a finished study keeps no searches"
    assert Rows.read(tmp_path / "run" / "rows.jsonl") == run.rows, "each row once"
    assert run.chosen is not None and "benign_twin" in run.masks


def test_a_finished_folder_is_not_overwritten(finished):
    run, out, _ = finished
    with pytest.raises(ValueError, match=r"already holds a study.*another folder"):
        study(run.model, StudySettings(), out=out)


def test_the_manifest_tells_how_to_repeat(finished):
    _, out, _ = finished
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["settings"]["sizes"] == list(SIZES)
    assert manifest["settings"]["protect"] == ["others"]
    assert {"torch", "harmcircuits"} <= manifest["versions"].keys()


def test_no_operating_point_is_said_plainly(finished):
    run, _, _ = finished
    rows = Rows(row for row in run.rows if row.labels.get("mask") in (None, "none"))
    text = summary(rows, run.terms)
    assert text.startswith("No operating point")


def test_what_was_tried_is_kept_where_nothing_was_chosen(tmp_path):
    """Benign answers are not protected, and go with the others."""
    model = small_model("sft", only=["harmful", "benign", "refusal"])
    settings = StudySettings(
        sizes=SIZES, steps=1, n_random=1, tolerance=0.0, protect=("refusal",), compare=False
    )
    run = study(model, settings, out=tmp_path / "run", page=True)
    assert run.chosen is None
    assert set(run.masks) == {"tried-0.01", "tried-0.04"}
    before = run.rows.where(mask="none", split="choice")
    text = summary(run.rows, run.terms)
    for size in SIZES:
        mask = run.masks[f"tried-{size}"]
        assert WeightMask.load(tmp_path / "run" / "masks" / f"tried-{size}.safetensors") == mask
        assert f"Tried {mask.n_removed:,} weights (masks/tried-{size}): " in text
        under = run.rows.where(mask="circuit", split="choice", q=size)
        lost = under.where("not_kept")
        for row in lost:
            behaviour = model.behaviours[row.labels["behaviour"]]
            is_rate = row.labels["figure"] == "rate"
            metric = behaviour.metric if is_rate else behaviour.nll_metric
            change = under.one(metric).mean - before.one(metric).mean
            assert row.mean == change
            assert row.mean < 0 if is_rate else row.mean > settings.budget
        changes = {"benign_valid_rate": -1, "benign_nll": 1}
        n_worse = 0
        for metric, sign in changes.items():
            allowed = 0 if metric.endswith("rate") else settings.budget
            change = under.one(metric).mean - before.one(metric).mean
            n_worse += sign * change > allowed
        assert len(lost.where(behaviour="benign")) == n_worse > 0
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "not kept: benign" in text and "not kept: benign" in page


def test_saturation_is_warned_of(finished):
    run, _, _ = finished
    saturated = Measurement.exact("calibration_nll", {"behaviour": "harmful"}, 0.001)
    text = summary(Rows([*run.rows, saturated]), run.terms)
    assert "Warning: harmful loss 0.001" in text
    assert "Warning" not in summary(run.rows, run.terms)


def test_the_headline_says_what_answers_became(finished):
    run, out, _ = finished
    figures = {name: value for name, value, _ in headline(run.rows, run.terms)}
    where = {"split": "heldout"}
    for metric, name in (("harm_valid_rate", "valid harmful answers"),):
        before = run.rows.one(metric, mask="none", **where).mean
        after = run.rows.one(
            metric, mask="circuit", selection="search", at="operating point", **where
        )
        assert figures[name] == f"{before:.0%} → {after.mean:.0%}"
    assert "degenerate instead" in figures
    assert f"{len(run.chosen.mask):,} weights" in [
        note for _, _, note in headline(run.rows, run.terms)
    ]
    html = (out / "report.html").read_text(encoding="utf-8")
    assert html.index("degenerate instead") < html.index("What goes and what stays")


# A judge that was validated


def judged(run, used: str):
    """The study with the validation of a judge, and without a mask, whose page takes seconds."""
    rows = []
    for contrast, split, mean in (("all", "calibration", 0.91), ("all", "choice", 0.87)):
        labels = {"judge": "chat:m", "contrast": contrast, "split": split, "requests": 31}
        row = Measurement.exact(METRIC, {**labels, "used": used}, mean)
        rows.append(replace(row, low=mean - 0.05, high=mean + 0.05))
    return replace(run, rows=Rows([*run.rows, *rows]), chosen=None)


@pytest.mark.parametrize("used", ["yes", "no"])
def test_the_page_says_whether_the_judge_can_be_trusted(finished, tmp_path, used):
    run = judged(finished[0], used)
    write_study_page(run, tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    _, _, told = html.partition("<h2>Can the judge be trusted?")
    line, _, _ = told.partition("</table>")
    cells = re.findall(r"<td[^>]*>(.*?)</td>", line, flags=re.S)
    texts = [re.sub(r"<.*?>", "", cell).strip() for cell in cells]
    assert texts == ["chat:m", "all", "31", "0.91 [0.86, 0.96]", "0.87 [0.82, 0.92]", used]

    terminal = StringIO()
    Console(width=80, file=terminal).print(*result_tables(run.rows, run.terms))
    assert "The judge of harm" in terminal.getvalue()
    warning = "Warning: the judge does not tell harmful answers from harmless ones"
    for text in (summary(run.rows, run.terms), html):
        assert (warning in text) == (used == "no")


def test_the_page_of_the_local_rules_says_why_it_has_no_such_table(finished):
    run, out, _ = finished
    html = (out / "report.html").read_text(encoding="utf-8")
    _, _, section = html.partition("<h2>Can the judge be trusted?")
    section, _, _ = section.partition("</section>")
    assert "Not validated" in section
    assert "<table" not in section
    assert not StudyLines.of(run.rows, run.terms).judge


@pytest.mark.parametrize(("used", "decides"), [("no", "loss"), ("yes", "rate")])
def test_the_loss_decides_where_the_judge_does_not_see_harm(
    finished, tmp_path, monkeypatch, used, decides
):
    def stop(*_) -> Rows:
        raise KeyboardInterrupt

    monkeypatch.setattr("harmcircuits.studies.study.heldout_rows", stop)
    run, _, _ = finished
    validation = judged(run, used).rows.where(METRIC)
    with pytest.raises(KeyboardInterrupt):
        study(replace(run.model, validation=validation), StudySettings(), out=tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["settings"]["decides"] == decides
    rows = Rows.read(tmp_path / "out" / "rows.jsonl").where(METRIC)
    assert [row.mean for row in rows] == [0.91, 0.87]
    assert {row.labels["model"] for row in rows} == {run.model.name}


@pytest.mark.parametrize(("doubted", "warns"), [(0.09, False), (0.1, True)])
def test_a_judge_that_contradicts_itself_is_said(finished, doubted, warns):
    run, _, _ = finished
    target = replace(run.terms.target, words_metric="kept", doubt_metric="doubted")
    behaviours = tuple(target if b.name == "harmful" else b for b in run.terms.behaviours)
    terms = replace(run.terms, target=target, behaviours=behaviours)
    circuit = held_out_lines(run.rows, terms)["search"].one("harm_valid_rate")
    row = Measurement("doubted", circuit.labels, doubted, 0.0, 1.0, 100)
    text = summary(run.rows + Rows([row]), terms)
    assert ("contradicts itself" in text) == warns
    assert terms.rates["doubted"] == "doubted"
    lines = held_out_lines(run.rows + Rows([row]), terms)
    assert lines["search"].one("doubted").mean == doubted


# The operating point


def made_point(size: int, *, rates: tuple[float, ...], losses: tuple[float, float]) -> Point:
    """Rates of harm, benign answers and recognition; losses on harm and benign answers."""
    mask = WeightMask({"a": torch.arange(size)}, {"a": (100, 100)}, Source("m", "test"))
    return Point(mask, {"selection": "search"}, figures({}, rates, losses))


def figures(labels: dict, rates: tuple[float, ...], losses: tuple[float, float]) -> Rows:
    named = ("harm_valid_rate", "benign_valid_rate", "recognition_accuracy")
    values = dict(zip(named, rates, strict=True))
    values |= dict(zip(("harm_nll", "benign_nll"), losses, strict=True))
    return Rows(Measurement.exact(metric, labels, value) for metric, value in values.items())


def test_the_operating_point_keeps_its_rule():
    same = (0.5, 0.25)
    before = figures({"mask": "none", "split": "choice"}, (1.0, 1.0, 1.0), same)

    def point(harm: float, benign: float, size: int, recognition: float = 1.0) -> Point:
        return made_point(size, rates=(harm, benign, recognition), losses=same)

    def chosen(*points: Point) -> Point | None:
        return operating_point(points, before, TERMS, tolerance=0.01, budget=0.0)

    too_costly, blind = point(0.0, 0.98, 10), point(0.0, 1.0, 10, recognition=0.5)
    small, large, weak = point(0.1, 0.995, 20), point(0.1, 1.0, 30), point(0.5, 1.0, 5)
    assert chosen(too_costly, blind, weak, large, small) is small
    assert chosen(too_costly, blind) is None
    assert chosen(point(1.0, 1.0, 5)) is None, "a mask that lowers nothing is none"
    wider = operating_point([too_costly, small], before, TERMS, tolerance=0.05, budget=0.0)
    assert wider is too_costly


def test_the_operating_point_within_a_budget_of_loss():
    before = figures({"mask": "none", "split": "choice"}, (1.0, 1.0, 1.0), (0.5, 0.25))

    def point(harm: float, benign: float, size: int, kept: float = 1.0) -> Point:
        return made_point(size, rates=(1.0, kept, 1.0), losses=(harm, benign))

    def chosen(*points: Point, budget: float, decides: str = "loss") -> Point | None:
        return operating_point(
            points, before, TERMS, tolerance=0.01, budget=budget, decides=decides
        )

    cheap, dear = point(0.75, 0.25, 9), point(3.0, 0.5, 9)
    good, same = point(1.5, 0.375, 20), point(1.5, 0.375, 30)
    blunt = point(4.0, 0.25, 9, kept=0.5)
    assert chosen(cheap, dear, same, good, blunt, budget=0.125) is good
    assert chosen(cheap, dear, good, budget=0.25) is dear
    assert chosen(cheap, dear, good, budget=0.0) is cheap
    none = chosen(point(0.5, 0.25, 5), point(0.25, 0.25, 5), budget=1.0)
    assert none is None, "none raises the loss"
    same_rates = chosen(cheap, dear, good, budget=0.25, decides="rate")
    assert same_rates is None, "no rate falls"
    costly = made_point(9, rates=(0.0, 1.0, 1.0), losses=(3.0, 0.5))
    spared = made_point(9, rates=(0.5, 1.0, 1.0), losses=(3.0, 0.25))
    assert chosen(costly, spared, budget=0.125, decides="rate") is spared


def test_the_operating_point_within_budgets_of_single_losses():
    before = figures({"mask": "none", "split": "choice"}, (1.0, 1.0, 1.0), (0.5, 0.25))
    loss = Measurement.exact("recognition_nll", {"mask": "none", "split": "choice"}, 1.0)
    before = Rows([*before, loss])

    def point(harm: float, recognition: float) -> Point:
        made = made_point(9, rates=(1.0, 1.0, 1.0), losses=(harm, 0.25))
        risen = Measurement.exact("recognition_nll", {}, recognition)
        return replace(made, rows=Rows([*made.rows, risen]))

    def chosen(**budgets: float) -> Point | None:
        return operating_point(
            [cheap, dear],
            before,
            TERMS,
            tolerance=0.01,
            budget=0.0,
            budgets=budgets,
            decides="loss",
        )

    cheap, dear = point(1.0, 1.125), point(3.0, 1.5)
    assert chosen() is dear, "a loss without a budget is free"
    assert chosen(recognition=0.25) is cheap
    assert chosen(recognition=0.0) is None
    assert chosen(explanation=0.0) is dear, "what has no loss here plays no part"


def test_the_summary_says_what_was_protected_and_what_was_not(finished):
    run, _, _ = finished
    (line,) = [line for line in summary(run.rows, run.terms).split("\n") if "Protected" in line]
    spared, _, open_to_it = line.partition("Not protected: ")
    for name in run.protected:
        assert f"{name} ({run.settings.budget:g})" in spared
    named = [name for name in run.terms.names if name not in ("harmful", *run.protected)]
    assert all(name in open_to_it for name in named)
    assert bool(open_to_it) == bool(named)


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--organism", "llama"], "no organism is called 'llama'; there are base, helpful"),
        (["--size", "1.5"], "--size [1.5]; expected one or more shares"),
        (["--steps", "0"], "--steps 0; expected at least 1"),
        (["--max-memory", "0.0001"], "--max-memory 107,374 bytes; the scores of blocks.0"),
        (["--budget-of", "benign"], "--budget-of 'benign'; expected NAME=VALUE"),
        (
            ["--budget-of", "bening=1"],
            "--budget-of: 'bening' is no behaviour; did you mean 'benign'?",
        ),
        (["--n-random", "0"], "--n-random 0; expected at least 1"),
        (["--task-limit", "-1"], "--task-limit -1; expected 0 or more"),
        (["--decides", "nll"], "--decides 'nll'; expected"),
        (
            ["--protect", "kindness"],
            "sft has no behaviour 'kindness'; did you mean 'kind'? There are harmful, benign",
        ),
        (["--protect", "harmful"], "--protect: 'harmful' is what is removed"),
        (["--target", "harm"], "sft has no behaviour 'harm'; did you mean 'harmful'"),
        (["--organisms", "nowhere"], "nowhere holds no organism 'sft'"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_command_line_errors_are_one_line(tmp_path, arguments, message):
    result = CliRunner().invoke(app, ["study", "--out", str(tmp_path / "out"), *arguments])
    assert result.exit_code == 2
    assert message in result.stderr.replace("\n", " ")
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists(), "nothing is left behind by a refused call"


def test_a_page_needs_a_folder(finished):
    with pytest.raises(ValueError, match=r"page=True writes report\.html.*out=FOLDER"):
        study(finished[0].model, StudySettings(), page=True)


def test_a_bound_on_memory_needs_a_folder(finished):
    run, _, _ = finished
    with pytest.raises(ValueError, match=r"max_memory=2,097,152 .*give out=FOLDER"):
        study(run.model, max_memory=2**21)


def test_a_model_that_never_shows_the_target_is_refused():
    model = small_model("sft")
    closed = replace(model.behaviours["harmful"], prefill="")
    with pytest.raises(ValueError, match="sft does not show 'harmful'"):
        study(model.with_behaviours(closed), StudySettings())


def test_a_behaviour_that_is_not_shown_cannot_be_protected():
    model = small_model("base")
    with pytest.raises(ValueError, match="base does not show 'refusal'"):
        study(model, StudySettings(protect=("refusal",)))
