"""Attribution patching of pairs of texts.

Would catch: node scores that are not the derivative on shared keys and values.
"""

import torch
from support.contrasts import Contrast, node_effects
from transformer_lens import patching


def test_node_effects_are_derivatives_with_shared_keys_and_values(llama):
    generator = torch.Generator().manual_seed(0)
    clean, corrupt = torch.randint(3, 61, (2, 1, 7), generator=generator)
    wanted, other = torch.tensor([[[5], [6]]]), torch.tensor([[[7], [8]]])
    contrast = Contrast(clean, corrupt, (4, 6), wanted, other)
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
