"""The gradient of one step's loss with respect to the gates: step 3 of the search."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import ceil
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from harmcircuits.batches import UnpaddedText, batched, bounds, text_groups
from harmcircuits.circuits.gates import Gates, PerGate
from harmcircuits.circuits.sites import Site
from harmcircuits.hooks.bridge import Bridge
from harmcircuits.hooks.gradients import Input, OutputGradient
from harmcircuits.hooks.masking import masked
from harmcircuits.hooks.weights import on_host
from harmcircuits.search.accumulation import as_stored, receiving_gradients
from harmcircuits.search.texts import TextGroup

ENTRYWISE_UNTIL = 1 / 500  # of the weights: so few gradients are computed one by one


class Draw(NamedTuple):
    """A text that a step reads."""

    group: int
    text: UnpaddedText
    base_loss: Tensor


@torch.inference_mode(False)
def step_gain(
    bridge: Bridge,
    groups: Sequence[TextGroup],
    gates: Gates,
    z: PerGate,
    sites: Mapping[str, Site],
    generator: torch.Generator,
) -> tuple[PerGate, list[float]]:
    """-dL/dz at z on a few texts of each group, and the mean rise of each group's loss."""
    gain = torch.zeros_like(z)
    rises = [0.0] * len(groups)
    scale = {name: 1 - values for name, values in gates.by_matrix(z).items()}
    with (
        # The candidates belong to this model, so no step compares them with it again.
        masked(bridge, gates.candidates, scale=scale, same_model=False),
        _candidate_gradients(bridge, gates, sites) as gradients,
    ):
        for draws in _batches(groups, _draws(groups, generator)):
            sums = _backward(bridge, groups, draws)
            for number, group in enumerate(groups):
                rises[number] += sums[number] / group.n_drawn
            # Copied to the CPU once per batch: a copy in the backward pass waits for the GPU.
            values = on_host([*gradients.values()])
            by_matrix = dict(zip(gradients, values, strict=True))
            gain += gates.gain(by_matrix)
            gradients.clear()
    return gain, rises


def _draws(groups: Sequence[TextGroup], generator: torch.Generator) -> list[Draw]:
    """The texts of a step, sorted by length, since the shorter texts of a batch are padded."""
    draws = []
    for number, group in enumerate(groups):
        for example in group.draw(generator):
            draw = Draw(
                number,
                group.examples[example],
                group.base_loss[example],
            )
            draws.append(draw)
    return sorted(draws, key=lambda draw: len(draw.text.tokens))


def _batches(groups: Sequence[TextGroup], draws: Sequence[Draw]) -> Iterator[list[Draw]]:
    """The texts of a step, in batches that share an objective."""
    # No batch of a step takes more memory than the largest batch that was given.
    largest_batch, max_tokens = bounds(batch for group in groups for batch in group.batches)
    for objective in dict.fromkeys(group.objective for group in groups):
        alike = [draw for draw in draws if groups[draw.group].objective is objective]
        n_batches = ceil(len(alike) / largest_batch)
        size = ceil(len(alike) / n_batches)
        remaining = iter(alike)
        for texts in text_groups([draw.text for draw in alike], size, max_tokens):
            yield [next(remaining) for _ in texts]


def _backward(bridge: Bridge, groups: Sequence[TextGroup], draws: Sequence[Draw]) -> list[float]:
    """Run the backward pass of one batch; the sum of its rises in each group."""
    numbers, texts, base_losses = zip(*draws, strict=True)
    (batch,) = batched(texts, len(texts))
    loss = groups[numbers[0]].objective(bridge, batch).float()
    base_loss = torch.stack(base_losses)
    rise = loss - base_loss.to(loss.device)
    group_number = torch.tensor(numbers, device=loss.device)

    total = loss.new_zeros(())
    sums = []
    for number, group in enumerate(groups):
        is_member = group_number == number
        total = total + group.loss_term(loss[is_member], rise[is_member])
        rise_sum = rise[is_member].detach().sum()
        sums.append(rise_sum)
    total.backward()
    return torch.stack(sums).tolist()


@contextmanager
def _candidate_gradients(
    bridge: Bridge, gates: Gates, sites: Mapping[str, Site]
) -> Iterator[dict[str, Tensor]]:
    """While open, backward passes add dL/dW of the candidates to this dict, by matrix."""
    candidates = gates.candidates.removed
    n_weights = sum(site.parameter.numel() for site in sites.values())
    are_few = len(gates) <= ENTRYWISE_UNTIL * n_weights
    gradients: dict[str, Tensor] = {}

    def add_pair(site: Site, x: Input, g: OutputGradient) -> None:
        first, second = as_stored(site, x, g)
        index = candidates[site.name].to(first.device)
        entries = _entries(
            first.flatten(0, 1),
            second.flatten(0, 1),
            index,
            are_few,
        )
        total = gradients.get(site.name, 0.0)
        gradients[site.name] = total + entries.float()

    def put_gradient(site: Site, gradient: Tensor) -> None:
        index = candidates[site.name].to(gradient.device)
        gradients[site.name] = gradient.flatten()[index].float()

    touched = {name: sites[name] for name in candidates}
    with receiving_gradients(bridge, touched, add_pair, put_gradient):
        yield gradients


def _entries(
    first: Float[Tensor, "token row"],
    second: Float[Tensor, "token column"],
    index: Int[Tensor, " _"],
    are_few: bool,
) -> Float[Tensor, " _"]:
    """Entries of first^T @ second at flat indices; where they are few, no other is computed."""
    if not are_few:
        return (first.T @ second).flatten()[index]

    n_columns = second.shape[1]
    entries = []
    # So many at once that the copies of rows and columns are as large as `first` and `second`.
    for part in index.split(first.shape[1] + n_columns):
        row = part // n_columns
        column = part % n_columns
        products = first[:, row] * second[:, column]
        entries.append(products.sum(0))
    return torch.cat(entries)
