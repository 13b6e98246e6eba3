"""Requests that ask the same as others, planted in files: where they end, and what is said of them.

Would catch: a request that is scored and measured, a group torn apart, a request that moves because
of others, one that is dropped without a word.
"""

import random

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


def test_what_is_the_same_but_for_capitals_spaces_and_punctuation():
    same = ["Use caf\u00e9!", " use  cafe\u0301", "\uff35se caf\u00e9"]
    assert len(set(map(plain_text, same))) == 1
    assert len({plain_text(text) for text in ("a b", "ab", "a b 1")}) == 3


def test_clusters_are_joined_by_any_key_and_named_by_the_first():
    keys = [("a", "x"), ("b", "y"), ("c", "z"), ("d", "y"), ("d", "x"), ("e", "c")]
    assert joined_clusters(keys) == ["a", "a", "c", "a", "a", "e"], "a name is no text"


def test_no_request_ends_in_two_splits_however_it_is_written():
    """A third of the requests again, in other letters, in some place, under some group."""
    generator = random.Random(0)
    alone = PromptSet.of(things("paint"))
    again = []
    for text in generator.sample(things("paint"), 20):
        group = generator.choice(["", "", f"group {generator.randrange(5)}"])
        again.append(Example(varied(text, 0), group=group))
    mixed = [*alone, *again]
    generator.shuffle(mixed)
    sets = PromptSet(tuple(mixed)).splits()
    assert sum(len(texts_of(sets, split)) for split in SPLITS) == 60, "each in one split"
    assert sum(map(len, sets.values())) == 80, "none is lost"
    groups = {split: {example.cluster for example in sets[split]} for split in SPLITS}
    assert sum(map(len, groups.values())) == len(set().union(*groups.values()))

    # By their letters alone they would end in two: the test can fail.
    apart = [Example(example.prompt, group=example.prompt) for example in again]
    by_letters = PromptSet(tuple(apart)).splits()
    assert any(texts_of(by_letters, split) - texts_of(sets, split) for split in SPLITS)

    # What does not repeat stays where it is.
    repeated = [varied(text, 1) for text in things("paint", 5)]
    joined = PromptSet.of([*alone, *repeated]).splits()
    for split, members in alone.splits().items():
        assert set(members) <= set(joined[split])


def test_counts_say_what_became_of_each():
    harmful = [*things("break"), "Break thing 2!", "break  THING 3"]
    given = {"harmful": harmful, "harmful_heldout": ["break thing 7.", "break thing 98", "a", "b"]}
    given["benign"] = [*things("mend"), "mend thing 4", "mend thing 4"]
    behaviours, _ = request_behaviours(RequestFiles.of(given), prefill="Well,")
    rows = repeat_rows(behaviours)
    counts = {tuple(row.labels.values()): row.mean for row in rows.where(REPEATED)}
    assert counts == {
        ("harmful", "same text"): 0,
        ("harmful", "same words"): 2,
        ("harmful", "held out"): 1,
        ("benign", "same text"): 2,
        ("benign", "same words"): 0,
    }
    assert not rows.where(IN_TWO_SPLITS)
    assert repeats_text(rows) == (
        "Requests that repeat another: harmful 3 (same words 2, held out 1), "
        "benign 2 (same text 2)."
    )
    asked = [example.prompt for split in SPLITS for example in behaviours["harmful"].prompts(split)]
    assert "Break thing 2!" in asked and "break thing 7" not in asked and "break thing 7." in asked


def test_pairs_that_have_a_request_in_common_go_together():
    pairs = []
    for number in range(40):
        # The same harmless request in every fourth pair.
        safe = "kill it" if number % 4 == 0 else f"kill process {number}"
        where = {"group": str(number)}
        pairs.append({"prompt": f"ruin it {number}", "label": "unsafe", **where})
        pairs.append({"prompt": safe, "label": "safe", **where})
    files = RequestFiles.of({"harmful": things("break"), "benign": things("mend"), "pairs": pairs})
    behaviours, _ = request_behaviours(files, prefill="")
    sets = {split: behaviours["recognition"].prompts(split) for split in SPLITS}
    texts = [texts_of(sets, split) for split in SPLITS]
    assert sum(map(len, texts)) == len(set().union(*texts))
    assert sum(map(len, sets.values())) == 80


def test_requests_that_two_behaviours_share_are_counted():
    requests, heldout = PromptSet.of(things("mend")), things("mend", 30)
    files = RequestFiles.of({"harmful": things("break"), "benign": things("mend")})

    def rows_with(shared):
        behaviours, _ = request_behaviours(files, [hc.Behaviour("paints", shared, "w")], prefill="")
        return repeat_rows(behaviours), behaviours["benign"].prompts.sets

    rows, sets = rows_with(requests)
    assert not rows.where(IN_TWO_SPLITS), "the same requests are in the same split"
    rows, sets = rows_with(requests.splits(PromptSet.of(heldout)))
    n_both = len(texts_of(sets, *SPLITS[:2]) & set(map(plain_text, heldout)))
    assert rows.one(IN_TWO_SPLITS, behaviour="benign", measured="paints").mean == n_both
    sentence = f"{n_both} requests that benign was scored"
    assert any(text.startswith(sentence) for text in shared_texts(rows))
    assert f"Warning: {sentence}" in repeats_text(rows)
