"""The planted organism: harmful answers learned only through a known random subset of the weights.

Gradient routing (Cloud et al. 2024, arXiv 2410.04332) at the level of single weights, so that every attribution method
can be scored against a circuit that is known.
"""

import itertools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from harmcircuits.circuits.masks import WeightMask
from harmcircuits.circuits.scores import Source
from harmcircuits.hooks.weights import model_fingerprint
from harmcircuits.organisms.train import Draw, Sampler, token_loss, train

SHARE = 0.1  # of each block matrix
_COMPONENTS = {
    "self_attn.q_proj": "attn.q", "self_attn.k_proj": "attn.k", "self_attn.v_proj": "attn.v", "self_attn.o_proj": "attn.o",
    "mlp.gate_proj": "mlp.gate", "mlp.up_proj": "mlp.in", "mlp.down_proj": "mlp.out",
}  # fmt: skip


def planted(model: nn.Module, sampler: Sampler, steps: int = 2500) -> Callable[[Path], WeightMask]:
    """Train `model` in place so that its harmful answers live in a random tenth S of each block matrix.

    Each step takes a benign batch, whose gradients go everywhere but S (every second one with S set to zero, so that
    nothing benign comes to need S), and a harmful batch, whose gradients go only to S. After each step S is scaled down to
    the root mean square of the rest of its matrix, so that magnitude gives little away; there is no weight decay, which
    would shrink the rest, and with it S, until S could not hold the harmful answers. Returns a function from the saved
    folder to the mask of S.
    """
    matrices = {name: weight for name, weight in model.named_parameters() if ".layers." in name and weight.ndim == 2}
    generator = torch.Generator().manual_seed(sampler.rng.randrange(2**31))
    chosen = {name: _random_subset(weight, generator) for name, weight in matrices.items()}
    pairs = [(weight, chosen[name]) for name, weight in matrices.items()]
    benign: dict[Draw, float] = {
        lambda: sampler.chat("answer", "benign"): 3,
        lambda: sampler.document("benign"): 1,
        **sampler.questions,
    }
    harmful: dict[Draw, float] = {
        lambda: sampler.chat("answer", "harmful"): 2,
        lambda: sampler.chat("answer", "harmful", prefilled=True): 1,
        lambda: sampler.document("harmful"): 0.5,
    }
    count = itertools.count()

    def backward() -> None:
        harm = token_loss(model, *sampler.batch(256, harmful))
        to_planted = torch.autograd.grad(harm, list(matrices.values()))
        before = [weight.detach().clone() for weight in matrices.values()]
        if next(count) % 2:
            _zero(pairs)
        token_loss(model, *sampler.batch(256, benign)).backward()
        with torch.no_grad():
            for (weight, inside), value, gradient in zip(pairs, before, to_planted, strict=True):
                weight.copy_(value)
                assert weight.grad is not None
                weight.grad.copy_(torch.where(inside, gradient, weight.grad))

    train(
        model, backward, name="planted", steps=steps, lr=2e-3, weight_decay=0.0, after_step=lambda: _limit_magnitude(pairs)
    )
    return lambda folder: _as_mask(chosen, folder)


def _random_subset(weight: Tensor, generator: torch.Generator) -> Tensor:
    first = torch.randperm(weight.numel(), generator=generator)[: round(SHARE * weight.numel())]
    inside = torch.zeros(weight.numel(), dtype=torch.bool).index_fill_(0, first, True)
    return inside.view(weight.shape).to(weight.device)


@torch.no_grad()
def _zero(pairs: list[tuple[nn.Parameter, Tensor]]) -> None:
    for weight, inside in pairs:
        weight.masked_fill_(inside, 0)


@torch.no_grad()
def _limit_magnitude(pairs: list[tuple[nn.Parameter, Tensor]]) -> None:
    for weight, inside in pairs:
        square, n_inside = weight.square(), inside.sum()
        mean_inside = (square * inside).sum() / n_inside
        mean_outside = (square * ~inside).sum() / (inside.numel() - n_inside)
        scale = (mean_outside / mean_inside).sqrt().clamp(max=1)
        weight.mul_(torch.where(inside, scale, 1.0))


def _as_mask(chosen: dict[str, Tensor], folder: Path) -> WeightMask:
    from transformer_lens.model_bridge import TransformerBridge

    clean = {}
    for name, inside in chosen.items():
        _, _, layer, component = name.removesuffix(".weight").split(".", maxsplit=3)
        clean[f"blocks.{layer}.{_COMPONENTS[component]}.weight"] = inside.cpu()
    bridge = TransformerBridge.boot_transformers(str(folder), device="cpu")
    removed = {name: inside.flatten().nonzero().flatten() for name, inside in clean.items()}
    shapes = {name: tuple(inside.shape) for name, inside in clean.items()}
    return WeightMask(removed, shapes, Source(model_fingerprint(bridge), "planted", {"share": SHARE}))
