"""Scores of a live model: how much each weight matters to a behaviour."""

import hashlib
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from harmcircuits.batches import Batch, unpadded
from harmcircuits.circuits.masks import WeightMask
from harmcircuits.circuits.scores import WeightScores
from harmcircuits.circuits.sites import Site
from harmcircuits.hooks.bridge import AnyModel, Bridge, as_bridge, evaluating
from harmcircuits.hooks.checks import refuse_batches, refuse_not_finite
from harmcircuits.hooks.gradients import Input, OutputGradient, hook_pairs, inputs_of
from harmcircuits.hooks.objectives import Objective, completion_loss
from harmcircuits.hooks.weights import Provenance, block_sites, refuse_other_model
from harmcircuits.search.accumulation import Reduction, as_stored, mean_gradients

Average = Literal["after_abs", "before_abs"]
REDUCTIONS: dict[Average, Reduction] = {"after_abs": "per example", "before_abs": "signed"}


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
    padding do not matter. Source: arXiv 2604.09544, which prunes the weights where W * dL/dW is
    most negative: the same ranking with the other sign.

    >>> hc.removal_effect(bridge, harm)
    WeightScores(removal_effect of 24 examples, 983,040 weights)

    Args:
        bridge: the model.
        batches: the calibration data.
        objective: one value for each example, the lower the better.
        max_memory: bytes that scores may take while they are accumulated. A bound changes no score.
            It costs more passes over the data, and finished scores lie in temporary files that are
            mapped into memory (TMPDIR sets the folder). `free_for_scores` counts the free bytes.

    Raises:
        ValueError: no batches, a matrix larger than `max_memory`, and as `named_weights`.
    """
    return _times_gradient(
        "removal_effect", bridge, batches, objective, "signed", max_memory, sign=-1.0
    )


def snip_scores(
    bridge: AnyModel,
    batches: Sequence[Batch],
    objective: Objective = completion_loss,
    *,
    average: Average = "after_abs",
    max_memory: int | None = None,
) -> WeightScores:
    """How strongly the objective depends on each weight, whatever the sign.

    score(W) = |W| * mean_x |dL_x/dW|, in units of the objective; never negative. Source: SNIP as
    used in arXiv 2402.05162 and 2604.09544.

    >>> hc.snip_scores(bridge, harm, average="before_abs")
    WeightScores(snip of 24 examples, 983,040 weights)

    Args:
        bridge: the model.
        batches: the calibration data.
        objective: one value for each example.
        average: "after_abs": the mean is over absolute values, as above and in the released code.
            "before_abs": |W * mean_x dL_x/dW|, the other published reading.
        max_memory: as in `removal_effect`.

    Raises:
        ValueError: another `average`, and as `removal_effect`.
    """
    if average not in REDUCTIONS:
        raise ValueError(f"snip_scores: average={average!r}; expected one of {list(REDUCTIONS)}")
    return _times_gradient(
        "snip_scores",
        bridge,
        batches,
        objective,
        REDUCTIONS[average],
        max_memory,
        is_absolute=True,
        average=average,
    )


def token_price(
    bridge: AnyModel,
    batches: Sequence[Batch],
    objective: Objective = completion_loss,
    *,
    max_memory: int | None = None,
) -> WeightScores:
    """An upper bound of each weight's first-order score, token by token: a penalty for removing it.

    score(W) = |W| * mean_x sum_t |g_xt| |x_xt|^T, in units of the objective; never negative. x_xt
    is the matrix's input at position t of example x, and g_xt the gradient of the example's
    objective at its output. The absolute values stand inside the sum over positions, so this is at
    least `snip_scores`, |W| * mean_x |sum_t g_xt x_xt^T|, and costs one product for each matrix, as
    the signed score does. Positions of the request count: the gradient reaches them through
    attention. Experts and routers, whose inputs pass no hook points, get `snip_scores`.

    >>> hc.token_price(bridge, benign)
    WeightScores(token_price of 24 examples, 983,040 weights)

    Args:
        bridge: the model.
        batches: texts of the behaviour to keep.
        objective: one value for each example, the lower the better.
        max_memory: as in `removal_effect`.

    Raises:
        ValueError: as `removal_effect`.
    """
    return _times_gradient("token_price", bridge, batches, objective, "per token", max_memory)


def _times_gradient(
    function: str,
    model: AnyModel,
    batches: Sequence[Batch],
    objective: Objective,
    reduction: Reduction,
    max_memory: int | None,
    *,
    sign: float = 1.0,
    is_absolute: bool = False,
    **settings: str,
) -> WeightScores:
    """Every weight times a mean of its gradient: the scores of one backward pass."""
    bridge, sites = _checked(function, model, batches)
    values = mean_gradients(
        bridge, batches, objective, sites, reduction, coefficient=sign, max_memory=max_memory
    )
    for name, value in values.items():
        # Under a bound on memory the value is in a file, and so on the CPU.
        value.mul_(sites[name].parameter.detach().to(value.device))
        if is_absolute:
            value.abs_()
    all_settings = {**settings, **data_settings(batches, objective)}
    return WeightScores(
        values, Provenance.of(bridge).source(function.removesuffix("_scores"), all_settings)
    )


def _checked(
    function: str, model: AnyModel, batches: Sequence[Batch]
) -> tuple[Bridge, dict[str, Site]]:
    """The bridge of a model, if it can read the batches, and its block matrices."""
    bridge = as_bridge(model)
    refuse_batches(function, bridge, batches)
    return bridge, block_sites(bridge)


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
    bridge, sites = _checked("wanda_scores", bridge, batches)
    squares: dict[str, Tensor] = {}
    is_token = torch.empty(0)

    def add(site: Site, x: Input) -> None:
        square = x.float().square()[is_token.to(x.device)].sum(dim=0)
        squares[site.name] = squares.get(site.name, 0) + square

    with torch.no_grad(), evaluating(bridge), inputs_of(bridge, sites, add):
        for batch in batches:
            is_token = batch.is_token
            bridge(batch.tokens.to(bridge.cfg.device))

    n_tokens = sum(int(batch.is_token.sum()) for batch in batches)
    values = {}
    for name, site in sites.items():
        norm = (squares[name] / n_tokens).sqrt()
        if site.input_axis == 0:
            norm = norm[:, None]
        values[name] = site.parameter.detach().float().abs() * norm
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
        uniform = torch.rand(site.parameter.shape, generator=generator)
        values[name] = uniform.to(site.parameter.device)
    return WeightScores(values, Provenance.of(bridge).source("random", {"seed": seed}))


def gradient_norm(
    bridge: AnyModel,
    batches: Sequence[Batch],
    objective: Objective = completion_loss,
    *,
    max_memory: int | None = None,
) -> float:
    """Euclidean norm of mean_x dL_x/dW over all block matrices; near zero, scores are noise."""
    bridge, sites = _checked("gradient_norm", bridge, batches)
    gradients = mean_gradients(bridge, batches, objective, sites, max_memory=max_memory)
    return sum(value.square().sum().item() for value in gradients.values()) ** 0.5


def token_contributions(
    bridge: AnyModel,
    mask: WeightMask,
    batches: Sequence[Batch],
    objective: Objective = completion_loss,
) -> list[Float[Tensor, "batch pos"]]:
    """What each token position adds to the mask's score, a tensor [batch pos] for every batch.

    c_xt = -sum over removed (o, i) of W_oi g_xto x_xti, in units of the objective. x_xt is the
    matrix's input at position t of example x, and g_xt the gradient of the example's objective at
    its output. Positive: at this token the removed weights support the behaviour. The sum over
    positions, averaged over examples, is `removal_effect(...).sum_over(mask)`. Positions of the
    request count: their values reach the answer through attention.

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
    bridge, sites = _checked("token_contributions", bridge, batches)
    refuse_other_model(bridge, mask)
    blocks = {name: _removed_block(sites[name], index) for name, index in mask.removed.items()}
    contributions = torch.empty(0)

    def subtract(site: Site, x: Input, g: OutputGradient) -> None:
        rows, columns, block = blocks[site.name]
        first, second = as_stored(site, x, g)
        through_block = first[..., rows].float() @ block
        effect = (through_block * second[..., columns].float()).sum(dim=-1)  # [batch, read]
        # An objective need not read the positions behind the last target.
        n_read = effect.shape[1]
        contributions[:, :n_read].sub_(effect.to(contributions.device))

    by_batch = []
    touched = {name: sites[name] for name in blocks}
    with torch.enable_grad(), hook_pairs(bridge, touched, subtract):
        for batch in batches:
            contributions = torch.zeros(batch.tokens.shape, dtype=torch.float32)
            objective(bridge, batch).sum().backward()
            by_batch.append(contributions)
    totals = torch.cat([values.sum(dim=1) for values in by_batch])
    refuse_not_finite(batches, totals, objective)
    return by_batch


