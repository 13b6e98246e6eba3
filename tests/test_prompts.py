"""Sets of prompts and their splits.

Would catch: a request in two splits, or one that moves when others are added; a group that a sample
tears apart.
"""

from dataclasses import replace

import pytest

from harmcircuits.prompts import SPLITS, Example, PromptSet

EXAMPLES = (Example("how to use it ?", "sure yes", category="tools", group="one"),)


def test_a_set_is_made_of_requests_pairs_and_examples_in_order():
    pair = Example("where ?", "here")
    items = ["who ?", ("where ?", "here"), EXAMPLES[0]]
    prompts = PromptSet.of(items)
    assert prompts.examples == (Example("who ?"), pair, EXAMPLES[0])
    assert PromptSet.of(iter(items)) == prompts
    assert PromptSet.of(prompts) is prompts
    assert PromptSet.of("who ?").examples == (Example("who ?"),), "not a request a letter"

    assert prompts[1:] == PromptSet((pair, EXAMPLES[0]))
    assert prompts.where(lambda example: bool(example.completion)) == prompts[1:]
    changed = prompts.with_completions(["x", "y", "z"]).examples
    assert [example.completion for example in changed] == ["x", "y", "z"]
    assert changed[2] == Example("how to use it ?", "z", category="tools", group="one")


def test_digest_is_of_all_texts_in_order():
    def digest(*pairs):
        return PromptSet(tuple(Example(*pair) for pair in pairs)).digest

    # Files name this value: it may not change between versions.
    assert digest(("a", "b")) == "cccb00f1aa26751e"
    others = [digest(("ab", "")), digest(("a", "")), digest(("a", "b"), ("c", "d"))]
    assert len({digest(("a", "b")), digest(("c", "d"), ("a", "b")), *others}) == 5


def walls(n: int) -> PromptSet:
    """Two requests to each of n walls."""
    examples = []
    for number in range(n):
        where = {"category": "abc"[number % 3], "group": f"wall {number}"}
        examples += [Example(f"{verb} wall {number}", **where) for verb in ("paint", "build")]
    return PromptSet(tuple(examples))


MANY = walls(200)
ONE = PromptSet.of([("use", "yes")])


def test_splits_are_apart_and_stay():
    sets = MANY.splits()
    assert list(sets) == ["calibration", "choice", "heldout"]
    assert sum(map(len, sets.values())) == 400
    assert {example for members in sets.values() for example in members} == set(MANY)
    # A share of 0.6 of 200 groups has a standard error of 7.
    assert len(sets["calibration"]) / 2 == pytest.approx(120, abs=25)
    for split, members in walls(150).splits().items():
        assert set(members) <= set(sets[split]), "a request stays where it is"
    for members in sets.values():
        assert len(members) == 2 * len({example.group for example in members}), "groups are whole"
        assert {example.category for example in members} == set("abc")

    limited = MANY.splits(limits={"calibration": 0, "choice": 5, "heldout": 4})
    assert [len(members) for members in limited.values()] == [len(sets["calibration"]), 10, 8]
    assert set(limited["choice"]) <= set(sets["choice"])


def test_given_heldout_requests_are_the_heldout_ones():
    sets = MANY[:200].splits(MANY[200:])
    assert sets["heldout"] == MANY[200:]
    assert set(sets["calibration"]) | set(sets["choice"]) == set(MANY[:200])
    asked_before = MANY.splits(MANY[200:])
    assert asked_before == sets, "what asks the same as a held-out request is left out"


def test_a_sample_keeps_a_share_of_the_groups_of_every_category():
    examples = []
    for group in ("a0", "a1", "a2", "a3", "b0"):
        where = {"category": group[0], "group": group}
        examples += [Example(f"{group} {turn}", **where) for turn in range(3)]
    whole = PromptSet(tuple(examples))
    half = whole.sampled(0.5, seed=1)
    groups = {example.group for example in half}
    assert len(groups) == 3 and "b0" in groups, "a category never vanishes"
    assert half == whole.where(lambda example: example.group in groups)
    assert len({whole.sampled(0.5, seed=seed) for seed in range(20)}) > 1
    assert whole.sampled(1.0, seed=3) == whole
    rest = whole.sampled(0.5, seed=1, rest=True)
    assert rest == whole.where(lambda example: example.group not in groups)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: PromptSet.of([3]), "an item is int"),
        (lambda: ONE.with_completions(["x", "y"]), "longer"),
        (lambda: MANY[:1].splits(origin="few.csv"), "few.csv: 1 request cannot fill"),
    ],
)
def test_what_cannot_be_asked_is_refused(call, word):
    with pytest.raises(ValueError) as error:
        call()
    assert word in str(error.value)


def test_a_group_of_the_held_out_file_is_scored_nowhere():
    requests = [Example(f"use thing {n}", group=f"thing {n}") for n in range(40)]
    held_out = [replace(example, prompt=f"how to {example.prompt}") for example in requests[::2]]
    sets = PromptSet(tuple(requests)).splits(PromptSet(tuple(held_out)))
    groups = {split: {example.cluster for example in sets[split]} for split in SPLITS}
    assert not groups["heldout"] & (groups["calibration"] | groups["choice"])
    assert len(groups["calibration"] | groups["choice"]) == 20


@pytest.mark.parametrize("name", ["group", "category", "label"])
def test_the_digest_of_requests_holds_what_splits_and_intervals_depend_on(name):
    first = Example("q", group="g", category="a", label="safe")
    second = replace(first, **{name: "another"})
    assert PromptSet((second,)).digest != PromptSet((first,)).digest
