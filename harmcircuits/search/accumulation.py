"""Sums of gradients over the calibration data, in float32.

In one pass or several of bounded memory, by one process or several of torch.distributed.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
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
# Numbers of scratch memory: as many as the cache of a CPU core holds, and as fill a GPU.
CPU_SCRATCH = 2**19
GPU_SCRATCH = 2**26

# How the gradient G^T X is summed; x and g stand for one position of one example:
#   "signed"       sum over examples and positions of  g x^T
#   "per example"  sum over examples of |sum over positions of g x^T|
#   "per token"    sum over examples and positions of sign(W) |g| |x|^T
# Each is at most the next, in magnitude. The second costs a product for each example. The third
# has the sign of its weight: times the weight it is positive, so one sum can hold it and the first.
Reduction = Literal["signed", "per example", "per token"]

ReceivePair = Callable[[Site, Input, OutputGradient], None]
ReceiveGradient = Callable[[Site, Tensor], None]


def mean_gradients(
    bridge: Bridge,
    batches: Sequence[Batch],
    objective: Objective,
    sites: Mapping[str, Site],
    reduction: Reduction = "signed",
    *,
    coefficient: float = 1.0,
    max_memory: int | None = None,
) -> dict[str, Float[Tensor, "..."]]:
    """A coefficient times the mean over examples x of dL_x/dW of every site; shaped as stored."""
    sums = GradientSums(sites, max_memory)
    sums.add(bridge, batches, objective, reduction, coefficient)
    return sums.totals


@dataclass
class GradientSums:
    """A sum for every matrix: on its device, or in a temporary file under a bound on memory."""

    sites: Mapping[str, Site]
    max_memory: int | None = None
    totals: dict[str, Float[Tensor, "..."]] = field(default_factory=dict)

    def start(self, name: str, values: Tensor) -> None:
        """Begin the sum of a matrix with these values."""
        device = self.sites[name].parameter.device
        is_bounded = self.max_memory is not None
        self.totals[name] = mapped_copy(values) if is_bounded else values.to(device)

    @torch.inference_mode(False)  # tensors that are made inside it have no gradients
    def add(
        self,
        bridge: Bridge,
        batches: Sequence[Batch],
        objective: Objective,
        reduction: Reduction,
        coefficient: float,
    ) -> None:
        """Add a coefficient times the mean gradients of all matrices."""
        refuse_differences(batches, self.sites, reduction, self.max_memory)
        if not self.totals:
            for name, site in self.sites.items():
                zeros = torch.zeros(site.parameter.shape, device=site.parameter.device)
                self.start(name, zeros)

        for sites in memory_groups(self.sites, self.max_memory):
            totals = {}
            for name, site in sites.items():
                totals[name] = self.totals[name].to(site.parameter.device)
            add_gradients(bridge, batches, objective, sites, totals, reduction, coefficient)
            for name, total in totals.items():
                self.totals[name].copy_(total)


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
    reduction: Reduction,
    coefficient: float,
) -> None:
    """Add a coefficient times the mean gradients to `totals`, in place."""
    rank, n_processes = _rank_and_number()
    # Dealt out like cards. Seven batches among three processes:
    #
    #     rank 0    0  3  6
    #     rank 1    1  4
    #     rank 2    2  5
    lengths = torch.tensor([len(batch) for batch in batches])
    owner = torch.arange(len(batches)) % n_processes
    is_own = owner.repeat_interleave(lengths) == rank
    own_batches = batches[rank::n_processes]
    if rank:
        for total in totals.values():
            total.zero_()  # the sum that is there already counts once
    if reduction != "signed" and not all(site.is_hooked for site in sites.values()):
        # A parameter's gradient is a sum over its batch, so each example needs its own batch.
        own_batches = _single_examples(own_batches)

    losses = torch.zeros(len(is_own))
    if own_batches:
        receivers = _adders(totals, reduction, coefficient / len(is_own))
        with receiving_gradients(bridge, sites, *receivers):
            losses[is_own] = _backward(bridge, own_batches, objective)
    if n_processes > 1:
        losses = _summed_over_processes(losses, totals)
    refuse_not_finite(batches, losses, objective)
    refuse_not_finite_gradients(totals, objective)


def _adders(
    totals: Mapping[str, Tensor], reduction: Reduction, coefficient: float
) -> tuple[ReceivePair, ReceiveGradient]:
    """Functions that add a coefficient times the gradient of one matrix to its total."""

    def add_pair(site: Site, x: Input, g: OutputGradient) -> None:
        first, second = as_stored(site, x, g)
        total = totals[site.name]
        if reduction == "per example":
            add_absolute(first, second, total, coefficient)
        elif reduction == "per token":
            weight = site.parameter.detach()
            add_product(first.abs(), second.abs(), total, coefficient, sign_of=weight)
        else:
            add_product(first, second, total, coefficient)

    def add_gradient(site: Site, gradient: Tensor) -> None:
        if reduction == "per example":
            gradient = gradient.abs()
        elif reduction == "per token":
            gradient = gradient.abs().copysign_(site.parameter.detach())
        totals[site.name].add_(gradient, alpha=coefficient)

    return add_pair, add_gradient


def _backward(
    bridge: Bridge, batches: Sequence[Batch], objective: Objective
) -> Float[Tensor, " n"]:
    """Run a backward pass of every batch; the examples' losses."""
    losses = []
    for batch in batches:
        values = objective(bridge, batch)
        if values.shape != (len(batch),):
            raise ValueError(
                f"the objective gave shape {tuple(values.shape)}; expected ({len(batch)},), "
                "one value for each example"
            )
        values.sum().backward()
        losses.append(values.detach().float())
    # Read at the end: to read it after every batch would wait for the device every time.
    return torch.cat(losses).cpu()


