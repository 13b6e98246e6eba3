"""Fine-tuning learns, leaves no trace, and respects masks; merged low-rank adapters are those of the literature.

Would catch: a parameter, flag or gradient that is not restored; an optimiser or a merge that revives a held weight; held
entries that still steer the factors; a wrong orientation of the factors on GPT-2; an order of batches not the seed's.
"""

import pytest
import torch
from conftest import random_batch
from test_masking import a_mask, assert_bits_equal, snapshot

from harmcircuits.hooks.finetuning import Lora, fine_tuning
from harmcircuits.hooks.masking import held, masked
from harmcircuits.hooks.objectives import completion_loss
from harmcircuits.hooks.weights import named_weights, weight_sites

BATCHES = [random_batch(4, seed=seed) for seed in range(3)]
MODES = pytest.mark.parametrize("lora", [None, Lora(r=3, alpha=6)], ids=["full", "low rank"])
ARCHITECTURES = pytest.mark.parametrize("name", ["Llama", "GPT2", "GPTNeoX"])


@MODES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_the_loss_falls_and_everything_is_restored(open_model, name, dtype, lora):
    bridge = open_model(name, dtype=dtype)
    some = next(iter(named_weights(bridge).values()))
    some.grad = torch.ones_like(some)
    bridge.blocks[0].requires_grad_(False)
    flags = [p.requires_grad for p in bridge.original_model.parameters()]
    before, gradient = snapshot(bridge), some.grad
    for error in (None, RuntimeError, KeyboardInterrupt):
        try:
            with fine_tuning(bridge, BATCHES, lr=1e-2, lora=lora) as run:
                if error:
                    run.until(1)
                    raise error
                run.until(3)
                run.until(12)
                assert run.step == len(run.losses) == 12
                assert sum(run.losses[-3:]) < 0.9 * sum(run.losses[:3])
                for weight, parameter in named_weights(bridge).items():
                    assert not torch.equal(parameter, before[weight]), f"{weight} has not learned"
                if lora:
                    assert torch.equal(bridge.state_dict()["embed.weight"], before["embed.weight"])
        except (RuntimeError, KeyboardInterrupt):
            pass
        assert_bits_equal(bridge, before)
        assert flags == [p.requires_grad for p in bridge.original_model.parameters()]
        assert some.grad is gradient
        assert all(p.grad is None for p in bridge.original_model.parameters() if p is not some)
        assert not any(p._post_accumulate_grad_hooks for p in bridge.original_model.parameters())


@MODES
def test_the_seed_decides_the_run(llama, lora):
    def losses(seed: int) -> list[float]:
        with fine_tuning(llama, BATCHES, lr=1e-2, lora=lora, seed=seed) as run:
            run.until(7)
            return run.losses

    torch.manual_seed(1)
    first = losses(0)
    torch.manual_seed(2)
    assert losses(0) == first, "no hidden random state"
    assert losses(1) != first


