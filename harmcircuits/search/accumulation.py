"""Sums of gradients over the calibration data, in float32.

In one pass or several of bounded memory, by one process or several of torch.distributed.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, distributed

from harmcircuits.batches import Batch
from harmcircuits.circuits.sites import Site
from harmcircuits.hooks.bridge import Bridge
from harmcircuits.hooks.checks import refuse_not_finite, refuse_not_finite_gradients
from harmcircuits.hooks.gradients import Input, OutputGradient, hook_pairs, parameter_gradients
from harmcircuits.hooks.objectives import Objective
from harmcircuits.storage import mapped_copy

BYTES = 4  # of an accumulated float32 number
# Numbers of scratch memory: what stays in the cache of a CPU core, and what fills a GPU.
CPU_SCRATCH = 2**19
GPU_SCRATCH = 2**26

# What is added up of the gradient G^T X, where x and g stand for one position of one example:
#   "signed"       sum over examples and positions of  g x^T
#   "per example"  sum over examples of |sum over positions of g x^T|
#   "per token"    sum over examples and positions of sign(W) |g| |x|^T
# Each is at most the next, in magnitude. The second costs a product an example. The third has the
# sign of its weight: times the weight it is positive, so that one sum can hold it and the first.
Kind = Literal["signed", "per example", "per token"]


@torch.inference_mode(False)  # what is made inside it knows no gradients
def mean_gradients(
    bridge: Bridge,
    batches: Sequence[Batch],
    objective: Objective,
    sites: Mapping[str, Site],
    kind: Kind = "signed",
    *,
    factor: float = 1.0,
    max_memory: int | None = None,
) -> dict[str, Float[Tensor, "..."]]:
    """A factor times the mean over examples x of dL_x/dW of every site; shaped as stored."""
    refuse_differences(batches, sites, kind, max_memory)
    means = {}
    for group in memory_groups(sites, max_memory):
        totals = {name: zeros(site) for name, site in group.items()}
        add_gradients(bridge, batches, objective, group, totals, kind, factor)
        for name in group:
            # Taken out of `totals`: where it goes to a file, its memory is free again before that
            # of the next group is taken.
            mean = totals.pop(name)
            means[name] = mean if max_memory is None else mapped_copy(mean)
            del mean
    return means


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


def add_gradients(
    bridge: Bridge,
    batches: Sequence[Batch],
    objective: Objective,
    sites: Mapping[str, Site],
    totals: Mapping[str, Tensor],
    kind: Kind,
    factor: float,
) -> None:
    """Add a factor times the mean gradients to `totals`, in place."""
    rank, n_processes = _place_among_processes()
    # Dealt out like cards. Seven batches among three processes:
    #
    #     rank 0    0  3  6
    #     rank 1    1  4
    #     rank 2    2  5
    own_batches = batches[rank::n_processes]
    is_own = []
    for number, batch in enumerate(batches):
        is_own += [number % n_processes == rank] * len(batch)
    if rank:
        for total in totals.values():
            total.zero_()  # what is in them counts once

    losses = torch.zeros(len(is_own))
    of_example = factor / len(is_own)
    losses[is_own] = accumulate(bridge, own_batches, objective, sites, totals, kind, of_example)
    if n_processes > 1:
        losses = _added_up(losses, totals)
    refuse_not_finite(batches, losses, objective)
    refuse_not_finite_gradients(totals, objective)


def accumulate(
    bridge: Bridge,
    batches: Sequence[Batch],
    objective: Objective,
    sites: Mapping[str, Site],
    totals: Mapping[str, Tensor],
    kind: Kind,
    factor: float,
) -> Float[Tensor, " n"]:
    """Add a factor times these batches' gradients to `totals`; the examples' losses."""
    if not batches:
        return torch.empty(0)
    hooked = {name: site for name, site in sites.items() if site.is_hooked}
    unhooked = {name: site for name, site in sites.items() if not site.is_hooked}
    if unhooked and kind != "signed":
        # A parameter's gradient is summed over its batch; that of one example is not.
        batches = _single_examples(batches)

    add_pair = partial(_add_pair, totals=totals, kind=kind, factor=factor)
    add_gradient = partial(_add_gradient, totals=totals, kind=kind, factor=factor)
    losses = []
    with (
        torch.enable_grad(),
        hook_pairs(bridge, hooked, add_pair),
        parameter_gradients(unhooked, add_gradient),
    ):
        for batch in batches:
            values = objective(bridge, batch)
            if values.shape != (len(batch),):
                raise ValueError(
                    f"the objective gave shape {tuple(values.shape)}; expected ({len(batch)},), "
                    "one value for each example"
                )
            values.sum().backward()
            losses.append(values.detach().float())
    # Not read before the end: that would wait for the device after every batch.
    return torch.cat(losses).cpu()


def _add_pair(
    site: Site,
    x: Input,
    g: OutputGradient,
    *,
    totals: Mapping[str, Tensor],
    kind: Kind,
    factor: float,
) -> None:
    """A hooked matrix: its gradient is the product of its input and its output's gradient."""
    # In the orientation in which the weight is stored.
    first, second = (g, x) if site.input_axis == 1 else (x, g)
    total = totals[site.name]
    if kind == "per example":
        add_absolute(first, second, total, factor)
    elif kind == "per token":
        add_product(first.abs(), second.abs(), total, factor, sign_of=site.parameter.detach())
    else:
        add_product(first, second, total, factor)


