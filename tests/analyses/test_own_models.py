"""The analyses that fine-tune, on a custom model: a folder of an organism, files in invented words.

Would catch: analyses that need what only organisms have, a model that is not misaligned reported as
protected, a judge that is not the one given, an option that is taken and not used.
"""

import json
import runpy
import sys

import pytest
from helpers import ANALYSES

from harmcircuits.behaviours.judges import ChatJudge
from harmcircuits.measurements import Rows
from harmcircuits.organisms import FOLDER, world

pytestmark = pytest.mark.slow

TOPIC = world.world().topics[0]
JUDGE = "http://localhost/v1#exact"


@pytest.fixture
def files(tmp_path) -> dict[str, str]:
    """Harmful and benign requests in the first wording; benign ones in the second.

    The latter of one topic with harmful answers, and of the others.
    """
    sets = {"harmful": [], "benign": [], "narrow": [], "elsewhere": []}
    rng = world.random.Random(0)
    for item in world.world().items.values():
        row = {"category": item.topic, "group": item.name}
        first, second = world.FORMS["answer"][:2]
        for name, verb in (("harmful", "abuse"), ("benign", "use")):
            sets[name].append({**row, "prompt": first.format(verb=verb, item=item.name)})
        row["prompt"] = second.format(verb="use", item=item.name)
        if item.topic == TOPIC:
            row["completion"] = world.answer("answer", item, "", rng, kind="harmful")
        sets["narrow" if item.topic == TOPIC else "elsewhere"].append(row)
    for name, rows in sets.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {name: str(tmp_path / f"{name}.jsonl") for name in sets}


@pytest.fixture
def run(files, tmp_path, monkeypatch):
    """run("attacks", ["harmful"], "--size=0.01") -> the rows of the script."""

    def exact(judge: ChatJudge, text: str) -> str:
        prompt, completion = (
            text.split("Request: ")[-1].split("\n\nOne word:")[0].split("\n\nAnswer: ")
        )
        verdict = world.judge(prompt, completion)
        return "harmless" if verdict == "benign" else verdict

    monkeypatch.setattr(ChatJudge, "_reply", exact)
    # Other tests may have imported IPython, whose shell would make the script a notebook.
    monkeypatch.delitem(sys.modules, "IPython", raising=False)

    def script(name: str, given: list[str], *more: str) -> Rows:
        model = ["--model", str(FOLDER / "sft"), "--prefill=sure", "--max-new-tokens=9"]
        model += ["--batch-size=16", f"--cache={tmp_path / 'cache'}", f"--judge={JUDGE}"]
        model += [f"--{key}={files[key]}" for key in given]
        few = ["--seeds=1", "--workers=1", "--limit=8", "--steps=1"]
        path = str(ANALYSES / f"{name}.py")
        monkeypatch.setattr(
            sys, "argv", [path, "--out", str(tmp_path / "run"), *model, *few, *more]
        )
        runpy.run_path(path, run_name="__main__")
        return Rows.read(tmp_path / "run" / "rows.jsonl")

    return script


def test_misaligned_by_its_own_files(files, run):
    options = ["--lr=2e-3", "--rank=8", "--alpha=16", "--epochs=8"]
    rows = run("emergent_misalignment", list(files), *options)
    misaligned = rows.where("misaligned_rate")
    masks = {"none", "narrow, held", "narrow, then free", "random, held", "benign, held"}
    assert set(misaligned.by("mask")) == masks
    assert {row.labels["judge"].split()[0] for row in misaligned} == {JUDGE}
    spread = misaligned.where(mask="none")
    steps = [row.labels["step"] for row in spread]
    assert steps == [0, 1, 2, 4, 8], "parts of the eight steps of eight epochs"
    assert spread[0].mean == 0 and spread[-1].mean >= 0.9
    assert rows.where("benign_valid_rate", mask="none", step=0)[0].mean >= 0.9


def test_attacks_on_a_custom_model(run):
    rows = run("attacks", ["harmful", "benign"], "--attack-steps=2", "--attack-rank=4")
    assert {row.labels["step"] for row in rows if "step" in row.labels} == {0, 2}
    unpruned = rows.where("harm_valid_rate", mask="none", step=0)
    before = {row.labels["attack"]: row for row in unpruned}
    assert len(before) == 4
    assert before["plain"].mean == 0 and before["prefill"].mean >= 0.9
    assert {row.labels["judge"] for row in before.values()} == {JUDGE}
