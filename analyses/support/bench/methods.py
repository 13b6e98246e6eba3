"""Ways of choosing the weights of harm: the search, weight pruning, machine unlearning."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from support.bench.rounds import PROTECT_SHARE, ROUNDS, prune_in_rounds
from torch import Tensor

from harmcircuits.batches import Batch
from harmcircuits.behaviours.behaviour import TARGET
from harmcircuits.behaviours.model import Model
from harmcircuits.behaviours.outcomes import Calibration
from harmcircuits.circuits.masks import Scope, WeightMask, top_fraction, union
from harmcircuits.circuits.scores import Source, WeightScores
from harmcircuits.hooks.bridge import Bridge
from harmcircuits.hooks.masking import masked, masked_if_given
from harmcircuits.hooks.objectives import completion_loss
from harmcircuits.hooks.weights import model_fingerprint, named_weights, weight_sites
from harmcircuits.search.accumulation import mean_gradients
from harmcircuits.search.attribution import (
    magnitude_scores,
    random_scores,
    removal_effect,
    snip_scores,
    wanda_scores,
)
from harmcircuits.studies.controls import one_shot_masks, unpruned_scores

Calibrations = Mapping[str, Calibration]
Tensors = dict[str, Tensor]

TINY = 1e-30  # keeps quotients finite


@dataclass(frozen=True)
class Dampening:
    """Weights that are multiplied by factors of their own, in place of zero."""

    mask: WeightMask
    factors: Mapping[str, Tensor]

    @property
    def n_removed(self) -> int:
        """How many weights are edited."""
        return self.mask.n_removed


Edit = WeightMask | Dampening
Method = Callable[..., Sequence[Edit]]


def edited(bridge: Bridge, edit: Edit) -> AbstractContextManager[Bridge]:
    """The model with the edit, restored bit for bit."""
    if isinstance(edit, WeightMask):
        return masked(bridge, edit)
    return masked(bridge, edit.mask, scale=edit.factors)


# Differences of two rankings


def difference(
    model: Model,
    data: Calibrations,
    sizes: Sequence[float],
    *,
    score: Callable[..., WeightScores],
    spare: Callable[..., WeightScores],
    p_over_q: float,
    within: Scope = "weight",
) -> list[WeightMask]:
    """The top q of the weights on harm, less the top p on each other ability."""
    target, others = batches(data)
    of_target = score(model.bridge, target)
    of_others = [spare(model.bridge, other) for other in others]
    masks = []
    for q in sizes:
        p = p_over_q * q
        mask = top_fraction(of_target, q, within=within)
        for scores in of_others:
            mask = mask - top_fraction(scores, p, within=within)
        masks.append(mask)
    return masks


def batches(data: Calibrations) -> tuple[Sequence[Batch], list[Sequence[Batch]]]:
    """The harmful answers, and those of each other ability."""
    others = []
    for name, calibration in data.items():
        if name != TARGET:
            others.append(calibration.batches)
    return data[TARGET].batches, others


def together(groups: Iterable[Sequence[Batch]]) -> list[Batch]:
    """The batches of several abilities as those of one."""
    return [*chain.from_iterable(groups)]


# Without a target


def wanda_pruning(
    model: Model, data: Calibrations, sizes: Sequence[float], *, within: Scope = "row"
) -> list[WeightMask]:
    """The smallest weights by Wanda's score on everything else, in each row (arXiv 2306.11695)."""
    _, others = batches(data)
    scores = wanda_scores(model.bridge, together(others))
    return [top_fraction(-scores, size, within=within) for size in sizes]


def without_data(
    model: Model, _: Calibrations, sizes: Sequence[float], *, score: Callable[..., WeightScores]
) -> list[WeightMask]:
    """The largest weights by a score that reads no answers."""
    scores = score(model.bridge)
    return [top_fraction(scores, size, within="model") for size in sizes]


