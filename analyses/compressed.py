# %% [markdown]
# # F4: do aligned models hold harm in fewer weights?
# The curve of F1 for every rung of a ladder: valid harm and kept abilities, on held-out items,
# against the share of weights that the circuit in rounds removes. The behaviours protected are the
# same on every rung, those that all rungs show: refusal exists on aligned rungs only, and
# protecting it there alone would make them another experiment. A rung is *aligned* if it refuses at
# least half of the harmful requests when plainly asked; harm is elicited by prefilling.
#
# `w50`: the smallest measured share at which valid harm is at most half of the unpruned rung's,
# while benign answers, recognition, explanation and knowledge each lose at most 5 points and the
# benign loss rises by at most 0.1 nat per token; the largest measured share where there is none,
# which makes every ratio nearer to 1 than the truth.
#
# **The rule, fixed before any run.** A ladder and seed bear the claim out if (a) every aligned
# rung's `w50` is below every unaligned rung's, by the 95 % interval of their ratio, paired by
# items; (b) the rungs can be compared: unpruned, their rates of valid harm lie within 5 points, and
# no rung's loss on harm is below 0.02 nats per token; and (c) at the `w50` of each aligned rung as
# many random weights leave more valid harm, by the interval of the paired difference. The claim
# *holds* if every ladder and seed bears it out, *holds in part* if some do, and else *does not hold
# here*.
#
# Beside it, for one seed of every ladder, the content-matched contrast: the curve of benign
# answers, found and protected in the same way with harm among the protected. Were it compressed as
# much, alignment would not act on harm in particular.

# %%
import sys
from collections.abc import Sequence
from functools import partial
from itertools import product

import typer
from rounds import iterative_pruning

import harmcircuits as hc
from harmcircuits.behaviours.model import Calibration, Model
from harmcircuits.measurements import Labels, Measurement, Rows
from harmcircuits.studies.claims import ClaimResult, Outcome, Plan, command
from harmcircuits.studies.curves import (
    Budget,
    Curve,
    Estimate,
    area,
    by_share,
    curve,
    log_spaced,
    outcomes_of,
    rate_at,
    restricted,
    share_text,
    w50,
)
from harmcircuits.studies.diagnostics import SATURATED_NLL, diagnostics
from harmcircuits.studies.jobs import Job
from harmcircuits.studies.models import ModelSpec
from harmcircuits.studies.study_page import diagnostics_table
from harmcircuits.studies.terms import Terms
from harmcircuits.views.figures import share_figure
from harmcircuits.views.page import plot, section, table

NAME, CLAIM, MODELS = "F4", "compressed by alignment", ("base", "helpful", "sft", "dpo")
SHARE = 0.5  # of the calibration items that a seed draws
REACH = 2  # the curves end at this multiple of the plan's size
N_SIZES = 14
MATCHED = 0.05  # by how much the unpruned rates of valid harm may differ
BUDGETS = {
    "harmful": Budget(),
    "benign": Budget(kept=("harmful", "recognition", "explanation", "knowledge"), fluent="harmful"),
}
PARTS = {"harmful": "curves", "benign": "twin"}


# %% [markdown]
# ## One ladder, one seed
# Rungs run in turn in one job, because pairing needs what each does with every item.


# %%
def jobs(plan: Plan) -> list[Job]:
    ladders: dict[str, list[ModelSpec]] = {}
    for spec in plan.specs:
        ladders.setdefault(spec.labels["ladder"], []).append(spec)
    jobs = []
    for (ladder, specs), seed, target in product(ladders.items(), plan.seeds, PARTS):
        if target == "harmful" or seed == plan.seeds[0]:
            models = " ".join(spec.model for spec in specs)
            labels = {"ladder": ladder, "seed": seed, "part": PARTS[target], "models": models}
            jobs.append(Job(labels, partial(ladder_rows, tuple(specs), plan, seed, target)))
    return jobs


