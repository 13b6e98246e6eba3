"""Gates over weights, learned by many small steps.

    for every part of the descent:
        the target's texts += what the model still says under the mask so far    # fresh answers
        benefit += -W * d(loss) / dW, but for the protected losses         # removal_effect
        benefit -= FACTOR * |W| * mean over each of these of sum_t |g_t| |x_t|^T   # token_price
        candidates = the weights of the most benefit, and those whose gate is open
        for every step, on a few texts of each kind:
            loss = - the target's rise, as far as the cap
                   + the loss of what is preferred - the rise of what is avoided, within bounds
                   + multiplier * the rise of each protected loss, where it rises
            gate += rate * momentum of -dloss/dgate, clipped to its n-th largest; back to the
                nearest gates with 0 <= gate <= 1 and a sum of at most n
            a multiplier grows while its loss is near its budget, and shrinks else
    mask = the n largest gates that are more than half open; while a budget is broken on answers
           that no step has seen: dearer multipliers, further steps, fewer weights

A gate takes its share of a weight, W * (1 - gate). In the second half of the descent the n largest
take all of theirs and the others nothing. n grows to the largest size, and from there the smaller
ones are made by further steps. Both scores are taken under the mask so far, of the weights as they
were before it: what was removed goes on earning, and what is near to what broke is dear.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from harmcircuits.circuits.masks import WeightMask
from harmcircuits.circuits.scores import Source
from harmcircuits.circuits.selection import Indices, largest, positive
from harmcircuits.circuits.sites import Site
from harmcircuits.circuits.units import Units
from harmcircuits.hooks.accumulation import (
    Kind,
    add_gradients,
    memory_groups,
    refuse_differences,
    zeros,
)
from harmcircuits.hooks.bridge import Bridge
from harmcircuits.hooks.checks import of_data, refuse_not_finite
from harmcircuits.hooks.gradients import Input, OutputGradient, hook_pairs, parameter_gradients
from harmcircuits.hooks.masking import masked, masked_if_given
from harmcircuits.hooks.objectives import Objective, completion_loss
from harmcircuits.hooks.protection import Protection, UnpaddedText, batched, unpadded
from harmcircuits.hooks.weights import on_host
from harmcircuits.measurements import Label, Measurement, Rows
from harmcircuits.prompts import Batch
from harmcircuits.storage import mapped_copy, read_tensors, write_tensors

SEED = 0  # of the texts that a step draws
PARTS = (0.0, 0.2, 0.4, 0.6)  # of the descent: where weights are scored and candidates chosen anew
GROWTH_UNTIL = 0.3  # of the descent
HARD_FROM = 0.5  # of the descent
HALF = 0.5  # of the gate that is open most: what counts as open is more than that
SHRINKING = 0.2  # of the steps of the descent, for every smaller size

CANDIDATES = 20  # times as many as are removed
FEW = 1 / 500  # of the weights: so few candidates have their gradients computed one by one
FACTOR = 0.25  # of the price, where candidates are chosen
TEXTS = 16  # of the target in a step, and of what stands beside it; half as many of what is kept
RATE, LAST_RATE, SHRINKING_RATE = 0.3, 0.05, 0.15  # how far a gate moves at most
DECAY, UNIT_DECAY = 0.85, 0.97  # of the momentum; of what a full stride is measured by

CAP = 0.7  # nats a token: beyond it a text gives another answer, and more would only break it
ENOUGH = 0.3  # nats a token of what is preferred
MOST_AVOIDED = 0.3  # nats a token that the loss of what is avoided may rise and earn
FIRST_MULTIPLIER, GROWTH, NEAR = 2.0, 1.15, 0.7  # of a budget: what is unseen loses more
LEAST_MULTIPLIER, MOST_MULTIPLIER = 0.3, 20.0
MEMORY = 0.8  # of the rises that multipliers look at

TRIES, FEWER = 12, 0.95  # where a check refuses a mask
FURTHER = 0.05  # of the steps of the descent, before the next try
TRACED_EVERY = 10  # steps
CHECKED_AFTER = 5  # steps
FILE, FORMAT = "search.safetensors", "harmcircuits.search.3"

Role = Literal["target", "preferred", "avoided", "protected"]
SIGNS = {"target": -1.0, "preferred": 1.0, "avoided": -1.0}  # of the loss, in the benefit
Totals = dict[str, Float[Tensor, "..."]]
Found = list[tuple[str, Float[Tensor, " _"]]]  # gradients of candidates, by matrix
FreshAnswers = Callable[[], Sequence[Batch]]


class Size(NamedTuple):
    """A size that is wanted: as a share of the weights, and how many these are."""

    share: float
    n: int


@dataclass
class Texts:
    """Texts of one kind: what they are for, the loss of each before, and how they are drawn."""

    name: str
    role: Role
    batches: Sequence[Batch]
    objective: Objective
    weight: float
    budget: float
    examples: Sequence[UnpaddedText]
    before: Float[Tensor, " n"]
    multiplier: float = FIRST_MULTIPLIER
    rise: float = 0.0  # of late
    left: list[int] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        bridge: Bridge,
        name: str,
        role: Role,
        batches: Sequence[Batch],
        objective: Objective = completion_loss,
        *,
        weight: float = 1.0,
        budget: float = 0.0,
    ) -> "Texts":
        with torch.no_grad(), of_data(name):
            losses = [objective(bridge, batch).float().cpu() for batch in batches]
            before = torch.cat(losses)
            refuse_not_finite(batches, before, objective)
        return cls(name, role, batches, objective, weight, budget, unpadded(batches), before)

    def add(self, bridge: Bridge, batches: Sequence[Batch]) -> None:
        """Further texts, and their losses on the model as it is."""
        more = Texts.of(bridge, self.name, self.role, batches, self.objective)
        self.batches = [*self.batches, *batches]
        self.examples = [*self.examples, *more.examples]
        self.before = torch.cat([self.before, more.before])
        self.left = []  # so that a round of all begins

    @property
    def n_drawn(self) -> int:
        """How many are drawn for a step: no more than the caller scores at once."""
        n = min(TEXTS, max(map(len, self.batches)))
        return ceil(n / 2) if self.role == "protected" else n

    def draw(self, generator: torch.Generator) -> list[int]:
        """The numbers of the next texts; each comes once before one comes again."""
        drawn: list[int] = []
        while len(drawn) < self.n_drawn:
            if not self.left:
                self.left = torch.randperm(len(self.examples), generator=generator).tolist()
            drawn.append(self.left.pop())
        return drawn

    def part_of_loss(self, now: Float[Tensor, " n"], rise: Float[Tensor, " n"]) -> Tensor:
        """What some of a step's texts add to the loss that the gates descend."""
        if self.role == "target":
            parts = -self.weight * rise.clamp(max=CAP)
        elif self.role == "preferred":
            parts = now.clamp(min=ENOUGH)
        elif self.role == "avoided":
            parts = -rise.clamp(max=MOST_AVOIDED)
        else:
            # No gain where it falls: answers that become surer leave other good ones less likely.
            parts = self.multiplier * rise.clamp(min=0)
        return parts.sum() / self.n_drawn

    def weigh(self, rise: float) -> None:
        """Remember a rise, and let the multiplier follow how near it is to the budget."""
        self.rise = MEMORY * self.rise + (1 - MEMORY) * rise
        is_near = self.rise > NEAR * self.budget
        self.make_dearer(GROWTH if is_near else 1 / GROWTH)

    def make_dearer(self, factor: float) -> None:
        """Multiply the multiplier, within its bounds."""
        multiplier = self.multiplier * factor
        self.multiplier = min(MOST_MULTIPLIER, max(LEAST_MULTIPLIER, multiplier))


