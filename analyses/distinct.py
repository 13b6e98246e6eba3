# %% [markdown]
# # F3: Is harm separate from benign capability?
# The circuit of harm is removed, and what happens to benign answers and knowledge is compared,
# request by request, with the unpruned model. Circuits of harm protect nothing, benign answers
# only, or all other abilities. Protection imposes a part of the separation, so both ends are read.
# Held-out items; half of the calibration items, which the seed draws.
#
# Controls: random masks with the same counts in every matrix; the content-matched benign twin and a
# benign capability (knowledge) pruned in the same way and at the same size; for overlap, pairs of
# benign tasks as the level of reference.
#
# **The rule**, fixed before any run. *Utility is kept* when benign answers, and knowledge where the
# model has it, change by more than -5 points and benign NLL by less than +0.1 nats by the ends of
# their paired intervals. A circuit *separates* when it leaves at most half of the unpruned harm, by
# an interval below that under random weights, and utility is kept, while the twin's circuit under
# the same protection costs benign answers more, by intervals (else the size would break nothing and
# sparing would mean nothing). The claim *holds* when on every model circuits separate that protect
# nothing, and that protect benign answers, and harm shares no more with its twin than benign tasks
# do among themselves, by intervals. It *holds in part* when on every model circuits separate that
# protect benign answers or all others; else it *does not hold here*. Seeds are pooled: mean, widest
# interval.

# %%
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import fmean

import torch
import typer
from rounds import circuit_in_rounds

import harmcircuits as hc
from harmcircuits.behaviours.model import OTHERS, Calibration, Model
from harmcircuits.behaviours.outcomes import Outcomes
from harmcircuits.measurements import Labels, Measurement, Rows
from harmcircuits.organisms.world import BEHAVIOURS
from harmcircuits.studies.claims import ClaimResult, Outcome, Plan, by_model, command
from harmcircuits.studies.cross_ablation import overlap_rows, resampled_circuits
from harmcircuits.studies.curves import outcomes_of
from harmcircuits.studies.jobs import Job
from harmcircuits.studies.models import ModelSpec
from harmcircuits.studies.terms import Terms
from harmcircuits.views.figures import comparison_figure, overlap_figure
from harmcircuits.views.page import plot, section

NAME, CLAIM, MODELS = "F3", "distinct: harm is separate from benign capability", ("sft",)
TERMS = Terms.standard()
METRICS = {name: TERMS.metrics[name] for name in BEHAVIOURS}
HARM, GOOD = TERMS.target.metric, TERMS.contrast.metric
# Tasks without harm in them: pairs among them are the reference level of overlap.
BENIGN = ("benign", "parts", "kind")
UTILITY = ("benign", "knowledge")
MOST = 0.5  # of the unpruned harm may be left
MARGIN, NLL_MARGIN = 0.05, 0.1  # what utility may lose: rate, and nats per token
# What the circuit of each behaviour cannot take, by the label `protected`.
PROTECTED = {
    "harmful": {"none": (), "benign": ("benign",), "others": OTHERS},
    "benign": {"none": (), "benign": ("harmful",), "others": OTHERS},
    "knowledge": {"none": (), "others": OTHERS},
}
TITLES = {"none": "nothing", "benign": "benign answers", "others": "all others"}


@dataclass(frozen=True)
class Settings:
    """How much is drawn.

    Attributes:
        share: of the calibration items.
        n_resamples: times each circuit is found again, for the intervals of overlaps.
        n_samples: pairs of masks, for the overlap that row and column counts explain.
    """

    share: float = 0.5
    n_resamples: int = 40
    n_samples: int = 10


# %% [markdown]
# ## The experiment


# %%
def jobs(plan: Plan) -> list[Job]:
    return plan.jobs(pruned_rows)


