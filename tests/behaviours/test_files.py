"""Request files as behaviours: pairs, questions and kinds, on texts that ask for nothing.

Would catch: pairs that do not belong together or stand in the wrong order, a request that is
harmful and benign, a behaviour that is asked something else, a source that is silently left out.
"""

import csv
import json

import pytest

from harmcircuits.behaviours.files import (
    RequestFiles,
    nearest_pairs,
    request_behaviours,
    request_pairs,
)
from harmcircuits.prompts import Example, PromptSet

SPLITS = ("calibration", "choice", "heldout")

# Sources


def test_sources_from_a_dict(tmp_path):
    file = tmp_path / "bad.jsonl"
    files = RequestFiles.of({"harmful": file, "benign": ["mend it", "mend them"], "limit": 3})
    assert files.harmful == str(file)
    assert files.benign == PromptSet.of(["mend it", "mend them"])
    assert files.limit == 3
    assert files.files == {"harmful": str(file), "benign": "2 given requests"}
    assert RequestFiles.of(files) is files


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"harm": "a", "benign": "b"}, "'harm' is no kind of requests.*'harmful'"),
        ({"harmful": "a"}, "no 'benign'; give a file or a list"),
        ({"harmful": [], "benign": "b"}, "no 'harmful'; give a file or a list"),
        (["a", "b"], "expected a dict .*'harmful': FILE.*got list"),
    ],
)
def test_dicts_that_lack_requests_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        RequestFiles.of(given)


def test_limits_are_for_each_split():
    files = RequestFiles("a", "b", limit=7)
    assert files.limits == {"calibration": 7, "choice": 7, "heldout": 7}
    files = RequestFiles("a", "b", limit_measured=7)
    assert files.limits == {"calibration": 0, "choice": 7, "heldout": 7}
    for name in ("limit", "limit_measured"):
        with pytest.raises(ValueError, match=f"{name}=-1.*0 for all"):
            RequestFiles("a", "b", **{name: -1})


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
    with pytest.raises(ValueError, match=r"f: label 'maybe'; expected one of unsafe"):
        request_pairs(PromptSet((Example("a", label="maybe"),)), "f")
    with pytest.raises(ValueError, match=r"no pair of a safe and an unsafe.*match them"):
        request_pairs(PromptSet(requests[-1:]))


def test_nearest_pairs_use_each_once():
    bad = PromptSet.of(["12345", "123456", "1"])
    good = PromptSet.of(["abcdef", "ab", "abcdefgh"])
    pairs = [(first.prompt, second.prompt) for first, second in nearest_pairs(bad, good)]
    assert pairs == [("12345", "abcdef"), ("123456", "abcdefgh"), ("1", "ab")]
    assert len(nearest_pairs(bad, good[:1])) == 1


# Behaviours


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


def test_all_formats_keep_every_column(files):
    harmful = PromptSet.read(files.harmful)
    assert harmful.examples[1] == Example("break thing 1", category="b", group="break1")
    benign = PromptSet.read(files.benign)
    assert benign.examples[1] == Example("mend thing 1", category="b", group="mend1")
    expected = Example("kill process it 0", category="c", group="0", label="safe")
    assert PromptSet.read(files.pairs).examples[1] == expected
    assert PromptSet.read(files.pairs + ":train[1:2]").examples == (expected,)


def test_behaviours_and_what_their_prompts_are(files):
    behaviours, kinds = request_behaviours(files, prefill="Well,")
    prefills = {name: behaviour.prefill for name, behaviour in behaviours.items()}
    assert prefills == {
        "harmful": "Well,",
        "benign": "",
        "recognition": "",
        "explanation": "",
        "refusal": "",
        "prefilled": "Well,",
        "borderline": "",
    }
    assert behaviours["harmful"].metric == "harm_valid_rate"
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
    with pytest.raises(ValueError, match="split='test'; expected one of calibration"):
        behaviours["harmful"].prompts("test")


def test_a_type_of_harm_is_a_behaviour(files):
    behaviours, _ = request_behaviours(files, prefill="")
    part = behaviours["harmful"].only("harmful/a", lambda example: example.category == "a")
    assert {example.category for example in part.prompts("heldout")} == {"a"}
    assert (part.name, part.title, part.part_of) == ("harmful/a", "harmful/a", "harmful")

    parts = behaviours["harmful"].by_category()
    assert list(parts) == ["harmful/a", "harmful/b"]
    assert parts["harmful/a"].prompts("heldout") == part.prompts("heldout")
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


def test_a_request_cannot_be_harmful_and_benign(files):
    both = RequestFiles(files.harmful, files.harmful)
    with pytest.raises(
        ValueError, match=r"60 requests are in .*bad\.jsonl.*leave each in one file"
    ):
        request_behaviours(both, prefill="")
