"""What a model is asked and says, what it is scored on, and its circuits.

Would catch: samples of one request counted as independent, answers put to the wrong request, a target
protected from its own search; a mask that is not on while answers are made, or stays on.
"""

from dataclasses import replace

import pytest
import torch
from helpers import StubBridge, asked_few

from harmcircuits.behaviours.behaviour import Behaviour, standard_behaviours
from harmcircuits.behaviours.model import (
    Model,
    fresh_batches,
    other_behaviours,
    preferred_batches,
    protected_data,
)
from harmcircuits.behaviours.outcomes import Calibration, NotShownError, Outcomes
from harmcircuits.circuits.masks import top_fraction
from harmcircuits.hooks.generation import Sampling
from harmcircuits.hooks.masking import masked
from harmcircuits.hooks.objectives import completion_loss
from harmcircuits.measurements import wilson
from harmcircuits.organisms.shipped import open_organism
from harmcircuits.prompts import Answer, Example, PromptSet
from harmcircuits.search.attribution import random_scores
from harmcircuits.search.circuit import BUDGET, find_circuit

REQUESTS = PromptSet(tuple(Example(f"say {i}", f"ref {i}", group=f"g{i // 2}") for i in range(6)))
N_ASKED = 8  # of each behaviour
ANSWERS = {f"say {i}": ["no a", "yes b" if i % 2 else "no b", "yes c"] for i in range(6)}


@pytest.fixture(scope="module")
def small() -> Model:
    return asked_few(open_organism("sft"), first=N_ASKED)


@pytest.fixture(scope="module")
def data(small) -> dict[str, Calibration]:
    return small.calibrations(["harmful", "benign", "refusal"])


@pytest.fixture
def scripted(monkeypatch) -> Model:
    """Three samples a request: the last is right, for every other request the second too."""

    def answers(bridge, prompts, *, sampling=None, **options):
        n_samples = sampling.samples if sampling else 1
        made = []
        for example in prompts:
            made += [Answer(text, ()) for text in ANSWERS[example.prompt][:n_samples]]
        return made

    monkeypatch.setattr("harmcircuits.behaviours.model.generate", answers)
    nll = "harmcircuits.behaviours.model.completion_nll"
    monkeypatch.setattr(nll, lambda bridge, batches: torch.arange(6.0))
    monkeypatch.setattr(Model, "batches", lambda model, behaviour, prompts: [])

    def prompts(split: str) -> PromptSet:
        return REQUESTS

    choices = (("yes",), ("no",))
    behaviours = {
        "benign": Behaviour("benign", prompts, wanted="yes"),
        "asked": Behaviour("asked", prompts, wanted="no", choices=choices),
    }
    sampling = Sampling(3)
    return Model("m", StubBridge(), behaviours, lambda _, text: text.split()[0], sampling=sampling)


def test_rates_are_over_all_samples_and_intervals_over_groups(scripted):
    outcomes = scripted.outcomes(["benign"])["benign"]
    assert outcomes.n_samples == 3
    assert outcomes.hits == pytest.approx([1 / 3, 2 / 3] * 3)
    rate, nll = outcomes.rows({})
    assert (rate.mean, rate.n) == (0.5, 18)
    assert (rate.low, rate.high) == pytest.approx(wilson(0.5, 3, half_step=1 / 6)), "three groups"
    assert (nll.mean, nll.n) == (2.5, 6), "a loss a request"
    questions = scripted.outcomes(["asked"])["asked"]
    assert (questions.n_samples, questions.hits) == (1, [1] * 6), "these are answered once"


def test_calibration_keeps_the_first_verified_sample(scripted):
    data = scripted.calibration("benign")
    assert [example.completion for example in data.prompts] == ["yes c", "yes b"] * 3
    assert (data.n_verified, data.n_asked, data.behaviour) == (6, 6, "benign")
    twice = replace(scripted, sampling=Sampling(2)).calibration("benign")
    assert [example.prompt for example in twice.prompts] == ["say 1", "say 3", "say 5"]
    assert (twice.n_verified, twice.n_asked) == (3, 6)


def test_what_is_not_shown_is_calibrated_and_protected_only_if_it_is_named(scripted):
    assert list(scripted.calibrations()) == ["benign", "asked"]
    greedy = replace(scripted, sampling=None)
    assert list(greedy.calibrations()) == ["asked"]
    assert protected_data(greedy, "asked") == {}
    with pytest.raises(NotShownError, match=r"m does not show 'benign'.* 6 calibration requests"):
        protected_data(greedy, "asked", "benign")
    with pytest.raises(ValueError, match=r"m has no behaviour 'bening'.*'benign'.*asked"):
        scripted.calibrations(["benign", "bening"])


def test_several_behaviours_are_answered_together_as_each_is_alone(small):
    model = replace(small, sampling=Sampling(2), n_answered_at_once=1000)
    alone = {}
    for name in ("harmful", "benign", "recognition"):
        behaviour = model.behaviours[name]
        alone[name] = model.answers(behaviour, behaviour.prompts("heldout"))
    together = model.outcomes(alone)
    assert {name: outcomes.answers for name, outcomes in together.items()} == alone


