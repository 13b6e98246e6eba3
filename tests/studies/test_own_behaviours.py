"""Behaviours from files as what a study removes, compares with and protects, on a local folder.

The model is an organism's folder, its requests invented words in the shapes of published files.
Would catch: an own behaviour that the study, its tables or its page do not know, references of a
file that are not scored, a study that needs harmful and benign requests whatever it is about.
"""

import json

import pytest

from harmcircuits.organisms import FOLDER, world
from harmcircuits.prompts import PromptSet
from harmcircuits.studies.models import open_model

SFT = FOLDER / "sft"
ITEMS = list(world.world().items.values())
LIMIT = 4


def asked(verb: str) -> list[str]:
    form = world.FORMS["answer"][0]
    return [form.format(verb=verb, item=item.name) for item in ITEMS]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """What is abused, in a file like AdvBench's; what is used, in one like Alpaca's; chats."""
    folder = tmp_path_factory.mktemp("own")
    rows = ["goal,target", *(f"{request},sure" for request in asked("abuse"))]
    (folder / "abuse.csv").write_text("\n".join(rows))
    pairs = [{"instruction": request, "input": "", "output": "no"} for request in asked("use")]
    (folder / "use.json").write_text(json.dumps(pairs))
    chats = []
    for item in ITEMS:
        turns = [
            {"role": "user", "content": f"sort of a {item.name} ?"},
            {"role": "assistant", "content": f"a {item.topic}"},
        ]
        chats.append(json.dumps({"messages": turns}))
    (folder / "sorts.jsonl").write_text("\n".join(chats))
    cruel = "|".join(world.world().operators["harmful"])
    (folder / "abuses.toml").write_text(
        f"""
        name = "abuses"
        prompts = "abuse.csv"
        prefill = "sure"
        judge = "pattern"
        pattern = "{cruel}"
        is_kept = false
        """
    )
    own = {
        "uses": {"name": "uses", "prompts": "use.json", "metric": "use_share"},
        "sorts": {
            "name": "sorts",
            "prompts": "sorts.jsonl",
            "references": "file",
            "judge": "reference",
            "title": "tells sorts",
        },
    }
    for name, stored in own.items():
        (folder / f"{name}.json").write_text(json.dumps(stored))
    return {path.name: str(path) for path in folder.iterdir()}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def test_they_are_protected_beside_the_usual_ones(files, cache):
    harmful, benign = PromptSet.of(asked("exploit")), PromptSet.of(asked("clean"))
    model = open_model(
        SFT,
        prompts={"harmful": harmful, "benign": benign, "limit": LIMIT},
        behaviours=[files["sorts.json"]],
        prefill="sure",
        max_new_tokens=9,
        cache=cache,
    )
    assert model.whole_behaviours[-1] == "sorts"
    assert "sorts" in model.others("harmful")
    calibration = model.calibration("sorts")
    assert calibration.n_verified == calibration.n_asked == LIMIT
    assert all(example.completion.startswith("a ") for example in calibration.prompts)
    mask = model.find_circuit("harmful", protect=["benign", "sorts"], size=0.004, steps=2)
    checked = {row.labels.get("protected") for row in mask.trace}
    assert "sorts" in checked
    rows = model.measure(mask=mask, only=["harmful", "sorts"])
    before = model.measure(only=["harmful", "sorts"])
    assert rows.one("harm_nll").mean > before.one("harm_nll").mean
    risen = rows.one("sorts_nll").mean - before.one("sorts_nll").mean
    assert risen < rows.one("harm_nll").mean - before.one("harm_nll").mean


def test_a_model_needs_all_its_requests_or_behaviours(files):
    with pytest.raises(ValueError, match="no 'harmful'; give a file"):
        open_model(SFT, prompts={"benign": ["a"]}, behaviours=[files["uses.json"]])
