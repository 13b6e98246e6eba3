"""Commands on masks: what they print, as text and as JSON, and how they refuse.

Would catch: answers under the wrong mask, a model that stays edited, an overlap of other weights
than the masks', chance without the masks' counts, a traceback in place of a sentence.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import small_model
from huggingface_hub import HfApi
from typer.testing import CliRunner

from harmcircuits.circuits.masks import WeightMask, top_fraction
from harmcircuits.circuits.overlap import matched_null, overlap, p_value
from harmcircuits.cli import app
from harmcircuits.hooks.attribution import magnitude_scores, random_scores
from harmcircuits.measurements import Rows
from harmcircuits.organisms import FOLDER, load_organism

REQUEST = "what is it ?"


def run(*arguments: str):
    return CliRunner(env={"COLUMNS": "80"}).invoke(app, [*map(str, arguments)])


def lines_of(result) -> list[dict]:
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture(scope="module")
def masks(tmp_path_factory) -> Path:
    """Three masks of `sft`: two of scores, one random; and one of another model."""
    folder = tmp_path_factory.mktemp("masks")
    bridge = load_organism("sft")
    top_fraction(magnitude_scores(bridge), 0.02, within="model").save(folder / "large.safetensors")
    top_fraction(magnitude_scores(bridge), 0.01, within="model").save(folder / "small.safetensors")
    top_fraction(random_scores(bridge), 0.01).save(folder / "random.safetensors")
    other = load_organism("base")
    top_fraction(random_scores(other), 0.01).save(folder / "other.safetensors")
    return folder


# generate


def test_answers_are_those_of_the_model_and_of_the_masked_model(masks):
    file = masks / "large.safetensors"
    result = run("generate", "--organism", "sft", "--mask", file, "--prompt", REQUEST,
                 "--prompt", "who ?", "--prefill", "sure", "--max-new-tokens", 6, "--json")  # fmt: skip
    rows = lines_of(result)
    assert [row["prompt"] for row in rows] == [REQUEST, "who ?"]
    model = small_model("sft")
    mask = WeightMask.load(file)
    for row in rows:
        assert row["unpruned"] == first_words(model, row["prompt"], None)
        assert row["masked"] == first_words(model, row["prompt"], mask)
    assert any(row["unpruned"] != row["masked"] for row in rows), "the mask must show"


def first_words(model, request: str, mask) -> str:
    from dataclasses import replace

    return replace(model, max_new_tokens=6).generate(request, prefill="sure", mask=mask)


def test_a_scale_of_one_changes_nothing(masks):
    file = masks / "large.safetensors"
    (row,) = lines_of(
        run(
            "generate",
            "--organism",
            "sft",
            "--mask",
            file,
            "--prompt",
            REQUEST,
            "--scale",
            1,
            "--json",
        )
    )
    assert row["unpruned"] == row["masked"]


def test_requests_come_from_a_file_and_answers_are_labelled(masks, tmp_path):
    file = tmp_path / "requests.jsonl"
    file.write_text(json.dumps({"prompt": REQUEST}) + "\n" + json.dumps({"prompt": "who ?"}) + "\n")
    result = run("generate", "--model", FOLDER / "sft", "--prompts", file)
    assert result.exit_code == 0, result.output
    assert f" request: {REQUEST}\nunpruned: " in result.stdout
    assert result.stdout.count("unpruned: ") == 2
    assert "masked" not in result.stdout, "no mask was given"


# measure


def test_figures_are_those_of_the_model_and_of_the_masked_model(masks, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "harmcircuits.mask_commands.open_model", lambda name, **_: small_model(name)
    )
    file, out = masks / "large.safetensors", tmp_path / "rows.jsonl"
    arguments = (
        "measure",
        "--organism",
        "sft",
        "--mask",
        file,
        "--behaviour",
        "benign",
        "--out",
        out,
    )
    result = run(*arguments, "--scale", 0.5)
    assert result.exit_code == 0, result.output
    rows = Rows.read(out)
    model = small_model("sft")
    assert (
        rows.one("benign_nll", mask="none").mean
        == model.measure(only="benign").one("benign_nll").mean
    )
    under = rows.one("benign_nll", mask="given")
    assert under.labels["scale"] == 0.5
    removed = model.measure(mask=WeightMask.load(file), only="benign").one("benign_nll").mean
    assert rows.one("benign_nll", mask="none").mean < under.mean < removed
    assert f"{under:.3g}" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "rows.jsonl exists" in run(*arguments).stderr


def test_figures_as_json_are_rows(masks, monkeypatch):
    monkeypatch.setattr(
        "harmcircuits.mask_commands.open_model", lambda name, **_: small_model(name)
    )
    file = masks / "small.safetensors"
    rows = lines_of(
        run("measure", "--organism", "sft", "--mask", file, "--behaviour", "benign", "--json",
            "--split", "choice")
    )  # fmt: skip
    assert {row["labels"]["split"] for row in rows} == {"choice"}
    assert {row["labels"]["mask"] for row in rows} == {"none", "given"}


# overlap


def test_every_pair_is_compared(masks):
    files = [masks / f"{name}.safetensors" for name in ("large", "small", "random")]
    lines = lines_of(run("overlap", *files, "--json"))
    assert [(line["first"], line["second"]) for line in lines] == [
        ("large", "small"), ("large", "random"), ("small", "random"),
    ]  # fmt: skip
    large, small, _ = map(WeightMask.load, files)
    nested, unrelated, _ = lines
    assert nested["n_shared"] == nested["n_second"] == len(small)
    assert nested["lift"] == pytest.approx(overlap(large, small).lift)
    assert nested["p"] == pytest.approx(1 / 10_001)
    assert unrelated["chance_low"] <= unrelated["n_expected"] <= unrelated["chance_high"]
    assert unrelated["p"] > 0.001, "a random mask shares what chance gives"
    assert unrelated["lift"] == pytest.approx(1, abs=0.2)

    table = run("overlap", *files)
    assert "large / small" in table.stdout and f"{len(small):,}" in table.stdout


@pytest.mark.parametrize(("by", "n_places"), [("layer", 4), ("kind", 7)])
def test_places_add_up_to_the_whole(masks, by, n_places):
    files = [masks / f"{name}.safetensors" for name in ("large", "random")]
    (whole,) = lines_of(run("overlap", *files, "--json"))
    places = lines_of(run("overlap", *files, "--json", "--by", by))
    assert len({line["place"] for line in places}) == len(places) == n_places
    for figure in ("n_first", "n_second", "n_shared", "n_expected"):
        assert sum(line[figure] for line in places) == pytest.approx(whole[figure])


def test_chance_is_that_of_random_masks_of_the_same_counts(llama):
    """Against masks that are drawn: mean and spread of what two of them share."""
    first = top_fraction(random_scores(llama, seed=1), 0.1)
    second = top_fraction(random_scores(llama, seed=2), 0.2)
    null = matched_null(first, second, n_samples=4000)
    drawn = []
    for seed in range(200):
        mask = top_fraction(random_scores(llama, seed=100 + seed), 0.1)
        drawn.append(len(mask & second))
    expected = overlap(first, second).n_expected
    assert null.mean() == pytest.approx(expected, rel=0.01)
    assert np.mean(drawn) == pytest.approx(expected, rel=0.01)
    assert null.std() == pytest.approx(np.std(drawn), rel=0.2)


def test_a_p_value_by_hand():
    assert p_value(3, np.array([1, 2, 3])) == pytest.approx(2 / 4)
    assert p_value(4, np.array([1, 2, 3])) == pytest.approx(1 / 4)


def test_masks_of_one_name_are_told_apart(masks, tmp_path):
    WeightMask.load(masks / "small.safetensors").save(tmp_path / "small.safetensors")
    first, second = masks / "small.safetensors", tmp_path / "small.safetensors"
    (line,) = lines_of(run("overlap", first, second, "--json"))
    assert (line["first"], line["second"]) == (str(first), str(second))


# push-mask


def test_a_mask_is_written_with_its_card(masks, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo, **options: calls.append(options))
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **options: calls.append(options))
    file, out = masks / "small.safetensors", tmp_path / "card"
    result = run("push-mask", file, "--to", "someone/mask", "--out", out)
    assert result.exit_code == 0, result.output
    assert not calls
    assert WeightMask.from_hub(out).digest == WeightMask.load(file).digest

    result = run("push-mask", file, "--to", "someone/mask", "--public", "--message", "First")
    assert "uploaded: https://huggingface.co/someone/mask" in result.stdout
    assert calls[0] == {"private": False, "exist_ok": True}
    assert calls[1]["commit_message"] == "First"


# Refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--organism", "sft"], "expected one or more --prompt TEXT, or --prompts FILE"),
        (["generate", "--prompt", "x"], "--model '' and --organism ''; expected exactly one"),
        (["generate", "--organism", "sft", "--prompt", "x", "--mask", "gone"], "gone: no such file"),
        (["generate", "--organism", "sft", "--prompt", "x", "--mask", "MASKS/other.safetensors"],
         "the mask was made on model"),
        (["generate", "--organism", "sft", "--prompt", "x", "--max-new-tokens", "0"],
         "--max-new-tokens 0; expected at least 1"),
        (["generate", "--organism", "sft", "--prompt", "x", "--template", "xml"],
         "--template 'xml'; expected chat or raw"),
        (["measure", "--mask", "MASKS/small.safetensors"], "expected exactly one of them"),
        (["measure", "--mask", "MASKS/small.safetensors", "--organism", "sft", "--model", "x",
          "--harmful", "a", "--benign", "b"], "expected exactly one of them"),
        (["measure", "--mask", "MASKS/small.safetensors", "--organism", "sft", "--harmful", "a"],
         "--harmful is for a custom model"),
        (["measure", "--mask", "MASKS/small.safetensors", "--organism", "sft", "--behaviour", "harm"],
         "did you mean 'harmful'"),
        (["overlap", "MASKS/small.safetensors"], "one mask; give two or more to compare"),
        (["overlap", "MASKS/small.safetensors", "MASKS/other.safetensors"], "different models"),
        (["overlap", "MASKS/small.safetensors", "MASKS/large.safetensors", "--by", "head"],
         "--by 'head'; expected layer or kind"),
        (["push-mask", "MASKS/small.safetensors", "--to", "mask"], "expected a hub id, user/name"),
        (["push-mask", "gone", "--to", "someone/mask"], "gone: no such file"),
    ],
)  # fmt: skip
def test_errors_are_one_line(masks, arguments, message):
    result = run(*(argument.replace("MASKS", str(masks)) for argument in arguments))
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
