"""What a study costs, a first look, and the published protocol: counts, prints, what is asked less.

Would catch: a mask that is measured and not counted, a first look that is not smaller, or that a
study goes on from, one that its own command line's defaults undo, an estimate that needs the
weights, a published protocol that searches or scores chats.
"""

from dataclasses import replace

import pytest
import torch
from helpers import small_model
from typer.testing import CliRunner

from harmcircuits import cli
from harmcircuits.cli import app
from harmcircuits.hooks import loading
from harmcircuits.hooks.cost import Speed
from harmcircuits.hooks.objectives import completion_loss, token_error
from harmcircuits.hooks.search import set_difference
from harmcircuits.organisms import FOLDER
from harmcircuits.prompts import tokenize
from harmcircuits.studies.cost import Measuring, Workload, estimate_of_batches, estimate_study
from harmcircuits.studies.settings import FOR_REAL_MODELS, StudySettings, as_published, quick
from harmcircuits.studies.study import study, with_share_of_requests

WORKLOAD = Workload(
    answers=40,
    n_protected=2,
    protected_answers=20,
    measured=10,
    request_tokens=12,
    longest_answer=4,
    batch_size=16,
)


@pytest.fixture(scope="module")
def model():
    return small_model("sft", only=["harmful", "benign", "refusal"])


@pytest.mark.parametrize("compare", [True, False])
def test_every_mask_of_a_study_is_counted(model, compare, tmp_path):
    settings = StudySettings(
        sizes=(0.01, 0.04), steps=2, n_random=1, tolerance=0.5, compare=compare
    )
    estimate = estimate_study(model, settings)
    run = study(model, settings, out=tmp_path / "study", page=not compare)
    assert run.chosen is not None
    measured = run.rows.where("benign_nll")
    measured = [row for row in measured if row.labels["mask"] != "none"]
    assert estimate.n_masks == len(measured)
    assert estimate.seconds > estimate.search.seconds > 0
    assert f"{estimate.n_masks} masks measured" in str(estimate)
    alone = {"circuit", "random-0", "random_magnitude-0", "opposite_sign", "second_slice"}
    others = {"one_shot", "published", "circuit-benign_only", "benign_twin"}
    assert set(run.masks) == (alone | others if compare else alone)
    assert (estimate.others > 0) == compare


def test_the_published_protocol_searches_nothing_and_scores_raw_text(model, tmp_path):
    settings = replace(as_published(StudySettings(n_random=1)), sizes=(0.001, 0.002))
    estimate = estimate_study(model, settings)
    run = study(model, settings, out=tmp_path / "study", page=True)
    controls = {"random-0", "random_magnitude-0", "opposite_sign", "second_slice"}
    assert set(run.masks) == {"circuit", *controls}
    measured = [row for row in run.rows.where("benign_nll") if row.labels["mask"] != "none"]
    assert estimate.n_masks == len(measured)
    assert estimate.others == 0

    raw = {}
    for name in ("harmful", "benign"):
        prompts = model.calibration(name).prompts
        prefill = model.behaviours[name].prefill
        tokenizer = model.bridge.tokenizer
        options = {"template": "raw", "prefill": prefill, "batch_size": model.batch_size}
        raw[name] = tokenize(prompts, tokenizer, **options)
        chats = model.calibration(name).batches
        assert raw[name][0].tokens.shape[1] < chats[0].tokens.shape[1], "no chat template"
    expected = set_difference(model.bridge, raw["harmful"], [raw["benign"]], q=0.002, p=0.01)
    assert run.chosen is not None
    assert run.chosen.mask == expected

    page = (tmp_path / "study" / "report.html").read_text(encoding="utf-8")
    assert "published) takes" in page
    assert "Spared, by the weights that it needs most: benign" in page


def test_a_study_by_the_error_searches_by_it_and_compares_with_the_published_loss(model, tmp_path):
    settings = StudySettings(
        sizes=(0.01, 0.04), steps=2, n_random=1, tolerance=0.5, scored_by="error"
    )
    run = study(model, settings, out=tmp_path / "study", page=True)
    answers = model.calibrations()
    target = answers["harmful"].batches
    assert run.chosen is not None
    searched = run.chosen.mask
    by_error = model.with_behaviours(replace(model.behaviours["harmful"], objective=token_error))
    options = {"size": settings.sizes, "steps": 2, "calibrations": answers}
    assert searched in by_error.find_circuit("harmful", **options)
    assert searched not in model.find_circuit("harmful", **options)

    assert run.masks["one_shot"].source.parents[0].settings["objective"] == "token_error"
    assert run.masks["benign_twin"].source.parents[0].settings["objective"] == "token_error"
    published = []
    for q in settings.sizes:
        spared = [answers[name].batches for name in run.protected]
        published.append(set_difference(model.bridge, target, spared, q=q, p=5 * q))
    assert run.masks["published"] in published

    assert not run.rows.where("predicted_loss_change"), "the scores predict no loss"
    page = (tmp_path / "study" / "report.html").read_text(encoding="utf-8")
    assert "tokens that a draw would miss" in page
    assert model.behaviours["harmful"].objective is completion_loss


