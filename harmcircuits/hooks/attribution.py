"""Scores: how much each weight matters to a behaviour.

All are float32 whatever the model's dtype, because a bfloat16 accumulator changes which weights are selected.
"""

import hashlib
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from harmcircuits.circuits.masks import WeightMask
from harmcircuits.circuits.scores import Source, WeightScores
from harmcircuits.circuits.sites import Site
from harmcircuits.hooks.accumulation import mean_gradients
from harmcircuits.hooks.gradients import Input, OutputGradient, hook_pairs, inputs_of
from harmcircuits.hooks.objectives import Objective
from harmcircuits.hooks.weights import model_fingerprint, weight_sites
from harmcircuits.prompts import Batch

Average = Literal["after_abs", "before_abs"]


def removal_effect(
    bridge: TransformerBridge, batches: Sequence[Batch], objective: Objective, *, max_memory: int | None = None
) -> WeightScores:
    """First-order change of the mean objective when each weight alone is set to zero: -W * mean_x dL_x/dW.

    Units of the objective (nats per example for `completion_loss`). **Positive: the weight supports the behaviour.** Every
    example weighs the same; batch size and padding do not matter. `max_memory`: bytes that accumulators may take on the
    devices (see `mean_gradients`); the scores are then in host memory, and the same. Raises ValueError for no batches, as
    `mean_gradients` and as `weight_sites`. Source: arXiv 2604.09544 (there W * g, the most negative pruned: the same
    ranking, this sign).
    """
    sites = _checked(bridge, batches)

    def finish(site: Site, gradient: Tensor) -> Tensor:
        return gradient.mul_(site.parameter.detach()).neg_()

    values = mean_gradients(bridge, batches, objective, sites, finish, max_memory=max_memory)
    return WeightScores(values, _source(bridge, "removal_effect", batches, objective))


def sensitivity(
    bridge: TransformerBridge,
    batches: Sequence[Batch],
    objective: Objective,
    *,
    average: Average = "after_abs",
    max_memory: int | None = None,
) -> WeightScores:
    """How strongly the objective depends on each weight, whatever the sign; never negative, units of the objective.

    `"after_abs"`: |W| * mean_x |dL_x/dW|, absolute values per example and then the mean (the released code).
    `"before_abs"`: |W * mean_x dL_x/dW| (the other published reading). `max_memory` as in `removal_effect`. Raises
    ValueError for another average, and as `removal_effect`. Source: SNIP as used in arXiv 2402.05162 and 2604.09544.
    """
    if average not in ("after_abs", "before_abs"):
        raise ValueError(f'sensitivity: average={average!r}; expected "after_abs" or "before_abs"')
    sites, absolute = _checked(bridge, batches), average == "after_abs"

    def finish(site: Site, gradient: Tensor) -> Tensor:
        return gradient.mul_(site.parameter.detach()).abs_()

    values = mean_gradients(bridge, batches, objective, sites, finish, absolute=absolute, max_memory=max_memory)
    return WeightScores(values, _source(bridge, "sensitivity", batches, objective, average=average))


def activation_norm(bridge: TransformerBridge, batches: Sequence[Batch]) -> WeightScores:
    """|W| times the root mean square of its input over all real tokens: |W_oi| * sqrt(mean_t x_ti^2). Forward only.

    Source: Wanda (arXiv 2306.11695). Raises ValueError for no batches, for experts and routers (their inputs pass no hook
    points), and as `weight_sites`.
    """
    sites = _checked(bridge, batches)
    squares: dict[str, Tensor] = {}
    is_token = torch.empty(0)

    def add(site: Site, x: Input) -> None:
        square = x.float().square()[is_token.to(x.device)].sum(dim=0)
        squares[site.name] = squares.get(site.name, 0) + square

    with torch.no_grad(), inputs_of(bridge, sites, add):
        for batch in batches:
            is_token = batch.is_token
            bridge(batch.tokens.to(bridge.cfg.device))
    n_tokens = sum(int(batch.is_token.sum()) for batch in batches)
    values = {}
    for name, site in sites.items():
        rms = (squares[name] / n_tokens).sqrt()
        values[name] = site.parameter.detach().float().abs() * (rms if site.input_axis == 1 else rms[:, None])
    return WeightScores(values, _source(bridge, "activation_norm", batches))


def magnitude_scores(bridge: TransformerBridge) -> WeightScores:
    """|W|: the control that needs no data."""
    values = {name: site.parameter.detach().float().abs() for name, site in weight_sites(bridge).items()}
    return WeightScores(values, Source(model_fingerprint(bridge), "magnitude"))