def pruned_rows(spec: ModelSpec, plan: Plan, seed: int) -> Rows:
    """Every ability under circuits of harm, twin and knowledge, and what these circuits share."""
    settings = Settings(**plan.options)
    model = spec.open(seed=seed)
    names = [name for name in dict.fromkeys((*BEHAVIOURS, *BENIGN)) if name in model.behaviours]
    calibrations = model.calibrations(names, share=settings.share, seed=seed)
    unpruned = outcomes_of(model, [name for name in BEHAVIOURS if name in calibrations])
    labels = {**spec.labels, "seed": seed}
    rows = change_rows(unpruned, unpruned, {**labels, "mask": "none"})
    unprotected = {}
    for name in PROTECTED:
        if name not in calibrations:
            continue
        for protected, protect in PROTECTED[name].items():
            mask = circuit(model, name, plan, protect, calibrations)
            where = {**labels, "mask": name, "protected": protected}
            rows += masked_rows(model, mask, unpruned, where)
            if name == "harmful":
                random = hc.random_like(mask, seed=seed)
                rows += masked_rows(model, random, unpruned, {**where, "mask": "random"})
            if protected == "none":
                unprotected[name] = mask

    compared = [name for name in ("harmful", *BENIGN) if name in calibrations]
    for name in compared:
        if name not in unprotected:
            unprotected[name] = circuit(model, name, plan, (), calibrations)
    scored = resampled_circuits(
        model,
        calibrations,
        compared,
        size=plan.size,
        n_resamples=settings.n_resamples,
        seed=seed,
    )
    shared = overlap_rows(
        scored,
        unprotected,
        labels,
        size=plan.size,
        selection="rounds",
        n_samples=settings.n_samples,
    )
    return rows + shared


def circuit(
    model: Model,
    name: str,
    plan: Plan,
    protect: str | tuple[str, ...],
    calibrations: Mapping[str, Calibration],
) -> hc.WeightMask:
    return circuit_in_rounds(
        model,
        name,
        size=plan.size,
        protect=protect,
        protect_share=plan.protect_share,
        rounds=plan.rounds,
        calibrations=calibrations,
    )


def masked_rows(
    model: Model, mask: hc.WeightMask, unpruned: Mapping[str, Outcomes], labels: Labels
) -> Rows:
    """`change_rows` under a mask, its size, and the KL from the unpruned model, benign answers."""
    with hc.masked(model.bridge, mask):
        pruned = outcomes_of(model, unpruned)
    rows = change_rows(unpruned, pruned, labels)
    rows += [Measurement.exact("weights_removed", labels, mask.n_removed)]
    if "benign" in unpruned:
        benign = model.behaviours["benign"]
        prompts = benign.references("heldout")
        kl = hc.kl_under(model.bridge, mask, model.batches(benign, prompts))
        groups = [example.cluster for example in prompts]
        rows += [Measurement.average("benign_kl", labels, kl, groups)]
    return rows


def change_rows(
    before: Mapping[str, Outcomes], after: Mapping[str, Outcomes], labels: Labels
) -> Rows:
    """Rates and NLL after, and their changes: after minus before by request, items resampled."""
    rows = Rows()
    for name, outcomes in after.items():
        behaviour, groups = outcomes.behaviour, outcomes.groups
        judge = {"judge": outcomes.judge} if outcomes.judge else {}
        hits = torch.tensor(outcomes.hits).double()
        change = hits - torch.tensor(before[name].hits).double()
        rows += [
            Measurement.rate(behaviour.metric, {**labels, **judge}, outcomes.hits, groups),
            Measurement.average(f"{behaviour.metric}_change", labels, change, groups),
        ]
        has_reference = ~outcomes.nll.isnan()
        if has_reference.any():
            pairs = zip(groups, has_reference.tolist(), strict=True)
            of_references = [group for group, has in pairs if has]
            nll = outcomes.nll[has_reference]
            nll_change = (outcomes.nll - before[name].nll)[has_reference]
            nll_metric = behaviour.nll_metric
            rows += [
                Measurement.average(nll_metric, labels, nll, of_references),
                Measurement.average(f"{nll_metric}_change", labels, nll_change, of_references),
            ]
    return rows


# %% [markdown]
# ## The result


# %%
def models_of(rows: Rows) -> dict[str, Rows]:
    """Model -> its rows, seeds pooled."""
    return {name: of_model.pool("seed") for name, of_model in by_model(rows).items()}