def test_a_study_that_prefers_refusals_searches_so_and_counts_them(model, tmp_path):
    settings = StudySettings(sizes=(0.01, 0.04), steps=2, n_random=1, tolerance=0.5, budget=0.5)
    preferring = replace(settings, prefer="refusal")
    protected = model.protected("harmful", "others")
    batches = model.preferred("harmful", "refusal") + model.avoided("harmful", "refusal", protected)
    n_tokens_more = sum(map(n_read, batches))
    works = [estimate_study(model, each).search.work for each in (preferring, settings)]
    assert works[0].scored - works[1].scored == 2 * n_tokens_more
    assert works[0].read - works[1].read == 2 * n_tokens_more

    run = study(model, preferring, out=tmp_path / "study", page=True)
    assert run.chosen is not None
    options = {"size": settings.sizes, "steps": 2, "budget": 0.5}
    options["calibrations"] = model.calibrations()
    assert run.chosen.mask in model.find_circuit("harmful", prefer="refusal", **options)
    for name in ("one_shot", "circuit-benign_only"):
        assert run.masks[name].source.settings["preference"] > 0
    assert "preference" not in run.masks["benign_twin"].source.settings
    page = (tmp_path / "study" / "report.html").read_text(encoding="utf-8")
    assert "removal makes refusal likelier" in page


def test_a_study_protects_first_tokens_by_themselves_and_counts_them(model, tmp_path):
    settings = StudySettings(sizes=(0.04,), steps=1, n_random=1, tolerance=0.5, budget=0.5)
    first = replace(settings, protect_first=2)
    works = [estimate_study(model, each).search.work for each in (first, settings)]
    assert works[0].scored > works[1].scored
    assert works[0].read > works[1].read

    run = study(model, first, out=tmp_path / "study", page=True)
    assert run.chosen is not None
    assert run.chosen.mask.source.settings["protect_first"] == 2
    tried = run.chosen.mask.trace.where("protected_rise")
    names = {str(row.labels["protected"]) for row in tried}
    assert names == {*run.protected, *(f"{name}, first 2 tokens" for name in run.protected)}
    assert run.masks["benign_twin"].source.settings["protect_first"] == 2
    page = (tmp_path / "study" / "report.html").read_text(encoding="utf-8")
    assert "The first 2 tokens of every protected answer" in page


def n_read(batch):
    return len(batch) * batch.n_read


def test_what_cannot_be_preferred_is_refused_before_anything_is_written(model, tmp_path):
    for name, text in (("harmful", "name what should take its place"), ("kindness", "'kindness'")):
        with pytest.raises(ValueError, match=text):
            study(model, StudySettings(prefer=name), out=tmp_path / "study")
    assert not (tmp_path / "study").exists()
    with pytest.raises(ValueError, match="the published protocol scores the target alone"):
        replace(as_published(StudySettings()), prefer="refusal")
    with pytest.raises(ValueError, match="spares whole answers: leave protect_first out"):
        replace(as_published(StudySettings()), protect_first=8)
    with pytest.raises(ValueError, match="protect_first=-1; expected 0 or more"):
        StudySettings(protect_first=-1)


def test_what_answers_cannot_be_scored_by_is_refused():
    settings = StudySettings()
    object.__setattr__(settings, "scored_by", "rate")  # past the types, which only tests check
    with pytest.raises(ValueError, match='scored_by=\'rate\'; expected "loss" or "error"'):
        settings.__post_init__()
    with pytest.raises(ValueError, match="the published protocol scores by the loss"):
        replace(as_published(StudySettings()), scored_by="error")


@pytest.mark.parametrize(
    "changes", [{"compare": True}, {"protect": ("others",)}, {"protect": ("refusal",)}]
)
def test_the_published_protocol_spares_the_contrast_alone(changes):
    with pytest.raises(ValueError, match="it is no search, and spares 'benign' alone"):
        replace(as_published(StudySettings()), **changes)


