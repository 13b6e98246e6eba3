"""Request files as behaviours: pairs, questions and kinds, on texts that ask for nothing.

Would catch: pairs that do not belong together or stand in the wrong order, a request that is
harmful and benign, a behaviour that is asked something else, a source that is silently left out.
"""

import csv
import json
import pickle

import pytest

from harmcircuits.behaviours.files import (
    RequestFiles,
    nearest_pairs,
    request_behaviours,
    request_pairs,
)
from harmcircuits.behaviours.judges import QuestionTemplates
from harmcircuits.prompts import SPLITS, Example, PromptSet


def things(verb: str) -> list[dict[str, str]]:
    rows = []
    for n in range(60):
        row = {"prompt": f"{verb} thing {n}", "category": "ab"[n % 2], "group": f"{verb}{n}"}
        rows.append(row)
    return rows


def labelled_pairs() -> list[dict[str, str]]:
    rows = []
    for n in range(40):
        for verb, label in (("ruin", "unsafe"), ("kill process", "safe")):
            where = {"group": str(n), "category": "c", "label": label}
            rows.append({"prompt": f"{verb} it {n}", **where})
    return rows


@pytest.fixture
def files(tmp_path) -> RequestFiles:
    """Files in all three formats, with categories, groups and labels."""
    (tmp_path / "bad.jsonl").write_text("\n".join(map(json.dumps, things("break"))))
    with (tmp_path / "good.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "category", "group"])
        writer.writeheader()
        writer.writerows(things("mend"))
    folder = tmp_path / "pairs"
    folder.mkdir()
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, labelled_pairs())))
    harmful, benign = str(tmp_path / "bad.jsonl"), str(tmp_path / "good.csv")
    return RequestFiles(harmful, benign, pairs=str(folder), borderline=str(folder))


# Sources


def test_sources_from_a_dict(tmp_path):
    file = tmp_path / "bad.jsonl"
    files = RequestFiles.of({"harmful": file, "benign": ["mend it", "mend them"], "limit": 3})
    assert files.harmful == str(file)
    assert files.benign == PromptSet.of(["mend it", "mend them"])
    assert files.sources == {"harmful": str(file), "benign": "2 given requests"}
    assert RequestFiles.of(files) is files


def test_limits_are_for_each_split():
    files = RequestFiles("a", "b", limit=7)
    assert files.limits == {"calibration": 7, "choice": 7, "heldout": 7}
    files = RequestFiles("a", "b", limit_measured=7)
    assert files.limits == {"calibration": 0, "choice": 7, "heldout": 7}


def test_columns_are_of_all_files_or_of_one(tmp_path):
    (tmp_path / "bad.csv").write_text("ask,theme\nbreak it,x\n")
    (tmp_path / "good.csv").write_text("ask,kind\nmend it,y\n")
    columns = {"harmful.category": "theme", "benign.category": "kind", "prompt": "ask"}
    paths = {"harmful": tmp_path / "bad.csv", "benign": str(tmp_path / "good.csv")}
    files = RequestFiles.of({**paths, "columns": columns})
    assert files.requests("harmful").examples == (Example("break it", category="x"),)
    assert files.requests("benign").examples == (Example("mend it", category="y"),)
    rows = RequestFiles.of({**paths, "benign": [{"ask": "mend it"}], "columns": {"prompt": "ask"}})
    assert rows.requests("benign") == PromptSet.of(["mend it"])
    assert pickle.loads(pickle.dumps(files)) == files


def test_every_file_says_how_it_was_read(files):
    lines = files.shapes
    assert [line.split(":")[0] for line in lines] == ["harmful", "benign", "pairs", "borderline"]
    assert "60 requests" in lines[0] and "bad.jsonl" in lines[0]
    assert RequestFiles(PromptSet.of(["a"]), PromptSet.of(["b"])).shapes == []


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"harm": "a", "benign": "b"}, "'harm'"),
        ({"harmful": "a"}, "'benign'"),
        ({"benign": "a"}, "'harmful'"),
        ({"harmful": [], "benign": "b"}, "no requests"),
        (["a", "b"], "list"),
        ({"limit": -1}, "limit=-1"),
        ({"columns": {"harm.prompt": "ask"}}, "'harmful'"),
        ({"questions": {"recognition": "ok ?"}}, "{request}"),
    ],
)
def test_a_slip_is_refused(given, word):
    with pytest.raises(ValueError) as error:
        RequestFiles.of(given)
    assert word in str(error.value)


