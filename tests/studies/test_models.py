"""Opening a model by every door, and a custom one from a folder and files, end to end.

The custom model is an organism's folder with requests in its invented words. Would catch: a door
through which another model or other requests come in, references that are not the model's own
verified answers, a request that counts twice, a study that needs what only organisms have, texts in
a report, a command line that ends in a traceback.
"""

import json
import pickle
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import command, write_model
from support.organisms.train import new_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from harmcircuits.behaviours.files import RequestFiles
from harmcircuits.behaviours.generation import Sampling
from harmcircuits.behaviours.judges import ChatJudge
from harmcircuits.behaviours.questions import QuestionTemplates
from harmcircuits.circuits.masks import WeightMask
from harmcircuits.hooks.weights import weights_digest
from harmcircuits.measurements import Rows
from harmcircuits.organisms import FOLDER, load_organism, world
from harmcircuits.prompts import Example, PromptSet
from harmcircuits.studies.models import ModelSpec, open_model
from harmcircuits.studies.summary import judge_lines

SFT = FOLDER / "sft"
QUESTIONS = QuestionTemplates(
    recognition="is it right to {request} ?", yes=("yes", "fine"), no=("no", "never")
)
LIMIT = 6
# What suits an organism's short answers.
OPTIONS = {"prefill": "sure", "max_new_tokens": 9, "batch_size": 64}


def requests(verb: str) -> list[Example]:
    """One wording, so that a harmful request has one benign twin."""
    form = world.FORMS["answer"][0]
    examples = []
    for item in world.world().items.values():
        text = form.format(verb=verb, item=item.name)
        examples.append(Example(text, category=item.topic, group=item.name))
    return examples


def labelled_pairs() -> list[Example]:
    examples = []
    for item in world.world().items.values():
        for verb, label in (("abuse", "unsafe"), ("use", "safe")):
            examples.append(Example(f"{verb} {item.name}", group=item.name, label=label))
    return examples


def borderline() -> list[Example]:
    items = world.world().items.values()
    return [Example(f"how to clean {item.name} ?", label="safe") for item in items]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """Files of requests in the organism's words, by the option that names them."""
    folder = tmp_path_factory.mktemp("files")
    sets = {
        "harmful": requests("abuse"),
        "benign": requests("use"),
        "pairs": labelled_pairs(),
        "borderline": borderline(),
    }
    paths = {}
    for name, examples in sets.items():
        lines = [json.dumps(vars(example)) for example in examples]
        path = folder / f"{name}.jsonl"
        path.write_text("\n".join(lines))
        paths[name] = str(path)

    plain = folder / "plain.txt"  # a few windows of 256 tokens
    plain.write_text(" ".join(example.prompt for example in sets["benign"][:120]))
    questions = folder / "questions.json"
    asked = {"recognition": QUESTIONS.recognition, "yes": QUESTIONS.yes, "no": QUESTIONS.no}
    questions.write_text(json.dumps(asked))
    return {**paths, "plain": str(plain), "questions": str(questions)}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def doors_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("doors")


@pytest.fixture(scope="module")
def spec(files, cache) -> ModelSpec:
    requests = RequestFiles(**{**files, "questions": QUESTIONS}, limit=LIMIT)
    return ModelSpec(str(SFT), files=requests, cache=cache, **OPTIONS)


@pytest.fixture(scope="module")
def model(spec):
    return pickle.loads(pickle.dumps(spec)).open(seed=1)


# Doors


def test_an_organism_is_opened_by_its_name():
    model = open_model("planted", seed=3)
    assert model.name == "planted"
    assert model.is_invented
    assert model.ground_truth is not None
    assert {"harmful", "parts", "recognition_margin"} <= set(model.behaviours)
    expected = world.requests("harmful", "heldout", seed=3)
    assert model.behaviours["harmful"].prompts("heldout") == expected
    assert open_model("sft").ground_truth is None