@contextmanager
def receiving_gradients(
    bridge: Bridge,
    sites: Mapping[str, Site],
    receive_pair: ReceivePair,
    receive_gradient: ReceiveGradient,
) -> Iterator[None]:
    """While open, backward passes hand over X and G of each hooked matrix, and dL/dW of others."""
    hooked = {name: site for name, site in sites.items() if site.is_hooked}
    unhooked = {name: site for name, site in sites.items() if not site.is_hooked}
    with (
        torch.enable_grad(),
        hook_pairs(bridge, hooked, receive_pair),
        parameter_gradients(unhooked, receive_gradient),
    ):
        yield


def as_stored(site: Site, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """X and G in the order in which first^T second has the orientation of the stored weight."""
    return (g, x) if site.input_axis == 1 else (x, g)


def add_product(
    first: Float[Tensor, "batch pos a"],
    second: Float[Tensor, "batch pos b"],
    total: Float[Tensor, "a b"],
    coefficient: float = 1.0,
    *,
    sign_of: Float[Tensor, "a b"] | None = None,
) -> None:
    """Add a coefficient times the sum over examples and positions of first^T second, in float32."""
    first = first.flatten(0, 1)
    second = second.flatten(0, 1)
    if not first.dtype == second.dtype == torch.bfloat16:
        first, second = first.float(), second.float()
    if sign_of is None and first.dtype == torch.float32:
        total.addmm_(first.T, second, alpha=coefficient)
        return
    product = first.T @ second
    if sign_of is not None:
        product.copysign_(sign_of)
    total.add_(product, alpha=coefficient)


def add_absolute(
    first: Float[Tensor, "batch pos a"],
    second: Float[Tensor, "batch pos b"],
    total: Float[Tensor, "a b"],
    coefficient: float = 1.0,
    *,
    scratch: int | None = None,
) -> None:
    """Add a coefficient times the sum over examples x of |first_x^T second_x|, in blocks."""
    n_rows, n_columns = total.shape
    if scratch is None:
        scratch = CPU_SCRATCH if total.device.type == "cpu" else GPU_SCRATCH
    block_rows = min(n_rows, max(1, scratch // n_columns))
    block_examples = min(len(first), max(1, scratch // (block_rows * n_columns)))
    # Made once: new memory costs more than the arithmetic.
    buffer = total.new_empty(block_examples, block_rows, n_columns)

    first = first.float().mT
    second = second.float()
    for row in range(0, n_rows, block_rows):
        total_block = total[row : row + block_rows]
        for start in range(0, len(first), block_examples):
            first_block = first[start : start + block_examples, row : row + block_rows]
            second_block = second[start : start + block_examples]

            products = buffer[: len(first_block), : len(total_block)]
            torch.bmm(first_block, second_block, out=products).abs_()
            if block_examples == 1:
                total_block.add_(products[0], alpha=coefficient)
            else:
                total_block.add_(products.sum(dim=0), alpha=coefficient)


def _single_examples(batches: Sequence[Batch]) -> list[Batch]:
    singles = []
    for batch in batches:
        rows = zip(batch.tokens.split(1), batch.is_target.split(1), strict=True)
        singles += [Batch(*row) for row in rows]
    return singles


# Several processes, such as one for each GPU


def _rank_and_number() -> tuple[int, int]:
    """This process's number, and the number of processes."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def _summed_over_processes(
    losses: Float[Tensor, " n"], totals: Mapping[str, Tensor]
) -> Float[Tensor, " n"]:
    """The losses of all processes' examples; all totals are summed in place."""
    # Every process goes through the sites in this order, so the sums of one matrix meet. A process
    # without a batch adds zeros: if it took no part, the others would wait for it for ever.
    for total in totals.values():
        distributed.all_reduce(total)
    losses = losses.to(next(iter(totals.values())).device)
    distributed.all_reduce(losses)
    return losses.cpu()


def refuse_differences(
    batches: Sequence[Batch],
    sites: Mapping[str, Site],
    reduction: Reduction,
    max_memory: int | None,
) -> None:
    """Check that all processes have the same data and options."""
    _, n_processes = _rank_and_number()
    if n_processes == 1:
        return
    digest = hashlib.sha256(f"{reduction} {max_memory}".encode())
    for batch in batches:
        digest.update(f"{tuple(batch.tokens.shape)}".encode())
        digest.update(batch.tokens.cpu().numpy().tobytes())
        digest.update(batch.is_target.cpu().numpy().tobytes())
    for name, site in sites.items():
        total = site.parameter.detach().sum(dtype=torch.float64).item()
        digest.update(f"{name} {total:.9g}".encode())
    device = next(iter(sites.values())).parameter.device
    own = torch.tensor(int(digest.hexdigest()[:15], base=16), device=device)  # 60 bits

    # Every process gets the numbers of all, so all of them raise, and none waits for another.
    numbers = [torch.empty_like(own) for _ in range(n_processes)]
    distributed.all_gather(numbers, own)
    differing = [rank for rank, number in enumerate(numbers) if number != numbers[0]]
    if differing:
        raise ValueError(
            f"processes {differing} of {n_processes} have other batches, weights or options than "
            "process 0; give every process all of them: it takes its share by itself"
        )
