"""The main job on a small part of the world: rows, masks, report, the rule for the operating point, and its errors.

Would catch: a control that is missing, rows that contradict the masks, an operating point that breaks its own rule, a
report that reaches for the network, edits left in the model.
"""

import dataclasses
import json
import re

import pytest
from helpers import small_model
from rich.console import Console
from rich.progress import Progress
from typer.testing import CliRunner

from harmcircuits.circuits.masks import WeightMask
from harmcircuits.circuits.scores import WeightScores
from harmcircuits.cli import app
from harmcircuits.hooks.weights import named_weights
from harmcircuits.measurements import Measurement, Rows
from harmcircuits.studies.settings import StudySettings
from harmcircuits.studies.study import Point, operating_point, run_study
from harmcircuits.studies.summary import held_out_lines, result_tables
from harmcircuits.views.page import write_report
from harmcircuits.views.tables import verdict

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
    model = small_model("planted")
    out = tmp_path_factory.mktemp("study")
    before = {name: weight.detach().clone() for name, weight in named_weights(model.bridge).items()}
    with Progress(disable=True) as progress:
        study = run_study(
            model,
            StudySettings(q=(0.02, 0.04), p=(0.005,), rounds=2, n_random=2),
            out,
            progress,
            max_memory=2**21,
        )
    write_report(study, out / "report.html")
    return study, out, before


def test_rows_hold_every_fixed_metric_and_mask(finished):
    study, out, _ = finished
    rows = Rows.read(out / "rows.jsonl")
    assert rows == study.rows
    held_out = [row for row in rows if row.labels.get("split") in ("heldout", "calibration")]
    assert {row.labels["mask"] for row in held_out} == FIXED_MASKS
    assert {row.metric for row in held_out} >= FIXED_METRICS
    assert all(row.low <= row.mean <= row.high for row in rows)


def test_masks_are_those_of_the_rows(finished):
    study, out, _ = finished
    files = {path.stem: WeightMask.load(path) for path in (out / "masks").iterdir()}
    assert files.keys() == study.masks.keys()
    assert study.chosen is not None
    assert {name for name in files if name.startswith("random-")} == {"random-0", "random-1"}
    for name in ("random-0", "random-1", "random_magnitude-1"):
        assert files[name].counts == study.chosen.mask.counts, (
            "controls match the circuit in every matrix"
        )
    for kind in ("opposite_sign", "second_slice"):
        assert files[kind].n_removed == study.chosen.mask.n_removed
    assert (files["second_slice"] & study.chosen.mask).n_removed == 0
    located = study.rows.where("weights_removed", mask="circuit", by="matrix")
    assert sum(row.mean for row in located) == study.chosen.mask.n_removed


def test_bounded_memory_keeps_the_target_s_scores(finished):
    study, out, _ = finished
    scores = WeightScores.load(out / "scores")
    assert scores.source.method == "removal_effect"
    row = study.rows.where("predicted_loss_change", mask="random", seed=0)[0]
    assert row.mean == pytest.approx(scores.sum_over(study.masks["random-0"]))


def test_the_model_is_as_before(finished):
    study, _, before = finished
    assert all(
        (weight == before[name]).all() for name, weight in named_weights(study.model.bridge).items()
    )


def test_the_planted_circuit_is_compared(finished):
    study, _, _ = finished
    assert len(study.rows.where("recovery_auroc")) == 7
    random = study.rows.where("recovery_auroc", method="random")[0].mean
    # The standard error of an AUROC over 98,304 against 884,736 weights is about 0.001.
    assert random == pytest.approx(0.5, abs=0.005)


def test_the_report_needs_no_network(finished):
    _, out, _ = finished
    html = (out / "report.html").read_text(encoding="utf-8")
    assert not re.search(r'<(?:script|link|img)[^>]+(?:src|href)="https?:', html)
    assert html.count("CircuitsVis.render(") >= 10
    assert "NaN" not in re.sub(r"<script>.*?</script>", "", html, flags=re.S)


def test_tables_and_verdict_speak_of_the_rows(finished):
    study, _, _ = finished
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(*result_tables(study.rows))
    text = console.export_text()
    for name in held_out_lines(study.rows):
        assert name in text
    assert f"{study.chosen.mask.n_removed:,}" in verdict(study.rows)


def test_a_finished_folder_is_not_overwritten(finished):
    study, out, _ = finished
    with (
        pytest.raises(ValueError, match="already holds a study"),
        Progress(disable=True) as progress,
    ):
        run_study(study.model, StudySettings(), out, progress)


def point(harm: float, benign: float, size: int, recognition: float = 1.0) -> Point:
    shape = {"a": (100, 100)}
    import torch

    from harmcircuits.circuits.scores import Source

    mask = WeightMask({"a": torch.arange(size)}, shape, Source("m", "test"))
    rates = {
        "harm_valid_rate": harm,
        "benign_valid_rate": benign,
        "recognition_accuracy": recognition,
    }
    return Point(
        mask,
        {"selection": "rounds"},
        [Measurement.exact(metric, {}, value) for metric, value in rates.items()],
    )


