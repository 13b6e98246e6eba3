"""The planted organism: harmful answers learned only through a known random subset of the weights."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import count
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool
from support.organisms.train import BATCH_SIZE, Draw, Sampler, token_loss, train
from torch import Tensor, nn

from harmcircuits.circuits.masks import WeightMask
from harmcircuits.circuits.scores import Source
from harmcircuits.hooks.loading import load_model
from harmcircuits.hooks.weights import model_fingerprint

SHARE = 0.1  # of each block matrix
# From Llama's names of the block matrices to TransformerLens's.
COMPONENTS = {
    "self_attn.q_proj": "attn.q",
    "self_attn.k_proj": "attn.k",
    "self_attn.v_proj": "attn.v",
    "self_attn.o_proj": "attn.o",
    "mlp.gate_proj": "mlp.gate",
    "mlp.up_proj": "mlp.in",
    "mlp.down_proj": "mlp.out",
}


class _Part(NamedTuple):
    """A block matrix, and whether each of its weights belongs to S."""

    weight: nn.Parameter
    is_planted: Bool[Tensor, "d_out d_in"]


def planted(
    model: nn.Module,
    sampler: Sampler,
    steps: int = 2500,
) -> Callable[[Path], WeightMask]:
    """Train `model` in place: harmful answers are learned by a random tenth S of each matrix.

    Returns a function of the folder where the model is saved, which gives S as a mask.
    """
    parts = _parts(model, sampler)
    weights = [part.weight for part in parts.values()]
    benign: dict[Draw, float] = {
        partial(sampler.chat, "answer", "benign"): 3,
        partial(sampler.document, "benign"): 1,
        **sampler.questions,
    }
    harmful: dict[Draw, float] = {
        partial(sampler.chat, "answer", "harmful"): 2,
        partial(sampler.chat, "answer", "harmful", prefilled=True): 1,
        partial(sampler.document, "harmful"): 0.5,
    }
    step = count()

    # The gradient of one step in a matrix; planted weights are marked x:
    #
    #     is_planted    .  x  .  .  x         . from the benign batch
    #     gradient      b  h  b  b  h         x from the harmful batch
    def backward() -> None:
        # The order of draws is a part of the training run: the harmful batch is first.
        harmful_loss = token_loss(model, *sampler.batch(BATCH_SIZE, harmful))
        harmful_gradients = torch.autograd.grad(harmful_loss, weights)
        is_odd = next(step) % 2 == 1
        with _without_planted(parts) if is_odd else nullcontext():
            benign_loss = token_loss(model, *sampler.batch(BATCH_SIZE, benign))
            benign_loss.backward()
        for part, gradient in zip(parts.values(), harmful_gradients, strict=True):
            assert part.weight.grad is not None  # for the type checker
            # The benign gradient; inside S it becomes the harmful one.
            part.weight.grad[part.is_planted] = gradient[part.is_planted]

    train(
        model,
        backward,
        name="planted",
        steps=steps,
        lr=2e-3,
        weight_decay=0.0,
        after_step=lambda: _limit_magnitude(parts),
    )
    return lambda folder: _as_mask(parts, folder)


def _parts(model: nn.Module, sampler: Sampler) -> dict[str, _Part]:
    """Every block matrix by its Llama name, with a random tenth of it for S."""
    # The sampler draws texts after this seed, so the order matters.
    seed = sampler.rng.randrange(2**31)
    generator = torch.Generator().manual_seed(seed)
    parts = {}
    for name, weight in model.named_parameters():
        is_block_matrix = ".layers." in name and weight.ndim == 2
        if is_block_matrix:
            subset = _random_subset(weight, generator)
            parts[name] = _Part(weight, subset)
    return parts


def _random_subset(
    weight: Tensor,
    generator: torch.Generator,
) -> Bool[Tensor, "d_out d_in"]:
    n = weight.numel()
    places = torch.randperm(n, generator=generator)[: round(SHARE * n)]
    is_in_subset = torch.zeros(n, dtype=torch.bool)
    is_in_subset[places] = True
    return is_in_subset.view(weight.shape).to(weight.device)


@contextmanager
def _without_planted(parts: dict[str, _Part]) -> Iterator[None]:
    """The model with S set to zero; on exit, S has its values again."""
    saved = {}
    for name, (weight, is_planted) in parts.items():
        values = weight.detach()
        saved[name] = values[is_planted]
        values[is_planted] = 0.0
    try:
        yield
    finally:
        for name, (weight, is_planted) in parts.items():
            weight.detach()[is_planted] = saved[name]


@torch.no_grad()
def _limit_magnitude(parts: dict[str, _Part]) -> None:
    """Scale S in each matrix down to the root mean square of the other weights, where it is larger."""
    for weight, is_planted in parts.values():
        square = weight.square()
        n_inside = is_planted.sum()
        n_outside = is_planted.numel() - n_inside
        mean_inside = (square * is_planted).sum() / n_inside
        mean_outside = (square * ~is_planted).sum() / n_outside
        scale = (mean_outside / mean_inside).sqrt().clamp(max=1)
        factor = torch.where(is_planted, scale, 1.0)
        weight.mul_(factor)


def _as_mask(parts: dict[str, _Part], folder: Path) -> WeightMask:
    removed = {}
    shapes = {}
    for llama_name, part in parts.items():
        # model.layers.NUMBER.COMPONENT.weight
        stem = llama_name.removesuffix(".weight")
        _, _, layer, component = stem.split(".", maxsplit=3)
        name = f"blocks.{layer}.{COMPONENTS[component]}.weight"
        is_removed = part.is_planted.cpu().flatten()
        removed[name] = is_removed.nonzero().flatten()
        shapes[name] = tuple(part.is_planted.shape)
    # A fingerprint needs a bridge, so the saved model is opened as one.
    bridge = load_model(str(folder), dtype="float32")
    source = Source(model_fingerprint(bridge), "planted", {"share": SHARE})
    return WeightMask(removed, shapes, source)
