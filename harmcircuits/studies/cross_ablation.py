"""Circuits of many behaviours, side by side: which weights, causes and tokens they share.

Cross-ablation asks which circuit breaks which ability.
"""

from collections.abc import Iterable, Mapping
from itertools import combinations, product

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from scipy.stats import spearmanr

from harmcircuits.behaviours.behaviour import Behaviour
from harmcircuits.behaviours.model import OTHERS, Calibration, Model
from harmcircuits.circuits.location import counts_by
from harmcircuits.circuits.masks import WeightMask, top_fraction
from harmcircuits.circuits.overlap import overlap, overlap_by, rank_correlation
from harmcircuits.circuits.scores import WeightScores, mean_scores
from harmcircuits.circuits.sites import Site
from harmcircuits.hooks.attribution import removal_effect, token_contributions
from harmcircuits.hooks.weights import weight_sites
from harmcircuits.measurements import Labels, Measurement, Rows
from harmcircuits.studies.rounds import PROTECT_SHARE, ROUNDS, circuit_in_rounds
from harmcircuits.studies.terms import Terms

N_BLOCKS = 16  # parts of the calibration items that are resampled whole
N_TOPIC_DRAWS = 200

Parts = list[tuple[WeightScores | None, int]]


def circuits_both_ways(
    model: Model,
    calibrations: Mapping[str, Calibration],
    names: Iterable[str],
    *,
    size: float,
    protect_share: float = PROTECT_SHARE,
    rounds: int = ROUNDS,
) -> dict[str, dict[str, WeightMask]]:
    """A circuit of each behaviour twice: protecting nothing ("none"), and all others ("others").

    Unprotected masks share whatever they share; of protected ones disjointness is partly imposed.
    So read overlap on the former, and whether two abilities can be separated at all on the latter.

    Args:
        model: the model.
        calibrations: its calibration data.
        names: the behaviours.
        size: share of the weights in every circuit.
        protect_share: as in `Model.find_circuit`.
        rounds: as in `Model.find_circuit`.

    Raises:
        ValueError: as `Model.find_circuit`.
    """
    names = list(names)
    circuits: dict[str, dict[str, WeightMask]] = {}
    for label, protect in (("none", ()), ("others", OTHERS)):
        circuits[label] = {}
        for name in names:
            circuits[label][name] = circuit_in_rounds(
                model,
                name,
                size=size,
                protect=protect,
                protect_share=protect_share,
                rounds=rounds,
                calibrations=calibrations,
            )
    return circuits


def part_scores(model: Model, behaviour: Behaviour, data: Calibration) -> Parts:
    """`removal_effect` of each block of calibration items, with its number of examples.

    Items are dealt to 16 blocks, or one each if they are fewer; a block without examples has None.
    Behaviours that ask about the same items share their blocks, so that they can be resampled
    together.

    Args:
        model: the model.
        behaviour: what is scored.
        data: its calibration data.
    """
    items = sorted({example.cluster for example in behaviour.prompts("calibration")})
    n_blocks = min(N_BLOCKS, len(items))
    block = {item: number % n_blocks for number, item in enumerate(items)}
    parts: Parts = []
    for number in range(n_blocks):
        examples = data.prompts.where(lambda example, of=number: block[example.cluster] == of)
        scores = None
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
    """For every behaviour its `removal_effect`, and masks from resamples of calibration items.

    Resamples draw blocks of items with replacement, the same blocks for every behaviour; no further
    pass over the model is needed.

    Args:
        model: the model.
        calibrations: its calibration data.
        names: the behaviours.
        size: share of the weights in every mask.
        n_resamples: masks of each behaviour.
        seed: draws the resamples.

    Raises:
        ValueError: a behaviour with so few verified items that a resample holds none.
    """
    circuits = {}
    for name in names:
        parts = part_scores(model, model.behaviours[name], calibrations[name])
        scores = [part for part, _ in parts if part is not None]
        sizes = [n_examples for part, n_examples in parts if part is not None]
        draws = np.random.default_rng(seed).integers(len(parts), size=(n_resamples, len(parts)))
        masks = []
        for draw in draws:
            weights = _weights(name, parts, np.bincount(draw, minlength=len(parts)))
            masks.append(top_fraction(mean_scores(scores, weights), size, within="model"))
        circuits[name] = (mean_scores(scores, sizes), masks)
    return circuits


