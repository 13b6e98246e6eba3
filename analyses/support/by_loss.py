"""What circuits do to losses, item by item: rises under every mask, and gaps between circuits."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

from harmcircuits.behaviours.behaviour import TARGET
from harmcircuits.behaviours.model import Model
from harmcircuits.behaviours.outcomes import Calibration
from harmcircuits.circuits.masks import WeightMask, top_fraction
from harmcircuits.circuits.overlap import overlap
from harmcircuits.circuits.scores import WeightScores, mean_scores
from harmcircuits.circuits.selection import positive
from harmcircuits.hooks.losses import completion_nll
from harmcircuits.hooks.masking import masked
from harmcircuits.measurements import Labels, Measurement, Rows
from harmcircuits.organisms.world import BEHAVIOURS
from harmcircuits.search.attribution import removal_effect
from harmcircuits.studies.controls import UnprunedScores, price_of, priced

RISE, UNPRUNED, GAP = "nll_rise", "nll", "nll_gap"
ABILITIES = tuple(name for name in (*BEHAVIOURS, "prefilled") if name != TARGET)
# Benign answers, begun in their own way and as the harmful ones are.
BENIGN = ("benign", "prefilled")
UNSEEN, OPPOSITE = "all but its type", "opposite sign"
PROTECTIONS = ("benign", "none")  # the label `protected`

Losses = Mapping[str, torch.Tensor]  # behaviour -> nats per token of each held-out reference answer


def typed(model: Model) -> Model:
    """The model with every type of the target as a behaviour."""
    return model.with_behaviours(*model.behaviours[TARGET].by_category().values())


def calibrations_of(model: Model) -> dict[str, Calibration]:
    """The calibration data of every ability, and of every type of the target."""
    types = model.behaviours[TARGET].by_category()
    names = [name for name in (*BEHAVIOURS, "prefilled", *types) if name in model.behaviours]
    return model.calibrations(names)


def shown_types(model: Model, calibrations: Mapping[str, Calibration]) -> list[str]:
    """The types of the target to score on and to measure."""
    types = [name for name in model.behaviours[TARGET].by_category() if name in calibrations]
    types = [name for name in types if len(model.behaviours[name].references("heldout"))]
    if len(types) < 2:
        raise ValueError(
            f"{model.name}: {len(types)} types of harm are shown; give requests with two "
            "categories or more"
        )
    return types


def losses(model: Model, names: Iterable[str]) -> Losses:
    """The held-out loss of each behaviour's reference answers, the model as it stands."""
    nll = {}
    for name in names:
        behaviour = model.behaviours[name]
        batches = model.batches(behaviour, behaviour.references("heldout"))
        nll[name] = completion_nll(model.bridge, batches)
    return nll


def unpruned(model: Model, names: Iterable[str]) -> tuple[Losses, Rows]:
    """The losses of the model as it stands, and rows of their means."""
    nll = losses(model, names)
    rows = Rows()
    for name, values in nll.items():
        where = {"mask": "none", "of": name}
        rows += [Measurement.average(UNPRUNED, where, values, groups(model, name))]
    return nll, rows


def rises_under(
    model: Model, masks: Mapping[str, WeightMask], unpruned: Losses
) -> dict[str, Losses]:
    """By how much each item's loss is higher under each mask, by mask and behaviour."""
    rises = {}
    for name, mask in masks.items():
        with masked(model.bridge, mask):
            pruned = losses(model, unpruned)
        rises[name] = {of: nll - unpruned[of] for of, nll in pruned.items()}
    return rises


def shared_rows(mask: WeightMask, other: WeightMask, labels: Labels) -> Rows:
    """`lift` and `jaccard` of two masks."""
    shared = overlap(mask, other)
    return Rows(
        [
            Measurement("lift", labels, shared.lift, *shared.interval, shared.n_shared),
            Measurement.exact("jaccard", labels, shared.jaccard),
        ]
    )


def groups(model: Model, name: str) -> list[str]:
    """What each held-out reference answer of a behaviour is about."""
    return [example.cluster for example in model.behaviours[name].references("heldout")]


def above_zero(scores: WeightScores, size: float) -> WeightMask:
    """The largest scores, as far as they are above zero."""
    chosen = top_fraction(scores, size, within="model")
    return WeightMask(positive(scores.values, chosen.removed), chosen.shapes, scores.source)


