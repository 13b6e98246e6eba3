"""Walks that differ from the search in one thing each: price, factors, loss, laps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from support.bench.methods import Calibrations, Method
from support.bench.results import CAP

from harmcircuits.behaviours.model import Model
from harmcircuits.behaviours.standard import TARGET
from harmcircuits.circuits.masks import WeightMask
from harmcircuits.circuits.scores import Source
from harmcircuits.hooks.bridge import Bridge
from harmcircuits.hooks.objectives import Objective, completion_loss
from harmcircuits.hooks.protection import Protection
from harmcircuits.hooks.search import BUDGET, STEPS
from harmcircuits.hooks.walk import FACTORS, AuxiliaryLoss, Totals, Try, Walk
from harmcircuits.hooks.weights import model_fingerprint, weight_sites
from harmcircuits.measurements import Label
from harmcircuits.prompts import Batch

LARGEST = 0.01  # share of the weights to which a walk goes on
MULTIPLIERS = (1 / 4, 4.0)  # the least and the greatest
MOST_MOVED = 0.5  # powers of two, in a step


@dataclass
class OtherFactors(Walk):
    """A walk that may multiply the price by other factors."""

    tried: tuple[float, ...] = FACTORS

    @property
    def factors(self) -> tuple[float, ...]:
        """Those that are tried."""
        return self.tried


@dataclass
class FactorForEach(Walk):
    """A walk whose price is a sum with a multiplier for each protected behaviour."""

    prices: dict[str, Totals] = field(default_factory=dict)
    multipliers: dict[str, float] = field(default_factory=dict)

    def _add_price(self) -> None:
        protection = self.protection
        for name, batches in protection.priced.items():
            self.protection = replace(protection, priced={name: batches})
            self.price = self.prices.setdefault(name, {})
            super()._add_price()
        self.protection = protection

        self.price = {}
        for name, price in self.prices.items():
            multiplier = self.multipliers.setdefault(name, 1.0)
            for site, values in price.items():
                self._add(self.price, site, values * multiplier)

    def step(self, number: int, of: int) -> None:
        """A step of the walk, after which the multipliers move."""
        super().step(number, of)
        rises = self.trace.where("protected_rise", aim="walk", step=number)
        # The last mask that passed; where none did, the last of all.
        counted = rises.where(outcome="accepted") or rises
        for name, budget in self.protection.budgets.items():
            rise = counted.where(protected=name)[-1].mean
            self.multipliers[name] = moved(self.multipliers[name], rise / budget)


@dataclass
class PricedAgain(Walk):
    """A walk that learns from a refused mask before the step goes on."""

    times: int = 2

    def _cheapest(
        self, share: float, rung: int, labels: Mapping[str, Label]
    ) -> tuple[Try | None, Try | None]:
        accepted, refused = super()._cheapest(share, rung, labels)
        for _ in range(self.times):
            if refused is None or not refused.teaches:
                break
            self._price_again(refused, int(str(labels["step"])))
            rung = refused.rung if accepted is None else accepted.rung
            accepted, refused = super()._cheapest(share, rung, labels)
        return accepted, refused

    def _price_again(self, refused: Try, step: int) -> None:
        broken = self.protection.broken(refused.rises)
        kept = self.protection, self.price, self.refused
        priced = {name: self.protection.priced[name] for name in broken}
        self.protection = replace(self.protection, priced=priced)
        self.price, self.refused = {}, refused.mask
        self._add_price()
        again = self.price
        self.protection, self.price, self.refused = kept
        for site, values in again.items():
            self._add(self.price, site, values * step)


def moved(multiplier: float, spent: float) -> float:
    """What a multiplier becomes: times 2^(spent - 1/2), within one half of a power either way."""
    power = min(MOST_MOVED, max(-MOST_MOVED, spent - 0.5))
    least, greatest = MULTIPLIERS
    return min(greatest, max(least, multiplier * 2**power))


def log_loss(bridge: Bridge, batch: Batch) -> torch.Tensor:
    """log(1 + loss) of every answer."""
    return completion_loss(bridge, batch).log1p()


def capped_loss(bridge: Bridge, batch: Batch) -> torch.Tensor:
    """The loss of every answer, up to 6 nats."""
    return completion_loss(bridge, batch).clamp(max=CAP)


def walked(
    model: Model,
    data: Calibrations,
    sizes: Sequence[float],
    *,
    kind: type[Walk] = Walk,
    budget: float = BUDGET,
    steps: int = STEPS,
    laps: int = 1,
    objective: Objective = completion_loss,
    renew: bool = True,
    **options: Any,
) -> list[WeightMask]:
    """The masks of `Model.find_circuit`, of a walk of another kind."""
    behaviour = model.behaviour(TARGET)
    target = data[TARGET]

    def still_shown(_: Bridge) -> list[Batch]:
        answers = model.verified(behaviour, target.prompts)
        shown = answers.where(lambda example: bool(example.completion))
        return model.batches(behaviour, shown) if len(shown) else []

    protect = {name: other.batches for name, other in data.items() if name != TARGET}
    walk = kind(
        model.bridge,
        target.batches,
        still_shown if renew else None,
        objective,
        Protection.of(model.bridge, protect, budget),
        weight_sites(model.bridge),
        units=None,
        excluded={},
        source=Source(model_fingerprint(model.bridge), "circuit"),
        sizes=sizes,
        largest_size=LARGEST,
        max_memory=None,
        **options,
    )
    for _ in range(laps):
        for step in range(1, steps + 1):
            walk.step(step, steps)
    return walk.masks()


def preferring(
    model: Model,
    data: Calibrations,
    sizes: Sequence[float],
    *,
    prefer: str,
    preference: float,
    kind: type[Walk] = Walk,
) -> list[WeightMask]:
    """The masks of a walk on which another behaviour is preferred to the target."""
    auxiliaries = [AuxiliaryLoss("preferred", model.preferred(TARGET, prefer, data), 1.0)]
    return walked(model, data, sizes, kind=kind, auxiliaries=auxiliaries, preference=preference)


def factors(lowest: int, highest: int, per_doubling: int) -> Method:
    """Walks whose factors go from one power of two to another."""
    numbers = range(lowest * per_doubling, highest * per_doubling + 1)
    tried = tuple(2 ** (number / per_doubling) for number in numbers)
    return partial(walked, kind=OtherFactors, tried=tried)