def _weights(name: str, parts: Parts, times: Int[ndarray, " parts"]) -> list[int]:
    """How many examples each scored part stands for in a resample that draws it so many times."""
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
    in_rounds: Mapping[str, WeightMask],
    labels: Labels,
    *,
    size: float,
    n_samples: int = 50,
) -> Rows:
    """What every pair of unprotected circuits shares.

    Jaccard index, lift, lift over row and column marginals, and containment. Masks in one shot
    carry bootstrap intervals; masks chosen in rounds are compared as they are. `rank_correlation`
    is of the scores. A behaviour against its own resamples is the ceiling.

    Args:
        one_shot: from `resampled_circuits`.
        in_rounds: circuits of the same behaviours.
        labels: what the rows carry.
        size: share of the weights in every circuit.
        n_samples: of the null that keeps row and column counts.
    """
    rows = Rows()
    masks = {}
    for name, (scores, _) in one_shot.items():
        masks[name] = top_fraction(scores, size, within="model")

    for first, second in combinations(masks, 2):
        resamples = list(zip(one_shot[first][1], one_shot[second][1], strict=True))
        selections = {"one shot": (masks, resamples), "rounds": (in_rounds, [])}
        pair = {**labels, "first": first, "second": second}
        for selection, (of, pairs) in selections.items():
            shared = overlap(of[first], of[second], resamples=pairs, n_samples=n_samples)
            where = {**pair, "selection": selection}
            marginal = (shared.lift_marginal, *shared.interval_marginal)
            rows += [
                Measurement("overlap_lift", where, shared.lift, *shared.interval, shared.n_first),
                Measurement("overlap_lift_marginal", where, *marginal, shared.n_first),
                Measurement.exact("overlap_jaccard", where, shared.jaccard),
                Measurement.exact("overlap_containment", where, shared.containment[0]),
            ]
        correlation = rank_correlation(one_shot[first][0], one_shot[second][0])
        rows += [Measurement.exact("rank_correlation", pair, correlation)]

    for name, (_, resampled) in one_shot.items():
        again = [overlap(masks[name], other) for other in resampled]
        where = {**labels, "first": name, "second": name, "selection": "one shot"}
        lifts = [shared.lift for shared in again]
        jaccards = [shared.jaccard for shared in again]
        rows += [
            Measurement.of_draws("overlap_lift", where, lifts),
            Measurement.of_draws("overlap_jaccard", where, jaccards),
        ]
    return rows


def content_rows(
    masks: Mapping[str, WeightMask],
    labels: Labels,
    *,
    terms: Terms | None = None,
    seed: int = 0,
) -> Rows:
    """How far overlap follows the content of a text, and how far its use: four kinds of pairs.

    Mean `content_lift` and `content_jaccard` by `relation`: "twin" (the target and its contrast on
    one topic), two topics of the target, two of the contrast, and one of each. Intervals resample
    topics (200 times).

    Args:
        masks: a circuit for TARGET/TOPIC and CONTRAST/TOPIC of two or more topics, such as
            "harmful/TOPIC" and "benign/TOPIC": the same content put to two uses.
        labels: what the rows carry.
        terms: names the target and the contrast; the usual ones by default.
        seed: draws the resamples.
    """
    terms = terms or Terms.standard()
    target, contrast = terms.target, terms.contrast
    topics = sorted({name.split("/")[1] for name in masks if "/" in name})
    n_topics = len(topics)

    def shared(first: Behaviour, second: Behaviour) -> Float[ndarray, "topics topics 2"]:
        """Lift and Jaccard of every pair of topics; NaN for a circuit with itself."""
        values = np.full((n_topics, n_topics, 2), np.nan)
        for i, j in product(range(n_topics), repeat=2):
            if first is second and i == j:
                continue
            names = (f"{first.name}/{topics[i]}", f"{second.name}/{topics[j]}")
            both = overlap(masks[names[0]], masks[names[1]])
            values[i, j] = both.lift, both.jaccard
        return values

    is_same_topic = np.eye(n_topics, dtype=bool)
    across = shared(target, contrast)
    relations = {
        "twin": (across, is_same_topic),
        f"{target.title}, other topic": (shared(target, target), ~is_same_topic),
        f"{contrast.title}, other topic": (shared(contrast, contrast), ~is_same_topic),
        f"{target.title} and {contrast.title}, other topic": (across, ~is_same_topic),
    }
    draws = np.random.default_rng(seed).integers(n_topics, size=(N_TOPIC_DRAWS, n_topics))
    rows = Rows()
    for relation, (values, is_counted) in relations.items():
        for layer, metric in enumerate(("content_lift", "content_jaccard")):
            where = {**labels, "relation": relation}
            rows += [_topic_mean(metric, where, values[:, :, layer], is_counted, draws)]
    return rows


