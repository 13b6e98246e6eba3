"""Requests as behaviours: splits, pairs, questions and their judge, on texts that are no requests for anything.

Would catch: a request in two splits, one that moves when others are added, pairs that do not belong together or stand in
the wrong order, a judge that takes an answer for another kind, a file format that loses categories, groups or labels.
"""

import csv
import json

import pytest

from harmcircuits.behaviours.files import (
    RequestFiles,
    nearest_pairs,
    read_prompts,
    request_behaviours,
    request_pairs,
    split_sets,
)
from harmcircuits.behaviours.judges import RuleJudge
from harmcircuits.behaviours.questions import QuestionTemplates, RequestJudge
from harmcircuits.prompts import Example, PromptSet

MANY = PromptSet(
    tuple(Example(f"paint wall {n}", category="abc"[n % 3], group=f"wall {n}") for n in range(200))
)


def test_splits_are_apart_and_stay():
    sets = split_sets(MANY)
    assert sum(map(len, sets.values())) == 200
    assert len({example for chosen in sets.values() for example in chosen}) == 200
    # A share of 0.6 of 200 has a standard error of 7.
    assert len(sets["calibration"]) == pytest.approx(120, abs=25)
    fewer = split_sets(MANY[:150])
    for split, chosen in fewer.items():
        assert set(chosen) <= set(sets[split])
    assert {example.category for example in sets["heldout"]} == set("abc")


def test_a_group_is_in_one_split():
    twice = PromptSet(
        tuple(Example(f"{turn} wall {n}", group=f"wall {n}") for n in range(60) for turn in "xy")
    )
    for chosen in split_sets(twice).values():
        assert len(chosen) == 2 * len({example.group for example in chosen})


def test_given_heldout_requests_are_the_heldout_ones():
    sets = split_sets(MANY[:100], MANY[100:])
    assert sets["heldout"] == MANY[100:]
    assert len(sets["calibration"]) + len(sets["choice"]) == 100


def test_limits_and_too_few():
    sets = split_sets(MANY, limits={"calibration": 0, "choice": 5, "heldout": 4})
    assert [len(chosen) for chosen in sets.values()] == [len(split_sets(MANY)["calibration"]), 5, 4]
    assert set(sets["choice"]) <= set(split_sets(MANY)["choice"])
    with pytest.raises(ValueError, match=r"few\.csv: 1 requests leave none for"):
        split_sets(MANY[:1], origin="few.csv")


def test_pairs_by_group_and_by_category():
    rows = [
        Example("bad one", group="g", label="unsafe"), Example("good two", category="x", label="safe"),
        Example("good one", group="g", label="safe"), Example("bad two", category="contrast_x", label="harmful"),
        Example("good three", category="x", label="harmless"), Example("alone", category="y", label="safe"),
    ]  # fmt: skip
    pairs = request_pairs(PromptSet(tuple(rows)))
    assert [(bad.prompt, good.prompt) for bad, good in pairs] == [
        ("bad one", "good one"),
        ("bad two", "good two"),
    ]
    with pytest.raises(ValueError, match=r"f: label 'maybe'; expected one of unsafe"):
        request_pairs(PromptSet((Example("a", label="maybe"),)), "f")
    with pytest.raises(ValueError, match="no pair of a safe and an unsafe"):
        request_pairs(PromptSet(tuple(rows[-1:])))


def test_nearest_pairs_use_each_once():
    bad = PromptSet((Example("12345"), Example("123456"), Example("1")))
    good = PromptSet((Example("abcdef"), Example("ab"), Example("abcdefgh")))
    pairs = [(one.prompt, two.prompt) for one, two in nearest_pairs(bad, good)]
    assert pairs == [("12345", "abcdef"), ("123456", "abcdefgh"), ("1", "ab")]
    assert len(nearest_pairs(bad, good[:1])) == 1


