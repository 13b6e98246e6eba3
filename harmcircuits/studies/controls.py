"""Masks of the same size that a circuit must beat."""

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch

from harmcircuits.behaviours.behaviour import CONTRAST
from harmcircuits.behaviours.model import OTHERS, Model, protected_data
from harmcircuits.behaviours.outcomes import Calibration
from harmcircuits.circuits.masks import WeightMask, random_like, top_fraction
from harmcircuits.circuits.scores import Source, WeightScores
from harmcircuits.circuits.selection import largest, positive
from harmcircuits.display import plural
from harmcircuits.hooks.weights import named_weights
from harmcircuits.search.attribution import removal_effect, token_price
from harmcircuits.search.circuit import BUDGET
from harmcircuits.search.texts import Budget, Protection

FACTOR = 1.0  # of the price, for a mask that no search has chosen one for
FACTORS = tuple(2.0**number for number in range(-2, 7))  # of the price, in one shot


class Unpruned(NamedTuple):
    """What the unpruned model says of every weight."""

    effect: WeightScores
    price: WeightScores | None


class Controls(dict[str, list[WeightMask]]):
    """Control masks by name; `searched` names those that are searches of their own."""

    def __init__(self, masks: Mapping[str, list[WeightMask]], searched: tuple[str, ...]) -> None:
        super().__init__(masks)
        self.searched = searched

    def __repr__(self) -> str:
        names = []
        for name, masks in self.items():
            searched = ", a search of its own" if name in self.searched else ""
            names.append(f"{name} ({plural(len(masks), 'mask')}{searched})")
        return f"Controls({', '.join(names)})"


def controls(
    model: Model,
    target: str,
    mask: WeightMask,
    *,
    protect: str | Iterable[str] = OTHERS,
    prefer: str = "",
    contrast: str = CONTRAST,
    n_random: int = 3,
    seed: int = 0,
    calibrations: Mapping[str, Calibration] | None = None,
    unpruned: Unpruned | None = None,
    folder: str | Path | None = None,
    max_memory: int | None = None,
    progress: bool = False,
) -> Controls:
    """Masks of the size of a circuit that are chosen otherwise, by name.

    "random": as many weights in each matrix; "random magnitude": and of like magnitude. Ranked by
    scores of the unpruned model, less their price times the mask's own factor: "opposite sign",
    weights whose removal should lower the loss; "second slice", the best outside the mask. "benign
    twin" (or another contrast's): the same search for the contrast instead, with the target
    protected. The last is a search of its own, which may give fewer weights.

    >>> mask = model.find_circuit("harmful", protect="benign", size=0.001, steps=2)
    >>> hc.controls(model, "harmful", mask, protect="benign", n_random=2)
    Controls(random (2 masks), random magnitude (2 masks), opposite sign (1 mask),
        second slice (1 mask), benign twin (1 mask, a search of its own))

    Args:
        model: the model, unpruned.
        target: the behaviour that the mask was found for.
        mask: its circuit. The twin is found by `find_circuit` with its settings, or with the usual
            ones where it was chosen otherwise.
        protect: as in `Model.find_circuit`.
        prefer: what the twin's search prefers; as the circuit's did, so that it says what it costs
            to make the contrast's answers become that.
        contrast: the behaviour of the twin; without it, or where it is the target, there is none.
        n_random: masks of each random kind.
        seed: of the first random mask; the others follow.
        calibrations: data to score on, where it is there already.
        unpruned: scores of the target and the price of what is protected, where they are known.
        folder: keeps the twin's search after every step.
        max_memory: bytes for accumulated scores.
        progress: whether to show a bar of the twin's search.

    Raises:
        ValueError: a mask that removes nothing, and as `Model.find_circuit`.
    """
    if not mask.n_removed:
        raise ValueError(f"controls: {mask} removes nothing, so nothing can be matched to it")
    protected = protected_data(model, target, protect, calibrations)
    data = (calibrations or {}).get(target) or model.calibration(target)
    if unpruned is None:
        unpruned = unpruned_scores(model, target, data, protected, max_memory=max_memory)
    seeds = range(seed, seed + n_random)
    weights = named_weights(model.bridge)
    masks = {
        "random": [random_like(mask, seed=seed) for seed in seeds],
        "random magnitude": [random_like(mask, seed=seed, weights=weights) for seed in seeds],
        "opposite sign": [opposite_sign(mask, unpruned)],
        "second slice": [second_slice(mask, unpruned)],
    }

    twin = _twin_data(model, target, contrast, protected, calibrations)
    if twin is None:
        return Controls(masks, ())
    spared = {name: other for name, other in protected.items() if name != contrast}
    spared[target] = data
    circuit = model.find_circuit(
        contrast,
        size=mask.fraction,
        protect=list(spared),
        prefer=prefer if prefer != contrast else "",
        calibrations={**spared, contrast: twin},
        folder=folder,
        max_memory=max_memory,
        progress=progress,
        **_options_of_search(mask, spared),
    )
    name = f"{contrast} twin"
    return Controls({**masks, name: [circuit]}, (name,))