def _removed_block(
    site: Site, index: Int[Tensor, " n"]
) -> tuple[Tensor, Tensor, Float[Tensor, "rows columns"]]:
    """The rows and columns that hold removed weights, and these weights in a block of them."""
    weight = site.parameter.detach()
    index = index.to(weight.device)
    n_columns = weight.shape[1]
    rows, row = (index // n_columns).unique(return_inverse=True)
    columns, column = (index % n_columns).unique(return_inverse=True)

    size = len(rows), len(columns)
    block = torch.zeros(size, dtype=torch.float32, device=weight.device)
    block[row, column] = weight.flatten()[index].float()
    return rows, columns, block


def data_settings(
    batches: Sequence[Batch], objective: Objective | None = None
) -> dict[str, str | int]:
    """The data in the source of scores; its digest ignores padding and batch size."""
    digest = hashlib.sha256()
    for text in unpadded(batches):
        tokens = torch.stack([text.tokens, text.is_target.long()])
        digest.update(tokens.cpu().numpy().tobytes())

    n_examples = sum(len(batch) for batch in batches)
    settings: dict[str, str | int] = {"data": digest.hexdigest()[:16], "n_examples": n_examples}
    if objective is not None:
        settings["objective"] = getattr(objective, "__name__", type(objective).__name__)
    return settings
