"""Scores of a live model: how much each weight matters to a behaviour."""

import hashlib
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from harmcircuits.batches import Batch
from harmcircuits.circuits.masks import WeightMask
from harmcircuits.circuits.scores import WeightScores
from harmcircuits.circuits.sites import Site
from harmcircuits.hooks.bridge import AnyModel, as_bridge
from harmcircuits.hooks.checks import refuse_batches, refuse_not_finite
from harmcircuits.hooks.gradients import Input, OutputGradient, hook_pairs, inputs_of
from harmcircuits.hooks.objectives import Objective, completion_loss
from harmcircuits.hooks.weights import Provenance, block_sites, refuse_other_model
from harmcircuits.search.accumulation import Kind, mean_gradients

Average = Literal["after_abs", "before_abs"]
KINDS: dict[Average, Kind] = {"after_abs": "per example", "before_abs": "signed"}


def removal_effect(
    bridge: AnyModel,
    batches: Sequence[Batch],
    objective: Objective = completion_loss,
    *,
    max_memory: int | None = None,
) -> WeightScores:
    """First-order change of the mean objective when each weight alone is removed.

    score(W) = -W * mean_x dL_x/dW, in units of the objective (nats per token for
    `completion_loss`).
    **Positive: the weight supports the behaviour.** Every example weighs the same; batch size and
    padding do not matter. Source: arXiv 2604.09544 (there W * g, and the most negative are pruned:
    the same ranking, the other sign).

    >>> hc.removal_effect(bridge, harm)
    WeightScores(removal_effect of 24 examples, 983,040 weights)

    Args:
        bridge: the model.
        batches: the calibration data.
        objective: one value for each example, the lower the better.
        max_memory: bytes that scores may take while they are accumulated. Less than all need takes
            more passes. Those that are finished are then in temporary files that are mapped into
            memory (TMPDIR sets where), and the same. `free_for_scores` says what is free.

    Raises:
        ValueError: no batches, a matrix larger than `max_memory`, and as `named_weights`.
    """
    return _times_gradient("removal_effect", bridge, batches, objective, "signed", max_memory)


def snip_scores(
    bridge: AnyModel,
    batches: Sequence[Batch],
    objective: Objective = completion_loss,
    *,
    average: Average = "after_abs",
    max_memory: int | None = None,
) -> WeightScores:
    """How strongly the objective depends on each weight, whatever the sign; never negative.

    In units of the objective. Source: SNIP as used in arXiv 2402.05162 and 2604.09544.

    >>> hc.snip_scores(bridge, harm, average="before_abs")
    WeightScores(snip of 24 examples, 983,040 weights)

    Args:
        bridge: the model.
        batches: the calibration data.
        objective: one value for each example.
        average: "after_abs": |W| * mean_x |dL_x/dW|, as in the released code. "before_abs":
            |W * mean_x dL_x/dW|, the other published reading.
        max_memory: as in `removal_effect`.

    Raises:
        ValueError: another `average`, and as `removal_effect`.
    """
    if average not in KINDS:
        raise ValueError(f"snip_scores: average={average!r}; expected one of {list(KINDS)}")
    return _times_gradient(
        "snip_scores", bridge, batches, objective, KINDS[average], max_memory, average=average
    )


def token_price(
    bridge: AnyModel,
    batches: Sequence[Batch],
    objective: Objective = completion_loss,
    *,
    max_memory: int | None = None,
) -> WeightScores:
    """An upper bound of each weight's first-order score: |W| * mean_x sum_t |g_xt| |x_xt|^T.

    x is the matrix's input at position t and g the gradient of the example's objective at its
    output. The absolute values stand inside the sum over positions, so this is an upper bound of
    `snip_scores`, |W| * mean_x |sum_t g_xt x_xt^T|, at the price of the signed score: one product a
    matrix. Positions of the request count: the gradient reaches them through attention. In units of
    the objective; never negative. Experts and routers, whose inputs pass no hook points, have
    `snip_scores`.

    >>> hc.token_price(bridge, benign)
    WeightScores(token_price of 24 examples, 983,040 weights)

    Args:
        bridge: the model.
        batches: what it is to go on doing.
        objective: one value for each example, the lower the better.
        max_memory: as in `removal_effect`.

    Raises:
        ValueError: as `removal_effect`.
    """
    return _times_gradient("token_price", bridge, batches, objective, "per token", max_memory)


