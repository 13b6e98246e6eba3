"""Masks beyond a search's budget: what harmful answers become under them, and what they cost.

Weights are chosen in one shot, by several rankings and at several factors of the price of what is
protected, and read by the same figures under every mask.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from harmcircuits.behaviours.calibration import Calibration
from harmcircuits.behaviours.model import Model
from harmcircuits.behaviours.outcomes import Outcomes
from harmcircuits.behaviours.standard import CONTRAST, TARGET
from harmcircuits.circuits.masks import WeightMask, random_like
from harmcircuits.circuits.scores import WeightScores
from harmcircuits.circuits.units import Units
from harmcircuits.hooks.attribution import removal_effect, token_price
from harmcircuits.hooks.objectives import token_error
from harmcircuits.hooks.search import PREFERENCE, set_difference
from harmcircuits.hooks.weights import weight_sites
from harmcircuits.measurements import Labels, Measurement, Rows
from harmcircuits.studies import by_loss
from harmcircuits.studies.controls import Unpruned, above_zero, opposite_sign, priced
from harmcircuits.studies.curves import outcomes_of
from harmcircuits.studies.grid import P_OVER_Q

ALIKE = "prefilled"  # benign answers that begin as the harmful ones do
REFUSAL = "refusal"
ANSWERED = (TARGET, "borderline")  # the others are read by their losses, which need no answers

Masks = Iterator[tuple[str, WeightMask]]


def circuits(
    model: Model,
    unpruned: Unpruned,
    answers: Mapping[str, Calibration],
    *,
    size: float,
    factors: Sequence[float],
    n_first: int,
) -> Masks:
    """Single weights, by five rankings at every factor; scores of one ranking at a time.

    The last, "refusals preferred", is the first step of a search that prefers refusals, where the
    model refuses anything.

    Args:
        model: the model, unpruned.
        unpruned: the target's effect, and the price of what is protected.
        answers: calibration data of the target and of benign answers, and of refusals if any.
        size: share of the weights in a mask, at most.
        factors: what the price is multiplied by.
        n_first: so many tokens of an answer count as its first ones.
    """
    bridge, price = model.bridge, unpruned.price

    def at_factors(ranking: str, effect: WeightScores) -> Masks:
        for factor in factors:
            scores = priced(Unpruned(effect, price), factor)
            yield f"{ranking}, factor {factor:.2g}", above_zero(scores, size)

    yield from at_factors("one shot", unpruned.effect)
    harm = answers[TARGET].batches
    yield from at_factors("token error", removal_effect(bridge, harm, token_error))
    begun = [batch.beginning(n_first) for batch in harm]
    yield from at_factors("first tokens", removal_effect(bridge, begun))
    alike = removal_effect(bridge, answers.get(ALIKE, answers[CONTRAST]).batches)
    yield from at_factors("less begun alike", priced(Unpruned(unpruned.effect, alike), 1.0))
    del alike
    if REFUSAL in answers:
        refusals = removal_effect(bridge, model.preferred(TARGET, REFUSAL, answers))
        benefit = priced(Unpruned(unpruned.effect, refusals), PREFERENCE)
        yield from at_factors("refusals preferred", benefit)


def neurons(model: Model, unpruned: Unpruned, *, size: float, factors: Sequence[float]) -> Masks:
    """Whole neurons, by the mean over their weights, at every factor.

    Args:
        model: the model, unpruned.
        unpruned: the target's effect, and the price of what is protected.
        size: share of the weights in a mask, at most.
        factors: what the price is multiplied by; less than for weights, since the absolute values
            of a price do not cancel within a neuron.
    """
    sites = weight_sites(model.bridge)
    units = Units.of(sites, "neuron", list(sites))
    n = round(size * sum(site.parameter.numel() for site in sites.values()))
    for factor in factors:
        scores = priced(unpruned, factor)
        removed = units.largest(scores.values, n, {})
        yield f"neurons, factor {factor:.2g}", WeightMask(removed, scores.shapes, scores.source)


def controls(
    model: Model,
    unpruned: Unpruned,
    answers: Mapping[str, Calibration],
    mask: WeightMask,
    *,
    size: float,
) -> Masks:
    """Beside a mask in one shot.

    "random" and "opposite sign" are as large as the mask; "benign twin" is chosen as the mask is,
    for benign answers with the target protected, and at most as large; "published" is the
    `set_difference` of q = `size` and p = 5 q, which knows no price.

    Args:
        model: the model, unpruned.
        unpruned: the target's effect, and the price of what is protected.
        answers: calibration data of the target and of benign answers.
        mask: one of `circuits`.
        size: share of the weights in a mask, at most.
    """
    bridge, harm, benign = model.bridge, answers[TARGET].batches, answers[CONTRAST].batches
    yield "random", random_like(mask)
    yield "opposite sign", opposite_sign(mask, unpruned)

    twin = Unpruned(removal_effect(bridge, benign), token_price(bridge, harm))
    scores = priced(twin, float(mask.source.settings["factor"]))
    yield "benign twin", above_zero(scores, mask.fraction)
    del twin, scores
    yield "published", set_difference(bridge, harm, [benign], q=size, p=P_OVER_Q * size)


class State(NamedTuple):
    """What a model does with held-out requests.

    Attributes:
        answered: what it does with those that it is asked, by behaviour.
        losses: of the other behaviours' reference answers; nats per token.
    """

    answered: Mapping[str, Outcomes]
    losses: Mapping[str, Float[Tensor, " n"]]


def state_of(model: Model) -> State:
    """The model as it stands.

    Args:
        model: the model.
    """
    answered = [name for name in ANSWERED if name in model.behaviours]
    read = []
    for name in model.whole_behaviours:
        if name not in ANSWERED and len(model.behaviours[name].references("heldout")):
            read.append(name)
    return State(outcomes_of(model, answered), by_loss.losses(model, read))


def state_rows(model: Model, now: State, labels: Labels, *, before: State | None = None) -> Rows:
    """Rates and losses, and how far they have changed.

    Args:
        model: the model.
        now: its state, such as under a mask.
        labels: what the rows carry.
        before: its state unpruned; without it, no changes.
    """
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
    """What the model's answers to the target's requests are when they are begun otherwise.

    The judge reads what follows as if it followed the usual beginning, which it takes off.

    Args:
        model: the model as it stands.
        openings: beginnings of answers; each is the label `opening` of its rows.
        labels: what the rows carry besides.
    """
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