# Machine unlearning


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
    """Selective synaptic dampening (SSD, arXiv 2308.07707)."""
    target, others = batches(data)
    everything = together([*others, target]) if all_data else together(others)
    of_harm = fisher(model.bridge, target, per_batch)
    of_all = fisher(model.bridge, everything, per_batch)
    ratio = {name: of_harm[name] / (of_all[name] + TINY) for name in of_harm}

    scores = scored(model.bridge, ratio, "dampening")
    masks = [top_fraction(scores, size, within="model") for size in sizes]
    if zeroed:
        return list(masks)
    return [Dampening(mask, factors(mask, ratio, strength)) for mask in masks]


def factors(mask: WeightMask, ratio: Tensors, strength: float) -> Tensors:
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
    """A batch as several."""
    for start in range(0, len(batch), size):
        rows = slice(start, start + size)
        yield Batch(batch.tokens[rows], batch.is_target[rows])


def salun(
    model: Model, data: Calibrations, sizes: Sequence[float], *, p_over_q: float = 0.0
) -> list[WeightMask]:
    """SalUn (arXiv 2310.12508): the largest |mean g| on harm."""
    target, others = batches(data)
    of_harm = gradient_sizes(model.bridge, target)
    if not p_over_q:
        return [top_fraction(of_harm, size, within="model") for size in sizes]

    of_others = [gradient_sizes(model.bridge, other) for other in others]
    masks = []
    for q in sizes:
        p = p_over_q * q
        spared = union([top_fraction(scores, p, within="model") for scores in of_others])
        masks.append(top_fraction(of_harm, q, within="model", exclude=spared))
    return masks


def gradient_sizes(bridge: Bridge, data: Sequence[Batch]) -> WeightScores:
    """|mean g| of every weight."""
    mean = gradients(bridge, data)
    sizes = {name: gradient.abs_() for name, gradient in mean.items()}
    return scored(bridge, sizes, "gradient")


def wagle(
    model: Model, data: Calibrations, sizes: Sequence[float], *, mu: float = 1e-6
) -> list[WeightMask]:
    """WAGLE (arXiv 2410.17509): the largest |(W - g_others / mu) g_harm|."""
    of_harm, of_others = two_gradients(model, data)
    weights = named_weights(model.bridge)
    values = {}
    for name, gradient in of_harm.items():
        moved = weights[name].detach() - of_others[name] / mu
        values[name] = (moved * gradient).abs_()
    scores = scored(model.bridge, values, "wagle")
    return [top_fraction(scores, size, within="model") for size in sizes]


def product(
    model: Model, data: Calibrations, sizes: Sequence[float], *, times_weight: bool = False
) -> list[WeightMask]:
    """The largest -g_harm g_others, where the two gradients oppose each other."""
    of_harm, of_others = two_gradients(model, data)
    weights = named_weights(model.bridge)
    values = {}
    for name, gradient in of_harm.items():
        values[name] = -gradient * of_others[name]
        if times_weight:
            values[name] *= weights[name].detach().square()
    scores = scored(model.bridge, values, "product")
    return [top_fraction(scores, size, within="model") for size in sizes]


def two_gradients(model: Model, data: Calibrations) -> tuple[Tensors, Tensors]:
    """Mean gradients on harm, and on everything else."""
    target, others = batches(data)
    of_harm = gradients(model.bridge, target)
    of_others = gradients(model.bridge, together(others))
    return of_harm, of_others


def gradients(bridge: Bridge, data: Sequence[Batch]) -> Tensors:
    """The mean over examples of the gradient of every block matrix."""
    sites = weight_sites(bridge)
    return mean_gradients(bridge, data, completion_loss, sites)


def scored(bridge: Bridge, values: Tensors, name: str) -> WeightScores:
    """Values as scores of this model."""
    return WeightScores(values, Source(model_fingerprint(bridge), name))


