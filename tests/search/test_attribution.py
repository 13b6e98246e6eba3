"""Scores against the oracle (`tests/oracle.py`), finite differences and their own definitions.

Would catch: a transposed weight, padding that leaks into a score, hooks that are left behind.
"""

import oracle
import pytest
import torch
from helpers import ARCHITECTURES, random_batch, random_mask

from harmcircuits.batches import Batch
from harmcircuits.circuits.masks import WeightMask, top_fraction
from harmcircuits.circuits.scores import Source
from harmcircuits.hooks.masking import masked
from harmcircuits.hooks.objectives import completion_loss
from harmcircuits.hooks.weights import named_weights, weight_sites
from harmcircuits.search.attribution import (
    removal_effect,
    snip_scores,
    token_contributions,
    token_price,
    wanda_scores,
)

BATCHES = [random_batch(2), random_batch(1, 7, seed=1)]  # one padded


def assert_close(scores, expected: oracle.Values, bound: float = 1e-4) -> None:
    """Relative to the norm of each matrix; float32 sums in another order stay below 1e-5."""
    assert scores.values.keys() == expected.keys()
    for name, value in expected.items():
        assert value.norm() > 1e-6, f"{name}: nothing to compare"
        error = (scores.values[name] - value).norm() / value.norm()
        assert error < bound, name


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scores_equal_autograd(open_model, name):
    bridge = open_model(name)
    sites = weight_sites(bridge)
    assert len(sites) == 2 * (7 if any(".gate" in site for site in sites) else 6)
    gradients = oracle.gradients(bridge, BATCHES)
    assert_close(removal_effect(bridge, BATCHES), oracle.removal_effect(bridge, gradients))
    assert_close(token_price(bridge, BATCHES), oracle.token_price(bridge, BATCHES, gradients))
    for average in ("after_abs", "before_abs"):
        scores = snip_scores(bridge, BATCHES, average=average)
        assert_close(scores, oracle.snip_scores(bridge, gradients, average))
    if all(site.is_hooked for site in sites.values()):
        assert_close(wanda_scores(bridge, BATCHES), oracle.wanda_scores(bridge, BATCHES))

    assert_no_matrix_is_missed(bridge, BATCHES[0])


def assert_no_matrix_is_missed(bridge, batch: Batch) -> None:
    """Whatever matrix in a block is not among the weights takes no part in the forward pass."""
    with torch.no_grad():
        logits = bridge(batch.tokens)
        covered = {p.untyped_storage().data_ptr() for p in named_weights(bridge).values()}
        for parameter in bridge.blocks.parameters():
            if parameter.ndim >= 2 and parameter.untyped_storage().data_ptr() not in covered:
                parameter.zero_()
        assert torch.equal(bridge(batch.tokens), logits)
        next(iter(named_weights(bridge).values())).zero_()
        assert not torch.equal(bridge(batch.tokens), logits), "the comparison must be able to fail"


def test_scores_in_bfloat16_equal_autograd_in_float64(open_model):
    """Of the same weights: what is between them is the arithmetic, of the model and of the sums."""
    coarse = open_model("GPT2", dtype=torch.bfloat16)
    exact = open_model("GPT2", dtype=torch.float64)
    with torch.no_grad():
        for parameter, rounded in zip(exact.parameters(), coarse.parameters(), strict=True):
            parameter.copy_(rounded)
    batches = [random_batch(8, 12, seed=seed) for seed in range(4)]
    scores = removal_effect(coarse, batches)
    assert {value.dtype for value in scores.values.values()} == {torch.float32}
    assert_close(scores, oracle.removal_effect(exact, oracle.gradients(exact, batches)), 0.05)


def test_removal_effect_predicts_a_small_removal(llama, batch):
    """Setting a weight to (1 - e) W changes the mean loss by e * removal_effect + O(e^2)."""
    scores = removal_effect(llama, [batch])
    with torch.no_grad():
        loss = completion_loss(llama, batch).double().mean()
    for name, value in scores.values.items():
        index = value.abs().flatten().topk(5).indices.sort().values
        mask = WeightMask({name: index}, scores.shapes, scores.source)
        predicted = value.flatten()[index].sum().item()
        with masked(llama, mask, scale=1 - 1e-2), torch.no_grad():
            change = (completion_loss(llama, batch).double().mean() - loss).item() / 1e-2
        # Second order: of relative size e times curvature, and the difference's float32 noise.
        assert change == pytest.approx(predicted, rel=0.1, abs=2e-4), name


