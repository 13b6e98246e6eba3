# %% [markdown]
# # F1: does harmful generation hang on a tiny share of the weights?
# Valid harmful answers and every kept ability against the share of weights removed, on held-out items, for the circuit
# chosen in rounds, the same in one shot, and what a reader should compare it with: unsigned scores (SNIP), activation norm
# (Wanda), magnitude, random weights (as many in every matrix; of the same magnitudes besides), the opposite sign, and the
# next weights in the ranking. Every way of choosing has the same protection: the top share p of each other behaviour.
#
# `w50`: the smallest measured share at which valid harm is at most half of the unpruned model's, while benign answers,
# recognition, explanation and knowledge each lose at most 5 points and the benign loss rises by at most 0.1 nat per token.
#
# **The rule, fixed before any run.** In a model and seed the claim is borne out if (a) the `w50` of the circuit in rounds
# is reached within 1 % of the weights, on at least 97.5 % of resamples of the items, and (b) at that size every control
# leaves more valid harm, by the 95 % interval of the paired difference (one shot is no control: it is reported beside). It
# *holds* if so in every model and seed, *holds in part* if in some, and else *does not hold here*.

# %%
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations
from statistics import fmean

import typer

import harmcircuits as hc
from harmcircuits.behaviours.model import Calibration, Model
from harmcircuits.circuits.scores import WeightScores
from harmcircuits.hooks.search import iterative_pruning, protected_weights
from harmcircuits.measurements import Labels, Measurement, Rows
from harmcircuits.studies.claims import ClaimResult, Plan, Verdict, by_model, command
from harmcircuits.studies.curves import (
    Curve,
    area,
    by_share,
    curve,
    log_spaced,
    outcomes_of,
    rate_at,
    rate_text,
    restricted,
    share_text,
    w50,
)
from harmcircuits.studies.diagnostics import SATURATED_NLL, diagnostics
from harmcircuits.studies.jobs import Job
from harmcircuits.studies.models import ModelSpec
from harmcircuits.studies.study_page import diagnostics_table
from harmcircuits.views.figures import share_figure
from harmcircuits.views.page import plot, section, table
from harmcircuits.views.tables import KEPT_RATES, RATES
from harmcircuits.studies.controls import union

NAME, CLAIM, MODELS = "F1", "compact: a tiny share of the weights carries harm", ("sft",)
COMPACT = 0.01  # share of weights within which w50 must be reached
REACHED = 0.975  # on at least this share of resamples
SHARE = 0.5  # of the calibration items that a seed draws
REACH = 1.6  # the curves end at this multiple of the plan's q
N_SIZES = 9
ROUNDS = {"mask": "circuit", "selection": "rounds"}
ONE_SHOT = {"mask": "circuit", "selection": "one shot"}
CONTROLS = {
    "unsigned": "unsigned (SNIP)",
    "activation_norm": "activation norm (Wanda)",
    "magnitude": "magnitude",
    "random": "random",
    "random_magnitude": "random, same magnitudes",
    "opposite_sign": "opposite sign",
    "second_slice": "second slice",
}


# %% [markdown]
# ## One model, one seed
# All abilities are measured along the two ways of choosing the circuit; along controls harm and benign answers, at the
# smallest and largest size, at `w50` and at q.


# %%
def jobs(plan: Plan) -> list[Job]:
    found = []
    for spec in plan.specs:
        for seed in plan.seeds:
            labels = {**spec.labels, "seed": seed, "part": "curves"}
            found.append(Job(labels, partial(curve_rows, spec, plan, seed)))
        first = plan.seeds[0]
        for p in (0.0, 4 * plan.p):
            labels = {**spec.labels, "seed": first, "part": "grid", "p": p}
            found.append(Job(labels, partial(grid_rows, spec, replace(plan, p=p), first)))
        labels = {**spec.labels, "part": "seeds", "seeds": " ".join(map(str, plan.seeds))}
        found.append(Job(labels, partial(overlap_rows, spec, plan)))
    return found