@dataclass(frozen=True)
class Benefit(Mapping[str, Tensor]):
    """What removing each weight is worth, W times its slope: made a matrix at a time."""

    sites: Mapping[str, Site]
    slopes: Totals

    def __getitem__(self, name: str) -> Float[Tensor, "..."]:
        slope = self.slopes[name]
        return slope * self.sites[name].parameter.detach().to(slope)

    def __iter__(self) -> Iterator[str]:
        return iter(self.slopes)

    def __len__(self) -> int:
        return len(self.slopes)


@dataclass
class Candidates:
    """The weights that may be chosen for now, in units that open together."""

    units: Int[Tensor, " gate"]  # their numbers in the model, increasing
    sizes: Int[Tensor, " gate"]  # how many weights each has
    mask: WeightMask  # all of them
    gate_of: Mapping[str, Int[Tensor, " _"]]  # of each of the mask's weights
    weights: Mapping[str, Float[Tensor, " _"]]

    def __len__(self) -> int:
        return len(self.units)

    def per_weight(self, gate: Float[Tensor, " gate"]) -> dict[str, Float[Tensor, " _"]]:
        """What every weight has of a number for each gate."""
        return {name: gate[gates] for name, gates in self.gate_of.items()}

    def add(self, found: Found, gain: Float[Tensor, " gate"]) -> None:
        """Add what opening each gate gains, by the gradients of one batch."""
        # Not in the backward pass, which would wait for the host at every matrix.
        gradients = on_host([gradient.float() for _, gradient in found])
        for (name, _), gradient in zip(found, gradients, strict=True):
            gain.index_add_(0, self.gate_of[name], self.weights[name] * gradient)

    def largest(self, gate: Float[Tensor, " gate"], n: int) -> Float[Tensor, " gate"]:
        """One for the largest gates that have n weights together, of those that are open."""
        # A search of few steps opens no gate to the end.
        most = gate.max() if len(gate) else 0.0
        is_open = (gate > HALF * most).nonzero().flatten()
        order = is_open[gate[is_open].argsort(descending=True, stable=True)]
        fits = self.sizes[order].cumsum(0) <= n
        hard = torch.zeros_like(gate)
        hard[order[fits]] = 1.0
        return hard

    def projected(self, gate: Float[Tensor, " gate"], n: int) -> Float[Tensor, " gate"]:
        """The nearest gates within 0 and 1 that take at most n weights together."""

        def moved(by: float) -> Float[Tensor, " gate"]:
            return (gate - by).clamp(0, 1)

        if (moved(0.0) * self.sizes).sum() <= n:
            return moved(0.0)
        # What they take falls as all of them are moved down, so the move is found by bisection.
        low, high = 0.0, float(gate.max())
        for _ in range(40):
            middle = (low + high) / 2
            if (moved(middle) * self.sizes).sum() > n:
                low = middle
            else:
                high = middle
        return moved(high)


