"""Pairs of texts under attribution patching and direct logit attribution.

Would catch: node scores that are not the derivative on shared keys and values, writers that do not
add up to the logits, a model that is left masked.
"""

import pytest
import torch
from support.contrasts import Contrast, node_effects, written_logits
from transformer_lens import patching

import harmcircuits as hc
from harmcircuits.hooks.masking import masked_if_given


@pytest.fixture
def contrast() -> Contrast:
    generator = torch.Generator().manual_seed(0)
    clean, corrupt = torch.randint(3, 61, (2, 1, 7), generator=generator)
    wanted, other = torch.tensor([[[5], [6]]]), torch.tensor([[[7], [8]]])
    return Contrast(clean, corrupt, (4, 6), wanted, other)


def test_node_effects_are_derivatives_with_shared_keys_and_values(llama, contrast):
    # (metric with the head moved a step of its difference - metric) / step, at the corrupt run.
    effects = node_effects(llama, contrast)
    assert llama.cfg.n_key_value_heads < llama.cfg.n_heads == effects.shape[2] - 1

    def metric(logits):
        return contrast.metric(0, logits.double())

    def a_step(corrupted, index, cache, step=0.01):
        place = (slice(None), *index[1:])
        corrupted[place] += step * (cache[place] - corrupted[place])
        return corrupted

    with torch.no_grad():
        _, source = llama.run_with_cache(contrast.clean)
        options = {"activation_name": "z", "index_axis_names": ("layer", "pos", "head")}
        moved = patching.generic_activation_patch(
            llama, contrast.corrupt, source, metric, a_step, **options
        )
        slope = (moved - metric(llama(contrast.corrupt))) / 0.01
    # float32 logits of order 10 over a step of 0.01, and the curvature over that step.
    heads = effects[0, :, :-1].permute(0, 2, 1)
    torch.testing.assert_close(heads, slope.float(), atol=5e-3, rtol=0.05)
    assert heads.abs().max() > 0.1


def test_writers_add_up_to_the_metric_under_a_mask_too(llama, contrast):
    before = llama(contrast.clean)
    mask = hc.top_fraction(hc.random_scores(llama), 0.2)
    metrics = []
    for edit in (None, mask):
        names, written = written_logits(llama, contrast, edit)
        assert names == ["embed", "0 attn", "0 mlp", "1 attn", "1 mlp"]
        with torch.no_grad(), masked_if_given(llama, edit):
            metrics.append(contrast.metric(0, llama(contrast.clean)).item())
        assert written.sum() == pytest.approx(metrics[-1], abs=1e-4)
    assert metrics[0] != pytest.approx(metrics[1], abs=1e-2), "the mask changes the metric"
    assert torch.equal(llama(contrast.clean), before)