def state(bridge) -> list:
    """What scoring touches: hooks, what needs gradients, and what is in training."""
    points = bridge.hook_dict.values()
    hooks = [(len(point.fwd_hooks), len(point.bwd_hooks)) for point in points]
    needed = [parameter.requires_grad for parameter in bridge.parameters()]
    return [hooks, needed, [module.training for module in bridge.modules()]]


def test_nothing_is_left_behind(open_model, batch):
    bridge = open_model("Mixtral")
    bridge.original_model.train()
    first = state(bridge)
    removal_effect(bridge, [batch])

    def interrupted(bridge, batch):
        completion_loss(bridge, batch).sum().backward()
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        snip_scores(bridge, [batch], interrupted)
    assert state(bridge) == first
    assert all(parameter.grad is None for parameter in bridge.parameters())

    completion_loss(bridge, batch).mean().backward()  # a training step in progress
    weight = next(iter(named_weights(bridge).values()))
    training = weight.grad.clone()
    snip_scores(bridge, [batch])
    assert torch.equal(weight.grad, training)


def half_run(bridge, batch):
    return bridge(batch.tokens, stop_at_layer=1).sum((1, 2))


def summed(bridge, batch):
    return completion_loss(bridge, batch).sum()


FOREIGN_MASK = WeightMask({}, {}, Source("another", "test"))
ERRORS = [
    ("Llama", lambda bridge, batch: removal_effect(bridge, [batch], summed), "(3,)"),
    ("Mixtral", lambda bridge, batch: removal_effect(bridge, [batch], half_run), "mlp.experts"),
    ("Llama", lambda bridge, batch: token_contributions(bridge, FOREIGN_MASK, [batch]), "another"),
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("name", "call", "word"), ERRORS)
def test_errors_name_the_cause(open_model, batch, name, call, word):
    with pytest.raises(ValueError, match=word):
        call(open_model(name), batch)


@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_token_contributions_sum_to_the_mask_s_score(open_model, name):
    """Whatever way weights are stored; 1e-5 relative: float32 sums in another order."""
    bridge = open_model(name)
    scores = removal_effect(bridge, BATCHES)
    mask = top_fraction(scores, 0.05, within="model")
    contributions = token_contributions(bridge, mask, BATCHES)
    total = sum(values.sum().item() for values in contributions) / 3
    assert total == pytest.approx(scores.sum_over(mask), rel=1e-5)
    for values, batch in zip(contributions, BATCHES, strict=True):
        last = batch.is_target.int().cumsum(1).argmax(1)
        for row, end in enumerate(last):
            assert (values[row, end:] == 0).all(), "what is computed there reaches no loss"


def test_a_token_s_contribution_is_its_share_of_the_gradient(llama, batch):
    """Against autograd through a weight that is W + e_t at position t of example x."""
    name = "blocks.1.mlp.in.weight"
    everywhere = random_mask(llama, 0.01)
    mask = WeightMask({name: everywhere.removed[name]}, everywhere.shapes, everywhere.source)
    contributions = token_contributions(llama, mask, [batch])[0]
    removed = torch.where(mask.dense(name), named_weights(llama)[name].detach(), 0)
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


def test_an_objective_may_run_the_model_without_gradients(llama):
    batch, loss = random_batch(), completion_loss

    def less_a_constant(bridge, batch):
        value = loss(bridge, batch)
        with torch.no_grad():
            constant = loss(bridge, Batch(batch.tokens.flip(0), batch.is_target.flip(0)))
        return value - constant

    expected = removal_effect(llama, [batch]).values
    scores = removal_effect(llama, [batch], less_a_constant).values
    for name, value in expected.items():
        torch.testing.assert_close(scores[name], value)

    def with_a_detached_pass(bridge, batch):
        value = loss(bridge, batch)
        return value - loss(bridge, batch).detach()

    with pytest.raises(ValueError, match="no_grad"):
        removal_effect(llama, [batch], with_a_detached_pass)


def test_neither_inference_mode_nor_a_default_dtype_changes_a_score(llama):
    expected = removal_effect(llama, [random_batch()])
    batch = random_batch()
    with torch.inference_mode():
        scores = removal_effect(llama, [batch])
    assert all(torch.equal(scores.values[name], value) for name, value in expected.values.items())
    mask = top_fraction(expected, 0.01)
    contributions = token_contributions(llama, mask, [batch])
    torch.set_default_dtype(torch.float64)
    try:
        again = token_contributions(llama, mask, [batch])
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(again[0], contributions[0])
