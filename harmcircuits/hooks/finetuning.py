"""Fine-tuning a live model in place, step by step, and putting it back bit for bit.

Low-rank adapters are merged: the block matrices stay plain parameters under their own names, so masks, hooks and
measurements see the fine-tuned model at every step. peft replaces those modules by adapters, under which no merged
weight exists that a mask could hold and `named_weights` finds nothing; the tests hold the merged form against it.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import isfinite, sqrt
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

from harmcircuits.hooks.objectives import Objective, completion_loss
from harmcircuits.hooks.weights import Site, weight_sites
from harmcircuits.prompts import Batch


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters on every block matrix: W = W_0 + (alpha / r) up down, with `r` columns in `up`.

    Source: arXiv 2106.09685. Raises ValueError for a rank below 1.
    """

    r: int = 8
    alpha: float = 16.0

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"Lora: r={self.r}; expected a rank of at least 1")


class FineTuning:
    """A run in progress: `losses` holds the mean objective of the batch of every step taken so far."""

    def __init__(
        self,
        bridge: TransformerBridge,
        order: Iterator[Batch],
        optimizer: torch.optim.Optimizer,
        objective: Objective,
    ) -> None:
        self._bridge, self._order, self._optimizer, self._objective = bridge, order, optimizer, objective
        self.losses: list[float] = []

    @property
    def step(self) -> int:
        """How many steps have been taken."""
        return len(self.losses)

    def until(self, step: int) -> None:
        """Train until `step` steps have been taken in all.

        Raises ValueError for a step that has passed, and for a loss that is not finite.
        """
        if step < self.step:
            raise ValueError(f"until({step}): {self.step} steps are taken already; open another fine_tuning to go back")
        while self.step < step:
            self._optimizer.zero_grad()
            with torch.enable_grad():
                loss = self._objective(self._bridge, next(self._order)).mean()
                loss.backward()
            if not isfinite(loss.item()):
                raise ValueError(f"the loss is {loss.item()} at step {self.step}; lower lr or look at the batches")
            self._optimizer.step()
            self.losses.append(loss.item())


@contextmanager
def fine_tuning(
    bridge: TransformerBridge,
    batches: Sequence[Batch],
    *,
    lr: float,
    lora: Lora | None = None,
    weight_decay: float = 0.0,
    seed: int = 0,
    objective: Objective = completion_loss,
) -> Iterator[FineTuning]:
    """A run that fine-tunes the model in place with AdamW at a constant rate; on any exit every parameter is as before.

    `run.until(step)` trains up to a step, so that a curve can be measured on the way. Every epoch takes the batches in a
    new order drawn with `seed`. Without `lora` every parameter learns; with it, only the adapters' factors do, and W as
    stored is the merged weight, rounded to the model's dtype. Restored bit for bit, at the cost of a copy of the model;
    dropout stays as it is.

    Composes with masks: inside `held` the removed weights are zero at every step (with `lora`, those entries of the merged
    weight, and the factors get no gradient from them); inside `masked` they start at zero and are free to learn. Raises
    ValueError for no batches, an `lr` that is not positive and, with `lora`, stacked experts and as `weight_sites`; then
    nothing is changed.
    """
    if not batches:
        raise ValueError("fine_tuning: no batches to train on; expected at least one (see tokenize)")
    if not lr > 0:
        raise ValueError(f"fine_tuning: lr={lr}; expected a positive learning rate")
    generator = torch.Generator().manual_seed(seed)
    sites = weight_sites(bridge) if lora else {}
    stacked = [name for name, site in sites.items() if site.parameter.ndim != 2]
    if stacked:
        raise ValueError(
            f"fine_tuning: {stacked[0]} stacks the matrices of several experts, which lora cannot; leave it out"
        )
    saved = [_Saved(p, p.detach().clone(), p.requires_grad, p.grad) for p in bridge.original_model.parameters()]
    start = {id(parameter): value for parameter, value, *_ in saved}
    factors = [_Factors(site, start[id(site.parameter)], lora, generator) for site in sites.values()] if lora else []
    with ExitStack() as hooks:
        try:
            weights = {id(site.parameter) for site in sites.values()}
            for parameter, *_ in saved:
                parameter.grad = None
                parameter.requires_grad_(not lora or id(parameter) in weights)
            learned = [half for pair in factors for half in (pair.up, pair.down)] if lora else [s.parameter for s in saved]
            optimizer = torch.optim.AdamW(learned, lr=lr, weight_decay=weight_decay)
            for pair in factors:
                hooks.callback(pair.site.parameter.register_post_accumulate_grad_hook(pair.pull).remove)
                # An optimiser's own hooks run before the global one by which `held` writes its zeros.
                optimizer.register_step_post_hook(pair.merge)
            yield FineTuning(bridge, _endless(batches, generator), optimizer, objective)
        finally:
            _restore(saved)


class _Saved(NamedTuple):
    parameter: nn.Parameter
    value: Tensor
    requires_grad: bool
    grad: Tensor | None


class _Factors:
    """The adapter of one matrix: its factors in float32, their gradient from that of W, and their product into W.

    dL/d(up) = s G down^T and dL/d(down) = s up^T G, where G = dL/dW [d_out, d_in] and s = alpha / r.
    """

    def __init__(self, site: Site, start: Tensor, lora: Lora, generator: torch.Generator) -> None:
        weight = site.parameter
        d_in, d_out = weight.shape[site.input_axis], weight.shape[1 - site.input_axis]
        down = (2 * torch.rand(lora.r, d_in, generator=generator) - 1) / sqrt(d_in)
        self.down = nn.Parameter(down.to(weight.device))
        self.up = nn.Parameter(torch.zeros(d_out, lora.r, device=weight.device))
        self.site, self.scale, self.start = site, lora.alpha / lora.r, start

    def _as_applied(self, weight: Tensor) -> Float[Tensor, "d_out d_in"]:
        return weight if self.site.input_axis == 1 else weight.T

    def pull(self, weight: Tensor) -> None:
        """Turn the gradient of W into those of the factors, and free it: one matrix of gradients exists at a time."""
        assert weight.grad is not None
        gradient = self.scale * self._as_applied(weight.grad).float()
        weight.grad = None
        with torch.no_grad():
            for half, part in ((self.up, gradient @ self.down.T), (self.down, self.up.T @ gradient)):
                half.grad = part if half.grad is None else half.grad + part

    def merge(self, *_: object) -> None:
        with torch.no_grad():
            change = self._as_applied(self.scale * self.up @ self.down)
            self.site.parameter.copy_(self.start + change)


def _endless(batches: Sequence[Batch], generator: torch.Generator) -> Iterator[Batch]:
    while True:
        for index in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[index]


def _restore(saved: list[_Saved]) -> None:
    def write() -> None:
        with torch.no_grad():
            for parameter, value, requires_grad, grad in saved:
                parameter.copy_(value)
                parameter.requires_grad_(requires_grad)
                parameter.grad = grad

    try:
        write()
    except KeyboardInterrupt:  # a second Ctrl-C must not leave the model half restored
        write()
        raise
