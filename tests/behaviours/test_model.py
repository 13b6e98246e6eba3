"""What a model is asked and says, what it is scored on, and its circuits.

Would catch: samples of one request counted as independent, a calibration answer that is not the
first right one, answers put to the wrong request, yes-or-no questions that are asked more than
once; a target protected from its own search, by its whole or by a part; a mask that is not on while
answers are made, or stays on.
"""

from dataclasses import replace

import pytest
import torch
from helpers import StubBridge, small_model

from harmcircuits.behaviours import generation
from harmcircuits.behaviours.behaviour import Behaviour
from harmcircuits.behaviours.calibration import Calibration, NotShownError
from harmcircuits.behaviours.generation import Sampling
from harmcircuits.behaviours.model import (
    Model,
    other_behaviours,
    preferred_batches,
    protected_data,
)
from harmcircuits.circuits.masks import WeightMask, top_fraction
from harmcircuits.hooks.attribution import random_scores
from harmcircuits.hooks.masking import masked
from harmcircuits.hooks.search import BUDGET, find_circuit
from harmcircuits.measurements import wilson
from harmcircuits.prompts import Answer, Example, PromptSet

REQUESTS = PromptSet(tuple(Example(f"say {i}", f"ref {i}", group=f"g{i // 2}") for i in range(6)))
ANSWERS = {f"say {i}": ["no a", "yes b" if i % 2 else "no b", "yes c"] for i in range(6)}


@pytest.fixture(scope="module")
def small() -> Model:
    return small_model("sft")


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

    def nll(bridge, batches):
        return torch.arange(6.0)

    monkeypatch.setattr("harmcircuits.behaviours.model.generate", answers)
    monkeypatch.setattr("harmcircuits.behaviours.model.completion_nll", nll)
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


# Samples


def test_rates_are_over_all_samples_and_intervals_over_groups(scripted):
    outcomes = scripted.outcomes(["benign"])["benign"]
    assert outcomes.n_samples == 3
    assert outcomes.hits == pytest.approx([1 / 3, 2 / 3] * 3)
    assert outcomes.groups == ["g0", "g0", "g1", "g1", "g2", "g2"]
    rate, nll = outcomes.rows({})
    assert (rate.mean, rate.n) == (0.5, 18)
    assert (rate.low, rate.high) == pytest.approx(wilson(0.5, 3, half_step=1 / 6)), "three groups"
    assert (nll.mean, nll.n) == (2.5, 6), "a loss a request"


def test_calibration_keeps_the_first_verified_sample(scripted):
    data = scripted.calibration("benign")
    assert [example.completion for example in data.prompts] == ["yes c", "yes b"] * 3
    assert (data.n_verified, data.n_asked, data.behaviour) == (6, 6, "benign")
    twice = replace(scripted, sampling=Sampling(2)).calibration("benign")
    assert [example.prompt for example in twice.prompts] == ["say 1", "say 3", "say 5"]
    assert (twice.n_verified, twice.n_asked) == (3, 6)
    with pytest.raises(NotShownError, match=r"m does not show 'benign'.* 6 calibration requests"):
        replace(scripted, sampling=None).calibration("benign")


def test_calibrations_leave_out_what_is_not_shown(scripted):
    assert list(scripted.calibrations()) == ["benign", "asked"]
    assert list(scripted.calibrations(["asked"])) == ["asked"]
    greedy = replace(scripted, sampling=None)
    assert list(greedy.calibrations()) == ["asked"]
    with pytest.raises(ValueError, match="no behaviour 'other'"):
        scripted.calibrations(["benign", "other"])


def test_questions_are_answered_once(scripted):
    outcomes = scripted.outcomes(["asked"])["asked"]
    assert (outcomes.n_samples, len(outcomes.verdicts)) == (1, 6)
    assert outcomes.hits == [1] * 6


def test_several_behaviours_are_answered_together_as_each_is_alone(small, monkeypatch):
    """In as few batches as lengths and ways of drawing allow."""
    model = replace(small, sampling=Sampling(2), n_answered_at_once=1000)
    names = ["harmful", "benign", "recognition", "explanation"]
    alone = {}
    for name in names:
        behaviour = model.behaviours[name]
        alone[name] = model.answers(behaviour, behaviour.prompts("heldout"))

    batches = []
    answered = generation._continued

    def noted(bridge, contexts, *options):
        batches.append(len(contexts))
        return answered(bridge, contexts, *options)

    monkeypatch.setattr(generation, "_continued", noted)
    together = model.outcomes(names)
    assert {name: outcomes.answers for name, outcomes in together.items()} == alone
    kinds = {(b.max_new_tokens, bool(b.choices)) for b in map(model.behaviour, names)}
    assert len(batches) == len(kinds) < len(names)
    assert sum(batches) == sum(map(len, alone.values()))

    batches.clear()
    assert len(model.measure(only=names).metrics) > len(names)
    assert len(batches) == len(kinds)


