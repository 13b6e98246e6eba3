# %% [markdown]
# # Ways of choosing the weights of harm
# What the search bench (`search_bench.py`) compares: the search, and what weight pruning and machine
# unlearning would choose. Each function gives, for every size, the weights that it would edit; its
# arguments are what its authors set.
#
# Notation: W a weight; g_x its gradient of the mean loss per token of an example's answer; *harm*
# the harmful answers that are scored, *others* those of every other ability that the model shows.

# %%
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from rounds import prune_in_rounds
from torch import Tensor

import harmcircuits as hc
from harmcircuits.behaviours.model import Calibration, Model
from harmcircuits.circuits.masks import Scope, union
from harmcircuits.circuits.scores import Source, WeightScores
from harmcircuits.hooks.accumulation import mean_gradients, unchanged
from harmcircuits.hooks.bridge import Bridge
from harmcircuits.hooks.masking import masked_if_given
from harmcircuits.hooks.weights import model_fingerprint
from harmcircuits.prompts import Batch

Calibrations = Mapping[str, Calibration]
Tensors = dict[str, Tensor]

TINY = 1e-30  # keeps quotients finite


@dataclass(frozen=True)
class Dampening:
    """Weights that are multiplied by factors of their own, in place of zero.

    Attributes:
        mask: the weights.
        factors: one for each of `mask.removed`.
    """

    mask: hc.WeightMask
    factors: Mapping[str, Tensor]

    @property
    def n_removed(self) -> int:
        """How many weights are edited."""
        return self.mask.n_removed


Edit = hc.WeightMask | Dampening
Method = Callable[..., Sequence[Edit]]


def edited(bridge: Bridge, edit: Edit) -> AbstractContextManager[Bridge]:
    """The model with the edit, restored bit for bit."""
    if isinstance(edit, hc.WeightMask):
        return hc.masked(bridge, edit)
    return hc.masked(bridge, edit.mask, scale=edit.factors)


# %% [markdown]
# ## Differences of two rankings
# The top q of the weights on harm, less the top p on each other ability. *Signed* is the published
# one (arXiv 2604.09544: removal effect, p = 5 q in each matrix), *unsigned* and *Wanda* those of
# arXiv 2402.05162 (|W| mean_x |g_x|, and |W| times the norm of its input; p = q).


# %%
def difference(
    model: Model,
    data: Calibrations,
    sizes: Sequence[float],
    *,
    score: Callable[..., WeightScores],
    spare: Callable[..., WeightScores],
    p_over_q: float,
    within: Scope = "weight",
) -> list[hc.WeightMask]:
    target, others = batches(data)
    of_target = score(model.bridge, target)
    of_others = [spare(model.bridge, other) for other in others]
    masks = []
    for q in sizes:
        p = p_over_q * q
        mask = hc.top_fraction(of_target, q, within=within)
        for scores in of_others:
            mask = mask - hc.top_fraction(scores, p, within=within)
        masks.append(mask)
    return masks


def batches(data: Calibrations) -> tuple[Sequence[Batch], list[Sequence[Batch]]]:
    """The harmful answers, and those of each other ability."""
    others = []
    for name, calibration in data.items():
        if name != "harmful":
            others.append(calibration.batches)
    return data["harmful"].batches, others


def together(groups: Iterable[Sequence[Batch]]) -> list[Batch]:
    """The batches of several abilities as those of one."""
    return [*chain.from_iterable(groups)]


# %% [markdown]
# ## Without a target
# The smallest weights by Wanda's score on everything else, in each row (arXiv 2306.11695: plain
# pruning, which arXiv 2401.10862 found to make models refuse more); the largest weights; any.


# %%
def wanda_pruning(
    model: Model, data: Calibrations, sizes: Sequence[float], *, within: Scope = "row"
) -> list[hc.WeightMask]:
    _, others = batches(data)
    scores = hc.wanda_scores(model.bridge, together(others))
    return hc.top_fraction(-scores, sizes, within=within)


def without_data(
    model: Model, _: Calibrations, sizes: Sequence[float], *, score: Callable[..., WeightScores]
) -> list[hc.WeightMask]:
    return hc.top_fraction(score(model.bridge), sizes, within="model")


