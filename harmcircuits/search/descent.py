"""The search under way: scores, candidates, steps and checks, in the order of its schedule."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch

from harmcircuits.batches import Batch, batched, bounds, unpadded
from harmcircuits.circuits.gates import Gates
from harmcircuits.circuits.masks import WeightMask
from harmcircuits.hooks.bridge import Bridge
from harmcircuits.hooks.masking import masked
from harmcircuits.measurements import Label, Measurement, Rows
from harmcircuits.search.benefits import PRICE_WEIGHT, Benefits
from harmcircuits.search.schedule import Schedule, Size, Step
from harmcircuits.search.step import step_gain
from harmcircuits.search.texts import BUDGET_SHARE, Protection, TextGroup

SEED = 0  # of the texts that steps draw
CANDIDATES = 20  # times as many as the largest mask removes
TRIES = 12  # to keep all budgets
SIZE_DECAY = 0.95  # of the number of weights, from one try to the next
TRACE_INTERVAL = 10  # steps

FreshAnswers = Callable[[], Sequence[Batch]]


@dataclass
class Search:
    """A search: its texts, the benefit of every weight, the gates, and how far it is."""

    bridge: Bridge
    groups: Sequence[TextGroup]  # the target first
    protection: Protection
    benefits: Benefits
    schedule: Schedule
    gates: Gates
    fresh_answers: FreshAnswers | None = None
    stage: int = 0
    step: int = 0
    masks: dict[float, WeightMask] = field(default_factory=dict)  # by share, once accepted
    trace: list[Measurement] = field(default_factory=list)
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(SEED))

    def __post_init__(self) -> None:
        for group in self.groups:
            self._note("examples_scored", len(group.examples), data=group.name)

    def advance(self) -> None:
        """Run the next stage: a part of the descent, or the way to the next smaller size."""
        sizes = self.schedule.sizes
        number = self.stage - len(self.schedule.parts) + 1  # of a size; the descent ends at 0
        if number <= 0:
            part = self.schedule.parts[self.stage]
            n = self.schedule.n_at(part.start - 1)
            self._rescore(n)
            self._learn(self.schedule.descent(part))
        else:
            steps = self.schedule.shrinking(sizes[number - 1], sizes[number])
            self._learn(steps)
        if number >= 0:
            size = sizes[number]
            self.masks[size.share] = self._accepted(size)
        self.stage += 1

    def mask(self, share: float) -> WeightMask:
        """The mask of a size, with the settings that found it and the trace."""
        mask = self.masks[share]
        settings = {
            "size": share,
            "n_allowed": round(share * mask.n_weights),
            "factor": PRICE_WEIGHT,
            **mask.source.settings,
        }
        source = replace(mask.source, settings=settings)
        return replace(mask, source=source, trace=Rows(self.trace))

    def _rescore(self, n: int) -> None:
        """Score all weights under the mask so far, and choose the candidates anew."""
        earlier = self.gates
        mask = earlier.largest(n)
        if self.stage > 0 and self.fresh_answers is not None:
            with masked(self.bridge, mask):
                answers = self.fresh_answers()
            self._add_answers(answers)
        for group in self.groups:
            self.benefits.add(self.bridge, group, mask)

        n_best = CANDIDATES * self.schedule.sizes[0].n
        best = replace(mask, removed=self.benefits.best(n_best))
        is_open = earlier.z > 0
        union = best | earlier.where(is_open)
        candidates = replace(mask, removed=union.removed)
        self.gates = Gates.over(candidates, self.benefits.slopes.sites)
        self.gates.inherit(earlier)

    def _add_answers(self, batches: Sequence[Batch]) -> None:
        """Add to the target the answers that it does not have."""
        target = self.groups[0]
        present = {tuple(example.tokens.tolist()) for example in target.examples}
        fresh = []
        for answer in unpadded(batches):
            if tuple(answer.tokens.tolist()) not in present:
                fresh.append(answer)
        if fresh:
            target.extend(self.bridge, batched(fresh, *bounds(target.batches)))
            self._note("examples_added", len(fresh), step=self.step, data=target.name)

    def _learn(self, steps: Iterable[Step]) -> None:
        """Move the gates by some steps."""
        for step in steps:
            if len(self.gates):
                self._move(step)
            if step.is_checked:
                size = self.schedule.sizes[0]
                self._keeps_budgets(self.gates.largest(size.n), size)

    def _move(self, step: Step) -> None:
        gates = self.gates
        z = gates.hard(step.n) if step.is_hard else gates.z
        sites = self.benefits.slopes.sites
        gain, rises = step_gain(self.bridge, self.groups, gates, z, sites, self.generator)
        gates.move(gain, step.n, step.rate)

        for group, rise in zip(self.groups, rises, strict=True):
            group.update_multiplier(rise)
            if self.step % TRACE_INTERVAL == 0:
                self._note("seen_rise", rise, step=self.step, data=group.name)
        self.step += 1

    def _accepted(self, size: Size) -> WeightMask:
        """A mask of at most this size that keeps all budgets on answers that no step reads."""
        n = size.n
        for _ in range(TRIES):
            mask = self.gates.largest(n)
            if self._keeps_budgets(mask, size):
                return mask
            n = int(SIZE_DECAY * n)
            self._learn(self.schedule.further(n))

        # Further steps do not help: half as many weights again and again, at worst none.
        while n and not self._keeps_budgets(self.gates.largest(n), size):
            n //= 2
        return self.gates.largest(n)

    def _keeps_budgets(self, mask: WeightMask, size: Size) -> bool:
        """Whether a mask keeps all budgets; the multiplier of each that it breaks is doubled."""
        rises = self.protection.rises(self.bridge, mask)
        retain_sets = [group for group in self.groups if group.role == "protected"]
        is_kept = True
        for group, row in zip(retain_sets, rises, strict=True):
            if row.mean > BUDGET_SHARE * group.budget:
                group.scale_multiplier(2.0)
                is_kept = False

        n_removed = Measurement.exact("weights_removed", {}, mask.n_removed)
        for row in (n_removed, *rises):
            labels = {
                "size": size.share,
                "step": self.step,
                **row.labels,
                "outcome": "accepted" if is_kept else "refused",
            }
            self.trace.append(replace(row, labels=labels))
        return is_kept

    def _note(self, metric: str, value: float, **labels: Label) -> None:
        row = Measurement.exact(metric, labels, value)
        self.trace.append(row)
