"""Pairs of hooks give the gradients of every block matrix in one backward pass."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from harmcircuits.circuits.sites import Site
from harmcircuits.hooks.bridge import Bridge, evaluating

Input = Float[Tensor, "batch pos d_in"]
OutputGradient = Float[Tensor, "batch pos d_out"]

# Hooks of attention give [batch pos head d_head]; the last two axes are one axis of the matrix.
HEAD_AXIS = 2


@contextmanager
def hook_pairs(
    bridge: Bridge,
    sites: Mapping[str, Site],
    receive: Callable[[Site, Input, OutputGradient], None],
) -> Iterator[None]:
    """While open, a backward pass calls `receive(site, X, G)` for every use of each matrix."""
    _refuse_unhooked(sites)
    # A stack for each matrix: the forward pass pushes inputs, the backward pass pops them.
    inputs: dict[str, list[Tensor]] = {name: [] for name in sites}
    reached_names = set()

    def push_input(value: Tensor, hook: Any, site: Site) -> None:
        # A pass without gradients, such as a reference model's, has no backward pass to pop it.
        if torch.is_grad_enabled():
            inputs[site.name].append(value.detach())

    def watch_output(value: Tensor, hook: Any, site: Site) -> Tensor:
        # A hook of the tensor costs some hundredths of a pass less than one of the module.
        if value.requires_grad:
            value.register_hook(partial(pair, site=site))
        # The model must go on with this very tensor, and a hook may see another view of it.
        return value

    def pair(gradient: Tensor, site: Site) -> None:
        reached_names.add(site.name)
        # The backward pass goes through the uses of a matrix in reverse, so the latest input
        # belongs to the first gradient.
        x = inputs[site.name].pop()
        receive(site, x.flatten(HEAD_AXIS), gradient.flatten(HEAD_AXIS))

    hooks: list[Any] = [_graph_start(sites)]
    for site in sites.values():
        hooks.append((site.hook_in, partial(push_input, site=site)))
        hooks.append((site.hook_out, partial(watch_output, site=site)))

    with frozen(bridge), bridge.hooks(fwd_hooks=hooks):
        yield
    _refuse_unreached(sites, reached_names)
    if any(inputs.values()):
        raise ValueError(
            "the objective runs the model more often than its value depends on, so inputs and "
            "gradients cannot be paired; compute its constants under torch.no_grad()"
        )


@contextmanager
def parameter_gradients(
    sites: Mapping[str, Site], receive: Callable[[Site, Tensor], None]
) -> Iterator[None]:
    """While open, each backward pass calls `receive(site, dL/dW)` once for every site."""
    reached_names = set()

    def pass_on(parameter: Any, site: Site) -> None:
        reached_names.add(site.name)
        receive(site, parameter.grad)
        parameter.grad = None  # freed before the backward pass reaches the next matrix

    own_gradients = [(site.parameter, site.parameter.grad) for site in sites.values()]
    hooks = []
    try:
        for site in sites.values():
            # torch would add to an existing gradient.
            site.parameter.grad = None
            site.parameter.requires_grad_(True)
            hook = partial(pass_on, site=site)
            hooks.append(site.parameter.register_post_accumulate_grad_hook(hook))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, gradient in own_gradients:
            parameter.grad = gradient
    _refuse_unreached(sites, reached_names)


@contextmanager
def inputs_of(
    bridge: Bridge,
    sites: Mapping[str, Site],
    receive: Callable[[Site, Input], None],
) -> Iterator[None]:
    """While open, each forward pass calls `receive(site, X)` with the input of every matrix."""
    _refuse_unhooked(sites)

    def pass_on(value: Tensor, hook: Any, site: Site) -> None:
        receive(site, value.detach().flatten(HEAD_AXIS))

    hooks = [(site.hook_in, partial(pass_on, site=site)) for site in sites.values()]
    with frozen(bridge), bridge.hooks(fwd_hooks=hooks):
        yield


@contextmanager
def frozen(bridge: Bridge) -> Iterator[None]:
    """While open, no parameter requires a gradient and dropout is off; restored on any exit."""
    requirements = [(parameter, parameter.requires_grad) for parameter in bridge.parameters()]
    try:
        for parameter, _ in requirements:
            parameter.requires_grad_(False)
        with evaluating(bridge):
            yield
    finally:
        for parameter, requires_grad in requirements:
            parameter.requires_grad_(requires_grad)


def _graph_start(sites: Mapping[str, Site]) -> tuple[str, Callable[..., Tensor]]:
    """The forward hook at which the autograd graph begins, since no parameter begins one."""
    first_layer = min((site.layer for site in sites.values()), default=0)
    hook_point = f"blocks.{first_layer}.hook_in" if first_layer else "embed.hook_out"

    # With every parameter frozen, the residual stream is made a leaf here:
    #
    #     embed -> blocks 0 1 | 2 3 -> loss       sites of layers 2 and 3
    #       no graph, no memory | graph
    def require_gradient(value: Tensor, hook: Any) -> Tensor:
        if value.requires_grad:
            return value  # a parameter below, such as an expert's, needs its gradient too
        return value.detach().requires_grad_()

    return hook_point, require_gradient


def _refuse_unhooked(sites: Mapping[str, Site]) -> None:
    names = [name for name, site in sites.items() if not site.is_hooked]
    if names:
        raise ValueError(
            f"the inputs and outputs of {', '.join(names[:3])} ({len(names)} matrices: "
            "experts and routers) pass no hook points; score this model by removal_effect, "
            "snip_scores or magnitude_scores"
        )


def _refuse_unreached(sites: Mapping[str, Site], reached_names: set[str]) -> None:
    missing = sorted(set(sites) - reached_names)
    if missing:
        raise ValueError(f"no gradient reached {missing}; does the objective run the whole model?")
