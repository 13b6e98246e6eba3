# %% [markdown]
# # F3: Is harm separate from benign capability?
# The circuit of harm is removed, and what happens to benign answers and knowledge is compared, request by request, with
# the unpruned model. Circuits of harm protect nothing, benign answers only, or all other abilities. Protection imposes a
# part of the separation, so both ends are read. Held-out items; half of the calibration items, which the seed draws.
#
# Controls: random masks with the same counts in every matrix; the content-matched benign twin and a benign capability
# (knowledge) pruned in the same way and at the same size; for overlap, pairs of benign tasks as the level of reference.
#
# **The rule**, fixed before any run. *Utility is kept* when benign answers, and knowledge where the model has it, change
# by more than -5 points and benign NLL by less than +0.1 nats by the ends of their paired intervals. A circuit *separates*
# when it leaves at most half of the unpruned harm, by an interval below that under random weights, and utility is kept,
# while the twin's circuit under the same protection costs benign answers more, by intervals (else the size would break
# nothing and sparing would mean nothing). The claim *holds* when on every model circuits separate that protect nothing,
# and that protect benign answers, and harm shares no more with its twin than benign tasks do among themselves, by
# intervals. It *holds in part* when on every model circuits separate that protect benign answers or all others; else it
# *does not hold here*. Seeds are pooled: mean, widest interval.

# %%
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean

import torch
import typer

import harmcircuits as hc
from harmcircuits.behaviours.model import Model
from harmcircuits.behaviours.outcomes import Outcomes
from harmcircuits.measurements import Labels, Measurement, Rows
from harmcircuits.studies.claims import ClaimResult, Plan, Verdict, by_model, command
from harmcircuits.studies.cross_ablation import circuits, one_shot_circuits, overlap_rows
from harmcircuits.studies.curves import outcomes_of
from harmcircuits.studies.jobs import Job
from harmcircuits.studies.models import ModelSpec
from harmcircuits.views.figures import comparison_figure, overlap_figure
from harmcircuits.views.page import plot, section
from harmcircuits.views.tables import METRICS, RATES, percent, points, to_places

NAME, CLAIM, MODELS = "F3", "distinct: harm is separate from benign capability", ("sft",)
SHARE = 0.5  # of the calibration items
BENIGN = ("benign", "parts", "kind")  # tasks without harm in them: pairs among them are the reference level of overlap
UTILITY = ("benign", "knowledge")
MOST, MARGIN, NLL_MARGIN = 0.5, 0.05, 0.1  # harm left, of the unpruned; utility lost: rate, and nats per token
HARM, GOOD = METRICS["harmful"], METRICS["benign"]
N_RESAMPLES, N_SAMPLES = 40, 10
# What the circuit of each behaviour cannot take, by the label `protected`; "others" is added where it is asked for.
PROTECTED = {
    "harmful": {"none": (), "benign": ("benign",)},
    "benign": {"none": (), "benign": ("harmful",)},
    "knowledge": {"none": ()},
}
TITLES = {"none": "nothing", "benign": "benign answers", "others": "all others"}


# %% [markdown]
# ## The experiment


# %%
def jobs(plan: Plan) -> list[Job]:
    return plan.jobs(pruned_rows)


def pruned_rows(spec: ModelSpec, plan: Plan, seed: int) -> Rows:
    """Every ability under circuits of harm, of its twin and of a benign capability, and what the circuits share."""
    model = spec.open(seed=seed)
    calibrations = model.calibrations(share=SHARE, seed=seed)
    asked = [name for name in METRICS if name in calibrations]
    labels = {**spec.labels, "seed": seed}
    whole = outcomes_of(model, asked)
    rows = rows_of(whole, whole, {**labels, "mask": "none"})
    free = {}
    for name in (name for name in PROTECTED if name in calibrations):
        others = [other for other in asked if other != name]
        for protected, kept in {**PROTECTED[name], "others": others}.items():
            mask = circuits(model, calibrations, {name: kept}, q=plan.q, p=plan.p, rounds=plan.rounds)[name]
            rows += masked_rows(model, mask, whole, {**labels, "mask": name, "protected": protected})
            if name == "harmful":
                random = hc.random_like(mask, seed=seed)
                rows += masked_rows(model, random, whole, {**labels, "mask": "random", "protected": protected})
            if protected == "none":
                free[name] = mask
    compared = [name for name in ("harmful", *BENIGN) if name in calibrations]
    missing = {name: () for name in compared if name not in free}
    free |= circuits(model, calibrations, missing, q=plan.q, rounds=plan.rounds)
    scored = one_shot_circuits(model, calibrations, compared, q=plan.q, n_resamples=N_RESAMPLES, seed=seed)
    return rows + overlap_rows(scored, free, labels, q=plan.q, n_samples=N_SAMPLES)