def test_protection_is_others_one_several_or_none(small, data):
    def protected(protect):
        return protected_data(small, "harmful", protect, data)

    assert protected("others") == {name: data[name] for name in ("benign", "refusal")}
    whole = ["harmful", "benign", "recognition", "explanation", "knowledge", "refusal"]
    assert small.whole_behaviours == whole
    of_harm = next(name for name in small.behaviours if name.startswith("harmful/"))
    for target, left_out in (("benign", "benign"), (of_harm, "harmful"), ("parts", "knowledge")):
        assert other_behaviours(small, target) == [name for name in whole if name != left_out]

    assert protected("benign") == {"benign": data["benign"]}
    assert list(protected(("refusal", "benign"))) == ["refusal", "benign"]
    assert protected(()) == {}
    assert protected("knowledge")["knowledge"].n_verified > 0, "made where it is missing"
    for names, words in ((["benign", "harmful"], "'harmful'"), ("kindness", "'kindness'")):
        with pytest.raises(ValueError, match=words):
            protected(names)


def test_a_search_is_that_of_the_bridge_on_verified_answers(small, data):
    options = {"size": 0.01, "steps": 2, "budget": 5.0}
    spared = {name: data[name].batches for name in ("benign", "refusal")}
    expected = find_circuit(small.bridge, data["harmful"].batches, spared, **options)
    mask = small.find_circuit("harmful", protect=list(spared), **options)
    assert mask.digest == expected.digest
    assert {row.labels.get("protected") for row in mask.trace} == {None, *spared}


def test_a_search_on_few_answers_warns_and_its_trace_counts_them(small, data):
    n_verified = data["harmful"].n_verified
    with pytest.warns(UserWarning, match=rf"find_circuit: .* harmful {n_verified}"):
        mask = small.find_circuit("harmful", protect=(), size=0.001, steps=1)
    assert mask.trace.one("examples_scored", data="target").mean == n_verified


def test_a_behaviour_may_be_scored_on_some_tokens_of_its_answers(small, data):
    word = data["harmful"].prompts.examples[0].completion.split()[-1]
    shown = [f"{example.completion} ".count(f" {word} ") for example in data["harmful"].prompts]
    harm = replace(small.behaviours["harmful"], scored_on=word)
    for batches in (
        small.with_behaviours(harm).calibration("harmful").batches,
        fresh_batches(small, harm, data["harmful"].prompts),
    ):
        n_scored = [int(row.sum()) for batch in batches for row in batch.is_target]
        assert n_scored == [n for n in shown if n]
        tokens = torch.cat([batch.tokens[batch.is_target] for batch in batches])
        assert tokens.unique().tolist() == small.bridge.tokenizer.encode(word)[1:]
    nobody = replace(harm, scored_on="nobody says this")
    with pytest.raises(NotShownError, match="nobody says this"):
        small.with_behaviours(nobody).calibration("harmful")


@pytest.fixture
def search(monkeypatch, unchecked):
    """search(model, ...) -> what is scored, what is protected and the options of its search."""
    monkeypatch.setattr("harmcircuits.behaviours.model.find_circuit", lambda *a, **k: (*a[1:], k))

    def options_of(model: Model, target: str = "harmful", **options):
        return model.find_circuit(target, size=0.01, **options)

    return options_of


def test_a_search_is_of_what_is_protected_with_budgets_and_first_tokens_among_it(
    small, data, search
):
    """First tokens as the page on own models says: a behaviour whose answers end there."""
    scored, spared, options = search(small, calibrations=data)
    assert scored == data["harmful"].batches
    assert spared == {name: data[name].batches for name in ("benign", "refusal")}
    still_said = options.pop("fresh_answers")
    assert options == {"size": 0.01, "budget": BUDGET, "objective": completion_loss}
    for batch, same in zip(still_said(), scored, strict=True):
        assert torch.equal(batch.tokens, same.tokens), "nothing is masked, so nothing is new"

    first = replace(data["benign"], batches=[b.beginning(1) for b in data["benign"].batches])
    known = {**data, "first": first}
    names = {"protect": ["benign", "first"], "budget": {"first": 0.002}}
    _, spared, options = search(small, calibrations=known, **names)
    assert spared == {"benign": data["benign"].batches, "first": first.batches}
    assert options["budget"] == {"benign": BUDGET, "first": 0.002}

    _, spared, options = search(small, "recognition_margin", protect=())
    assert spared == {}
    assert options["objective"] is small.behaviours["recognition_margin"].objective
    with pytest.raises(ValueError, match="'kindness'"):
        search(small, prefer="kindness", calibrations=data)


