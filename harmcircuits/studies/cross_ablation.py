"""Circuits of many behaviours of one model, side by side: structure, causes, places and tokens, as rows."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations, product

import numpy as np
import torch

from harmcircuits.behaviours.model import Behaviour, Calibration, Subject, measure
from harmcircuits.circuits.location import concentration, counts_by
from harmcircuits.circuits.masks import WeightMask, random_like, top_fraction
from harmcircuits.circuits.overlap import overlap, overlap_by, rank_correlation, spearman
from harmcircuits.circuits.scores import WeightScores, mean_scores
from harmcircuits.hooks.attribution import removal_effect, token_contributions
from harmcircuits.hooks.losses import Labels, average, exact
from harmcircuits.hooks.masking import masked
from harmcircuits.hooks.search import circuit_mask
from harmcircuits.hooks.weights import weight_sites
from harmcircuits.measurements import Measurement
from harmcircuits.views.tables import METRICS

N_BLOCKS = 16  # parts of the calibration items that are resampled whole
N_NULL = 20  # random masks behind an interval of chance


def circuits(
    subject: Subject,
    calibrations: Mapping[str, Calibration],
    protect: Mapping[str, Sequence[str]],
    *,
    q: float,
    p: float = 0.0,
    rounds: int,
) -> dict[str, WeightMask]:
    """One mask of the same share `q`, chosen in rounds, for every behaviour that is a key of `protect`.

    `protect[name]`: the behaviours whose top share `p` the mask of `name` cannot take. With none, masks share whatever they
    share; with some, being disjoint from them is partly imposed: so read overlap on unprotected masks, and whether two
    abilities can be separated at all on protected ones. Raises ValueError as `circuit_mask`.
    """
    found = {}
    for name, others in protect.items():
        kept = [calibrations[other].batches for other in others]
        target, objective = calibrations[name].batches, subject.behaviours[name].objective
        found[name] = circuit_mask(subject.bridge, target, kept, q=q, p=p, rounds=rounds, objective=objective)
    return found


def circuits_both_ways(
    subject: Subject, calibrations: Mapping[str, Calibration], names: Iterable[str], *, q: float, p: float, rounds: int
) -> dict[str, dict[str, WeightMask]]:
    """`circuits` of these behaviours twice: `"none"` protect nothing, `"others"` all other main behaviours that are shown.

    The main behaviours are the keys of `tables.METRICS`. Raises ValueError as `circuit_mask`.
    """
    names, shown = list(names), [name for name in METRICS if name in calibrations]
    others = {name: [other for other in shown if other != name] for name in names}
    return {
        "none": circuits(subject, calibrations, dict.fromkeys(names, ()), q=q, rounds=rounds),
        "others": circuits(subject, calibrations, others, q=q, p=p, rounds=rounds),
    }


def part_scores(subject: Subject, behaviour: Behaviour, found: Calibration) -> list[tuple[WeightScores | None, int]]:
    """`removal_effect` of each block of calibration items, with its number of examples; None for a block without any.

    Items are dealt to 16 blocks, or one each if they are fewer. Behaviours that ask about the same items share their
    blocks, so that they can be resampled together.
    """
    every = sorted({example.cluster for example in behaviour.prompts("calibration")})
    n_blocks = min(N_BLOCKS, len(every))
    block = {group: number % n_blocks for number, group in enumerate(every)}
    parts = []
    for number in range(n_blocks):
        examples = found.prompts.where(lambda example, number=number: block[example.cluster] == number)
        scores = None
        if len(examples):
            scores = removal_effect(subject.bridge, subject.batches(behaviour, examples), behaviour.objective)
        parts.append((scores, len(examples)))
    return parts


def one_shot_circuits(
    subject: Subject,
    calibrations: Mapping[str, Calibration],
    names: Iterable[str],
    *,
    q: float,
    n_resamples: int,
    seed: int,
) -> dict[str, tuple[WeightScores, list[WeightMask]]]:
    """For every behaviour its `removal_effect` and the masks of share `q` from bootstrap resamples of calibration items.

    Resamples draw blocks of items with replacement, the same blocks for every behaviour. Raises ValueError for a behaviour
    with so few verified items that a resample holds none.
    """
    found = {}
    for name in names:
        parts = part_scores(subject, subject.behaviours[name], calibrations[name])
        scores, sizes = zip(*((part, size) for part, size in parts if part is not None), strict=True)
        masks = []
        for draw in np.random.default_rng(seed).integers(len(parts), size=(n_resamples, len(parts))):
            times = np.bincount(draw, minlength=len(parts))
            weights = [size * int(n) for (part, size), n in zip(parts, times, strict=True) if part is not None]
            if not sum(weights):
                raise ValueError(f"{name}: a resample holds none of its {sum(sizes)} examples; give more calibration items")
            masks.append(top_fraction(mean_scores(scores, weights), q, within="model"))
        found[name] = (mean_scores(scores, sizes), masks)
    return found


def overlap_rows(
    one_shot: Mapping[str, tuple[WeightScores, list[WeightMask]]],
    in_rounds: Mapping[str, WeightMask],
    labels: Labels,
    *,
    q: float,
    n_samples: int = 50,
) -> list[Measurement]:
    """What every pair of unprotected circuits shares: Jaccard, lift, lift over row and column marginals, containment.

    Masks in one shot carry bootstrap intervals; masks chosen in rounds are compared as they are. `rank_correlation` is of
    the scores. A behaviour against its own resamples is the ceiling.
    """
    rows = []
    masks = {name: top_fraction(scores, q, within="model") for name, (scores, _) in one_shot.items()}
    for first, second in combinations(masks, 2):
        resamples = list(zip(one_shot[first][1], one_shot[second][1], strict=True))
        for selection, chosen, pairs in (("one shot", masks, resamples), ("rounds", in_rounds, [])):
            found = overlap(chosen[first], chosen[second], resamples=pairs, n_samples=n_samples)
            where = {**labels, "first": first, "second": second, "selection": selection}
            size = found.n_first
            rows += [
                Measurement("overlap_lift", where, found.lift, *found.interval, size),
                Measurement("overlap_lift_marginal", where, found.lift_marginal, *found.interval_marginal, size),
                exact("overlap_jaccard", where, found.jaccard),
                exact("overlap_containment", where, found.containment[0]),
            ]
        both = [one_shot[name][0] for name in (first, second)]
        rows.append(exact("rank_correlation", {**labels, "first": first, "second": second}, rank_correlation(*both)))
    for name, (_, resampled) in one_shot.items():
        again = [overlap(masks[name], other) for other in resampled]
        where = {**labels, "first": name, "second": name, "selection": "one shot"}
        rows += [
            _spread("overlap_lift", where, [found.lift for found in again]),
            _spread("overlap_jaccard", where, [found.jaccard for found in again]),
        ]
    return rows


def content_rows(masks: Mapping[str, WeightMask], labels: Labels, *, seed: int = 0) -> list[Measurement]:
    """How far overlap follows the content of a text, and how far its use: mean lift of four kinds of pairs.

    `masks` holds `harmful/TOPIC` and `benign/TOPIC` (the same content put to benign use) for two or more topics.
    `content_lift` and `content_jaccard` by `relation`: "harm, other topic", "twin" (harmful and benign of one topic),
    "benign, other topic", "harm and benign, other topic". Intervals resample topics (200 times).
    """
    topics = sorted({name.split("/")[1] for name in masks if "/" in name})
    n = len(topics)

    def shared(first: str, second: str) -> np.ndarray:
        found = np.full((n, n, 2), np.nan)
        for i, j in product(range(n), repeat=2):
            if first != second or i != j:
                both = overlap(masks[f"{first}/{topics[i]}"], masks[f"{second}/{topics[j]}"])
                found[i, j] = both.lift, both.jaccard
        return found

    harm, cross, benign = shared("harmful", "harmful"), shared("harmful", "benign"), shared("benign", "benign")
    apart = ~np.eye(n, dtype=bool)
    kinds = {
        "twin": (cross, ~apart),
        "harm, other topic": (harm, apart),
        "benign, other topic": (benign, apart),
        "harm and benign, other topic": (cross, apart),
    }
    drawn = np.random.default_rng(seed).integers(n, size=(200, n))
    rows = []
    for (relation, (found, counted)), (layer, metric) in product(
        kinds.items(), enumerate(("content_lift", "content_jaccard"))
    ):
        kept = np.where(counted, found[:, :, layer], np.nan)
        values = [np.nanmean(kept[np.ix_(draw, draw)]) for draw in drawn if not np.isnan(kept[np.ix_(draw, draw)]).all()]
        low, high = np.quantile(values, [0.025, 0.975])
        where = {**labels, "relation": relation}
        rows.append(Measurement(metric, where, float(np.nanmean(kept)), float(low), float(high), n))
    return rows


def overlap_place_rows(subject: Subject, masks: Mapping[str, WeightMask], first: str, labels: Labels) -> list[Measurement]:
    """The overlap of one circuit with every other by layer and matrix, and the agreement of their heads and neurons.

    `place_correlation`: Spearman correlation of the number of weights that the two masks take from each head or neuron.
    """
    sites, rows = weight_sites(subject.bridge), []
    for second in masks:
        if second == first:
            continue
        where = {**labels, "first": first, "second": second}
        for by in ("layer", "matrix"):
            for place, found in overlap_by(masks[first], masks[second], sites, by).items():
                here = {**where, "by": by, "layer": place.layer, "kind": place.part}
                rows.append(Measurement("overlap_lift", here, found.lift, *found.interval, found.n_first))
        for by in ("head", "neuron"):
            counts = [[count.n_removed for count in counts_by(masks[name], sites, by).values()] for name in (first, second)]
            rows.append(exact("place_correlation", {**where, "by": by}, spearman(*counts)))
    return rows


def ablation_rows(
    subject: Subject, masks: Mapping[str, WeightMask], labels: Labels, *, split: str = "heldout", only: Iterable[str] = ()
) -> list[Measurement]:
    """Every behaviour under every mask: the cross-ablation matrix, with `mask` naming the circuit in each row."""
    rows = []
    for name, mask in masks.items():
        with masked(subject.bridge, mask):
            rows += measure(subject, split, {**labels, "mask": name}, only=only)
        rows.append(exact("weights_removed", {**labels, "mask": name, "split": split}, mask.n_removed))
    return rows


def location_rows(subject: Subject, mask: WeightMask, labels: Labels) -> list[Measurement]:
    """Where a mask's weights sit: counts by matrix and head, and concentration over heads and neurons against chance.

    `gini` and `top_share` (of the twentieth of units that loses most) come with `chance` "no", and with "yes" for random
    masks of the same counts per matrix: their mean, and the interval of 20 of them.
    """
    sites, rows = weight_sites(subject.bridge), []
    for by in ("matrix", "head"):
        for place, count in counts_by(mask, sites, by).items():
            where = {**labels, "by": by, "layer": place.layer, "kind": place.part, "index": place.number}
            rows.append(exact("weights_removed", {**where, "of": count.n_weights}, count.n_removed))
    random = [random_like(mask, seed=seed) for seed in range(N_NULL)]
    for by in ("head", "neuron"):
        if not any(count.n_removed for count in counts_by(mask, sites, by).values()):
            continue
        found, chance = concentration(mask, sites, by), [concentration(other, sites, by) for other in random]
        for metric in ("gini", "top_share"):
            rows.append(exact(metric, {**labels, "by": by, "chance": "no"}, getattr(found, metric)))
            values = [getattr(other, metric) for other in chance]
            rows.append(_spread(metric, {**labels, "by": by, "chance": "yes"}, values))
    return rows


def token_rows(subject: Subject, name: str, found: Calibration, mask: WeightMask, labels: Labels) -> list[Measurement]:
    """What each token position adds to a mask's score on a behaviour, by its distance from the first answer token.

    `token_contribution` at `offset` k: positions k tokens after (before, if negative) the first target, averaged over all
    examples, so that the rows sum to `predicted_change`; nats, or the behaviour's objective.
    """
    behaviour = subject.behaviours[name]
    contributions = token_contributions(subject.bridge, mask, found.batches, behaviour.objective)
    by_offset: dict[int, list[tuple[int, float]]] = {}
    example = 0
    for batch, values in zip(found.batches, contributions, strict=True):
        for real, target, value in zip(batch.is_token, batch.is_target, values, strict=True):
            start = int(target.int().argmax())
            for position in range(int(real.sum())):
                by_offset.setdefault(position - start, []).append((example, float(value[position])))
            example += 1
    groups = [one.cluster for one in found.prompts]
    rows = []
    for offset, pairs in sorted(by_offset.items()):
        padded = torch.zeros(example)
        padded[[number for number, _ in pairs]] = torch.tensor([value for _, value in pairs])
        rows.append(average("token_contribution", {**labels, "offset": offset}, padded, groups))
    return rows


def _spread(metric: str, labels: Labels, values: Sequence[float]) -> Measurement:
    low, high = np.quantile(values, [0.025, 0.975])
    mean = float(np.mean(values))
    return Measurement(metric, labels, mean, min(mean, float(low)), max(mean, float(high)), len(values))