def test_an_epoch_takes_every_batch_once(llama):
    seen = []

    def objective(bridge, batch):
        seen.append(next(number for number, known in enumerate(BATCHES) if known is batch))
        return completion_loss(bridge, batch)

    with fine_tuning(llama, BATCHES, lr=1e-3, objective=objective) as run:
        run.until(15)
    epochs = [seen[start : start + 3] for start in range(0, 15, 3)]
    assert all(sorted(epoch) == [0, 1, 2] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


@MODES
@ARCHITECTURES
def test_held_weights_are_zero_at_every_step(open_model, name, lora):
    bridge, mask = open_model(name), a_mask(open_model(name))
    before = snapshot(bridge)
    with held(bridge, mask), fine_tuning(bridge, BATCHES, lr=1e-2, lora=lora, weight_decay=0.1) as run:
        for step in range(4):
            run.until(step)
            assert all((p[mask.dense(weight)] == 0).all() for weight, p in named_weights(bridge).items())
    assert_bits_equal(bridge, before)
    with fine_tuning(bridge, BATCHES, lr=1e-2, lora=lora) as run, held(bridge, mask):  # the other way round
        run.until(3)
        assert all((p[mask.dense(weight)] == 0).all() for weight, p in named_weights(bridge).items())
    assert_bits_equal(bridge, before)


@MODES
def test_released_weights_start_at_zero_and_learn(llama, lora):
    mask, before = a_mask(llama), snapshot(llama)
    with masked(llama, mask), fine_tuning(llama, BATCHES, lr=1e-2, lora=lora) as run:
        assert all((p[mask.dense(weight)] == 0).all() for weight, p in named_weights(llama).items())
        run.until(3)
        assert all((p[mask.dense(weight)] != 0).any() for weight, p in named_weights(llama).items())
    assert_bits_equal(llama, before)


@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_factors_learn_as_autograd_says_also_under_a_held_mask(open_model, name):
    """W = M * (W_0 + s up down), trained through autograd on the factors, gives the same merged weights."""
    bridge, lora, mask = open_model(name), Lora(r=2, alpha=8), a_mask(open_model(name))
    batch, factors = BATCHES[0], {}
    with held(bridge, mask), fine_tuning(bridge, [batch], lr=1e-2, lora=lora, seed=4) as run:
        run.until(4)
        found = {weight: p.detach().clone() for weight, p in named_weights(bridge).items()}

    reference, generator = open_model(name), torch.Generator().manual_seed(4)
    for weight, site in weight_sites(reference).items():
        d_in, d_out = site.parameter.shape[site.input_axis], site.parameter.shape[1 - site.input_axis]
        down = (2 * torch.rand(2, d_in, generator=generator) - 1) / d_in**0.5
        factors[weight] = (torch.zeros(d_out, 2, requires_grad=True), down.requires_grad_(), site.input_axis)
    stepper = torch.optim.AdamW([half for up, down, _ in factors.values() for half in (up, down)], lr=1e-2, weight_decay=0)
    kept = {weight: ~mask.dense(weight) for weight in factors}

    class Merged(torch.nn.Module):
        def __init__(self, weight: str) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, start):
            up, down, input_axis = factors[self.weight]
            change = 4 * up @ down
            return kept[self.weight] * (start + (change if input_axis == 1 else change.T))

    for weight in factors:
        module = reference.get_submodule(weight.removesuffix(".weight")).original_component
        torch.nn.utils.parametrize.register_parametrization(module, "weight", Merged(weight))
    for _ in range(4):
        stepper.zero_grad()
        completion_loss(reference, batch).mean().backward()
        stepper.step()
    for weight in factors:
        module = reference.get_submodule(weight.removesuffix(".weight")).original_component
        torch.testing.assert_close(found[weight], module.weight.detach(), atol=2e-5, rtol=1e-4)


def test_merged_adapters_equal_those_of_peft(open_model):
    peft = pytest.importorskip("peft")
    bridge, lora = open_model("Llama"), Lora(r=4, alpha=2)
    adapted, generator = open_model("Llama").original_model, torch.Generator().manual_seed(0)
    with fine_tuning(bridge, BATCHES[:1], lr=1e-2, lora=lora) as run:
        run.until(5)
        found = bridge(BATCHES[0].tokens)
    config = peft.LoraConfig(r=4, lora_alpha=2, target_modules=r".*_proj\._original_component")
    peft.inject_adapter_in_model(config, adapted)
    layers = [module for module in adapted.modules() if isinstance(module, peft.tuners.lora.Linear)]
    assert len(layers) == len(weight_sites(bridge))
    for layer in layers:
        down = layer.lora_A["default"].weight
        with torch.no_grad():
            down.copy_((2 * torch.rand(down.shape, generator=generator) - 1) / down.shape[1] ** 0.5)
    stepper = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
    for _ in range(5):
        stepper.zero_grad()
        logits = adapted(input_ids=BATCHES[0].tokens).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), BATCHES[0].tokens[:, 1:], reduction="none")
        is_target = BATCHES[0].is_target[:, 1:].float()
        ((losses * is_target).sum(1) / is_target.sum(1)).mean().backward()
        stepper.step()
    torch.testing.assert_close(adapted(input_ids=BATCHES[0].tokens).logits, found, atol=1e-3, rtol=1e-3)


def test_bad_settings_are_refused_and_change_nothing(llama):
    before = snapshot(llama)
    with pytest.raises(ValueError, match="no batches"), fine_tuning(llama, [], lr=1e-3):
        pass
    with pytest.raises(ValueError, match=r"lr=0\.0"), fine_tuning(llama, BATCHES, lr=0.0):
        pass
    with pytest.raises(ValueError, match="r=0"):
        Lora(r=0)
    with pytest.raises(ValueError, match=r"until\(1\): 2 steps"), fine_tuning(llama, BATCHES, lr=1e-3) as run:
        run.until(2)
        run.until(1)
    nan = lambda bridge, batch: completion_loss(bridge, batch) * torch.nan  # noqa: E731
    with (
        pytest.raises(ValueError, match="loss is nan at step 0"),
        fine_tuning(llama, BATCHES, lr=1e-3, objective=nan) as run,
    ):
        run.until(1)
    assert_bits_equal(llama, before)


def test_low_rank_refuses_stacked_experts(open_model):
    with (
        pytest.raises(ValueError, match="stacks the matrices of several experts"),
        fine_tuning(open_model("Mixtral"), BATCHES, lr=1e-3, lora=Lora()),
    ):
        pass
