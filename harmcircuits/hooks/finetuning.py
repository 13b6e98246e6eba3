"""Fine-tuning of a live model in place, step by step, and its restoration bit for bit."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isfinite, sqrt
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from harmcircuits.batches import Batch
from harmcircuits.circuits.sites import Site
from harmcircuits.hooks.bridge import AnyModel, Bridge, as_bridge
from harmcircuits.hooks.checks import naming_data, refuse_batches, refuse_not_finite
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
        r: the rank, which is the number of columns of `up`.
        alpha: the scale of the adapters, before the division by the rank.

    Raises:
        ValueError: a rank below 1.
    """

    r: int = 8
    alpha: float = 16.0

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"{self}; expected a rank r of at least 1")


@dataclass(eq=False, repr=False)
class FineTuning:
    """A run of fine-tuning: the loss of each step, and `until` to go on."""

    bridge: Bridge
    batches: Iterator[Batch]
    optimizer: torch.optim.Optimizer
    objective: Objective
    losses: list[float] = field(default_factory=list)

    @property
    def step(self) -> int:
        """The number of steps so far."""
        return len(self.losses)

    def until(self, step: int) -> None:
        """Train until the run has `step` steps."""
        while self.step < step:
            self._take_step(next(self.batches))

    def _take_step(self, batch: Batch) -> None:
        self.optimizer.zero_grad()
        with torch.enable_grad():
            losses = self.objective(self.bridge, batch)
            loss = losses.mean()
            loss.backward()

        # Before the step, so that the weights stay those of the last finite loss.
        value = loss.item()
        if not isfinite(value):
            text = f"the loss is {value} at step {self.step}; lower lr, or look at the batch"
            with naming_data(text):
                refuse_not_finite([batch], losses.detach().cpu(), self.objective)
        self.optimizer.step()
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
    """A run that fine-tunes the model in place, restored bit for bit on any exit.

    AdamW at a constant learning rate. `run.until(step)` trains up to a step, so that curves can be
    measured between steps. Costs a copy of the model's weights; dropout stays on or off.

    Composes with masks: inside `masked(..., hold=True)` the removed weights are zero at every step
    (with `lora`, those entries of the merged weight, and the factors get no gradient from them);
    inside `masked` alone they start at zero and may learn. A mask that is put on inside a full
    fine-tuning meets other norms and embeddings than those it was made on: give `same_model=False`.

    >>> with hc.fine_tuning(bridge, benign, lr=1e-4) as run:
    ...     run.until(2)
    ...     len(run.losses)
    2

    Args:
        bridge: the model.
        batches: the training data.
        lr: the learning rate.
        lora: train only the factors of low-rank adapters. W is then the merged weight, rounded to
            the model's dtype. Without it every parameter learns.
        weight_decay: the weight decay of AdamW.
        seed: fixes the order of the batches, new in every epoch, and the adapters' start.
        objective: the value to minimise.

    Raises:
        ValueError: no batches, stacked experts with `lora`, and as `weight_sites`. Then nothing is
            changed.
    """
    bridge = as_bridge(bridge)
    refuse_batches("fine_tuning", bridge, batches)
    # One stream for the adapters' start and then the order of the batches.
    generator = torch.Generator().manual_seed(seed)
    states = {}
    for parameter in bridge.original_model.parameters():
        value = parameter.detach().clone()
        states[parameter] = _State(value, parameter.requires_grad, parameter.grad)

    factors = list(states)
    adapters = []
    if lora:
        factors = []
        for site in weight_sites(bridge).values():
            # Every adapter adds to W_0, which the states hold anyway.
            start = states[site.parameter].value
            adapter = _Adapter(site, start, lora, generator)
            adapters.append(adapter)
            factors += [adapter.up, adapter.down]

    optimizer = torch.optim.AdamW(factors, lr=lr, weight_decay=weight_decay)
    for adapter in adapters:
        # An optimiser's own hooks run before the global hook of a mask that is held, so the mask
        # writes its zeros after the merge.
        optimizer.register_step_post_hook(adapter.merge)
    run = FineTuning(bridge, _endless(batches, generator), optimizer, objective)
    yield from during(bridge, _Training(states, adapters), run)


class _State(NamedTuple):
    """Everything that the run changes in a parameter."""

    value: Tensor
    requires_grad: bool
    grad: Tensor | None


@dataclass(eq=False)
class _Training:
    """Gradients of all weights, or of the adapted ones, until all states are restored."""

    states: Mapping[nn.Parameter, _State]
    adapters: "Sequence[_Adapter]"
    hooks: list[RemovableHandle] = field(default_factory=list)
    fault: str = ""

    def put_on(self) -> None:
        for parameter in self.states:
            parameter.grad = None
            parameter.requires_grad_(not self.adapters)
        for adapter in self.adapters:
            # Gradients of the weight become gradients of the adapter's factors.
            weight = adapter.site.parameter
            weight.requires_grad_(True)
            self.hooks.append(weight.register_post_accumulate_grad_hook(adapter.pull))

    def take_off(self) -> None:
        for hook in self.hooks:
            hook.remove()
        with torch.no_grad():
            for parameter, state in self.states.items():
                parameter.copy_(state.value)
                parameter.requires_grad_(state.requires_grad)
                parameter.grad = state.grad


class _Adapter:
    """The adapter of one matrix, merged into it."""

    def __init__(self, site: Site, start: Tensor, lora: Lora, generator: torch.Generator) -> None:
        if site.parameter.ndim != 2:
            raise ValueError(
                f"fine_tuning: {site.name} stacks the matrices of several experts, which lora "
                "cannot adapt; leave lora out"
            )
        self.site = site
        self.start = start
        self.scale = lora.alpha / lora.r

        d_out, d_in = self._as_applied(start).shape
        # Uniform in +-1 / sqrt(d_in), as in peft; `up` is zero, so W starts at W_0.
        uniform = torch.rand(lora.r, d_in, generator=generator)
        down = (2 * uniform - 1) / sqrt(d_in)
        up = torch.zeros(d_out, lora.r)
        self.down = nn.Parameter(down.to(start.device))
        self.up = nn.Parameter(up.to(start.device))

    def pull(self, weight: Any) -> None:
        """Turn the gradient of W into gradients of the factors, and free it."""
        # Autograd calls this as soon as the gradient of this W is complete.
        gradient = self.scale * self._as_applied(weight.grad).float()
        weight.grad = None
        with torch.no_grad():
            self.up.grad = gradient @ self.down.T
            self.down.grad = self.up.T @ gradient

    def merge(self, *_: object) -> None:
        """Write W_0 plus the product of the factors into W."""
        with torch.no_grad():
            change = self.scale * self.up @ self.down
            self.site.parameter.copy_(self.start + self._as_applied(change))

    def _as_applied(self, weight: Tensor) -> Float[Tensor, "d_out d_in"]:
        """The transpose where W is stored transposed, as [d_in, d_out]; the same way back."""
        return weight if self.site.input_axis == 1 else weight.T


def _endless(batches: Sequence[Batch], generator: torch.Generator) -> Iterator[Batch]:
    """Epoch after epoch, each in a new order."""
    while True:
        for index in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[index]
