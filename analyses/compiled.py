# %% [markdown]
# # Is a circuit found that is known exactly?
# The compiled organisms (`compile_organisms.py`) are the only ones with a true label for each weight:
# a behaviour *needs* it if its loss rises by more than 0.02 nats a token without it (alone, or as one
# of a pair). Weights that harm needs and nothing else does are *harm's alone*: they should be removed.
# Four organisms in four versions, which all give the same right answers:
#
# - *as compiled*;
# - *soft*: queries times 0.1, or the next of 0.15, 0.2, 0.3, 0.5 where that makes an answer wrong;
# - *noisy*: as many weights more as there are, of their sizes, at places that were zero, added 16 at a
#   time where no loss rises by more than 0.02;
# - *dense*: the residual stream in a random basis. A single weight is then hardly needed (of a sample
#   of 300, counted), so the truth is one of *units*: dimensions of heads and neurons, with all weights.
#
# 1. **Do scores find it?** AUROC among the weights that are not zero, of the weights that harm needs and
#    of harm's alone; and by units, over which a score is summed (the signed one is the same number in
#    any basis). A weight *has no gradient* where |removal effect| is below 1e-6 nats.
# 2. **Do masks of its size remove it?** Of eight methods, precision and recall of harm's alone, and
#    the answers of the three behaviours, held out.
# 3. **Does `hc.overlap` say what is shared?** Of the weights that two behaviours need and those found
#    for each, as many as it needs: Jaccard and lift, both nulls, and whether the interval (resampled
#    halves of the requests; Wilson's by the stricter null, and for the search) holds the lift of the
#    true sets.
# 4. **Does a last pass help?** It removed and returned single weights by their measured effect on the
#    calibration data, from the published difference and from the search. It lost (smaller masks, lower
#    recall), so its code went (git keeps it, at b6a5f48), and its rows stay.
#
# **The rules, fixed before the run.** A score *finds* the circuit in a version if its AUROC of the
# weights that harm needs is at least 0.95 in each organism, *in part* if 0.8 on average. A mask *removes*
# it if harm is at most 2 % and the two others at least 98 %. The overlap is *right* if found lifts are
# within a quarter of the true ones on average and intervals hold these in at least 90 % of pairs. The
# last pass *belongs into the search* if from the search's masks it raises recall by 0.1, or needs a
# tenth fewer weights at equal effect, in three of four cases and on `sft`.
#
# *Amended* while it ran: the engine of `hc.find_circuit` was replaced (gates in place of a walk), for
# reasons of other models. Rows of the walk are kept as far as it had come, as the method "walk". All but
# these and the last passes was run again on 7 December 2026, since the search had changed twice.
#
# **What it does not show.** Programs of three letters, without superposition: nothing is rerouted.

# %%
from functools import partial
from itertools import combinations, product
from math import isnan

import torch
import tyro
from support.compiled import VERSIONS, Truth, mask_of, truth_of, units, version_of
from support.compiled_tables import (
    found_table,
    left_table,
    overlap_table,
    score_table,
    summary_table,
    truth_table,
)
from support.jobs import Job
from support.learned_mask import learned_mask
from support.models import RunOptions
from support.removal import Texts, needed_by
from support.runs import Tables, run_analysis
from torch import Tensor
from tyro.conf import OmitArgPrefixes

import harmcircuits as hc
from harmcircuits.behaviours.outcomes import Calibration
from harmcircuits.measurements import Labels, Measurement, Rows, auroc
from harmcircuits.organisms.compiled import BEHAVIOURS, PROGRAMS

NO_GRADIENT = 1e-6  # nats
LEARNED_STEPS = 200  # of the learned mask
N_SAMPLED = 300  # weights that are removed singly, in every version
N_RESAMPLES = 8
RESAMPLED = {"removal effect": hc.removal_effect, "SNIP": hc.snip_scores}  # over examples
N_NULL = 50  # samples of the stricter null
Data = dict[str, Calibration]
Scores = dict[str, hc.WeightScores]
Masks = dict[str, hc.WeightMask]
TABLES: Tables = {
    "masks": summary_table,
    "truth": truth_table,
    "scores": score_table,
    "found": found_table,
    "left": left_table,
    "overlaps": overlap_table,
}

# %% [markdown]
# ## 1. Scores


