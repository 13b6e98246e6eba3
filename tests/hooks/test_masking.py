"""Masks change the forward pass and leave no trace.

Would catch: arithmetic undo, a wrong orientation of flat indices, split weights that are copies,
restore that misses an exit, optimiser state that revives a held weight, an unpruned model that is
not what it was, a mask that a look at the unpruned model leaves changed.
"""

import pytest
import torch
from helpers import random_batch

from harmcircuits.circuits.masks import WeightMask, random_like, top_fraction
from harmcircuits.hooks.attribution import random_scores
from harmcircuits.hooks.masking import masked, unmasked
from harmcircuits.hooks.objectives import completion_loss
from harmcircuits.hooks.weights import model_fingerprint, named_weights

DTYPES = [torch.float32, torch.bfloat16]


def tensors(bridge) -> dict[str, torch.Tensor]:
    return bridge.state_dict(keep_vars=True) | named_weights(
        bridge
    )  # the former lacks stacked experts


def snapshot(bridge) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in tensors(bridge).items()}


def assert_bits_equal(bridge, before: dict[str, torch.Tensor]) -> None:
    for name, value in tensors(bridge).items():
        bits = torch.int16 if value.dtype == torch.bfloat16 else torch.int32
        assert torch.equal(
            value.detach().contiguous().view(bits), before[name].contiguous().view(bits)
        ), name


def a_mask(bridge, seed: int = 0, fraction: float = 0.2) -> WeightMask:
    return top_fraction(random_scores(bridge, seed=seed), fraction)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["Llama", "GPT2", "GPTNeoX", "Mixtral", "Qwen3Moe"])
def test_masked_removes_and_restores_bit_for_bit(open_model, name, dtype):
    bridge, batch = open_model(name, dtype=dtype), random_batch()
    before, logits = snapshot(bridge), bridge(batch.tokens)
    first, second = a_mask(bridge, 0), a_mask(bridge, 1)

    for error in (None, RuntimeError, KeyboardInterrupt):
        try:
            with masked(bridge, first), masked(bridge, second):  # nested, overlapping
                for weight, parameter in named_weights(bridge).items():
                    gone = (first | second).dense(weight)
                    assert (parameter[gone] == 0).all()
                    assert torch.equal(parameter[~gone], before[weight][~gone])
                assert not torch.equal(bridge(batch.tokens), logits)
                if error:
                    raise error
        except (RuntimeError, KeyboardInterrupt):
            pass
        assert_bits_equal(bridge, before)
    assert torch.equal(bridge(batch.tokens), logits)


@pytest.mark.parametrize("name", ["Llama", "GPT2", "GPTNeoX", "Phi3", "Mixtral"])
def test_every_matrix_reaches_the_logits(open_model, name):
    """Removing one whole matrix at a time changes the output: no name stands for a dead copy."""
    bridge, batch = open_model(name), random_batch()
    logits = bridge(batch.tokens)
    full = top_fraction(random_scores(bridge), 1.0)
    for weight, index in full.removed.items():
        with masked(bridge, WeightMask({weight: index}, full.shapes, full.source)):
            assert not torch.allclose(bridge(batch.tokens), logits), weight


def test_scale_multiplies(llama):
    mask = a_mask(llama)
    before = snapshot(llama)
    with masked(llama, mask, scale=-0.5):
        for weight, parameter in named_weights(llama).items():
            gone = mask.dense(weight)
            assert torch.equal(parameter[gone], before[weight][gone] * -0.5)
    assert_bits_equal(llama, before)


def test_masks_of_another_model_are_refused_and_change_nothing(open_model, llama):
    before = snapshot(llama)
    deeper, wider = (
        open_model("Llama", num_hidden_layers=3),
        open_model("Llama", intermediate_size=32),
    )
    with (
        pytest.raises(ValueError, match="this model lacks; nothing was changed"),
        masked(llama, a_mask(deeper)),
    ):
        pass
    with (
        pytest.raises(ValueError, match=r"is \(40, 24\), the mask's \(32, 24\)"),
        masked(llama, a_mask(wider)),
    ):
        pass
    sibling = a_mask(open_model("Llama", seed=5))
    with pytest.raises(ValueError, match="same_model=False"), masked(llama, sibling):
        pass
    assert_bits_equal(llama, before)
    with masked(llama, sibling, same_model=False):
        assert snapshot(llama).keys() == before.keys()
        assert any(not torch.equal(value, before[name]) for name, value in snapshot(llama).items())
    assert_bits_equal(llama, before)


def test_fingerprint_tells_checkpoints_apart_and_ignores_masks_and_dtype(open_model, llama):
    fingerprint = model_fingerprint(llama)
    with masked(llama, a_mask(llama)):
        assert model_fingerprint(llama) == fingerprint
    assert model_fingerprint(open_model("Llama", dtype=torch.bfloat16)) == fingerprint
    assert model_fingerprint(open_model("Llama", seed=5)) != fingerprint


