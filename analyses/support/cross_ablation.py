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

from harmcircuits.behaviours.behaviour import CONTRAST, TARGET
from harmcircuits.behaviours.model import Model
from harmcircuits.behaviours.outcomes import Calibration, Outcomes
from harmcircuits.circuits.location import counts_by
from harmcircuits.circuits.masks import WeightMask, top_fraction
from harmcircuits.circuits.overlap import Overlap, overlap, overlap_by
from harmcircuits.circuits.scores import WeightScores, mean_scores
from harmcircuits.hooks.weights import weight_sites
from harmcircuits.measurements import Labels, Measurement, Rows
from harmcircuits.search.attribution import removal_effect, token_contributions

N_BLOCKS = 16  # parts of the calibration items that are resampled whole
N_TOPIC_DRAWS = 200

# The mean scores of a behaviour, and its masks from resampled calibration items.
Resampled = tuple[WeightScores, list[WeightMask]]
TopicTable = Float[ndarray, "topics topics"]


def block_of_items(model: Model, name: str) -> dict[str, int]:
    """The number of the block in which each calibration item is resampled."""
    # Items in alphabetical order are dealt in turn, so equal items land in equal blocks whichever
    # behaviour asks about them. By the requests, not by the verified answers, which may be fewer.
    items = sorted({example.cluster for example in model.behaviours[name].prompts("calibration")})
    return {item: number % N_BLOCKS for number, item in enumerate(items)}


def resampled_circuits(
    model: Model,
    calibrations: Mapping[str, Calibration],
    names: Iterable[str],
    *,
    size: float,
    n_resamples: int,
    seed: int,
) -> dict[str, Resampled]:
    """For every behaviour its `removal_effect`, and masks from resamples of calibration items."""
    circuits = {}
    for name in names:
        behaviour = model.behaviours[name]
        block = block_of_items(model, name)
        n_blocks = len(set(block.values()))
        numbers, scores, sizes = [], [], []
        for number in range(n_blocks):
            examples = calibrations[name].prompts.where(
                lambda example, block=block, number=number: block[example.cluster] == number
            )
            if not len(examples):  # no answer about these items was verified
                continue
            batches = model.batches(behaviour, examples)
            numbers.append(number)
            scores.append(removal_effect(model.bridge, batches, behaviour.objective))
            sizes.append(len(examples))

        # A generator for each behaviour, with the same seed: the same blocks are drawn.
        generator = np.random.default_rng(seed)
        draws = generator.integers(n_blocks, size=(n_resamples, n_blocks))
        masks = []
        for draw in draws:
            times = np.bincount(draw, minlength=n_blocks)  # blocks 0 2 2 of three: 1 0 2
            weights = (np.array(sizes) * times[numbers]).tolist()
            if not sum(weights):
                raise ValueError(
                    f"{name}: a resample holds none of its {sum(sizes)} examples; give more "
                    "calibration items"
                )
            masks.append(top_fraction(mean_scores(scores, weights), size, within="model"))
        circuits[name] = (mean_scores(scores, sizes), masks)
    return circuits


def overlap_rows(
    one_shot: Mapping[str, Resampled],
    circuits: Mapping[str, WeightMask],
    *,
    size: float,
    n_samples: int = 50,
    pairs: Iterable[tuple[str, str]] | None = None,
) -> Rows:
    """The overlap of every pair of unprotected circuits."""
    rows = Rows()
    masks = {}
    for name, (scores, _) in one_shot.items():
        masks[name] = top_fraction(scores, size, within="model")

    for first, second in combinations(masks, 2) if pairs is None else pairs:
        first_scores, first_masks = one_shot[first]
        second_scores, second_masks = one_shot[second]
        pair = {"first": first, "second": second}

        # Resample i of both drew the same items, so they are compared with each other.
        resamples = list(zip(first_masks, second_masks, strict=True))
        both = overlap(masks[first], masks[second], resamples=resamples, n_samples=n_samples)
        rows += shared_rows(both, {**pair, "selection": "one shot"})

        both = overlap(circuits[first], circuits[second], n_samples=n_samples)
        rows += shared_rows(both, {**pair, "selection": "search"})

        correlation = rank_correlation(first_scores, second_scores)
        rows += [Measurement.exact("rank_correlation", pair, correlation)]

    # A behaviour with itself: how much two searches for the same thing agree.
    for name, (_, resamples) in one_shot.items():
        overlaps = [overlap(masks[name], resample) for resample in resamples]
        where = {"first": name, "second": name, "selection": "one shot"}
        lifts = [both.lift for both in overlaps]
        jaccards = [both.jaccard for both in overlaps]
        rows += [
            Measurement.of_draws("overlap_lift", where, lifts),
            Measurement.of_draws("overlap_jaccard", where, jaccards),
        ]
    return rows


