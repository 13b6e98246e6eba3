"""Scores against autograd, finite differences and hand-computed values.

Would catch: a transposed or permuted weight, a matrix counted twice or never, padding or prompt
tokens that leak into a score, a mean over tokens where one over examples is meant, hooks or frozen
parameters left behind.
"""

import pytest
import torch
from helpers import ARCHITECTURES, random_batch

from harmcircuits.circuits.masks import WeightMask, top_fraction
from harmcircuits.circuits.scores import Source
from harmcircuits.hooks.attribution import (
    magnitude_scores,
    random_scores,
    removal_effect,
    snip_scores,
    token_contributions,
    token_price,
    wanda_scores,
)
from harmcircuits.hooks.masking import masked
from harmcircuits.hooks.objectives import completion_loss
from harmcircuits.hooks.weights import model_fingerprint, named_weights, weight_sites
from harmcircuits.prompts import Batch


def autograd_per_example(bridge, batch: Batch) -> dict[str, torch.Tensor]:
    """dL_x/dW of every example by autograd on the parameters themselves: Float[example d_a d_b]."""
    weights = named_weights(bridge)
    losses = completion_loss(bridge, batch)
    gradients = [
        torch.autograd.grad(loss, list(weights.values()), retain_graph=True) for loss in losses
    ]
    return {
        name: torch.stack(gs)
        for name, gs in zip(weights, zip(*gradients, strict=True), strict=True)
    }


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scores_equal_autograd(open_model, batch, name):
    bridge = open_model(name)
    gradients = autograd_per_example(bridge, batch)
    signed = removal_effect(bridge, [batch], completion_loss)
    after = snip_scores(bridge, [batch], completion_loss)
    before = snip_scores(bridge, [batch], completion_loss, average="before_abs")
    weights = named_weights(bridge)
    assert signed.values.keys() == weights.keys()
    assert len(weights) == 2 * (7 if any(".gate" in weight for weight in weights) else 6)
    for weight, gradient in gradients.items():
        value = weights[weight].detach()
        assert gradient.norm() > 1e-6, f"{weight} has no gradient, so the comparison would be empty"
        # 1e-4: the bound; float32 sums in another order stay below 1e-5.
        assert relative_error(signed.values[weight], -value * gradient.mean(0)) < 1e-4
        assert relative_error(after.values[weight], value.abs() * gradient.abs().mean(0)) < 1e-4
        assert relative_error(before.values[weight], (value * gradient.mean(0)).abs()) < 1e-4


def test_the_token_price_is_the_sum_over_positions_of_absolute_parts(llama, batch):
    """Against inputs and output gradients kept by torch itself, position by position."""
    weights = named_weights(llama)
    kept = {}

    def keep(name):
        def hook(module, inputs, output):
            output.retain_grad()
            kept[name] = inputs[0].detach(), output

        return hook

    handles = []
    for module in llama.original_model.modules():
        for name, weight in weights.items():
            if isinstance(module, torch.nn.Linear) and module.weight is weight:
                handles.append(module.register_forward_hook(keep(name)))
    completion_loss(llama, batch).sum().backward()
    for handle in handles:
        handle.remove()
    for parameter in llama.original_model.parameters():
        parameter.grad = None

    scores = token_price(llama, [batch])
    assert kept.keys() == weights.keys()
    for name, (x, output) in kept.items():
        parts = torch.einsum("bpo,bpi->bpoi", output.grad, x).abs()
        expected = weights[name].detach().abs() * parts.sum(dim=(0, 1)) / len(batch)
        assert relative_error(scores.values[name], expected) < 1e-5


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Bloom", "Mixtral"])
def test_the_token_price_is_an_upper_bound_of_snip(open_model, batch, name):
    """Equal for what passes no hook points: experts and routers."""
    bridge = open_model(name)
    price, snip = token_price(bridge, [batch]), snip_scores(bridge, [batch])
    for weight, site in weight_sites(bridge).items():
        difference = price.values[weight] - snip.values[weight]
        rounding = 1e-5 * snip.values[weight].max()
        if site.is_hooked:
            assert difference.min() >= -rounding
            assert difference.max() > rounding, "the bound must not be the score itself"
        else:
            assert difference.abs().max() <= rounding


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_no_block_matrix_is_missed(open_model, batch, name):
    """Whatever matrix in a block is not among the weights takes no part in the forward pass."""
    bridge = open_model(name)
    with torch.no_grad():
        before = bridge(batch.tokens)
        covered = {p.untyped_storage().data_ptr() for p in named_weights(bridge).values()}
        for parameter in bridge.blocks.parameters():
            if parameter.ndim >= 2 and parameter.untyped_storage().data_ptr() not in covered:
                parameter.zero_()
        assert torch.equal(bridge(batch.tokens), before)
        next(iter(named_weights(bridge).values())).zero_()
        assert not torch.equal(bridge(batch.tokens), before), "the comparison must be able to fail"


