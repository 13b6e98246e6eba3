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

DEFAULT_FACTOR = 1.0  # of the price, for a mask whose search has no factor
FACTORS = tuple(2.0**exponent for exponent in range(-2, 7))  # of the price, in one shot


class UnprunedScores(NamedTuple):
    """Scores of every weight on the unpruned model."""

    effect: WeightScores
    price: WeightScores | None  # None: nothing is protected


class Controls(dict[str, list[WeightMask]]):
    """Control masks by name; `searched` names the masks that come from a search of their own."""

    def __init__(self, masks: Mapping[str, list[WeightMask]], searched: tuple[str, ...]) -> None:
        super().__init__(masks)
        self.searched = searched

    def __repr__(self) -> str:
        names = []
        for name, masks in self.items():
            ending = ", a search of its own" if name in self.searched else ""
            names.append(f"{name} ({plural(len(masks), 'mask')}{ending})")
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
    unpruned: UnprunedScores | None = None,
    **options: Any,
) -> Controls:
    """Masks of a circuit's size by name, each chosen in another way than the circuit.

    "random" has as many weights in each matrix; "random magnitude" has also similar magnitudes.
    "opposite sign" and "second slice" rank the scores of the unpruned model, effect - factor *
    price, with the circuit's own factor: "opposite sign" takes the weights whose removal should
    lower the loss, "second slice" the best weights outside the mask. "benign twin" (or the twin of
    another contrast) is the matched control: the same search with the contrast as the target, and
    with the target protected. This search may find fewer weights.

    >>> mask = model.find_circuit("harmful", protect="benign", size=0.001, steps=2)
    >>> hc.controls(model, "harmful", mask, protect="benign", n_random=2)
    Controls(random (2 masks), random magnitude (2 masks), opposite sign (1 mask),
        second slice (1 mask), benign twin (1 mask, a search of its own))

    Args:
        model: the model, unpruned.
        target: the behaviour that the mask removes.
        mask: the circuit. `find_circuit` finds the twin with the circuit's settings, or with its
            defaults where the mask has no such settings.
        protect: the retain set, as in `Model.find_circuit`.
        prefer: the behaviour that the twin's search prefers: the same as the circuit's, so that
            the twin shows what this replacement costs the contrast.
        contrast: the behaviour of the twin; "" or the target: no twin.
        n_random: the number of masks of each random kind.
        seed: of the first random mask; the next masks have the next seeds.
        calibrations: the data to score on, if you have it already.
        unpruned: scores of the target and the price of the protected behaviours, if you have them
            already.
        options: of the twin's `hc.find_circuit`: `folder` keeps the search after every step,
            `max_memory` bounds the bytes of all scores, `progress` shows a bar.

    Raises:
        ValueError: a mask that removes nothing, and as `Model.find_circuit`.
    """
    if not mask.n_removed:
        raise ValueError(f"controls: {mask} removes nothing; give a mask with at least one weight")
    protected = protected_data(model, target, protect, calibrations)
    data = (calibrations or {}).get(target) or model.calibration(target)
    if unpruned is None:
        max_memory = options.get("max_memory")
        unpruned = unpruned_scores(model, target, data, protected, max_memory=max_memory)

    seeds = range(seed, seed + n_random)
    weights = named_weights(model.bridge)
    masks = {
        "random": [random_like(mask, seed=seed) for seed in seeds],
        "random magnitude": [random_like(mask, seed=seed, weights=weights) for seed in seeds],
        "opposite sign": [opposite_sign(mask, unpruned)],
        "second slice": [second_slice(mask, unpruned)],
    }

    twin_data = None
    if contrast != target:
        twin_data = _contrast_data(model, contrast, protected, calibrations)
    if twin_data is None:
        return Controls(masks, ())

    retain_set = {**protected, target: data}
    retain_set.pop(contrast, None)
    circuit = model.find_circuit(
        contrast,
        size=mask.fraction,
        protect=list(retain_set),
        prefer=prefer if prefer != contrast else "",
        calibrations={**retain_set, contrast: twin_data},
        **_search_settings(mask, retain_set),
        **options,
    )
    twin = f"{contrast} twin"
    return Controls({**masks, twin: [circuit]}, (twin,))


def _contrast_data(
    model: Model,
    contrast: str,
    protected: Mapping[str, Calibration],
    calibrations: Mapping[str, Calibration] | None,
) -> Calibration | None:
    """The contrast's calibration data; None where the model has no such behaviour to show."""
    if calibrations is not None:
        return calibrations.get(contrast) or protected.get(contrast)
    if contrast in protected or contrast not in model.behaviours:
        return protected.get(contrast)
    return model.calibrations([contrast]).get(contrast)


