"""What counts as a bridge, and what anything else is told."""

from types import SimpleNamespace

import pytest

from harmcircuits.hooks.bridge import Bridge, as_bridge
from harmcircuits.hooks.weights import named_weights


def test_a_bridge_and_a_model_with_one_are_taken(llama):
    model = SimpleNamespace(bridge=llama, name="a Model is anything with a bridge")
    assert as_bridge(llama) is llama
    assert as_bridge(model) is llama
    for name, parameter in named_weights(model).items():
        assert parameter is named_weights(llama)[name]


def test_other_things_are_refused_by_their_type(llama):
    things = [
        (llama.original_model, "transformers.models.llama"),
        ("meta-llama/Llama", "builtins.str"),
    ]
    for thing, word in things:
        with pytest.raises(ValueError) as error:
            as_bridge(thing)
        assert word in str(error.value)
        assert "open_model" in str(error.value)


def test_the_protocol_is_that_of_a_real_bridge(llama):
    assert isinstance(llama, Bridge)
    assert not isinstance(llama.original_model, Bridge)
