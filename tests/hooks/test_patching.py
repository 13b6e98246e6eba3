"""Activation patching on top of a mask.

Would catch: a patch of the residual between attention and MLP that misses the skip connection, a
share with the wrong end as 1, positions that do not line up, a division by a gap that is not there,
an architecture whose activations are not where they are patched, edits, hooks or settings left in
the model.
"""

import pytest
import torch
from helpers import random_batch
from transformer_lens import patching

import harmcircuits as hc
from harmcircuits.hooks.inspection import position_names
from harmcircuits.hooks.patching import ALL_PARTS, aligned, loss_of_logits

# One of each way in which a block is wired: norms before, after or both, in parallel, with experts.
WIRINGS = ("Llama", "GPT2", "Gemma2", "Olmo2", "GPTNeoX", "Falcon", "Bloom", "Mixtral", "OPT")


def random_mask(bridge, share: float = 0.3, *, kinds: tuple[str, ...] = ("",)) -> hc.WeightMask:
    mask = hc.top_fraction(hc.random_scores(bridge), share)
    removed = {name: index for name, index in mask.removed.items() if name.startswith(kinds)}
    return hc.WeightMask(removed, mask.shapes, mask.source)


def patched(bridge, mask, batch, parts=("residual",), **options):
    return hc.activation_patching(bridge, mask, batch, parts=parts, least_gap=1e-3, **options)


def residual(rows, **labels) -> dict[str, float]:
    """Depth -> share, all positions patched at once."""
    whole = rows.where("patch_share", component="residual", position="all", **labels)
    return {row.labels["layer"]: row.mean for row in whole}


@pytest.fixture
def texts():
    return random_batch(6, seed=1)


@pytest.mark.parametrize("name", WIRINGS)
def test_the_last_residual_moves_all_and_the_first_nothing(open_model, texts, name):
    bridge = open_model(name)
    rows = patched(bridge, random_mask(bridge), texts, positions=[])
    for direction in ("restore", "destroy"):
        shares = residual(rows, direction=direction)
        depths = ["0 pre", "0 mid", "1 pre", "1 mid", "1 post"]
        if name in ("GPTNeoX", "Falcon"):
            depths = ["0 pre", "1 pre", "1 post"]
        assert list(shares) == depths, "in order of depth"
        assert shares["1 post"] == pytest.approx(1, abs=1e-4)
        assert shares["0 pre"] == 0, "no mask touches the embedding"


@pytest.mark.parametrize("name", WIRINGS)
def test_all_is_restored_once_every_edit_is_passed(open_model, texts, name):
    # Edits only before this depth: what comes after it is the unpruned model.
    bridge = open_model(name)
    edits = {"1 pre": ("blocks.0",), "1 mid": ("blocks.0", "blocks.1.attn")}
    for depth, kinds in edits.items():
        rows = patched(bridge, random_mask(bridge, 0.6, kinds=kinds), texts, positions=[])
        shares = residual(rows, direction="restore")
        if depth in shares:
            assert shares[depth] == pytest.approx(1, abs=1e-3), depth
            assert shares["0 pre"] == 0


def test_one_position_of_the_middle_residual_reaches_the_skip_connection(llama):
    # In the last layer positions no longer mix after attention: with one target, the position
    # before it moves everything, and no other anything.
    tokens = random_batch(4, seed=2).tokens
    is_target = torch.zeros_like(tokens, dtype=torch.bool)
    is_target[:, 5] = True
    mask = random_mask(llama, 0.6, kinds=("blocks.0", "blocks.1.attn"))
    rows = patched(llama, mask, hc.Batch(tokens, is_target))
    cells = rows.where("patch_share", layer="1 mid", direction="restore")
    moved = {row.labels["position"]: row.mean for row in cells}
    assert len(moved) == tokens.shape[1] + 1
    for position, share in moved.items():
        expected = 1 if position in (4, "all") else 0
        assert share == pytest.approx(expected, abs=1e-3), position


def test_a_sweep_is_that_of_transformer_lens(llama, texts):
    mask = random_mask(llama)
    rows = patched(llama, mask, texts, ["attention", "mlp", "head"])
    sweeps = {
        "attention": patching.get_act_patch_attn_out,
        "mlp": patching.get_act_patch_mlp_out,
        "head": patching.get_act_patch_attn_head_out_all_pos,
    }

    def loss(logits):
        return loss_of_logits(texts)(logits).mean()

    with torch.no_grad():
        _, unpruned = llama.run_with_cache(texts.tokens)
        with hc.masked(llama, mask):
            start = loss(llama(texts.tokens))
            for part, sweep in sweeps.items():
                expected = sweep(llama, texts.tokens, unpruned, loss) - start
                cells = rows.where("patch_change", component=part, direction="restore")
                if part != "head":
                    cells = [row for row in cells if row.labels["position"] != "all"]
                values = torch.tensor([row.mean for row in cells]).view(expected.shape)
                torch.testing.assert_close(values, expected, atol=1e-5, rtol=1e-4)


