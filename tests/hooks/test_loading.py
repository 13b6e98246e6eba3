"""A bridge from a folder or a loaded Hugging Face model.

Would catch: a copy of the weights or a change in them, another dtype.
"""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from harmcircuits.hooks.loading import load_model, wrap_model
from harmcircuits.hooks.weights import named_weights, weights_digest


@pytest.fixture
def folder(open_model) -> str:
    return open_model("Llama").cfg.model_name


@pytest.mark.parametrize("dtype", ["", "bfloat16"])
def test_the_dtype_is_that_of_the_file_or_of_the_argument(folder, dtype):
    expected = getattr(torch, dtype or "float32")
    weights = named_weights(load_model(folder, dtype=dtype))
    assert {weight.dtype for weight in weights.values()} == {expected}
    model = AutoModelForCausalLM.from_pretrained(folder)
    query = model.model.layers[0].self_attn.q_proj.weight
    assert torch.equal(weights["blocks.0.attn.q.weight"], query.to(expected))


def test_a_loaded_model_keeps_its_weights(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    bridge = wrap_model(model)
    live = {parameter.data_ptr() for parameter in model.parameters()}
    assert {weight.data_ptr() for weight in named_weights(bridge).values()} <= live
    assert weights_digest(bridge) == weights_digest(load_model(folder))
    assert bridge.tokenizer.get_vocab() == AutoTokenizer.from_pretrained(folder).get_vocab()
    assert named_weights(SimpleNamespace(bridge=bridge)).keys() == named_weights(bridge).keys()


@pytest.mark.usefixtures("unchecked")
def test_errors_name_the_model_the_device_or_the_type(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.config._name_or_path = str(tmp_path)
    calls = [
        (lambda: load_model(folder, dtype="int8"), "dtype='int8'"),
        (lambda: load_model(str(tmp_path / "nowhere")), "hub id"),
        (lambda: wrap_model(model), "tokenizer="),
        (lambda: load_model(folder, device="cuda:99"), "cuda:99"),
        (lambda: named_weights(model), "transformers.models.llama"),
        (lambda: named_weights(folder), "builtins.str"),
    ]
    for call, word in calls:
        with pytest.raises(ValueError, match=word):
            call()
