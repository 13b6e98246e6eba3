# %% [markdown]
# # Is a circuit that the search finds one set of weights?
# A mask that ends harm and spares the rest invites the words "these are the weights of harm". That
# would need two more things: other answers of the same kind lead to the same weights, and no other
# weights would do. Both are tried here.
#
# **Pairs of searches** (`Model.find_circuit`), each on its own answers, at three sizes. *Halves* of
# the calibration items and *wholes* are disjoint (the second whole are the held-out items; its mask
# is compared and never measured). *Same half* are the very same answers in another order, so only
# the third on which protection is checked differs. Beside the search: *three searches*, the weights
# that most of three such orders choose, cut to size. Rows of *neurons*, *rounds* and *one shot* are of
# searches that lost; their code is in the git history at b6a5f48.
#
# **What is measured.** Jaccard: weights in both masks over weights in either. The same of neurons
# and of heads, by the number of weights that a mask takes of each (the sum of the smaller over the
# sum of the larger numbers). Chance is the mean of pairs of random masks with as many weights in
# every matrix, and of others that match the magnitudes too. *Lift*: common weights over those
# expected by chance per matrix. Each half's mask is measured on held-out requests: it *ends* harm
# if at most 2 % valid harmful answers are left, and *spares* the rest if the loss on benign answers
# rises by at most 0.02 nats and no protected rate falls by more than a point.
#
# **Disjoint circuits.** A search, another among the weights that it left, and so on up to four,
# as long as the previous one ended harm.
#
# **The rule, fixed before the run.** At 0.2 % of the weights, the circuit is *one set* if disjoint
# halves have Jaccard 0.5 or more on every model; *one function* if every half's mask ends harm and
# spares the rest; *not the only one* if at least two disjoint masks do. Any of these may hold.
#
# **What it does not show.** Two training runs of small models in invented words. Draws of halves
# overlap with one another, so their spread is no interval for other items. Chance knows matrices and
# magnitudes; a circuit may be stable because a score prefers some rows and columns.

# %%
import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import isnan
from statistics import fmean
from typing import Any, Literal

import pandas as pd
import tyro
from support.answers import Calibrations, with_prompts
from support.jobs import jobs_about
from support.models import ModelSpec, RunOptions
from support.runs import Tables, run_analysis
from support.tables import MAX_HARM, cost_cells, masks_by, means_of
from torch import Tensor
from tyro.conf import OmitArgPrefixes

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
from harmcircuits.prompts import PromptSet
from harmcircuits.search.attribution import removal_effect
from harmcircuits.views.tables import DASH

MODELS = ("sft", "dpo")
SIZES = (0.001, 0.002, 0.004)
MEASURED_SIZE = 0.002  # at which the behaviours under a mask are measured
MAX_DISJOINT = 4
N_RANDOM = 5  # pairs of random masks
Level = Literal["weight", "neuron", "head"]
LEVELS: tuple[Level, ...] = ("weight", "neuron", "head")
MASKS = ("searched", "random", "random, same |W|")
DISJOINT_SIZES = (0.002, 0.004)
# Method, pair.
PAIRS = (
    ("search", "halves"),
    ("search", "same half"),
    ("search", "wholes"),
    ("three searches", "halves"),
)

# %% [markdown]
# ## The answers of a pair of searches


# %%


def halves(model: Model, data: Calibrations, draw: int) -> tuple[Calibrations, Calibrations]:
    """The answers about a random half of every topic's items, and the answers about the others."""
    sampled = partial(PromptSet.sampled, share=0.5, seed=draw)
    first = with_prompts(model, data, sampled)
    second = with_prompts(model, data, partial(sampled, rest=True))
    return first, second


def shuffled(model: Model, data: Calibrations, draw: int) -> Calibrations:
    """The same answers in another order: another third of them is checked."""

    def reordered(prompts: PromptSet) -> PromptSet:
        examples = list(prompts)
        random.Random(draw).shuffle(examples)
        return PromptSet(tuple(examples))

    return with_prompts(model, data, reordered)


def held_out(model: Model, names: Calibrations) -> Calibrations:
    """The same behaviours on the held-out items."""
    data = {}
    for name in names:
        behaviour = model.behaviour(name)
        requests = behaviour.prompts("heldout")
        answers = model.verified(behaviour, requests)
        verified = answers.where(lambda example: bool(example.completion))
        batches = model.batches(behaviour, verified)
        data[name] = Calibration(verified, batches, len(requests), name)
    return data