def _times_gradient(
    function: str,
    bridge: AnyModel,
    batches: Sequence[Batch],
    objective: Objective,
    kind: Kind,
    max_memory: int | None,
    **settings: Any,
) -> WeightScores:
    """Every weight times a mean of its gradient: the scores of one backward pass."""
    bridge = as_bridge(bridge)
    refuse_batches(function, bridge, batches)
    sites = block_sites(bridge)
    factor = -1.0 if function == "removal_effect" else 1.0
    values = mean_gradients(
        bridge, batches, objective, sites, kind, factor=factor, max_memory=max_memory
    )
    for name, value in values.items():
        # Under a bound on memory it is in a file, and so on the CPU.
        value.mul_(sites[name].parameter.detach().to(value.device))
        if function == "snip_scores":
            value.abs_()
    settings = data_settings(batches, objective, **settings)
    source = Provenance.of(bridge).source(function.removesuffix("_scores"), settings)
    return WeightScores(values, source)


def wanda_scores(bridge: AnyModel, batches: Sequence[Batch]) -> WeightScores:
    """|W| times the root mean square of its input: |W_oi| * sqrt(mean_t x_ti^2). Forward only.

    The mean is over all real tokens of all examples. Source: Wanda (arXiv 2306.11695).

    >>> hc.wanda_scores(bridge, harm)
    WeightScores(wanda of 24 examples, 983,040 weights)

    Args:
        bridge: the model.
        batches: the calibration data; targets play no part.

    Raises:
        ValueError: no batches, experts and routers (their inputs pass no hook points), and as
            `named_weights`.
    """
    bridge = as_bridge(bridge)
    refuse_batches("wanda_scores", bridge, batches)
    sites = block_sites(bridge)
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
        along_input = rms if site.input_axis == 1 else rms[:, None]
        values[name] = site.parameter.detach().float().abs() * along_input
    return WeightScores(values, Provenance.of(bridge).source("wanda", data_settings(batches)))


def magnitude_scores(bridge: AnyModel) -> WeightScores:
    """|W|: the control that needs no data. Raises ValueError as `named_weights`.

    >>> hc.magnitude_scores(bridge)
    WeightScores(magnitude, 983,040 weights)
    """
    bridge = as_bridge(bridge)
    sites = block_sites(bridge)
    values = {name: site.parameter.detach().float().abs() for name, site in sites.items()}
    return WeightScores(values, Provenance.of(bridge).source("magnitude"))


def random_scores(bridge: AnyModel, *, seed: int = 0) -> WeightScores:
    """Uniform numbers in [0, 1): the control that knows nothing.

    >>> hc.random_scores(bridge, seed=1)
    WeightScores(random, 983,040 weights)

    Args:
        bridge: the model.
        seed: draws the numbers, the same on every device.

    Raises:
        ValueError: as `named_weights`.
    """
    bridge = as_bridge(bridge)
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for name, site in block_sites(bridge).items():
        drawn = torch.rand(site.parameter.shape, generator=generator)
        values[name] = drawn.to(site.parameter.device)
    return WeightScores(values, Provenance.of(bridge).source("random", {"seed": seed}))


def gradient_norm(
    bridge: AnyModel,
    batches: Sequence[Batch],
    objective: Objective = completion_loss,
    *,
    max_memory: int | None = None,
) -> float:
    """Euclidean norm of mean_x dL_x/dW over all block matrices; near zero, scores are noise."""
    bridge = as_bridge(bridge)
    refuse_batches("gradient_norm", bridge, batches)
    sites = block_sites(bridge)
    gradients = mean_gradients(bridge, batches, objective, sites, max_memory=max_memory)
    return sum(value.square().sum().item() for value in gradients.values()) ** 0.5