@pytest.mark.parametrize("method", [removal_effect, snip_scores])
@pytest.mark.parametrize("name", ["Llama", "Mixtral"])
def test_batch_size_and_padding_do_not_matter(open_model, name, method):
    llama, whole = open_model(name), random_batch(6)
    singles = [Batch(whole.tokens[i : i + 1], whole.is_target[i : i + 1]) for i in range(6)]
    wide = Batch(
        torch.cat([whole.tokens, torch.full((6, 4), 7)], 1),
        torch.cat([whole.is_target, torch.zeros(6, 4).bool()], 1),
    )
    expected = method(llama, [whole], completion_loss)
    for other in (method(llama, singles, completion_loss), method(llama, [wide], completion_loss)):
        for weight, value in expected.values.items():
            assert relative_error(other.values[weight], value) < 1e-5
        assert other.source == expected.source, (
            "the digest of the data must not depend on batching or padding"
        )


def test_removal_effect_predicts_a_small_removal(llama, batch):
    """Setting a weight to (1 - e) W changes the mean loss by e * removal_effect + O(e^2).

    In float64-like precision.
    """
    scores = removal_effect(llama, [batch], completion_loss)
    with torch.no_grad():
        before = completion_loss(llama, batch).double().mean()
    for name, value in scores.values.items():
        index = value.abs().flatten().topk(5).indices.sort().values
        mask = WeightMask({name: index}, scores.shapes, scores.source)
        predicted = value.flatten()[index].sum().item()
        with masked(llama, mask, scale=1 - 1e-2), torch.no_grad():
            measured = (completion_loss(llama, batch).double().mean() - before).item() / 1e-2
        # Second order: the error is of relative size e = 1e-2 times curvature; 10 % + float32
        # noise of the difference.
        assert measured == pytest.approx(predicted, rel=0.1, abs=2e-4), name


def test_scores_do_not_depend_on_dtype_order_of_magnitude(open_model, batch):
    """bfloat16 models get float32 scores that agree with float32 ones to bfloat16 precision."""
    exact = removal_effect(open_model("Llama"), [batch], completion_loss)
    coarse = removal_effect(open_model("Llama", dtype=torch.bfloat16), [batch], completion_loss)
    for name, value in exact.values.items():
        assert coarse.values[name].dtype == torch.float32
        # bfloat16 has 8 bits: 0.4 % an operation, over some tens of operations in depth.
        assert relative_error(coarse.values[name], value) < 0.1


@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_scores_in_bfloat16_equal_autograd_in_float64(open_model, name):
    """Of the same weights: what is between them is the arithmetic, of the model and of the sums."""
    coarse = open_model(name, dtype=torch.bfloat16)
    exact = open_model(name, dtype=torch.float64)
    with torch.no_grad():
        for parameter, rounded in zip(exact.parameters(), coarse.parameters(), strict=True):
            parameter.copy_(rounded)
    batches = [random_batch(8, 12, seed=seed) for seed in range(4)]
    scores = removal_effect(coarse, batches, completion_loss)

    gradients = [autograd_per_example(exact, batch) for batch in batches]
    for weight_name, weight in named_weights(exact).items():
        gradient = torch.cat([of_batch[weight_name] for of_batch in gradients]).mean(0)
        expected = -weight.detach() * gradient
        assert relative_error(scores.values[weight_name], expected) < 0.05, weight_name


def test_wanda_scores_by_hand(open_model):
    """Against the inputs cached by TransformerLens itself, padding left out.

    On both weight orientations.
    """
    for name in ("Llama", "GPT2"):
        bridge, batch = open_model(name), random_batch()
        scores = wanda_scores(bridge, [batch])
        _, cache = bridge.run_with_cache(batch.tokens)
        for site in weight_sites(bridge).values():
            x = cache[site.hook_in].flatten(2)[batch.is_token]
            rms = x.square().mean(0).sqrt()
            expected = site.parameter.abs() * (rms if site.input_axis == 1 else rms[:, None])
            torch.testing.assert_close(scores.values[site.name], expected.detach())


def test_controls(llama):
    weights = named_weights(llama)
    for name, value in magnitude_scores(llama).values.items():
        assert torch.equal(value, weights[name].abs())
    first, again, other = (
        random_scores(llama, seed=1),
        random_scores(llama, seed=1),
        random_scores(llama, seed=2),
    )
    assert all(torch.equal(first.values[name], again.values[name]) for name in weights)
    assert not any(torch.equal(first.values[name], other.values[name]) for name in weights)


@pytest.mark.parametrize("name", ["Llama", "Mixtral"])
def test_nothing_is_left_behind(open_model, batch, name):
    bridge = open_model(name)

    def state():
        hooks = {
            name: (len(point.fwd_hooks), len(point.bwd_hooks))
            for name, point in bridge.hook_dict.items()
        }
        return (
            hooks,
            [p.requires_grad for p in bridge.parameters()],
            [m.training for m in bridge.modules()],
        )

    bridge.original_model.train()
    before = state()
    removal_effect(bridge, [batch], completion_loss)
    if name == "Llama":
        wanda_scores(bridge, [batch])

    def broken(bridge, batch):
        completion_loss(bridge, batch).sum().backward()
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        snip_scores(bridge, [batch], broken)
    assert state() == before
    assert all(p.grad is None for p in bridge.parameters())

    completion_loss(bridge, batch).mean().backward()  # a training step in progress
    training = {name: weight.grad.clone() for name, weight in named_weights(bridge).items()}
    snip_scores(bridge, [batch], completion_loss)
    assert all(
        torch.equal(weight.grad, training[name]) for name, weight in named_weights(bridge).items()
    )


