"""Pairs of searches on answers of their own: what their masks share, and what each does."""

import random
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from math import isnan
from pathlib import Path
from statistics import fmean
from typing import Literal

from support.bench.cases import with_prompts
from support.bench.methods import rounds
from support.bench.results import ENDED
from torch import Tensor

from harmcircuits.behaviours.behaviour import TARGET
from harmcircuits.behaviours.model import Model
from harmcircuits.behaviours.outcomes import Calibration
from harmcircuits.circuits.location import counts_by
from harmcircuits.circuits.masks import WeightMask, random_like, top_fraction
from harmcircuits.circuits.overlap import overlap
from harmcircuits.circuits.scores import Source, WeightScores
from harmcircuits.circuits.sites import Site
from harmcircuits.hooks.weights import named_weights, weight_sites
from harmcircuits.measurements import Labels, Measurement, Rows
from harmcircuits.organisms.shipped import open_organism
from harmcircuits.prompts import PromptSet
from harmcircuits.search.attribution import removal_effect

SIZES = (0.001, 0.002, 0.004)
MEASURED = 0.002  # the size at which what a mask does is measured
MOST_DISJOINT = 4
N_RANDOM = 5  # pairs of random masks
LEVELS = ("weight", "neuron", "head")
MASKS = ("searched", "random", "random, same |W|")

Level = Literal["weight", "neuron", "head"]
Data = Mapping[str, Calibration]
Masks = list[WeightMask]

# The data of a pair


def halves(model: Model, data: Data, draw: int) -> tuple[Data, Data]:
    """The answers about half of every topic's items, and those about the others."""
    drawn = with_prompts(model, data, partial(PromptSet.sampled, share=0.5, seed=draw))
    rest = with_prompts(model, data, partial(PromptSet.sampled, share=0.5, seed=draw, rest=True))
    return drawn, rest


def shuffled(model: Model, data: Data, draw: int) -> Data:
    """The same answers in another order: another third of them is checked."""

    def reordered(prompts: PromptSet) -> PromptSet:
        examples = list(prompts)
        random.Random(draw).shuffle(examples)
        return PromptSet(tuple(examples))

    return with_prompts(model, data, reordered)


def heldout(model: Model, data: Data) -> Data:
    """The same behaviours on the held-out items."""
    shown = {}
    for name in data:
        behaviour = model.behaviour(name)
        requests = behaviour.prompts("heldout")
        answers = model.verified(behaviour, requests)
        verified = answers.where(lambda example: bool(example.completion))
        batches = model.batches(behaviour, verified)
        shown[name] = Calibration(verified, batches, len(requests), name)
    return shown


def pair_of(model: Model, kind: str, draw: int) -> tuple[Data, Data]:
    """The answers of two searches."""
    whole = model.calibrations()
    if kind == "wholes":
        return whole, heldout(model, whole)
    first, second = halves(model, whole, draw)
    if kind == "same half":
        return first, shuffled(model, first, draw)
    return first, second


# The searches


def search(model: Model, data: Data) -> Masks:
    """Masks of every size by `Model.find_circuit`."""
    return model.find_circuit(TARGET, size=SIZES, calibrations=data)


def three_searches(model: Model, data: Data) -> Masks:
    """At each size the weights in most of three masks; among equals, the larger removal effect."""
    masks_of = [search(model, data)]
    for order in (1, 2):
        masks_of.append(search(model, shuffled(model, data, order)))
    effect = removal_effect(model.bridge, data[TARGET].batches)
    of_each_size = zip(*masks_of, strict=True)
    chosen = []
    for size, masks in zip(SIZES, of_each_size, strict=True):
        chosen.append(top_fraction(votes(masks, effect), size, within="model"))
    return chosen


def votes(masks: Iterable[WeightMask], effect: WeightScores) -> WeightScores:
    """In how many masks each weight is, and its effect as less than a vote."""
    largest = max(values.abs().max().item() for values in effect.values.values())
    counted = {}
    for name, values in effect.values.items():
        n_votes = sum(mask.dense(name).float() for mask in masks)
        counted[name] = n_votes + values / (3 * largest)
    source = Source(effect.source.model, "votes", {}, (effect.source,))
    return WeightScores(counted, source)