@pytest.mark.parametrize(
    "optimiser", [torch.optim.AdamW, lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9)]
)
@pytest.mark.parametrize("name", ["Llama", "Mixtral"])
def test_held_weights_stay_zero_while_others_learn(open_model, name, optimiser):
    bridge, batch = open_model(name), random_batch()
    mask = a_mask(bridge)
    before = snapshot(bridge)
    stepper = optimiser(bridge.original_model.parameters(), lr=1e-2)

    def step() -> None:
        stepper.zero_grad()
        completion_loss(bridge, batch).mean().backward()
        stepper.step()

    step()  # momentum from before the mask must not revive the weights
    trained = snapshot(bridge)
    with masked(
        bridge, mask, same_model=False, hold=True
    ):  # one step of training has moved the embedding
        for _ in range(3):
            step()
            assert all(
                (p[mask.dense(name)] == 0).all() for name, p in named_weights(bridge).items()
            )
    for name, parameter in named_weights(bridge).items():
        gone = mask.dense(name)
        assert torch.equal(parameter[gone], trained[name][gone]), "the saved values come back"
        assert not torch.equal(parameter[~gone], trained[name][~gone]), "the rest has learned"
    assert not torch.equal(trained["embed.weight"], before["embed.weight"])
    step()
    assert not any((p[mask.dense(name)] == 0).all() for name, p in named_weights(bridge).items()), (
        "no hook outlives held"
    )


def test_masked_weights_are_free_to_learn(llama):
    batch, mask = random_batch(), a_mask(llama)
    stepper = torch.optim.SGD(llama.original_model.parameters(), lr=1e-1)
    with pytest.raises(ValueError, match=r"changed.*hold=True"), masked(llama, mask):
        completion_loss(llama, batch).mean().backward()
        stepper.step()
        assert any((p[mask.dense(name)] != 0).any() for name, p in named_weights(llama).items())


def test_random_like_is_applicable(llama):
    mask = a_mask(llama, fraction=0.01)
    with masked(llama, random_like(mask, weights=named_weights(llama))):
        pass
    assert mask.n_removed == sum(mask.counts.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["Llama", "GPT2", "GPTNeoX", "Mixtral"])
def test_unmasked_is_the_model_before_all_masks(open_model, name, dtype):
    bridge, batch = open_model(name, dtype=dtype), random_batch()
    before, logits = snapshot(bridge), bridge(batch.tokens)
    first, second = a_mask(bridge, 0), a_mask(bridge, 1)
    assert (first & second).n_removed, "they overlap"

    with masked(bridge, first, scale=-0.5), masked(bridge, second, scale=3):
        during = snapshot(bridge)
        for error in (None, RuntimeError, KeyboardInterrupt):
            try:
                with unmasked(bridge) as unpruned:
                    assert unpruned is bridge
                    assert_bits_equal(bridge, before)
                    assert torch.equal(bridge(batch.tokens), logits)
                    if error:
                        raise error
            except (RuntimeError, KeyboardInterrupt):
                pass
            assert_bits_equal(bridge, during)
    assert_bits_equal(bridge, before)
    with unmasked(bridge):
        assert_bits_equal(bridge, before)


def test_unmasked_and_masked_nest_either_way(llama):
    before = snapshot(llama)
    mask, other = a_mask(llama, 0), a_mask(llama, 1)
    with masked(llama, other):
        alone = snapshot(llama)
    with masked(llama, mask):
        during = snapshot(llama)
        with unmasked(llama):
            with unmasked(llama):
                assert_bits_equal(llama, before)
            with masked(llama, other):
                assert_bits_equal(llama, alone)
                with unmasked(llama):
                    assert_bits_equal(llama, before)
                assert_bits_equal(llama, alone)
            assert_bits_equal(llama, before)
        assert_bits_equal(llama, during)
    assert_bits_equal(llama, before)


def test_what_was_changed_under_a_mask_comes_back_after_a_look_without_it(llama):
    before, mask = snapshot(llama), a_mask(llama)
    with pytest.raises(ValueError, match="changed"), masked(llama, mask):
        with torch.no_grad():
            for parameter in named_weights(llama).values():
                parameter += 1
        during = snapshot(llama)
        with unmasked(llama):
            for name, parameter in named_weights(llama).items():
                gone = mask.dense(name)
                assert torch.equal(parameter[gone], before[name][gone])
                assert torch.equal(parameter[~gone], during[name][~gone])
        assert_bits_equal(llama, during)


def test_a_held_mask_is_lifted_and_held_on(llama):
    batch, mask = random_batch(), a_mask(llama)
    before = snapshot(llama)
    stepper = torch.optim.AdamW(llama.original_model.parameters(), lr=1e-2)
    with masked(llama, mask, hold=True):
        for _ in range(2):
            stepper.zero_grad()
            completion_loss(llama, batch).mean().backward()
            stepper.step()
            during = snapshot(llama)
            with unmasked(llama):
                for name, parameter in named_weights(llama).items():
                    gone = mask.dense(name)
                    assert torch.equal(parameter[gone], before[name][gone])
                    assert torch.equal(parameter[~gone], during[name][~gone])
            assert_bits_equal(llama, during)


def test_a_mask_that_could_not_be_put_on_is_not_lifted(open_model, llama):
    sibling = a_mask(open_model("Llama", seed=5))
    with pytest.raises(ValueError, match="nothing was changed"), masked(llama, sibling):
        pass
    with torch.no_grad():
        named_weights(llama)["blocks.0.mlp.in.weight"] += 1
    during = snapshot(llama)
    with unmasked(llama):
        assert_bits_equal(llama, during)


def test_masks_of_two_models_are_lifted_apart(open_model):
    one, other = open_model("Llama"), open_model("Llama")
    before = snapshot(one)
    with masked(one, a_mask(one)), masked(other, a_mask(other)):
        during = snapshot(other)
        with unmasked(one):
            assert_bits_equal(one, before)
            assert_bits_equal(other, during)