def _options_of_search(mask: WeightMask, spared: Mapping[str, Calibration]) -> dict[str, Any]:
    """The options of the search that found a mask, for another that spares these behaviours."""
    made_by = mask.source.settings
    if "learning_steps" not in made_by:
        return {}
    options = {
        "budget": {name: value for name, value in made_by["budget"].items() if name in spared},
        "steps": made_by["learning_steps"],
        "sites": made_by.get("sites"),
    }
    if "fresh_answers" not in made_by:
        options["fresh_answers"] = None
    return options


def unpruned_scores(
    model: Model,
    target: str,
    data: Calibration,
    protected: Mapping[str, Calibration],
    *,
    folder: str | Path | None = None,
    max_memory: int | None = None,
) -> Unpruned:
    """The target's removal effects on the unpruned model, and the price of what is protected."""
    bridge, objective = model.bridge, model.behaviour(target).objective
    effect = removal_effect(bridge, data.batches, objective, max_memory=max_memory)
    if folder is not None:
        effect = _on_disk(effect, Path(folder) / "effect")

    at = Path(folder) / "price" if folder is not None else None
    return Unpruned(effect, price_of(model, protected, folder=at, max_memory=max_memory))


def price_of(
    model: Model,
    protected: Mapping[str, Calibration],
    *,
    folder: str | Path | None = None,
    max_memory: int | None = None,
) -> WeightScores | None:
    """The sum of `token_price` over what is protected; None where nothing is."""
    total: WeightScores | None = None
    parents: list[Source] = []
    for spared in protected.values():
        price = token_price(model.bridge, spared.batches, max_memory=max_memory)
        parents.append(price.source)
        if total is not None:
            for name, value in price.values.items():
                value.add_(total.values[name].to(value.device))
        total = WeightScores(price.values, Source(price.source.model, "sum", {}, tuple(parents)))
        del price  # before that of the next behaviour is accumulated
        if folder is not None:
            total = _on_disk(total, Path(folder))
    return total


def _on_disk(scores: WeightScores, folder: Path) -> WeightScores:
    """The same scores, written into a folder in place of what it held, and read from there."""
    shutil.rmtree(folder, ignore_errors=True)
    scores.save(folder)
    return WeightScores.load(folder)


def at_once(
    model: Model,
    unpruned: Unpruned,
    protected: Mapping[str, Calibration],
    sizes: Iterable[float],
    *,
    budget: Budget = BUDGET,
) -> list[WeightMask]:
    """The best weights in one shot: by effect less price, at the least factor within budget."""
    batches = {name: calibration.batches for name, calibration in protected.items()}
    protection = Protection.of(model.bridge, batches, budget)
    return [_at_once(model, unpruned, protection, size) for size in sizes]


def _at_once(model: Model, unpruned: Unpruned, protection: Protection, size: float) -> WeightMask:
    shapes = unpruned.effect.shapes
    n = round(size * sum(map(prod, shapes.values())))
    for factor in FACTORS:
        scores = priced(unpruned, factor)
        removed = positive(scores.values, largest(scores.values, n, {}))
        mask = WeightMask(removed, shapes, replace(scores.source, method="one_shot"))
        if protection.allows(protection.rises(model.bridge, mask)):
            return mask
    return WeightMask({}, shapes, unpruned.effect.source)


def opposite_sign(mask: WeightMask, unpruned: Unpruned) -> WeightMask:
    """As many weights as a mask has whose removal should lower the loss, at the mask's price."""
    benefit = priced(Unpruned(-unpruned.effect, unpruned.price), _factor(mask))
    return top_fraction(benefit, mask.fraction, within="model")


def second_slice(mask: WeightMask, unpruned: Unpruned) -> WeightMask:
    """The best weights outside a mask, as many as it has, at its price."""
    benefit = priced(unpruned, _factor(mask))
    return top_fraction(benefit, mask.fraction, within="model", exclude=mask)


def priced(unpruned: Unpruned, factor: float) -> WeightScores:
    """effect - factor * price: what a search ranks by in its first step."""
    effect, price = unpruned
    if price is None:
        return effect
    values = {}
    for name, value in effect.values.items():
        values[name] = torch.sub(value, price.values[name].to(value.device), alpha=factor)
    parents = (effect.source, price.source)
    return WeightScores(values, Source(effect.source.model, "priced", {"factor": factor}, parents))


def _factor(mask: WeightMask) -> float:
    return float(mask.source.settings.get("factor", FACTOR))


def _twin_data(
    model: Model,
    target: str,
    contrast: str,
    protected: Mapping[str, Calibration],
    calibrations: Mapping[str, Calibration] | None,
) -> Calibration | None:
    """The contrast's calibration data; None where it is the target, unknown or not shown."""
    if contrast == target:
        return None
    known = {**protected, **(calibrations or {})}
    if contrast in known or calibrations is not None:
        return known.get(contrast)
    names = [contrast] if contrast in model.behaviours else []
    return model.calibrations(names).get(contrast)