# %%
def scores_of(model: hc.Model, data: Data) -> Scores:
    """Every score of the weights for harm."""
    batches = data["harmful"].batches
    effect = hc.removal_effect(model.bridge, batches)
    price = {matrix: torch.zeros_like(values) for matrix, values in effect.values.items()}
    for name in data:
        if name != "harmful":
            token_price = hc.token_price(model.bridge, data[name].batches)
            for matrix, values in token_price.values.items():
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
    """The scores of the weights that are not zero."""
    return torch.stack([scores.values[name].flatten()[place] for name, place in truth.weights])


def score_rows(model: hc.Model, truth: Truth, scores: Scores, labels: Labels) -> Rows:
    """The counts of true weights, and the AUROC of every score."""
    figures = count_figures(model, truth, values_of(scores["removal effect"], truth))
    rows = [Measurement.exact(metric, labels, value) for metric, value in figures.items()]

    weight_units = units(model, truth.weights)
    numbers = {unit: number for number, unit in enumerate(dict.fromkeys(weight_units))}
    places = torch.tensor([numbers[unit] for unit in weight_units])
    needed = truth.needed[:, 0]
    is_true_unit = torch.zeros(len(numbers)).index_add(0, places, needed.float()) > 0
    for method, weight_scores in scores.items():
        values = values_of(weight_scores, truth)
        unit_values = torch.zeros(len(numbers)).index_add(0, places, values)
        figures = {
            "auroc": auroc(values, needed),
            "auroc_alone": auroc(values, truth.is_alone),
            "auroc_units": auroc(unit_values, is_true_unit),
        }
        for metric, value in figures.items():
            rows.append(Measurement.exact(metric, {**labels, "method": method}, value))
    return Rows(rows)


def count_figures(model: hc.Model, truth: Truth, effect: Tensor) -> dict[str, float]:
    """How many weights each behaviour needs; of harm's, the share without a gradient."""
    needed = truth.needed[:, 0]
    order = torch.randperm(len(needed), generator=torch.Generator().manual_seed(0))
    sample = [truth.weights[number] for number in order[:N_SAMPLED]]
    is_needed_singly = needed_by(Texts.of(model), model.bridge, sample)[:, 0]
    return {
        "n_nonzero": len(truth.weights),
        "n_alone": int(truth.is_alone.sum()),
        "n_in_pairs_only": int(truth.needed.sum()) - sum(truth.n_alone),
        "no_gradient": (effect.abs() < NO_GRADIENT)[needed].float().mean().item(),
        **{f"n_{name}": int(truth.needed[:, bit].sum()) for bit, name in enumerate(BEHAVIOURS)},
        "n_both": int((needed & truth.needed[:, 1]).sum()),
        "needed_singly": is_needed_singly.float().mean().item(),
    }


# %% [markdown]
# ## 2. Masks


# %%
def masks_of(model: hc.Model, data: Data, scores: Scores, n_alone: int) -> Masks:
    """A mask of every method, of as many weights as are harm's alone."""
    weights = hc.named_weights(model.bridge)
    size = n_alone / sum(weight.numel() for weight in weights.values())
    masks = {}
    for method, weight_scores in scores.items():
        masks[method] = hc.top_fraction(weight_scores, size, within="model")
    protected = [data[name].batches for name in data if name != "harmful"]
    masks["published difference"] = hc.set_difference(
        model.bridge, data["harmful"].batches, protected, q=size, p=size
    )
    masks["search"] = model.find_circuit("harmful", size=size, calibrations=data)
    masks["learned mask"] = learned_mask(model, data, [size], steps=LEARNED_STEPS)[0]
    return masks


def mask_rows(
    model: hc.Model, truth: Truth, masks: Masks, has_gradient: Tensor, labels: Labels
) -> Rows:
    """Recall and precision of every mask, and the answers under it."""
    true_mask = mask_of(model, truth.chosen(truth.is_alone))
    silent = mask_of(model, truth.chosen(truth.is_alone & ~has_gradient))
    rows = Rows()
    for method, mask in {"harm's alone": true_mask, **masks}.items():
        where = {**labels, "method": method}
        n_true = len(mask & true_mask)
        figures = {"weights_removed": len(mask), "recall": n_true / len(true_mask)}
        if len(silent):
            figures["recall_no_gradient"] = len(mask & silent) / len(silent)
        if len(mask):
            figures["precision"] = n_true / len(mask)
        rows += [Measurement.exact(metric, where, value) for metric, value in figures.items()]
        rows += model.measure(mask=mask, labels=where)
    return rows


