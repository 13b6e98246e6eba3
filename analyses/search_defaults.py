# %% [markdown]
# # Which defaults should the search have?
# `Model.find_circuit` with one thing changed at a time, on both halves of the answers of the shipped
# `sft` and `dpo`, measured on the choice split with all rates. What a mask takes, and when it counts,
# is that of `search_bench.py`; the sizes are four of its eight, chosen along the same walk to 1 %.
#
# **What is changed.** *Budget* and *steps*; *first answers*: the target is not answered again under
# each mask. *Factors*: other ranges, and other strides between them. *Factor for each behaviour*:
# besides the common factor, which is found by the check as ever, each protected behaviour's price
# has a multiplier of its own, from 1/4 to 4. After every step it is multiplied by 2 to the power of
# (rise of its loss / budget - 1/2), within one half either way, so that who is near its budget
# becomes dearer and who is far from it cheaper. *log(1 + loss)* and *loss up to 6*: another loss of
# every harmful answer. *Two laps of 5 steps*: a second walk, from 0.2 % on, that begins with the
# sums and under the mask of the first; as many steps in all as the default.
#
# **The rule, fixed before the run.** All variants are tried on half A. One that takes less of both, the
# loss and the rate, on both models has lost; the others are tried on half B too. One is better than
# the default if it takes no less of either in any of the four cases, and more in some.

# %%
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer
from rich.console import Console
from search_bench import SIZES as BENCH_SIZES

import harmcircuits as hc
from harmcircuits.behaviours.model import Model
from harmcircuits.circuits.scores import Source
from harmcircuits.hooks.bridge import Bridge
from harmcircuits.hooks.objectives import Objective
from harmcircuits.hooks.protection import Protection
from harmcircuits.hooks.search import BUDGET, STEPS
from harmcircuits.hooks.walk import FACTORS, Totals, Walk
from harmcircuits.hooks.weights import model_fingerprint
from harmcircuits.measurements import Labels, Rows
from harmcircuits.prompts import Batch
from harmcircuits.studies.bench.cases import opened
from harmcircuits.studies.bench.methods import Calibrations, Method
from harmcircuits.studies.bench.results import CAP, by_method, percent
from harmcircuits.studies.jobs import Job, run_jobs
from harmcircuits.studies.models import ModelSpec
from harmcircuits.views.tables import frame_table

SIZES = (0.0005, 0.001, 0.002, 0.004)
MODELS = ("sft", "dpo")
HALVES = ("A", "B")
MULTIPLIERS = (1 / 4, 4.0)  # the least and the greatest
MOST_MOVED = 0.5  # powers of two, in a step

# %% [markdown]
# ## Walks that differ


# %%
@dataclass
class OtherFactors(Walk):
    """A walk that may multiply the price by other factors."""

    tried: tuple[float, ...] = FACTORS

    @property
    def factors(self) -> tuple[float, ...]:
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
        super().step(number, of)
        rises = self.trace.where("protected_rise", aim="walk", step=number)
        # The last mask that passed; where none did, the last of all.
        counted = rises.where(outcome="accepted") or rises
        for name, budget in self.protection.budgets.items():
            rise = counted.where(protected=name)[-1].mean
            self.multipliers[name] = moved(self.multipliers[name], rise / budget)


def moved(multiplier: float, spent: float) -> float:
    """What a multiplier becomes where a loss has risen by this share of its budget."""
    power = min(MOST_MOVED, max(-MOST_MOVED, spent - 0.5))
    least, greatest = MULTIPLIERS
    return min(greatest, max(least, multiplier * 2**power))


def log_loss(bridge: Bridge, batch: Batch) -> torch.Tensor:
    return hc.completion_loss(bridge, batch).log1p()


def capped_loss(bridge: Bridge, batch: Batch) -> torch.Tensor:
    return hc.completion_loss(bridge, batch).clamp(max=CAP)


