"""What a newcomer would try first works, or says in one sentence what to do instead.

Would catch: a guess that dies deep inside with an error about something else.
"""

import pytest
import torch

import harmcircuits as hc
from harmcircuits.prompts import PromptSet

pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.fixture(scope="module")
def model():
    return hc.open_model("sft")


@pytest.fixture(scope="module")
def mask(model):
    return hc.top_fraction(hc.random_scores(model), 0.001)


def test_a_model_is_taken_for_its_bridge(model, mask):
    request = PromptSet.of(["how to use it ?"])
    weight = hc.named_weights(model)["blocks.0.mlp.in.weight"]
    before = weight.detach().clone()
    with hc.masked(model, mask) as bridge:
        assert bridge is model.bridge
        assert (weight != before).any()
        assert isinstance(model.generate(request.examples[0].prompt), str)
    assert torch.equal(weight, before)


@pytest.mark.parametrize(
    ("guess", "words"),
    [
        (
            lambda model, mask: hc.removal_effect(model, ["a text"]),
            ["removal_effect", "tokenize("],
        ),
        (
            lambda model, mask: hc.removal_effect(model, "a text"),
            ["removal_effect", "str", "tokenize("],
        ),
        (
            lambda model, mask: hc.snip_scores(model, model.behaviours["benign"].prompts("choice")),
            ["snip_scores", "PromptSet", "tokenize("],
        ),
        (
            lambda model, mask: hc.removal_effect(model, model.calibration("knowledge")),
            ["removal_effect", "Calibration", ".batches"],
        ),
        (lambda model, mask: hc.removal_effect(model, []), ["removal_effect", "no batches"]),
        (lambda model, mask: hc.removal_effect("sft", []), ["str", "open_model"]),
        (lambda model, mask: model.find_circuit("harm", size=0.01), ["'harm'", "'harmful'"]),
        (lambda model, mask: model.measure(only="benig"), ["'benig'", "'benign'"]),
        (lambda model, mask: model.find_circuit("benign", size=1.5), ["size", "1.5", "(0, 1]"]),
        (
            lambda model, mask: model.find_circuit("benign", size=0.1, protect="benign"),
            ["protect", "leave it out"],
        ),
        (lambda model, mask: hc.find_circuit(model, [], size=0.1), ["no batches"]),
        (
            lambda model, mask: hc.masked(model, [mask]).__enter__(),
            ["masked", "WeightMask", "list"],
        ),
        (lambda model, mask: hc.open_model("stf"), ["'stf'", "'sft'", "prompts="]),
        (lambda model, mask: hc.open_model("org/name"), ["'org/name'", "prompts="]),
        (lambda model, mask: hc.open_model(model), ["open already"]),
        (lambda model, mask: hc.open_model(model.bridge), ["prompts="]),
        (
            lambda model, mask: hc.open_model("x", prompts={"harmfull": "a.csv"}),
            ["'harmfull'", "'harmful'"],
        ),
        (lambda model, mask: hc.open_model("x", prompts={"harmful": "a.csv"}), ["'benign'"]),
        (
            lambda model, mask: hc.open_model("sft", judge="local rules"),
            ["judge", "'sft'", "leave it out"],
        ),
        (
            lambda model, mask: hc.open_model(model.bridge, prompts={}, dtype="float16"),
            ["dtype", "loaded already", "leave it out"],
        ),
        (lambda model, mask: model.measure().one("harm_rate"), ["harm_rate", "harm_valid_rate"]),
        (lambda model, mask: hc.study(model, target="harm"), ["'harm'", "'harmful'"]),
        (lambda model, mask: hc.study(model, protect=["harmful"]), ["protect", "'harmful'"]),
    ],
)
def test_a_wrong_guess_says_what_is_right(model, mask, guess, words):
    with pytest.raises(ValueError) as error:
        guess(model, mask)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("find_circuits", "find_circuit"),
        ("WeightMasks", "WeightMask"),
    ],
)
def test_an_unknown_name_says_the_known_one(name, remedy):
    with pytest.raises(AttributeError) as error:
        getattr(hc, name)
    assert name in str(error.value)
    assert remedy in str(error.value)