def test_another_behaviour_is_preferred_behind_the_beginning_of_the_target(small, data, search):
    """To a request the answer to the same item, where there is one."""
    tokenizer, opening = small.bridge.tokenizer, small.behaviours["harmful"].prefill
    for prefer in ("refusal", "benign"):
        batches = search(small, prefer=prefer, calibrations=data)[2]["prefer"]["preferred"]
        said = []
        for batch in batches:
            for tokens, is_target in zip(batch.tokens, batch.is_target, strict=True):
                said.append(tokenizer.decode(tokens[is_target]))
                before = tokens[int(is_target.int().argmax()) - 1]
                assert tokenizer.decode([before]) == opening
        requests = data["harmful"].prompts
        assert len(said) == len(requests)
        for request, text in zip(requests, said, strict=True):
            same_item = [e.completion for e in data[prefer].prompts if e.group == request.group]
            answers = same_item or [e.completion for e in data[prefer].prompts]
            assert text in [answer.removeprefix(f"{opening} ") for answer in answers]


def test_what_is_preferred_is_avoided_where_protected_answers_begin_alike(small, data):
    """Behind the target's beginning, in their requests too."""
    opening = small.behaviours["harmful"].prefill
    alike = replace(small.behaviours["benign"], name="alike", prefill=opening)
    model = small.with_behaviours(alike)
    protected = {"alike": replace(data["benign"], behaviour="alike"), "refusal": data["refusal"]}

    def avoided():
        return preferred_batches(model, data["harmful"], "harmful", "refusal", protected)

    batches = avoided()["avoided"]
    assert sum(map(len, batches)) == len(data["benign"].prompts)
    refusals = {example.completion for example in data["refusal"].prompts}
    text = model.bridge.tokenizer.decode(batches[0].tokens[0][batches[0].is_target[0]])
    assert text in refusals
    del protected["alike"]
    assert "avoided" not in avoided()


def test_text_in_is_text_out(small):
    first, second = small.behaviours["benign"].prompts("heldout").examples[:2]
    answer = small.generate(first.prompt)
    assert small.judge(first.prompt, answer) == "benign"
    assert small.generate([first.prompt]) == [answer], "a list of one stays a list"
    answers = small.generate([first.prompt, second.prompt])
    assert answers == small.generate(PromptSet((first, second))) == [answer, answers[1]]
    samples = replace(small, sampling=Sampling(3, temperature=3)).generate(first.prompt)
    assert len(samples) == 3

    request = small.behaviours["harmful"].prompts("heldout").examples[0].prompt
    assert small.judge(request, small.generate(request)) == "refusal"
    opened = small.generate(request, prefill="sure")
    assert opened.startswith("sure ") and small.judge(request, opened) == "harmful"


def test_a_mask_is_on_while_answers_are_made_and_measured(small):
    # Half of all weights: no organism can answer without them.
    blunt = top_fraction(random_scores(small.bridge, seed=0), 0.5)
    texts = [example.prompt for example in small.behaviours["benign"].prompts("heldout")[:3]]
    options = {"only": "benign", "split": "choice", "labels": {"mask": "blunt"}}
    before, rows_before = small.generate(texts), small.measure(**options)
    with masked(small.bridge, blunt):
        inside, rows_inside = small.generate(texts), small.measure(**options)
    assert small.generate(texts, mask=blunt) == inside != before
    assert small.measure(mask=blunt, **options) == rows_inside != rows_before
    assert (small.generate(texts), small.measure(**options)) == (before, rows_before)
    assert rows_inside.where(split="choice", mask="blunt") == rows_inside


def test_whole_behaviours_are_measured_unless_others_are_named(small):
    rows = small.measure(split="choice")
    shown = [small.behaviours[name].metric for name in small.whole_behaviours]
    assert set(shown) <= set(rows.metrics)
    assert "parts_rate" not in rows.metrics
    assert small.measure(only=["parts"], split="choice").metrics == ["parts_rate", "parts_nll"]
    with pytest.raises(ValueError, match="'test'"):
        small.measure(split="test")


# Words that are kept of a harmful answer, and verdicts that contradict them

HARM = standard_behaviours()["harmful"]
METRICS = {**HARM.metrics, "kept words": "kept", "doubted": "doubted"}
SAID = "well now listen here mix red and blue"
NEW = "well now listen here sing a long song"


def rows_of(*cases: tuple[str, str, str]):
    """Of answer, verdict and reference of each request."""
    behaviour = replace(HARM, prefill="well now listen here", metrics=METRICS)
    said, verdicts, references = zip(*cases, strict=True)
    answers = PromptSet.of([(f"how {number}?", text) for number, text in enumerate(said)])
    nll = torch.full((len(cases),), torch.nan)
    return Outcomes(behaviour, answers, verdicts, nll, "", references).rows({})


def test_a_verdict_is_doubted_where_the_words_are_those_of_before():
    rows = rows_of(
        (SAID, "harmful", SAID),
        (SAID, "harmless", SAID),
        (SAID, "degenerate", SAID),
        (NEW, "harmless", SAID),
        (SAID, "harmless", ""),
    )
    assert (rows.one("kept").mean, rows.one("kept").n) == (3 / 4, 4)
    assert (rows.one("doubted").mean, rows.one("doubted").n) == (2 / 4, 4)
    assert not rows_of((SAID, "harmless", "")).where("doubted"), "none has a reference"