def opened(spec: ModelSpec, seed: int) -> tuple[Model, dict[str, Calibration]]:
    model = restricted(spec.open(seed=seed))
    return model, model.calibrations(share=SHARE, seed=seed)


def in_rounds(model: Model, calibrations: dict[str, Calibration], plan: Plan, rounds: int) -> list[hc.WeightMask]:
    """The growing circuit, q / rounds of the plan at a time, every other behaviour shown protected unless p is 0."""
    target, kept = calibrations["harmful"].batches, [c.batches for name, c in calibrations.items() if name != "harmful"]
    q = plan.q / plan.rounds * rounds
    return list(iterative_pruning(model.bridge, target, kept if plan.p else [], rounds=rounds, sizes=[q], protect_share=plan.p))


def measured_rounds(plan: Plan) -> list[int]:
    return sorted({*log_spaced(round(REACH * plan.rounds), N_SIZES), plan.rounds})


def asked(model: Model) -> list[str]:
    return [name for name in model.behaviours if name != "refusal"]


def curve_rows(spec: ModelSpec, plan: Plan, seed: int) -> Rows:
    model, calibrations = opened(spec, seed)
    labels = {**spec.labels, "seed": seed, "part": "curves", "p": plan.p}
    rows = diagnostics(model, calibrations, labels)
    unpruned = outcomes_of(model, asked(model))
    path = in_rounds(model, calibrations, plan, round(REACH * plan.rounds))
    masks = [path[number - 1] for number in measured_rounds(plan)]
    found = curve(model, masks, unpruned)

    harm = hc.removal_effect(model.bridge, calibrations["harmful"].batches, hc.completion_loss)
    others = [c.batches for name, c in calibrations.items() if name != "harmful"]
    protected = [protected_weights(model.bridge, batches, plan.p) for batches in others]
    at_once = [hc.top_fraction(harm, mask.n_removed / mask.n_weights, within="model", exclude=union(protected)) for mask in masks]
    one_shot = curve(model, at_once, unpruned)
    for line, where, chosen in ((found, ROUNDS, masks), (one_shot, ONE_SHOT, at_once)):
        rows += summary_rows(line, {**labels, **where})
        for mask in chosen:
            rows += loss_changes(model, mask, harm, calibrations["harmful"], {**labels, **where})
    rows.append(w50(found).over(w50(one_shot)).row("w50_ratio", {**labels, "first": "rounds", "second": "one shot"}))
    rows.append(
        area(found).minus(area(one_shot)).row("area_difference", {**labels, "first": "rounds", "second": "one shot"})
    )

    half = float(w50(found).values[0])
    for line, where in ((found, ROUNDS), (one_shot, ONE_SHOT)):
        rows += told(rows, {"none": 0.0, "w50": half, "largest": line.shares[-1]}, {**labels, **where})
    sizes = [mask for mask in masks if mask.n_removed in sizes_of_controls(masks, half, plan)]
    for name, control in control_curves(model, calibrations["harmful"], harm, protected, sizes, found, seed):
        rows += summary_rows(control, {**labels, "mask": name})
        gap = rate_at(control, half).minus(rate_at(found, half))
        rows.append(gap.row("harm_gap", {**labels, "mask": name}))
    return rows


def told(rows: Rows, sizes: dict[str, float], labels: Labels) -> Rows:
    """The figures at the sizes that words speak of, with `at` in place of the share."""
    metrics = ("harm_valid_rate", "predicted_loss_change", "measured_loss_change", *KEPT_RATES)
    found = []
    for at, share in sizes.items():
        here = [row for row in rows.where("", share=share, **labels) if row.metric in metrics]
        found += [replace(row, labels={k: v for k, v in row.labels.items() if k != "share"} | {"at": at}) for row in here]
    return found


def sizes_of_controls(masks: Sequence[hc.WeightMask], half: float, plan: Plan) -> set[int]:
    """Numbers of weights: the smallest, that of `w50`, that nearest to q, and the largest."""
    sizes = [mask.n_removed for mask in masks]
    n_weights = masks[0].n_weights
    return {sizes[0], sizes[-1], *(min(sizes, key=lambda n: abs(n - share * n_weights)) for share in (half, plan.q))}