# %% [markdown]
# ## Machine unlearning
# **Selective synaptic dampening** (SSD, arXiv 2308.07707): where the Fisher information of harm,
# F = g², is more than alpha times that of everything, W is multiplied by lambda F_all / F_harm, at
# most 1. The published code squares the gradient of a batch's mean loss, so F depends on how many
# examples are in a batch (*per batch*; 16 here); *per example* does not. alpha follows from the
# size; lambda = 1. *Zeroed* removes the same weights. A dampened weight is not a removed one: its
# size is the number of weights that are touched, and only the cost to the rest compares.
#
# **SalUn** (arXiv 2310.12508): the largest |mean g| on harm. **WAGLE** (arXiv 2410.17509): the
# largest |(W - g_others / mu) g_harm|, mu = 1e-6. Of both only the choice of weights is taken, not
# the training that follows it. **Product**: the largest -g_harm g_others, where the two gradients
# oppose each other.


# %%
def dampening(
    model: Model,
    data: Calibrations,
    sizes: Sequence[float],
    *,
    per_batch: int = 16,
    strength: float = 1.0,
    zeroed: bool = False,
    all_data: bool = True,
) -> list[Edit]:
    target, others = batches(data)
    everything = together([*others, target]) if all_data else together(others)
    of_harm = fisher(model.bridge, target, per_batch)
    of_all = fisher(model.bridge, everything, per_batch)
    ratio = {name: of_harm[name] / (of_all[name] + TINY) for name in of_harm}

    scores = scored(model.bridge, ratio, "dampening")
    masks = hc.top_fraction(scores, sizes, within="model")
    if zeroed:
        return list(masks)
    return [Dampening(mask, factors(mask, ratio, strength)) for mask in masks]


def factors(mask: hc.WeightMask, ratio: Tensors, strength: float) -> Tensors:
    """What each weight of a mask is multiplied by: less, the more it is harm's alone."""
    of_mask = {}
    for name, index in mask.removed.items():
        chosen = ratio[name].flatten()[index]
        factor = strength / (chosen + TINY)
        of_mask[name] = factor.clamp(max=1)
    return of_mask


def fisher(bridge: Bridge, data: Sequence[Batch], per_batch: int) -> Tensors:
    """Mean over batches of the squared gradient of the batch's mean loss."""
    parts = [*chain.from_iterable(cut(batch, per_batch) for batch in data)]
    mean: Tensors = {}
    for part in parts:
        for name, gradient in gradients(bridge, [part]).items():
            square = gradient.square_() / len(parts)
            if name in mean:
                mean[name].add_(square)
            else:
                mean[name] = square
    return mean


def cut(batch: Batch, size: int) -> Iterator[Batch]:
    for start in range(0, len(batch), size):
        rows = slice(start, start + size)
        yield Batch(batch.tokens[rows], batch.is_target[rows])


def salun(
    model: Model, data: Calibrations, sizes: Sequence[float], *, p_over_q: float = 0.0
) -> list[hc.WeightMask]:
    """With p: less the top p = p_over_q * q of the same score on each other ability."""
    target, others = batches(data)
    of_harm = gradient_sizes(model.bridge, target)
    if not p_over_q:
        return hc.top_fraction(of_harm, sizes, within="model")

    of_others = [gradient_sizes(model.bridge, other) for other in others]
    masks = []
    for q in sizes:
        p = p_over_q * q
        spared = union([hc.top_fraction(scores, p, within="model") for scores in of_others])
        masks.append(hc.top_fraction(of_harm, q, within="model", exclude=spared))
    return masks


def gradient_sizes(bridge: Bridge, data: Sequence[Batch]) -> WeightScores:
    mean = gradients(bridge, data)
    sizes = {name: gradient.abs_() for name, gradient in mean.items()}
    return scored(bridge, sizes, "gradient")


def wagle(
    model: Model, data: Calibrations, sizes: Sequence[float], *, mu: float = 1e-6
) -> list[hc.WeightMask]:
    of_harm, of_others = two_gradients(model, data)
    weights = hc.named_weights(model.bridge)
    values = {}
    for name, gradient in of_harm.items():
        moved = weights[name].detach() - of_others[name] / mu
        values[name] = (moved * gradient).abs_()
    scores = scored(model.bridge, values, "wagle")
    return hc.top_fraction(scores, sizes, within="model")


