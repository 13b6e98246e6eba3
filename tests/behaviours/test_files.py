"""Request files as behaviours: pairs, questions and kinds, on texts that ask for nothing.

Would catch: pairs that do not belong together or stand in the wrong order, a request that is harmful
and benign, a source that is silently left out.
"""

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


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> RequestFiles:
    """Requests with categories, groups and labels."""
    folder = tmp_path_factory.mktemp("files")
    rows = {"bad": things("break"), "good": things("mend"), "pairs": labelled_pairs()}
    paths = {}
    for name, of_name in rows.items():
        paths[name] = str(folder / f"{name}.jsonl")
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, of_name)))
    pairs = paths["pairs"]
    return RequestFiles(paths["bad"], paths["good"], pairs=pairs, borderline=pairs)


# Sources


def test_sources_from_a_dict(tmp_path):
    file = tmp_path / "bad.jsonl"
    questions = {"recognition": "ok to {request} ?", "yes": ["fine"]}
    given = {"harmful": file, "benign": ["mend it", "mend them"], "limit": 3}
    files = RequestFiles.of({**given, "questions": questions})
    assert files.benign == PromptSet.of(["mend it", "mend them"])
    assert files.sources == {"harmful": str(file), "benign": "2 given requests"}
    assert files.questions == QuestionTemplates(recognition="ok to {request} ?", yes=("fine",))
    assert files.limits == {"calibration": 3, "choice": 3, "heldout": 3}
    measured = RequestFiles.of({**given, "limit": 0, "limit_measured": 7})
    assert measured.limits == {"calibration": 0, "choice": 7, "heldout": 7}


def test_columns_are_of_all_files_or_of_one(tmp_path):
    (tmp_path / "bad.csv").write_text("ask,theme\nbreak it,x\n")
    columns = {"harmful.category": "theme", "benign.category": "kind", "prompt": "ask"}
    rows = [{"ask": "mend it", "kind": "y"}]
    given = {"harmful": tmp_path / "bad.csv", "benign": rows, "columns": columns}
    files = RequestFiles.of(given)
    assert files.requests("harmful").examples == (Example("break it", category="x"),)
    assert files.requests("benign").examples == (Example("mend it", category="y"),)
    (line,) = files.shapes[:1]
    assert line.startswith("harmful: ") and "bad.csv" in line and "1 request" in line
    assert pickle.loads(pickle.dumps(files)) == files


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"harmful": "a"}, "'benign'"),
        ({"harmful": [], "benign": "b"}, "'harmful'"),
        (["a", "b"], "list"),
        ({"columns": {"harm.prompt": "ask"}}, "'harmful'"),
        ({"questions": {"recognition": "ok ?"}}, "{request}"),
    ],
)
def test_a_slip_is_refused(given, word):
    with pytest.raises(ValueError) as error:
        RequestFiles.of(given)
    assert word in str(error.value)


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
    with pytest.raises(ValueError, match="f: "):
        request_pairs(PromptSet.of([Example("a", label="maybe")]), "f")


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
    questions = [example.prompt for example in behaviours["recognition"].prompts("heldout")]
    assert questions
    assert all("break" in bad for bad in questions[::2])
    assert all("mend" in good for good in questions[1::2])


def test_a_request_cannot_be_harmful_and_benign(files):
    benign = PromptSet.of([*(row["prompt"] for row in things("mend")), "Break thing 3?"])
    with pytest.raises(ValueError, match=r"1 request of .*bad\.jsonl"):
        request_behaviours(RequestFiles(files.harmful, benign), prefill="")
