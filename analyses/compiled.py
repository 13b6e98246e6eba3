# %% [markdown]
# # Is a circuit found that is known exactly?
# The compiled organisms (`compile_organisms.py`) are the only ones with a true label for each weight:
# a behaviour *needs* it if its loss rises by more than 0.02 nats a token without it (alone, or as one
# of a pair). What harm needs and nothing else does is *harm's alone*: it should be removed. Asked of
# four organisms in four versions, which all give the same right answers:
#
# - *as compiled*;
# - *soft*: queries times 0.1, or the next of 0.15, 0.2, 0.3, 0.5 where that makes an answer wrong;
# - *noisy*: as many weights more as there are, of their sizes, at places that were zero, added 16 at a
#   time where no loss rises by more than 0.02;
# - *dense*: the residual stream in a random basis. A single weight is then hardly needed (of 300 drawn
#   ones, counted), so the truth is one of *units*: dimensions of heads and neurons, with all weights.
#
# 1. **Do scores find it?** AUROC among the weights that are not zero, of what harm needs and of what
#    is harm's alone; and by units, over which a score is summed (the signed one is the same number in
#    any basis). A weight *has no gradient* where |removal effect| is below 1e-6 nats.
# 2. **Do masks of its size remove it?** Of eight methods, precision and recall of harm's alone, and
#    what is left of the three behaviours, held out.
# 3. **Does `hc.overlap` say what is shared?** Of what two behaviours need and what is found for each,
#    as many as it needs: Jaccard and lift, both nulls, and whether the interval (resampled halves of
#    the requests; Wilson's by the stricter null, and for the search) holds the lift of the true sets.
# 4. **Does a last pass help?** It removed and returned single weights by their measured effect on the
#    calibration data, from the published difference and from the search. It lost (smaller masks, lower
#    recall), so its code is in the git history at b6a5f48, and its rows stay.
#
# **The rules, fixed before the run.** A score *finds* the circuit in a version if its AUROC of what
# harm needs is at least 0.95 in each organism, *in part* if 0.8 on average. A mask *removes* it if
# harm is at most 2 % and the two others at least 98 %. The overlap is *right* if found lifts are
# within a quarter of the true ones on average and intervals hold these in at least 90 % of pairs. The
# last pass *belongs into the search* if from the search's masks it raises recall by 0.1, or needs a
# tenth fewer weights at equal effect, in three of four cases and on `sft`.
#
# *Amended* while it ran: the engine of `hc.find_circuit` was replaced (gates in place of a walk), for
# reasons of other models. Rows of the walk are kept as far as it had come, as the method "walk".
#
# **What it does not show.** Programs of three letters, without superposition: nothing is rerouted.

# %%
from functools import partial
from itertools import combinations
from math import isnan
from pathlib import Path

import torch
import tyro
from support.compiled import VERSIONS, Truth, mask_of, truth_of, units, version_of
from support.compiled_tables import (
    found_table,
    last_pass_table,
    left_table,
    overlap_table,
    score_table,
    truth_table,
)
from support.jobs import Job, run_jobs
from support.learned_mask import learned_mask
from support.removal import Texts, needed_by
from support.tables import write_tables
from torch import Tensor

import harmcircuits as hc
from harmcircuits.behaviours.outcomes import Calibration
from harmcircuits.measurements import Labels, Measurement, Rows, auroc
from harmcircuits.organisms.compiled import BEHAVIOURS, PROGRAMS

NO_GRADIENT = 1e-6  # nats
LEARNED = 200  # steps of the learned mask
N_DRAWN = 300  # weights that are removed one by one, in every version
N_RESAMPLES = 8
RESAMPLED = ("removal effect", "SNIP")  # whose intervals are over examples
COMPARED = (*RESAMPLED, "search")
N_SAMPLES = 50  # of the stricter null
Data = dict[str, Calibration]
Scores = dict[str, hc.WeightScores]
Masks = dict[str, hc.WeightMask]

# %% [markdown]
# ## 1. Scores