@dataclass
class Gates:
    """A search under way: its texts, the slope of every weight, and how far gates are open."""

    bridge: Bridge
    texts: Sequence[Texts]
    protection: Protection
    sites: Mapping[str, Site]  # to choose from
    shapes: Mapping[str, tuple[int, ...]]  # of all block matrices
    units: Units | None  # what is chosen whole; None: every weight by itself
    excluded: Indices  # weights that may not be chosen
    source: Source
    sizes: Sequence[Size]
    steps: int
    max_memory: int | None
    fresh_answers: FreshAnswers | None = None  # to the target's requests
    added: list[Batch] = field(default_factory=list)  # of them
    stage: int = 0  # how many parts and smaller sizes are done
    step: int = 0
    unit: float = 0.0  # of a stride
    slopes: Totals = field(default_factory=dict)  # the benefit over the weight: the only sum
    candidates: Candidates | None = None
    gate: Tensor = field(default_factory=lambda: torch.empty(0))
    momentum: Tensor = field(default_factory=lambda: torch.empty(0))
    masks: dict[float, WeightMask] = field(default_factory=dict)  # of the sizes that are done
    trace: Rows = field(default_factory=Rows)
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(SEED))

    def __post_init__(self) -> None:
        self.sizes = sorted(self.sizes, reverse=True)
        # What a search must have in common with another to go on from it. An objective by its
        # value: functions that are made alike have the same name.
        losses = [f"{texts.before.mean():.3g}" for texts in self.texts]
        self.key = f"{self.source.to_json()} {self.sizes} {losses}"
        for texts in self.texts:
            self._note("examples_scored", {"data": texts.name}, len(texts.examples))

    @property
    def n_weights(self) -> int:
        """How many there are to choose from."""
        return sum(site.parameter.numel() for site in self.sites.values())

    @property
    def parts(self) -> list[range]:
        """The steps of each part of the descent."""
        starts = [round(part * self.steps) for part in PARTS]
        ends = [*starts[1:], self.steps]
        parts = [range(start, end) for start, end in zip(starts, ends, strict=True)]
        return [part for part in parts if len(part)]

    @property
    def n_stages(self) -> int:
        """The parts of the descent to the largest size, and every smaller size."""
        return len(self.parts) + len(self.sizes) - 1

    def advance(self) -> None:
        """Go on by a part of the descent, or to the next smaller size."""
        parts = self.parts
        if self.stage < len(parts):
            self._descend(parts[self.stage])
            is_size, place = self.stage == len(parts) - 1, 0
        else:
            is_size, place = True, self.stage - len(parts) + 1
            self._shrink(self.sizes[place - 1].n, self.sizes[place].n)
        if is_size:
            self.masks[self.sizes[place].share] = self._allowed(self.sizes[place])
        self.stage += 1

    def _descend(self, steps: range) -> None:
        n = self.sizes[0].n
        mask = None
        if self.candidates is not None:
            mask = self._mask(self._size_of_step(steps.start - 1))
            self._ask_again(mask)
        self._score(mask)
        self._choose_candidates(n)
        for step in steps:
            progress = step / self.steps
            rate = RATE + (LAST_RATE - RATE) * progress
            is_hard = progress >= HARD_FROM
            self._learn(self._size_of_step(step), rate, is_hard=is_hard)
            if is_hard and step % CHECKED_AFTER == 0:
                self._broken_budgets(self._mask(n), self.sizes[0])

    def _ask_again(self, mask: WeightMask) -> None:
        if self.fresh_answers is not None:
            with masked(self.bridge, mask):
                batches = self.fresh_answers()
            self._add_answers(batches)

    def _add_answers(self, batches: Sequence[Batch]) -> None:
        """Score these answers of the target as well, but for those that are scored already."""
        target = self.texts[0]
        known = {tuple(example.tokens.tolist()) for example in target.examples}
        said = unpadded(batches)
        fresh = [example for example in said if tuple(example.tokens.tolist()) not in known]
        if fresh:
            added = batched(fresh, max(map(len, target.batches)))
            target.add(self.bridge, added)
            self.added += added
            self._note("examples_added", {"step": self.step, "data": target.name}, len(fresh))

    def _size_of_step(self, step: int) -> int:
        growth = min(1.0, (step + 1) / (GROWTH_UNTIL * self.steps))
        return max(1, round(growth * self.sizes[0].n))

    def _shrink(self, n_before: int, n: int) -> None:
        n_steps = max(1, round(SHRINKING * self.steps))
        for step in range(n_steps):
            # Fewer weights in the first half, then as many as are wanted.
            share = min(1.0, 2 * (step + 1) / n_steps)
            rate = SHRINKING_RATE + (LAST_RATE - SHRINKING_RATE) * step / n_steps
            self._learn(round(n_before + (n - n_before) * share), rate)

    def _allowed(self, size: Size) -> WeightMask:
        """A mask of a size that keeps all budgets on answers that no step has seen."""
        n = size.n
        for _ in range(TRIES):
            mask = self._mask(n)
            broken = self._broken_budgets(mask, size)
            if not broken:
                return mask
            n = int(FEWER * n)
            for _ in range(max(1, round(FURTHER * self.steps))):
                self._learn(n, LAST_RATE)
        # It does not learn to spare what is protected: less and less of it, or none.
        while n and self._broken_budgets(self._mask(n), size):
            n //= 2
        return self._mask(n)

    def _broken_budgets(self, mask: WeightMask, size: Size) -> list[str]:
        rises = self.protection.rises(self.bridge, mask)
        broken = []
        for row in rises:
            name = str(row.labels["protected"])
            if row.mean > NEAR * self.protection.budgets[name]:
                broken.append(name)
        for texts in self.texts:
            if texts.role == "protected" and texts.name in broken:
                texts.make_dearer(2.0)
        outcome = "refused" if broken else "accepted"
        n_removed = Measurement.exact("weights_removed", {}, mask.n_removed)
        for row in (n_removed, *rises):
            labels = {"size": size.share, "step": self.step, **row.labels, "outcome": outcome}
            self.trace += [replace(row, labels=labels)]
        return broken

    # Scores, and the candidates that they make

    @torch.inference_mode(False)
    def _score(self, mask: WeightMask | None) -> None:
        """Add to the slope of every weight, under the mask so far."""
        if not self.slopes:
            self.slopes = {name: self._kept(zeros(site)) for name, site in self.sites.items()}
        for texts in self.texts:
            if texts.role != "protected":
                self._add_scores(texts, mask, "signed", texts.weight * SIGNS[texts.role])
            elif self.units is None:
                # Of single weights: absolute values do not cancel within a unit, as benefits do.
                self._add_scores(texts, mask, "per token", -FACTOR)

    def _add_scores(self, texts: Texts, mask: WeightMask | None, kind: Kind, factor: float) -> None:
        removed = {} if mask is None else mask.removed
        # A weight times these is 0 or -0, while 0 by itself would write 0: the price has its sign.
        nothing = {name: torch.zeros(len(index)) for name, index in removed.items()}
        refuse_differences(texts.batches, self.sites, kind, self.max_memory)
        for group in memory_groups(self.sites, self.max_memory):
            totals = {}
            for name, site in group.items():
                totals[name] = self.slopes[name].to(site.parameter.device)  # itself, if it is there
            with masked_if_given(self.bridge, mask, scale=nothing), of_data(texts.name):
                add_gradients(
                    self.bridge, texts.batches, texts.objective, group, totals, kind, factor
                )
            for name, total in totals.items():
                self.slopes[name].copy_(total)

    def _kept(self, values: Tensor) -> Tensor:
        """In memory, or under a bound on memory in a file."""
        return values if self.max_memory is None else mapped_copy(values)

    @property
    def _benefit(self) -> Benefit:
        return Benefit(self.sites, self.slopes)

    def _choose_candidates(self, n: int) -> None:
        """The most promising, and those that are open; what was there before stays as open."""
        chosen = self._promising(CANDIDATES * n)
        before = self.candidates
        if before is not None:
            chosen = torch.cat([chosen, before.units[self.gate > 0]]).unique()
        gate, momentum = torch.zeros(len(chosen)), torch.zeros(len(chosen))
        if before is not None and len(before):
            place = torch.searchsorted(before.units, chosen).clamp(max=len(before) - 1)
            is_known = before.units[place] == chosen
            gate[is_known] = self.gate[place[is_known]]
            momentum[is_known] = self.momentum[place[is_known]]
        self.candidates = self._candidates(chosen)
        self.gate, self.momentum = gate, momentum

    def _promising(self, n: int) -> Int[Tensor, " gate"]:
        """The numbers of the units of the most benefit, in order; those of n weights."""
        if self.units is not None:
            return self.units.best(self._benefit, n, self.excluded).nonzero().flatten()
        n_excluded = sum(len(self.excluded.get(name, ())) for name in self.sites)
        n_free = self.n_weights - n_excluded
        best = largest(self._benefit, min(n, n_free), self.excluded)
        index = positive(self._benefit, best)
        return torch.cat([first + index[name] for name, first, _ in self._spans()])

    def _spans(self) -> Iterable[tuple[str, int, int]]:
        """Of every matrix its name, and the numbers of its first weight and of the next one's."""
        first = 0
        for name, site in self.sites.items():
            yield name, first, first + site.parameter.numel()
            first += site.parameter.numel()

    def _candidates(self, numbers: Int[Tensor, " gate"]) -> Candidates:
        index, gate_of = {}, {}
        if self.units is not None:
            sizes = self.units.sizes[numbers]
            is_chosen = torch.zeros(len(self.units.sizes), dtype=torch.bool)
            is_chosen[numbers] = True
            for name, flat in self.units.weights(is_chosen).items():
                index[name] = flat
                gate_of[name] = torch.searchsorted(numbers, self.units.numbers(name, flat))
        else:
            sizes = torch.ones_like(numbers)
            for name, first, end in self._spans():
                ends = torch.searchsorted(numbers, torch.tensor([first, end])).tolist()
                index[name], gate_of[name] = numbers[slice(*ends)] - first, torch.arange(*ends)
        # A mask has no matrix without a candidate: such a one is left out of a step.
        mask = WeightMask(index, self.shapes, self.source)
        gate_of = {name: gate_of[name] for name in mask.removed}
        weights = {}
        for name, flat in mask.removed.items():
            parameter = self.sites[name].parameter.detach().flatten()
            weights[name] = parameter[flat.to(parameter.device)].float().cpu()
        return Candidates(numbers, sizes, mask, gate_of, weights)

    # A step

    def _learn(self, n: int, rate: float, *, is_hard: bool = True) -> None:
        """Move the gates by one step, within n weights."""
        candidates = self.candidates
        if not candidates:
            return
        gate = candidates.largest(self.gate, n) if is_hard else self.gate
        self.momentum.mul_(DECAY).add_(self._gain(gate), alpha=1 - DECAY)
        # In units of the weakest of as many as can be open: these all move at the full rate.
        n_open = min(len(candidates), max(1, round(n / candidates.sizes.float().mean().item())))
        weakest = self.momentum.abs().topk(n_open).values[-1].item()
        # Of late: where all is reached, what is left are small gradients and so small strides.
        self.unit = max(weakest, UNIT_DECAY * self.unit, 1e-20)
        stride = (self.momentum / self.unit).clamp(-1, 1)
        self.gate = candidates.projected(self.gate + rate * stride, n)
        self.step += 1

    @torch.inference_mode(False)
    def _gain(self, gate: Float[Tensor, " gate"]) -> Float[Tensor, " gate"]:
        """How fast the loss falls as each gate is opened: minus its derivative, a weight."""
        candidates = self.candidates
        assert candidates is not None
        gain = torch.zeros_like(gate)
        rises = [0.0] * len(self.texts)
        found: Found = []
        sites = {name: self.sites[name] for name in candidates.mask.removed}
        hooked = {name: site for name, site in sites.items() if site.is_hooked}
        unhooked = {name: site for name, site in sites.items() if not site.is_hooked}
        scale = {name: 1 - values for name, values in candidates.per_weight(gate).items()}
        with (
            # Made on this model, so not compared with it at every step.
            masked(self.bridge, candidates.mask, scale=scale, same_model=False),
            torch.enable_grad(),
            hook_pairs(self.bridge, hooked, partial(self._keep_entries, found)),
            parameter_gradients(unhooked, partial(self._keep_gradient, found)),
        ):
            for pairs, objective in self._batches_of_step():
                for kind, rise in enumerate(self._backward_of(pairs, objective)):
                    rises[kind] += rise / self.texts[kind].n_drawn
                candidates.add(found, gain)
                found.clear()
        for texts, rise in zip(self.texts, rises, strict=True):
            texts.weigh(rise)
            if self.step % TRACED_EVERY == 0:
                self._note("seen_rise", {"step": self.step, "data": texts.name}, rise)
        return gain / candidates.sizes

    def _keep_entries(self, found: Found, site: Site, x: Input, g: OutputGradient) -> None:
        """Of a hooked matrix's gradient those of the candidates."""
        candidates = self.candidates
        assert candidates is not None
        first, second = (g, x) if site.input_axis == 1 else (x, g)
        index = candidates.mask.removed[site.name]
        are_few = len(candidates) <= FEW * self.n_weights
        entries = _entries(first.flatten(0, 1), second.flatten(0, 1), index, are_few)
        found.append((site.name, entries))

    def _keep_gradient(self, found: Found, site: Site, gradient: Tensor) -> None:
        """The same of an unhooked matrix, whose gradient comes whole."""
        assert self.candidates is not None
        index = self.candidates.mask.removed[site.name].to(gradient.device)
        found.append((site.name, gradient.flatten()[index]))

    def _batches_of_step(self) -> Iterator[tuple[list[tuple[int, int]], Objective]]:
        """What a step reads: kinds and numbers of texts, a batch at a time."""
        drawn = []
        for kind, texts in enumerate(self.texts):
            drawn += [(kind, number) for number in texts.draw(self.generator)]
        # Of like length together, since the shorter ones of a batch are padded.
        drawn.sort(key=lambda pair: len(self.texts[pair[0]].examples[pair[1]].tokens))
        for objective in dict.fromkeys(texts.objective for texts in self.texts):
            of_objective = [pair for pair in drawn if self.texts[pair[0]].objective is objective]
            n_batches = ceil(len(of_objective) / self._batch_size)
            size = ceil(len(of_objective) / n_batches)
            for start in range(0, len(of_objective), size):
                yield of_objective[start : start + size], objective

    def _backward_of(self, pairs: Sequence[tuple[int, int]], objective: Objective) -> list[float]:
        """The backward pass of one batch of texts, by kind and number; the rise of each kind."""
        examples = [self.texts[kind].examples[number] for kind, number in pairs]
        (batch,) = batched(examples, len(examples))
        now = objective(self.bridge, batch).float()
        before = torch.stack([self.texts[kind].before[number] for kind, number in pairs])
        rise = now - before.to(now.device)
        loss = now.new_zeros(())
        sums = []
        for kind, texts in enumerate(self.texts):
            places = [place for place, (of, _) in enumerate(pairs) if of == kind]
            of_kind = torch.tensor(places, dtype=torch.long, device=now.device)
            loss = loss + texts.part_of_loss(now[of_kind], rise[of_kind])
            sums.append(rise[of_kind].detach().sum())
        loss.backward()
        return torch.stack(sums).tolist()

    @property
    def _batch_size(self) -> int:
        """The largest batch that the caller gave."""
        return max(len(batch) for texts in self.texts for batch in texts.batches)

    # Masks, and the trace

    def _mask(self, n: int) -> WeightMask:
        """The mask of the largest gates."""
        assert self.candidates is not None
        hard = self.candidates.largest(self.gate, n)
        removed = {}
        for name, is_removed in self.candidates.per_weight(hard).items():
            removed[name] = self.candidates.mask.removed[name][is_removed > 0]
        return WeightMask(removed, self.shapes, self.source)

    def found(self, share: float) -> WeightMask:
        """The mask of a size, with how it was made and the trace."""
        factor = FACTOR if self.units is None else 0.0
        settings = {"size": share, "n_allowed": self._n_of(share), "factor": factor}
        source = replace(self.source, settings={**settings, **self.source.settings})
        return WeightMask(self.masks[share].removed, self.shapes, source, self.trace)

    def _n_of(self, share: float) -> int:
        return next(size.n for size in self.sizes if size.share == share)

    def _note(self, metric: str, labels: Mapping[str, Label], value: float) -> None:
        self.trace += [Measurement.exact(metric, labels, value)]

    # What a folder keeps between two stages

    def keep(self, folder: str | Path | None) -> None:
        """Write everything into the folder; of a search that is done its masks and the trace."""
        if folder is None:
            return
        state: dict[str, Any] = {"key": self.key, "stage": self.stage, "step": self.step}
        state["n_added"] = len(self.added)
        state["trace"] = [asdict(row) for row in self.trace]
        tensors = {}
        for share, mask in self.masks.items():
            tensors |= {f"mask {share} {name}": flat for name, flat in mask.removed.items()}
        for number, batch in enumerate(self.added):
            tensors[f"added tokens {number}"] = batch.tokens
            tensors[f"added targets {number}"] = batch.is_target
        if self.stage < self.n_stages:
            assert self.candidates is not None
            state["unit"] = self.unit
            state["texts"] = [(of.multiplier, of.rise, of.left) for of in self.texts]
            tensors |= {f"slope {name}": values for name, values in self.slopes.items()}
            tensors |= {"units": self.candidates.units, "gate": self.gate}
            tensors |= {"momentum": self.momentum, "generator": self.generator.get_state()}
        write_tensors(Path(folder) / FILE, FORMAT, tensors, {"state": json.dumps(state)})

    def resume(self, folder: str | Path | None) -> None:
        """Go on from what the folder holds."""
        if folder is None or not (Path(folder) / FILE).exists():
            return
        tensors, metadata = read_tensors(Path(folder) / FILE, FORMAT, "search")
        state = json.loads(metadata["state"])
        if state["key"] != self.key:
            raise ValueError(
                f"{folder} holds another search (other data, weights or options, or another "
                "objective); give another folder, or remove it"
            )
        self.stage, self.step = state["stage"], state["step"]
        for number in range(state["n_added"]):
            of_batch = (tensors[f"added {part} {number}"] for part in ("tokens", "targets"))
            self._add_answers([Batch(*of_batch)])
        self.trace = Rows.of_dicts(state["trace"])
        for size in self.sizes[: max(0, self.stage - len(self.parts) + 1)]:
            start = f"mask {size.share} "
            removed = dict(_under(tensors, start))
            self.masks[size.share] = WeightMask(removed, self.shapes, self.source)
        if self.stage == self.n_stages:
            return
        self.unit = state["unit"]
        for name, values in _under(tensors, "slope "):
            self.slopes[name] = self._kept(values.to(self.sites[name].parameter.device))
        self.candidates = self._candidates(tensors["units"])
        self.gate, self.momentum = tensors["gate"], tensors["momentum"]
        for texts, (multiplier, rise, left) in zip(self.texts, state["texts"], strict=True):
            texts.multiplier, texts.rise, texts.left = multiplier, rise, left
        self.generator.set_state(tensors["generator"])


def _entries(
    first: Float[Tensor, "token row"],
    second: Float[Tensor, "token column"],
    index: Int[Tensor, " _"],
    are_few: bool,
) -> Float[Tensor, " _"]:
    """Some entries of first^T @ second; where they are few, no others are computed."""
    index = index.to(first.device)
    if not are_few:
        return (first.T @ second).flatten()[index]
    entries = []
    # As many at once as the copies that they take have the size of what is given.
    for part in index.split(first.shape[1] + second.shape[1]):
        row, column = part // second.shape[1], part % second.shape[1]
        entries.append((first[:, row] * second[:, column]).sum(0))
    return torch.cat(entries)


def _under(tensors: Mapping[str, Tensor], start: str) -> Iterator[tuple[str, Tensor]]:
    """Those of a file whose names begin so, by what follows."""
    for name, values in tensors.items():
        if name.startswith(start):
            yield name.removeprefix(start), values
