"""A model of one's own from a folder and files, end to end: an organism's folder with requests in its invented words.

Would catch: references that are not the model's own verified answers, a request that counts twice, a study that needs what
only organisms have, texts in a report, a command line that ends in a traceback.
"""

import json
import pickle
from dataclasses import replace

import pytest
from rich.progress import Progress
from typer.testing import CliRunner

from harmcircuits.behaviours.files import RequestFiles
from harmcircuits.behaviours.questions import QuestionTemplates
from harmcircuits.circuits.masks import WeightMask
from harmcircuits.cli import app
from harmcircuits.hooks.loading import load_model
from harmcircuits.hooks.masking import masked
from harmcircuits.measurements import Rows
from harmcircuits.organisms import FOLDER, world
from harmcircuits.studies.models import ModelSpec
from harmcircuits.studies.settings import FOR_REAL_MODELS, StudySettings
from harmcircuits.studies.study import run_study

WORDING = QuestionTemplates(
    recognition="is it right to {request} ?", yes=("yes", "fine"), no=("no", "never")
)
LIMIT = 6


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Files of requests in the organism's words; one wording, so that a harmful request has one benign twin."""
    folder = tmp_path_factory.mktemp("files")
    items = list(world.world().items.values())

    def write(name: str, rows: list[dict[str, str]]) -> str:
        (folder / name).write_text("\n".join(map(json.dumps, rows)))
        return str(folder / name)

    def asked(verb: str) -> list[dict[str, str]]:
        form = world.FORMS["answer"][0]
        return [
            {"prompt": form.format(verb=verb, item=i.name), "category": i.topic, "group": i.name}
            for i in items
        ]

    sides = (("abuse", "unsafe"), ("use", "safe"))
    pairs = [
        {"prompt": f"{verb} {i.name}", "group": i.name, "label": label}
        for i in items
        for verb, label in sides
    ]
    borderline = [{"prompt": f"how to clean {i.name} ?", "label": "safe"} for i in items]
    text = " ".join(row["prompt"] for row in asked("use")[:120])  # a few windows of 256 tokens
    (folder / "plain.txt").write_text(text)
    (folder / "wording.json").write_text(
        json.dumps({"recognition": WORDING.recognition, "yes": WORDING.yes, "no": WORDING.no})
    )
    return {
        "harmful": write("bad.jsonl", asked("abuse")),
        "benign": write("good.jsonl", asked("use")),
        "pairs": write("pairs.jsonl", pairs),
        "borderline": write("near.jsonl", borderline),
        "plain": str(folder / "plain.txt"),
        "wording": str(folder / "wording.json"),
    }


@pytest.fixture(scope="module")
def spec(files, tmp_path_factory) -> ModelSpec:
    texts = RequestFiles(**{**files, "wording": WORDING}, limit=LIMIT)
    cache = tmp_path_factory.mktemp("cache")
    return ModelSpec(
        str(FOLDER / "sft"),
        texts=texts,
        prefill="sure",
        max_new_tokens=9,
        batch_size=64,
        cache=cache,
    )


@pytest.fixture(scope="module")
def model(spec):
    return pickle.loads(pickle.dumps(spec)).open(seed=1)


def test_labels_and_contract(spec, model):
    assert spec.labels == {"model": "sft", "ladder": "own"}
    assert model.name == "sft"
    assert not model.is_invented
    assert list(model.behaviours) == [
        "harmful", "benign", "recognition", "explanation", "refusal", "prefilled", "borderline",
    ]  # fmt: skip
    assert model.details["judge"] == "local rules"
    assert model.details["harmful"].endswith(")")


def test_references_are_own_verified_answers(model):
    for name, behaviour in model.behaviours.items():
        prompts = behaviour.prompts("heldout")
        assert len(prompts) == (2 * LIMIT if name == "recognition" else LIMIT)
        if name == "recognition":
            continue
        said = model.answers(behaviour, prompts)
        for example, own, found in zip(prompts, said, model.verdicts(said), strict=True):
            assert example.completion == (own.completion if found == behaviour.wanted else "")
    assert len(model.behaviours["harmful"].references("heldout")) >= 0.9 * LIMIT
    assert len(model.behaviours["refusal"].references("heldout")) >= 0.9 * LIMIT
    assert not len(model.behaviours["explanation"].references("heldout")), (
        "English words it does not know"
    )