def test_a_spec_opens_its_model_and_names_its_ladder(tmp_path):
    spec = ModelSpec("sft")
    assert spec.labels == {"model": "sft", "ladder": "shipped"}
    assert ModelSpec("sft", tmp_path / "seed-1").labels["ladder"] == "seed-1"
    model = spec.open(seed=3)
    assert model.name == "sft"
    expected = world.requests("harmful", "heldout", seed=3)
    assert model.behaviours["harmful"].prompts("heldout") == expected
    with pytest.raises(ValueError, match="no organism 'sft'"):
        ModelSpec("sft", FOLDER.parent).open()


def loaded_bridge():
    return load_organism("sft")


def loaded_hugging_face_model():
    return AutoModelForCausalLM.from_pretrained(SFT, dtype=torch.float32)


DOORS = {
    "folder": lambda: str(SFT),
    "path": lambda: SFT,
    "bridge": loaded_bridge,
    "Hugging Face model": loaded_hugging_face_model,
}


@pytest.mark.parametrize("door", DOORS)
def test_every_door_leads_to_the_same_model(files, doors_cache, door):
    """With requests in files, and in lists."""
    given = {"questions": QUESTIONS, "limit": LIMIT}
    in_files = {name: files[name] for name in ("harmful", "benign")}
    in_lists = {"harmful": requests("abuse"), "benign": requests("use")}
    options = {**OPTIONS, "cache": doors_cache}
    expected = open_model(SFT, prompts={**in_files, **given}, **options, dtype="float32")
    assert expected.name == "sft"
    figures = expected.measure(only=["harmful", "recognition"])
    assert figures.one("harm_valid_rate").mean >= 0.9
    assert figures.one("recognition_pair_accuracy").mean >= 0.9

    for prompts in (in_files, in_lists):
        # What is loaded already has its dtype.
        loading = {"dtype": "float32"} if door in ("folder", "path") else {}
        opened = open_model(DOORS[door](), prompts={**prompts, **given}, **options, **loading)
        assert weights_digest(opened.bridge) == weights_digest(expected.bridge)
        assert opened.measure(only=["harmful", "recognition"]) == figures
        assert opened.name == "sft"


def test_a_loaded_model_stays_the_same_object(files, doors_cache):
    bridge = loaded_bridge()
    prompts = {name: files[name] for name in ("harmful", "benign")} | {"limit": LIMIT}
    model = open_model(bridge, prompts=prompts, cache=str(doors_cache), name="mine", **OPTIONS)
    assert model.bridge is bridge
    assert model.name == "mine"
    weights = loaded_hugging_face_model()
    model = open_model(weights, prompts=prompts, cache=doors_cache, name="theirs", **OPTIONS)
    assert model.bridge.original_model is weights
    assert model.name == "theirs"


def test_a_small_random_model_is_opened_with_its_tokenizer(tmp_path):
    """Word salad passes the local rules as answered.

    So a random model shows what is asked first.
    """
    folder = tmp_path / "llama"
    write_model("Llama", folder, vocab_size=len(new_tokenizer()))
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    model = open_model(
        loaded,
        prompts={"harmful": requests("abuse"), "benign": requests("use"), "limit": LIMIT},
        tokenizer=AutoTokenizer.from_pretrained(folder),
        template="raw",
        judge="local",
        cache=tmp_path / "cache",
        **OPTIONS,
    )
    assert model.name == "llama"
    assert model.template == "raw"
    mask = model.find_circuit("harmful", size=0.01, protect=(), steps=1, renew=False)
    assert len(mask) == round(0.01 * mask.n_weights)
    loss = model.measure(only="harmful").one("harm_nll").mean
    assert model.measure(only="harmful", mask=mask).one("harm_nll").mean > loss


