"""Request files as behaviours: pairs, questions and kinds, on texts that ask for nothing.

Would catch: pairs that do not belong together, a request that is harmful and benign, one that is
scored and measured, one that moves because of others, one that is dropped without a word.
"""

import json
import pickle
import random
from dataclasses import replace

import pytest

import harmcircuits as hc
from harmcircuits.behaviours.repeats import (
    IN_TWO_SPLITS,
    REPEATED,
    leak_texts,
    repeat_rows,
    repeats_text,
)
from harmcircuits.behaviours.request_files import (
    RequestFiles,
    nearest_pairs,
    request_behaviours,
    request_pairs,
)
from harmcircuits.behaviours.request_judge import QuestionTemplates
from harmcircuits.prompts import SPLITS, Example, PromptSet, joined_clusters, plain_text


def requests(verb: str, n: int = 60) -> list[str]:
    return [f"{verb} thing {number}" for number in range(n)]


def things(verb: str) -> list[dict[str, str]]:
    rows = []
    for n, prompt in enumerate(requests(verb)):
        rows.append({"prompt": prompt, "category": "ab"[n % 2], "group": f"{verb}{n}"})
    return rows


def labelled_pairs() -> list[dict[str, str]]:
    rows = []
    for n in range(40):
        rows.append({"prompt": f"ruin it {n}", "group": str(n), "label": "unsafe"})
        rows.append({"prompt": f"kill process it {n}", "group": str(n), "label": "safe"})
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
    assert files.requests["harmful"].examples == (Example("break it", category="x"),)
    assert files.requests["benign"].examples == (Example("mend it", category="y"),)
    shape = files.requests["harmful"].shape
    assert "bad.csv" in shape and "1 request" in shape
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


def test_pairs_by_group_and_by_category():
    given = (
        Example("bad one", group="g", label="unsafe"),
        Example("good two", category="x", label="safe"),
        Example("good one", group="g", label="safe"),
        Example("bad two", category="contrast_x", label="harmful"),
        Example("alone", category="y", label="harmless"),
    )
    with pytest.warns(UserWarning, match="1 request without a partner"):
        found = request_pairs(PromptSet(given))
    pairs = [(bad.prompt, good.prompt) for bad, good in found]
    assert pairs == [("bad one", "good one"), ("bad two", "good two")]
    with pytest.raises(ValueError, match="f: "):
        request_pairs(PromptSet.of([Example("a", label="maybe")]), "f")


def test_nearest_pairs_use_each_once():
    bad, good = PromptSet.of(["12345", "123456", "1"]), PromptSet.of(["abcdef", "ab", "abcdefgh"])
    pairs = [(first.prompt, second.prompt) for first, second in nearest_pairs(bad, good)]
    assert pairs == [("12345", "abcdef"), ("123456", "abcdefgh"), ("1", "ab")]


def test_behaviours_and_what_their_prompts_are(files):
    behaviours, kinds = request_behaviours(files, prefill="Well,")
    begun = {name for name, behaviour in behaviours.items() if behaviour.prefill == "Well,"}
    assert begun == {"harmful", "prefilled"}
    others = {"benign", "recognition", "explanation", "refusal", "borderline"}
    assert behaviours.keys() - begun == others
    counted = set(behaviours["harmful"].metrics)
    assert {"refusal", "harmless", "degenerate", "kept words", "doubted"} <= counted
    for split in SPLITS:
        harmful = behaviours["harmful"].prompts(split)
        assert behaviours["refusal"].prompts(split) == harmful
        assert not any(example.completion for example in harmful)
        for question, request in zip(
            behaviours["explanation"].prompts(split), harmful, strict=True
        ):
            assert request.prompt in question.prompt and request.group == question.group

        questions = behaviours["recognition"].prompts(split).examples
        for bad, good in zip(questions[::2], questions[1::2], strict=True):
            assert (bad.completion, good.completion) == ("No", "Yes")
            assert bad.group == good.group
            assert f"ruin it {bad.group}" in bad.prompt
            assert f"kill process it {good.group}" in good.prompt
        assert all(example.label == "safe" for example in behaviours["borderline"].prompts(split))
        for behaviour in behaviours.values():
            assert {example.prompt for example in behaviour.prompts(split)} <= kinds.keys()