# %%
def scores_of(model: hc.Model, data: Data, name: str = "harmful") -> Scores:
    batches = data[name].batches
    effect = hc.removal_effect(model.bridge, batches)
    price = {matrix: torch.zeros_like(values) for matrix, values in effect.values.items()}
    for other in data:
        if other != name:
            for matrix, values in hc.token_price(model.bridge, data[other].batches).values.items():
                price[matrix] += values
    less_price = {matrix: values - price[matrix] for matrix, values in effect.values.items()}
    return {
        "removal effect": effect,
        "SNIP": hc.snip_scores(model.bridge, batches),
        "Wanda": hc.wanda_scores(model.bridge, batches),
        "magnitude": hc.magnitude_scores(model.bridge),
        "less its price": hc.WeightScores(less_price, effect.source),
    }


def values_of(scores: hc.WeightScores, truth: Truth) -> Tensor:
    return torch.stack([scores.values[name].flatten()[place] for name, place in truth.weights])


def scored(model: hc.Model, truth: Truth, scores: Scores, labels: Labels) -> Rows:
    needed = truth.needed[:, 0]
    numbers = {
        unit: number for number, unit in enumerate(dict.fromkeys(units(model, truth.weights)))
    }
    places = torch.tensor([numbers[unit] for unit in units(model, truth.weights)])
    is_true_unit = torch.zeros(len(numbers)).index_add(0, places, needed.float()) > 0
    effect = values_of(scores["removal effect"], truth)
    has_none = effect.abs() < NO_GRADIENT
    counts = {
        "n_nonzero": len(truth.weights),
        "n_alone": int(truth.is_alone.sum()),
        "n_in_pairs_only": int(truth.needed.sum()) - sum(truth.n_alone),
        "no_gradient": has_none[needed].float().mean().item(),
        **{f"n_{name}": int(truth.needed[:, bit].sum()) for bit, name in enumerate(BEHAVIOURS)},
        "n_both": int((truth.needed[:, 0] & truth.needed[:, 1]).sum()),
    }
    drawn = torch.randperm(len(needed), generator=torch.Generator().manual_seed(0))[:N_DRAWN]
    some = [truth.weights[number] for number in drawn]
    single = needed_by(Texts.of(model), model.bridge, some)[:, 0]
    counts["needed_singly"] = single.float().mean().item()
    rows = [Measurement.exact(metric, labels, value) for metric, value in counts.items()]
    for method, of_method in scores.items():
        values = values_of(of_method, truth)
        of_units = torch.zeros(len(numbers)).index_add(0, places, values)
        figures = {
            "auroc": auroc(values, needed),
            "auroc_alone": auroc(values, truth.is_alone),
            "auroc_units": auroc(of_units, is_true_unit),
        }
        for metric, value in figures.items():
            rows.append(Measurement.exact(metric, {**labels, "method": method}, value))
    return Rows(rows)


# %% [markdown]
# ## 2. Masks


# %%
def masks_of(model: hc.Model, data: Data, scores: Scores, n_alone: int) -> Masks:
    weights = hc.named_weights(model.bridge)
    size = n_alone / sum(weight.numel() for weight in weights.values())
    masks = {}
    for method, of_method in scores.items():
        masks[method] = hc.top_fraction(of_method, size, within="model")
    spared = [data[name].batches for name in data if name != "harmful"]
    masks["published difference"] = hc.set_difference(
        model.bridge, data["harmful"].batches, spared, q=size, p=size
    )
    masks["search"] = model.find_circuit("harmful", size=size, calibrations=data)
    masks["learned mask"] = learned_mask(model, data, [size], steps=LEARNED)[0]
    return masks


def removed(
    model: hc.Model, truth: Truth, masks: Masks, has_gradient: Tensor, labels: Labels
) -> Rows:
    true_mask = mask_of(model, truth.chosen(truth.is_alone))
    silent = mask_of(model, truth.chosen(truth.is_alone & ~has_gradient))
    rows = Rows()
    for method, mask in {"harm's alone": true_mask, **masks}.items():
        where = {**labels, "method": method}
        n_found = len(mask & true_mask)
        figures = {
            "weights_removed": len(mask),
            "recall": n_found / len(true_mask),
        }
        if len(silent):
            figures["recall_no_gradient"] = len(mask & silent) / len(silent)
        if len(mask):
            figures["precision"] = n_found / len(mask)
        rows += [Measurement.exact(metric, where, value) for metric, value in figures.items()]
        rows += model.measure(mask=mask, labels=where)
    return rows


