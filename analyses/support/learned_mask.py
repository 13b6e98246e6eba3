"""A learned mask: gates on all weights that descend one loss, a reference for other masks."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from support.answers import Calibrations, batches_of
from torch import Tensor

from harmcircuits.batches import Batch
from harmcircuits.behaviours.model import Model
from harmcircuits.circuits.masks import WeightMask, top_fraction
from harmcircuits.circuits.scores import Source, WeightScores
from harmcircuits.hooks.bridge import Bridge
from harmcircuits.hooks.masking import masked_if_given
from harmcircuits.hooks.objectives import completion_loss
from harmcircuits.hooks.weights import model_fingerprint, named_weights

MOMENTUM = 0.9
BATCH = 16  # examples of a step, of harm and of another ability each


def learned_mask(
    model: Model,
    data: Calibrations,
    sizes: Sequence[float],
    *,
    steps: int = 500,
    seed: int = 0,
) -> list[WeightMask]:
    """Masks of these sizes, by straight-through gates.

    A step removes the weights of the highest scores, and moves the scores down the gradient of

        loss(protected ability) + KL(uniform, model) on harmful answers.
    """
    bridge = model.bridge
    target, protected = batches_of(data)
    weights = named_weights(bridge)
    scores = {name: torch.zeros_like(weight.detach()) for name, weight in weights.items()}
    speed = {name: torch.zeros_like(weight.detach()) for name, weight in weights.items()}
    source = Source(model_fingerprint(bridge), "learned mask")
    generator = torch.Generator().manual_seed(seed)

    mask = None  # before the first step all scores are equal
    with requiring_gradients(weights.values()):
        for _ in range(steps):
            ability = protected[random_below(len(protected), generator)]
            with masked_if_given(bridge, mask):
                harm = distance_to_uniform(bridge, random_examples(target, generator))
                loss = completion_loss(bridge, random_examples(ability, generator)).mean()
                gradients = torch.autograd.grad(loss + harm, list(weights.values()))

            # Outside the mask, where a removed weight has its value again.
            for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
                speed[name].mul_(MOMENTUM)
                speed[name].addcmul_(weight.detach(), gradient)
                scores[name] += speed[name]
            size = sizes[random_below(len(sizes), generator)]
            mask = top_fraction(WeightScores(scores, source), size, within="model")

    final = WeightScores(scores, source)
    return [top_fraction(final, size, within="model") for size in sizes]


@contextmanager
def requiring_gradients(weights: Iterable[Tensor]) -> Iterator[None]:
    """Weights that require gradients, and afterwards do as before."""
    required = [(weight, weight.requires_grad) for weight in weights]
    try:
        for weight, _ in required:
            weight.requires_grad_(True)
        yield
    finally:
        for weight, is_required in required:
            weight.requires_grad_(is_required)


def random_below(n: int, generator: torch.Generator) -> int:
    """A random number from 0 to n - 1."""
    return int(torch.randint(n, (1,), generator=generator))


def random_examples(data: Sequence[Batch], generator: torch.Generator) -> Batch:
    """Random examples of a random batch."""
    batch = data[random_below(len(data), generator)]
    rows = torch.randperm(len(batch), generator=generator)[:BATCH]
    return Batch(batch.tokens[rows], batch.is_target[rows])


def distance_to_uniform(bridge: Bridge, batch: Batch) -> Tensor:
    """KL(uniform, model) at the targets; nats a token."""
    tokens = batch.tokens.to(bridge.cfg.device)
    logits = bridge(tokens)[:, :-1].float()
    at_targets = logits[batch.is_target[:, 1:].to(logits.device)]
    log_probs = at_targets.log_softmax(dim=-1)
    entropy = torch.log(torch.tensor(float(log_probs.shape[-1])))
    return -log_probs.mean() - entropy