def product(
    model: Model, data: Calibrations, sizes: Sequence[float], *, times_weight: bool = False
) -> list[hc.WeightMask]:
    of_harm, of_others = two_gradients(model, data)
    weights = hc.named_weights(model.bridge)
    values = {}
    for name, gradient in of_harm.items():
        values[name] = -gradient * of_others[name]
        if times_weight:
            values[name] *= weights[name].detach().square()
    scores = scored(model.bridge, values, "product")
    return hc.top_fraction(scores, sizes, within="model")


def two_gradients(model: Model, data: Calibrations) -> tuple[Tensors, Tensors]:
    """Of harm, and of everything else."""
    target, others = batches(data)
    of_harm = gradients(model.bridge, target)
    of_others = gradients(model.bridge, together(others))
    return of_harm, of_others


def gradients(bridge: Bridge, data: Sequence[Batch]) -> Tensors:
    """The mean over examples of the gradient of every block matrix."""
    sites = hc.weight_sites(bridge)
    return mean_gradients(bridge, data, hc.completion_loss, sites, unchanged)


def scored(bridge: Bridge, values: Tensors, name: str) -> WeightScores:
    return WeightScores(values, Source(model_fingerprint(bridge), name))


# %% [markdown]
# ## A learned mask
# The expensive reference: a mask that descends a loss by itself, with straight-through gates and a
# budget of L0 norm. Every weight has a score; at every step the k highest are removed, k drawn from
# the sizes wanted; then all scores, those of removed weights too, take a step down the gradient of
#
#     spared * loss on one of the other abilities
#     + completeness * distance of harm's tokens from a uniform guess
#
# with respect to the gate, -W g, with momentum. The distance is the cross-entropy of the uniform
# distribution less its entropy, nats per token: the completeness term of DiscoGP (arXiv 2407.03779).


# %%
def learned_mask(
    model: Model,
    data: Calibrations,
    sizes: Sequence[float],
    *,
    steps: int = 500,
    spared: float = 1.0,
    completeness: float = 1.0,
    momentum: float = 0.9,
    seed: int = 0,
) -> list[hc.WeightMask]:
    bridge = model.bridge
    target, others = batches(data)
    weights = hc.named_weights(bridge)
    scores = {name: torch.zeros_like(weight.detach()) for name, weight in weights.items()}
    speed = {name: torch.zeros_like(weight.detach()) for name, weight in weights.items()}
    generator = torch.Generator().manual_seed(seed)

    mask = None  # before the first step all scores are alike
    with gradients_taken(weights.values()):
        for _ in range(steps):
            other = others[_below(len(others), generator)]
            with masked_if_given(bridge, mask):
                harm = from_uniform(bridge, drawn(target, generator))
                spared_loss = hc.completion_loss(bridge, drawn(other, generator)).mean()
                loss = spared * spared_loss + completeness * harm
                slopes = torch.autograd.grad(loss, list(weights.values()))

            # Outside the mask: W is what the weight was, also where it is removed.
            for (name, weight), gradient in zip(weights.items(), slopes, strict=True):
                speed[name].mul_(momentum)
                speed[name].addcmul_(weight.detach(), gradient)
                scores[name] += speed[name]
            size = sizes[_below(len(sizes), generator)]
            ranked = scored(bridge, scores, "learned mask")
            mask = hc.top_fraction(ranked, size, within="model")
    ranked = scored(bridge, scores, "learned mask")
    return hc.top_fraction(ranked, sizes, within="model")


@contextmanager
def gradients_taken(weights: Iterable[Tensor]) -> Iterator[None]:
    """Weights that gradients are taken with respect to; afterwards as they were."""
    needed = [(weight, weight.requires_grad) for weight in weights]
    try:
        for weight, _ in needed:
            weight.requires_grad_(True)
        yield
    finally:
        for weight, is_needed in needed:
            weight.requires_grad_(is_needed)


def _below(n: int, generator: torch.Generator) -> int:
    return int(torch.randint(n, (1,), generator=generator))


def drawn(data: Sequence[Batch], generator: torch.Generator, size: int = 16) -> Batch:
    """Some examples of one batch."""
    batch = data[_below(len(data), generator)]
    rows = torch.randperm(len(batch), generator=generator)[:size]
    return Batch(batch.tokens[rows], batch.is_target[rows])


