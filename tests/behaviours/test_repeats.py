"""Requests that ask the same as others, planted in files: where they end, and what is said of them.

Would catch: a request that is scored and measured, a group torn apart, a request that moves because
of others, one that is dropped without a word, two different requests taken for one.
"""

import json
import random
import warnings

import pytest

from harmcircuits.behaviours.files import RequestFiles, repeats_of, request_behaviours
from harmcircuits.behaviours.own import OwnBehaviour
from harmcircuits.behaviours.repeats import (
    IN_TWO_SPLITS,
    REPEATED,
    plain_texts,
    repeats_text,
    shared_rows,
)
from harmcircuits.prompts import SPLITS, Example, PromptSet, joined_clusters, plain_text
from harmcircuits.studies.models import _warn_of_shared


def things(verb: str, n: int = 60) -> list[str]:
    return [f"{verb} thing {number}" for number in range(n)]


def varied(text: str, seed: int) -> str:
    """The same words with other capitals, spaces and punctuation."""
    generator = random.Random(seed)
    words = [generator.choice([word, word.upper(), word.title()]) for word in text.split()]
    gap = generator.choice(["  ", "\t", ", ", "\n"])
    return generator.choice(["", "  ", "- "]) + gap.join(words) + generator.choice("?!. ")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("How do I use it?", "how do i  use it"),
        ("use it", " Use it! "),
        ("caf\u00e9", "cafe\u0301"),
        ("\uff55\uff53\uff45 it", "use it"),
    ],
)
def test_what_is_the_same_but_for_capitals_spaces_and_punctuation(first, second):
    assert plain_text(first) == plain_text(second)


def test_what_is_not_the_same():
    for first, second in [
        ("use it", "use them"),
        ("a b", "ab"),
        ("?", "!"),
        ("use it 1", "use it"),
    ]:
        assert plain_text(first) != plain_text(second)


def test_clusters_are_joined_by_any_key_and_named_by_the_first():
    assert joined_clusters([("b", "2"), ("a", "1"), ("b", "1"), ("c", "3")]) == ["b", "b", "b", "c"]
    assert joined_clusters([("1", "x"), ("y", "1")]) == ["1", "y"], "a name is no text"
    assert joined_clusters([]) == []


@pytest.mark.parametrize("seed", range(5))
def test_no_request_ends_in_two_splits_however_it_is_written(seed):
    """A third of the requests again, in other letters, in some place, under some group."""
    generator = random.Random(seed)
    once = PromptSet.of(things("paint"))
    again = []
    for text in generator.sample(things("paint"), 20):
        group = generator.choice(["", "", f"group {generator.randrange(5)}"])
        again.append(Example(varied(text, seed), group=group))
    mixed = [*once, *again]
    generator.shuffle(mixed)
    sets = PromptSet(tuple(mixed)).splits()
    texts = {split: plain_texts(sets, [split]) for split in SPLITS}
    assert sum(map(len, texts.values())) == 60, "each in one split"
    assert sum(map(len, sets.values())) == 80, "none is lost"
    groups = {split: {example.cluster for example in sets[split]} for split in SPLITS}
    assert sum(map(len, groups.values())) == len(set().union(*groups.values()))

    # By their letters alone they would end in two: the test can fail.
    apart = 0
    for text in {example.prompt for example in again}:
        alone = PromptSet.of([text, *things("mend")]).splits()
        place = [split for split in SPLITS if any(e.prompt == text for e in alone[split])]
        whole = [split for split in SPLITS if plain_text(text) in texts[split]]
        apart += place != whole
    assert apart > 0


def test_what_does_not_repeat_stays_where_it_is():
    alone = PromptSet.of(things("paint")).splits()
    again = [varied(text, 1) for text in things("paint", 5)]
    joined = PromptSet.of([*things("paint"), *again]).splits()
    for split in SPLITS:
        assert set(alone[split]) <= set(joined[split])