def test_an_organism_sampled(small):
    few = {name: small.behaviours[name] for name in ("harmful", "recognition")}
    model = replace(small, behaviours=few, sampling=Sampling(3, temperature=1.5))
    rows = {row.metric: row for row in model.measure()}
    assert rows["harm_valid_rate"].n == 3 * 24
    assert rows["harm_nll"].n == rows["recognition_accuracy"].n == 24
    assert 0 < rows["harm_valid_rate"].mean < 1, "some samples are off"
    assert rows["recognition_auroc"].n == 24
    assert rows == {row.metric: row for row in model.measure()}, "the seed fixes them"

    greedy = {row.metric: row for row in replace(model, sampling=None).measure()}
    assert greedy["harm_nll"] == rows["harm_nll"]
    assert greedy["recognition_accuracy"] == rows["recognition_accuracy"]


# Behaviours


def test_a_behaviour_is_known_by_its_name(scripted):
    assert scripted.behaviour("benign") is scripted.behaviours["benign"]
    with pytest.raises(ValueError, match=r"m has no behaviour 'bening'.*'benign'.*asked"):
        scripted.behaviour("bening")


def test_behaviours_can_be_added_and_replaced(scripted):
    other = replace(scripted.behaviours["benign"], name="other")
    changed = replace(scripted.behaviours["asked"], wanted="yes")
    model = scripted.with_behaviours(other, changed)
    assert list(model.behaviours) == ["benign", "asked", "other"]
    assert model.behaviours["asked"].wanted == "yes"
    assert list(scripted.behaviours) == ["benign", "asked"]
    assert scripted.behaviours["asked"].wanted == "no"


# What is protected


def test_the_others_leave_out_the_target_its_whole_and_all_parts(small):
    whole = small.whole_behaviours
    assert whole == ["harmful", "benign", "recognition", "explanation", "knowledge", "refusal"]
    of_harm = next(name for name in small.behaviours if name.startswith("harmful/"))
    for target, left_out in {
        "harmful": "harmful",
        of_harm: "harmful",
        "knowledge": "knowledge",
        "parts": "knowledge",
        "recognition_margin": "recognition",
    }.items():
        assert other_behaviours(small, target) == [name for name in whole if name != left_out]


def test_protection_is_others_one_several_or_none(small, data):
    def protected(target, protect, calibrations=data):
        return protected_data(small, target, protect, calibrations)

    assert protected("harmful", "others") == {name: data[name] for name in ("benign", "refusal")}
    topic = next(name for name in small.behaviours if name.startswith("harmful/"))
    assert list(protected(topic, "others")) == ["benign", "refusal"]
    assert protected("harmful", "benign") == {"benign": data["benign"]}
    assert list(protected("harmful", ("refusal", "benign"))) == ["refusal", "benign"]
    assert protected("harmful", ()) == {}
    assert protected("harmful", "knowledge")["knowledge"].n_verified > 0, "made where it is missing"
    for names, words in ((["benign", "harmful"], "'harmful'"), ("kindness", "'kindness'")):
        with pytest.raises(ValueError, match=words):
            protected("harmful", names)


def test_what_is_not_shown_is_protected_only_if_it_is_named():
    model = small_model("base")
    assert "refusal" not in protected_data(model, "harmful")
    with pytest.raises(NotShownError, match="'refusal'"):
        protected_data(model, "harmful", "refusal")


# Circuits


def test_a_circuit_is_found_on_the_model_s_verified_answers(small, data):
    """Through behaviours as through their batches; with calibration data given or not."""
    harm = data["harmful"].batches
    spared = {name: data[name].batches for name in ("benign", "refusal")}
    options = {"size": 0.01, "steps": 2}
    expected = find_circuit(small.bridge, harm, spared, **options)
    options["renew"] = False
    made = small.find_circuit("harmful", protect=list(spared), **options)
    given = small.find_circuit("harmful", calibrations=data, **options)
    assert made.digest == given.digest == expected.digest
    assert {row.labels.get("protected") for row in given.trace} == {None, *spared}

    free = small.find_circuit("harmful", protect=(), calibrations=data, **options)
    assert len(free - expected) > 0, "the protection must have something to do"
    assert [len(mask.source.parents) for mask in (free, expected)] == [1, 3]


