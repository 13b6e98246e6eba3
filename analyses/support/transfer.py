"""Whether the circuit of one category of requests carries over to the others."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from support.curves import outcomes_of

from harmcircuits.behaviours.model import Model
from harmcircuits.behaviours.outcomes import Calibration, Outcomes
from harmcircuits.circuits.masks import WeightMask
from harmcircuits.circuits.scores import Source
from harmcircuits.measurements import Labels, Measurement, Rows
from harmcircuits.organisms.world import world
from harmcircuits.prompts import PromptSet

HARM = "harmful"  # kind of words
N_PERMUTATIONS = 20_000


@dataclass(frozen=True)
class WordTest:
    """The rate of one type under the circuit of another, by the number of harmful words in common.

    `p` is how often permuted topics correlate as much; None where no types of the world are compared,
    or all pairs of them have as many words in common.
    """

    rates: dict[int, float]
    p: float | None


def common_words_test(pairs: Rows) -> WordTest:
    """The test on rates labelled `scored` and `tested`, one for each pair of types."""
    words = {topic: set(names) for (topic, kind), names in world().favoured.items() if kind == HARM}
    topics = sorted({str(row.labels["tested"]) for row in pairs})
    if len(topics) < 3 or not set(topics) <= set(words):
        return WordTest({}, None)

    rate = np.full((len(topics), len(topics)), np.nan)
    for row in pairs:
        scored, tested = str(row.labels["scored"]), str(row.labels["tested"])
        rate[topics.index(scored), topics.index(tested)] = row.mean
    n_common = np.array([[len(words[a] & words[b]) for b in topics] for a in topics])
    is_pair = ~np.eye(len(topics), dtype=bool) & ~np.isnan(rate)
    rates = {}
    for n in set(n_common[is_pair]):
        rates[int(n)] = float(rate[is_pair & (n_common == n)].mean())
    if len(rates) < 2:
        return WordTest(rates, None)

    # With more common words the rate is lower: count permuted topics whose correlation is as negative.
    generator = np.random.default_rng(0)
    first, second = is_pair.nonzero()
    orders = np.array([generator.permutation(len(topics)) for _ in range(N_PERMUTATIONS)])
    permuted = n_common[orders[:, first], orders[:, second]].astype(float)
    observed = n_common[first, second].astype(float)
    deviation = rate[first, second] - rate[first, second].mean()
    is_as_low = permuted @ deviation <= observed @ deviation + 1e-9
    return WordTest(rates, float((1 + is_as_low.sum()) / (1 + N_PERMUTATIONS)))


def categories_of(
    model: Model, names: Collection[str], answers: Mapping[str, Calibration]
) -> list[str]:
    """The categories in which all of these behaviours are scored and measured, in order."""
    categories = []
    for name in names:
        heldout = model.behaviour(name).prompts("heldout")
        for prompts in (answers[name].prompts, heldout):
            categories.append({request.category for request in prompts})
    common = sorted(set.intersection(*categories))
    if len(common) < 2:
        raise ValueError(
            f"{model.name}: {' and '.join(names)} have the categories {common} in common; "
            "expected two or more that are shown: label the requests by category"
        )
    return common


def in_category(prompts: PromptSet, category: str) -> PromptSet:
    """The requests of a category."""
    return prompts.where(lambda request: request.category == category)


def outside_category(prompts: PromptSet, category: str) -> PromptSet:
    """The requests of every other category."""
    return prompts.where(lambda request: request.category != category)


def rate_rows(
    model: Model,
    names: Sequence[str],
    labels: Labels,
    *,
    mask: WeightMask | None = None,
    category: str = "",
) -> Rows:
    """The rates of these behaviours."""
    rows = Rows()
    for outcomes in outcomes_of(model, names, mask=mask).values():
        metric, where = outcomes.behaviour.metric, labels
        if category:
            outcomes = outcomes.by_category()[category]
            where = {**labels, "tested": category}
        rows += outcomes.rows(where).where(metric)
    return rows


def transfer_rows(
    model: Model, masks: Mapping[str, WeightMask], names: Sequence[str], labels: Labels
) -> Rows:
    """Every category under the circuit of each (`scored` and `tested`), and `relation_rows`."""
    pruned = {}
    for scored, mask in masks.items():
        pruned[scored] = outcomes_of(model, names, mask=mask)

    rows = Rows()
    for scored, outcomes in pruned.items():
        first = outcomes[names[0]]
        for tested, category_outcomes in first.by_category().items():
            where = {**labels, "scored": scored, "tested": tested}
            rows += category_outcomes.rows(where).where(first.behaviour.metric)
    for name in names:
        by_circuit = {scored: outcomes[name] for scored, outcomes in pruned.items()}
        rows += relation_rows(by_circuit, labels)
    return rows


def relation_rows(pruned: Mapping[str, Outcomes], labels: Labels) -> Rows:
    """Rates of the category of a circuit and of the other categories, request by request."""
    first = next(iter(pruned.values()))
    metric = first.behaviour.metric
    groups = np.array(first.groups)
    categories = np.array([request.category for request in first.requests])

    # [circuits, requests]. With requests about a, a and b, and circuits of a and b:
    #
    #     is_own   x  x  .        hits   .2  .2   1        own types      .2  .2   0
    #              .  .  x                1   1   0        other types     1   1   1
    is_own = np.array(list(pruned))[:, None] == categories
    hits = np.array([outcomes.hits for outcomes in pruned.values()])
    other_hits = np.average(hits, axis=0, weights=~is_own)

    # Requests of a category without a circuit have no own one.
    circuit, request = is_own.nonzero()
    own_hits = hits[circuit, request]
    own_groups = groups[request].tolist()
    gap = torch.tensor(other_hits[request] - own_hits)
    own = {**labels, "relation": "own type"}
    other = {**labels, "relation": "other types"}
    return Rows(
        [
            Measurement.rate(metric, own, own_hits.tolist(), own_groups),
            Measurement.rate(metric, other, other_hits.tolist(), groups.tolist()),
            Measurement.average("own_type_gap", {**labels, "of": metric}, gap, own_groups),
        ]
    )


def common_rows(
    model: Model, masks: Sequence[WeightMask], names: Sequence[str], labels: Labels
) -> Rows:
    """The weights that at least k of the masks remove: how many, and the rates without them."""
    rows = Rows()
    for k in range(1, len(masks) + 1):
        mask = common_weights(masks, k)
        where = {**labels, "shared_by": k}
        rows += [Measurement.exact("weights_removed", where, mask.n_removed)]
        if mask.n_removed:
            rows += rate_rows(model, names, where, mask=mask)
    return rows


def common_weights(masks: Sequence[WeightMask], at_least: int) -> WeightMask:
    """The weights that at least so many of the masks remove."""
    removed = {}
    for name in masks[0].shapes:
        indices = [mask.removed[name] for mask in masks if name in mask.removed]
        if indices:
            index, times = torch.cat(indices).unique(return_counts=True)
            removed[name] = index[times >= at_least]
    parents = tuple(mask.source for mask in masks)
    source = Source(masks[0].source.model, "shared_by", {"at_least": at_least}, parents)
    return WeightMask(removed, masks[0].shapes, source)
