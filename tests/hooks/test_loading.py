"""A bridge from a folder, and from a Hugging Face model that is already loaded.

Would catch: weights that are copied or changed on the way, a dtype other than the stored one, a
folder that is opened as something it is not, a number format that the processor is slow in and
nobody says so.
"""

import re

import pytest
import torch
from helpers import write_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from harmcircuits.hooks import loading
from harmcircuits.hooks.loading import load_model, slow_dtype, slowdown, usual_dtype, wrap_model
from harmcircuits.hooks.weights import named_weights, weights_digest


@pytest.fixture
def folder(tmp_path) -> str:
    write_model("Llama", tmp_path / "llama")
    return str(tmp_path / "llama")


@pytest.mark.parametrize("dtype", ["", "float32", "bfloat16"])
def test_a_folder_is_opened_as_stored_unless_a_dtype_is_given(folder, dtype):
    expected = getattr(torch, dtype or "float32")
    weights = named_weights(load_model(folder, dtype=dtype))
    assert {weight.dtype for weight in weights.values()} == {expected}
    stored = AutoModelForCausalLM.from_pretrained(folder)
    query = stored.model.layers[0].self_attn.q_proj.weight
    assert torch.equal(weights["blocks.0.attn.q.weight"], query.to(expected))


def test_a_loaded_model_keeps_its_weights(folder):
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    bridge = wrap_model(loaded)
    live = {parameter.data_ptr() for parameter in loaded.parameters()}
    assert {weight.data_ptr() for weight in named_weights(bridge).values()} <= live
    assert weights_digest(bridge) == weights_digest(load_model(folder))
    assert bridge.tokenizer.get_vocab() == AutoTokenizer.from_pretrained(folder).get_vocab()


def test_a_tokenizer_is_given_or_stored_with_the_model(folder, tmp_path):
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    loaded.config._name_or_path = str(tmp_path)
    with pytest.raises(ValueError, match=r"no tokenizer is stored at .*give tokenizer="):
        wrap_model(loaded)
    loaded.config._name_or_path = folder
    assert wrap_model(loaded, tokenizer).tokenizer.get_vocab() == tokenizer.get_vocab()


@pytest.fixture
def slow_in_bfloat16(monkeypatch):
    """A processor that is, and models that are wide enough for it to matter."""
    monkeypatch.setattr(loading, "WIDE", 1)
    monkeypatch.setattr(loading, "slowdown", lambda dtype: 40 if dtype == torch.bfloat16 else 1)


@pytest.mark.usefixtures("slow_in_bfloat16")
def test_a_slow_number_format_is_said_with_the_faster_one(folder, monkeypatch):
    whole, half = load_model(folder), load_model(folder, dtype="bfloat16")
    said = slow_dtype(half, "cpu")
    assert re.search(r"40 times .* bfloat16 .* float32; give dtype='float32'", said)
    assert slow_dtype(whole, "cpu") == slow_dtype(half, "cuda") == ""
    monkeypatch.setattr(loading, "WIDE", 10**9)
    assert not slow_dtype(half, "cpu"), "a narrow model is fast anyhow"


@pytest.mark.usefixtures("slow_in_bfloat16")
def test_the_usual_number_format_is_the_stored_one_unless_that_is_slow(folder, tmp_path, recwarn):
    assert usual_dtype(folder, "cpu") == "", "stored in float32"
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    assert usual_dtype(str(tmp_path / "half"), "cuda") == ""
    assert usual_dtype(str(tmp_path / "nowhere"), "cpu") == "", "an error that loading gives"
    assert not recwarn.list
    with pytest.warns(UserWarning, match="opened in float32, in twice the memory.*'bfloat16'"):
        assert usual_dtype(str(tmp_path / "half"), "cpu") == "float32"


def test_a_slowdown_is_a_ratio():
    assert slowdown(torch.float32) == 1
    assert 0.1 < slowdown(torch.bfloat16) < 1000


def test_adapters_are_to_be_merged(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="is an adapter; merge it"):
        load_model(str(tmp_path))


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="dtype='int8'; expected one of float32"):
        load_model(str(tmp_path), dtype="int8")
    with pytest.raises(ValueError, match="cannot be loaded; expected a folder or a hub id"):
        load_model(str(tmp_path / "nowhere"))