def test_what_is_held_out_is_left_out_of_the_others():
    heldout = PromptSet.of([varied(text, 2) for text in things("paint", 10)])
    sets = PromptSet.of(things("paint")).splits(heldout)
    assert len(sets["heldout"]) == 10
    assert len(sets["calibration"]) + len(sets["choice"]) == 50
    assert not plain_texts(sets, ["calibration", "choice"]) & plain_texts(sets, ["heldout"])


def test_counts_say_what_became_of_each(tmp_path):
    harmful = [*things("break"), "break thing 1", "Break thing 2!", "break  THING 3"]
    (tmp_path / "bad.jsonl").write_text(
        "\n".join(json.dumps({"prompt": text, "category": "c"}) for text in harmful)
    )
    files = RequestFiles.of(
        {
            "harmful": tmp_path / "bad.jsonl",
            "harmful_heldout": ["break thing 7.", "break thing 99", "break thing 98"],
            "benign": [*things("mend"), "mend thing 4", "mend thing 4"],
        }
    )
    behaviours, _ = request_behaviours(files, prefill="Well,")
    rows = repeats_of(files, behaviours)
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
    assert "break" not in repeats_text(rows), "requests are not shown"


def test_pairs_that_have_a_request_in_common_go_together():
    pairs = []
    for number in range(40):
        # The same harmless request in every fourth pair.
        safe = "kill it" if number % 4 == 0 else f"kill process {number}"
        pairs.append({"prompt": f"ruin it {number}", "group": str(number), "label": "unsafe"})
        pairs.append(
            {"prompt": safe, "group": str(number), "label": "safe", "category": str(number)}
        )
    files = RequestFiles.of({"harmful": things("break"), "benign": things("mend"), "pairs": pairs})
    behaviours, _ = request_behaviours(files, prefill="")
    sets = {split: behaviours["recognition"].prompts(split) for split in SPLITS}
    texts = [plain_texts(sets, [split]) for split in SPLITS]
    assert sum(map(len, texts)) == len(set().union(*texts))
    assert sum(map(len, sets.values())) == 80


def test_requests_that_two_behaviours_share_are_counted_and_warned_of():
    shared = {"name": "paints", "prompts": [{"prompt": text} for text in things("mend")]}
    other_split = {**shared, "heldout": [{"prompt": text} for text in things("mend", 30)]}
    for own, n_shared in ((shared, 0), (other_split, None)):
        files = RequestFiles.of(
            {"harmful": things("break"), "benign": things("mend"), "behaviours": [own]}
        )
        behaviours, _ = request_behaviours(files, prefill="")
        rows = shared_rows(behaviours)
        if n_shared == 0:
            assert not rows, "the same requests are in the same split"
            continue
        scored = plain_texts({s: behaviours["benign"].prompts(s) for s in SPLITS}, SPLITS[:2])
        expected = scored & {plain_text(text) for text in things("mend", 30)}
        assert rows.one(IN_TWO_SPLITS, behaviour="benign", measured="paints").mean == len(expected)
        with pytest.warns(UserWarning) as warned:
            _warn_of_shared(rows)
        sentence = f"{len(expected)} requests that 'benign' is scored"
        assert any(sentence in str(warning.message) for warning in warned)
        assert f"Warning: {len(expected)} requests that benign was scored" in repeats_text(
            repeats_of(files, behaviours)
        )


def test_no_warning_without_a_cause():
    own = OwnBehaviour.of({"name": "paints", "prompts": [{"prompt": t} for t in things("paint")]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _warn_of_shared(shared_rows({"paints": own.behaviour()}))


def test_a_request_cannot_be_harmful_and_benign_in_other_letters():
    files = RequestFiles.of(
        {"harmful": things("break"), "benign": [*things("mend"), "Break thing 3?"]}
    )
    with pytest.raises(ValueError, match=r"1 requests are in .*leave each in one file"):
        request_behaviours(files, prefill="")