def test_an_edit_of_output_weights_shows_only_in_what_heads_add(llama, texts):
    mask = random_mask(llama, 0.6, kinds=("blocks.1.attn.o",))
    rows = patched(llama, mask, texts, ["head", "head_result"], layers=[1])
    largest = {}
    for part, cells in rows.where("patch_change").by("component").items():
        largest[part] = max(abs(row.mean) for row in cells)
    assert largest["head"] == 0 and largest["head_result"] > 1e-3


def test_no_gap_gives_no_share(llama, batch):
    rows = patched(llama, random_mask(llama, 0.0), batch)
    assert rows.one("nll_gap").mean == 0
    assert not rows.where("patch_share")
    assert {row.mean for row in rows.where("patch_change")} == {0.0}


def test_the_metric_is_the_completion_loss(llama, batch):
    expected = hc.completion_loss(llama, batch)
    torch.testing.assert_close(loss_of_logits(batch)(llama(batch.tokens)), expected)


def test_an_interval_is_that_of_the_share_whichever_way_the_mask_moves_the_loss(llama, texts):
    signs = set()
    for seed in range(8):
        mask = hc.top_fraction(hc.random_scores(llama, seed=seed), 0.3)
        rows = patched(llama, mask, texts, positions=[])
        assert all(row.low <= row.mean <= row.high for row in rows)
        (last, _) = rows.where("patch_share", layer="1 post")
        assert (last.low, last.high) == pytest.approx((1, 1), abs=1e-3), "all of it in any resample"
        signs.add(rows.one("nll_gap").mean > 0)
    assert signs == {False, True}


@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_the_model_is_as_before(open_model, batch, name, monkeypatch):
    bridge = open_model(name)
    before = {key: tensor.clone() for key, tensor in bridge.state_dict().items()}
    logits, bars = bridge(batch.tokens), patching.tqdm
    patched(bridge, random_mask(bridge), batch, ALL_PARTS, layers=[1], positions=[3])

    def broken(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(patching, "generic_activation_patch", broken)
    with pytest.raises(KeyboardInterrupt):
        patched(bridge, random_mask(bridge), batch, ALL_PARTS)

    assert all(torch.equal(tensor, before[key]) for key, tensor in bridge.state_dict().items())
    assert torch.equal(bridge(batch.tokens), logits)
    assert not any(point.fwd_hooks for point in bridge.hook_dict.values())
    assert not bridge.cfg.use_attn_result and patching.tqdm is bars
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("name", "parts", "words"),
    [
        ("Llama", ["residuals"], ["residuals", "head_result"]),
        ("Llama", [], ["parts"]),
        (
            "Bloom",
            ["attention", "head_result"],
            ["blocks.0.hook_attn_out", "'attention'", "mlp"],
        ),
        ("GPTJ", ["head_result"], ["head_result"]),
    ],
)
def test_what_cannot_be_patched_is_named(open_model, batch, name, parts, words):
    bridge = open_model(name)
    with pytest.raises(ValueError) as error:
        patched(bridge, random_mask(bridge), batch, parts)
    assert all(word in str(error.value) for word in words)


def test_unknown_layers_and_positions_are_named(llama, batch):
    for options in ({"layers": [2]}, {"positions": [9]}, {"layers": []}):
        (name,) = options
        with pytest.raises(ValueError, match=rf"{name}=.*expected some"):
            patched(llama, random_mask(llama), batch, **options)


def test_aligned_texts_begin_and_end_their_answers_together():
    batches = [random_batch(5, seed=0), random_batch(4, seed=1)]
    batch, numbers = aligned(batches)
    assert (batch.is_target == batch.is_target[0]).all() and batch.is_token.all()
    rows = [(batches[0], number) for number in range(5)] + [(batches[1], n) for n in range(4)]
    assert len(numbers) == 2 and numbers == sorted(numbers)
    for row, number in enumerate(numbers):
        of_batch, place = rows[number]
        assert torch.equal(batch.tokens[row], of_batch.tokens[place][of_batch.is_token[place]])


def test_a_position_is_named_by_its_token_where_all_examples_share_it(llama):
    tokens = torch.tensor([[1, 7, 9], [1, 8, 9]])
    is_target = torch.tensor([[False, False, True]] * 2)
    words = llama.tokenizer.convert_ids_to_tokens([1, 9])
    names = position_names(llama, hc.Batch(tokens, is_target))
    assert names == [f"0 {words[0]}", "1 …", f"2 {words[1]}"]