def test_questions_from_a_dict():
    files = RequestFiles.of({"questions": {"recognition": "ok to {request} ?", "yes": ["fine"]}})
    assert files.questions == QuestionTemplates(recognition="ok to {request} ?", yes=("fine",))


# Pairs


def test_pairs_by_group_and_by_category():
    requests = (
        Example("bad one", group="g", label="unsafe"),
        Example("good two", category="x", label="safe"),
        Example("good one", group="g", label="safe"),
        Example("bad two", category="contrast_x", label="harmful"),
        Example("good three", category="x", label="harmless"),
        Example("alone", category="y", label="safe"),
    )
    pairs = request_pairs(PromptSet(requests))
    texts = [(bad.prompt, good.prompt) for bad, good in pairs]
    assert texts == [("bad one", "good one"), ("bad two", "good two")]
    for odd in (Example("a", label="maybe"), requests[-1]):
        with pytest.raises(ValueError, match="f: "):
            request_pairs(PromptSet((odd,)), "f")


def test_nearest_pairs_use_each_once():
    bad = PromptSet.of(["12345", "123456", "1"])
    good = PromptSet.of(["abcdef", "ab", "abcdefgh"])
    pairs = [(first.prompt, second.prompt) for first, second in nearest_pairs(bad, good)]
    assert pairs == [("12345", "abcdef"), ("123456", "abcdefgh"), ("1", "ab")]
    assert len(nearest_pairs(bad, good[:1])) == 1


# Behaviours


def test_behaviours_and_what_their_prompts_are(files):
    behaviours, kinds = request_behaviours(files, prefill="Well,")
    prefills = {name: behaviour.prefill for name, behaviour in behaviours.items()}
    asked = ("harmful", "benign", "recognition", "explanation", "refusal", "prefilled")
    begun = {name: "Well," if name in ("harmful", "prefilled") else "" for name in asked}
    assert prefills == {**begun, "borderline": ""}
    counted = set(behaviours["harmful"].metrics)
    assert {"refusal", "harmless", "degenerate", "kept words", "doubted"} <= counted
    for split in SPLITS:
        harmful = behaviours["harmful"].prompts(split)
        assert behaviours["refusal"].prompts(split) == harmful
        assert not any(example.completion for example in harmful)

        explained = behaviours["explanation"].prompts(split)
        assert [example.group for example in explained] == [example.group for example in harmful]
        for question, request in zip(explained, harmful, strict=True):
            assert request.prompt in question.prompt

        questions = behaviours["recognition"].prompts(split).examples
        for bad, good in zip(questions[::2], questions[1::2], strict=True):
            assert (bad.completion, good.completion) == ("No", "Yes")
            assert bad.group == good.group
            assert f"ruin it {bad.group}" in bad.prompt
            assert f"kill process it {good.group}" in good.prompt
        assert all(example.label == "safe" for example in behaviours["borderline"].prompts(split))

        for behaviour in behaviours.values():
            assert {example.prompt for example in behaviour.prompts(split)} <= kinds.keys()


def test_a_type_of_harm_is_a_behaviour(files):
    behaviours, _ = request_behaviours(files, prefill="")
    parts = behaviours["harmful"].by_category()
    assert list(parts) == ["harmful/a", "harmful/b"]
    part = parts["harmful/a"]
    assert {example.category for example in part.prompts("heldout")} == {"a"}
    assert (part.title, part.part_of) == ("harmful/a", "harmful")
    n_whole = len(behaviours["harmful"].prompts("heldout"))
    assert sum(len(each.prompts("heldout")) for each in parts.values()) == n_whole


def test_without_pairs_harmful_requests_meet_benign_ones(files):
    plain = RequestFiles(files.harmful, files.benign)
    behaviours, _ = request_behaviours(plain, prefill="")
    assert not {"borderline", "prefilled"} & behaviours.keys()
    questions = behaviours["recognition"].prompts("heldout").examples
    assert questions
    for bad, good in zip(questions[::2], questions[1::2], strict=True):
        assert "break" in bad.prompt
        assert "mend" in good.prompt


@pytest.mark.parametrize("also", ["break thing 3", "Break thing 3?"])
def test_a_request_cannot_be_harmful_and_benign(files, also):
    benign = PromptSet.of([*(row["prompt"] for row in things("mend")), also])
    with pytest.raises(ValueError, match=r"1 request of .*bad\.jsonl"):
        request_behaviours(RequestFiles(files.harmful, benign), prefill="")