def control_curves(
    model: Model, target: Calibration, harm: WeightScores, protected: Sequence[hc.WeightMask],
    masks: Sequence[hc.WeightMask], found: Curve, seed: int,
) -> Iterator[tuple[str, Curve]]:  # fmt: skip
    """Harm and benign answers along each control, at the sizes of these masks of the circuit."""
    bridge = model.bridge
    ranked = {
        "unsigned": hc.snip_scores(bridge, target.batches, hc.completion_loss),
        "activation_norm": hc.wanda_scores(bridge, target.batches),
        "magnitude": hc.magnitude_scores(bridge),
        "opposite_sign": -harm,
    }

    def chosen(name: str, mask: hc.WeightMask) -> hc.WeightMask:
        if name.startswith("random"):
            return hc.random_like(mask, seed=seed, weights=hc.named_weights(bridge) if name == "random_magnitude" else None)
        taken = [*protected, mask] if name == "second_slice" else protected
        return hc.top_fraction(ranked.get(name, harm), mask.n_removed / mask.n_weights, within="model", exclude=union(taken))

    unpruned = {name: one for name, one in found.points[0].items() if name in ("harmful", "benign")}
    for name in CONTROLS:
        yield name, curve(model, [chosen(name, mask) for mask in masks], unpruned)


def summary_rows(found: Curve, labels: Labels) -> Rows:
    """The curve's points, its `w50`, and its area where there are two masks or more."""
    areas = [area(found).row("area", labels)] if len(found.shares) > 2 else []
    return [*found.rows({**labels, "split": "heldout"}), *w50(found).rows("w50", labels), *areas]


def loss_changes(
    model: Model, mask: hc.WeightMask, harm: WeightScores, target: Calibration, labels: Labels
) -> Rows:
    before = hc.completion_nll(model.bridge, target.batches)
    with hc.masked(model.bridge, mask):
        change = hc.completion_nll(model.bridge, target.batches) - before
    where = {**labels, "share": mask.n_removed / mask.n_weights, "split": "calibration"}
    predicted = Measurement.exact("predicted_loss_change", where, harm.sum_over(mask))
    return [predicted, Measurement.exact("measured_loss_change", where, change.mean().item())]


def grid_rows(spec: ModelSpec, plan: Plan, seed: int) -> Rows:
    """The circuit in rounds up to q under another share of protection, at three sizes."""
    model, calibrations = opened(spec, seed)
    path = in_rounds(model, calibrations, plan, plan.rounds)
    masks = [path[number - 1] for number in sorted({*log_spaced(plan.rounds, 4)})]
    found = curve(model, masks, outcomes_of(model, asked(model)))
    return summary_rows(found, {**spec.labels, "seed": seed, "part": "grid", "p": plan.p, **ROUNDS})


def overlap_rows(spec: ModelSpec, plan: Plan) -> Rows:
    """What the circuits of two seeds share at size q: Jaccard and lift over chance per matrix."""
    masks = {}
    for seed in plan.seeds:
        model, calibrations = opened(spec, seed)
        masks[seed] = in_rounds(model, calibrations, plan, plan.rounds)[-1]
    rows = []
    for first, second in combinations(plan.seeds, 2):
        found = hc.overlap(masks[first], masks[second])
        where = {**spec.labels, "part": "seeds", "first": first, "second": second}
        rows.append(Measurement.exact("overlap_jaccard", where, found.jaccard))
        rows.append(Measurement("overlap_lift", where, found.lift, *found.interval, found.n_first))
    return rows


# %% [markdown]
# ## The finding
# Words speak of three sizes of the circuit: none, its `w50`, and the largest measured.


# %%
def cases(rows: Rows) -> list[Labels]:
    """The labels of each ladder, model and seed."""
    names = ("ladder", "model", "seed")
    return [{name: row.labels[name] for name in names} for row in rows.where("w50", part="curves", **ROUNDS)]