def _topic_mean(
    metric: str,
    labels: Labels,
    values: Float[ndarray, "topics topics"],
    is_counted: Bool[ndarray, "topics topics"],
    draws: Int[ndarray, "draws topics"],
) -> Measurement:
    """The mean over the pairs of topics that count, with the interval of resampled topics."""
    counted = np.where(is_counted, values, np.nan)
    means = []
    for draw in draws:
        resample = counted[np.ix_(draw, draw)]
        if not np.isnan(resample).all():
            means.append(np.nanmean(resample))
    low, high = np.quantile(means, [0.025, 0.975])
    mean = float(np.nanmean(counted))
    return Measurement(metric, labels, mean, float(low), float(high), len(values))


def overlap_place_rows(
    model: Model,
    masks: Mapping[str, WeightMask],
    first: str,
    labels: Labels,
) -> Rows:
    """The overlap of one circuit with every other by layer and matrix, and by heads and neurons.

    `place_correlation`: Spearman correlation of the number of weights that the two masks take from
    each head or neuron.

    Args:
        model: the model.
        masks: circuits by behaviour.
        first: the one that is compared.
        labels: what the rows carry.
    """
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
    """Every behaviour under every mask, which the label `mask` names.

    Args:
        model: the model.
        masks: circuits by behaviour.
        labels: what the rows carry.
        split: what is measured.
        only: the behaviours measured; all whole ones by default.
    """
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


def token_rows(
    model: Model,
    name: str,
    data: Calibration,
    mask: WeightMask,
    labels: Labels,
) -> Rows:
    """What each token position adds to a mask's score, by its distance from the first answer token.

    `token_contribution` at `offset` k: positions k tokens after (before, if negative) the first
    target, averaged over all examples, so that the rows sum to the mask's score; in units of the
    behaviour's objective.

    Args:
        model: the model.
        name: the behaviour that the tokens belong to.
        data: its calibration data.
        mask: the weights.
        labels: what the rows carry.
    """
    behaviour = model.behaviours[name]
    contributions = token_contributions(model.bridge, mask, data.batches, behaviour.objective)
    by_offset: dict[int, list[tuple[int, float]]] = {}  # offset -> (example, value)
    example = 0
    for batch, values in zip(data.batches, contributions, strict=True):
        for row in range(len(batch)):
            start = int(batch.is_target[row].int().argmax())
            for position in range(int(batch.is_token[row].sum())):
                value = (example, float(values[row, position]))
                by_offset.setdefault(position - start, []).append(value)
            example += 1

    groups = [example.cluster for example in data.prompts]
    rows = Rows()
    for offset, pairs in sorted(by_offset.items()):
        # An example without this position contributes nothing there.
        per_example = torch.zeros(example)
        for number, value in pairs:
            per_example[number] = value
        where = {**labels, "offset": offset}
        rows += [Measurement.average("token_contribution", where, per_example, groups)]
    return rows
