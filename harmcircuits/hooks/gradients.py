"""Hook pairs that turn one backward pass into the gradients of every block matrix."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from harmcircuits.circuits.sites import Site
from harmcircuits.hooks.bridge import Bridge

Input = Float[Tensor, "batch pos d_in"]
OutputGradient = Float[Tensor, "batch pos d_out"]


@contextmanager
def hook_pairs(
    bridge: Bridge,
    sites: Mapping[str, Site],
    receive: Callable[[Site, Input, OutputGradient], None],
) -> Iterator[None]:
    """While open, a backward pass calls `receive(site, X, G)` for every use of each matrix."""
    _refuse_unhooked(sites)
    # A stack for each matrix: pushed in the forward pass, popped in the backward pass.
    inputs: dict[str, list[Tensor]] = {name: [] for name in sites}
    reached = set()

    def keep_input(value: Tensor, hook: Any, site: Site) -> None:
        # A pass without gradients, of a reference say, has no way back that would pop it.
        if torch.is_grad_enabled():
            inputs[site.name].append(value.detach())

    def watch_output(value: Tensor, hook: Any, site: Site) -> Tensor:
        # On the tensor: cheaper by some hundredths of a pass than a backward hook of the module.
        if value.requires_grad:
            value.register_hook(partial(give_pair, site=site))
        # Given back, since a hook may see another view than the model would go on with.
        return value

    def give_pair(gradient: Tensor, site: Site) -> None:
        reached.add(site.name)
        # The backward pass goes through the uses of a matrix in reverse, so the last input that
        # was kept belongs to the first gradient that arrives.
        x = inputs[site.name].pop()
        receive(site, _without_heads(x), _without_heads(gradient))

    hooks: list[tuple[str, Callable[..., Any]]] = [_graph_start(sites)]
    for site in sites.values():
        hooks.append((site.hook_in, partial(keep_input, site=site)))
        hooks.append((site.hook_out, partial(watch_output, site=site)))

    with frozen(bridge), bridge.hooks(fwd_hooks=hooks):
        yield
    _refuse_unreached(sites, reached)
    if any(inputs.values()):
        raise ValueError(
            "the objective runs the model more often than its value depends on, so inputs and "
            "gradients cannot be paired; run what is a constant in it under torch.no_grad()"
        )


@contextmanager
def parameter_gradients(
    sites: Mapping[str, Site], receive: Callable[[Site, Tensor], None]
) -> Iterator[None]:
    """While open, each backward pass calls `receive(site, dL/dW)` once for every site."""
    reached = set()

    def give_gradient(parameter: Tensor, site: Site) -> None:
        reached.add(site.name)
        assert parameter.grad is not None
        receive(site, parameter.grad)
        parameter.grad = None  # freed before the backward pass reaches the next matrix

    gradients_before = [(site.parameter, site.parameter.grad) for site in sites.values()]
    hooks = []
    try:
        for site in sites.values():
            # torch would add to a gradient that is there already.
            site.parameter.grad = None
            site.parameter.requires_grad_(True)
            hook = partial(give_gradient, site=site)
            hooks.append(site.parameter.register_post_accumulate_grad_hook(hook))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, gradient in gradients_before:
            parameter.grad = gradient
    _refuse_unreached(sites, reached)


@contextmanager
def inputs_of(
    bridge: Bridge,
    sites: Mapping[str, Site],
    receive: Callable[[Site, Input], None],
) -> Iterator[None]:
    """While open, each forward pass calls `receive(site, X)` with the input of every matrix."""
    _refuse_unhooked(sites)

    def give_input(value: Tensor, hook: Any, site: Site) -> None:
        receive(site, _without_heads(value.detach()))

    hooks = []
    for site in sites.values():
        hooks.append((site.hook_in, partial(give_input, site=site)))
    with frozen(bridge), bridge.hooks(fwd_hooks=hooks):
        yield


@contextmanager
def frozen(bridge: Bridge) -> Iterator[None]:
    """No parameter requires a gradient and dropout is off; both are as before on exit."""
    required_before = [(parameter, parameter.requires_grad) for parameter in bridge.parameters()]
    # Some modules of the Hugging Face model, the outermost among them, are none of the bridge's.
    modules = chain(bridge.modules(), bridge.original_model.modules())
    training_modules = [module for module in modules if module.training]

    try:
        for parameter, _ in required_before:
            parameter.requires_grad_(False)
        for module in training_modules:
            module.training = False
        yield
    finally:
        for parameter, required in required_before:
            parameter.requires_grad_(required)
        for module in training_modules:
            module.training = True


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
            return value  # a parameter below, such as an expert's, wants its gradient too
        return value.detach().requires_grad_()

    return hook_point, require_gradient


def _without_heads(value: Tensor) -> Float[Tensor, "batch pos d"]:
    """Attention hooks may be split by head; the matrices' axes are not."""
    if value.ndim == 4:
        return rearrange(value, "batch pos head d_head -> batch pos (head d_head)")
    return value


def _refuse_unhooked(sites: Mapping[str, Site]) -> None:
    unhooked = [name for name, site in sites.items() if not site.is_hooked]
    if unhooked:
        raise ValueError(
            f"the inputs and outputs of {', '.join(unhooked[:3])} ({len(unhooked)} matrices: "
            "experts and routers) pass no hook points; score this model by removal_effect, "
            "snip_scores or magnitude_scores"
        )


def _refuse_unreached(sites: Mapping[str, Site], reached: set[str]) -> None:
    missing = sorted(set(sites) - reached)
    if missing:
        raise ValueError(f"no gradient reached {missing}; does the objective run the whole model?")
