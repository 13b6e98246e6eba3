"""Behaviours from files as what a study removes, compares with and protects, on a local folder.

The model is an organism's folder, its requests invented words in the shapes of published files.
Would catch: an own behaviour that the study, its tables or its page do not know, references of a
file that are not scored, a study that needs harmful and benign requests whatever it is about.
"""

import json

import pytest
from typer.testing import CliRunner

from harmcircuits.cli import app
from harmcircuits.measurements import Rows
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


@pytest.fixture(scope="module")
def finished(files, cache, tmp_path_factory):
    """A study of three behaviours from files, without harmful and benign requests."""
    out = tmp_path_factory.mktemp("study")
    own = [f"--behaviour={files[name]}" for name in ("abuses.toml", "uses.json", "sorts.json")]
    roles = ["--target=abuses", "--contrast=uses", "--protect=uses", "--protect=sorts"]
    model = [f"--model={SFT}", f"--cache={cache}", f"--limit={LIMIT}", "--max-new-tokens=9"]
    grid = ["--size=0.006", "--steps=2", "--tolerance=0.5", "--budget=2", "--n-random=1"]
    result = CliRunner().invoke(app, ["study", f"--out={out}", *own, *roles, *model, *grid])
    return result, out


def test_a_study_removes_and_protects_behaviours_from_files(finished):
    result, out = finished
    assert result.exit_code == 0, result.output
    rows = Rows.read(out / "rows.jsonl")
    unpruned = rows.where(mask="none", split="heldout")
    for metric in ("abuses_rate", "use_share", "sorts_rate"):
        assert unpruned.one(metric).mean >= 0.75
    assert unpruned.one("abuses_refusal_rate").mean == 0
    assert unpruned.one("sorts_nll").n == LIMIT, "scored on the references of its file"
    circuit = rows.where(mask="circuit", split="heldout", at="operating point", selection="search")
    assert circuit.one("abuses_nll").mean > unpruned.one("abuses_nll").mean
    assert circuit[0].labels["protected"] == "uses, sorts"
    assert {"uses_kl", "uses_nll"} <= set(rows.metrics)
    judges = {row.metric: row.labels.get("judge") for row in unpruned}
    assert (judges["abuses_rate"], judges["use_share"]) == ("pattern", "local rules")
    assert (out / "masks" / "uses_twin.safetensors").is_file()


def test_the_command_says_how_each_file_was_read(finished, files):
    result, _ = finished
    lines = [line for line in result.output.splitlines() if "request" in line]
    n = len(ITEMS)
    assert [line.split(": ", 1)[0] for line in lines[:3]] == ["abuses", "uses", "sorts"]
    assert (
        f"{files['abuse.csv']}: AdvBench: prompt from goal, completion from target; {n} "
        in lines[0]
    )
    assert "Alpaca: prompt from instruction + input, completion from output" in lines[1]
    assert "chat messages: prompt from messages" in lines[2]


def test_tables_and_page_speak_of_them(finished):
    result, out = finished
    assert "valid abuses answers" in result.output
    html = (out / "report.html").read_text(encoding="utf-8")
    for words in ("The weights behind abuses answers", "tells sorts", "uses twin", "uses NLL"):
        assert words in html
    settings = json.loads((out / "manifest.json").read_text())["settings"]
    assert {"behaviour abuses", "behaviour uses", "behaviour sorts"} <= set(settings)
    written = html + (out / "rows.jsonl").read_text() + (out / "manifest.json").read_text()
    assert not any(request in written for request in asked("abuse"))


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


def test_a_model_needs_all_its_requests_or_behaviours(files, tmp_path):
    arguments = ["study", f"--out={tmp_path / 'out'}", f"--model={SFT}"]
    for given, message in (
        ([f"--behaviour={files['uses.json']}", "--harmful=a.csv"], "give --harmful FILE and"),
        (
            [f"--behaviour={files['uses.json']}", "--max-new-tokens=9"],
            "has no behaviour 'harmful'; there are uses",
        ),
        # The answers may be as long as the whole context.
        ([f"--behaviour={files['uses.json']}"], "context is 64; shorten the request"),
        ([f"--behaviour={tmp_path}/no.json"], "no.json: no such file"),
        (
            ["--harmful=a", "--benign=b", "--column=prompt"],
            "--column 'prompt'; expected NAME=VALUE",
        ),
        (["--harmful=a", "--benign=b", "--column=harm.prompt=x"], "'harm.prompt' names no file"),
    ):
        result = CliRunner().invoke(app, [*arguments, f"--cache={tmp_path}", *given])
        assert result.exit_code == 2
        assert message in " ".join(result.output.split())
    for option in ("--column=prompt=goal", "--behaviour=a.json"):
        result = CliRunner().invoke(app, ["study", f"--out={tmp_path / 'out'}", option])
        assert f"{option.split('=')[0]} is for a custom model" in " ".join(result.output.split())
    with pytest.raises(ValueError, match="no 'harmful'; give a file"):
        open_model(SFT, prompts={"benign": ["a"]}, behaviours=[files["uses.json"]])
