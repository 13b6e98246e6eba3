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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from harmcircuits.batches import Batch, batched, unpadded
from harmcircuits.circuits.gates import Gates
from harmcircuits.circuits.masks import WeightMask
from harmcircuits.circuits.scores import Source
from harmcircuits.circuits.selection import Indices, largest, positive
from harmcircuits.circuits.sites import Site
from harmcircuits.hooks.bridge import Bridge
from harmcircuits.hooks.checks import naming_data
from harmcircuits.hooks.gradients import Input, OutputGradient, hook_pairs, parameter_gradients
from harmcircuits.hooks.masking import masked, masked_if_given
from harmcircuits.hooks.objectives import Objective
from harmcircuits.hooks.weights import on_host
from harmcircuits.measurements import Label, Measurement, Rows
from harmcircuits.search.accumulation import (
    Kind,
    add_gradients,
    memory_groups,
    refuse_differences,
    zeros,
)
from harmcircuits.search.texts import NEAR, SIGNS, Protection, Texts
from harmcircuits.storage import mapped_copy, read_tensors, write_tensors

SEED = 0  # of the texts that a step draws
PARTS = (0.0, 0.2, 0.4, 0.6)  # of the descent: where weights are scored and candidates chosen anew
GROWTH_UNTIL = 0.3  # of the descent
HARD_FROM = 0.5  # of the descent
SHRINKING = 0.2  # of the steps of the descent, for every smaller size

CANDIDATES = 20  # times as many as are removed
FEW = 1 / 500  # of the weights: so few candidates have their gradients computed one by one
FACTOR = 0.25  # of the price, where candidates are chosen
RATE, LAST_RATE, SHRINKING_RATE = 0.3, 0.05, 0.15  # how far a gate moves at most

TRIES, FEWER = 12, 0.95  # where a check refuses a mask
FURTHER = 0.05  # of the steps of the descent, before the next try
TRACED_EVERY = 10  # steps
CHECKED_AFTER = 5  # steps
FILE, FORMAT = "search.safetensors", "harmcircuits.search.4"

FreshAnswers = Callable[[], Sequence[Batch]]


class Size(NamedTuple):
    """A size that is wanted: as a share of the weights, and how many these are."""

    share: float
    n: int


@dataclass
class Worth(Mapping[str, Tensor]):
    """What removing each weight is worth, benefit less price: kept as W's slope, the only sum."""

    bridge: Bridge
    sites: Mapping[str, Site]
    max_memory: int | None
    slopes: dict[str, Float[Tensor, "..."]] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Float[Tensor, "..."]:
        slope = self.slopes[name]
        return slope * self.sites[name].parameter.detach().to(slope)

    def __iter__(self) -> Iterator[str]:
        return iter(self.slopes)

    def __len__(self) -> int:
        return len(self.slopes)

    @property
    def n_weights(self) -> int:
        """How many there are to choose from."""
        return sum(site.parameter.numel() for site in self.sites.values())

    def put(self, name: str, slope: Tensor) -> None:
        """Keep a slope: in memory, or under a bound on memory in a file."""
        self.slopes[name] = slope if self.max_memory is None else mapped_copy(slope)

    @torch.inference_mode(False)
    def add(self, texts: Texts, mask: WeightMask | None, kind: Kind, factor: float) -> None:
        """Add the texts' gradients under a mask, times a factor."""
        if not self.slopes:
            for name, site in self.sites.items():
                self.put(name, zeros(site))
        removed = {} if mask is None else mask.removed
        # A weight times these is 0 or -0, while 0 by itself would write 0: the price has its sign.
        nothing = {name: torch.zeros(len(index)) for name, index in removed.items()}
        refuse_differences(texts.batches, self.sites, kind, self.max_memory)
        for group in memory_groups(self.sites, self.max_memory):
            totals = {}
            for name, site in group.items():
                totals[name] = self.slopes[name].to(site.parameter.device)  # itself, if it is there
            with masked_if_given(self.bridge, mask, scale=nothing), naming_data(texts.name):
                add_gradients(
                    self.bridge, texts.batches, texts.objective, group, totals, kind, factor
                )
            for name, total in totals.items():
                self.slopes[name].copy_(total)

    def best(self, n: int, excluded: Indices) -> Int[Tensor, " n"]:
        """The numbers of the n weights that are worth most, of those that are worth anything."""
        n_excluded = sum(len(excluded.get(name, ())) for name in self.sites)
        index = positive(self, largest(self, min(n, self.n_weights - n_excluded), excluded))
        return torch.cat([first + index[name] for name, first, _ in self.spans()])

    def spans(self) -> Iterator[tuple[str, int, int]]:
        """Each matrix, and the numbers of its first weight and of the first of the next."""
        first = 0
        for name, site in self.sites.items():
            yield name, first, first + site.parameter.numel()
            first += site.parameter.numel()


