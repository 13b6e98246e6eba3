"""Masks beyond a search's budget: what harmful answers become under them, and what they cost."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from harmcircuits.circuits.units import Units
from jaxtyping import Float
from support import by_loss
from support.curves import outcomes_of
from torch import Tensor

from harmcircuits.behaviours.behaviour import CONTRAST, REFUSAL, TARGET
from harmcircuits.behaviours.model import Model, preferred_batches
from harmcircuits.behaviours.outcomes import Calibration, Outcomes
from harmcircuits.circuits.masks import WeightMask, random_like
from harmcircuits.circuits.scores import WeightScores
from harmcircuits.hooks.objectives import token_error
from harmcircuits.hooks.weights import weight_sites
from harmcircuits.measurements import Labels, Measurement, Rows
from harmcircuits.search.attribution import removal_effect, token_price
from harmcircuits.search.circuit import set_difference
from harmcircuits.studies.controls import UnprunedScores, opposite_sign, priced
from harmcircuits.studies.study import P_OVER_Q

ALIKE = "prefilled"  # benign answers that begin as the harmful ones do
PREFERENCE = 0.3  # of a nat of the target's loss
ANSWERED = (TARGET, "borderline")  # the others are read by their losses, which need no answers

Masks = Iterator[tuple[str, WeightMask]]


def circuits(
    model: Model,
    unpruned: UnprunedScores,
    answers: Mapping[str, Calibration],
    *,
    size: float,
    factors: Sequence[float],
    n_first: int,
) -> Masks:
    """Single weights, by five rankings at every factor; scores of one ranking at a time."""
    bridge, price = model.bridge, unpruned.price

    def at_factors(ranking: str, effect: WeightScores) -> Masks:
        for factor in factors:
            scores = priced(UnprunedScores(effect, price), factor)
            yield f"{ranking}, factor {factor:.2g}", by_loss.above_zero(scores, size)

    yield from at_factors("one shot", unpruned.effect)
    harm = answers[TARGET].batches
    yield from at_factors("token error", removal_effect(bridge, harm, token_error))
    begun = [batch.beginning(n_first) for batch in harm]
    yield from at_factors("first tokens", removal_effect(bridge, begun))
    alike = removal_effect(bridge, answers.get(ALIKE, answers[CONTRAST]).batches)
    yield from at_factors("less begun alike", priced(UnprunedScores(unpruned.effect, alike), 1.0))
    del alike
    if REFUSAL in answers:
        others = {name: of_name for name, of_name in answers.items() if name != TARGET}
        behind = preferred_batches(model, answers[TARGET], TARGET, REFUSAL, others)
        refusals = removal_effect(bridge, behind["preferred"])
        benefit = priced(UnprunedScores(unpruned.effect, refusals), PREFERENCE)
        yield from at_factors("refusals preferred", benefit)


def neurons(
    model: Model, unpruned: UnprunedScores, *, size: float, factors: Sequence[float]
) -> Masks:
    """Whole neurons, by the mean over their weights, at every factor."""
    sites = weight_sites(model.bridge)
    units = Units.of(sites, "neuron", list(sites))
    n = round(size * sum(site.parameter.numel() for site in sites.values()))
    for factor in factors:
        scores = priced(unpruned, factor)
        removed = units.largest(scores.values, n, {})
        yield f"neurons, factor {factor:.2g}", WeightMask(removed, scores.shapes, scores.source)


def controls(
    model: Model,
    unpruned: UnprunedScores,
    answers: Mapping[str, Calibration],
    mask: WeightMask,
    *,
    size: float,
) -> Masks:
    """Beside a mask in one shot."""
    bridge, harm, benign = model.bridge, answers[TARGET].batches, answers[CONTRAST].batches
    yield "random", random_like(mask)
    yield "opposite sign", opposite_sign(mask, unpruned)

    twin = UnprunedScores(removal_effect(bridge, benign), token_price(bridge, harm))
    scores = priced(twin, float(mask.source.settings["factor"]))
    yield "benign twin", by_loss.above_zero(scores, mask.fraction)
    del twin, scores
    yield "published", set_difference(bridge, harm, [benign], q=size, p=P_OVER_Q * size)


class State(NamedTuple):
    """What a model does with held-out requests."""

    answered: Mapping[str, Outcomes]
    losses: Mapping[str, Float[Tensor, " n"]]


def state_of(model: Model) -> State:
    """The model as it stands."""
    answered = [name for name in ANSWERED if name in model.behaviours]
    read = []
    for name in model.whole_behaviours:
        if name not in ANSWERED and len(model.behaviours[name].references("heldout")):
            read.append(name)
    return State(outcomes_of(model, answered), by_loss.losses(model, read))


def state_rows(model: Model, now: State, labels: Labels, *, before: State | None = None) -> Rows:
    """Rates and losses, and how far they have changed."""
    rows = Rows()
    for name, outcomes in now.answered.items():
        rows += outcomes.rows(labels)
        if before is not None:
            rows += outcomes.changes(before.answered[name], labels)
    for name, nll in now.losses.items():
        metric, groups = model.behaviours[name].nll_metric, by_loss.groups(model, name)
        rows += [Measurement.average(metric, labels, nll, groups)]
        if before is not None:
            change = nll - before.losses[name]
            rows += [Measurement.average(f"{metric}_change", labels, change, groups)]
    return rows


def opening_rows(model: Model, openings: Iterable[str], labels: Labels) -> Rows:
    """What the model's answers to the target's requests are when they are begun otherwise."""
    rows = Rows()
    behaviour = model.behaviours[TARGET]
    counted = {behaviour.wanted: behaviour.metric, **behaviour.side_metrics}
    for opening in openings:
        begun = replace(behaviour, prefill=opening)
        answers = model.answers(begun, behaviour.prompts("heldout"))
        as_usual = []
        for example in answers:
            said = example.completion.removeprefix(opening)
            as_usual.append(f"{behaviour.prefill}{said}")
        verdicts = model.verdicts(behaviour, answers.with_completions(as_usual))
        groups = [example.cluster for example in answers]
        where = {**labels, "opening": opening}
        for wanted, metric in counted.items():
            hits = [verdict == wanted for verdict in verdicts]
            rows += [Measurement.rate(metric, where, hits, groups)]
    return rows