def random_scores(bridge: TransformerBridge, *, seed: int = 0) -> WeightScores:
    """Uniform numbers in [0, 1), the same for a seed on every device: the control that knows nothing."""
    generator = torch.Generator().manual_seed(seed)
    sites = weight_sites(bridge).values()
    values = {s.name: torch.rand(s.parameter.shape, generator=generator).to(s.parameter.device) for s in sites}
    return WeightScores(values, Source(model_fingerprint(bridge), "random", {"seed": seed}))


def gradient_norm(
    bridge: TransformerBridge, batches: Sequence[Batch], objective: Objective, *, max_memory: int | None = None
) -> float:
    """Euclidean norm of mean_x dL_x/dW over all block matrices: near zero, scores are noise (a saturated loss).

    Units of the objective per unit of weight. `max_memory` as in `removal_effect`. Raises ValueError for no batches, and
    as `mean_gradients` and `weight_sites`.
    """
    sites = _checked(bridge, batches)
    gradients = mean_gradients(bridge, batches, objective, sites, lambda site, mean: mean, max_memory=max_memory)
    return sum(value.square().sum().item() for value in gradients.values()) ** 0.5


def token_contributions(
    bridge: TransformerBridge, mask: WeightMask, batches: Sequence[Batch], objective: Objective
) -> list[Float[Tensor, "batch pos"]]:
    """What each token position adds to the mask's score, for every batch: its rows are examples, its columns positions.

    c_xt = -sum over removed (o, i) of W_oi g_xto x_xti, with x the input of the matrix at position t and g the gradient of
    the example's objective at its output. Summed over positions and averaged over examples it is the sum of
    `removal_effect` over the mask (`predicted_change`). Units of the objective; positive: acting at this token, the removed
    weights support the behaviour. Positions of the request count too: what is computed there reaches the answer by
    attention. Raises ValueError for no batches, an empty mask, a mask of another model, and as `weight_sites`.
    """
    sites = _checked(bridge, batches)
    if not mask.n_removed:
        raise ValueError(f"token_contributions: {mask} removes nothing; choose at least one weight")
    if mask.source.model != (model := model_fingerprint(bridge)):
        raise ValueError(f"token_contributions: {mask} is of model {mask.source.model}, this one is {model}")
    removed = {name: _removed_block(sites[name], mask) for name in mask.removed}
    current = torch.empty(0)

    def add(site: Site, x: Input, g: OutputGradient) -> None:
        rows, columns, block = removed[site.name]
        first, second = (g, x) if site.input_axis == 1 else (x, g)
        current.sub_(((first[..., rows].float() @ block) * second[..., columns].float()).sum(dim=-1))

    found = []
    with torch.enable_grad(), hook_pairs(bridge, {name: sites[name] for name in removed}, add):
        for batch in batches:
            current = torch.zeros(batch.tokens.shape, device=bridge.cfg.device)
            objective(bridge, batch).sum().backward()
            found.append(current.cpu())
    return found


def _removed_block(site: Site, mask: WeightMask) -> tuple[Tensor, Tensor, Float[Tensor, "rows columns"]]:
    """The rows and columns that a mask touches, and the block between them: removed weights, zero elsewhere."""
    index, width = mask.removed[site.name].to(site.parameter.device), site.parameter.shape[1]
    rows, row = (index // width).unique(return_inverse=True)
    columns, column = (index % width).unique(return_inverse=True)
    block = torch.zeros(len(rows), len(columns), device=site.parameter.device)
    block[row, column] = site.parameter.detach().flatten()[index].float()
    return rows, columns, block


def _checked(bridge: TransformerBridge, batches: Sequence[Batch]) -> dict[str, Site]:
    if not batches:
        raise ValueError("no batches to score on; expected at least one (see tokenize)")
    return weight_sites(bridge)


def _source(
    bridge: TransformerBridge, method: str, batches: Sequence[Batch], objective: Objective | None = None, **settings: Any
) -> Source:
    digest = hashlib.sha256()
    for batch in batches:
        for tokens, is_target, is_token in zip(batch.tokens, batch.is_target, batch.is_token, strict=True):
            digest.update(torch.stack([tokens, is_target.long()])[:, is_token].numpy().tobytes())
    settings |= {"data": digest.hexdigest()[:16], "n_examples": sum(len(batch) for batch in batches)}
    if objective is not None:
        settings["objective"] = getattr(objective, "__name__", type(objective).__name__)
    return Source(model_fingerprint(bridge), method, settings)
