"""Scores: how much each weight matters to a behaviour.

All are float32 whatever the model's dtype, because a bfloat16 accumulator changes which weights are selected.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from harmcircuits.hooks.gradients import Input, OutputGradient, hook_pairs, inputs_of, parameter_gradients
from harmcircuits.hooks.weights import Site, model_fingerprint, weight_sites
from harmcircuits.masks import WeightMask
from harmcircuits.objectives import Objective
from harmcircuits.prompts import Batch
from harmcircuits.scores import Source, WeightScores

Average = Literal["after_abs", "before_abs"]
PER_EXAMPLE_NUMBERS = 2**24  # float32 numbers of scratch for per-example gradients: 64 MiB


def removal_effect(bridge: TransformerBridge, batches: Sequence[Batch], objective: Objective) -> WeightScores:
    """First-order change of the mean objective when each weight alone is set to zero: -W * mean_x dL_x/dW.

    Units of the objective (nats per example for `completion_loss`). **Positive: the weight supports the behaviour.** Every
    example weighs the same; batch size and padding do not matter. Raises ValueError for no batches and as `weight_sites`.
    Source: arXiv 2604.09544 (there W * g, the most negative pruned: the same ranking, this sign).
    """
    values = _mean_gradients(bridge, batches, objective, _add_signed)
    for name, site in weight_sites(bridge).items():
        values[name].mul_(site.parameter.detach().float()).neg_()
    return WeightScores(values, _source(bridge, "removal_effect", batches, objective))


def sensitivity(
    bridge: TransformerBridge, batches: Sequence[Batch], objective: Objective, *, average: Average = "after_abs"
) -> WeightScores:
    """How strongly the objective depends on each weight, whatever the sign; never negative, units of the objective.

    `"after_abs"`: |W| * mean_x |dL_x/dW|, absolute values per example and then the mean (the released code).
    `"before_abs"`: |W * mean_x dL_x/dW| (the other published reading). Raises ValueError for another average, for no
    batches and as `weight_sites`. Source: SNIP as used in arXiv 2402.05162 and 2604.09544.
    """
    if average not in ("after_abs", "before_abs"):
        raise ValueError(f'sensitivity: average={average!r}; expected "after_abs" or "before_abs"')
    add = _add_absolute if average == "after_abs" else _add_signed
    values = _mean_gradients(bridge, batches, objective, add)
    for name, site in weight_sites(bridge).items():
        values[name].mul_(site.parameter.detach().float()).abs_()
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


def gradient_norm(bridge: TransformerBridge, batches: Sequence[Batch], objective: Objective) -> float:
    """Euclidean norm of mean_x dL_x/dW over all block matrices: near zero, scores are noise (a saturated loss).

    Units of the objective per unit of weight. Raises ValueError for no batches and as `weight_sites`.
    """
    gradients = _mean_gradients(bridge, batches, objective, _add_signed)
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


Add = Callable[[Site, Input, OutputGradient, Tensor], None]


def _mean_gradients(
    bridge: TransformerBridge, batches: Sequence[Batch], objective: Objective, add: Add
) -> dict[str, Float[Tensor, "..."]]:
    sites = _checked(bridge, batches)
    total = {
        name: torch.zeros(site.parameter.shape, dtype=torch.float32, device=site.parameter.device)
        for name, site in sites.items()
    }
    hooked = {name: site for name, site in sites.items() if site.is_hooked}
    others = {name: site for name, site in sites.items() if not site.is_hooked}

    def receive(site: Site, x: Input, g: OutputGradient) -> None:
        add(site, x, g, total[site.name])

    def receive_gradient(site: Site, gradient: Tensor) -> None:
        total[site.name].add_(gradient.float().abs_() if add is _add_absolute else gradient.float())

    # A parameter's gradient is summed over the batch, so absolute values per example need an example at a time.
    at_once = _singles(batches) if others and add is _add_absolute else batches
    with torch.enable_grad(), hook_pairs(bridge, hooked, receive), parameter_gradients(others, receive_gradient):
        for batch in at_once:
            values = objective(bridge, batch)
            if values.shape != (len(batch),):
                raise ValueError(f"the objective gave shape {tuple(values.shape)}; expected ({len(batch)},)")
            values.sum().backward()
    n_examples = sum(len(batch) for batch in batches)
    for value in total.values():
        value.div_(n_examples)
    return total


def _singles(batches: Sequence[Batch]) -> Iterator[Batch]:
    for batch in batches:
        for tokens, is_target in zip(batch.tokens.split(1), batch.is_target.split(1), strict=True):
            yield Batch(tokens, is_target)


def _add_signed(site: Site, x: Input, g: OutputGradient, total: Tensor) -> None:
    x, g = x.flatten(0, 1).float(), g.flatten(0, 1).float()
    total.addmm_(g.T, x) if site.input_axis == 1 else total.addmm_(x.T, g)


def _add_absolute(site: Site, x: Input, g: OutputGradient, total: Tensor) -> None:
    first, second = (g.float(), x.float()) if site.input_axis == 1 else (x.float(), g.float())
    at_once = max(1, PER_EXAMPLE_NUMBERS // total.numel())
    for rows in range(0, len(x), at_once):
        chunk = slice(rows, rows + at_once)
        per_example = einsum(first[chunk], second[chunk], "batch pos a, batch pos b -> batch a b")
        total.add_(per_example.abs_().sum(dim=0))


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