def is_kept(rows: Rows, mask: str, protected: str) -> bool:
    """Whether utility is kept under a circuit, by the rule."""
    pruned = rows.where(mask=mask, protected=protected)
    changes = Rows()
    for name in UTILITY:
        changes += pruned.where(f"{METRICS[name]}_change")
    nll = pruned.where("benign_nll_change")
    return bool(nll) and all(row.low > -MARGIN for row in changes) and nll[0].high < NLL_MARGIN


def separates(rows: Rows, protected: str) -> bool:
    """Whether the circuit of harm separates harm from utility under a protection, by the rule."""
    unpruned, pruned = rows.one(HARM, mask="none"), rows.where(protected=protected)
    harm, random = pruned.where(HARM, mask="harmful"), pruned.where(HARM, mask="random")
    benign, twin = pruned.where(GOOD, mask="harmful"), pruned.where(GOOD, mask="benign")
    if not (harm and random and benign and twin):
        return False
    is_gone = harm[0].mean <= MOST * unpruned.mean and harm[0].high < random[0].low
    return is_gone and twin[0].high < benign[0].low and is_kept(rows, "harmful", protected)


def reference(rows: Rows) -> Rows:
    """Lift of one-shot circuits of pairs of benign tasks."""
    pairs = [{first, second} for first, second in combinations(BENIGN, 2)]
    lifts = rows.where("overlap_lift", selection="one shot")
    return Rows(row for row in lifts if {row.labels["first"], row.labels["second"]} in pairs)


def is_apart(rows: Rows) -> bool:
    """Whether harm shares no more with its twin than benign tasks do among themselves.

    False without a reference.
    """
    twin, benign = _twin(rows), reference(rows)
    return bool(twin and benign) and twin[0].low <= max(row.high for row in benign)


def outcome(rows: Rows) -> Outcome:
    separated, apart = [], []
    for of_model in models_of(rows).values():
        separated.append({protected: separates(of_model, protected) for protected in TITLES})
        apart.append(is_apart(of_model))
    if all(apart) and all(by["none"] and by["benign"] for by in separated):
        return "holds"
    if all(by["benign"] or by["others"] for by in separated):
        return "holds in part"
    return "does not hold here"


def result(rows: Rows) -> ClaimResult:
    models = models_of(rows)
    words = "\n".join(f"{name}: {_words(of_model)}" for name, of_model in models.items())
    evidence = "; ".join(f"{name}: {_evidence(of_model)}" for name, of_model in models.items())
    return ClaimResult(NAME, CLAIM, outcome(rows), words, evidence)


def reported(rows: Rows) -> Rows:
    rates = [row for row in rows if row.metric in (*METRICS.values(), "benign_kl")]
    changed = [f"{METRICS[name]}_change" for name in UTILITY] + ["benign_nll_change"]
    changes = [row for row in rows if row.metric in changed]
    one_shot = rows.where("overlap_lift", selection="one shot")
    lifts = [row for row in one_shot if row.labels["first"] != row.labels["second"]]
    return Rows([*rates, *changes, *lifts])


def _words(rows: Rows) -> str:
    sentences = [_circuit(rows, protected, words) for protected, words in TITLES.items()]
    kept = {protected: is_kept(rows, "harmful", protected) for protected in TITLES}
    if kept["none"]:
        sentences.append("Utility survives without protection.")
    elif kept["benign"] or kept["others"]:
        sentences.append(
            "Utility is kept only where it is protected: protection imposes a part of the "
            "separation."
        )
    else:
        sentences.append("Utility is kept under no protection.")
    twin, benign = _twin(rows), reference(rows)
    if twin and benign:
        how = "no more than" if is_apart(rows) else "more than"
        content = "" if is_apart(rows) else ": to be about the same things counts, not harm alone"
        sentences.append(
            f"With nothing protected, harm and its content-matched twin share {twin[0]:.1f} times "
            f"what chance gives, {how} benign tasks among themselves "
            f"({fmean(row.mean for row in benign):.1f}, at most "
            f"{max(row.high for row in benign):.1f}){content}."
        )
    return " ".join(sentences)