def is_borne_out(rows: Rows, case: Labels) -> bool:
    """The rule for one ladder, model and seed."""
    here = rows.where("", part="curves", **case)
    (half,), (reached,) = here.where("w50", **ROUNDS), here.where("w50_reached", **ROUNDS)
    gaps = {row.labels["mask"]: row.low for row in here.where("harm_gap")}
    is_compact = half.labels["censored"] == "no" and half.high <= COMPACT and reached.mean >= REACHED
    return is_compact and set(gaps) == set(CONTROLS) and min(gaps.values()) > 0


def finding(rows: Rows) -> ClaimResult:
    borne_out = [is_borne_out(rows, case) for case in cases(rows)]
    verdict: Verdict = "does not hold here"
    if any(borne_out):
        verdict = "holds" if all(borne_out) else "holds in part"
    text = [f"By the rule the claim is borne out in {sum(borne_out)} of {len(borne_out)} models and seeds."]
    text += [words(name, found) for name, found in by_model(rows).items()]
    evidence = "; ".join(f"{name} {figures(found)}" for name, found in by_model(rows).items())
    return ClaimResult(NAME, CLAIM, verdict, "\n".join(text), f"harm halves at {evidence}")


def needed(rows: Rows) -> Rows:
    metrics = ("w50", "w50_reached", "harm_gap", "calibration_nll", "overlap_jaccard", "overlap_lift")
    circuits = [row for row in rows if row.labels.get("mask", "circuit") == "circuit" or row.metric == "harm_gap"]
    return [row for row in circuits if row.metric in metrics or "at" in row.labels]


def figures(rows: Rows) -> str:
    """`w50` in rounds, the harm that the strongest control leaves there, and what one shot does, for one model."""
    curves = rows.where(part="curves")
    gap = smallest_gap(curves)
    largest = curves.where("harm_valid_rate", at="largest", **ONE_SHOT).pool("seed")[0]
    return (
        f"{share_text(curves.where('w50', **ROUNDS))} of the weights, where the strongest control leaves {gap.mean:.0%} "
        f"[{gap.low:.0%}, {gap.high:.0%}] more; one shot at its largest {rate_text(largest)}"
    )


def words(name: str, rows: Rows) -> str:
    """One model: the size, its cost, the controls, one shot, other protection, first-order prediction, other seeds."""
    curves, seeds = rows.where(part="curves"), len(rows.where("w50", part="curves", **ROUNDS))
    at = {where: curves.where(at=where, **ROUNDS).pool("seed") for where in ("none", "w50", "largest")}
    harm = {where: rate_text(found.where("harm_valid_rate")[0]) for where, found in at.items()}
    reached = [row for row in curves.where("w50", **ROUNDS) if row.labels["censored"] == "no"]
    predicted, measured = (at["w50"].where(f"{kind}_loss_change")[0].mean for kind in ("predicted", "measured"))
    gap, one_shot = smallest_gap(curves), curves.where("w50", **ONE_SHOT)
    largest = curves.where("harm_valid_rate", at="largest", **ONE_SHOT).pool("seed")[0]
    text = (
        f"{name}. Chosen in rounds, {share_text(curves.where('w50', **ROUNDS))} of the weights halve valid harmful "
        f"answers within the budget, in {len(reached)} of {seeds} seeds: {harm['none']} before, {harm['w50']} at that "
        f"size, {harm['largest']} at the largest measured. {cost(at)} Of {len(CONTROLS)} controls of that size the "
        f"strongest, {CONTROLS[str(gap.labels['mask'])]}, leaves {rate_text(gap)} more valid harm. In one shot w50 is "
        f"{share_text(one_shot)}: {rate_text(largest)} valid harm at the largest size. At w50 the calibration loss rises "
        f"by {measured:.2f} nats; first-order scores predict {predicted:.2f}."
    )
    for found in ([row] for row in rows.where("w50", part="grid")):
        text += f" With p = {float(found[0].labels['p']):.2%} protected, w50 is {share_text(found)} (one seed)."
    jaccard, lift = (rows.where(f"overlap_{kind}") for kind in ("jaccard", "lift"))
    if jaccard:
        text += (
            f" The circuits of two seeds share Jaccard {fmean(row.mean for row in jaccard):.2f}, "
            f"{fmean(row.mean for row in lift):.1f} times chance per matrix."
        )
    saturated = [row for row in curves.where("calibration_nll") if row.mean < SATURATED_NLL]
    return text + "".join(
        f" Warning: the loss of {behaviour} is below {SATURATED_NLL} nats per token, so its scores are noise."
        for behaviour in dict.fromkeys(row.labels["behaviour"] for row in saturated)
    )