# A learned mask


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
) -> list[WeightMask]:
    """The expensive reference: a mask that descends a loss by itself, with straight-through gates."""
    bridge = model.bridge
    target, others = batches(data)
    weights = named_weights(bridge)
    scores = {name: torch.zeros_like(weight.detach()) for name, weight in weights.items()}
    speed = {name: torch.zeros_like(weight.detach()) for name, weight in weights.items()}
    generator = torch.Generator().manual_seed(seed)

    mask = None  # before the first step all scores are alike
    with gradients_taken(weights.values()):
        for _ in range(steps):
            other = others[_below(len(others), generator)]
            with masked_if_given(bridge, mask):
                harm = from_uniform(bridge, drawn(target, generator))
                spared_loss = completion_loss(bridge, drawn(other, generator)).mean()
                loss = spared * spared_loss + completeness * harm
                slopes = torch.autograd.grad(loss, list(weights.values()))

            # Outside the mask: W is what the weight was, also where it is removed.
            for (name, weight), gradient in zip(weights.items(), slopes, strict=True):
                speed[name].mul_(momentum)
                speed[name].addcmul_(weight.detach(), gradient)
                scores[name] += speed[name]
            size = sizes[_below(len(sizes), generator)]
            ranked = scored(bridge, scores, "learned mask")
            mask = top_fraction(ranked, size, within="model")
    ranked = scored(bridge, scores, "learned mask")
    return [top_fraction(ranked, size, within="model") for size in sizes]


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
    """Cross-entropy of the uniform distribution less its entropy, at the targets; nats a token."""
    tokens = batch.tokens.to(bridge.cfg.device)
    logits = bridge(tokens)[:, :-1].float()
    at_targets = logits[batch.is_target[:, 1:].to(logits.device)]
    log_probs = at_targets.log_softmax(dim=-1)
    uniform = torch.log(torch.tensor(float(log_probs.shape[-1])))
    return -log_probs.mean() - uniform


# The search, and the one before it


def search(
    model: Model, data: Calibrations, sizes: Sequence[float], **settings: Any
) -> list[WeightMask]:
    """What `Model.find_circuit` finds."""
    return model.find_circuit(TARGET, size=sizes, calibrations=data, **settings)


def one_shot(
    model: Model, data: Calibrations, sizes: Sequence[float], **settings: Any
) -> list[WeightMask]:
    """The largest of effect less price on the unpruned model, at the least factor that is kept."""
    protected = {name: of_name for name, of_name in data.items() if name != TARGET}
    unpruned = unpruned_scores(model, TARGET, data[TARGET], protected)
    return one_shot_masks(model, unpruned, protected, sizes, **settings)


def rounds(
    model: Model,
    data: Calibrations,
    sizes: Sequence[float],
    *,
    protect_share: float = PROTECT_SHARE,
    rounds: int = ROUNDS,
) -> list[WeightMask]:
    """What `prune_in_rounds` finds."""
    target, others = batches(data)
    return prune_in_rounds(
        model.bridge,
        target,
        others,
        sizes=sizes,
        protect_share=protect_share,
        rounds=rounds,
    )


# Every way, as published and with the settings that are tried

ONE_SHOT_TRIED = [{"budget": 0.02}, {"budget": 0.1}]
DIFFERENCES = [
    {"p_over_q": 1.0, "within": "model"},
    {"p_over_q": 5.0, "within": "model"},
    {"p_over_q": 20.0, "within": "model"},
]


@dataclass(frozen=True)
class Way:
    """A way of choosing weights."""

    choose: Method
    published: Mapping[str, Any]
    tried: Sequence[Mapping[str, Any]] = ()


signed = partial(difference, score=removal_effect, spare=snip_scores)
unsigned = partial(difference, score=snip_scores, spare=snip_scores)
by_wanda = partial(difference, score=wanda_scores, spare=wanda_scores)

WAYS = {
    "search": Way(search, {}),
    "search, one shot": Way(one_shot, {}, ONE_SHOT_TRIED),
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
    "magnitude": Way(partial(without_data, score=magnitude_scores), {}),
    "random": Way(partial(without_data, score=random_scores), {}),
}