def test_without_pairs_harmful_requests_meet_benign_ones(files):
    behaviours, _ = request_behaviours(RequestFiles(files.harmful, files.benign), prefill="")
    assert not {"borderline", "prefilled"} & behaviours.keys()
    for number, example in enumerate(behaviours["recognition"].prompts("heldout")):
        assert ("break", "mend")[number % 2] in example.prompt


def test_a_request_cannot_be_harmful_and_benign(files):
    benign = PromptSet.of([*(row["prompt"] for row in things("mend")), "Break thing 3?"])
    with pytest.raises(ValueError, match=r"1 request of .*bad\.jsonl"):
        request_behaviours(RequestFiles(files.harmful, benign), prefill="")


# Requests that ask the same as others: where they end, and what is said of them


def varied(text: str) -> str:
    """The same words with other capitals, spaces and punctuation."""
    return f"- {'  '.join(text.title().split())}!"


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
    alone = PromptSet.of(requests("paint"))
    again = []
    for text in generator.sample(requests("paint"), 20):
        group = generator.choice(["", "", f"group {generator.randrange(5)}"])
        again.append(Example(varied(text), group=group))
    mixed = [*alone, *again]
    generator.shuffle(mixed)
    sets = PromptSet(tuple(mixed)).splits()
    assert sum(len(texts_of(sets, split)) for split in SPLITS) == 60, "each in one split"
    assert sum(map(len, sets.values())) == 80, "none is lost"
    groups = [{example.cluster for example in members} for members in sets.values()]
    assert sum(map(len, groups)) == len(set().union(*groups))

    repeated = [varied(text) for text in requests("paint", 5)]
    joined = PromptSet.of([*alone, *repeated]).splits()
    for split, members in alone.splits().items():
        assert set(members) <= set(joined[split]), "what does not repeat stays where it is"


def test_counts_say_what_became_of_each():
    harmful = [*requests("break"), "Break thing 2!", "break  THING 3"]
    given = {"harmful": harmful, "harmful_heldout": ["break thing 7.", "break thing 98", "a", "b"]}
    given["benign"] = [*requests("mend"), "mend thing 4", "mend thing 4"]
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
        for text, label in ((f"ruin it {number}", "unsafe"), (safe, "safe")):
            pairs.append({"prompt": text, "label": label, "group": str(number)})
    given = {"harmful": requests("break"), "benign": requests("mend"), "pairs": pairs}
    behaviours, _ = request_behaviours(RequestFiles.of(given), prefill="")
    sets = {split: behaviours["recognition"].prompts(split) for split in SPLITS}
    of_splits = [texts_of(sets, split) for split in SPLITS]
    assert sum(map(len, of_splits)) == len(set().union(*of_splits))
    assert sum(map(len, sets.values())) == 80


def test_requests_that_two_behaviours_share_are_counted():
    given, heldout = PromptSet.of(requests("mend")), requests("mend", 30)
    files = RequestFiles.of({"harmful": requests("break"), "benign": requests("mend")})
    for shared in (given, given.splits(PromptSet.of(heldout))):
        behaviours, _ = request_behaviours(files, [hc.Behaviour("own", shared, "w")], prefill="")
        rows = repeat_rows(behaviours)
        assert bool(rows.where(IN_TWO_SPLITS)) == (shared is not given)

    sets = behaviours["benign"].prompts.sets
    n_both = len(texts_of(sets, *SPLITS[:2]) & set(map(plain_text, heldout)))
    assert rows.one(IN_TWO_SPLITS, behaviour="benign", measured="own").mean == n_both
    (sentence,) = [text for text in leak_texts(rows) if f"{n_both} requests that benign" in text]
    assert f"Warning: {sentence}" in repeats_text(rows)


