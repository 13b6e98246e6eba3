"""A walk over masks on which the target pays and what is protected has a price.

    benefit = price = 0                                  # one number for each weight
    for every step:
        price   += |W| * mean over each protected behaviour of sum_t |g_t| |x_t|^T   # token_price
        benefit += -W * mean over the target of sum_t g_t x_t^T                   # removal_effect
        n      = round(share of the step * n_weights)
        factor = the smallest tried whose mask passes the check
        mask   = the n largest of benefit - factor * price, as far as they are above zero

The benefit is taken under the mask accepted so far, the price under the mask refused last: there
the protected losses have risen, so the weights that broke them are dear. `W` are the weights before
anything is removed, also where a mask has zeroed them: a removed weight goes on earning what it
would if it were there, and may come back.

Where it is known what the model should say instead of the target ("preferred"), weights whose
removal makes that likelier earn as well; where it is known what may not become likelier with it
("avoided"), those that make it likelier lose:

        benefit += PREFERENCE * W * mean over what is preferred of sum_t g_t x_t^T
        benefit -= PREFERENCE * W * mean over what is avoided of sum_t g_t x_t^T

A model that loses the words of an answer may give it in others, and the loss on the first ones goes
on rising while the behaviour is still there. So the target is renewed where a caller can do that:
from the second step on it is what was given and what the model says now (`renew`).

Whole neurons, heads or rows are chosen in the same way, by the mean score of their weights (see
`harmcircuits.circuits.units`). The check is made on protected answers that the price has not seen
(see `Protection`).

The walk goes beyond the size that is wanted. After each step a mask of that size is chosen from the
sums in the same way, with a factor of its own, and the one that takes most of the target is kept:
under which least of it is left to renew, and among equals its loss is highest, less PREFERENCE
times that of what is preferred, and more that of what is avoided.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isclose, prod
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from harmcircuits.circuits.masks import WeightMask
from harmcircuits.circuits.scores import Source, WeightScores
from harmcircuits.circuits.selection import Indices, largest, positive
from harmcircuits.circuits.sites import Site
from harmcircuits.circuits.units import Units
from harmcircuits.hooks.accumulation import Kind, mean_gradients
from harmcircuits.hooks.bridge import Bridge
from harmcircuits.hooks.checks import of_data, refuse_not_finite
from harmcircuits.hooks.masking import masked_if_given
from harmcircuits.hooks.objectives import Objective, completion_loss
from harmcircuits.hooks.protection import Protection
from harmcircuits.hooks.walk_files import KeptWalk, read_walk, write_walk
from harmcircuits.measurements import Label, Measurement, Rows
from harmcircuits.prompts import Batch
from harmcircuits.storage import mapped_copy

# What the price may be multiplied by: from a quarter to 64, each 1.41 times the one before. A
# larger stride would jump over the masks that break little, which teach most.
FACTORS = tuple(2 ** (number / 2) for number in range(-4, 13))
FIRST_FACTOR = 1.0
# The absolute values of a price do not cancel within a unit as its benefits do. In the first step
# on `sft` the best head earns 0.006 of its price, the best neuron 0.7, single weights more than it.
UNIT_FACTORS = tuple(2 ** (number / 2) for number in range(-24, 13))
FIRST_UNIT_FACTOR = 2**-6
# A refused mask under which a loss rises further has broken everything: nothing is learned from it,
# and its gradients would swamp the sums.
MOST_TO_LEARN_FROM = 1.5  # nats per token

PREFERENCE = 0.3  # of a nat of the target's loss
SIGNS = {"preferred": 1.0, "avoided": -1.0}  # of the losses that count beside the target's

Totals = dict[str, Float[Tensor, "..."]]


class Try(NamedTuple):
    """A mask that was checked: accepted if no protected loss rises beyond its budget."""

    mask: WeightMask
    rung: int  # of the walk's factors
    rises: Sequence[Measurement]
    is_accepted: bool

    @property
    def teaches(self) -> bool:
        """Whether it was refused, and broke so little that it shows what broke."""
        return not self.is_accepted and max(row.mean for row in self.rises) <= MOST_TO_LEARN_FROM


@dataclass(frozen=True)
class Best:
    """Of the masks of one size, the one that takes most of the target."""

    rung: int
    mask: WeightMask | None = None
    factor: float = 0.0
    step: int = 0
    left: int = 0
    loss: float = 0.0


@dataclass
class Walk:
    """A search under way: its sums, the masks that it stands on, and what it has tried."""

    bridge: Bridge
    target: Sequence[Batch]
    renew: Callable[[WeightMask], Sequence[Batch]] | None
    objective: Objective
    protection: Protection
    prefer: Mapping[str, Sequence[Batch]]  # by the names in SIGNS
    sites: Mapping[str, Site]  # to choose from
    shapes: Mapping[str, tuple[int, ...]]  # of all block matrices
    units: Units | None  # what is chosen whole; None: every weight by itself
    excluded: Indices  # weights that may not be chosen
    source: Source
    sizes: Sequence[float]
    max_memory: int | None
    benefit: Totals = field(default_factory=dict)
    price: Totals = field(default_factory=dict)
    rung: int = 0
    accepted: WeightMask | None = None
    refused: WeightMask | None = None
    best: list[Best] = field(default_factory=list)
    trace: Rows = field(default_factory=Rows)
    # By the digest of the mask. Where few weights are worth their price, masks of several sizes and
    # of several steps are the same, and each check reads a third of what is protected.
    known_rises: dict[str, list[Measurement]] = field(default_factory=dict)
    known_losses: dict[tuple[str, str], float] = field(default_factory=dict)  # by data, and mask

    def __post_init__(self) -> None:
        first = FIRST_FACTOR if self.units is None else FIRST_UNIT_FACTOR
        self.rung = self.factors.index(first)
        self.best = [Best(self.rung) for _ in self.sizes]

    @property
    def factors(self) -> tuple[float, ...]:
        """What the price may be multiplied by, in order."""
        return FACTORS if self.units is None else UNIT_FACTORS

    @property
    def n_weights(self) -> int:
        """How many block weights the model has."""
        return sum(prod(shape) for shape in self.shapes.values())

    def step(self, number: int, share: float) -> None:
        """Add to the sums, move to the mask of this share, and look at every size wanted."""
        if not self.trace:
            self._note_data()
        self._add_price()
        scored = self._scored()
        effect = self._add_benefit(scored)

        labels: dict[str, Label] = {"step": number, "share": share, "aim": "walk"}
        accepted, refused = self._cheapest(share, self.rung, labels)
        before = self.accepted
        if accepted is not None:
            self.accepted = accepted.mask
            self.rung = accepted.rung
        else:
            # Even the dearest fails: stay, and learn from what failed.
            self.rung = len(self.factors) - 1
        self.refused = refused.mask if refused is not None and refused.teaches else None

        predicted = 0.0
        if self.accepted is not None:
            predicted += effect.sum_over(self.accepted)
        if before is not None:
            predicted -= effect.sum_over(before)
        del effect  # as large as the model: before every size is looked at
        data = "target" if len(scored) == len(self.target) else f"scored in step {number}"
        measured = self._mean_of(data, scored, self.objective, self.accepted)
        measured -= self._mean_of(data, scored, self.objective, before)
        self._note("target_loss", labels, self._mean_loss(self.accepted))
        self._note("predicted_change", labels, predicted)
        self._note("measured_change", labels, measured)
        self._note_preferred(labels, self.accepted)

        for place, size in enumerate(self.sizes):
            self.best[place] = self._better(self.best[place], size, number)

    def _better(self, best: Best, size: float, number: int) -> Best:
        """The mask of a size that the sums say now, if it takes more of the target than before."""
        labels: dict[str, Label] = {"step": number, "share": size, "aim": "size"}
        accepted, _ = self._cheapest(size, best.rung, labels)
        if accepted is None:
            return replace(best, rung=len(self.factors) - 1)
        mask, rung = accepted.mask, accepted.rung

        with masked_if_given(self.bridge, mask):
            left = sum(map(len, self.renew(mask))) if self.renew else 0
        loss = self._mean_loss(mask)
        self._note("target_left", labels, left)
        self._note("target_loss", labels, loss)
        loss -= PREFERENCE * self._note_preferred(labels, mask)
        takes_more = (-left, loss) > (-best.left, best.loss)
        if best.mask is not None and not takes_more:
            return replace(best, rung=rung)
        return Best(rung, mask, self.factors[rung], number, left, loss)

    def masks(self) -> list[WeightMask]:
        """The best mask of each size, with the trace; empty where none passed the check."""
        masks = []
        for best, size in zip(self.best, self.sizes, strict=True):
            settings = {
                "size": size,
                "n_allowed": round(size * self.n_weights),
                "factor": best.factor,
                "step": best.step,
                **self.source.settings,
            }
            source = replace(self.source, settings=settings)
            removed = best.mask.removed if best.mask is not None else {}
            masks.append(WeightMask(removed, self.shapes, source, self.trace))
        return masks

    # The sums

    def _add_price(self) -> None:
        """What removing each weight may cost, under the mask that was refused last."""
        under = self.accepted if self.refused is None else self.refused
        for behaviour, batches in self.protection.priced.items():
            with masked_if_given(self.bridge, under), of_data(f"{behaviour}, priced"):
                gradients = self._mean_gradients(batches, completion_loss, "per token")
            # Outside the mask: here the weights are whole.
            for name in self.sites:
                # Popped: the gradients of the next behaviour need their memory.
                self._add(self.price, name, self._times_weight(name, gradients.pop(name)).abs_())

    def _scored(self) -> list[Batch]:
        """The target, and what it says now."""
        # Before anything is removed the target has become nothing else.
        if self.renew is None or self.accepted is None:
            return list(self.target)
        with masked_if_given(self.bridge, self.accepted):
            return [*self.target, *self.renew(self.accepted)]

    def _add_benefit(self, scored: Sequence[Batch]) -> WeightScores:
        """What removing each weight does to the target, under the mask accepted so far."""
        # First what stands beside it: the target's effect is kept, and as large as a sum.
        for beside, batches in self.prefer.items():
            with masked_if_given(self.bridge, self.accepted), of_data(beside):
                gradients = self._mean_gradients(batches, completion_loss, "signed")
            for name in self.sites:
                gain = self._times_weight(name, gradients.pop(name))
                self._add(self.benefit, name, gain.mul_(SIGNS[beside] * PREFERENCE))

        with masked_if_given(self.bridge, self.accepted), of_data("target"):
            effect = self._mean_gradients(scored, self.objective, "signed")
        for name, gradient in effect.items():
            self._add(self.benefit, name, self._times_weight(name, gradient).neg_())
        return WeightScores(effect, self.source)

    def _mean_gradients(self, batches: Sequence[Batch], objective: Objective, kind: Kind) -> Totals:
        return mean_gradients(
            self.bridge,
            batches,
            objective,
            self.sites,
            kind,
            max_memory=self.max_memory,
        )

    def _times_weight(self, name: str, gradient: Tensor) -> Tensor:
        """The gradient times its weight, in place."""
        weight = self.sites[name].parameter.detach()
        return gradient.mul_(weight.to(gradient.device))

    def _add(self, sums: Totals, name: str, values: Tensor) -> None:
        if name in sums:
            sums[name].add_(values)
        else:
            # A copy to add to: in memory, or under a bound in a temporary file.
            sums[name] = values.clone() if self.max_memory is None else mapped_copy(values)

    # The choice

    def _cheapest(
        self, share: float, rung: int, labels: Mapping[str, Label]
    ) -> tuple[Try | None, Try | None]:
        """The mask of the smallest factor that passes the check, and the nearest that does not."""
        first = self._try(share, rung, labels)
        if not first.is_accepted:
            rungs = range(rung + 1, len(self.factors))
        elif self.protection.priced:
            rungs = range(rung - 1, -1, -1)
        else:
            rungs = range(0)  # without a price all factors give the same mask

        last = first
        for other in rungs:
            current = self._try(share, other, labels)
            if first.is_accepted and not current.is_accepted:
                return last, current
            if current.is_accepted and not first.is_accepted:
                return current, last
            last = current
        return (last, None) if first.is_accepted else (None, last)

    def _try(self, share: float, rung: int, labels: Mapping[str, Label]) -> Try:
        mask = self._chosen(share, self.factors[rung])
        if mask.digest not in self.known_rises:
            self.known_rises[mask.digest] = self.protection.rises(self.bridge, mask)
        rises = self.known_rises[mask.digest]
        is_accepted = self.protection.allows(rises)

        where = {**labels, "factor": self.factors[rung]}
        outcome = "accepted" if is_accepted else "refused"
        n_removed = Measurement.exact("weights_removed", {}, mask.n_removed)
        for row in (n_removed, *rises):
            self.trace += [replace(row, labels={**where, **row.labels, "outcome": outcome})]
        return Try(mask, rung, rises, is_accepted)

    def _chosen(self, share: float, factor: float) -> WeightMask:
        """The largest of benefit - factor * price, but none that is zero or below."""
        scores = _Difference(self.benefit, self.price, factor)
        n = round(share * self.n_weights)
        if self.units is not None:
            removed = self.units.largest(scores, n, self.excluded)
        else:
            n_candidates = 0
            for name, site in self.sites.items():
                n_candidates += site.parameter.numel() - len(self.excluded.get(name, ()))
            removed = positive(scores, largest(scores, min(n, n_candidates), self.excluded))
        return WeightMask(removed, self.shapes, self.source)

    # Losses, and the trace

    def _mean_loss(self, mask: WeightMask | None) -> float:
        """The target's mean objective under a mask."""
        return self._mean_of("target", self.target, self.objective, mask)

    def _mean_of(
        self, name: str, batches: Sequence[Batch], objective: Objective, mask: WeightMask | None
    ) -> float:
        key = (name, mask.digest if mask is not None else "")
        if key not in self.known_losses:
            with torch.no_grad(), masked_if_given(self.bridge, mask), of_data(name):
                losses = [objective(self.bridge, batch).float().cpu() for batch in batches]
                values = torch.cat(losses)
                refuse_not_finite(batches, values, objective)
            self.known_losses[key] = values.mean().item()
        return self.known_losses[key]

    def _note_preferred(self, labels: Mapping[str, Label], mask: WeightMask | None) -> float:
        """Note the mean loss of what is preferred and avoided under a mask; their difference."""
        wanted = 0.0
        for name, batches in self.prefer.items():
            loss = self._mean_of(name, batches, completion_loss, mask)
            self._note(f"{name}_loss", labels, loss)
            wanted += SIGNS[name] * loss
        return wanted

    def _note_data(self) -> None:
        """On how many examples the sums are taken: of few, another sample gives another mask."""
        data = {"target": self.target, **self.protection.priced, **self.prefer}
        for name, batches in data.items():
            self._note("examples_scored", {"data": name}, sum(map(len, batches)))

    def _note(self, metric: str, labels: Mapping[str, Label], value: float) -> None:
        self.trace += [Measurement.exact(metric, labels, value)]

    # What a folder keeps between two steps

    def keep(self, folder: str | Path | None, step: int) -> None:
        """Write everything into the folder, in place of the step before."""
        if folder is None:
            return
        state = {
            "step": step,
            "rung": self.rung,
            "unpruned_loss": self._mean_loss(None),
            "best": [{**vars(best), "mask": None} for best in self.best],
        }
        sums = {"benefit": self.benefit, "price": self.price}
        masks = {"accepted": self.accepted, "refused": self.refused}
        for place, best in enumerate(self.best):
            masks[f"best-{place}"] = best.mask
        made = {name: mask for name, mask in masks.items() if mask is not None}
        write_walk(folder, self._key, KeptWalk(state, sums, made, self.trace))

    def resume(self, folder: str | Path | None) -> int:
        """Go on from what the folder holds; the steps that were done there."""
        walk = read_walk(folder, self._key) if folder is not None else None
        if walk is None:
            return 0
        # By its value: functions that are made alike have the same name.
        loss = self._mean_loss(None)
        if not isclose(loss, walk.state["unpruned_loss"], rel_tol=1e-2, abs_tol=1e-6):
            raise ValueError(
                f"{folder} holds a search by another objective, which is "
                f"{walk.state['unpruned_loss']:.3g} on the target before anything is removed; this "
                f"one is {loss:.3g}. Give another folder, or remove it"
            )
        self.rung = walk.state["rung"]
        self.accepted = walk.masks.get("accepted")
        self.refused = walk.masks.get("refused")
        self.best = []
        for place, best in enumerate(walk.state["best"]):
            self.best.append(Best(**{**best, "mask": walk.masks.get(f"best-{place}")}))
        self.trace = walk.trace
        self.benefit = self._resumed(walk.sums.get("benefit", {}))
        self.price = self._resumed(walk.sums.get("price", {}))
        return walk.state["step"]

    def _resumed(self, sums: Mapping[str, Tensor]) -> Totals:
        """Each matrix's sum beside its weight, or under a bound in a temporary file."""
        if self.max_memory is not None:
            return {name: mapped_copy(sum) for name, sum in sums.items()}
        return {name: sum.to(self.sites[name].parameter.device) for name, sum in sums.items()}

    @property
    def _key(self) -> str:
        """What a walk must have in common with another to go on from it."""
        renewed_by = getattr(self.renew, "__qualname__", "")
        return f"{self.source.to_json()} sizes={list(self.sizes)} renewed by {renewed_by}"


@dataclass(frozen=True)
class _Difference(Mapping[str, Tensor]):
    """benefit - factor * price, a matrix at a time: as a whole it never exists."""

    benefit: Totals
    price: Totals
    factor: float

    def __getitem__(self, name: str) -> Tensor:
        if not self.price:
            return self.benefit[name]
        return torch.sub(self.benefit[name], self.price[name], alpha=self.factor)

    def __iter__(self) -> Iterator[str]:
        return iter(self.benefit)

    def __len__(self) -> int:
        return len(self.benefit)
