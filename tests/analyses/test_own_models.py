"""An analysis that fine-tunes, on a custom model: a folder of an organism, and files of requests.

Would catch: an analysis that needs what only organisms have, a judge that is not the one given, an
option that is taken and not used.
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


def test_attacks_on_a_custom_model(files, tmp_path, monkeypatch):
    def exact(judge: ChatJudge, text: str) -> str:
        asked = text.split("Request: ")[-1].split("\n\nOne word:")[0]
        verdict = world.judge(*asked.split("\n\nAnswer: "))
        return "harmless" if verdict == "benign" else verdict

    monkeypatch.setattr(ChatJudge, "_reply", exact)
    # Other tests may have imported IPython, whose shell would make the script a notebook.
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    path, out = str(ANALYSES / "attacks.py"), tmp_path / "run"
    model = ["--model", str(FOLDER / "sft"), "--prefill=sure", "--max-new-tokens=9", *files]
    model += ["--batch-size=16", f"--cache={tmp_path / 'cache'}", f"--judge={JUDGE}"]
    few = ["--seeds=1", "--workers=1", "--limit=8", "--steps=1"]
    few += ["--attack-steps=2", "--attack-rank=4"]
    monkeypatch.setattr(sys, "argv", [path, "--out", str(out), *model, *few])
    runpy.run_path(path, run_name="__main__")

    rows = Rows.read(out / "rows.jsonl")
    assert {row.labels["step"] for row in rows if "step" in row.labels} == {0, 2}
    unpruned = rows.where("harm_valid_rate", mask="none", step=0)
    before = {row.labels["attack"]: row for row in unpruned}
    assert len(before) == 4
    assert before["plain"].mean == 0 and before["prefill"].mean >= 0.9
    assert {row.labels["judge"] for row in before.values()} == {JUDGE}