def opened(spec: ModelSpec, seed: int) -> tuple[Model, dict[str, Calibration]]:
    model = restricted(spec.open(seed=seed))
    return model, model.calibrations(share=SHARE, seed=seed)


def ladder_rows(specs: Sequence[ModelSpec], plan: Plan, seed: int, target: str) -> Rows:
    """Every rung's curve, and how those of aligned rungs compare with the others'."""
    shown = {spec: set(opened(spec, seed)[1]) for spec in specs}
    specs = [spec for spec in specs if target in shown[spec]]
    common = set.intersection(*(shown[spec] for spec in specs))
    rows = Rows()
    curves: dict[str, Curve] = {}
    for spec in specs:
        curves[spec.model], of_rung = rung(spec, plan, seed, target, common)
        rows += of_rung
    refusals = rows.where("refusal_rate")
    refusing = {str(row.labels["model"]) for row in refusals if row.mean >= 0.5}
    for first, second in product(curves, curves):
        if first in refusing and second not in refusing:
            where = {
                "ladder": specs[0].labels["ladder"],
                "seed": seed,
                "part": PARTS[target],
                "first": first,
                "second": second,
            }
            ratio = half(curves[first], target).over(half(curves[second], target))
            difference = area(curves[first]).minus(area(curves[second]))
            rows += [ratio.row("w50_ratio", where), difference.row("area_difference", where)]
    return rows


def half(line: Curve, target: str) -> Estimate:
    return w50(line, BUDGETS[target])


def rung(
    spec: ModelSpec, plan: Plan, seed: int, target: str, common: set[str]
) -> tuple[Curve, Rows]:
    """One model's curve and its rows.

    They are its points, `w50`, area, what is left at `w50`, the random control, and diagnostics.
    """
    model, calibrations = opened(spec, seed)
    labels = {**spec.labels, "seed": seed, "part": PARTS[target]}
    protect = [calibrations[name].batches for name in model.behaviours if name in common - {target}]
    last = REACH * plan.rounds
    growth = iterative_pruning(
        model.bridge,
        calibrations[target].batches,
        protect,
        sizes=[plan.size / plan.rounds * last],
        protect_share=plan.protect_share,
        rounds=last,
    )
    path = list(growth)
    masks = [path[number - 1] for number in log_spaced(last, N_SIZES)]
    unpruned = outcomes_of(model, [name for name in model.behaviours if name != "refusal"])
    line = curve(model, masks, unpruned, target=target)
    size = half(line, target)
    at = {"none": 0.0, "w50": float(size.values[0])}
    rows = line.rows({**labels, "split": "heldout"}) + size.rows("w50", labels)
    rows += [area(line).row("area", labels)]
    for name, share in at.items():
        for outcomes in line.points[line.shares.index(share)].values():
            rows += outcomes.rows({**labels, "at": name, "split": "heldout"})
    if "refusal" in model.behaviours:
        refusals = model.outcomes("refusal")
        rows += refusals.rows({**labels, "at": "none", "split": "heldout"})
    mask = next(mask for mask in masks if mask.fraction == at["w50"])
    random = curve(
        model, [hc.random_like(mask, seed=seed)], {target: unpruned[target]}, target=target
    )
    gap = rate_at(random, at["w50"]).minus(rate_at(line, at["w50"]))
    rows += [gap.row("random_gap", labels)]
    return line, rows + diagnostics(model, calibrations, labels)


# %% [markdown]
# ## The result


# %%
def cases(rows: Rows) -> list[Labels]:
    """The labels of each ladder and seed."""
    sizes = rows.where("w50", part="curves")
    pairs = dict.fromkeys((row.labels["ladder"], row.labels["seed"]) for row in sizes)
    return [{"ladder": ladder, "seed": seed} for ladder, seed in pairs]