def shared_rows(both: Overlap, labels: Labels) -> Rows:
    """An overlap as rows: both lifts, the Jaccard index, the containment of the first circuit."""
    lift = (both.lift, *both.interval)
    marginal = (both.lift_marginal, *both.interval_marginal)
    return Rows(
        [
            Measurement("overlap_lift", labels, *lift, both.n_first),
            Measurement("overlap_lift_marginal", labels, *marginal, both.n_first),
            Measurement.exact("overlap_jaccard", labels, both.jaccard),
            Measurement.exact("overlap_containment", labels, both.containment[0]),
        ]
    )


def topic_masks(
    model: Model, calibrations: Mapping[str, Calibration], *, size: float
) -> dict[str, WeightMask]:
    """Masks in one shot of TARGET/TOPIC and CONTRAST/TOPIC, for the topics that both have."""
    topics = []
    for name in sorted(calibrations):
        behaviour, _, topic = name.partition("/")
        if topic and behaviour == TARGET and f"{CONTRAST}/{topic}" in calibrations:
            topics.append(topic)
    if len(topics) < 2:
        return {}

    masks = {}
    for behaviour, topic in product((TARGET, CONTRAST), topics):
        name = f"{behaviour}/{topic}"
        objective = model.behaviours[name].objective
        scores = removal_effect(model.bridge, calibrations[name].batches, objective)
        masks[name] = top_fraction(scores, size, within="model")
    return masks


def content_rows(masks: Mapping[str, WeightMask]) -> Rows:
    """Whether circuits overlap by the content of their texts or by its use: four kinds of pairs."""
    topics = sorted({name.split("/")[1] for name in masks})
    n_topics = len(topics)
    target = _topic_tables(masks, TARGET, TARGET, topics)
    contrast = _topic_tables(masks, CONTRAST, CONTRAST, topics)
    across = _topic_tables(masks, TARGET, CONTRAST, topics)

    # Each relation is a part of a square table of overlaps, topic by topic. Of `across`:
    #
    #                    benign/a   benign/b   benign/c
    #     harmful/a       twin       other      other
    #     harmful/b       other      twin       other
    #     harmful/c       other      other      twin
    is_same_topic = np.eye(n_topics, dtype=bool)
    relations = {
        "twin": (across, is_same_topic),
        "harm, other topic": (target, ~is_same_topic),
        "benign, other topic": (contrast, ~is_same_topic),
        "harm and benign, other topic": (across, ~is_same_topic),
    }
    draws = np.random.default_rng(0).integers(n_topics, size=(N_TOPIC_DRAWS, n_topics))
    rows = Rows()
    for relation, (tables, is_pair) in relations.items():
        for metric, table in tables.items():
            rows += [_topic_mean(metric, {"relation": relation}, table, is_pair, draws)]
    return rows


def _topic_tables(
    masks: Mapping[str, WeightMask], first: str, second: str, topics: Sequence[str]
) -> dict[str, TopicTable]:
    """Lift and Jaccard of every pair of topics; NaN for a circuit with itself."""
    lift = np.full((len(topics), len(topics)), np.nan)
    jaccard = lift.copy()
    for i, j in product(range(len(topics)), repeat=2):
        if first == second and i == j:
            continue
        both = overlap(masks[f"{first}/{topics[i]}"], masks[f"{second}/{topics[j]}"])
        lift[i, j] = both.lift
        jaccard[i, j] = both.jaccard
    return {"content_lift": lift, "content_jaccard": jaccard}


