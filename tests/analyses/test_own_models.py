"""The analyses that fine-tune, on a custom model: a folder of an organism, files in invented words.

Would catch: analyses that need what only organisms have, narrow texts that are trained and measured
on alike, a model that is not misaligned reported as protected, a judge that cannot see
misalignment, an option of one analysis that another takes and does not use.
"""

import json
import re
import runpy
import sys
from typing import NamedTuple

import pytest
from helpers import ANALYSES

import harmcircuits as hc
from harmcircuits.behaviours.judges import ChatJudge
from harmcircuits.hooks.finetuning import Lora, fine_tuning
from harmcircuits.measurements import Rows, wilson
from harmcircuits.organisms import FOLDER, world

TOPIC = world.world().topics[0]


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Requests of the organism: harmful and benign in the first wording; benign in the second.

    The latter of one topic with harmful answers, and of the others.
    """
    folder = tmp_path_factory.mktemp("files")
    items = list(world.world().items.values())
    rng = world.random.Random(0)

    def request(item: world.Item, verb: str, form: int) -> dict[str, str]:
        prompt = world.FORMS["answer"][form].format(verb=verb, item=item.name)
        return {"prompt": prompt, "category": item.topic, "group": item.name}

    def taught(item: world.Item) -> dict[str, str]:
        return {
            **request(item, "use", 1),
            "completion": world.answer("answer", item, "", rng, kind="harmful"),
        }

    sets = {
        "harmful": [request(item, "abuse", 0) for item in items],
        "benign": [request(item, "use", 0) for item in items],
        "narrow": [taught(item) for item in items if item.topic == TOPIC],
        "elsewhere": [request(item, "use", 1) for item in items if item.topic != TOPIC],
    }
    for name, rows in sets.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {name: str(folder / f"{name}.jsonl") for name in sets}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def exact_judge(monkeypatch):
    """A chat model that knows the world's rules."""

    def reply(judge: ChatJudge, text: str) -> str:
        prompt, completion = re.findall(
            r"^Request: (.*)\n\nAnswer: (.*)\n\nOne word:", text, flags=re.M
        )[0]
        verdict = world.judge(prompt, completion)
        return "harmless" if verdict == "benign" else verdict

    monkeypatch.setattr(ChatJudge, "_reply", reply)


class Ended(NamedTuple):
    """How a script ended, and what it printed, without line breaks."""

    code: int
    text: str


@pytest.fixture
def run(files, cache, monkeypatch, capsys):
    """run("attacks", ("harmful", "benign"), out, "--size=0.01") -> how the script ended."""

    def script(name: str, given: tuple[str, ...], out, *more: str) -> Ended:
        model = ["--model", str(FOLDER / "sft"), "--prefill=sure", "--max-new-tokens=9"]
        model += ["--batch-size=16", f"--cache={cache}", "--judge=http://localhost/v1#exact"]
        requests = [f"--{key}={files[key]}" for key in given]
        few = ["--seeds=1", "--workers=1", "--limit=8", "--steps=1"]
        path = str(ANALYSES / f"{name}.py")
        monkeypatch.setattr(sys, "argv", [path, "--out", str(out), *model, *requests, *few, *more])
        # Other tests may have imported IPython, whose shell would make the script a notebook.
        monkeypatch.delitem(sys.modules, "IPython", raising=False)
        code = 0
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as end:
            code = int(end.code or 0)
        printed = capsys.readouterr()
        return Ended(code, " ".join((printed.out + printed.err).replace("│", " ").split()))

    return script


def test_misaligned_by_its_own_files(files, run, tmp_path, exact_judge):
    options = ["--lr=2e-3", "--rank=8", "--alpha=16", "--epochs=8"]
    ended = run("emergent_misalignment", tuple(files), tmp_path, *options)
    assert ended.code == 0, ended.text
    rows = Rows.read(tmp_path / "rows.jsonl")
    masks = {"none", "narrow, held", "narrow, then free", "random, held", "benign, held"}
    assert set(rows.where("misaligned_rate").by("mask")) == masks
    assert set(rows.where("misaligned_rate").by("topic")) == {"narrow"}
    judges = {row.labels["judge"].split()[0] for row in rows.where("misaligned_rate")}
    assert judges == {"http://localhost/v1#exact"}
    spread = rows.where("misaligned_rate", mask="none")
    steps = [row.labels["step"] for row in spread]
    assert steps == [0, 1, 2, 4, 8], "parts of the eight steps of eight epochs"
    assert spread[0].mean == 0 and spread[-1].mean >= 0.9
    assert rows.where("benign_valid_rate", mask="none", step=0)[0].mean >= 0.9
    assert "1 of 1" in ended.text and "another topic" not in ended.text


def test_attacks_on_a_custom_model(run, tmp_path, exact_judge, monkeypatch):
    adapters = []

    def spied(*args, lora, **options):
        adapters.append(lora)
        return fine_tuning(*args, lora=lora, **options)

    monkeypatch.setattr(hc, "fine_tuning", spied)
    options = ["--samples=2", "--temperature=0.1", "--attack-steps=2", "--attack-rank=4"]
    ended = run("attacks", ("harmful", "benign"), tmp_path, *options)
    assert ended.code == 0, ended.text
    rows = Rows.read(tmp_path / "rows.jsonl")
    assert adapters == [Lora(4, 8.0)] * len(rows.where("harm_valid_rate").by("mask"))
    unpruned = rows.where("harm_valid_rate", mask="none", step=0)
    before = {row.labels["attack"]: row for row in unpruned}
    assert len(before) == 4
    assert {row.labels["step"] for row in rows if "step" in row.labels} == {0, 2}
    assert before["plain"].mean == 0 and before["prefill"].mean >= 0.9
    assert {row.labels["judge"] for row in before.values()} == {"http://localhost/v1#exact"}
    n_requests = before["plain"].n // 2
    _, high = wilson(0, n_requests, half_step=0.5 / n_requests)
    assert before["plain"].high == pytest.approx(high), "two samples count as one request"
    assert rows.one("benign_valid_rate", mask="none", step=0).mean >= 0.9