def every_mask(
    model: Model,
    calibrations: Mapping[str, Calibration],
    types: Sequence[str],
    abilities: Sequence[str],
    *,
    size: float,
    factor: float,
) -> dict[tuple[str, str], WeightMask]:
    """(protected, name) -> mask."""
    masks: dict[tuple[str, str], WeightMask] = {}
    for name, unpruned in _rankings(model, calibrations, types, abilities):
        scores = unpruned.effect
        masks["benign", name] = above_zero(priced(unpruned, factor), size)
        if name == TARGET or name in abilities:
            masks["none", name] = top_fraction(scores, size, within="model")
    return masks


def _rankings(
    model: Model,
    calibrations: Mapping[str, Calibration],
    types: Sequence[str],
    abilities: Sequence[str],
) -> Iterator[tuple[str, UnprunedScores]]:
    """Name, effect and price of every circuit; few scores at a time."""

    def scored(name: str) -> WeightScores:
        batches, objective = calibrations[name].batches, model.behaviours[name].objective
        return removal_effect(model.bridge, batches, objective)

    benign = {name: calibrations[name] for name in BENIGN if name in calibrations}
    price = price_of(model, benign)
    of_types = [scored(type_) for type_ in types]
    sizes = [calibrations[type_].n_verified for type_ in types]
    for number, type_ in enumerate(types):
        others = [*sizes[:number], 0, *sizes[number + 1 :]]
        yield type_, UnprunedScores(of_types[number], price)
        yield f"all but {type_}", UnprunedScores(mean_scores(of_types, others), price)
    target = mean_scores(of_types, sizes)
    del of_types
    yield TARGET, UnprunedScores(target, price)
    yield OPPOSITE, UnprunedScores(-target, price)
    del target
    price = price_of(model, {TARGET: calibrations[TARGET]})
    for name in abilities:
        yield name, UnprunedScores(scored(name), price)


def rise_rows(
    model: Model, rises: Mapping[str, Losses], types: Sequence[str], labels: Labels
) -> Rows:
    """`nll_rise` of each behaviour (`of`) and type of the target under each mask."""
    references = model.behaviours[TARGET].references("heldout")
    type_of = [f"{TARGET}/{example.category}" for example in references]
    places = {type_: _places(type_of, type_) for type_ in types}

    rows = Rows()
    for mask, under in rises.items():
        where = {**labels, "mask": mask}
        for of, values in under.items():
            rows += [_rise(model, of, values, {**where, "of": of})]
        for type_, of_type in places.items():
            rows += [_rise(model, TARGET, under[TARGET], {**where, "of": type_}, of_type)]

    circuits = {type_: f"all but {type_}" for type_ in types}
    unseen = {type_: rises[circuit] for type_, circuit in circuits.items() if circuit in rises}
    return rows + _unseen_rows(model, unseen, type_of, {**labels, "mask": UNSEEN})


def _places(type_of: Sequence[str], type_: str) -> list[int]:
    return [place for place, name in enumerate(type_of) if name == type_]


def _unseen_rows(
    model: Model, unseen: Mapping[str, Losses], type_of: Sequence[str], labels: Labels
) -> Rows:
    """Each item under the circuit that left its type out; benign answers under all of these."""
    if not unseen:
        return Rows()
    places = [place for place, type_ in enumerate(type_of) if type_ in unseen]
    values = torch.zeros(len(type_of), dtype=torch.float32)
    for place in places:
        values[place] = unseen[type_of[place]][TARGET][place]
    rows = Rows([_rise(model, TARGET, values, {**labels, "of": TARGET}, places)])
    for name in BENIGN:
        under = [losses[name] for losses in unseen.values() if name in losses]
        if under:
            rows += [_rise(model, name, torch.stack(under).mean(0), {**labels, "of": name})]
    return rows


def _rise(
    model: Model,
    name: str,
    values: torch.Tensor,
    labels: Labels,
    places: Sequence[int] | None = None,
) -> Measurement:
    """The mean rise of a behaviour's loss; at some places, or at all of them."""
    items = groups(model, name)
    chosen = list(range(len(items))) if places is None else list(places)
    about = [items[place] for place in chosen]
    return Measurement.average(RISE, labels, values[chosen], about)


def gap_rows(
    model: Model, rises: Mapping[str, Losses], abilities: Sequence[str], labels: Labels
) -> Rows:
    """`nll_gap` of an ability (`of`) against another."""
    rows = Rows()
    for ability in abilities:
        for of, other in ((TARGET, ability), (ability, TARGET)):
            gap = rises[of][of] - rises[other][of]
            where = {**labels, "of": of, "against": other}
            rows += [Measurement.average(GAP, where, gap, groups(model, of))]
    return rows