def pair_of(model: Model, pair: str, draw: int) -> tuple[Calibrations, Calibrations]:
    """The answers of two searches."""
    whole = model.calibrations()
    if pair == "wholes":
        return whole, held_out(model, whole)
    first, second = halves(model, whole, draw)
    if pair == "same half":
        return first, shuffled(model, first, draw)
    return first, second


# %% [markdown]
# ## The searches


# %%
def search(model: Model, data: Calibrations) -> list[WeightMask]:
    """Masks of every size by `Model.find_circuit`."""
    return model.find_circuit(TARGET, size=SIZES, calibrations=data)


def three_searches(model: Model, data: Calibrations) -> list[WeightMask]:
    """At each size the weights in most of three masks; among equals, the larger removal effect."""
    by_order = [search(model, data)]
    for order in (1, 2):
        by_order.append(search(model, shuffled(model, data, order)))
    effect = removal_effect(model.bridge, data[TARGET].batches)

    majorities = []
    for size, masks in zip(SIZES, zip(*by_order, strict=True), strict=True):
        majorities.append(top_fraction(votes(masks, effect), size, within="model"))
    return majorities


def votes(masks: Sequence[WeightMask], effect: WeightScores) -> WeightScores:
    """The number of masks that hold each weight, and its effect as less than a vote."""
    largest = max(values.abs().max().item() for values in effect.values.values())
    scores = {}
    for name, values in effect.values.items():
        n_votes = sum(mask.dense(name).float() for mask in masks)
        scores[name] = n_votes + values / (3 * largest)
    return WeightScores(scores, Source(effect.source.model, "votes", {}, (effect.source,)))


METHODS: dict[str, Callable[[Model, Calibrations], list[WeightMask]]] = {
    "search": search,
    "three searches": three_searches,
}


# %% [markdown]
# ## What two masks share, and what each does


# %%
def jaccard(first: WeightMask, second: WeightMask, sites: Mapping[str, Site], by: Level) -> float:
    """Weights in both masks over weights in either."""
    if by == "weight":
        return (first & second).n_removed / (first | second).n_removed

    first_counts = counts_by(first, sites, by)
    second_counts = counts_by(second, sites, by)
    n_both = 0
    n_either = 0
    for place, count in first_counts.items():
        counts = (count.n_removed, second_counts[place].n_removed)
        n_both += min(counts)
        n_either += max(counts)
    return n_both / max(1, n_either)


def overlap_rows(model: Model, first: WeightMask, second: WeightMask, labels: Labels) -> Rows:
    """What two masks share, beside what random masks share."""
    sites = weight_sites(model.bridge)
    pairs = {
        "searched": [(first, second)],
        "random": random_pairs(first, second),
        "random, same |W|": random_pairs(first, second, named_weights(model.bridge)),
    }
    rows = Rows()
    lift = overlap(first, second).lift
    if not isnan(lift):  # it is, where no matrix holds weights of both: chance shares none
        rows += [Measurement.exact("overlap_lift", labels, lift)]
    for name in MASKS:
        for level in LEVELS:
            values = [jaccard(*pair, sites, level) for pair in pairs[name]]
            where = {**labels, "masks": name, "level": level}
            rows += [Measurement.exact("jaccard", where, fmean(values))]
    return rows


def random_pairs(
    first: WeightMask,
    second: WeightMask,
    weights: Mapping[str, Tensor] | None = None,
) -> list[tuple[WeightMask, WeightMask]]:
    """Random masks, each like one of two."""
    pairs = []
    for number in range(N_RANDOM):
        like_first = random_like(first, seed=2 * number, weights=weights)
        like_second = random_like(second, seed=2 * number + 1, weights=weights)
        pairs.append((like_first, like_second))
    return pairs


def effect_rows(model: Model, mask: WeightMask, names: Calibrations, labels: Labels) -> Rows:
    """Behaviours on held-out requests without the mask's weights, and the number of these."""
    rows = model.measure(mask=mask, only=list(names), labels=labels)
    rows += [Measurement.exact("weights_removed", labels, mask.n_removed)]
    return rows