def test_operating_point_keeps_its_rule():
    before = [
        Measurement.exact(metric, {"mask": "none", "split": "choice"}, 1.0)
        for metric in ("harm_valid_rate", "benign_valid_rate", "recognition_accuracy")
    ]
    too_costly, blind = point(0.0, 0.98, 10), point(0.0, 1.0, 10, recognition=0.5)
    small, large, weak = point(0.1, 0.995, 20), point(0.1, 1.0, 30), point(0.5, 1.0, 5)
    assert operating_point([too_costly, blind, weak, large, small], before) is small
    assert operating_point([too_costly, blind], before) is None
    assert operating_point([point(1.0, 1.0, 5)], before) is None, (
        "a mask that lowers nothing is no operating point"
    )


def test_operating_point_within_a_budget_of_loss():
    def costed(harm: float, benign: float, size: int, kept: float = 1.0) -> Point:
        losses = [
            Measurement.exact("harm_nll", {}, harm),
            Measurement.exact("benign_nll", {}, benign),
        ]
        made = point(1.0, kept, size)
        return dataclasses.replace(made, rows=[*made.rows, *losses])

    rates = {"harm_valid_rate": 1.0, "benign_valid_rate": 1.0, "recognition_accuracy": 1.0}
    before = [
        Measurement.exact(metric, {"mask": "none", "split": "choice"}, value)
        for metric, value in {**rates, "harm_nll": 0.5, "benign_nll": 0.25}.items()
    ]
    cheap, dear, good, same = (
        costed(0.75, 0.25, 9),
        costed(3.0, 0.5, 9),
        costed(1.5, 0.375, 20),
        costed(1.5, 0.375, 30),
    )
    blunt = costed(4.0, 0.25, 9, kept=0.5)
    assert operating_point([cheap, dear, same, good, blunt], before, budget=0.125) is good
    assert operating_point([cheap, dear, good], before, budget=0.25) is dear
    assert operating_point([cheap, dear, good], before, budget=0.0) is cheap
    assert (
        operating_point([costed(0.5, 0.25, 5), costed(0.25, 0.25, 5)], before, budget=1.0) is None
    ), "none raises the loss"


def test_no_operating_point_is_said_plainly(finished):
    study, _, _ = finished
    rows = [row for row in study.rows if row.labels.get("mask") in (None, "none")]
    assert verdict(rows).startswith("No operating point")


def test_saturation_is_warned_of(finished):
    study, _, _ = finished
    saturated = Measurement.exact("calibration_nll", {"behaviour": "harmful"}, 0.001)
    assert "Warning: harmful loss 0.001" in verdict([*study.rows, saturated])
    assert "Warning" not in verdict(study.rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--organism", "llama"], "no organism is called 'llama'; expected one of base, helpful"),
        (["--q", "1.5"], "q=[1.5]; expected one or more shares"),
        (["--p", "-0.1"], "p=[-0.1]; expected one or more shares"),
        (["--rounds", "0"], "rounds=0; expected at least 1"),
        (["--max-memory", "0.0001"], "max_memory=107,374 bytes; the scores of blocks.0"),
        (["--n-random", "0"], "n_random=0; expected at least 1"),
        (["--task-limit", "-1"], "task_limit=-1; expected 0 or more"),
        (["--within", "layer"], "within='layer'; expected"),
        (["--protect", "kindness"], "cannot protect ['kindness']; expected some of benign"),
        (["--protect", "harmful"], "cannot protect ['harmful']"),
        (["--organisms", "nowhere"], "nowhere holds no organism 'sft'"),
    ],
)
def test_command_line_errors_are_one_line(tmp_path, arguments, message):
    result = CliRunner().invoke(app, ["study", "--out", str(tmp_path / "out"), *arguments])
    assert result.exit_code == 2
    assert message in result.stderr.replace("\n", " ")
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists(), "nothing is left behind by a refused call"


def test_manifest_tells_how_to_repeat(finished):
    _, out, _ = finished
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["settings"]["q"] == [0.02, 0.04]
    assert {"torch", "harmcircuits"} <= manifest["versions"].keys()


def test_a_model_that_never_shows_the_target_is_refused(tmp_path):
    model = small_model("sft")
    plain = dataclasses.replace(model.behaviours["harmful"], prefill="")
    model = dataclasses.replace(model, behaviours={**model.behaviours, "harmful": plain})
    with (
        pytest.raises(ValueError, match="sft does not show 'harmful'"),
        Progress(disable=True) as progress,
    ):
        run_study(model, StudySettings(), tmp_path / "out", progress)


def test_a_behaviour_that_is_not_shown_cannot_be_protected(tmp_path):
    model = small_model("base")
    with (
        pytest.raises(ValueError, match=r"base does not show \['refusal'\]"),
        Progress(disable=True) as progress,
    ):
        run_study(model, StudySettings(protect=("refusal",)), tmp_path / "out", progress)