def _add_gradient(
    site: Site,
    gradient: Tensor,
    *,
    totals: Mapping[str, Tensor],
    kind: Kind,
    factor: float,
) -> None:
    """An unhooked matrix: its gradient comes whole, summed over the batch."""
    if kind == "per example":
        gradient = gradient.abs()
    elif kind == "per token":
        gradient = gradient.abs().copysign_(site.parameter.detach())
    totals[site.name].add_(gradient, alpha=factor)


def add_product(
    first: Float[Tensor, "batch pos a"],
    second: Float[Tensor, "batch pos b"],
    total: Float[Tensor, "a b"],
    factor: float = 1.0,
    *,
    sign_of: Float[Tensor, "a b"] | None = None,
) -> None:
    """Add a factor times the sum over examples and positions of first^T second, in float32."""
    first = first.flatten(0, 1)
    second = second.flatten(0, 1)
    if not first.dtype == second.dtype == torch.bfloat16:
        first, second = first.float(), second.float()
    if sign_of is None and first.dtype == torch.float32:
        total.addmm_(first.T, second, alpha=factor)
        return
    product = first.T @ second
    if sign_of is not None:
        product.copysign_(sign_of)
    total.add_(product, alpha=factor)


def add_absolute(
    first: Float[Tensor, "batch pos a"],
    second: Float[Tensor, "batch pos b"],
    total: Float[Tensor, "a b"],
    factor: float = 1.0,
    *,
    scratch: int | None = None,
) -> None:
    """Add a factor times the sum over examples x of |first_x^T second_x|, a block at a time."""
    n_rows, n_columns = total.shape
    if scratch is None:
        scratch = CPU_SCRATCH if total.device.type == "cpu" else GPU_SCRATCH
    block_rows = min(n_rows, max(1, scratch // n_columns))
    block_examples = min(len(first), max(1, scratch // (block_rows * n_columns)))
    # Made once: fresh memory costs more than the arithmetic.
    buffer = total.new_empty(block_examples, block_rows, n_columns)

    first = first.float().mT
    second = second.float()
    for row in range(0, n_rows, block_rows):
        total_block = total[row : row + block_rows]
        for start in range(0, len(first), block_examples):
            left = first[start : start + block_examples, row : row + block_rows]
            right = second[start : start + block_examples]

            products = buffer[: len(left), : len(total_block)]
            torch.bmm(left, right, out=products).abs_()
            if block_examples == 1:
                total_block.add_(products[0], alpha=factor)
            else:
                total_block.add_(products.sum(dim=0), alpha=factor)


def _single_examples(batches: Sequence[Batch]) -> list[Batch]:
    singles = []
    for batch in batches:
        for row in range(len(batch)):
            tokens = batch.tokens[row : row + 1]
            is_target = batch.is_target[row : row + 1]
            singles.append(Batch(tokens, is_target))
    return singles


def zeros(site: Site) -> Tensor:
    """Room for the sum of a matrix, where the matrix is."""
    parameter = site.parameter
    return torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)


# Several processes, such as one for each GPU


def _place_among_processes() -> tuple[int, int]:
    """This process's number, and how many there are."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def _added_up(losses: Float[Tensor, " n"], totals: Mapping[str, Tensor]) -> Float[Tensor, " n"]:
    """The losses of all processes' examples; their totals are added up in place."""
    # Every process walks the sites in this order, so the sums meet their like. One without a batch
    # adds zeros, and must still take part, or the others would wait for it forever.
    for total in totals.values():
        distributed.all_reduce(total)
    losses = losses.to(next(iter(totals.values())).device)
    distributed.all_reduce(losses)
    return losses.cpu()


def refuse_differences(
    batches: Sequence[Batch],
    sites: Mapping[str, Site],
    kind: Kind,
    max_memory: int | None,
) -> None:
    """Check that every process, where there are several, was given the same data and options."""
    if _place_among_processes()[1] == 1:
        return
    digest = hashlib.sha256(f"{kind} {max_memory}".encode())
    for batch in batches:
        digest.update(f"{tuple(batch.tokens.shape)}".encode())
        digest.update(batch.tokens.cpu().numpy().tobytes())
        digest.update(batch.is_target.cpu().numpy().tobytes())
    for name, site in sites.items():
        total = site.parameter.detach().sum(dtype=torch.float64).item()
        digest.update(f"{name} {total:.9g}".encode())
    device = next(iter(sites.values())).parameter.device
    own = torch.tensor(int(digest.hexdigest()[:15], base=16), device=device)  # 60 bits

    # Every process gets the numbers of all, so that all end alike and none waits for another that
    # has ended.
    gathered = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
    distributed.all_gather(gathered, own)
    differing = [rank for rank, number in enumerate(gathered) if number != gathered[0]]
    if differing:
        raise ValueError(
            f"processes {differing} of {len(gathered)} were given other batches, weights or "
            "options than process 0; give every process all of them: each runs its share by itself"
        )
