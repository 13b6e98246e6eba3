"""Behaviours of one's own: a name, requests and a judge.

Would catch: a judge that says shown of what is not, names of rows that another behaviour has, a
request in two splits.
"""

import pickle
import re

import pytest

import harmcircuits as hc
from harmcircuits.behaviours.behaviour import Behaviour, standard_behaviours
from harmcircuits.behaviours.judges import PatternJudge
from harmcircuits.behaviours.request_files import RequestFiles, request_behaviours
from harmcircuits.prompts import SPLITS, Example, PromptSet

COLUMNS = {"prompt": "ask", "completion": "answer"}
WALLS = [(f"paint wall {n}", f"Wall {n} is white") for n in range(40)]


def asked(behaviour: hc.Behaviour, *splits: str) -> list[str]:
    return [example.prompt for split in splits or SPLITS for example in behaviour.prompts(split)]


@pytest.mark.parametrize(
    ("pattern", "prefill", "answer", "verdict"),
    [
        (r"\d{2}", "", "it is 42", "shown"),
        (r"^\{.*\}$", "", '{"":[]}', "shown"),  # no prose, and right
        ("Well", "Well,", "Well, yes", "other"),  # in what was written for the model
        ("white", "", "I'm sorry, but I can't help with that", "refusal"),
    ],
)
def test_a_pattern_is_a_judge(pattern, prefill, answer, verdict):
    judge = PatternJudge(re.compile(pattern), "shown", prefill)
    assert judge("p", answer) == verdict
    assert pickle.loads(pickle.dumps(judge))("p", answer) == verdict


def test_a_name_requests_and_a_judge_are_enough():
    behaviour = hc.Behaviour("paints", WALLS, "white")
    assert (behaviour.wanted, behaviour.title) == ("paints", "paints")
    assert (behaviour.metric, behaviour.nll_metric) == ("paints_rate", "paints_nll")
    assert behaviour.judge("paint wall 3", "white, at last") == "paints"
    assert sorted(asked(behaviour)) == sorted(dict(WALLS))

    by_function = hc.Behaviour("paints", WALLS, lambda _, answer: answer[:4], wanted="Wall")
    assert by_function.judge("paint wall 3", "Wall 3") == by_function.wanted


def test_its_rows_are_named_as_is_said():
    names = {"rate": "painted", "degenerate": "broken", "kept words": "kept"}
    behaviour = hc.Behaviour("paints", WALLS, "white", metrics=names)
    assert (behaviour.metric, behaviour.nll_metric) == ("painted", "paints_nll")
    assert behaviour.side_metrics == {"degenerate": "broken"}
    part = behaviour.only("part", lambda example: "1" in example.prompt, nll_metric="part_nll")
    assert (part.name, part.title, part.part_of) == ("part", "part", "paints")
    assert (part.metric, part.nll_metric) == ("painted", "part_nll")
    assert part.only("less", lambda _: True).part_of == "paints"


def test_requests_come_from_everywhere_and_each_is_asked_once(tmp_path):
    read = PromptSet.read([{"ask": ask, "answer": said} for ask, said in WALLS], COLUMNS)
    (tmp_path / "walls.txt").write_text("\n".join(dict(WALLS)))
    again = [Example("paint wall 0", group=str(n)) for n in range(30)]
    expected = asked(hc.Behaviour("paints", WALLS, "white"))
    sets = read.splits()
    for given in (read, tmp_path / "walls.txt", list(dict(WALLS)), [*read, *again], sets, sets.get):
        assert asked(hc.Behaviour("paints", given, "white")) == expected
    heldout = PromptSet.of(["paint wall 1", "paint it"])
    apart = hc.Behaviour("paints", read.splits(heldout), "white")
    assert asked(apart, "heldout") == ["paint wall 1", "paint it"]
    assert "paint wall 1" not in asked(apart, "calibration", "choice")


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: hc.Behaviour("paints", ["a"], "white"), "behaviour 'paints'"),
        (lambda: hc.Behaviour("paints", [3], "white"), "int"),
        (lambda: hc.Behaviour("paints", WALLS, "white").prompts("test"), "'test'"),
        (lambda: request_behaviours(FILES, [BENIGN], prefill=""), "'benign'"),
    ],
)
def test_a_slip_is_refused(call, word):
    with pytest.raises(ValueError) as error:
        call()
    assert word in str(error.value)


FILES = RequestFiles(
    PromptSet.of([f"break thing {n}" for n in range(40)]),
    PromptSet.of([f"mend thing {n}" for n in range(40)]),
    limit=3,
)
BENIGN = hc.Behaviour("benign", WALLS, "white")


def test_own_behaviours_stand_beside_the_usual_ones():
    by_itself = hc.Behaviour("a", WALLS, "white")
    by_model = hc.Behaviour("b", [f"clean {n}" for n in range(40)], wanted="benign")
    behaviours, kinds = request_behaviours(FILES, [by_itself, by_model], prefill="")
    assert list(behaviours)[-2:] == ["a", "b"]
    assert len(behaviours["a"].prompts("calibration")) == 3, "limited"
    assert not any("paint" in prompt for prompt in kinds), "it has a judge"
    assert {kinds[prompt] for prompt in asked(behaviours["b"])} == {"b"}
    alone, _ = request_behaviours(RequestFiles(), [by_itself], prefill="")
    assert list(alone) == ["a"]


def test_those_of_the_package_keep_their_names():
    standard = standard_behaviours()
    metrics = {name: f"{name}_rate" for name in ("explanation", "knowledge", "refusal")}
    metrics |= {name: f"{name}_valid_rate" for name in ("benign", "borderline", "prefilled")}
    metrics |= {"harmful": "harm_valid_rate", "recognition": "recognition_accuracy"}
    assert {name: behaviour.metric for name, behaviour in standard.items()} == metrics
    for name, behaviour in standard.items():
        assert behaviour.nll_metric == f"{'harm' if name == 'harmful' else name}_nll"
    assert [name for name in standard if not standard[name].is_kept] == ["harmful", "refusal"]
    assert list(standard["harmful"].side_metrics) == ["refusal", "harmless", "degenerate"]


def yes_or_no_rows(n: int = 80) -> list[Example]:
    rows = []
    for number in range(n):
        rows.append(Example(f"is {number} odd ?", "no"))
        rows.append(Example(f"is {number} whole ?", "yes"))
    return rows


CHOICES = (("yes",), ("no",))


def test_pairs_of_a_list_stay_together():
    """Also where two pairs share a request."""
    rows = yes_or_no_rows()
    rows[2] = rows[0]
    behaviour = Behaviour("whole", PromptSet(tuple(rows)), choices=CHOICES)
    pairs = {
        (first.prompt, second.prompt) for first, second in zip(rows[::2], rows[1::2], strict=True)
    }
    for split in SPLITS:
        examples = behaviour.prompts(split).examples
        assert {
            (a.prompt, b.prompt) for a, b in zip(examples[::2], examples[1::2], strict=True)
        } <= pairs


@pytest.mark.parametrize(
    ("change", "word"),
    [(lambda rows: rows[1:], "159 rows"), (lambda rows: rows[::-1], "row 0 is answered 'yes'")],
)
def test_rows_that_are_no_pairs_are_refused(change, word):
    with pytest.raises(ValueError, match=word):
        Behaviour("whole", PromptSet(tuple(change(yes_or_no_rows()))), choices=CHOICES)


def test_splits_may_be_lists():
    behaviour = Behaviour("x", {split: [f"{split} {n}" for n in range(3)] for split in SPLITS})
    assert [len(behaviour.prompts(split)) for split in SPLITS] == [3, 3, 3]