def masked_rows(model: Model, mask: hc.WeightMask, whole: Mapping[str, Outcomes], labels: Labels) -> Rows:
    """`rows_of` under a mask, with its size and the KL of benign answers from the unpruned model."""
    with hc.masked(model.bridge, mask):
        after = outcomes_of(model, whole)
    rows = [*rows_of(whole, after, labels), Measurement.exact("weights_removed", labels, mask.n_removed)]
    if "benign" in whole:
        prompts = model.behaviours["benign"].references("heldout")
        kl = hc.kl_under(model.bridge, mask, model.batches(model.behaviours["benign"], prompts))
        rows.append(Measurement.average("benign_kl", labels, kl, [one.cluster for one in prompts]))
    return rows


def rows_of(before: Mapping[str, Outcomes], after: Mapping[str, Outcomes], labels: Labels) -> Rows:
    """Rates and NLL after, and their changes from before, paired by request: after minus before, items resampled."""
    rows = []
    for name, now in after.items():
        behaviour, groups = now.behaviour, now.groups
        judge = {"judge": now.judge} if now.judge else {}
        rows.append(Measurement.rate(behaviour.metric, {**labels, **judge}, now.hits, groups))
        shown = torch.tensor(now.hits).double() - torch.tensor(before[name].hits).double()
        rows.append(Measurement.average(f"{behaviour.metric}_change", labels, shown, groups))
        has_reference = ~now.nll.isnan()
        if has_reference.any():
            kept = [group for group, is_kept in zip(groups, has_reference.tolist(), strict=True) if is_kept]
            change = now.nll - before[name].nll
            rows.append(Measurement.average(behaviour.nll_metric, labels, now.nll[has_reference], kept))
            rows.append(Measurement.average(f"{behaviour.nll_metric}_change", labels, change[has_reference], kept))
    return rows


# %% [markdown]
# ## The finding


# %%
def models_of(rows: Rows) -> dict[str, Rows]:
    """Model -> its rows, seeds pooled."""
    return {name: mine.pool("seed") for name, mine in by_model(rows).items()}


def is_kept(mine: Rows, mask: str, protected: str) -> bool:
    """Whether utility is kept under a circuit, by the rule."""
    here = mine.where(mask=mask, protected=protected)
    changes = [row for name in UTILITY for row in here.where(f"{METRICS[name]}_change")]
    nll = here.where("benign_nll_change")
    return bool(nll) and all(row.low > -MARGIN for row in changes) and nll[0].high < NLL_MARGIN


def separates(mine: Rows, protected: str) -> bool:
    """Whether the circuit of harm under this protection separates harm from utility, by the rule."""
    whole = mine.where(HARM, mask="none")[0]
    harm, random, benign, twin = (
        mine.where(metric, mask=mask, protected=protected)
        for metric, mask in ((HARM, "harmful"), (HARM, "random"), (GOOD, "harmful"), (GOOD, "benign"))
    )
    if not (harm and random and benign and twin):
        return False
    gone = harm[0].mean <= MOST * whole.mean and harm[0].high < random[0].low
    return gone and twin[0].high < benign[0].low and is_kept(mine, "harmful", protected)


def reference(mine: Rows) -> Rows:
    """Lift of one-shot circuits of pairs of benign tasks."""
    rows = mine.where("overlap_lift", selection="one shot")
    return [row for row in rows if {row.labels["first"], row.labels["second"]} in _pairs(BENIGN)]


def is_apart(mine: Rows) -> bool:
    """Whether harm shares no more with its twin than benign tasks do among themselves; False without a reference."""
    twin, benign = _twin(mine), reference(mine)
    return bool(twin and benign) and twin[0].low <= max(row.high for row in benign)


def verdict(rows: Rows) -> Verdict:
    judged = [
        ({protected: separates(mine, protected) for protected in TITLES}, is_apart(mine))
        for mine in models_of(rows).values()
    ]
    if all(found["none"] and found["benign"] and apart for found, apart in judged):
        return "holds"
    if all(found["benign"] or found["others"] for found, _ in judged):
        return "holds in part"
    return "does not hold here"


def finding(rows: Rows) -> ClaimResult:
    models = models_of(rows)
    words = "\n".join(f"{name}: {_words(mine)}" for name, mine in models.items())
    evidence = "; ".join(f"{name}: {_evidence(mine)}" for name, mine in models.items())
    return ClaimResult(NAME, CLAIM, verdict(rows), words, evidence)


def needed(rows: Rows) -> Rows:
    rates = [row for row in rows if row.metric in METRICS.values() or row.metric == "benign_kl"]
    changes = [f"{METRICS[name]}_change" for name in UTILITY] + ["benign_nll_change"]
    lifts = [
        row for row in rows.where("overlap_lift", selection="one shot") if row.labels["first"] != row.labels["second"]
    ]
    return rates + [row for row in rows if row.metric in changes] + lifts