@pytest.mark.parametrize(
    ("arguments", "changes"),
    [
        (["--quick"], {}),
        (["--quick", "--n-random", "2", "--compare"], {"n_random": 2, "compare": True}),
        (["--published"], {}),
        (["--published", "--size", "0.001", "--quick"], {"sizes": (0.001,)}),
        ([], {}),
    ],
)
def test_what_is_given_on_the_command_line_changes_what_is_usual(arguments, changes, monkeypatch):
    chosen = []

    def noted(model, settings, **options):
        chosen.append(settings)
        raise ValueError("that is enough")

    monkeypatch.setattr(cli, "study", noted)
    result = CliRunner().invoke(app, ["study", "--out", "nowhere", *arguments])
    assert "that is enough" in result.stderr
    usual = StudySettings()
    if "--published" in arguments:
        usual = as_published(usual)
    if "--quick" in arguments:
        usual = quick(usual)
    assert chosen == [replace(usual, **changes)]


def test_a_workload_is_what_it_says():
    assert sum(map(len, WORKLOAD.target)) == 40
    assert [len(batch) for batch in WORKLOAD.target] == [16, 16, 8]
    assert {batch.tokens.shape[1] for batch in WORKLOAD.target} == {12 + 4}
    assert all(int(batch.is_target.sum()) == 4 * len(batch) for batch in WORKLOAD.target)
    assert next(iter(WORKLOAD.spared)) == "benign"
    assert len(WORKLOAD.spared) == 2
    assert WORKLOAD.measuring.decoded == 4, "all thirty answers in one batch"
    with pytest.raises(ValueError, match="measured=0; expected at least 1"):
        replace(WORKLOAD, measured=0)


def test_nothing_protected_needs_no_twin(model):
    alone = replace(WORKLOAD, n_protected=0)
    speed = Speed(1.0, 1.0, 1.0, 1.0)
    options = {
        "measuring": Measuring(alone.measuring, alone.measuring),
        "longest_answer": 4,
        "at_once": alone.answered_at_once,
        "max_memory": None,
        "speed": speed,
    }
    settings = StudySettings(steps=1, sizes=(0.1,))
    few = estimate_of_batches(model, alone.target, {}, settings, **options)
    more = estimate_of_batches(model, alone.target, WORKLOAD.spared, settings, **options)
    assert 0 < few.others < more.others
    assert few.n_masks == more.n_masks


def test_a_first_look_has_less_of_everything(model):
    for settings in (StudySettings(), FOR_REAL_MODELS):
        fewer = quick(settings)
        assert fewer.steps == 4 and fewer.n_random == 1 and not fewer.compare
        assert set(fewer.sizes) < set(settings.sizes)
    assert quick(StudySettings(sizes=(0.1,), steps=2)).sizes == (0.1,)
    assert quick(StudySettings(sizes=(0.1,), steps=2)).steps == 2

    tenth = with_share_of_requests(model, 0.5)
    for name, behaviour in tenth.behaviours.items():
        few, all_ = behaviour.prompts("heldout"), model.behaviours[name].prompts("heldout")
        assert 0 < len(few) <= len(all_)
    assert len(tenth.behaviours["benign"].prompts("heldout")) < len(
        model.behaviours["benign"].prompts("heldout")
    )
    assert tenth.details["share_of_requests"] == 0.5


def test_the_table_of_a_model_that_is_not_loaded(tmp_path):
    arguments = ["--answers", "4", "--protected-answers", "3", "--tflops", "1", "--bandwidth", "10"]
    config = str(FOLDER / "sft" / "config.json")
    result = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["cost", "--model", config, *arguments])
    assert result.exit_code == 0, result.output
    assert "983,040 block weights" in result.stdout
    for line in ("the model", "activations of a batch", "search, 8 steps", "study in all"):
        assert line in result.stdout
    assert "…" not in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


@pytest.mark.filterwarnings("default")
def test_the_cost_of_a_slow_number_format_names_the_faster_one(monkeypatch):
    monkeypatch.setattr(loading, "WIDE", 1)
    monkeypatch.setattr(loading, "slowdown", lambda dtype: 40 if dtype == torch.bfloat16 else 1)
    arguments = ["cost", "--model", str(FOLDER / "sft"), "--tflops", "1", "--bandwidth", "10"]
    slow, fast = (
        CliRunner().invoke(app, [*arguments, "--dtype", dtype]).stderr
        for dtype in ("bfloat16", "float32")
    )
    assert "40 times as long in bfloat16" in " ".join(slow.split())
    assert "--dtype 'float32'" in " ".join(slow.split()) and "dtype=" not in slow
    assert "as long in" not in fast


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nowhere"], "no configuration of a language model"),
        (["--model", str(FOLDER / "sft"), "--answers", "0"], "--answers 0; expected at least 1"),
        (["--model", str(FOLDER / "sft"), "--max-memory", "0.000001"], "give at least these"),
    ],
)
def test_errors_are_one_line(arguments, message):
    result = CliRunner().invoke(app, ["cost", *arguments])
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
