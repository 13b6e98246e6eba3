"""Circuits of many behaviours compared: which weights, causes and tokens they share."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations, product
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from scipy.stats import spearmanr
from support.curves import outcomes_of
from torch import Tensor

from harmcircuits.batches import Batch
from harmcircuits.behaviours.behaviour import Behaviour
from harmcircuits.behaviours.model import Model
from harmcircuits.behaviours.outcomes import Calibration, Outcomes
from harmcircuits.circuits.location import counts_by
from harmcircuits.circuits.masks import WeightMask, top_fraction
from harmcircuits.circuits.overlap import Overlap, overlap, overlap_by
from harmcircuits.circuits.scores import WeightScores, mean_scores
from harmcircuits.circuits.sites import Site
from harmcircuits.hooks.weights import weight_sites
from harmcircuits.measurements import Labels, Measurement, Rows
from harmcircuits.search.attribution import removal_effect, token_contributions
from harmcircuits.studies.summary import Roles

N_BLOCKS = 16  # parts of the calibration items that are resampled whole
N_TOPIC_DRAWS = 200

Parts = list[tuple[WeightScores | None, int]]  # of each block: scores, and number of examples


def part_scores(model: Model, behaviour: Behaviour, data: Calibration) -> Parts:
    """`removal_effect` of each block of calibration items, with its number of examples."""
    # Items in alphabetical order are dealt in turn, so equal items land in equal blocks whichever
    # behaviour asks about them. By the requests, not by the verified answers, which may be fewer.
    items = sorted({example.cluster for example in behaviour.prompts("calibration")})
    n_blocks = min(N_BLOCKS, len(items))
    block = {item: number % n_blocks for number, item in enumerate(items)}
    parts: Parts = []
    for number in range(n_blocks):
        examples = data.prompts.where(lambda example, of=number: block[example.cluster] == of)
        scores = None  # no answer about these items was verified
        if len(examples):
            batches = model.batches(behaviour, examples)
            scores = removal_effect(model.bridge, batches, behaviour.objective)
        parts.append((scores, len(examples)))
    return parts


def resampled_circuits(
    model: Model,
    calibrations: Mapping[str, Calibration],
    names: Iterable[str],
    *,
    size: float,
    n_resamples: int,
    seed: int,
) -> dict[str, tuple[WeightScores, list[WeightMask]]]:
    """For every behaviour its `removal_effect`, and masks from resamples of calibration items."""
    circuits = {}
    for name in names:
        parts = part_scores(model, model.behaviours[name], calibrations[name])
        n_parts = len(parts)
        scores = [part for part, _ in parts if part is not None]
        sizes = [n_examples for part, n_examples in parts if part is not None]

        # A generator for each behaviour, with the same seed: the same blocks are drawn.
        generator = np.random.default_rng(seed)
        draws = generator.integers(n_parts, size=(n_resamples, n_parts))
        masks = []
        for draw in draws:
            times = np.bincount(draw, minlength=n_parts)  # blocks 0 2 2 of three: 1 0 2
            weights = _weights(name, parts, times)
            resample = mean_scores(scores, weights)
            masks.append(top_fraction(resample, size, within="model"))
        circuits[name] = (mean_scores(scores, sizes), masks)
    return circuits


def _weights(name: str, parts: Parts, times: Int[ndarray, " parts"]) -> list[int]:
    """How many examples each scored part stands for in a resample that draws it `times` times."""
    weights = []
    for (part, n_examples), n_times in zip(parts, times, strict=True):
        if part is not None:
            weights.append(n_examples * int(n_times))
    if not sum(weights):
        n_all = sum(n_examples for _, n_examples in parts)
        raise ValueError(
            f"{name}: a resample holds none of its {n_all} examples; give more calibration items"
        )
    return weights


def overlap_rows(
    one_shot: Mapping[str, tuple[WeightScores, list[WeightMask]]],
    circuits: Mapping[str, WeightMask],
    labels: Labels,
    *,
    size: float,
    selection: str = "search",
    n_samples: int = 50,
    pairs: Iterable[tuple[str, str]] | None = None,
) -> Rows:
    """What every pair of unprotected circuits shares."""
    rows = Rows()
    masks = {}
    for name, (scores, _) in one_shot.items():
        masks[name] = top_fraction(scores, size, within="model")

    for first, second in combinations(masks, 2) if pairs is None else pairs:
        first_scores, first_masks = one_shot[first]
        second_scores, second_masks = one_shot[second]
        pair = {**labels, "first": first, "second": second}

        # Resample i of both drew the same items, so they are compared with each other.
        resamples = list(zip(first_masks, second_masks, strict=True))
        shared = overlap(masks[first], masks[second], resamples=resamples, n_samples=n_samples)
        rows += shared_rows(shared, {**pair, "selection": "one shot"})

        shared = overlap(circuits[first], circuits[second], n_samples=n_samples)
        rows += shared_rows(shared, {**pair, "selection": selection})

        correlation = rank_correlation(first_scores, second_scores)
        rows += [Measurement.exact("rank_correlation", pair, correlation)]

    # A behaviour with itself: how much two searches for the same thing agree.
    for name, (_, resampled) in one_shot.items():
        with_resamples = [overlap(masks[name], other) for other in resampled]
        where = {**labels, "first": name, "second": name, "selection": "one shot"}
        lifts = [shared.lift for shared in with_resamples]
        jaccards = [shared.jaccard for shared in with_resamples]
        rows += [
            Measurement.from_draws("overlap_lift", where, lifts),
            Measurement.from_draws("overlap_jaccard", where, jaccards),
        ]
    return rows


def shared_rows(shared: Overlap, labels: Labels) -> Rows:
    """What two circuits share, as rows: both lifts, Jaccard index, containment of the first."""
    lift = (shared.lift, *shared.interval)
    marginal = (shared.lift_marginal, *shared.interval_marginal)
    return Rows(
        [
            Measurement("overlap_lift", labels, *lift, shared.n_first),
            Measurement("overlap_lift_marginal", labels, *marginal, shared.n_first),
            Measurement.exact("overlap_jaccard", labels, shared.jaccard),
            Measurement.exact("overlap_containment", labels, shared.containment[0]),
        ]
    )


def topic_masks(
    model: Model,
    calibrations: Mapping[str, Calibration],
    *,
    size: float,
    terms: Roles | None = None,
) -> dict[str, WeightMask]:
    """Masks in one shot of TARGET/TOPIC and CONTRAST/TOPIC, for the topics that both have."""
    terms = terms or Roles.standard()
    roles = (terms.target.name, terms.contrast.name)
    of_role = {role: set() for role in roles}
    for name in calibrations:
        role, _, topic = name.partition("/")
        if topic and role in of_role:
            of_role[role].add(topic)
    topics = sorted(set.intersection(*of_role.values()))
    if len(topics) < 2:
        return {}

    masks = {}
    for role, topic in product(roles, topics):
        name = f"{role}/{topic}"
        objective = model.behaviours[name].objective
        scores = removal_effect(model.bridge, calibrations[name].batches, objective)
        masks[name] = top_fraction(scores, size, within="model")
    return masks


def content_rows(
    masks: Mapping[str, WeightMask],
    labels: Labels,
    *,
    terms: Roles | None = None,
    seed: int = 0,
) -> Rows:
    """Whether circuits overlap by the content of their texts or by its use: four kinds of pairs."""
    terms = terms or Roles.standard()
    target, contrast = terms.target, terms.contrast
    topics = sorted({name.split("/")[1] for name in masks if "/" in name})
    n_topics = len(topics)
    of_target = _shared_by_topic(masks, target, target, topics)
    of_contrast = _shared_by_topic(masks, contrast, contrast, topics)
    across = _shared_by_topic(masks, target, contrast, topics)

    # Each relation is a part of a square table of overlaps, topic by topic. Of `across`:
    #
    #                    benign/a   benign/b   benign/c
    #     harmful/a       twin       other      other
    #     harmful/b       other      twin       other
    #     harmful/c       other      other      twin
    is_same_topic = np.eye(n_topics, dtype=bool)
    relations = {
        "twin": (across, is_same_topic),
        f"{target.title}, other topic": (of_target, ~is_same_topic),
        f"{contrast.title}, other topic": (of_contrast, ~is_same_topic),
        f"{target.title} and {contrast.title}, other topic": (across, ~is_same_topic),
    }
    generator = np.random.default_rng(seed)
    draws = generator.integers(n_topics, size=(N_TOPIC_DRAWS, n_topics))
    rows = Rows()
    for relation, (tables, is_counted) in relations.items():
        where = {**labels, "relation": relation}
        for metric, table in tables.items():
            rows += [_topic_mean(metric, where, table, is_counted, draws)]
    return rows


def _shared_by_topic(
    masks: Mapping[str, WeightMask],
    first: Behaviour,
    second: Behaviour,
    topics: Sequence[str],
) -> dict[str, Float[ndarray, "topics topics"]]:
    """Lift and Jaccard of every pair of topics; NaN for a circuit with itself."""
    n_topics = len(topics)
    lift = np.full((n_topics, n_topics), np.nan)
    jaccard = np.full((n_topics, n_topics), np.nan)
    for i, j in product(range(n_topics), repeat=2):
        if first is second and i == j:
            continue
        mask = masks[f"{first.name}/{topics[i]}"]
        other = masks[f"{second.name}/{topics[j]}"]
        shared = overlap(mask, other)
        lift[i, j] = shared.lift
        jaccard[i, j] = shared.jaccard
    return {"content_lift": lift, "content_jaccard": jaccard}


def _topic_mean(
    metric: str,
    labels: Labels,
    values: Float[ndarray, "topics topics"],
    is_counted: Bool[ndarray, "topics topics"],
    draws: Int[ndarray, "draws topics"],
) -> Measurement:
    """The mean over the pairs of topics that count, with the interval of resampled topics."""
    counted = np.where(is_counted, values, np.nan)
    is_twin = np.array_equal(is_counted, np.eye(len(values), dtype=bool))
    means = []
    for draw in draws:
        # The draw takes the same topics as rows and as columns. It may be one topic many times,
        # which has no other topic in it.
        resample = counted[np.ix_(draw, draw)]
        if is_twin:  # a topic that was drawn twice has two twins, not four
            resample = resample.diagonal()
        if not np.isnan(resample).all():
            means.append(np.nanmean(resample))
    n = len(values)
    mean = float(np.nanmean(counted))
    return Measurement.from_draws(metric, labels, means, mean=mean, n=n, n_groups=n)


def overlap_place_rows(
    model: Model,
    masks: Mapping[str, WeightMask],
    first: str,
    labels: Labels,
) -> Rows:
    """The overlap of one circuit with every other by layer and matrix, and by heads and neurons."""
    sites = weight_sites(model.bridge)
    rows = Rows()
    for second in masks:
        if second != first:
            pair = {**labels, "first": first, "second": second}
            rows += _place_rows(masks[first], masks[second], sites, pair)
    return rows


def _place_rows(
    first: WeightMask,
    second: WeightMask,
    sites: Mapping[str, Site],
    labels: Labels,
) -> Rows:
    rows = Rows()
    for by in ("layer", "matrix"):
        for place, shared in overlap_by(first, second, sites, by).items():
            where = {**labels, "by": by, "layer": place.layer, "kind": place.part}
            lift = (shared.lift, *shared.interval)
            rows += [Measurement("overlap_lift", where, *lift, shared.n_first)]
    for by in ("head", "neuron"):
        counts = []
        for mask in (first, second):
            of_mask = counts_by(mask, sites, by).values()
            counts.append([count.n_removed for count in of_mask])
        # scipy's stubs do not name the fields of its results.
        correlation = float(spearmanr(*counts).statistic)  # pyright: ignore
        rows += [Measurement.exact("place_correlation", {**labels, "by": by}, correlation)]
    return rows


def ablation_rows(
    model: Model,
    masks: Mapping[str, WeightMask],
    labels: Labels,
    *,
    split: str = "heldout",
    only: Iterable[str] = (),
) -> Rows:
    """Every behaviour under every mask, which the label `mask` names."""
    only = list(only)
    rows = Rows()
    for name, mask in masks.items():
        where = {**labels, "mask": name}
        rows += model.measure(
            mask=mask,
            split=split,
            labels=where,
            only=only,
        )
        where["split"] = split
        rows += [Measurement.exact("weights_removed", where, mask.n_removed)]
    return rows


def change_rows(
    model: Model,
    masks: Mapping[str, WeightMask],
    unpruned: Mapping[str, Outcomes],
    labels: Labels,
) -> Rows:
    """As `ablation_rows`, with the change of each rate and loss, request by request."""
    rows = Rows()
    for name, mask in masks.items():
        where = {**labels, "mask": name}
        rows += [Measurement.exact("weights_removed", where, mask.n_removed)]
        pruned = outcomes_of(model, unpruned, mask=mask)
        for behaviour, outcomes in pruned.items():
            rows += outcomes.rows(where) + outcomes.changes(unpruned[behaviour], where)
    return rows


def token_rows(
    model: Model,
    name: str,
    data: Calibration,
    mask: WeightMask,
    labels: Labels,
) -> Rows:
    """What each token position adds to a mask's score, by its distance from the first answer token."""
    behaviour = model.behaviours[name]
    contributions = token_contributions(model.bridge, mask, data.batches, behaviour.objective)
    by_offset = _by_offset(data.batches, contributions)
    groups = [example.cluster for example in data.prompts]
    rows = Rows()
    for offset, per_example in sorted(by_offset.items()):
        where = {**labels, "offset": offset}
        rows += [Measurement.average("token_contribution", where, per_example, groups)]
    return rows


def _by_offset(
    batches: Sequence[Batch],
    contributions: Sequence[Float[Tensor, "_ _"]],
) -> dict[int, Float[Tensor, " examples"]]:
    """Distance from the first target -> what the token there adds, example by example."""
    n_examples = sum(len(batch) for batch in batches)
    by_offset: dict[int, Tensor] = {}
    example = 0
    for batch, values in zip(batches, contributions, strict=True):
        for row in range(len(batch)):
            start = int(batch.is_target[row].int().argmax())
            n_tokens = int(batch.is_token[row].sum())
            for position in range(n_tokens):
                per_example = by_offset.setdefault(position - start, torch.zeros(n_examples))
                per_example[example] = float(values[row, position])
            example += 1
    return by_offset


def rank_correlation(scores: WeightScores, other: WeightScores) -> float:
    """Spearman correlation of two scores within each matrix, averaged by the matrices' sizes."""
    total = 0.0
    n_weights = 0
    for name, first in scores.values.items():
        second = other.values[name]
        first_ranks, second_ranks = first.flatten().cpu(), second.flatten().cpu()
        result: Any = spearmanr(first_ranks.numpy(), second_ranks.numpy())
        total += first.numel() * float(result.statistic)
        n_weights += first.numel()
    return total / n_weights
