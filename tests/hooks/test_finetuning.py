"""Fine-tuning learns, leaves no trace, and respects masks; low-rank adapters learn as autograd says.

Would catch: an optimiser or a merge that revives a held weight, a wrong orientation of the factors.
"""

from contextlib import nullcontext

import pytest
import torch
from helpers import assert_bits_equal, random_batch, random_mask, snapshot
from test_masking import assert_removed
from torch.nn.utils import parametrize

from harmcircuits.hooks.finetuning import Lora, fine_tuning
from harmcircuits.hooks.masking import masked
from harmcircuits.hooks.objectives import completion_loss
from harmcircuits.hooks.weights import named_weights, weight_sites

BATCHES = [random_batch(4, seed=seed) for seed in range(3)]
LORA = Lora(r=3, alpha=6)


@pytest.mark.parametrize(
    ("name", "dtype", "lora", "error"),
    [
        ("Llama", torch.float32, None, None),
        ("GPT2", torch.bfloat16, None, RuntimeError),
        ("Llama", torch.bfloat16, LORA, None),
        ("GPT2", torch.float32, LORA, KeyboardInterrupt),
    ],
    ids=str,
)
def test_the_loss_falls_held_weights_stay_zero_and_everything_is_restored(
    open_model, name, dtype, lora, error
):
    bridge = open_model(name, dtype=dtype)
    weight = next(iter(named_weights(bridge).values()))
    gradient = torch.ones_like(weight)
    weight.grad = gradient
    bridge.blocks[0].requires_grad_(False)
    parameters = list(bridge.original_model.parameters())
    flags = [parameter.requires_grad for parameter in parameters]
    original, mask = snapshot(bridge), random_mask(bridge)

    outcome = pytest.raises(error) if error else nullcontext()
    tuning = fine_tuning(bridge, BATCHES, lr=1e-2, lora=lora, weight_decay=0.1)
    with outcome, masked(bridge, mask, hold=True), tuning as run:
        run.until(1)
        assert_removed(bridge, mask)
        if error:
            raise error
        run.until(12)
        assert_removed(bridge, mask)
        assert run.step == len(run.losses) == 12
        assert sum(run.losses[-3:]) < 0.9 * sum(run.losses[:3])
        for name, parameter in named_weights(bridge).items():
            is_kept = ~mask.dense(name)
            assert not torch.equal(parameter[is_kept], original[name][is_kept]), (
                "it has not learned"
            )
        if lora:
            assert torch.equal(bridge.state_dict()["embed.weight"], original["embed.weight"])

    assert_bits_equal(bridge, original)
    assert flags == [parameter.requires_grad for parameter in parameters]
    assert weight.grad is gradient
    for parameter in parameters:
        assert parameter is weight or parameter.grad is None
        assert not parameter._post_accumulate_grad_hooks


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "low rank"])
def test_the_seed_decides_the_run_and_an_epoch_takes_every_batch_once(llama, lora):
    batch_ids = []

    def objective(bridge, batch):
        batch_ids.append(id(batch))
        return completion_loss(bridge, batch)

    def losses(seed: int) -> list[float]:
        options = {"lr": 1e-2, "lora": lora, "seed": seed, "objective": objective}
        with fine_tuning(llama, BATCHES, **options) as run:
            run.until(9)
            return run.losses

    first = losses(0)
    torch.manual_seed(2)
    assert losses(0) == first, "no hidden random state"
    assert losses(1) != first
    epochs = [tuple(batch_ids[start : start + 3]) for start in range(0, 27, 3)]
    assert all(set(epoch) == set(map(id, BATCHES)) for epoch in epochs)
    assert len(set(epochs)) > 1


class Merged(torch.nn.Module):
    """M * (W_0 + s up down), as a parametrisation of W."""

    def __init__(self, site, is_kept, lora, generator) -> None:
        super().__init__()
        d_in = site.parameter.shape[site.input_axis]
        d_out = site.parameter.shape[1 - site.input_axis]
        down = (2 * torch.rand(lora.r, d_in, generator=generator) - 1) / d_in**0.5
        self.up = torch.nn.Parameter(torch.zeros(d_out, lora.r))
        self.down = torch.nn.Parameter(down)
        self.scale = lora.alpha / lora.r
        self.is_kept = is_kept
        self.input_axis = site.input_axis

    def forward(self, start):
        change = self.scale * self.up @ self.down
        return self.is_kept * (start + (change if self.input_axis == 1 else change.T))


@pytest.mark.parametrize("name", ["Llama", "GPT2"])  # both orientations
def test_factors_learn_as_autograd_says_also_under_a_held_mask(open_model, name):
    """Trained through autograd on the factors, W = M * (W_0 + s up down) is the same."""
    bridge = open_model(name)
    lora = Lora(r=2, alpha=8)
    mask = random_mask(bridge)
    batch = BATCHES[0]
    tuning = fine_tuning(bridge, [batch], lr=1e-2, lora=lora, seed=4)
    with masked(bridge, mask, hold=True), tuning as run:
        run.until(4)
        merged = snapshot(bridge)

    reference = open_model(name)
    generator = torch.Generator().manual_seed(4)
    factors, modules = [], {}
    for weight, site in weight_sites(reference).items():
        adapter = Merged(site, ~mask.dense(weight), lora, generator)
        factors += [adapter.up, adapter.down]
        component = reference.get_submodule(weight.removesuffix(".weight"))
        modules[weight] = component.original_component
        parametrize.register_parametrization(modules[weight], "weight", adapter)

    optimizer = torch.optim.AdamW(factors, lr=1e-2, weight_decay=0)
    for _ in range(4):
        optimizer.zero_grad()
        completion_loss(reference, batch).mean().backward()
        optimizer.step()
    for weight, module in modules.items():
        torch.testing.assert_close(merged[weight], module.weight.detach(), atol=2e-5, rtol=1e-4)


def test_bad_settings_are_refused_and_change_nothing(open_model, llama):
    original = snapshot(llama)

    def nan_loss(bridge, batch):
        return completion_loss(bridge, batch) * torch.nan

    refusals = [
        (llama, {"objective": nan_loss}, "loss is nan at step 0"),
        (open_model("Mixtral"), {"lora": LORA}, "leave lora out"),
    ]
    for bridge, options, word in refusals:
        tuning = fine_tuning(bridge, BATCHES, lr=1e-3, **options)
        with pytest.raises(ValueError, match=word), tuning as run:
            run.until(1)
    assert_bits_equal(llama, original)


@pytest.mark.parametrize("r", [0, -1])
def test_an_adapter_has_at_least_rank_1(r):
    with pytest.raises(ValueError, match=f"r={r}.*at least 1"):
        Lora(r=r)
