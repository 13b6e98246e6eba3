"""Models that are spread over devices by `device_map` score and mask as whole ones do.

Would catch: hooks of accelerate that keep inputs or gradients from the hook points.
"""

import pytest
import torch
from accelerate import dispatch_model
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, AutoTokenizer

import harmcircuits as hc
from harmcircuits.hooks.weights import weights_digest


@pytest.mark.parametrize("name", ["GPT2", "Mixtral"])
def test_a_dispatched_model_scores_as_a_whole_one(open_model, batch, name):
    """On the CPU every part is sent to the same device, but through the hooks of split models."""
    whole = open_model(name)
    folder = whole.cfg.model_name
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    parts = [name for name, module in model.named_modules() if module._parameters]
    dispatch_model(model, dict.fromkeys(parts, "cpu"), force_hooks=True)
    assert sum(hasattr(module, "_hf_hook") for module in model.modules()) >= len(parts)
    split = TransformerBridge.boot_transformers(
        folder, hf_model=model, tokenizer=AutoTokenizer.from_pretrained(folder)
    )
    for score in (hc.removal_effect, hc.snip_scores):
        scores, expected = score(split, [batch]), score(whole, [batch])
        for weight, value in expected.values.items():
            assert value.norm() > 1e-6, "the comparison must be able to fail"
            assert torch.equal(scores.values[weight], value)
    mask, digest = hc.top_fraction(expected, 0.05), weights_digest(split)
    with hc.masked(split, mask), hc.masked(whole, mask), torch.no_grad():
        assert torch.equal(hc.completion_loss(split, batch), hc.completion_loss(whole, batch))
        assert weights_digest(split) == weights_digest(whole) != digest
    assert weights_digest(split) == digest