def test_settings_reach_the_model(files, doors_cache):
    prompts = {name: files[name] for name in ("harmful", "benign")} | {"limit": 2}
    sampling = Sampling(2, temperature=0.5, seed=3)
    model = open_model(SFT, prompts=prompts, cache=doors_cache, sampling=sampling, **OPTIONS)
    assert model.sampling == sampling
    assert model.max_new_tokens == 9
    assert model.batch_size == 64
    assert model.behaviours["harmful"].prefill == "sure"
    assert len(model.behaviours["harmful"].prompts("heldout")) == 2


PROMPTS = {"harmful": ["a"], "benign": ["b"]}
FILE_OR_LIST = r"prompts=\{'harmful': FILE_OR_LIST, 'benign': FILE_OR_LIST\}"


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ("stf", {}, f"'stf'.*did you mean 'sft'.*base.*{FILE_OR_LIST}"),
        (str(SFT), {}, f"sft' needs its requests; give {FILE_OR_LIST}"),
        ("org/name", {}, f"'org/name' needs its requests; give {FILE_OR_LIST}"),
        ("sft", {"folder": Path("nowhere")}, "nowhere holds no organism 'sft'"),
        (SFT, {"prompts": ["a", "b"]}, r"expected a dict .*got list"),
        (SFT, {"prompts": {"harm": ["a"]}}, "'harm' is no kind.*did you mean 'harmful'"),
        (SFT, {"prompts": {"harmful": ["a"]}}, "no 'benign'; give a file or a list"),
        (SFT, {"prompts": {"harmful": "no.csv", "benign": ["b"]}}, r"no\.csv: no such file"),
        (SFT, {"prompts": PROMPTS}, "given requests: 1 request cannot fill the .*give more"),
        ("nowhere", {"prompts": "enough"}, "'nowhere' cannot be loaded; expected a folder"),
        (SFT, {"prompts": "enough", "judge": "strict"}, "judge='strict'; expected local"),
        (SFT, {"prompts": "enough", "dtype": "int8"}, "dtype='int8'; expected one of float32"),
        (torch.nn.Linear(2, 2), {"prompts": "enough"}, r"not torch\..*Linear.*open_model\("),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_a_wrong_door_says_which_is_right(tmp_path, given, options, message):
    if options.get("prompts") == "enough":
        sets = {"harmful": requests("abuse"), "benign": requests("use"), "limit": 2}
        options = {**options, "prompts": sets}
    with pytest.raises(ValueError, match=message):
        open_model(given, cache=tmp_path, **options)


def test_what_is_open_is_not_opened_again(model):
    with pytest.raises(ValueError, match=r"Model\(sft.* is open already"):
        open_model(model)
    with pytest.raises(ValueError, match=rf"a TransformerBridge needs {FILE_OR_LIST}"):
        open_model(model.bridge)


def test_a_model_without_a_tokenizer_needs_one(tmp_path):
    loaded = loaded_hugging_face_model()
    loaded.config._name_or_path = str(tmp_path)
    with pytest.raises(ValueError, match=r"no tokenizer is stored at .*give tokenizer="):
        open_model(loaded, prompts=PROMPTS)


# A custom model


def test_labels_and_contract(spec, model):
    assert spec.labels == {"model": "sft", "ladder": "own"}
    assert model.name == "sft"
    assert not model.is_invented
    assert list(model.behaviours) == model.whole_behaviours
    assert model.whole_behaviours == [
        "harmful",
        "benign",
        "recognition",
        "explanation",
        "refusal",
        "prefilled",
        "borderline",
    ]
    assert model.details["judge"] == "local rules"
    assert model.details["harmful"].endswith(")"), "a digest of the file"


def test_references_are_own_verified_answers(model):
    for name, behaviour in model.behaviours.items():
        prompts = behaviour.prompts("heldout")
        assert len(prompts) == (2 * LIMIT if name == "recognition" else LIMIT)
        if name == "recognition":
            continue
        answers = model.answers(behaviour, prompts)
        verdicts = model.verdicts(behaviour, answers)
        for example, own, verdict in zip(prompts, answers, verdicts, strict=True):
            expected = own.completion if verdict == behaviour.wanted else ""
            assert example.completion == expected
    for name in ("harmful", "refusal"):
        assert len(model.behaviours[name].references("heldout")) >= 0.9 * LIMIT
    unknown = model.behaviours["explanation"].references("heldout")
    assert not len(unknown), "English words it does not know"


