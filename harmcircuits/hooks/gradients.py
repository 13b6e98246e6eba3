"""Hook pairs that turn one backward pass into the gradients of every block matrix.

A linear map Y = X W^T with output gradient G has dL/dW = sum over examples and positions of G^T X. A forward hook on
`hook_in` keeps X, a backward hook on `hook_out` brings G, and their product goes to the caller. All parameters are
frozen meanwhile, so nothing but the caller's accumulators is added to the memory of the activations.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
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
    exit when a site was never reached by a backward pass: its score would silently be zero.
    """
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
    start = ("embed.hook_out", lambda value, hook: value.detach().requires_grad_())
    with frozen(bridge), bridge.hooks(fwd_hooks=[start, *forward], bwd_hooks=backward):
        yield
    missing = sorted(set(sites) - reached)
    if missing:
        raise ValueError(f"hook_pairs: no gradient reached {missing}; does the objective run the whole model?")


@contextmanager
def inputs_of(
    bridge: TransformerBridge, sites: Mapping[str, Site], receive: Callable[[Site, Input], None]
) -> Iterator[None]:
    """While open, each forward pass calls `receive(site, X)` with the input of every matrix."""
    hooks = [(s.hook_in, lambda value, hook, site=s: receive(site, value.detach().flatten(2))) for s in sites.values()]
    with frozen(bridge), bridge.hooks(fwd_hooks=hooks):
        yield


@contextmanager
def frozen(bridge: TransformerBridge) -> Iterator[None]:
    """No parameter requires a gradient and dropout is off; both are as before on exit."""
    parameters = [(parameter, parameter.requires_grad) for parameter in bridge.parameters()]
    training = [module for module in bridge.modules() if module.training]
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