def test_questions_are_where_their_requests_are_and_the_counter_looks_at_these():
    texts = {"harm": [], "good": [], "other harm": [], "other good": []}
    pairs = []
    for name, requests in texts.items():
        for number in range(20 if "other" in name else 120):
            requests.append(f"{name} {number}")
            if "harm" in name:
                group = {"group": f"of {requests[-1]}"}
                pairs.append(Example(requests[-1], **group, label="unsafe"))
                pairs.append(Example(f"twin of {requests[-1]}", **group, label="safe"))
    harmful, benign, *heldout = map(PromptSet.of, texts.values())
    held_out_files = {"harmful_heldout": heldout[0], "benign_heldout": heldout[1]}
    files = RequestFiles(harmful, benign, pairs=PromptSet(tuple(pairs)), **held_out_files)
    behaviours, _ = request_behaviours(files, prefill="")
    calibration = {
        example.prompt for split in SPLITS[:2] for example in behaviours["harmful"].prompts(split)
    }
    recognition = behaviours["recognition"]
    questions = recognition.prompts("heldout")
    assert len(questions) == 40
    requests = [example.prompt.split("Request: ")[1] for example in questions]
    assert not calibration & set(requests)
    assert not repeat_rows(behaviours).where(IN_TWO_SPLITS)

    # Questions that ask about what is scored elsewhere are counted by their requests.
    about = recognition.prompts.subjects
    leaking_prompts = replace(
        recognition.prompts, subjects={**about, "heldout": about["calibration"]}
    )
    leaking = {**behaviours, "recognition": replace(recognition, prompts=leaking_prompts)}
    rows = repeat_rows(leaking).where(IN_TWO_SPLITS, behaviour="harmful", measured="recognition")
    assert rows[0].mean == len(about["calibration"]) / 2


def test_requests_without_a_partner_are_left_out_with_a_warning():
    sides = ["unsafe"] * 3 + ["safe"]
    examples = [Example(f"q{n}", category="a", label=side) for n, side in enumerate(sides)]
    with pytest.warns(UserWarning, match="2 requests without a partner"):
        assert len(request_pairs(PromptSet(tuple(examples)))) == 1


def test_a_second_pair_of_a_group_changes_no_split():
    harmful = PromptSet(tuple(Example(f"harm {n}", group=f"g{n}") for n in range(40)))
    heldout = PromptSet(tuple(Example(f"late harm {n}", group=f"h{n}") for n in range(20)))
    rows = []
    for example in (*harmful, *heldout):
        for prefix in ("", "another "):  # the second pair is in no other file
            for label in ("unsafe", "safe"):
                prompt = f"{prefix}{'' if label == 'unsafe' else 'safe '}{example.prompt}"
                rows.append(Example(prompt, group=example.group, label=label))
    benign = requests("mend")
    files = RequestFiles(harmful, PromptSet.read(benign), heldout, pairs=PromptSet(tuple(rows)))
    behaviours, _ = request_behaviours(files, prefill="")
    subjects = behaviours["recognition"].prompts.subjects
    for split in SPLITS:
        shared = {request.prompt for request in behaviours["harmful"].prompts(split)}
        assert shared < {request.prompt for request in subjects[split]}
    assert not leak_texts(repeat_rows(behaviours))


def test_a_pair_of_two_splits_is_left_out():
    """The harmful request of each pair is held out, and the harmless one is in calibration."""
    names = {"harmful": "break", "benign": "mend"}
    behaviours, _ = request_behaviours(
        RequestFiles(**{name: PromptSet.read(requests(verb)) for name, verb in names.items()}),
        prefill="",
    )
    late = behaviours["harmful"].prompts("heldout").examples[:5]
    early = behaviours["benign"].prompts("calibration").examples[:5]
    rows = labelled_pairs()
    for n, (unsafe, safe) in enumerate(zip(late, early, strict=True)):
        rows.append({"prompt": unsafe.prompt, "group": f"two{n}", "label": "unsafe"})
        rows.append({"prompt": safe.prompt, "group": f"two{n}", "label": "safe"})
    sources = {name: PromptSet.read(requests(verb)) for name, verb in names.items()}
    files = RequestFiles(**sources, pairs=PromptSet.read(rows))
    behaviours, _ = request_behaviours(files, prefill="")
    assert not leak_texts(repeat_rows(behaviours))
    subjects = behaviours["recognition"].prompts.subjects
    n_pairs = sum(len(subjects[split]) for split in SPLITS) / 2
    assert n_pairs == 40


def test_requests_of_all_splits_are_counted():
    prompts = PromptSet.read(requests("break", 20))
    behaviour = hc.Behaviour("x", dict.fromkeys(SPLITS, prompts))
    (text,) = leak_texts(repeat_rows({"x": behaviour}))
    assert text.startswith("20 requests that x was scored or chosen on are held out for x")