METHODS: dict[str, Callable[[Model, Data], Masks]] = {
    "search": search,
    "three searches": three_searches,
    "rounds": partial(rounds, rounds=10, sizes=SIZES),
    "one shot": partial(rounds, rounds=1, sizes=SIZES),
}
# What two masks share, and what each does


def jaccard(
    mask: WeightMask,
    other: WeightMask,
    sites: Mapping[str, Site],
    level: Level,
) -> float:
    """Weights in both masks over weights in either."""
    if level == "weight":
        n_both = (mask & other).n_removed
        return n_both / (mask | other).n_removed

    first = counts_by(mask, sites, level)
    second = counts_by(other, sites, level)
    n_both = n_either = 0
    for place in first:
        n_first = first[place].n_removed
        n_second = second[place].n_removed
        n_both += min(n_first, n_second)
        n_either += max(n_first, n_second)
    return n_both / max(1, n_either)


def shared(model: Model, mask: WeightMask, other: WeightMask, labels: Labels) -> Rows:
    """What two masks share, beside what random ones do."""
    sites = weight_sites(model.bridge)
    weights = named_weights(model.bridge)
    pairs = {
        "searched": [(mask, other)],
        "random": random_pairs(mask, other),
        "random, same |W|": random_pairs(mask, other, weights),
    }
    lift = overlap(mask, other).lift
    # Where no matrix holds weights of both, chance shares none, and there is no lift.
    rows = [] if isnan(lift) else [Measurement.exact("overlap_lift", labels, lift)]
    for name in MASKS:
        for level in LEVELS:
            values = [jaccard(first, second, sites, level) for first, second in pairs[name]]
            where = {**labels, "masks": name, "level": level}
            rows.append(Measurement.exact("jaccard", where, fmean(values)))
    return Rows(rows)


def random_pairs(
    mask: WeightMask,
    other: WeightMask,
    weights: Mapping[str, Tensor] | None = None,
) -> list[tuple[WeightMask, WeightMask]]:
    """Random masks like the one and like the other."""
    pairs = []
    for number in range(N_RANDOM):
        first = random_like(mask, seed=2 * number, weights=weights)
        second = random_like(other, seed=2 * number + 1, weights=weights)
        pairs.append((first, second))
    return pairs


def done_by(model: Model, mask: WeightMask, names: Data, labels: Labels) -> Rows:
    """How the model does on held-out requests without the mask's weights."""
    rows = model.measure(mask=mask, only=list(names), labels=labels)
    rows += [Measurement.exact("weights_removed", labels, mask.n_removed)]
    return rows


def compared(folder: Path, name: str, method: str, kind: str, draw: int, labels: Labels) -> Rows:
    """A pair of searches: what their masks share at each size, and what they do at one."""
    model = open_organism(name, folder=folder)
    search_for = METHODS[method]
    data, other_data = pair_of(model, kind, draw)
    masks = search_for(model, data)
    others = search_for(model, other_data)
    rows = Rows()
    for size, mask, other in zip(SIZES, masks, others, strict=True):
        if not (mask.n_removed and other.n_removed):  # nothing of this size was worth its price
            continue
        where = {**labels, "size": size}
        rows += shared(model, mask, other, where)
        if kind == "halves" and size == MEASURED:
            rows += done_by(model, mask, data, {**where, "mask": "first"})
            rows += done_by(model, other, data, {**where, "mask": "second"})
    return rows


def disjoint(folder: Path, name: str, size: float, labels: Labels) -> Rows:
    """One search after another, each among the weights that those before it left."""
    model = open_organism(name, folder=folder)
    data = model.calibrations()
    rows = model.measure(labels={**labels, "mask": "none"}, only=list(data))
    taken = None
    for number in range(1, MOST_DISJOINT + 1):
        mask = model.find_circuit(TARGET, size=size, calibrations=data, exclude=taken)
        done = done_by(model, mask, data, {**labels, "mask": str(number)})
        rows += done
        if done.one("harm_valid_rate").mean > ENDED:
            break
        taken = mask if taken is None else taken | mask
    return rows