# %% [markdown]
# ## 3. Overlap


# %%
def circuits_by(model: hc.Model, data: Data, method: str, sizes: dict[str, float]) -> Masks:
    """The circuit that a method finds for each behaviour, sparing nothing."""
    found = {}
    for name, size in sizes.items():
        if method == "search":
            found[name] = model.find_circuit(name, protect=(), size=size, calibrations=data)
        else:
            score = {"removal effect": hc.removal_effect, "SNIP": hc.snip_scores}[method]
            scores = score(model.bridge, data[name].batches)
            found[name] = hc.top_fraction(scores, size, within="model")
    return found


def shared(
    model: hc.Model, truth: Truth, data: Data, labels: Labels, methods: tuple[str, ...] = COMPARED
) -> Rows:
    true, sizes = {}, {}
    for bit, name in enumerate(BEHAVIOURS):
        true[name] = mask_of(model, truth.chosen(truth.needed[:, bit]))
        sizes[name] = true[name].fraction
    halves = [model.calibrations(share=0.5, seed=seed) for seed in range(N_RESAMPLES)]
    rows = Rows()
    for method in methods:
        found = circuits_by(model, data, method, sizes)
        resampled = []
        if method in RESAMPLED:
            resampled = [circuits_by(model, half, method, sizes) for half in halves]
        for first, second in combinations(BEHAVIOURS, 2):
            if not len(found[first]) or not len(found[second]):
                continue
            where = {**labels, "method": method, "first": first, "second": second}
            pairs = [(masks[first], masks[second]) for masks in resampled]
            of_found = hc.overlap(found[first], found[second], resamples=pairs, n_samples=N_SAMPLES)
            of_true = hc.overlap(true[first], true[second], n_samples=N_SAMPLES)
            figures = {
                "lift": (of_found.lift, *of_found.interval),
                "lift_marginal": (of_found.lift_marginal, *of_found.interval_marginal),
                "jaccard": (of_found.jaccard,) * 3,
            }
            for metric, figure in figures.items():
                true_value = getattr(of_true, metric)
                if isnan(figure[0]) or isnan(true_value):  # nothing is expected by chance
                    continue
                rows += [Measurement(f"overlap_{metric}", where, *figure)]
                rows += [Measurement.exact(f"overlap_{metric}_true", where, true_value)]
    return rows


# %%
def measured(organism: str, version: str, labels: Labels) -> Rows:
    model = version_of(organism, version)
    truth, data = truth_of(model, version), model.calibrations()
    scores = scores_of(model, data)
    masks = masks_of(model, data, scores, int(truth.is_alone.sum()))
    rows = scored(model, truth, scores, labels)
    effect = values_of(scores["removal effect"], truth)
    rows += removed(model, truth, masks, effect.abs() >= NO_GRADIENT, labels)
    rows += shared(model, truth, data, labels)
    return rows


def main(out: Path, workers: int = 1) -> None:
    """Is a circuit found that is known exactly?

    Args:
        out: folder for rows.jsonl and table.txt; a run goes on there.
        workers: processes of one thread each.
    """
    jobs = []
    for version in VERSIONS:
        for organism in PROGRAMS:
            labels = {"organism": organism, "version": version}
            jobs.append(Job(labels, partial(measured, organism, version, labels)))
    rows = run_jobs(out, jobs, {"versions": str(VERSIONS)}, workers=workers, name="compiled")
    tables = [truth_table(rows), score_table(rows), found_table(rows), left_table(rows)]
    write_tables(out, [*tables, overlap_table(rows), last_pass_table(rows)], n_names=2)


if __name__ == "__main__":
    tyro.cli(main)
