"""Mean gradients over the calibration data in float32: in one pass or several of bounded memory, on one process or many."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from harmcircuits.hooks.absolute import add_absolute
from harmcircuits.hooks.distributed import Processes, batches_text
from harmcircuits.hooks.gradients import Input, OutputGradient, hook_pairs, parameter_gradients
from harmcircuits.hooks.objectives import Objective
from harmcircuits.hooks.weights import Site, model_fingerprint
from harmcircuits.prompts import Batch

BYTES = 4  # of an accumulated float32 number


def mean_gradients(
    bridge: TransformerBridge,
    batches: Sequence[Batch],
    objective: Objective,
    sites: Mapping[str, Site],
    finish: Callable[[Site, Tensor], Tensor],
    *,
    absolute: bool = False,
    max_memory: int | None = None,
) -> dict[str, Float[Tensor, "..."]]:
    """`finish(site, mean_x dL_x/dW)` of every site, or of mean_x |dL_x/dW|; float32, shaped like the weight as stored.

    With `max_memory` the accumulators on the devices never exceed that many bytes: the data are passed over once for each
    group of consecutive matrices that fits, and what is finished goes to host memory. The numbers are the same, bit for
    bit. So they are where torch.distributed is initialised, on processors of one kind: every process is given all batches,
    runs its share of them, holds the accumulators of its share of the matrices, and gets all that is finished (see
    `Processes`). Raises ValueError for a matrix larger than `max_memory`, an objective of the wrong shape, processes that
    were given different batches, models or options, and as `hook_pairs`.
    """
    n_examples = sum(len(batch) for batch in batches)
    processes = Processes(list(sites), bridge.cfg.device)
    if processes.is_shared:
        options = f"{list(sites)} {absolute} {max_memory}"
        given = {"batches": batches_text(batches), "weights": model_fingerprint(bridge), "matrices or options": options}
        processes.refuse_differences(given)
    finished = {}
    for group in groups(sites, max_memory):
        total = {name: _zeros(site) for name, site in group.items() if processes.owns(name)}
        accumulate(bridge, batches, objective, group, total, absolute, processes)
        for name, site in group.items():
            value = finish(site, total.pop(name).div_(n_examples)) if processes.owns(name) else _zeros(site)
            value = processes.spread(name, value)
            finished[name] = value if max_memory is None else value.cpu()
    return finished


def _zeros(site: Site) -> Tensor:
    return torch.zeros(site.parameter.shape, dtype=torch.float32, device=site.parameter.device)


def groups(sites: Mapping[str, Site], max_memory: int | None) -> Iterator[dict[str, Site]]:
    """Consecutive sites whose accumulators fit in `max_memory` bytes together; all of them without a bound."""
    group: dict[str, Site] = {}
    size = 0
    for name, site in sites.items():
        need = BYTES * site.parameter.numel()
        if max_memory is not None and need > max_memory:
            raise ValueError(
                f"max_memory={max_memory:,} bytes; the scores of {name} alone take {need:,}: give at least these"
            )
        if max_memory is not None and size + need > max_memory:
            yield group
            group, size = {}, 0
        group[name] = site
        size += need
    yield group


def accumulate(
    bridge: TransformerBridge,
    batches: Sequence[Batch],
    objective: Objective,
    sites: Mapping[str, Site],
    total: Mapping[str, Tensor],
    absolute: bool,
    processes: Processes,
) -> None:
    """Add the gradients of these batches, summed over examples, to `total`; with `absolute` their absolute values.

    Of several processes each adds up the matrices it owns, from the batches of all.
    """
    hooked = {name: site for name, site in sites.items() if site.is_hooked}
    others = {name: site for name, site in sites.items() if not site.is_hooked}

    def receive(site: Site, x: Input, g: OutputGradient) -> None:
        factors = (g, x) if site.input_axis == 1 else (x, g)
        for first, second in processes.factors(site.name, *factors):
            (add_absolute if absolute else add_signed)(first, second, total[site.name])

    def receive_gradient(site: Site, gradient: Tensor) -> None:
        for (one,) in processes.factors(site.name, gradient):
            total[site.name].add_(one.abs() if absolute else one)

    # A parameter's gradient is summed over the batch, so absolute values per example need an example at a time.
    at_once = list(_singles(batches)) if others and absolute else batches
    with torch.enable_grad(), hook_pairs(bridge, hooked, receive), parameter_gradients(others, receive_gradient):
        for batch in processes.turns(at_once):
            values = objective(bridge, batch)
            if values.shape != (len(batch),):
                raise ValueError(f"the objective gave shape {tuple(values.shape)}; expected ({len(batch)},)")
            values.sum().backward()


def add_signed(
    first: Float[Tensor, "batch pos a"], second: Float[Tensor, "batch pos b"], total: Float[Tensor, "a b"]
) -> None:
    """Add sum over examples and positions of first^T second to `total`, in float32."""
    total.addmm_(first.flatten(0, 1).float().T, second.flatten(0, 1).float())


def _singles(batches: Sequence[Batch]) -> Iterator[Batch]:
    for batch in batches:
        for tokens, is_target in zip(batch.tokens.split(1), batch.is_target.split(1), strict=True):
            yield Batch(tokens, is_target)