def _search_settings(mask: WeightMask, retain_set: Mapping[str, Calibration]) -> dict[str, Any]:
    """The settings of a mask's search, for another search with this retain set."""
    settings = mask.source.settings
    if "learning_steps" not in settings:
        return {}
    options = {
        "budget": {name: value for name, value in settings["budget"].items() if name in retain_set},
        "steps": settings["learning_steps"],
        "sites": settings.get("sites"),
    }
    if "fresh_answers" not in settings:
        options["fresh_answers"] = None
    return options


def unpruned_scores(
    model: Model,
    target: str,
    data: Calibration,
    protected: Mapping[str, Calibration],
    *,
    folder: Path | None = None,
    max_memory: int | None = None,
) -> UnprunedScores:
    """The target's removal effects on the unpruned model, and the price of the retain set."""
    objective = model.behaviour(target).objective
    effect = removal_effect(model.bridge, data.batches, objective, max_memory=max_memory)
    if folder is None:
        return UnprunedScores(effect, price_of(model, protected, max_memory=max_memory))

    effect = _on_disk(effect, folder / "effect")
    price = price_of(model, protected, folder=folder / "price", max_memory=max_memory)
    return UnprunedScores(effect, price)


def price_of(
    model: Model,
    protected: Mapping[str, Calibration],
    *,
    folder: Path | None = None,
    max_memory: int | None = None,
) -> WeightScores | None:
    """The sum of `token_price` over the protected behaviours; None where nothing is protected."""
    total: WeightScores | None = None
    parents: list[Source] = []
    for data in protected.values():
        price = token_price(model.bridge, data.batches, max_memory=max_memory)
        parents.append(price.source)
        if total is not None:
            for name, value in price.values.items():
                value.add_(total.values[name].to(value.device))
        total = WeightScores(price.values, Source(price.source.model, "sum", {}, tuple(parents)))
        del price  # frees memory for the next behaviour's price
        if folder is not None:
            total = _on_disk(total, folder)
    return total


def _on_disk(scores: WeightScores, folder: Path) -> WeightScores:
    """The same scores, read from a folder whose former contents they replace."""
    shutil.rmtree(folder, ignore_errors=True)
    scores.save(folder)
    return WeightScores.load(folder)


def one_shot_masks(
    model: Model,
    unpruned: UnprunedScores,
    protected: Mapping[str, Calibration],
    sizes: Iterable[float],
    *,
    budget: Budget = BUDGET,
) -> list[WeightMask]:
    """One-shot pruning: the largest effect - factor * price, at the least factor within budget."""
    batches = {name: data.batches for name, data in protected.items()}
    protection = Protection.of(model.bridge, batches, budget)
    shapes = unpruned.effect.shapes
    n_weights = sum(map(prod, shapes.values()))

    masks = []
    for size in sizes:
        mask = WeightMask({}, shapes, unpruned.effect.source)
        for factor in FACTORS:
            scores = priced(unpruned, factor)
            removed = positive(scores.values, largest(scores.values, round(size * n_weights), {}))
            candidate = WeightMask(removed, shapes, replace(scores.source, method="one_shot"))
            if protection.allows(protection.rises(model.bridge, candidate)):
                mask = candidate
                break
        masks.append(mask)
    return masks


def opposite_sign(mask: WeightMask, unpruned: UnprunedScores) -> WeightMask:
    """As many weights as a mask, whose removal should lower the loss, at the mask's factor."""
    benefit = priced(UnprunedScores(-unpruned.effect, unpruned.price), _factor(mask))
    return top_fraction(benefit, mask.fraction, within="model")


def second_slice(mask: WeightMask, unpruned: UnprunedScores) -> WeightMask:
    """The best weights outside a mask, as many as the mask has, at the mask's factor."""
    benefit = priced(unpruned, _factor(mask))
    return top_fraction(benefit, mask.fraction, within="model", exclude=mask)


def priced(unpruned: UnprunedScores, factor: float) -> WeightScores:
    """effect - factor * price: the ranking of a search in its first step."""
    effect, price = unpruned
    if price is None:
        return effect
    values = {}
    for name, value in effect.values.items():
        values[name] = torch.sub(value, price.values[name].to(value.device), alpha=factor)
    parents = (effect.source, price.source)
    return WeightScores(values, Source(effect.source.model, "priced", {"factor": factor}, parents))


def _factor(mask: WeightMask) -> float:
    return float(mask.source.settings.get("factor", DEFAULT_FACTOR))
