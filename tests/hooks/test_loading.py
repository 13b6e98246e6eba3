"""A bridge from a folder or a loaded Hugging Face model; the memory that scores take.

Would catch: weights that are copied or changed on the way, another dtype, memory counted twice.
"""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import random_batch
from transformers import AutoModelForCausalLM, AutoTokenizer

from harmcircuits.hooks.attribution import removal_effect
from harmcircuits.hooks.loading import estimate_memory, load_model, wrap_model
from harmcircuits.hooks.weights import named_weights, weights_digest


@pytest.fixture
def folder(open_model) -> str:
    return open_model("Llama").cfg.model_name


@pytest.mark.parametrize("dtype", ["", "bfloat16"])
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
    assert named_weights(SimpleNamespace(bridge=bridge)).keys() == named_weights(bridge).keys()


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_opened_is_named(folder, tmp_path):
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    loaded.config._name_or_path = str(tmp_path)
    calls = [
        (lambda: load_model(folder, dtype="int8"), "dtype='int8'"),
        (lambda: load_model(str(tmp_path / "nowhere")), "hub id"),
        (lambda: wrap_model(loaded), "tokenizer="),
        (lambda: load_model(folder, device="cuda:99"), "cuda:99"),
        (lambda: named_weights(loaded), "transformers.models.llama"),
        (lambda: named_weights(folder), "builtins.str"),
    ]
    for call, word in calls:
        with pytest.raises(ValueError, match=word):
            call()


def test_memory_is_counted_by_formula(llama):
    batches = [random_batch(2), random_batch(12, 30)]
    n_scored = sum(weight.numel() for weight in named_weights(llama).values())
    n_stored = sum(parameter.numel() for parameter in llama.parameters())
    estimate = estimate_memory(llama, batches)
    assert estimate.scores == 4 * n_scored and not estimate.on_disk
    assert 4 * n_stored <= estimate.weights <= 4.4 * n_stored, "parameters once, and little else"
    assert not any(parameter.grad is not None for parameter in llama.parameters())

    search = estimate_memory(llama, batches, search=True)
    assert search.scores == 3 * estimate.scores and search.activations == estimate.activations
    bounded = estimate_memory(llama, batches, search=True, max_memory=8000)
    assert 4000 < bounded.scores <= 8000
    assert bounded.on_disk == search.scores, "all that is finished"
    twice = estimate_memory(llama, [random_batch(24, 30)])
    assert twice.activations == 2 * estimate.activations


def resident(which: str) -> int:
    """Bytes of resident memory: now (VmRSS) or at most so far (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(which)).split()[1])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="is counted by Linux")
def test_the_estimate_is_what_a_run_takes(open_model):
    size = dict(n_embd=512, n_inner=2048, n_layer=4, n_head=8, n_positions=128, vocab_size=8000)
    bridge = open_model("GPT2", **size)
    batches = [random_batch(16, 128)]
    estimate = estimate_memory(bridge, batches)
    removal_effect(bridge, [random_batch(1, 128)])  # a library's first run makes more
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident size starts anew
    before = resident("VmRSS")
    removal_effect(bridge, batches)
    taken = resident("VmHWM") - before
    assert 0.7 * taken < estimate.scores + estimate.activations < 1.5 * taken