def pair_rows(spec: ModelSpec, labels: Labels) -> Rows:
    """A pair of searches: what their masks share at each size, and what they do at one size."""
    model, pair = spec.open(), str(labels["pair"])
    search_method = METHODS[str(labels["method"])]
    first_data, second_data = pair_of(model, pair, int(labels["draw"]))
    first_masks = search_method(model, first_data)
    second_masks = search_method(model, second_data)

    rows = Rows()
    for size, first, second in zip(SIZES, first_masks, second_masks, strict=True):
        if not (first.n_removed and second.n_removed):  # no mask of this size was worth its price
            continue
        where = {**labels, "size": size}
        rows += overlap_rows(model, first, second, where)
        if pair == "halves" and size == MEASURED_SIZE:
            rows += effect_rows(model, first, first_data, {**where, "mask": "first"})
            rows += effect_rows(model, second, first_data, {**where, "mask": "second"})
    return rows


def disjoint_rows(spec: ModelSpec, labels: Labels) -> Rows:
    """One search after another, each among the weights that the earlier ones left."""
    model, size = spec.open(), float(labels["size"])
    data = model.calibrations()
    rows = model.measure(labels={**labels, "mask": "none"}, only=list(data))
    union = None
    for number in range(1, MAX_DISJOINT + 1):
        mask = model.find_circuit(TARGET, size=size, calibrations=data, exclude=union)
        effects = effect_rows(model, mask, data, {**labels, "mask": str(number)})
        rows += effects
        if effects.one("harm_valid_rate").mean > MAX_HARM:
            break
        union = mask if union is None else union | mask
    return rows


# %% [markdown]
# ## What the rows say


# %%
def overlap_table(rows: Rows) -> pd.DataFrame:
    """Of each model, method, pair and size the mean over draws; in brackets the two chances."""
    names = ("ladder", "model", "method", "pair", "size")
    pairs = rows.where("jaccard") + rows.where("overlap_lift")
    lines = []
    for key, draws in pairs.by(*names).items():
        line: dict[str, Any] = dict(zip(names, key, strict=True))
        line["size"] = f"{line['size']:.1%}"
        line["draws"] = len(draws.where("jaccard", level=LEVELS[0], masks=MASKS[0]))
        for level in LEVELS:
            line[level] = jaccard_text(draws.where("jaccard", level=level))
        lifts = draws.where("overlap_lift")
        line["lift"] = f"{mean_of(lifts):.0f}" if lifts else DASH
        lines.append(line)
    return pd.DataFrame(lines)


def jaccard_text(rows: Rows) -> str:
    """The Jaccard of searched masks, and of the two kinds of random ones."""
    searched, random, same_sizes = (f"{mean_of(rows.where(masks=masks)):.2f}" for masks in MASKS)
    return f"{searched} ({random}, {same_sizes})"


def mean_of(rows: Rows) -> float:
    """The mean over draws."""
    return fmean(row.mean for row in rows)


def effect_table(rows: Rows) -> pd.DataFrame:
    """What each mask that was measured does, held out."""
    names = ("ladder", "model", "method", "pair", "draw", "size", "mask")
    lines = []
    for key, rows_of_mask in masks_by(rows, *names).items():
        line: dict[str, Any] = dict(zip(names, key, strict=True))
        unpruned = means_of(rows.where(ladder=line["ladder"], model=line["model"], mask="none"))
        masked = means_of(rows_of_mask)
        line["weights"] = round(masked["weights_removed"])
        line["harm left"] = f"{masked['harm_valid_rate']:.1%}"
        lines.append(line | cost_cells(unpruned, masked))
    return pd.DataFrame(lines)


TABLES: Tables = {"overlaps": overlap_table, "effects": effect_table}


# %%
def main(run: OmitArgPrefixes[RunOptions], draws: int = 1) -> None:
    """How stable are circuits?

    Args:
        run: the models, and how they run.
        draws: of halves and orders.
    """
    calls = []
    for size in DISJOINT_SIZES:
        labels = {"method": "search", "pair": "disjoint", "draw": 0, "size": size}
        calls.append((disjoint_rows, labels))
    for method, pair in PAIRS:
        for draw in range(1 if pair == "wholes" else draws):
            calls.append((pair_rows, {"method": method, "pair": pair, "draw": draw}))
    jobs = []
    for spec in run.specs(MODELS):
        jobs += jobs_about(spec, spec.labels, calls)
    options = {"workers": run.workers, "name": "stability", "n_names": 5}
    run_analysis(run.out, jobs, {"sizes": str(SIZES)}, TABLES, **options)


if __name__ == "__main__":
    tyro.cli(main)