def token_contributions(
    bridge: AnyModel,
    mask: WeightMask,
    batches: Sequence[Batch],
    objective: Objective = completion_loss,
) -> list[Float[Tensor, "batch pos"]]:
    """What each token position adds to the mask's score, a tensor [batch pos] for every batch.

    c_xt = -sum over removed (o, i) of W_oi g_xto x_xti, with x the matrix's input at position t and
    g the gradient of the example's objective at its output. Summed over positions and averaged over
    examples it is `removal_effect(...).sum_over(mask)`. Units of the objective; positive: acting at
    this token, the removed weights support the behaviour. Positions of the request count too: what
    is computed there reaches the answer by attention.

    >>> scores = hc.removal_effect(bridge, harm)
    >>> mask = hc.top_fraction(scores, 0.001)
    >>> by_token = hc.token_contributions(bridge, mask, harm)
    >>> abs(by_token[0].sum(dim=1).mean().item() - scores.sum_over(mask)) < 1e-4
    True

    Args:
        bridge: the model, unpruned.
        mask: the weights to look at.
        batches: the texts.
        objective: one value for each example.

    Raises:
        ValueError: no batches, a mask of another model, and as `named_weights`.
    """
    bridge = as_bridge(bridge)
    refuse_batches("token_contributions", bridge, batches)
    refuse_other_model(bridge, mask)
    sites = block_sites(bridge)
    blocks = {name: _removed_block(sites[name], mask) for name in mask.removed}
    contributions = torch.empty(0)

    def add(site: Site, x: Input, g: OutputGradient) -> None:
        rows, columns, block = blocks[site.name]
        # The stored weight's rows are outputs, or inputs where it is stored as (d_in, d_out).
        of_rows, of_columns = (g, x) if site.input_axis == 1 else (x, g)
        through_block = of_rows[..., rows].float() @ block
        effect = (through_block * of_columns[..., columns].float()).sum(dim=-1)  # [batch, read]
        # An objective need not read what follows the last target.
        n_read = effect.shape[1]
        contributions[:, :n_read].sub_(effect.to(contributions.device))

    per_batch = []
    of_mask = {name: sites[name] for name in blocks}
    with torch.enable_grad(), hook_pairs(bridge, of_mask, add):
        for batch in batches:
            contributions = torch.zeros(batch.tokens.shape, dtype=torch.float32)
            objective(bridge, batch).sum().backward()
            per_batch.append(contributions)
    totals = torch.cat([values.sum(dim=1) for values in per_batch])
    refuse_not_finite(batches, totals, objective)
    return per_batch


def _removed_block(
    site: Site, mask: WeightMask
) -> tuple[Tensor, Tensor, Float[Tensor, "rows columns"]]:
    """The rows and columns that a mask touches, and the removed weights in the block between."""
    index, width = mask.removed[site.name].to(site.parameter.device), site.parameter.shape[1]
    rows, row = (index // width).unique(return_inverse=True)
    columns, column = (index % width).unique(return_inverse=True)
    size = len(rows), len(columns)
    block = torch.zeros(size, dtype=torch.float32, device=site.parameter.device)
    block[row, column] = site.parameter.detach().flatten()[index].float()
    return rows, columns, block


def data_settings(
    batches: Sequence[Batch],
    objective: Objective | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """What the source of scores says of their data; its digest ignores padding and batch size."""
    digest = hashlib.sha256()
    for batch in batches:
        for tokens, is_target, is_token in zip(
            batch.tokens, batch.is_target, batch.is_token, strict=True
        ):
            real = torch.stack([tokens, is_target.long()])[:, is_token]
            digest.update(real.cpu().numpy().tobytes())
    settings["data"] = digest.hexdigest()[:16]
    settings["n_examples"] = sum(len(batch) for batch in batches)
    if objective is not None:
        settings["objective"] = getattr(objective, "__name__", type(objective).__name__)
    return settings