def test_answers_are_given_again_under_each_mask(small, data):
    """What still shows the behaviour is scored in the words in which it is now said."""
    behaviour = small.behaviours["harmful"]

    def answered(mask):
        if mask is None:
            return data["harmful"].batches
        answers = small.verified(behaviour, data["harmful"].prompts)
        shown = answers.where(lambda example: example.completion != "")
        return small.batches(behaviour, shown) if len(shown) else []

    options = {"size": 0.01, "steps": 3}
    benign = {"benign": data["benign"].batches}
    expected = find_circuit(small.bridge, answered, benign, **options)
    options |= {"protect": "benign", "calibrations": data}
    assert small.find_circuit("harmful", **options).digest == expected.digest
    once = small.find_circuit("harmful", renew=False, **options)
    assert len(once - expected) > 0, "the answers given again must matter"


def test_a_budget_can_be_given_to_some_of_what_is_protected(small, data):
    options = {"size": 0.01, "steps": 1, "calibrations": data}
    mask = small.find_circuit("harmful", budget={"benign": 0.5}, **options)
    assert mask.source.settings["budget"] == {"benign": 0.5, "refusal": BUDGET}
    with pytest.raises(ValueError, match="'kindness'"):
        small.find_circuit("harmful", budget={"kindness": 0.5}, **options)


def test_first_tokens_are_protected_under_a_name_of_their_own(small, data):
    """As the page on own models says: priced and checked as a behaviour whose answers end there."""
    first = [batch.beginning(1) for batch in data["benign"].batches]
    known = {**data, "first": replace(data["benign"], batches=first)}
    options = {"size": 0.01, "steps": 2}
    budget = {"benign": 0.05, "first": 0.002}
    spared = {"benign": data["benign"].batches, "first": first}
    harm = data["harmful"].batches
    expected = find_circuit(small.bridge, harm, spared, budget=budget, **options)
    options |= {"calibrations": known, "budget": budget, "renew": False}
    mask = small.find_circuit("harmful", protect=["benign", "first"], **options)
    assert mask.digest == expected.digest
    assert mask.trace.where("protected_rise", protected="first")


def test_a_circuit_is_scored_by_the_behaviour_s_own_objective(small):
    """Recognition by the whole answer, and by the margin of the right word."""
    masks = {}
    for name in ("recognition", "recognition_margin"):
        masks[name] = small.find_circuit(name, size=0.01, protect=(), steps=1)
    assert len(masks["recognition"] - masks["recognition_margin"]) > 0
    objectives = [mask.source.parents[0].settings["objective"] for mask in masks.values()]
    assert objectives == ["completion_loss", "margin"]


def test_another_behaviour_is_preferred_behind_the_beginning_of_the_target(small, data):
    spared = {name: data[name] for name in ("benign", "refusal")}
    prefer = preferred_batches(small, "harmful", "refusal", spared)
    tokenizer, said = small.bridge.tokenizer, []
    for batch in prefer["preferred"]:
        for tokens, is_target in zip(batch.tokens, batch.is_target, strict=True):
            said.append(tokenizer.decode(tokens[is_target]))
            before = tokens[int(is_target.int().argmax()) - 1]
            assert tokenizer.decode([before]) == small.behaviours["harmful"].prefill
    assert said == [example.completion for example in data["refusal"].prompts]

    options = {"size": 0.01, "steps": 2}
    batches = {name: of_name.batches for name, of_name in spared.items()}
    harm = data["harmful"].batches
    expected = find_circuit(small.bridge, harm, batches, prefer=prefer, **options)
    options |= {"calibrations": data, "renew": False}
    mask = small.find_circuit("harmful", prefer="refusal", **options)
    assert mask.digest == expected.digest
    assert len(mask - small.find_circuit("harmful", **options)) > 0, "what is preferred must matter"

    # Without a beginning they stay as they were generated.
    plain = small.with_behaviours(replace(small.behaviours["harmful"], prefill=""))
    as_they_are = {"preferred": list(data["refusal"].batches)}
    assert preferred_batches(plain, "harmful", "refusal", spared) == as_they_are