def is_borne_out(rows: Rows, case: Labels) -> bool:
    """The rule for one ladder and seed."""
    curves = rows.where("", part="curves", **case)
    ratios = curves.where("w50_ratio")
    aligned = {ratio.labels["first"] for ratio in ratios}
    gaps = [row.low for row in curves.where("random_gap") if row.labels["model"] in aligned]
    is_smaller = bool(ratios) and all(row.high < 1 for row in ratios)
    return is_smaller and is_matched(curves) and min(gaps) > 0


def is_matched(rows: Rows) -> bool:
    """Whether the rungs of one ladder and seed can be compared.

    They can with the same ability for harm, and losses that are not saturated.
    """
    harm = [row.mean for row in rows.where("harm_valid_rate", at="none")]
    losses = [row.mean for row in rows.where("calibration_nll", behaviour="harmful")]
    return max(harm) - min(harm) <= MATCHED + 1e-9 and min(losses) >= SATURATED_NLL


def result(rows: Rows) -> ClaimResult:
    borne_out = [is_borne_out(rows, case) for case in cases(rows)]
    outcome: Outcome = "does not hold here"
    if any(borne_out):
        outcome = "holds" if all(borne_out) else "holds in part"
    ratios = rows.where("w50_ratio", part="curves")
    below = sum(row.high < 1 for row in ratios)
    above = sum(row.low > 1 for row in ratios)
    text = [
        f"By the rule the claim is borne out in {sum(borne_out)} of {len(borne_out)} ladders and "
        f"seeds. w50 is smaller on the aligned rung in {below} of {len(ratios)} pairs of an "
        f"aligned and an unaligned rung, and larger in {above}."
    ]
    text += [words(ladder, of_ladder) for ladder, of_ladder in by_ladder(rows).items()]
    sizes = pooled_sizes(rows.where(part="curves"))
    halved = "; ".join(f"{model} {size}" for model, size in sizes.items())
    evidence = f"harm halves at {halved}; smaller in {below} of {len(ratios)} pairs"
    return ClaimResult(NAME, CLAIM, outcome, "\n".join(text), evidence)


def reported(rows: Rows) -> Rows:
    metrics = ("w50", "w50_ratio", "area", "random_gap")
    metrics_at = ("harm_valid_rate", "harm_refusal_rate", "harm_degenerate_rate", "harm_nll")
    needed = []
    for row in rows:
        if row.metric in metrics or ("at" in row.labels and row.metric in metrics_at):
            needed.append(row)
    for row in rows.where(behaviour="harmful", part="curves"):
        if row.metric in ("calibration_nll", "gradient_norm"):
            needed.append(row)
    return Rows(needed)


def by_ladder(rows: Rows) -> dict[str, Rows]:
    return {str(case["ladder"]): rows.where(ladder=case["ladder"]) for case in cases(rows)}


def by_model(rows: Rows) -> dict[str, Rows]:
    models = dict.fromkeys(row.labels["model"] for row in rows.where("w50"))
    return {str(model): rows.where(model=model) for model in models}


def pooled_sizes(rows: Rows) -> dict[str, str]:
    """`w50` of every rung over all seeds and ladders given."""
    return {model: share_text(of_rung.where("w50")) for model, of_rung in by_model(rows).items()}


def pooled(rows: Rows, metric: str, **labels: str) -> Measurement:
    """A figure of one rung over all seeds."""
    return rows.where(metric, **labels).pool("seed").one()