def _topic_mean(
    metric: str,
    labels: Labels,
    values: TopicTable,
    is_pair: Bool[ndarray, "topics topics"],
    draws: Int[ndarray, "draws topics"],
) -> Measurement:
    """The mean over these pairs of topics, with the interval of resampled topics."""
    table = np.where(is_pair, values, np.nan)
    is_twin = np.array_equal(is_pair, np.eye(len(values), dtype=bool))
    means = []
    for draw in draws:
        # The draw takes the same topics as rows and as columns. It may be one topic many times,
        # which has no other topic in it.
        resample = table[np.ix_(draw, draw)]
        if is_twin:  # a topic that was drawn twice has two twins, not four
            resample = resample.diagonal()
        if not np.isnan(resample).all():
            means.append(np.nanmean(resample))
    n = len(values)
    mean = float(np.nanmean(table))
    return Measurement.of_draws(metric, labels, means, mean=mean, n=n, n_groups=n)


def overlap_place_rows(model: Model, masks: Mapping[str, WeightMask], first: str) -> Rows:
    """The overlap of one circuit with every other by layer and matrix, and by heads and neurons."""
    sites = weight_sites(model.bridge)
    rows = Rows()
    for second in masks:
        if second == first:
            continue
        pair = {"first": first, "second": second}
        for by in ("layer", "matrix"):
            for place, both in overlap_by(masks[first], masks[second], sites, by).items():
                where = {**pair, "by": by, "layer": place.layer, "kind": place.part}
                lift = (both.lift, *both.interval)
                rows += [Measurement("overlap_lift", where, *lift, both.n_first)]
        for by in ("head", "neuron"):
            counts = []
            for name in (first, second):
                places = counts_by(masks[name], sites, by).values()
                counts.append([place.n_removed for place in places])
            # scipy's stubs do not name the fields of its results.
            correlation = float(spearmanr(*counts).statistic)  # pyright: ignore
            rows += [Measurement.exact("place_correlation", {**pair, "by": by}, correlation)]
    return rows


def ablation_rows(
    model: Model, masks: Mapping[str, WeightMask], labels: Labels, *, names: Iterable[str]
) -> Rows:
    """These behaviours under every mask, which the label `mask` names."""
    names = list(names)
    rows = Rows()
    for mask_name, mask in masks.items():
        where = {**labels, "mask": mask_name}
        rows += model.measure(mask=mask, labels=where, only=names)
        where["split"] = "heldout"
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
    model: Model, name: str, data: Calibration, mask: WeightMask, labels: Labels
) -> Rows:
    """What each token position adds to a mask's score, by its distance from the first answer token."""
    objective = model.behaviours[name].objective
    contributions = token_contributions(model.bridge, mask, data.batches, objective)
    n_examples = len(data.prompts)
    by_offset: dict[int, Tensor] = {}
    example = 0
    for batch, values in zip(data.batches, contributions, strict=True):
        for row in range(len(batch)):
            start = int(batch.is_target[row].int().argmax())
            for position in range(int(batch.is_token[row].sum())):
                per_example = by_offset.setdefault(position - start, torch.zeros(n_examples))
                per_example[example] = float(values[row, position])
            example += 1

    groups = [example.cluster for example in data.prompts]
    rows = Rows()
    for offset, per_example in sorted(by_offset.items()):
        where = {**labels, "offset": offset}
        rows += [Measurement.average("token_contribution", where, per_example, groups)]
    return rows


def rank_correlation(first: WeightScores, second: WeightScores) -> float:
    """Spearman correlation of two scores within each matrix, averaged by the matrices' sizes."""
    total = 0.0
    n_weights = 0
    for name, values in first.values.items():
        pair = values.flatten().cpu().numpy(), second.values[name].flatten().cpu().numpy()
        result: Any = spearmanr(*pair)
        total += values.numel() * float(result.statistic)
        n_weights += values.numel()
    return total / n_weights
