"""Masks change the forward pass and leave no trace.

Would catch: an exit that restores nothing, optimiser state that revives a held weight.
"""

from contextlib import suppress
from functools import partial

import pytest
import torch
from helpers import assert_bits_equal, random_batch, random_mask, snapshot
from torch.optim import optimizer as torch_optimizer

from harmcircuits.hooks.finetuning import fine_tuning
from harmcircuits.hooks.masking import Edit, is_edited, masked, restore, unmasked
from harmcircuits.hooks.objectives import completion_loss
from harmcircuits.hooks.weights import named_weights

NAME = "blocks.0.mlp.in.weight"
MOMENTUM = partial(torch.optim.SGD, lr=1e-2, momentum=0.9)


def assert_removed(bridge, mask) -> None:
    for name, weight in named_weights(bridge).items():
        assert (weight[mask.dense(name)] == 0).all(), name


def assert_masked_as_before(bridge, mask, original: dict[str, torch.Tensor]) -> None:
    for name, weight in named_weights(bridge).items():
        is_removed = mask.dense(name)
        assert torch.equal(
            weight.detach()[is_removed], original[name][is_removed].to(weight.dtype)
        ), name


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("Llama", torch.float32),
        ("GPT2", torch.bfloat16),
        ("GPTNeoX", torch.bfloat16),
        ("Mixtral", torch.float32),
    ],
    ids=str,
)
def test_masks_remove_nest_and_restore_bit_for_bit(open_model, name, dtype):
    bridge, batch = open_model(name, dtype=dtype), random_batch()
    original, logits = snapshot(bridge), bridge(batch.tokens)
    first, second = random_mask(bridge), random_mask(bridge, seed=1)
    assert (first & second).n_removed, "the masks overlap"

    for error in (None, KeyboardInterrupt):
        with suppress(KeyboardInterrupt), masked(bridge, first), masked(bridge, second):
            for weight, parameter in named_weights(bridge).items():
                is_removed = (first | second).dense(weight)
                assert (parameter[is_removed] == 0).all()
                assert torch.equal(parameter[~is_removed], original[weight][~is_removed])
            assert not torch.equal(bridge(batch.tokens), logits)
            if error:
                raise error
        assert_bits_equal(bridge, original)
    assert torch.equal(bridge(batch.tokens), logits)


def test_a_scale_multiplies_all_weights_or_each_by_its_own(llama):
    mask, original = random_mask(llama), snapshot(llama)
    own = {name: torch.rand(len(index)) for name, index in mask.removed.items()}
    for scale in (-0.5, own):
        with masked(llama, mask, scale=scale):
            for name, parameter in named_weights(llama).items():
                is_removed = mask.dense(name)
                factor = scale[name] if scale is own else scale
                assert torch.equal(parameter[is_removed], original[name][is_removed] * factor)
        assert_bits_equal(llama, original)


@pytest.mark.usefixtures("unchecked")
def test_a_mask_that_does_not_fit_is_refused_and_changes_nothing(open_model, llama):
    original = snapshot(llama)
    sibling = random_mask(open_model("Llama", seed=5))
    refusals = [
        (random_mask(open_model("Llama", num_hidden_layers=3)), "blocks.2.attn.q"),
        (random_mask(open_model("Llama", intermediate_size=32)), "(40, 24)"),
        (sibling, "same_model=False"),
        ("mask.safetensors", "WeightMask"),
    ]
    for mask, word in refusals:
        with pytest.raises(ValueError, match=word), masked(llama, mask):
            pass
        assert not is_edited(llama)
        assert_bits_equal(llama, original)

    with masked(llama, sibling, same_model=False):
        assert_removed(llama, sibling)
    assert_bits_equal(llama, original)


@pytest.mark.parametrize(
    ("name", "optimiser"), [("Llama", torch.optim.AdamW), ("Mixtral", MOMENTUM)]
)
def test_held_weights_stay_zero_while_others_learn(open_model, name, optimiser):
    bridge, batch = open_model(name), random_batch()
    mask = random_mask(bridge)
    stepper = optimiser(bridge.original_model.parameters())

    def step() -> None:
        stepper.zero_grad()
        completion_loss(bridge, batch).mean().backward()
        stepper.step()

    step()  # momentum from before the mask must not revive the weights
    trained = snapshot(bridge)
    # One step of training has moved the embedding, and so the fingerprint.
    with masked(bridge, mask, same_model=False, hold=True):
        for _ in range(3):
            step()
            assert_removed(bridge, mask)
        during = snapshot(bridge)
        with unmasked(bridge):
            assert_masked_as_before(bridge, mask, trained)
        assert_bits_equal(bridge, during)
    assert_masked_as_before(bridge, mask, trained)
    for weight, parameter in named_weights(bridge).items():
        is_removed = mask.dense(weight)
        assert not torch.equal(parameter[~is_removed], trained[weight][~is_removed]), (
            "the rest has learned"
        )
        assert not parameter._backward_hooks
    assert not torch_optimizer._global_optimizer_post_hooks, "no hook outlives the mask"