def from_uniform(bridge: Bridge, batch: Batch) -> Tensor:
    """Cross-entropy of the uniform distribution less its entropy, at the targets of a batch."""
    tokens = batch.tokens.to(bridge.cfg.device)
    logits = bridge(tokens)[:, :-1].float()
    at_targets = logits[batch.is_target[:, 1:].to(logits.device)]
    log_probs = at_targets.log_softmax(dim=-1)
    uniform = torch.log(torch.tensor(float(log_probs.shape[-1])))
    return -log_probs.mean() - uniform


# %% [markdown]
# ## Every way, as published and with the settings that are tried
# The search's own defaults were chosen by the same bench (README of this folder).


# %%
def search(
    model: Model, data: Calibrations, sizes: Sequence[float], **settings: Any
) -> list[hc.WeightMask]:
    return model.find_circuit("harmful", size=sizes, calibrations=data, **settings)


def rounds(
    model: Model,
    data: Calibrations,
    sizes: Sequence[float],
    *,
    protect_share: float = 0.005,
    rounds: int = 10,
) -> list[hc.WeightMask]:
    target, others = batches(data)
    return prune_in_rounds(
        model.bridge,
        target,
        others,
        sizes=sizes,
        protect_share=protect_share,
        rounds=rounds,
    )


ONE_SHOT = {"steps": 1, "reach": 1.0, "renew": False}
ONE_SHOT_TRIED = [
    {**ONE_SHOT, "budget": 0.02},
    {**ONE_SHOT, "budget": 0.1},
]
DIFFERENCES = [
    {"p_over_q": 1.0, "within": "model"},
    {"p_over_q": 5.0, "within": "model"},
    {"p_over_q": 20.0, "within": "model"},
]


@dataclass(frozen=True)
class Way:
    """A way of choosing weights.

    Attributes:
        choose: gives the edits of every size.
        published: its settings where it was published, or its defaults.
        tried: other settings among which the best is looked for.
    """

    choose: Method
    published: Mapping[str, Any]
    tried: Sequence[Mapping[str, Any]] = ()


signed = partial(difference, score=hc.removal_effect, spare=hc.snip_scores)
unsigned = partial(difference, score=hc.snip_scores, spare=hc.snip_scores)
by_wanda = partial(difference, score=hc.wanda_scores, spare=hc.wanda_scores)

WAYS = {
    "search": Way(search, {}),
    "search, first answers": Way(search, {"renew": False}),
    "search, one shot": Way(search, ONE_SHOT, ONE_SHOT_TRIED),
    "search, neurons": Way(search, {"unit": "neuron"}),
    "rounds": Way(
        rounds,
        {},
        [
            {"protect_share": 0.0025},
            {"protect_share": 0.01},
            {"protect_share": 0.02},
        ],
    ),
    "signed difference": Way(signed, {"p_over_q": 5.0}, DIFFERENCES),
    "unsigned difference": Way(unsigned, {"p_over_q": 1.0}, DIFFERENCES),
    "Wanda difference": Way(by_wanda, {"p_over_q": 1.0}, DIFFERENCES),
    "SSD, dampened": Way(
        dampening,
        {},
        [
            {"per_batch": 1},
            {"all_data": False},
            {"per_batch": 1, "all_data": False},
        ],
    ),
    "SSD, zeroed": Way(
        dampening,
        {"zeroed": True},
        [
            {"zeroed": True, "per_batch": 1},
            {"zeroed": True, "all_data": False},
            {"zeroed": True, "per_batch": 1, "all_data": False},
        ],
    ),
    "SalUn": Way(
        salun,
        {},
        [
            {"p_over_q": 1.0},
            {"p_over_q": 5.0},
            {"p_over_q": 20.0},
        ],
    ),
    "WAGLE": Way(
        wagle,
        {},
        [
            {"mu": 1e-3},
            {"mu": 1.0},
            {"mu": 100.0},
        ],
    ),
    "gradient product": Way(product, {}, [{"times_weight": True}]),
    "learned mask": Way(
        learned_mask,
        {},
        [{"spared": 3.0}, {"spared": 10.0}],
    ),
    "Wanda pruning": Way(wanda_pruning, {}, [{"within": "weight"}, {"within": "model"}]),
    "magnitude": Way(partial(without_data, score=hc.magnitude_scores), {}),
    "random": Way(partial(without_data, score=hc.random_scores), {}),
}