@dataclass
class Search:
    """A search under way: its texts, the worth of every weight, and how far gates are open."""

    bridge: Bridge
    texts: Sequence[Texts]
    protection: Protection
    worth: Worth
    shapes: Mapping[str, tuple[int, ...]]  # of all block matrices
    excluded: Indices  # weights that may not be chosen
    source: Source
    sizes: Sequence[Size]
    steps: int
    fresh_answers: FreshAnswers | None = None  # to the target's requests
    added: list[Batch] = field(default_factory=list)  # of them
    stage: int = 0  # how many parts and smaller sizes are done
    step: int = 0
    gates: Gates | None = None
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

    # The schedule

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
        smaller = self.stage - len(self.parts) + 1  # 0 in the last part of the descent
        if smaller <= 0:
            self._descend(self.parts[self.stage])
        else:
            self._shrink(self.sizes[smaller - 1].n, self.sizes[smaller].n)
        if smaller >= 0:
            size = self.sizes[smaller]
            self.masks[size.share] = self._allowed(size)
        self.stage += 1

    def _descend(self, steps: range) -> None:
        mask = None
        if self.gates is not None:
            mask = self._mask(self._size_of_step(steps.start - 1))
            if self.fresh_answers is not None:
                with masked(self.bridge, mask):
                    batches = self.fresh_answers()
                self._add_answers(batches)
        self._score(mask)
        self._choose_candidates()
        for step in steps:
            progress = step / self.steps
            rate = RATE + (LAST_RATE - RATE) * progress
            is_hard = progress >= HARD_FROM
            self._learn(self._size_of_step(step), rate, is_hard=is_hard)
            if is_hard and step % CHECKED_AFTER == 0:
                self._broken_budgets(self._mask(self.sizes[0].n), self.sizes[0])

    def _size_of_step(self, step: int) -> int:
        growth = min(1.0, (step + 1) / (GROWTH_UNTIL * self.steps))
        return max(1, round(growth * self.sizes[0].n))

    def _add_answers(self, batches: Sequence[Batch]) -> None:
        """Score these answers of the target as well, but for those that are scored already."""
        target = self.texts[0]
        known = {tuple(example.tokens.tolist()) for example in target.examples}
        answers = unpadded(batches)
        fresh = [example for example in answers if tuple(example.tokens.tolist()) not in known]
        if fresh:
            added = batched(fresh, max(map(len, target.batches)))
            target.add(self.bridge, added)
            self.added += added
            self._note("examples_added", {"step": self.step, "data": target.name}, len(fresh))

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
            if not self._broken_budgets(mask, size):
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

    def _score(self, mask: WeightMask | None) -> None:
        """Add to the worth of every weight, under the mask so far."""
        for texts in self.texts:
            if texts.role != "protected":
                self.worth.add(texts, mask, "signed", texts.weight * SIGNS[texts.role])
            else:
                self.worth.add(texts, mask, "per token", -FACTOR)

    def _choose_candidates(self) -> None:
        """The most promising, and those that are open; what was there before stays as open."""
        before = self.gates
        chosen = self.worth.best(CANDIDATES * self.sizes[0].n, self.excluded)
        if before is not None:
            chosen = torch.cat([chosen, before.numbers[before.gate > 0]]).unique()
        self.gates = self._gates(chosen)
        if before is not None:
            self.gates.inherit(before)

    def _gates(self, numbers: Int[Tensor, " gate"]) -> Gates:
        """Gates over the weights with these numbers, all closed."""
        index, values = {}, []
        for name, first, end in self.worth.spans():
            index[name] = numbers[(first <= numbers) & (numbers < end)] - first
            weight = self.worth.sites[name].parameter.detach().flatten()
            values.append(weight[index[name].to(weight.device)].float().cpu())
        mask = WeightMask(index, self.shapes, self.source)
        closed = torch.zeros(len(numbers))
        return Gates(numbers, mask, torch.cat(values), closed, closed.clone())

    # A step

    def _learn(self, n: int, rate: float, *, is_hard: bool = True) -> None:
        """Move the gates by one step, within n weights."""
        if self.gates:
            gate = self.gates.hard(n) if is_hard else self.gates.gate
            self.gates.move(self._gain(self.gates, gate), n, rate)
            self.step += 1

    @torch.inference_mode(False)
    def _gain(self, gates: Gates, gate: Float[Tensor, " gate"]) -> Float[Tensor, " gate"]:
        """How fast the loss falls as each gate is opened: minus its derivative."""
        gain = torch.zeros_like(gate)
        rises = [0.0] * len(self.texts)
        gradients: dict[str, Tensor] = {}
        sites = {name: self.worth.sites[name] for name in gates.mask.removed}
        hooked = {name: site for name, site in sites.items() if site.is_hooked}
        unhooked = {name: site for name, site in sites.items() if not site.is_hooked}
        are_few = len(gates) <= FEW * self.worth.n_weights
        scale = {name: 1 - part for name, part in gates.by_matrix(gate).items()}

        def keep_entries(site: Site, x: Input, g: OutputGradient) -> None:
            first, second = (g, x) if site.input_axis == 1 else (x, g)
            index = gates.mask.removed[site.name]
            entries = _entries(first.flatten(0, 1), second.flatten(0, 1), index, are_few)
            gradients[site.name] = gradients.get(site.name, 0.0) + entries.float()

        def keep_gradient(site: Site, gradient: Tensor) -> None:
            index = gates.mask.removed[site.name].to(gradient.device)
            gradients[site.name] = gradient.flatten()[index].float()

        with (
            # Made on this model, so not compared with it at every step.
            masked(self.bridge, gates.mask, scale=scale, same_model=False),
            torch.enable_grad(),
            hook_pairs(self.bridge, hooked, keep_entries),
            parameter_gradients(unhooked, keep_gradient),
        ):
            for pairs, objective in self._batches_of_step():
                for kind, rise in enumerate(self._backward_of(pairs, objective)):
                    rises[kind] += rise / self.texts[kind].n_drawn
                # Not in the backward pass, which would wait for the host at every matrix.
                gain += gates.gain(
                    dict(zip(gradients, on_host([*gradients.values()]), strict=True))
                )
                gradients.clear()
        for texts, rise in zip(self.texts, rises, strict=True):
            texts.weigh(rise)
            if self.step % TRACED_EVERY == 0:
                self._note("seen_rise", {"step": self.step, "data": texts.name}, rise)
        return gain

    def _batches_of_step(self) -> Iterator[tuple[list[tuple[int, int]], Objective]]:
        """What a step reads: kinds and numbers of texts, a batch at a time."""
        largest_batch = max(len(batch) for texts in self.texts for batch in texts.batches)
        drawn = []
        for kind, texts in enumerate(self.texts):
            drawn += [(kind, number) for number in texts.draw(self.generator)]
        # Of like length together, since the shorter ones of a batch are padded.
        drawn.sort(key=lambda pair: len(self.texts[pair[0]].examples[pair[1]].tokens))
        for objective in dict.fromkeys(texts.objective for texts in self.texts):
            of_objective = [pair for pair in drawn if self.texts[pair[0]].objective is objective]
            size = ceil(len(of_objective) / ceil(len(of_objective) / largest_batch))
            for start in range(0, len(of_objective), size):
                yield of_objective[start : start + size], objective

    def _backward_of(self, pairs: Sequence[tuple[int, int]], objective: Objective) -> list[float]:
        """The backward pass of one batch of texts, by kind and number; the rise of each kind."""
        examples = [self.texts[kind].examples[number] for kind, number in pairs]
        (batch,) = batched(examples, len(examples))
        now = objective(self.bridge, batch).float()
        before = torch.stack([self.texts[kind].before[number] for kind, number in pairs])
        rise = now - before.to(now.device)
        kinds = torch.tensor([kind for kind, _ in pairs], device=now.device)
        loss = now.new_zeros(())
        sums = []
        for kind, texts in enumerate(self.texts):
            loss = loss + texts.part_of_loss(now[kinds == kind], rise[kinds == kind])
            sums.append(rise[kinds == kind].detach().sum())
        loss.backward()
        return torch.stack(sums).tolist()

    # Masks, and the trace

    def _mask(self, n: int) -> WeightMask:
        assert self.gates is not None
        return WeightMask(self.gates.removed(n), self.shapes, self.source)

    def found(self, share: float) -> WeightMask:
        """The mask of a size, with how it was made and the trace."""
        n_allowed = next(size.n for size in self.sizes if size.share == share)
        settings = {"size": share, "n_allowed": n_allowed, "factor": FACTOR}
        source = replace(self.source, settings={**settings, **self.source.settings})
        return WeightMask(self.masks[share].removed, self.shapes, source, self.trace)

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
            assert self.gates is not None
            state["stride"] = self.gates.stride
            state["texts"] = [(of.multiplier, of.rise, of.left) for of in self.texts]
            tensors |= {f"slope {name}": values for name, values in self.worth.slopes.items()}
            tensors |= {"numbers": self.gates.numbers, "gate": self.gates.gate}
            tensors |= {"momentum": self.gates.momentum, "generator": self.generator.get_state()}
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
        self.trace = Rows.from_dicts(state["trace"])
        for size in self.sizes[: max(0, self.stage - len(self.parts) + 1)]:
            removed = dict(_under(tensors, f"mask {size.share} "))
            self.masks[size.share] = WeightMask(removed, self.shapes, self.source)
        if self.stage == self.n_stages:
            return
        for name, slope in _under(tensors, "slope "):
            self.worth.put(name, slope.to(self.worth.sites[name].parameter.device))
        self.gates = self._gates(tensors["numbers"])
        self.gates.gate, self.gates.momentum = tensors["gate"], tensors["momentum"]
        self.gates.stride = state["stride"]
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
