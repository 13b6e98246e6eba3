"""Fine-tuning a live model in place, step by step, and putting it back bit for bit."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite, sqrt
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from harmcircuits.batches import Batch
from harmcircuits.circuits.sites import Site
from harmcircuits.hooks.bridge import AnyModel, Bridge, as_bridge
from harmcircuits.hooks.checks import of_data, refuse_batches, refuse_not_finite
from harmcircuits.hooks.masking import during
from harmcircuits.hooks.objectives import Objective, completion_loss
from harmcircuits.hooks.weights import weight_sites


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters on every block matrix: W = W_0 + (alpha / r) up down.

    Source: arXiv 2106.09685.

    >>> hc.Lora(r=4)
    Lora(r=4, alpha=16.0)

    Attributes:
        r: The rank, which is the number of columns of `up`.
        alpha: Scale of the adapters, before it is divided by the rank.

    Raises:
        ValueError: For a rank below 1.
    """

    r: int = 8
    alpha: float = 16.0


class FineTuning:
    """A run in progress."""

    def __init__(
        self,
        bridge: Bridge,
        order: Iterator[Batch],
        optimizer: torch.optim.Optimizer,
        objective: Objective,
    ) -> None:
        self.losses: list[float] = []
        self._bridge = bridge
        self._order = order
        self._optimizer = optimizer
        self._objective = objective

    @property
    def step(self) -> int:
        """How many steps have been taken."""
        return len(self.losses)

    def until(self, step: int) -> None:
        """Train until `step` steps have been taken in all."""
        while self.step < step:
            self._take_step(next(self._order))

    def _take_step(self, batch: Batch) -> None:
        self._optimizer.zero_grad()
        with torch.enable_grad():
            losses = self._objective(self._bridge, batch)
            loss = losses.mean()
            loss.backward()

        # Before the step, so that the weights stay as they were at the last finite loss.
        value = loss.item()
        if not isfinite(value):
            with of_data(
                f"the loss is {value} at step {self.step}; lower lr, or look at the batch"
            ):
                refuse_not_finite([batch], losses.detach().cpu(), self._objective)
        self._optimizer.step()
        self.losses.append(value)


@contextmanager
def fine_tuning(
    bridge: AnyModel,
    batches: Sequence[Batch],
    *,
    lr: float,
    lora: Lora | None = None,
    weight_decay: float = 0.0,
    seed: int = 0,
    objective: Objective = completion_loss,
) -> Iterator[FineTuning]:
    """A run that fine-tunes the model in place; on any exit every parameter is as before.

    AdamW at a constant rate. `run.until(step)` trains up to a step, so that a curve can be measured
    on the way. Restored bit for bit, at the cost of a copy of the model; dropout stays as it is.

    Composes with masks: inside `masked(..., hold=True)` the removed weights are zero at every step
    (with `lora`, those entries of the merged weight, and the factors get no gradient from them);
    inside `masked` alone they start at zero and are free to learn. A mask that is put on inside a
    full fine-tuning meets other norms and embeddings than it was made on: give `same_model=False`.

    >>> with hc.fine_tuning(bridge, benign, lr=1e-4) as run:
    ...     run.until(2)
    ...     len(run.losses)
    2

    Args:
        bridge: The `TransformerBridge`, or a `harmcircuits.Model` with one.
        batches: The training data.
        lr: Learning rate.
        lora: Train only the factors of low-rank adapters. W as stored is then the merged weight,
            rounded to the model's dtype. Without it every parameter learns.
        weight_decay: Weight decay of AdamW.
        seed: Decides the order of the batches, new in every epoch, and the adapters' start.
        objective: What is minimised.

    Raises:
        ValueError: For no batches; with `lora`, stacked experts and
            as `weight_sites`. Then nothing is changed.
    """
    bridge = as_bridge(bridge)
    refuse_batches("fine_tuning", bridge, batches)
    sites = weight_sites(bridge).values() if lora else ()
    for site in sites:
        if site.parameter.ndim != 2:
            raise ValueError(
                f"fine_tuning: {site.name} stacks the matrices of several experts, which lora "
                "cannot adapt; leave lora out"
            )

    # One stream for the adapters' start and then the order of the batches.
    generator = torch.Generator().manual_seed(seed)
    before = [_Saved.of(parameter) for parameter in bridge.original_model.parameters()]
    if lora:
        # Every adapter adds to W_0, which is at hand as the value that will be restored.
        start = {id(state.parameter): state.value for state in before}
        adapters = [_Adapter(site, start[id(site.parameter)], lora, generator) for site in sites]
        trained = [site.parameter for site in sites]
        learned = [factor for adapter in adapters for factor in (adapter.up, adapter.down)]
    else:
        adapters = []
        trained = learned = [state.parameter for state in before]

    optimizer = torch.optim.AdamW(learned, lr=lr, weight_decay=weight_decay)
    for adapter in adapters:
        # An optimiser's own hooks run before the global one, so a mask that is held writes its
        # zeros after the merge.
        optimizer.register_step_post_hook(adapter.merge)
    run = FineTuning(bridge, _endless(batches, generator), optimizer, objective)
    yield from during(bridge, _Training(before, trained, adapters), run)