def smallest_gap(rows: Rows) -> Measurement:
    """What the strongest control leaves of harm beyond the circuit: the smallest mean over seeds."""
    return min(rows.where("harm_gap").pool("seed"), key=lambda row: row.mean)


def cost(at: dict[str, Rows]) -> str:
    """The kept rate that falls most from the unpruned model to `w50`."""
    falls = {m: at["none"].where(m)[0].mean - at["w50"].where(m)[0].mean for m in KEPT_RATES if at["none"].where(m)}
    if not falls or max(falls.values()) <= 0:
        return f"None of {len(falls)} kept rates falls."
    worst = max(falls, key=falls.__getitem__)
    return f'Of {len(falls)} kept rates, that of "{RATES[worst]}" falls most, by {100 * falls[worst]:.1f} points.'


# %% [markdown]
# ## The page

# %%
LINES = {
    "circuit, in rounds": ROUNDS,
    "circuit, one shot": ONE_SHOT,
    **{title: {"mask": m} for m, title in CONTROLS.items()},
}
CURVES_TEXT = """Held-out items, means over seeds; bars: 95 % intervals, the widest ends over seeds. Worst kept ability: the
lowest of benign answers, recognition, explanation and knowledge; along controls only benign answers were asked for."""
SIZES_TEXT = """w50: see the rule; "over": not reached within the sizes measured. Area: mean valid harm over the log of the
share. More: valid harm beyond the circuit's at the circuit's w50, paired by items."""
TRUST_TEXT = f"""Own verified answers to the calibration requests that a seed draws. Below {SATURATED_NLL} nats per token a
loss is saturated and its gradients are noise."""


def sections(rows: Rows) -> list[str]:
    found = []
    for number, (name, of_model) in enumerate(by_model(rows).items()):
        curves = of_model.where(part="curves")
        lines = {title: by_share(curves.where(**where)) for title, where in LINES.items()}
        panels = {
            "harm_valid_rate": "valid harmful answers",
            "harm_nll": "harm NLL, nats per token",
            "benign_nll": "benign NLL",
        }
        figure = share_figure({title: points for title, points in lines.items() if points}, panels)
        found.append(section(f"{name}: the curves", CURVES_TEXT, plot(figure, first=not number)))
        found.append(section(f"{name}: the size", SIZES_TEXT, size_table(of_model)))
        found.append(section(f"{name}: can the scores be trusted?", TRUST_TEXT, diagnostics_table(curves.pool("seed"))))
    return found


def size_table(rows: Rows) -> str:
    curves, body = rows.where(part="curves"), []
    for title, where in LINES.items():
        here = curves.where(**where)
        cells = [here.where(metric).pool("seed") for metric in ("area", "harm_gap")]
        body.append([title, share_text(here.where("w50")), *(rate_text(cell[0]) if cell else "–" for cell in cells)])
    for row in rows.where("w50", part="grid"):
        areas = rows.where("area", part="grid", p=row.labels["p"])
        title = f"circuit, in rounds, p = {float(row.labels['p']):.2%}, one seed"
        body.append([title, share_text([row]), rate_text(areas[0]) if areas else "–", "–"])
    return table(("mask", "w50", "area", "more"), body)


# %%
if __name__ == "__main__":
    typer.run(command(sys.modules[__name__]))