# %% [markdown]
# ## 3. Overlap


# %%
def circuits_by(model: hc.Model, data: Data, method: str, sizes: dict[str, float]) -> Masks:
    """The circuit that a method finds for each behaviour, with nothing protected."""
    circuits = {}
    for name, size in sizes.items():
        if method == "search":
            circuits[name] = model.find_circuit(name, protect=(), size=size, calibrations=data)
        else:
            scores = RESAMPLED[method](model.bridge, data[name].batches)
            circuits[name] = hc.top_fraction(scores, size, within="model")
    return circuits


def true_masks(model: hc.Model, truth: Truth) -> Masks:
    """The weights that each behaviour needs."""
    columns = truth.needed.unbind(dim=1)
    masks = [mask_of(model, truth.chosen(column)) for column in columns]
    return dict(zip(BEHAVIOURS, masks, strict=True))


def overlap_rows(model: hc.Model, truth: Truth, data: Data, labels: Labels) -> Rows:
    """The overlap of every two circuits that a method finds, beside that of the true ones."""
    true = true_masks(model, truth)
    sizes = {name: mask.fraction for name, mask in true.items()}
    halves = [model.calibrations(share=0.5, seed=seed) for seed in range(N_RESAMPLES)]
    rows = Rows()
    for method in (*RESAMPLED, "search"):
        circuits = circuits_by(model, data, method, sizes)
        samples = halves if method in RESAMPLED else []
        resamples = [circuits_by(model, half, method, sizes) for half in samples]
        names = [name for name in BEHAVIOURS if len(circuits[name])]
        for first, second in combinations(names, 2):
            where = {**labels, "method": method, "first": first, "second": second}
            rows += pair_rows(circuits, true, resamples, where)
    return rows


def pair_rows(circuits: Masks, true: Masks, resamples: list[Masks], where: Labels) -> Rows:
    """Lifts and Jaccard of two circuits, each beside that of the true ones.

    There is none where nothing is expected by chance.
    """
    first, second = str(where["first"]), str(where["second"])
    pairs = [(masks[first], masks[second]) for masks in resamples]
    ends = (circuits[first], circuits[second])
    overlap = hc.overlap(*ends, resamples=pairs, n_samples=N_NULL)
    true_overlap = hc.overlap(true[first], true[second], n_samples=N_NULL)
    figures = {
        "lift": (overlap.lift, *overlap.interval),
        "lift_marginal": (overlap.lift_marginal, *overlap.interval_marginal),
        "jaccard": (overlap.jaccard,) * 3,
    }
    rows = Rows()
    for metric, figure in figures.items():
        true_value = getattr(true_overlap, metric)
        if not isnan(figure[0]) and not isnan(true_value):
            rows += [Measurement(f"overlap_{metric}", where, *figure)]
            rows += [Measurement.exact(f"overlap_{metric}_true", where, true_value)]
    return rows


# %%
def organism_rows(organism: str, version: str, labels: Labels) -> Rows:
    """All rows of an organism in a version."""
    model = version_of(organism, version)
    truth, data = truth_of(model, version), model.calibrations()
    scores = scores_of(model, data)
    masks = masks_of(model, data, scores, int(truth.is_alone.sum()))
    rows = score_rows(model, truth, scores, labels)
    has_gradient = values_of(scores["removal effect"], truth).abs() >= NO_GRADIENT
    rows += mask_rows(model, truth, masks, has_gradient, labels)
    return rows + overlap_rows(model, truth, data, labels)


def main(run: OmitArgPrefixes[RunOptions]) -> None:
    """Is a circuit found that is known exactly?"""
    jobs = []
    for version, organism in product(VERSIONS, run.model or PROGRAMS):
        labels = {"organism": organism, "version": version}
        jobs.append(Job(labels, partial(organism_rows, organism, version, labels)))
    settings = {"versions": str(VERSIONS)}
    options = {"workers": run.workers, "name": "compiled", "n_names": 2}
    run_analysis(run.out, jobs, settings, TABLES, **options)


if __name__ == "__main__":
    tyro.cli(main)