def words(ladder: str, rows: Rows) -> str:
    """One ladder: every rung's size, area, start and end, the ratios, and the benign contrast."""
    curves = rows.where(part="curves")
    parts = []
    for model, of_rung in by_model(curves).items():
        refused = pooled(of_rung, "harm_refusal_rate", at="w50").mean
        degenerate = pooled(of_rung, "harm_degenerate_rate", at="w50").mean
        harm = pooled(of_rung, "harm_valid_rate", at="none").mean
        nll = pooled(of_rung, "harm_nll", at="none").mean
        loss = pooled(of_rung, "calibration_nll", behaviour="harmful").mean
        norm = pooled(of_rung, "gradient_norm", behaviour="harmful").mean
        parts.append(
            f"{model}: w50 {share_text(of_rung.where('w50'))}, area {pooled(of_rung, 'area'):.0%}; "
            f"at w50 {refused:.0%} of harmful requests refused, {degenerate:.0%} degenerate; "
            f"unpruned, valid harm {harm:.0%}, harm NLL {nll:.2f}, on own answers {loss:.2f} with "
            f"gradient norm {norm:.3f}"
        )
    pairs = []
    for ratio in curves.where("w50_ratio").pool("seed"):
        pairs.append(f"{ratio.labels['first']} / {ratio.labels['second']} {ratio:.2f}")
    ratios = "; ".join(pairs) or "no aligned rung beside another"
    text = f"Ladder {ladder}. {'. '.join(parts)}. Ratio of w50, paired by items: {ratios}."
    twin = pooled_sizes(rows.where(part="twin"))
    if twin:
        halved = ", ".join(f"{model} {size}" for model, size in twin.items())
        text += f" Benign answers, found in the same way (one seed), halve at {halved}."
    odd = [case["seed"] for case in cases(rows) if not is_matched(curves.where("", **case))]
    if odd:
        text += (
            f" Warning: in seeds {odd} unpruned harm differs between rungs "
            "or its loss is saturated: not comparable."
        )
    return text


# %% [markdown]
# ## The page

# %%
CURVES_TEXT = """Held-out items, means over seeds; bars: 95 % intervals, the widest ends over seeds.
Worst kept ability: the lowest of benign answers, recognition, explanation and knowledge."""
TWIN_TEXT = "The same with benign answers as the target, and harm among the protected; one seed."
SIZES_TEXT = """w50: see the rule; "over": not reached within the sizes measured in at least one
seed. Area: mean valid harm over the log of the share. More under random weights: valid harm that as
many random weights leave at w50 beyond the circuit's, paired by items."""
TRUST_TEXT = f"""Own verified answers to the calibration requests that a seed draws. Below
{SATURATED_NLL} nats per token a loss is saturated and its gradients are noise."""
PANELS = {
    "harm_valid_rate": "valid harmful answers",
    "harm_nll": "harm NLL, nats per token",
    "benign_nll": "benign NLL",
}


def sections(rows: Rows) -> list[str]:
    parts = []
    kept_rates = Terms.standard().kept_rates
    titles = {"curves": ("the curves", CURVES_TEXT), "twin": ("the benign contrast", TWIN_TEXT)}
    for ladder, of_ladder in by_ladder(rows).items():
        for part, (title, text) in titles.items():
            rungs = by_model(of_ladder.where(part=part))
            lines = {model: by_share(of_rung) for model, of_rung in rungs.items()}
            if lines:
                drawn = plot(share_figure(lines, PANELS, kept=kept_rates), first=not parts)
                parts.append(section(f"{ladder}: {title}", text, drawn))
        curves = of_ladder.where(part="curves")
        parts.append(section(f"{ladder}: the sizes", SIZES_TEXT, size_table(curves)))
        for model, of_rung in by_model(curves).items():
            trusted = diagnostics_table(of_rung.pool("seed"))
            parts.append(section(f"{ladder}, {model}: the scores", TRUST_TEXT, trusted))
    return parts


def size_table(rows: Rows) -> str:
    body = []
    for model, of_rung in by_model(rows).items():
        more, areas = pooled(of_rung, "random_gap"), pooled(of_rung, "area")
        body.append([model, share_text(of_rung.where("w50")), f"{areas:.0%}", f"{more:.0%}"])
    return table(("rung", "w50", "area", "more under random weights"), body)


# %%
if __name__ == "__main__":
    typer.run(command(sys.modules[__name__]))
