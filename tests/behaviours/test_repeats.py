"""Requests that ask the same as others, planted in files: where they end, and what is said of them.

Would catch: a request that is scored and measured, a group torn apart, a request that moves because
of others, one that is dropped without a word, two different requests taken for one.
"""

import json
import random

import pytest

import harmcircuits as hc
from harmcircuits.behaviours.files import (
    IN_TWO_SPLITS,
    REPEATED,
    RequestFiles,
    repeat_rows,
    repeats_text,
    request_behaviours,
    shared_texts,
)
from harmcircuits.prompts import SPLITS, Example, PromptSet, joined_clusters, plain_text


def things(verb: str, n: int = 60) -> list[str]:
    return [f"{verb} thing {number}" for number in range(n)]


def varied(text: str, seed: int) -> str:
    """The same words with other capitals, spaces and punctuation."""
    generator = random.Random(seed)
    words = [generator.choice([word, word.upper(), word.title()]) for word in text.split()]
    gap = generator.choice(["  ", "\t", ", ", "\n"])
    return generator.choice(["", "  ", "- "]) + gap.join(words) + generator.choice("?!. ")


def texts_of(sets, *splits: str) -> set[str]:
    return {plain_text(example.prompt) for split in splits for example in sets[split]}


@pytest.mark.parametrize(
    ("first", "second", "is_same"),
    [
        ("How do I use it?", "how do i  use it", True),
        ("use it", " Use it! ", True),
        ("caf\u00e9", "cafe\u0301", True),
        ("\uff55\uff53\uff45 it", "use it", True),
        ("use it", "use them", False),
        ("a b", "ab", False),
        ("?", "!", False),
        ("use it 1", "use it", False),
    ],
)
def test_what_is_the_same_but_for_capitals_spaces_and_punctuation(first, second, is_same):
    assert (plain_text(first) == plain_text(second)) == is_same


def test_clusters_are_joined_by_any_key_and_named_by_the_first():
    assert joined_clusters([("b", "2"), ("a", "1"), ("b", "1"), ("c", "3")]) == ["b", "b", "b", "c"]
    assert joined_clusters([("1", "x"), ("y", "1")]) == ["1", "y"], "a name is no text"


@pytest.mark.parametrize("seed", range(3))
def test_no_request_ends_in_two_splits_however_it_is_written(seed):
    """A third of the requests again, in other letters, in some place, under some group."""
    generator = random.Random(seed)
    again = []
    for text in generator.sample(things("paint"), 20):
        group = generator.choice(["", "", f"group {generator.randrange(5)}"])
        again.append(Example(varied(text, seed), group=group))
    mixed = [*PromptSet.of(things("paint")), *again]
    generator.shuffle(mixed)
    sets = PromptSet(tuple(mixed)).splits()
    assert sum(len(texts_of(sets, split)) for split in SPLITS) == 60, "each in one split"
    assert sum(map(len, sets.values())) == 80, "none is lost"
    groups = {split: {example.cluster for example in sets[split]} for split in SPLITS}
    assert sum(map(len, groups.values())) == len(set().union(*groups.values()))

    # By their letters alone they would end in two: the test can fail.
    apart = 0
    for text in {example.prompt for example in again}:
        alone = PromptSet.of([text, *things("mend")]).splits()
        place = [split for split in SPLITS if any(e.prompt == text for e in alone[split])]
        apart += place != [split for split in SPLITS if plain_text(text) in texts_of(sets, split)]
    assert apart > 0


def test_what_does_not_repeat_stays_where_it_is():
    alone = PromptSet.of(things("paint")).splits()
    again = [varied(text, 1) for text in things("paint", 5)]
    joined = PromptSet.of([*things("paint"), *again]).splits()
    for split in SPLITS:
        assert set(alone[split]) <= set(joined[split])


def test_counts_say_what_became_of_each(tmp_path):
    harmful = [*things("break"), "break thing 1", "Break thing 2!", "break  THING 3"]
    rows = [json.dumps({"prompt": text, "category": "c"}) for text in harmful]
    (tmp_path / "bad.jsonl").write_text("\n".join(rows))
    files = RequestFiles.of(
        {
            "harmful": tmp_path / "bad.jsonl",
            "harmful_heldout": ["break thing 7.", "break thing 99", "break thing 98"],
            "benign": [*things("mend"), "mend thing 4", "mend thing 4"],
        }
    )
    behaviours, _ = request_behaviours(files, prefill="Well,")
    rows = repeat_rows(behaviours)
    counts = {}
    for row in rows.where(REPEATED):
        counts[row.labels["source"], row.labels["kind"]] = row.mean
    assert counts == {
        ("harmful", "same text"): 1,  # an equal row of the file, left out where it is read
        ("harmful", "same words"): 2,
        ("harmful", "held out"): 1,
        ("benign", "same text"): 2,
        ("benign", "same words"): 0,
    }
    assert not rows.where(IN_TWO_SPLITS)
    assert repeats_text(rows) == (
        "Requests that repeat another: harmful 4 (same text 1, same words 2, held out 1), "
        "benign 2 (same text 2)."
    )
    asked = [example.prompt for split in SPLITS for example in behaviours["harmful"].prompts(split)]
    assert asked.count("break thing 1") == 1 and "Break thing 2!" in asked
    assert "break thing 7" not in asked and "break thing 7." in asked


def test_pairs_that_have_a_request_in_common_go_together():
    pairs = []
    for number in range(40):
        # The same harmless request in every fourth pair.
        safe = "kill it" if number % 4 == 0 else f"kill process {number}"
        where = {"group": str(number), "category": str(number)}
        pairs.append({"prompt": f"ruin it {number}", "label": "unsafe", **where})
        pairs.append({"prompt": safe, "label": "safe", **where})
    files = RequestFiles.of({"harmful": things("break"), "benign": things("mend"), "pairs": pairs})
    behaviours, _ = request_behaviours(files, prefill="")
    sets = {split: behaviours["recognition"].prompts(split) for split in SPLITS}
    texts = [texts_of(sets, split) for split in SPLITS]
    assert sum(map(len, texts)) == len(set().union(*texts))
    assert sum(map(len, sets.values())) == 80


def test_requests_that_two_behaviours_share_are_counted():
    requests = PromptSet.of(things("mend"))
    apart = requests.splits(PromptSet.of(things("mend", 30)))
    files = RequestFiles.of({"harmful": things("break"), "benign": things("mend")})
    for shared in (requests, apart):
        own = hc.Behaviour("paints", shared, "white")
        behaviours, _ = request_behaviours(files, [own], prefill="")
        rows = repeat_rows(behaviours)
        if shared is requests:
            assert not rows.where(IN_TWO_SPLITS), "the same requests are in the same split"
            continue
        sets = {split: behaviours["benign"].prompts(split) for split in SPLITS}
        both = texts_of(sets, *SPLITS[:2]) & {plain_text(text) for text in things("mend", 30)}
        assert rows.one(IN_TWO_SPLITS, behaviour="benign", measured="paints").mean == len(both)
        sentence = f"{len(both)} requests that benign was scored"
        assert any(text.startswith(sentence) for text in shared_texts(rows))
        assert f"Warning: {sentence}" in repeats_text(rows)