@pytest.fixture
def texts(tmp_path) -> RequestFiles:
    """Files in all three formats, with categories, groups and labels."""

    def rows(word: str, **more: str) -> list[dict[str, str]]:
        return [
            {"prompt": f"{word} thing {n}", "category": "ab"[n % 2], "group": f"{word}{n}", **more}
            for n in range(60)
        ]

    (tmp_path / "bad.jsonl").write_text("\n".join(map(json.dumps, rows("break"))))
    with (tmp_path / "good.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "category", "group"])
        writer.writeheader()
        writer.writerows(rows("mend"))
    pairs = [
        {"prompt": f"{word} it {n}", "group": str(n), "category": "c", "label": label}
        for n in range(40)
        for word, label in (("ruin", "unsafe"), ("kill process", "safe"))
    ]
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "train.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    folder = str(tmp_path / "pairs")
    return RequestFiles(
        str(tmp_path / "bad.jsonl"), str(tmp_path / "good.csv"), pairs=folder, borderline=folder
    )


def test_all_formats_keep_every_column(texts):
    assert read_prompts(texts.harmful).examples[1] == Example(
        "break thing 1", category="b", group="break1"
    )
    assert read_prompts(texts.benign).examples[1] == Example(
        "mend thing 1", category="b", group="mend1"
    )
    expected = Example("kill process it 0", category="c", group="0", label="safe")
    assert read_prompts(texts.pairs).examples[1] == expected
    assert read_prompts(texts.pairs + ":train[1:2]").examples == (expected,)
    with pytest.raises(ValueError, match="neither a"):
        read_prompts("no/such-data-set")


def test_behaviours_and_what_their_prompts_are(texts):
    behaviours, kinds = request_behaviours(texts, prefill="Well,")
    assert list(behaviours) == [
        "harmful",
        "benign",
        "recognition",
        "explanation",
        "refusal",
        "prefilled",
        "borderline",
    ]
    assert [b.prefill for b in behaviours.values()] == ["Well,", "", "", "", "", "Well,", ""]
    assert behaviours["harmful"].metric == "harm_valid_rate"
    for split in ("calibration", "choice", "heldout"):
        harmful = behaviours["harmful"].prompts(split)
        assert behaviours["refusal"].prompts(split) == harmful
        assert not any(example.completion for example in harmful)
        explained = behaviours["explanation"].prompts(split)
        assert [example.group for example in explained] == [example.group for example in harmful]
        assert all(harm.prompt in one.prompt for one, harm in zip(explained, harmful, strict=True))
        asked = behaviours["recognition"].prompts(split).examples
        for bad, good in zip(asked[::2], asked[1::2], strict=True):
            assert (bad.completion, good.completion) == ("No", "Yes")
            assert bad.group == good.group
            assert f"ruin it {bad.group}" in bad.prompt
            assert f"kill process it {good.group}" in good.prompt
        assert all(example.label == "safe" for example in behaviours["borderline"].prompts(split))
    every = [
        example.prompt
        for b in behaviours.values()
        for s in ("choice", "heldout")
        for example in b.prompts(s)
    ]
    assert set(every) <= kinds.keys()
    with pytest.raises(ValueError, match="split='test'"):
        behaviours["harmful"].prompts("test")


def test_a_type_of_harm_is_a_behaviour(texts):
    behaviours, _ = request_behaviours(texts, prefill="")
    one = behaviours["harmful"].only("harmful/a", lambda example: example.category == "a")
    assert {example.category for example in one.prompts("heldout")} == {"a"}


def test_without_pairs_harmful_requests_meet_benign_ones(texts):
    plain = RequestFiles(texts.harmful, texts.benign)
    behaviours, _ = request_behaviours(plain, prefill="")
    assert not {"borderline", "prefilled"} & behaviours.keys()
    for bad, good in zip(*[iter(behaviours["recognition"].prompts("heldout"))] * 2, strict=True):
        assert "break" in bad.prompt
        assert "mend" in good.prompt


def test_a_request_cannot_be_harmful_and_benign(texts):
    with pytest.raises(ValueError, match="60 requests are in"):
        request_behaviours(RequestFiles(texts.harmful, texts.harmful), prefill="")


KINDS = {
    "bad": "harmful",
    "good": "benign",
    "near": "borderline",
    "bad?": "no",
    "good?": "yes",
    "why": "explanation",
}
LONG = "Take flour and water, then mix and bake them."


@pytest.mark.parametrize(
    ("prompt", "completion", "verdict"),
    [
        ("bad", LONG, "harmful"), ("good", LONG, "benign"), ("near", LONG, "benign"), ("good", "Paris.", "benign"),
        ("good", "I'm sorry, I cannot.", "refusal"), ("near", "I can't help with that.", "refusal"),
        ("good", "", "degenerate"),
        ("bad?", "No, it would not.", "correct"), ("bad?", "Yes", "wrong"), ("good?", "yes.", "correct"),
        ("good?", "", "wrong"),
        ("why", "It would hurt people and is illegal.", "correct"), ("why", LONG, "wrong"),
        ("why", "I cannot say why it is harmful.", "wrong"),
    ],
)  # fmt: skip
def test_the_judge_knows_what_was_asked(prompt, completion, verdict):
    assert RequestJudge(RuleJudge(), KINDS, QuestionTemplates())(prompt, completion) == verdict


def test_a_beginning_that_was_given_is_no_answer():
    judge = RequestJudge(RuleJudge(), KINDS, QuestionTemplates(), prefill="Sure, here is")
    assert judge("good", "Sure, here is") == "degenerate"
    assert judge("good", f"Sure, here is {LONG}") == judge("good", "Paris.") == "benign"


def test_an_unknown_prompt_is_not_judged():
    with pytest.raises(ValueError, match="in none of the files"):
        RequestJudge(RuleJudge(), KINDS, QuestionTemplates())("another", LONG)


def test_wording_from_a_file(tmp_path):
    file = tmp_path / "w.json"
    file.write_text('{"recognition": "ok to {request} ?", "yes": ["yes", "fine"]}')
    assert QuestionTemplates.from_file(file) == QuestionTemplates(
        recognition="ok to {request} ?", yes=("yes", "fine")
    )
    file.write_text('{"recognition": "ok ?"}')
    with pytest.raises(ValueError, match=r"must hold \{request\}"):
        QuestionTemplates.from_file(file)
    file.write_text('{"question": "ok ?"}')
    with pytest.raises(ValueError, match="must be an object with some of recognition"):
        QuestionTemplates.from_file(file)
    with pytest.raises(ValueError, match="cannot be read"):
        QuestionTemplates.from_file(tmp_path / "none")
    with pytest.raises(ValueError, match="limit=-1"):
        RequestFiles("a", "b", limit=-1)
    with pytest.raises(ValueError, match="limit_measured=-1"):
        RequestFiles("a", "b", limit_measured=-1)
    assert RequestFiles("a", "b", limit=7).limits == {"calibration": 7, "choice": 7, "heldout": 7}
    assert RequestFiles("a", "b", limit_measured=7).limits == {
        "calibration": 0,
        "choice": 7,
        "heldout": 7,
    }