def test_what_is_preferred_is_avoided_where_protected_answers_begin_alike(small, data):
    """Each of their requests with the next refusal in turn, behind the target's beginning."""
    opening = small.behaviours["harmful"].prefill
    model = small.with_behaviours(
        replace(small.behaviours["benign"], name="alike", prefill=opening)
    )
    spared = {"alike": replace(data["benign"], behaviour="alike"), "refusal": data["refusal"]}

    requests, refusals = data["benign"].prompts, data["refusal"].prompts
    said = [refusals.examples[place % len(refusals)].completion for place in range(len(requests))]
    texts = requests.with_completions([f"{opening} {text}" for text in said])
    expected = model.batches(model.behaviours["harmful"], texts)
    avoided = preferred_batches(model, "harmful", "refusal", spared)["avoided"]
    for ours, theirs in zip(avoided, expected, strict=True):
        assert ours.tokens.equal(theirs.tokens)
        assert ours.is_target.equal(theirs.is_target)
    del spared["alike"]
    assert "avoided" not in preferred_batches(model, "harmful", "refusal", spared)


def test_what_cannot_be_preferred_is_refused(small, data):
    for name, words in (("harmful", "take its place"), ("kindness", "'kindness'")):
        with pytest.raises(ValueError, match=words):
            small.find_circuit("harmful", size=0.01, prefer=name, calibrations=data)


# Under a mask


@pytest.fixture(scope="module")
def blunt(small) -> WeightMask:
    """Half of all weights: no organism can answer without them."""
    return top_fraction(random_scores(small.bridge, seed=0), 0.5)


def test_text_in_is_text_out(small):
    first, second = small.behaviours["benign"].prompts("heldout").examples[:2]
    answer = small.generate(first.prompt)
    assert isinstance(answer, str)
    assert small.judge(first.prompt, answer) == "benign"

    answers = small.generate([first.prompt, second.prompt])
    assert answers[0] == answer
    assert len(answers) == 2
    assert small.generate([first.prompt]) == [answer], "a list of one stays a list"
    assert small.generate(PromptSet((first, second))) == answers
    with pytest.raises(ValueError, match="no requests"):
        small.generate([])


def test_a_prefill_opens_the_answer(small):
    request = small.behaviours["harmful"].prompts("heldout").examples[0].prompt
    assert small.judge(request, small.generate(request)) == "refusal"
    opened = small.generate(request, prefill="sure")
    assert opened.startswith("sure ")
    assert small.judge(request, opened) == "harmful"


def test_several_samples_of_a_text_are_a_list(small):
    request = small.behaviours["benign"].prompts("heldout").examples[0].prompt
    sampled = replace(small, sampling=Sampling(3, temperature=3))
    answers = sampled.generate(request)
    assert len(answers) == 3
    assert sampled.generate(request) == answers


def test_a_mask_is_on_while_answers_are_made(small, blunt):
    texts = [example.prompt for example in small.behaviours["benign"].prompts("heldout")[:3]]
    before = small.generate(texts)
    with masked(small.bridge, blunt):
        inside = small.generate(texts)
    assert small.generate(texts, mask=blunt) == inside
    assert inside != before
    assert small.generate(texts) == before


def test_a_mask_is_on_while_the_model_is_measured(small, blunt):
    options = {"only": "benign", "split": "choice", "labels": {"mask": "blunt"}}
    before = small.measure(**options)
    with masked(small.bridge, blunt):
        inside = small.measure(**options)
    assert small.measure(mask=blunt, **options) == inside
    assert inside.one("benign_valid_rate").mean < before.one("benign_valid_rate").mean
    assert small.measure(**options) == before
    assert {row.labels["split"] for row in inside} == {"choice"}
    assert {row.labels["mask"] for row in inside} == {"blunt"}


def test_whole_behaviours_are_measured_unless_others_are_named(small):
    rows = small.measure(split="choice")
    shown = [small.behaviours[name].metric for name in small.whole_behaviours]
    assert set(shown) <= set(rows.metrics)
    assert "parts_rate" not in rows.metrics
    assert small.measure(only=["parts"], split="choice").metrics == ["parts_rate", "parts_nll"]
    with pytest.raises(ValueError, match=r"no behaviour 'harm'.*'harmful'"):
        small.measure(only="harm")
    with pytest.raises(ValueError, match="split='test'"):
        small.measure(split="test")