@pytest.mark.usefixtures("unchecked")
def test_errors_name_the_cause(llama, batch, open_model):
    with pytest.raises(ValueError, match="no batches"):
        removal_effect(llama, [], completion_loss)
    with pytest.raises(ValueError, match="average='sum'"):
        snip_scores(llama, [batch], completion_loss, average="sum")
    with pytest.raises(ValueError, match=r"gave shape \(\); expected \(3,\)"):
        removal_effect(llama, [batch], lambda bridge, b: completion_loss(bridge, b).sum())
    with pytest.raises(ValueError, match=r"no gradient reached .*blocks\.1"):
        removal_effect(
            llama, [batch], lambda bridge, b: bridge(b.tokens, stop_at_layer=1).sum((1, 2))
        )
    processed = open_model("Llama")
    processed.enable_compatibility_mode(disable_warnings=True)
    with pytest.raises(ValueError, match="processed"):
        removal_effect(processed, [batch], completion_loss)
    mixtral = open_model("Mixtral")
    with pytest.raises(
        ValueError,
        match=r"blocks\.0\.mlp\.gate\.weight.*pass no hook points; score this model by removal_eff",
    ):
        wanda_scores(mixtral, [batch])
    with pytest.raises(ValueError, match=r"no gradient reached .*blocks\.1\.mlp\.experts"):
        removal_effect(
            mixtral, [batch], lambda bridge, b: bridge(b.tokens, stop_at_layer=1).sum((1, 2))
        )


@pytest.mark.parametrize("name", ["Llama", "GPT2", "GPTNeoX", "Gemma2"])
def test_token_contributions_sum_to_the_mask_s_score(open_model, name):
    """Whatever way weights are stored; 1e-5 relative: float32 sums in another order."""
    bridge, batches = open_model(name), [random_batch(), random_batch(2, 7, seed=1)]
    scores = removal_effect(bridge, batches, completion_loss)
    mask = top_fraction(scores, 0.05, within="model")
    contributions = token_contributions(bridge, mask, batches, completion_loss)
    assert [values.shape for values in contributions] == [batch.tokens.shape for batch in batches]
    total = sum(values.sum().item() for values in contributions) / 5
    assert total == pytest.approx(scores.sum_over(mask), rel=1e-5)
    for values, batch in zip(contributions, batches, strict=True):
        last = batch.is_target.int().cumsum(1).argmax(1)
        for row, end in enumerate(last):
            assert (values[row, end:] == 0).all(), (
                "what is computed at the last target or later reaches no loss"
            )


def test_a_token_s_contribution_is_its_share_of_the_gradient(llama, batch):
    """Against autograd through a weight that is different at each position.

    W + e_t at position t of example x.
    """
    name = "blocks.1.mlp.in.weight"
    mask = WeightMask(
        {name: torch.tensor([3, 50, 51, 700])},
        mask_shapes(llama),
        Source(model_fingerprint(llama), "test"),
    )
    contributions = token_contributions(llama, mask, [batch], completion_loss)[0]
    weight = named_weights(llama)[name].detach()
    removed = torch.where(mask.dense(name), weight, 0)
    scale = torch.zeros(batch.tokens.shape, requires_grad=True)
    inputs = {}

    def edit(value, hook):
        n_read = value.shape[1]  # the last token is only predicted
        return value - scale[:, :n_read, None] * (inputs["x"] @ removed.T)

    hooks = [
        ("blocks.1.mlp.in.hook_in", lambda value, hook: inputs.update(x=value)),
        ("blocks.1.mlp.in.hook_out", edit),
    ]
    with llama.hooks(fwd_hooks=hooks):
        completion_loss(llama, batch).sum().backward()
    assert scale.grad is not None
    torch.testing.assert_close(contributions, scale.grad, rtol=1e-4, atol=1e-7)


def test_token_contributions_refuse_foreign_and_empty_masks(llama, batch):
    shapes = mask_shapes(llama)
    with pytest.raises(ValueError, match="is of model another, this one is"):
        foreign = WeightMask(
            {"blocks.1.mlp.in.weight": torch.tensor([3])}, shapes, Source("another", "test")
        )
        token_contributions(llama, foreign, [batch], completion_loss)
    with pytest.raises(ValueError, match="removes nothing"):
        empty = WeightMask({}, shapes, Source(model_fingerprint(llama), "test"))
        token_contributions(llama, empty, [batch], completion_loss)


def mask_shapes(bridge) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in named_weights(bridge).items()}
