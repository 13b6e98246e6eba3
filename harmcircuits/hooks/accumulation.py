"""Mean gradients over the calibration data, in float32: one pass, or several of bounded memory."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, distributed

from harmcircuits.circuits.sites import Site
from harmcircuits.hooks.absolute import add_absolute
from harmcircuits.hooks.bridge import Bridge
from harmcircuits.hooks.finite import refuse_not_finite_gradients
from harmcircuits.hooks.gradients import Input, OutputGradient, hook_pairs, parameter_gradients
from harmcircuits.hooks.objectives import Objective
from harmcircuits.prompts import Batch
from harmcircuits.storage import mapped_copy

BYTES = 4  # of an accumulated float32 number

# What is added up of the gradient G^T X, where x and g stand for one position of one example:
#   "signed"       sum over examples and positions of  g x^T
#   "per example"  sum over examples of |sum over positions of g x^T|
#   "per token"    sum over examples and positions of |g| |x|^T
# Each is at most the next, in magnitude. The second costs a product an example.
Kind = Literal["signed", "per example", "per token"]
Finish = Callable[[Site, Tensor], Tensor]


def mean_gradients(
    bridge: Bridge,
    batches: Sequence[Batch],
    objective: Objective,
    sites: Mapping[str, Site],
    finish: Finish,
    *,
    kind: Kind = "signed",
    max_memory: int | None = None,
) -> dict[str, Float[Tensor, "..."]]:
    """`finish(site, mean over examples x of dL_x/dW)` of every site; float32, shaped as stored."""
    accumulate_batches = accumulate
    if distributed.is_available() and distributed.is_initialized():
        # Imported here: one process has nothing to do with it.
        from harmcircuits.hooks.distributed import refuse_differences, shared_among_processes

        options = f"{list(sites)}, kind={kind}, max_memory={max_memory}"
        refuse_differences(bridge, batches, options)
        accumulate_batches = shared_among_processes(accumulate)

    n_examples = sum(len(batch) for batch in batches)
    results = {}
    for group in memory_groups(sites, max_memory):
        totals = {name: _zeros(site) for name, site in group.items()}
        loss = accumulate_batches(bridge, batches, objective, group, totals, kind)
        refuse_not_finite_gradients(bridge, batches, objective, group, loss.item(), totals)

        for name, site in group.items():
            # Taken out of `totals`, and no variable holds it: its memory is free again once it is
            # finished, before that of the next group is taken.
            results[name] = _finished(
                site,
                totals.pop(name).div_(n_examples),
                finish,
                to_file=max_memory is not None,
            )
    return results


def _finished(site: Site, mean: Tensor, finish: Finish, *, to_file: bool) -> Tensor:
    result = finish(site, mean)
    return mapped_copy(result) if to_file else result


def unchanged(_: Site, gradient: Tensor) -> Tensor:
    """The `finish` that leaves a mean gradient as it is."""
    return gradient


def memory_groups(sites: Mapping[str, Site], max_memory: int | None) -> Iterator[dict[str, Site]]:
    """Consecutive sites whose accumulators fit in `max_memory` bytes together."""
    if max_memory is None:
        yield dict(sites)
        return

    group: dict[str, Site] = {}
    group_size = 0
    for name, site in sites.items():
        size = BYTES * site.parameter.numel()
        if size > max_memory:
            raise ValueError(
                f"max_memory={max_memory:,} bytes; the scores of {name} alone take {size:,}: "
                "give at least these"
            )
        if group_size + size > max_memory:
            yield group
            group = {}
            group_size = 0
        group[name] = site
        group_size += size
    yield group


def accumulate(
    bridge: Bridge,
    batches: Sequence[Batch],
    objective: Objective,
    sites: Mapping[str, Site],
    totals: Mapping[str, Tensor],
    kind: Kind,
) -> Float[Tensor, ""]:
    """Add these batches' gradients, summed over examples, to `totals`; the objective's sum."""
    hooked = {name: site for name, site in sites.items() if site.is_hooked}
    unhooked = {name: site for name, site in sites.items() if not site.is_hooked}
    if unhooked and kind != "signed":
        # A parameter's gradient is summed over its batch; that of one example is not.
        batches = _single_examples(batches)

    add_pair = partial(_add_pair, totals=totals, kind=kind)
    add_gradient = partial(_add_gradient, totals=totals, kind=kind)
    losses = []
    with (
        torch.enable_grad(),
        hook_pairs(bridge, hooked, add_pair),
        parameter_gradients(unhooked, add_gradient),
    ):
        for batch in batches:
            values = objective(bridge, batch)
            _check_values(values, batch)
            loss = values.sum()
            loss.backward()
            losses.append(loss.detach().float())
    # Not read before the end: that would wait for the device after every batch.
    return torch.stack(losses).sum()


def _add_pair(
    site: Site,
    x: Input,
    g: OutputGradient,
    *,
    totals: Mapping[str, Tensor],
    kind: Kind,
) -> None:
    """A hooked matrix: its gradient is the product of its input and its output's gradient."""
    # In the orientation in which the weight is stored.
    first, second = (g, x) if site.input_axis == 1 else (x, g)
    total = totals[site.name]
    if kind == "per example":
        add_absolute(first, second, total)
    elif kind == "per token":
        _add_signed(first.abs(), second.abs(), total)
    else:
        _add_signed(first, second, total)


def _add_gradient(
    site: Site,
    gradient: Tensor,
    *,
    totals: Mapping[str, Tensor],
    kind: Kind,
) -> None:
    """An unhooked matrix: its gradient comes whole, summed over the batch."""
    totals[site.name].add_(gradient if kind == "signed" else gradient.abs())


def _add_signed(
    first: Float[Tensor, "batch pos a"],
    second: Float[Tensor, "batch pos b"],
    total: Float[Tensor, "a b"],
) -> None:
    """Add the sum over examples and positions of first^T second to `total`, in float32."""
    first = first.flatten(0, 1)
    second = second.flatten(0, 1)
    if first.dtype == second.dtype == torch.bfloat16:
        total.add_(first.T @ second)
    else:
        total.addmm_(first.float().T, second.float())


def _single_examples(batches: Sequence[Batch]) -> list[Batch]:
    singles = []
    for batch in batches:
        for row in range(len(batch)):
            tokens = batch.tokens[row : row + 1]
            is_target = batch.is_target[row : row + 1]
            singles.append(Batch(tokens, is_target))
    return singles


def _check_values(values: Tensor, batch: Batch) -> None:
    if values.shape != (len(batch),):
        raise ValueError(
            f"the objective gave shape {tuple(values.shape)}; expected ({len(batch)},), "
            "one value for each example"
        )


def _zeros(site: Site) -> Tensor:
    parameter = site.parameter
    return torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
