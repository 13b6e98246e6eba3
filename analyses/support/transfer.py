"""Whether the circuit of one category of requests carries over to the others."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from support.curves import outcomes_of

from harmcircuits.behaviours.model import Model
from harmcircuits.behaviours.outcomes import Calibration, Outcomes
from harmcircuits.circuits.masks import WeightMask, union
from harmcircuits.circuits.scores import Source
from harmcircuits.measurements import Labels, Measurement, Rows
from harmcircuits.organisms.world import world
from harmcircuits.prompts import PromptSet

HARM = "harmful"  # kind of words
N_PERMUTATIONS = 20_000


@dataclass(frozen=True)
class SharedWords:
    """What is left of one type under the circuit of another, by the harmful words that they share.

    `p` is how often topics that are permuted correlate as much; None where no types of the world are
    compared, or all pairs of them share as many words.
    """

    left: dict[int, float]
    p: float | None


def shared_words_test(of_pairs: Rows) -> SharedWords:
    """The test on rates labelled `scored` and `tested`, one for each pair of types."""
    words = {topic: set(drawn) for (topic, kind), drawn in world().favoured.items() if kind == HARM}
    topics = sorted({str(row.labels["tested"]) for row in of_pairs})
    if len(topics) < 3 or not set(topics) <= set(words):
        return SharedWords({}, None)

    left = np.full((len(topics), len(topics)), np.nan)
    for row in of_pairs:
        pair = str(row.labels["scored"]), str(row.labels["tested"])
        left[topics.index(pair[0]), topics.index(pair[1])] = row.mean
    n_shared = np.array([[len(words[a] & words[b]) for b in topics] for a in topics])
    is_pair = ~np.eye(len(topics), dtype=bool) & ~np.isnan(left)
    by_number = {
        int(n): float(left[is_pair & (n_shared == n)].mean()) for n in set(n_shared[is_pair])
    }
    if len(by_number) < 2:
        return SharedWords(by_number, None)

    # The more words are shared, the less is left: permuted topics whose correlation is as negative.
    generator = np.random.default_rng(0)
    first, second = is_pair.nonzero()
    orders = np.array([generator.permutation(len(topics)) for _ in range(N_PERMUTATIONS)])
    permuted = n_shared[orders[:, first], orders[:, second]].astype(float)
    observed = n_shared[first, second].astype(float)
    deviation = left[first, second] - left[first, second].mean()
    is_as_low = permuted @ deviation <= observed @ deviation + 1e-9
    return SharedWords(by_number, float((1 + is_as_low.sum()) / (1 + N_PERMUTATIONS)))


def categories_of(
    model: Model,
    names: Collection[str],
    answers: Mapping[str, Calibration],
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


def of_category(prompts: PromptSet, category: str) -> PromptSet:
    """The requests of a category."""
    return prompts.where(lambda request: request.category == category)


def of_others(prompts: PromptSet, category: str) -> PromptSet:
    """The requests of every other category."""
    return prompts.where(lambda request: request.category != category)


def scored_on(
    model: Model,
    name: str,
    prompts: PromptSet,
    answers: Mapping[str, Calibration],
) -> dict[str, Calibration]:
    """The same calibration data, but of one behaviour only these requests."""
    batches = model.batches(model.behaviour(name), prompts)
    few = Calibration(prompts, batches, answers[name].n_asked, name)
    return {**answers, name: few}


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
        counted, where = outcomes, labels
        if category:
            counted = outcomes.by_category()[category]
            where = {**labels, "tested": category}
        rows += counted.rows(where).where(outcomes.behaviour.metric)
    return rows


def transfer_rows(
    model: Model,
    masks: Mapping[str, WeightMask],
    names: Sequence[str],
    labels: Labels,
) -> Rows:
    """Every category under the circuit of each (`scored` and `tested`), and `relation_rows`."""
    under = {}
    for scored, mask in masks.items():
        under[scored] = outcomes_of(model, names, mask=mask)

    rows = Rows()
    for scored, outcomes in under.items():
        first = outcomes[names[0]]
        for tested, of_category in first.by_category().items():
            where = {**labels, "scored": scored, "tested": tested}
            rows += of_category.rows(where).where(first.behaviour.metric)
    for name in names:
        of_name = {scored: outcomes[name] for scored, outcomes in under.items()}
        rows += relation_rows(of_name, labels)
    return rows


def relation_rows(under: Mapping[str, Outcomes], labels: Labels) -> Rows:
    """Rates of the category that a circuit was found on and of the others, request by request."""
    first = next(iter(under.values()))
    metric = first.behaviour.metric
    groups = np.array(first.groups)
    categories = np.array([request.category for request in first.requests])

    # [circuits, requests]. With requests about a, a and b, and circuits of a and b:
    #
    #     is_own   x  x  .        hits   .2  .2   1        own types      .2  .2   0
    #              .  .  x                1   1   0        other types     1   1   1
    is_own = np.array(list(under))[:, None] == categories
    hits = np.array([outcomes.hits for outcomes in under.values()])
    by_others = np.average(hits, axis=0, weights=~is_own)

    # Requests of a category without a circuit have no own one.
    circuit, request = is_own.nonzero()
    by_own = hits[circuit, request]
    gap = torch.tensor(by_others[request] - by_own)
    own = {**labels, "relation": "own type"}
    others = {**labels, "relation": "other types"}
    return Rows(
        [
            Measurement.rate(metric, own, by_own.tolist(), groups[request].tolist()),
            Measurement.rate(metric, others, by_others.tolist(), groups.tolist()),
            Measurement.average(
                "own_type_gap", {**labels, "of": metric}, gap, groups[request].tolist()
            ),
        ]
    )


def shared_rows(
    model: Model,
    masks: Sequence[WeightMask],
    names: Sequence[str],
    labels: Labels,
) -> Rows:
    """The weights that at least k of the masks remove: how many, and the rates without them."""
    rows = Rows()
    for k in range(1, len(masks) + 1):
        mask = shared_by(masks, k)
        where = {**labels, "shared_by": k}
        rows += [Measurement.exact("weights_removed", where, mask.n_removed)]
        if mask.n_removed:
            rows += rate_rows(model, names, where, mask=mask)
    return rows


def shared_by(masks: Sequence[WeightMask], at_least: int) -> WeightMask:
    """The weights that at least so many of the masks remove."""
    together = union(masks)
    assert together is not None
    removed = {}
    for name in together.removed:
        indices = torch.cat([mask.removed[name] for mask in masks if name in mask.removed])
        index, times = indices.unique(return_counts=True)
        removed[name] = index[times >= at_least]
    parents = tuple(mask.source for mask in masks)
    source = Source(together.source.model, "shared_by", {"at_least": at_least}, parents)
    return WeightMask(removed, together.shapes, source)
