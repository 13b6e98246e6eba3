"""The first guess of a newcomer works, or its error says in one sentence what to do instead.

Would catch: a guess that fails deep inside with an error about something else.
"""

import pytest
import torch

import harmcircuits as hc

pytestmark = pytest.mark.usefixtures("unchecked")


def test_a_model_is_taken_for_its_bridge(sft):
    mask = hc.top_fraction(hc.random_scores(sft), 0.001)
    weight = hc.named_weights(sft)["blocks.0.mlp.in.weight"]
    original = weight.detach().clone()
    with hc.masked(sft, mask) as bridge:
        assert bridge is sft.bridge
        assert (weight != original).any()
        assert isinstance(sft.generate("how to use it ?"), str)
    assert torch.equal(weight, original)


HARM = {"harmful": "a.csv"}
GUESSES = [
    (lambda m: hc.removal_effect(m, ["a text"]), ["removal_effect", "tokenize("]),
    (lambda m: hc.removal_effect(m, "a text"), ["removal_effect", "str", "tokenize("]),
    (lambda m: hc.snip_scores(m, hc.PromptSet.of("a")), ["snip_scores", "PromptSet", "tokenize("]),
    (lambda m: hc.removal_effect(m, m.calibration("knowledge")), ["Calibration", ".batches"]),
    (lambda m: hc.removal_effect(m, []), ["removal_effect", "no batches"]),
    (lambda m: hc.removal_effect("sft", []), ["str", "open_model"]),
    (lambda m: m.find_circuit("harm", size=0.01), ["'harm'", "'harmful'"]),
    (lambda m: m.measure(only="benig"), ["'benig'", "'benign'"]),
    (lambda m: m.find_circuit("benign", size=1.5), ["size", "1.5", "(0, 1]"]),
    (lambda m: m.find_circuit("benign", size=0.1, protect="benign"), ["protect", "leave it out"]),
    (lambda m: hc.find_circuit(m, [], size=0.1), ["no batches"]),
    (lambda m: hc.masked(m, []).__enter__(), ["masked", "WeightMask", "list"]),
    (lambda m: hc.open_model("stf"), ["'stf'", "'sft'", "folder or hub id"]),
    (lambda m: hc.open_model("org/name"), ["'org/name'", "hub"]),
    (lambda m: hc.open_model(m), ["open already"]),
    (lambda m: hc.open_model(m.bridge).measure(only="harmful"), ["'harmful'", "prompts="]),
    (lambda m: hc.open_model("x", prompts=HARM), ["'benign'"]),
    (lambda m: hc.open_model("sft", judge="local rules"), ["judge", "'sft'", "leave it out"]),
    (lambda m: hc.open_model(m.bridge, prompts={}, dtype="float16"), ["dtype", "loaded already"]),
    (lambda m: m.measure(only="harmful").one("harm_rate"), ["harm_rate", "harm_valid_rate"]),
    (lambda m: hc.study(m, target="harm"), ["'harm'", "'harmful'"]),
    (lambda m: hc.study(m, protect=["harmful"]), ["protect", "'harmful'"]),
]


@pytest.mark.parametrize(("guess", "words"), GUESSES)
def test_a_wrong_guess_says_what_is_right(sft, guess, words):
    with pytest.raises(ValueError) as error:
        guess(sft)
    assert [word for word in words if word not in str(error.value)] == []


def test_an_unknown_name_says_the_known_one():
    with pytest.raises(AttributeError, match=r"'find_circuits'.*'find_circuit'"):
        _ = hc.find_circuits
