"""Hook pairs that turn one backward pass into the gradients of every block matrix.

A linear map Y = X W^T with output gradient G has dL/dW = sum over examples and positions of G^T X. A forward hook on
`hook_in` keeps X, a backward hook on `hook_out` brings G, and their product goes to the caller. All parameters are
frozen meanwhile, so nothing but the caller's accumulators is added to the memory of the activations.

Experts and routers have no such pair. Their gradient comes from the parameter itself, one matrix at a time.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from harmcircuits.hooks.weights import Site

Input = Float[Tensor, "batch pos d_in"]
OutputGradient = Float[Tensor, "batch pos d_out"]


@contextmanager
def hook_pairs(
    bridge: TransformerBridge, sites: Mapping[str, Site], receive: Callable[[Site, Input, OutputGradient], None]
) -> Iterator[None]:
    """While open, each backward pass calls `receive(site, X, G)` once for every use of each matrix.

    On exit all hooks are gone and every parameter's `requires_grad` is as before. Raises ValueError at the end of a clean
    exit when a site was never reached by a backward pass: its score would silently be zero; and for sites that are not
    hooked.
    """
    _refuse_unhooked(sites)
    inputs: dict[str, list[Tensor]] = {name: [] for name in sites}
    reached = set()

    def keep(value: Tensor, hook: Any, site: Site) -> None:
        inputs[site.name].append(value.detach())

    def give(gradient: Tensor, hook: Any, site: Site) -> None:
        reached.add(site.name)
        # Attention hooks are split by head: [batch pos head d_head].
        receive(site, inputs[site.name].pop().flatten(2), gradient.flatten(2))

    forward = [(site.hook_in, partial(keep, site=site)) for site in sites.values()]
    backward = [(site.hook_out, partial(give, site=site)) for site in sites.values()]
    # Below the first of these layers no graph is needed, unless a parameter there has one of its own.
    first = min((site.layer for site in sites.values()), default=0)
    name = f"blocks.{first}.hook_in" if first else "embed.hook_out"
    start = (name, lambda value, hook: value if value.requires_grad else value.detach().requires_grad_())
    with frozen(bridge), bridge.hooks(fwd_hooks=[start, *forward], bwd_hooks=backward):
        yield
    _refuse_unreached(sites, reached)


@contextmanager
def parameter_gradients(sites: Mapping[str, Site], receive: Callable[[Site, Tensor], None]) -> Iterator[None]:
    """While open, each backward pass calls `receive(site, dL/dW)` once for every site; no gradient stays in memory.

    For sites without hook points; open it inside `frozen` or `hook_pairs`, whose exit restores `requires_grad`. A gradient
    has its parameter's dtype. On exit the hooks are gone and every `.grad` is as before. Raises ValueError as `hook_pairs`
    for a site that was never reached.
    """
    reached = set()

    def give(parameter: Tensor, site: Site) -> None:
        reached.add(site.name)
        assert parameter.grad is not None
        receive(site, parameter.grad)
        parameter.grad = None

    before = [(site.parameter, site.parameter.grad) for site in sites.values()]
    hooks = []
    try:
        for site in sites.values():
            site.parameter.grad = None
            site.parameter.requires_grad_(True)
            hooks.append(site.parameter.register_post_accumulate_grad_hook(partial(give, site=site)))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, gradient in before:
            parameter.grad = gradient
    _refuse_unreached(sites, reached)


@contextmanager
def inputs_of(
    bridge: TransformerBridge, sites: Mapping[str, Site], receive: Callable[[Site, Input], None]
) -> Iterator[None]:
    """While open, each forward pass calls `receive(site, X)` with the input of every matrix. ValueError if not hooked."""
    _refuse_unhooked(sites)
    hooks = [(s.hook_in, lambda value, hook, site=s: receive(site, value.detach().flatten(2))) for s in sites.values()]
    with frozen(bridge), bridge.hooks(fwd_hooks=hooks):
        yield


@contextmanager
def frozen(bridge: TransformerBridge) -> Iterator[None]:
    """No parameter requires a gradient and dropout is off; both are as before on exit."""
    parameters = [(parameter, parameter.requires_grad) for parameter in bridge.parameters()]
    # Some modules of the Hugging Face model, the outermost among them, are none of the bridge's.
    modules = chain(bridge.modules(), bridge.original_model.modules())
    training = [module for module in modules if module.training]
    try:
        for parameter, _ in parameters:
            parameter.requires_grad_(False)
        for module in training:
            module.training = False
        yield
    finally:
        for parameter, required in parameters:
            parameter.requires_grad_(required)
        for module in training:
            module.training = True


def _refuse_unhooked(sites: Mapping[str, Site]) -> None:
    unhooked = [name for name, site in sites.items() if not site.is_hooked]
    if unhooked:
        raise ValueError(
            f"the inputs and outputs of {', '.join(unhooked[:3])} ({len(unhooked)} matrices: experts and routers) pass no "
            "hook points; score this model by removal_effect, sensitivity or magnitude_scores"
        )


def _refuse_unreached(sites: Mapping[str, Site], reached: set[str]) -> None:
    missing = sorted(set(sites) - reached)
    if missing:
        raise ValueError(f"no gradient reached {missing}; does the objective run the whole model?")