def walked(
    model: Model,
    data: Calibrations,
    sizes: Sequence[float],
    *,
    kind: type[Walk] = Walk,
    budget: float = BUDGET,
    steps: int = STEPS,
    laps: int = 1,
    objective: Objective = hc.completion_loss,
    renew: bool = True,
    **options: Any,
) -> list[hc.WeightMask]:
    """The masks of `Model.find_circuit`, of a walk of another kind."""
    harmful = model.behaviour("harmful")
    target = data["harmful"]

    def still_shown(_: Bridge) -> list[Batch]:
        answers = model.verified(harmful, target.prompts)
        shown = answers.where(lambda example: bool(example.completion))
        return model.batches(harmful, shown) if len(shown) else []

    protect = {name: other.batches for name, other in data.items() if name != "harmful"}
    walk = kind(
        model.bridge,
        target.batches,
        still_shown if renew else None,
        objective,
        Protection.of(model.bridge, protect, budget),
        hc.weight_sites(model.bridge),
        units=None,
        excluded={},
        source=Source(model_fingerprint(model.bridge), "circuit"),
        sizes=sizes,
        largest_size=max(BENCH_SIZES),
        max_memory=None,
        **options,
    )
    for _ in range(laps):
        for step in range(1, steps + 1):
            walk.step(step, steps)
    return walk.masks()


def factors(lowest: int, highest: int, per_doubling: int) -> Method:
    """Walks whose factors go from one power of two to another, so many of them to a doubling."""
    numbers = range(lowest * per_doubling, highest * per_doubling + 1)
    tried = tuple(2 ** (number / per_doubling) for number in numbers)
    return partial(walked, kind=OtherFactors, tried=tried)


VARIANTS: Mapping[str, Method] = {
    "default": walked,
    "factor for each behaviour": partial(walked, kind=FactorForEach),
    "log(1 + loss)": partial(walked, objective=log_loss),
    "loss up to 6": partial(walked, objective=capped_loss),
    "two laps of 5 steps": partial(walked, steps=5, laps=2),
    "first answers": partial(walked, renew=False),
    "factors 1/64 to 256": factors(-6, 8, per_doubling=2),
    "factors 1/4 to 64, a doubling apart": factors(-2, 6, per_doubling=1),
    "factors 1/4 to 4": factors(-2, 2, per_doubling=2),
    "factors 1/4 to 64, 1.19 apart": factors(-2, 6, per_doubling=4),
    "budget 0.02": partial(walked, budget=0.02),
    "budget 0.1": partial(walked, budget=0.1),
    "5 steps": partial(walked, steps=5),
}


def variant(model: str, part: str, name: str, labels: Labels) -> Rows:
    """What the masks of a variant do, found on half of the answers; on the choice split."""
    case = opened(ModelSpec(model), part, "choice")
    return case.searched(VARIANTS[name], SIZES, labels)


# %% [markdown]
# ## What is read off


# %%
def variants(rows: Rows) -> pd.DataFrame:
    """A line for each variant: areas in nats / of the rate, and where harm ends."""
    of_sizes = Rows(row for row in rows if row.labels.get("size", 0.0) in (0.0, *SIZES))
    cases = by_method(of_sizes)
    lines = []
    for name in VARIANTS:
        if name not in cases:
            continue
        line = {"setting": name}
        for model, part in product(MODELS, HALVES):
            value = cases[name].get(("shipped", model, part))
            if value is not None:
                end = percent(value.ends_at, 2)
                line[f"{model} {part}"] = f"{value.nats:.2f} / {value.rate:.2f}, {end}"
        lines.append(line)
    return pd.DataFrame(lines).fillna("-")


# %%
def main(
    out: Annotated[Path, typer.Option(help="Folder for rows.jsonl; resumes.")],
    setting: Annotated[
        list[str] | None, typer.Option(help="Variant; repeat.", show_default="all")
    ] = None,
    part: Annotated[
        list[str] | None, typer.Option(help="Half of the answers; repeat.", show_default="A and B")
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes of one thread each.")] = 2,
) -> None:
    jobs = []
    for half in part or HALVES:
        for name in setting or VARIANTS:
            for model in MODELS:
                labels = {"ladder": "shipped", "model": model, "part": half, "method": name}
                jobs.append(Job(labels, partial(variant, model, half, name, labels)))
    rows = run_jobs(out, jobs, {"sizes": str(SIZES)}, workers=workers, name="defaults")
    Console().print(frame_table(variants(rows)))


if __name__ == "__main__":
    typer.run(main)