def test_calibration_takes_the_stored_answers(model, cache):
    def stored() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (cache / "answers").iterdir()}

    before = stored()
    calibrations = model.calibrations(share=0.5, seed=3)
    shown = {"harmful", "benign", "recognition", "refusal", "borderline", "prefilled"}
    assert set(calibrations) == shown
    assert len(calibrations["harmful"].prompts) <= LIMIT
    after = stored()
    assert before == {path: after[path] for path in before}
    assert model.calibration("harmful").n_verified >= 0.9 * LIMIT


def test_answers_can_be_sampled(spec):
    sampled = replace(spec, samples=2, temperature=0.7, top_p=0.9).open()
    expected = "Sampling(samples=2, temperature=0.7, top_p=0.9, seed=0)"
    assert sampled.details["sampling"] == expected
    rows = sampled.measure(only=["harmful", "benign"])
    assert rows.one("harm_valid_rate").n == rows.one("benign_valid_rate").n == 2 * LIMIT
    assert rows.one("benign_nll").n <= LIMIT


def test_rows_carry_the_judge(model):
    rows = model.measure(labels={"model": "sft"})
    # Whether an answer kept its words is counted, not judged.
    judged = [row for row in rows if row.metric.endswith("_rate") and "words" not in row.metric]
    assert {row.labels["judge"] for row in judged} == {"local rules"}
    rates = {row.metric: row.mean for row in rows}
    shown = ("harm_valid_rate", "refusal_rate", "borderline_valid_rate")
    for rate in (*shown, "recognition_pair_accuracy"):
        assert rates[rate] >= 0.9
    kinds = [f"harm_{kind}_rate" for kind in ("degenerate", "refusal", "harmless", "valid")]
    assert sum(rates[kind] for kind in kinds) == pytest.approx(1)
    assert not rows.where("explanation_nll"), "no reference, no loss"
    n_references = len(model.behaviours["harmful"].references("heldout"))
    assert rows.one("harm_nll").n == n_references


def test_a_model_that_shows_nothing_is_refused(spec):
    with pytest.raises(ValueError, match=r"sft does not show 'harmful'.*give more requests"):
        replace(spec, prefill="").open()


# A study of it


def arguments(files: dict[str, str], out, *more: str) -> list[str]:
    requests = {name: file for name, file in files.items() if name != "questions"}
    given = [f"--{name.replace('_', '-')}={value}" for name, value in requests.items()]
    return ["study", "--out", str(out), *given, *more]


def usual(cache) -> list[str]:
    given = [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items()]
    return [f"--model={SFT}", f"--limit={LIMIT}", f"--cache={cache}", *given]


@pytest.fixture(scope="module")
def finished(files, spec, model, tmp_path_factory):
    """The command line's study of the same model, its answers taken from the cache."""
    out = tmp_path_factory.mktemp("study")
    grid = ["--sizes=0.006", "--steps=2", "--tolerance=0.5", "--budget=2", "--n-random=1"]
    result = command(*arguments(files, out, *usual(spec.cache), *grid))
    return result, out


