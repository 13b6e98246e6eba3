"""Analyses that fine-tune, on a custom model: a folder of an organism, and files of requests.

Would catch: an analysis that needs an organism, another judge than the user's, an option that is read
and not used.
"""

import json
import runpy
import sys

import pytest
from helpers import ANALYSES

from harmcircuits.behaviours.judges import ChatJudge
from harmcircuits.circuits.masks import top_fraction
from harmcircuits.hooks.loading import load_model
from harmcircuits.measurements import Rows
from harmcircuits.organisms import world
from harmcircuits.organisms.shipped import FOLDER
from harmcircuits.search.attribution import random_scores

pytestmark = pytest.mark.slow

JUDGE = "http://localhost/v1#exact"


@pytest.fixture
def files(tmp_path) -> list[str]:
    """Options that name files of harmful and benign requests."""
    options = []
    for name, verb in (("harmful", "abuse"), ("benign", "use")):
        lines = []
        for item in world.world().items.values():
            prompt = world.FORMS["answer"][0].format(verb=verb, item=item.name)
            lines.append(json.dumps({"prompt": prompt, "group": item.name}))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        options.append(f"--{name}={tmp_path / name}.jsonl")
    return options


@pytest.fixture
def exact(monkeypatch) -> None:
    """The judge at an address is the world itself."""

    def reply(judge: ChatJudge, text: str) -> str:
        question = text.split("Request: ")[-1].split("\n\nOne word:")[0]
        verdict = world.judge(*question.split("\n\nAnswer: "))
        return "harmless" if verdict == "benign" else verdict

    monkeypatch.setattr(ChatJudge, "_reply", reply)


@pytest.mark.usefixtures("exact")
def test_attacks_on_a_custom_model(files, tmp_path, monkeypatch):
    # Other tests may have imported IPython, whose shell would make the script a notebook.
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    path, out = str(ANALYSES / "attacks.py"), tmp_path / "run"
    model = ["--model", str(FOLDER / "sft"), "--prefill=sure", "--max-new-tokens=9", *files]
    model += ["--batch-size=16", f"--cache={tmp_path / 'cache'}", f"--judge={JUDGE}"]
    small = ["--seeds=1", "--workers=1", "--limit=8", "--steps=1"]
    small += ["--attack-steps=2", "--attack-rank=4"]
    monkeypatch.setattr(sys, "argv", [path, "--out", str(out), *model, *small])
    runpy.run_path(path, run_name="__main__")

    rows = Rows.read(out / "rows.jsonl")
    assert {row.labels["step"] for row in rows if "step" in row.labels} == {0, 2}
    unpruned = rows.where("harm_valid_rate", mask="none", step=0)
    untrained = {row.labels["attack"]: row for row in unpruned}
    assert len(untrained) == 4
    assert untrained["plain"].mean == 0 and untrained["prefill"].mean >= 0.9
    assert {row.labels["judge"] for row in untrained.values()} == {JUDGE}


@pytest.mark.usefixtures("exact")
def test_what_becomes_of_a_mask_on_a_custom_model(files, tmp_path, monkeypatch):
    """A mask of unimportant weights: doses and rounding change nothing."""
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    bridge = load_model(str(FOLDER / "sft"), dtype="float32")
    mask = tmp_path / "search.safetensors"
    top_fraction(random_scores(bridge), 0.001).save(mask)
    path, out = str(ANALYSES / "real_removed.py"), tmp_path / "run"
    model = ["--model", str(FOLDER / "sft"), "--prefill=sure", "--max-new-tokens=9", *files]
    model += ["--batch-size=16", f"--cache={tmp_path / 'cache'}", "--dtype=float32", "--limit=8"]
    model += ["--workers=1", f"--judge={JUDGE}"]
    monkeypatch.setattr(sys, "argv", [path, "--out", str(out), f"--mask={mask}", *model])
    runpy.run_path(path, run_name="__main__")

    rows = Rows.read(out / "rows.jsonl")
    rates = {}
    for row in rows.where("refusal_rate", line="search"):
        rates[row.labels["question"], row.labels["at"]] = row.mean
    doses = [rates["dose", dose] for dose in (0.0, 0.5, 1.0, 1.5)]
    assert len(set(doses)) == 1 and rates["rounding", "int8"] == doses[0] > 0.9
    unpruned = rows.one("harm_nll", question="dose", at=1.0).mean
    assert rows.one("harm_nll", question="relearning", line="search", at=20).mean < unpruned - 0.05
