"""Activation patching on top of a mask.

Would catch: a patch between attention and MLP that misses the skip connection, a share with the
wrong end as 1, an architecture with other hook names, edits or hooks that stay in the model.
"""

import pytest
import torch
from helpers import assert_bits_equal, random_batch, random_mask, snapshot
from transformer_lens import patching

import harmcircuits as hc
from harmcircuits.hooks.patching import answer_losses

# One model for each form of block: norms before, after or both, in parallel, with experts.
WIRINGS = ("Llama", "GPT2", "Gemma2", "Olmo2", "GPTNeoX", "Falcon", "Bloom", "Mixtral", "OPT")
TEXTS = random_batch(6, seed=1)


def patch_rows(bridge, mask, batch, parts=("residual",), **options):
    return hc.activation_patching(bridge, mask, batch, parts=parts, least_gap=1e-3, **options)


def residual(rows, **labels) -> dict[str, float]:
    """Depth -> share, all positions patched at once."""
    whole = rows.where("patch_share", component="residual", position="all", **labels)
    return {row.labels["layer"]: row.mean for row in whole}


@pytest.mark.parametrize("name", WIRINGS)
def test_the_last_residual_has_share_1_and_the_first_share_0(open_model, name):
    bridge = open_model(name)
    rows = patch_rows(bridge, random_mask(bridge, 0.3), TEXTS, positions=[])
    for direction in ("restore", "destroy"):
        shares = residual(rows, direction=direction)
        depths = ["0 pre", "0 mid", "1 pre", "1 mid", "1 post"]
        if name in ("GPTNeoX", "Falcon"):
            depths = ["0 pre", "1 pre", "1 post"]
        assert list(shares) == depths, "in order of depth"
        assert shares["1 post"] == pytest.approx(1, abs=1e-4)
        assert shares["0 pre"] == 0, "no mask touches the embedding"

    # All edits are before this depth: the rest is the unpruned model.
    mask, kinds = random_mask(bridge, 0.6), ("blocks.0", "blocks.1.attn")
    removed = {name: index for name, index in mask.removed.items() if name.startswith(kinds)}
    if "1 mid" in depths:
        mask = hc.WeightMask(removed, mask.shapes, mask.source)
        rows = patch_rows(bridge, mask, TEXTS, positions=[])
        assert residual(rows, direction="restore")["1 mid"] == pytest.approx(1, abs=1e-3)


def test_a_sweep_is_that_of_transformer_lens(llama):
    mask = random_mask(llama, 0.3)
    rows = patch_rows(llama, mask, TEXTS, ["attention", "mlp", "head"])
    sweeps = {
        "attention": patching.get_act_patch_attn_out,
        "mlp": patching.get_act_patch_mlp_out,
        "head": patching.get_act_patch_attn_head_out_all_pos,
    }

    def loss(logits):
        return answer_losses(logits, TEXTS).mean()

    torch.testing.assert_close(loss(llama(TEXTS.tokens)), hc.completion_loss(llama, TEXTS).mean())
    with torch.no_grad():
        _, unpruned = llama.run_with_cache(TEXTS.tokens)
        with hc.masked(llama, mask):
            start = loss(llama(TEXTS.tokens))
            for part, sweep in sweeps.items():
                expected = sweep(llama, TEXTS.tokens, unpruned, loss) - start
                cells = rows.where("patch_change", component=part, direction="restore")
                if part != "head":
                    cells = [row for row in cells if row.labels["position"] != "all"]
                values = torch.tensor([row.mean for row in cells]).view(expected.shape)
                torch.testing.assert_close(values, expected, atol=1e-5, rtol=1e-4)


def test_the_model_is_as_before(open_model, batch, monkeypatch):
    bridge = open_model("GPT2")
    assert not patch_rows(bridge, random_mask(bridge, 0.0), batch).where("patch_share"), "no gap"
    with pytest.raises(ValueError, match="residuals"):
        patch_rows(bridge, random_mask(bridge), batch, ["residuals"])
    original, logits, bars = snapshot(bridge), bridge(batch.tokens), patching.tqdm
    patch_rows(bridge, random_mask(bridge), batch, ["residual", "head"], layers=[1])

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("harmcircuits.hooks.patching._sweep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        patch_rows(bridge, random_mask(bridge), batch)

    assert_bits_equal(bridge, original)
    assert torch.equal(bridge(batch.tokens), logits)
    assert not any(point.fwd_hooks for point in bridge.hook_dict.values())
    assert patching.tqdm is bars and torch.is_grad_enabled()