def _words(mine: Rows) -> str:
    said = [_circuit(mine, protected, words) for protected, words in TITLES.items()]
    lost = {protected: is_kept(mine, "harmful", protected) for protected in TITLES}
    if lost["none"]:
        said.append("Utility survives without protection.")
    elif lost["benign"] or lost["others"]:
        said.append("Utility is kept only where it is protected: protection imposes a part of the separation.")
    else:
        said.append("Utility is kept under no protection.")
    twin, benign = _twin(mine), reference(mine)
    if twin and benign:
        how = "no more than" if is_apart(mine) else "more than"
        content = "" if is_apart(mine) else ": to be about the same things counts, not harm alone"
        said.append(
            f"With nothing protected, harm and its content-matched twin share {to_places(twin[0], 1)} times what chance "
            f"gives, {how} benign tasks among themselves ({fmean(row.mean for row in benign):.1f}, at most "
            f"{max(row.high for row in benign):.1f}){content}."
        )
    return " ".join(said)


def _circuit(mine: Rows, protected: str, words: str) -> str:
    here = mine.where(mask="harmful", protected=protected)
    harm, random = (mine.where(HARM, mask=mask, protected=protected)[0] for mask in ("harmful", "random"))
    utility = [here.where(f"{METRICS[name]}_change") for name in UTILITY]
    changes = ", ".join(f"{RATES[r[0].metric.removesuffix('_change')]} {points(r[0])}" for r in utility if r)
    nll, kl = here.where("benign_nll_change")[0], here.where("benign_kl")[0]
    understood = [(RATES[METRICS[name]], here.where(METRICS[name])) for name in ("recognition", "explanation", "refusal")]
    rest = ", ".join(f"{title} {percent(found[0])}" for title, found in understood if found)
    own = [(name, mine.where(METRICS[name], mask=name, protected=protected)) for name in UTILITY]
    broken = " and ".join(f"that of {name} leaves {percent(found[0])} of it" for name, found in own if found)
    crossed = mine.where(HARM, mask="benign", protected=protected)
    back = f", the first with {percent(crossed[0])} of harm" if crossed else ""
    return (
        f"Protecting {words}, the circuit of harm leaves {percent(harm)} of harm (random weights {percent(random)}) and "
        f"changes {changes}, benign NLL {to_places(nll, 2)} (KL {to_places(kl, 2)}): utility is "
        f"{'kept' if is_kept(mine, 'harmful', protected) else 'not kept'}; {rest}. Pruned in the same way, {broken}{back}."
    )


def _evidence(mine: Rows) -> str:
    found = []
    for protected, words in TITLES.items():
        harm, benign = (mine.where(metric, mask="harmful", protected=protected)[0] for metric in (HARM, GOOD))
        found.append(f"protecting {words}, harm {percent(harm)}, benign {percent(benign)}")
    twin = _twin(mine)
    return "; ".join(found) + (f"; lift with the twin {to_places(twin[0], 1)}" if twin else "")


def _twin(mine: Rows) -> Rows:
    return mine.where("overlap_lift", first="harmful", second="benign", selection="one shot")


def _pairs(names: Sequence[str]) -> list[set[str]]:
    return [{first, second} for i, first in enumerate(names) for second in names[i + 1 :]]


# %% [markdown]
# ## Figures


# %%
def sections(rows: Rows) -> list[str]:
    found = []
    columns = {metric: RATES[metric] for metric in METRICS.values()}
    for name, mine in models_of(rows).items():
        for protected, words in TITLES.items():
            lines = {"unpruned": mine.where(mask="none")}
            pruned = {
                "random": "random",
                "harmful": "circuit of harm",
                "benign": "of its twin",
                "knowledge": "of knowledge",
            }
            for mask, title in pruned.items():
                lines[title] = mine.where(mask=mask, protected=protected)
            found.append(
                section(
                    f"{name}, circuits that protect {words}",
                    "Rates on held-out requests, mean over seeds; bars: 95 % intervals, widest of seeds.",
                    plot(comparison_figure({key: one for key, one in lines.items() if one}, columns), first=not found),
                )
            )
    every = [replace(row, labels={**row.labels, "model": name}) for name, mine in models_of(rows).items() for row in mine]
    lifts = {
        "over counts per matrix": every.where("overlap_lift", selection="one shot"),
        "over row and column counts": every.where("overlap_lift_marginal", selection="one shot"),
    }
    pairs = {("harmful", other): f"harm – {other}" for other in BENIGN} | {
        (a, b): f"reference: {a} – {b}" for i, a in enumerate(BENIGN) for b in BENIGN[i + 1 :]
    }
    text = "Lift of one-shot circuits that protect nothing; bars: bootstrap over calibration items (left), Wilson (right)."
    return [*found, section("What circuits share", text, plot(overlap_figure(lifts, pairs)))]


# %%
if __name__ == "__main__":
    typer.run(command(sys.modules[__name__]))