class _Saved(NamedTuple):
    """A parameter, and everything of it that the run changes."""

    parameter: nn.Parameter
    value: Tensor
    requires_grad: bool
    grad: Tensor | None

    @classmethod
    def of(cls, parameter: nn.Parameter) -> "_Saved":
        value = parameter.detach().clone()
        return cls(parameter, value, parameter.requires_grad, parameter.grad)


class _Training:
    """Gradients of some parameters; when it comes off, everything is as it was before."""

    fault = ""

    def __init__(
        self,
        before: Sequence[_Saved],
        trained: Sequence[nn.Parameter],
        adapters: "Sequence[_Adapter]",
    ) -> None:
        self.before = before
        self.trained = trained
        self.adapters = adapters
        self._hooks: list[RemovableHandle] = []

    def put_on(self) -> None:
        for state in self.before:
            state.parameter.grad = None
            state.parameter.requires_grad_(False)
        for parameter in self.trained:
            parameter.requires_grad_(True)
        for adapter in self.adapters:
            weight = adapter.site.parameter
            self._hooks.append(weight.register_post_accumulate_grad_hook(adapter.pull))

    def take_off(self) -> None:
        for hook in self._hooks:
            hook.remove()
        with torch.no_grad():
            for state in self.before:
                state.parameter.copy_(state.value)
                state.parameter.requires_grad_(state.requires_grad)
                state.parameter.grad = state.grad


class _Adapter:
    """The adapter of one matrix, merged into it."""

    def __init__(self, site: Site, start: Tensor, lora: Lora, generator: torch.Generator) -> None:
        weight = site.parameter
        d_in = weight.shape[site.input_axis]
        d_out = weight.shape[1 - site.input_axis]
        self.site = site
        self.start = start
        self.scale = lora.alpha / lora.r

        # Uniform in +-1 / sqrt(d_in), as peft starts it; with `up` zero, W starts at W_0.
        uniform = torch.rand(lora.r, d_in, generator=generator)
        down = (2 * uniform - 1) / sqrt(d_in)
        up = torch.zeros(d_out, lora.r)
        self.down = nn.Parameter(down.to(weight.device))
        self.up = nn.Parameter(up.to(weight.device))

    def pull(self, weight: Tensor) -> None:
        """Turn the gradient of W into those of the factors, and free it."""
        # Called by autograd as soon as the gradient of this W is complete.
        assert weight.grad is not None
        gradient = self.scale * self._as_applied(weight.grad).float()
        weight.grad = None
        with torch.no_grad():
            _add_gradient(self.up, gradient @ self.down.T)
            _add_gradient(self.down, self.up.T @ gradient)

    def merge(self, *_: object) -> None:
        """Write W_0 plus the product of the factors into W."""
        with torch.no_grad():
            change = self.scale * self.up @ self.down
            self.site.parameter.copy_(self.start + self._as_applied(change))

    def _as_applied(self, weight: Tensor) -> Float[Tensor, "d_out d_in"]:
        """From the stored orientation to the applied one, and back."""
        return weight if self.site.input_axis == 1 else weight.T  # Conv1D stores W^T


def _add_gradient(parameter: nn.Parameter, gradient: Tensor) -> None:
    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


def _endless(batches: Sequence[Batch], generator: torch.Generator) -> Iterator[Batch]:
    """Epoch after epoch, each in a new order."""
    while True:
        for index in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[index]