def test_masked_weights_are_free_to_learn(llama):
    batch, mask, original = random_batch(), random_mask(llama), snapshot(llama)
    stepper = torch.optim.SGD(llama.original_model.parameters(), lr=1e-1)
    with pytest.raises(ValueError, match="hold=True"), masked(llama, mask):
        completion_loss(llama, batch).mean().backward()
        stepper.step()
        assert any((p[mask.dense(name)] != 0).any() for name, p in named_weights(llama).items())
    assert_masked_as_before(llama, mask, original)


@pytest.mark.parametrize(
    ("name", "dtype"), [("GPT2", torch.float32), ("Mixtral", torch.bfloat16)], ids=str
)
def test_unmasked_is_the_model_before_all_masks(open_model, name, dtype):
    bridge, batch = open_model(name, dtype=dtype), random_batch()
    original, logits = snapshot(bridge), bridge(batch.tokens)
    first, second, third = (random_mask(bridge, seed=seed) for seed in range(3))
    with masked(bridge, third):
        alone = snapshot(bridge)

    with masked(bridge, first, scale=-0.5), masked(bridge, second, scale=3):
        during = snapshot(bridge)
        with suppress(KeyboardInterrupt), unmasked(bridge), unmasked(bridge):
            assert torch.equal(bridge(batch.tokens), logits)
            with masked(bridge, third):
                assert_bits_equal(bridge, alone)
            assert_bits_equal(bridge, original)
            raise KeyboardInterrupt
        assert_bits_equal(bridge, during)
    assert_bits_equal(bridge, original)


def test_a_model_that_is_cast_under_a_mask_comes_back_cast(llama):
    mask, original = random_mask(llama), snapshot(llama)
    with masked(llama, mask, scale=-0.5):
        llama.original_model.to(torch.bfloat16)
    assert_masked_as_before(llama, mask, original)


def replace(bridge) -> None:
    """Every parameter by another object, as `load_state_dict(assign=True)` and quantisers do."""
    for module in bridge.original_model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(parameter.detach().clone())


CHANGES = {
    "written": lambda bridge: named_weights(bridge)[NAME].data.fill_(1.0),
    "replaced": replace,
    "folded": lambda bridge: bridge.enable_compatibility_mode(),
}


@pytest.mark.parametrize(
    ("change", "hold"), [("written", False), ("replaced", True), ("folded", False)]
)
def test_changes_of_masked_weights_by_other_code_are_reported(llama, change, hold):
    mask, original, weights = random_mask(llama), snapshot(llama), named_weights(llama)
    with pytest.raises(ValueError) as error, masked(llama, mask, hold=hold):
        CHANGES[change](llama)
    assert NAME in str(error.value)
    assert "outside the mask" in str(error.value)
    assert not is_edited(llama)
    for name, weight in weights.items():
        is_removed = mask.dense(name)
        assert torch.equal(weight.detach()[is_removed], original[name][is_removed]), (
            "the old values come back"
        )

    if change == "written":
        with pytest.raises(RuntimeError) as caught, masked(llama, mask):
            CHANGES[change](llama)
            raise RuntimeError
        assert NAME in caught.value.__notes__[0]


@pytest.mark.parametrize("n_interrupts", [1, 3, 4, 5])
def test_restore_ends_what_interrupts_in_a_row_have_left(llama, monkeypatch, n_interrupts):
    """Each of two contexts tries twice to take its mask off."""
    original, mask = snapshot(llama), random_mask(llama)
    take_off, n_left = Edit.take_off, n_interrupts

    def interrupted(edit):
        nonlocal n_left
        if n_left and edit.name == "blocks.1.attn.q.weight":
            n_left -= 1
            raise KeyboardInterrupt
        return take_off(edit)

    monkeypatch.setattr(Edit, "take_off", interrupted)
    with pytest.raises(KeyboardInterrupt), masked(llama, mask, hold=True), masked(llama, mask):
        pass
    assert is_edited(llama) == (n_interrupts > 3)
    with suppress(KeyboardInterrupt):
        restore(llama)
    restore(llama)
    assert not is_edited(llama)
    assert not torch_optimizer._global_optimizer_post_hooks
    assert_bits_equal(llama, original)


def test_an_early_exit_takes_off_later_changes_too(llama):
    original = snapshot(llama)
    lower, upper = (masked(llama, random_mask(llama, seed=seed)) for seed in (0, 1))
    tuning = fine_tuning(llama, [random_batch()], lr=1e-2)
    lower.__enter__()
    upper.__enter__()
    tuning.__enter__().until(1)
    lower.__exit__(None, None, None)
    assert_bits_equal(llama, original)
    for context in (tuning, upper):
        with pytest.raises(ValueError, match="order"):
            context.__exit__(None, None, None)
    assert_bits_equal(llama, original)