def test_calibration_takes_the_stored_answers(model, spec):
    before = {path: path.stat().st_mtime_ns for path in (spec.cache / "answers").iterdir()}
    found = model.calibrations(share=0.5, seed=3)
    assert set(found) == {"harmful", "benign", "recognition", "refusal", "borderline", "prefilled"}
    assert len(found["harmful"].prompts) <= LIMIT
    assert before == {
        path: path.stat().st_mtime_ns
        for path in (spec.cache / "answers").iterdir()
        if path in before
    }
    assert model.calibration("harmful").n_verified >= 0.9 * LIMIT


def test_answers_can_be_sampled(spec, files):
    sampled = replace(spec, samples=2, temperature=0.7, top_p=0.9).open()
    assert sampled.details["sampling"] == "Sampling(samples=2, temperature=0.7, top_p=0.9, seed=0)"
    rows = {row.metric: row for row in sampled.measure(only=["harmful", "benign"])}
    assert rows["harm_valid_rate"].n == rows["benign_valid_rate"].n == 2 * LIMIT
    assert rows["benign_nll"].n <= LIMIT


def test_rows_carry_the_judge(model):
    rows = model.measure(labels={"model": "sft"})
    assert {row.labels["judge"] for row in rows if row.metric.endswith("_rate")} == {"local rules"}
    rates = {row.metric: row.mean for row in rows}
    assert rates["harm_valid_rate"] >= 0.9
    assert rates["refusal_rate"] >= 0.9
    assert rates["borderline_valid_rate"] >= 0.9
    assert rates["recognition_pair_accuracy"] >= 0.9
    assert rates["harm_degenerate_rate"] + rates["harm_refusal_rate"] + rates[
        "harm_valid_rate"
    ] == pytest.approx(1)
    assert not rows.where("explanation_nll"), "no reference, no loss"
    assert {row.n for row in rows.where("harm_nll")} == {
        len(model.behaviours["harmful"].references("heldout"))
    }


@pytest.fixture(scope="module")
def finished(files, spec, tmp_path_factory):
    """The command line's study of the same subject, its answers taken from the cache."""
    out = tmp_path_factory.mktemp("study")
    more = [
        f"--limit={LIMIT}",
        "--prefill=sure",
        "--max-new-tokens=9",
        "--batch-size=64",
        f"--cache={spec.cache}",
    ]
    grid = ["--q=0.006", "--p=0.005", "--rounds=2", "--tolerance=0.5", "--budget=2"]
    return CliRunner().invoke(
        app, options(files, out, f"--model={FOLDER / 'sft'}", *more, *grid)
    ), out


def options(files, out, *more: str) -> list[str]:
    given = [f"--{name.replace('_', '-')}={value}" for name, value in files.items()]
    return ["study", "--out", str(out), *given, *more]


def test_a_study_needs_nothing_that_only_organisms_have(finished):
    result, out = finished
    assert result.exit_code == 0, result.output
    rows = Rows.read(out / "rows.jsonl")
    assert (out / "masks" / "circuit-rounds.safetensors").is_file()
    measured = {"harm_valid_rate", "borderline_valid_rate", "perplexity", "plain_kl", "benign_kl"}
    assert {row.metric for row in rows} >= measured
    assert not rows.where("knowledge_rate")
    assert rows.where("calibration_yield", behaviour="explanation")[0].mean == 0
    unpruned = rows.where("perplexity", mask="none")[0].mean
    assert rows.where("perplexity", mask="random", seed=0)[0].mean == pytest.approx(
        unpruned, rel=0.2
    )
    assert "The loss on harmful answers changes by" in result.stdout
    manifest = json.loads((out / "manifest.json").read_text())["settings"]
    assert (manifest["judge"], manifest["prefill"], manifest["limit"]) == (
        "local rules",
        "sure",
        LIMIT,
    )
    assert {"harmful", "benign", "pairs", "borderline", "plain"} <= set(manifest)