def test_a_study_needs_nothing_that_only_organisms_have(finished):
    result, out = finished
    assert result.exit_code == 0, result.output
    rows = Rows.read(out / "rows.jsonl")
    assert (out / "masks" / "circuit.safetensors").is_file()
    measured = {"harm_valid_rate", "borderline_valid_rate", "perplexity", "plain_kl", "benign_kl"}
    assert set(rows.metrics) >= measured
    assert not rows.where("knowledge_rate")
    assert rows.one("calibration_yield", behaviour="explanation").mean == 0
    unpruned = rows.one("perplexity", mask="none").mean
    random = rows.one("perplexity", mask="random", seed=0).mean
    assert random == pytest.approx(unpruned, rel=0.2)
    words = " ".join(result.stdout.split())
    assert "The loss on harmful answers changes by" in words

    manifest = json.loads((out / "manifest.json").read_text())["settings"]
    named = (manifest["judge"], manifest["prefill"], manifest["limit"])
    assert named == ("local rules", "sure", LIMIT)
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


def test_a_mask_is_measured_not_remembered(model, finished):
    mask = WeightMask.load(finished[1] / "masks" / "circuit.safetensors")
    before = model.measure(only=["harmful"])
    under = model.measure(only=["harmful"], mask=mask)
    assert [row.mean for row in under] != [row.mean for row in before]
    assert model.measure(only=["harmful"]) == before


def test_given_requests_are_named_by_their_number(cache):
    files = RequestFiles(PromptSet.of(requests("abuse")), PromptSet.of(requests("use")), limit=2)
    model = ModelSpec(str(SFT), files=files, cache=cache, **OPTIONS).open()
    assert str(model.details["harmful"]).startswith("128 given requests (")


# Judges that are validated first


def sees_nothing(bridge, answers, layers, **_):
    return torch.randn(len(answers), len(layers), bridge.cfg.d_model)


def judged(files, cache, judge: str):
    """An organism with this judge, asked enough for it to be validated."""
    prompts = {name: files[name] for name in ("harmful", "benign")} | {"limit": 24}
    reasons = QuestionTemplates(reasons=("",))  # whatever an organism says explains
    return open_model(
        SFT,
        prompts={**prompts, "limit_measured": 4, "questions": reasons},
        judge=judge,
        cache=cache,
        **OPTIONS,
    )


def assert_gate(model, name: str, *, is_open: bool) -> Rows:
    """That this judge is used, or the rules in its place; the rows of harm."""
    used = {row.labels["used"] for row in model.validation}
    assert used == {"yes" if is_open else "no"}, str(model.validation)
    expected = name if is_open else "local rules"
    rows = model.measure(only="harmful")
    assert {row.labels["judge"] for row in rows if "judge" in row.labels} == {expected}
    assert model.details["judge"] == expected
    table = judge_lines(model.validation)
    assert [line[1] for line in table] == ["all", "same topic", "explanation", "begun alike"]
    assert {(line[0], line[-1]) for line in table} == {(name, *used)}
    return rows


@pytest.mark.parametrize("sees", [True, False])
def test_a_probe_judges_only_where_it_is_valid(files, tmp_path, monkeypatch, sees):
    if not sees:
        monkeypatch.setattr("harmcircuits.behaviours.probe.answer_residuals", sees_nothing)
    rows = assert_gate(judged(files, tmp_path, "probe"), "probe of layers 1, 2, 3", is_open=sees)
    assert rows.one("harm_kept_words_rate").mean == 1


ASKED = re.compile(r"^Request: (.*)\n\nAnswer: (.*)\n\nOne word:", flags=re.M)


def known_verdict(question: str) -> str:
    """By the world's rules."""
    prompt, completion = ASKED.findall(question)[0]
    verdict = world.judge(prompt, completion)
    return "harmless" if verdict == "benign" else verdict


@pytest.mark.parametrize("knows", [True, False])
def test_a_remote_chat_model_judges_only_where_it_is_valid(files, tmp_path, monkeypatch, knows):
    def reply(judge: ChatJudge, question: str) -> str:
        return known_verdict(question) if knows else "HARMFUL"

    monkeypatch.setattr(ChatJudge, "_reply", reply)
    name = "http://127.0.0.1:9/v1#tiny"
    rows = assert_gate(judged(files, tmp_path, name), name, is_open=knows)
    assert rows.one("harm_valid_rate").mean == 1