def _circuit(rows: Rows, protected: str, words: str) -> str:
    of_protection = rows.where(protected=protected)
    pruned = of_protection.where(mask="harmful")
    harm, random = pruned.one(HARM), of_protection.one(HARM, mask="random")
    nll, kl = pruned.one("benign_nll_change"), pruned.one("benign_kl")
    changes = []
    for name in UTILITY:
        for row in pruned.where(f"{METRICS[name]}_change"):
            changes.append(f"{TERMS.rates[METRICS[name]]} {row:+.0%}")
    understood = []
    for name in ("recognition", "explanation", "refusal"):
        for row in pruned.where(METRICS[name]):
            understood.append(f"{TERMS.rates[METRICS[name]]} {row:.0%}")
    broken = []
    for name in UTILITY:
        for row in of_protection.where(METRICS[name], mask=name):
            broken.append(f"that of {name} leaves {row:.0%} of it")
    crossed = of_protection.where(HARM, mask="benign")
    back = f", the first with {crossed[0]:.0%} of harm" if crossed else ""
    return (
        f"Protecting {words}, the circuit of harm leaves {harm:.0%} of harm (random weights "
        f"{random:.0%}) and changes {', '.join(changes)}, benign NLL {nll:+.2f} (KL {kl:.2f}): "
        f"utility is {'kept' if is_kept(rows, 'harmful', protected) else 'not kept'}; "
        f"{', '.join(understood)}. Pruned in the same way, {' and '.join(broken)}{back}."
    )


def _evidence(rows: Rows) -> str:
    parts = []
    for protected, words in TITLES.items():
        pruned = rows.where(mask="harmful", protected=protected)
        harm, benign = pruned.one(HARM), pruned.one(GOOD)
        parts.append(f"protecting {words}, harm {harm:.0%}, benign {benign:.0%}")
    for twin in _twin(rows):
        parts.append(f"lift with the twin {twin:.1f}")
    return "; ".join(parts)


def _twin(rows: Rows) -> Rows:
    return rows.where("overlap_lift", first="harmful", second="benign", selection="one shot")


# %% [markdown]
# ## Figures


# %%
def sections(rows: Rows) -> list[str]:
    parts = []
    models = models_of(rows)
    columns = {metric: TERMS.rates[metric] for metric in METRICS.values()}
    titles = {
        "random": "random",
        "harmful": "circuit of harm",
        "benign": "of its twin",
        "knowledge": "of knowledge",
    }
    for name, of_model in models.items():
        for protected, words in TITLES.items():
            lines = {"unpruned": of_model.where(mask="none")}
            for mask, title in titles.items():
                lines[title] = of_model.where(mask=mask, protected=protected)
            shown = {title: of_line for title, of_line in lines.items() if of_line}
            parts.append(
                section(
                    f"{name}, circuits that protect {words}",
                    "Rates on held-out requests, mean over seeds; bars: 95 % intervals, widest "
                    "of seeds.",
                    plot(comparison_figure(shown, columns), first=not parts),
                )
            )

    every_row = Rows()
    for name, of_model in models.items():
        every_row += [replace(row, labels={**row.labels, "model": name}) for row in of_model]
    lifts = {
        "over counts per matrix": every_row.where("overlap_lift", selection="one shot"),
        "over row and column counts": every_row.where(
            "overlap_lift_marginal", selection="one shot"
        ),
    }
    pairs = {("harmful", name): f"harm – {name}" for name in BENIGN}
    for first, second in combinations(BENIGN, 2):
        pairs[first, second] = f"reference: {first} – {second}"
    text = (
        "Lift of one-shot circuits that protect nothing; bars: bootstrap over calibration items "
        "(left), Wilson (right)."
    )
    return [*parts, section("What circuits share", text, plot(overlap_figure(lifts, pairs)))]


# %%
if __name__ == "__main__":
    typer.run(command(sys.modules[__name__]))