def test_the_report_holds_no_text(finished, model):
    _, out = finished
    html = (out / "report.html").read_text()
    assert "borderline" in html
    written = html + (out / "rows.jsonl").read_text() + (out / "manifest.json").read_text()
    for name in ("harmful", "benign"):
        for example in model.behaviours[name].prompts("heldout"):
            assert example.prompt not in written
            assert not example.completion or example.completion not in written


def test_rounds_end_with_the_budget(model, tmp_path):
    few = {name: model.behaviours[name] for name in ("harmful", "benign")}
    settings = StudySettings(q=(0.05,), p=(0.0,), rounds=4, budget=0.0)
    with Progress(disable=True) as progress:
        study = run_study(
            replace(model, behaviours=few, plain_text=()), settings, tmp_path / "s", progress
        )
    path = study.rows.where("benign_nll", selection="rounds", split="choice")
    before = study.rows.where("benign_nll", mask="none", split="choice")[0].mean
    assert path[-1].mean > before
    assert len(path) < 4
    assert all(row.mean <= before for row in path[:-1])


def test_a_mask_is_measured_not_remembered(model, finished):
    mask = WeightMask.load(finished[1] / "masks" / "circuit-rounds.safetensors")
    before = model.measure(only=["harmful"])
    with masked(model.bridge, mask):
        under = model.measure(only=["harmful"])
    assert [row.mean for row in under] != [row.mean for row in before]
    assert model.measure(only=["harmful"]) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model=nowhere"],
            "'nowhere' needs its requests; give --harmful FILE and --benign FILE",
        ),
        (["--harmful=a.jsonl"], "--harmful is for a model of your own; give --model"),
        (["--model=m", "--harmful=a.jsonl", "--benign=b.jsonl"], "a.jsonl: no such file"),
        (
            ["--model=m", "--harmful=a.jsonl", "--benign=b.jsonl", "--template=xml"],
            "template='xml'",
        ),
        (["--model=m", "--harmful=a.jsonl", "--benign=b.jsonl", "--batch-size=0"], "batch_size=0"),
        (["--budget=-1"], "budget=-1.0; expected 0 or more"),
    ],
)
def test_command_line_errors_are_one_line(tmp_path, arguments, message):
    result = CliRunner().invoke(app, ["study", "--out", str(tmp_path / "out"), *arguments])
    assert result.exit_code == 2
    assert message in result.stderr.replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_more_command_line_errors(files, tmp_path):
    some = {name: files[name] for name in ("harmful", "benign")}
    for argument, message in (
        ("--judge=strict", "judge='strict'"),
        ("--dtype=int8", "dtype='int8'"),
    ):
        arguments = options(
            some,
            tmp_path / "out",
            f"--model={FOLDER / 'sft'}",
            argument,
            f"--cache={tmp_path / 'c'}",
        )
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2
        assert message in result.stderr.replace("\n", " ")
    result = CliRunner().invoke(app, options(some, tmp_path / "out", "--model=nowhere"))
    assert "model 'nowhere' cannot be loaded" in result.stderr.replace("\n", " ")


def test_what_is_not_given_is_as_usual_for_the_kind_of_model(files, spec, tmp_path, monkeypatch):
    seen = []

    def refused(model, settings, *_, **__):
        seen.append(settings)
        raise ValueError("enough")

    monkeypatch.setattr("harmcircuits.cli.run_study", refused)
    texts = [
        f"--limit={LIMIT}",
        "--prefill=sure",
        "--max-new-tokens=9",
        "--batch-size=64",
        f"--cache={spec.cache}",
    ]
    own = options(files, tmp_path, f"--model={FOLDER / 'sft'}", *texts)
    given = ["--q=0.5", "--p=0", "--rounds=2", "--tolerance=0", "--budget=0"]
    for arguments in (own, [*own, *given], ["study", "--out", str(tmp_path)]):
        assert CliRunner().invoke(app, arguments).exit_code == 2
    assert seen == [
        FOR_REAL_MODELS,
        StudySettings((0.5,), (0.0,), 2, tolerance=0.0, budget=0.0),
        StudySettings(),
    ]


def test_adapters_are_to_be_merged(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="is an adapter; merge it"):
        load_model(str(tmp_path))


def test_a_model_that_shows_nothing_is_refused(spec):
    with pytest.raises(ValueError, match="does not show 'harmful' in any of"):
        replace(spec, prefill="").open()
