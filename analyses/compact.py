# %% [markdown]
# # F1. Does harmful generation depend on a tiny share of the weights?
# We remove a growing circuit from a model and measure two things on held-out requests: how many
# harmful answers stay valid, and how much the other abilities lose. Harm is elicited by a prefill,
# the beginning of an answer, and a judge labels how the model goes on.
#
# `Model.find_circuit` finds the circuit: a search that protects every other ability of the model,
# each with a budget for its loss. We compare it with the same ranking in **one shot**, and with
# other ways of choosing as many weights: by unsigned scores (SNIP), by activation norm (Wanda), by
# magnitude, at random (as many in every matrix; or of like magnitudes, too), by the opposite sign,
# and the next best weights after the circuit. The first three leave out the half per cent of the
# weights on which the protected abilities depend most; the last two are chosen under the penalty of
# the circuit.
#
# `w50` is the smallest measured share of the weights at which valid harm is at most half of what it
# was, while benign answers, recognition, explanation and knowledge each lose at most 5 points and
# the loss on benign answers rises by at most 0.1 nats a token.

# %%
from support import curves
from support.claims import Claim
from support.curves import BUDGETS, curve

import harmcircuits as hc
from harmcircuits.behaviours.model import protected_data
from harmcircuits.search.circuit import STEPS
from harmcircuits.studies.controls import one_shot_masks, unpruned_scores
from harmcircuits.studies.summary import Roles
from harmcircuits.views.figures import share_figure

claim = Claim(
    "F1",
    "compact: a tiny share of the weights carries harm",
    models=("sft",),
    small={"steps": 2, "sizes": (0.002, 0.01)},
)
BENIGN = "benign answers, by the search"
PANELS = {
    "harm_valid_rate": "valid harmful answers",
    "harm_nll": "harm NLL",
    "benign_nll": "benign NLL",
}

# %% [markdown]
# ## The rule, fixed before any run
# In a model and seed the claim is borne out if (a) `w50` of the circuit is at most 1 % of the
# weights, on at least 97.5 % of resamples of the items, and (b) at that size every control leaves
# more valid harm, by the 95 % interval of the paired difference.
#
# Amended. Before the first run with the search: the rule spoke of the circuit "in rounds", the
# search of that time. One shot is no control; its figures are only reported. The sizes below 0.05 %
# were added after we had seen one seed, whose `w50` was the smallest size of that time. On 30
# November 2026, after seeing all earlier rows: cases are counted as those of every other claim
# (`support/claims.py`), and the circuit of benign answers was added. If benign answers are as
# compact, compactness is not special to harm; the claim does not ask for that, so neither does the
# rule. On 7 December 2026 (a) alone became the effect, (a) and (b) the effect with controls.

# %%
COMPACT, SURE = 0.01, 0.975


@claim.effect
def is_compact(rows: hc.Rows) -> bool:
    half = rows.one("w50", mask="search")
    is_small = half.labels["censored"] == "no" and half.high <= COMPACT
    return is_small and rows.one("w50_reached", mask="search").mean >= SURE


@claim.rule()
def is_borne_out(rows: hc.Rows) -> bool:
    return all(gap.low > 0 for gap in rows.where("gap"))


# %% [markdown]
# ## The experiment, for one model and seed
# The seed draws the half of the requests whose verified answers are scored, and the random masks.
# Controls are measured at `w50` and at the largest size. The same search finds a circuit of benign
# answers, with harm among the protected abilities: how compact is it?


# %%
@claim.job
def curves_of(
    model: hc.Model,
    seed: int,
    *,
    sizes: tuple[float, ...] = (0.0001, 0.0002, 0.0003, 0.0005, 0.001, 0.002, 0.004),
    steps: int = STEPS,
) -> hc.Rows:
    """The rates that are left along the circuit and its controls.

    Args:
        sizes: shares of the weights.
        steps: steps of the search.
    """
    model = curves.restricted(model)
    answers = model.calibrations(share=0.5, seed=seed)
    whole = curves.outcomes_of(model, [name for name in model.behaviours if name != "refusal"])

    options = {"size": list(sizes), "calibrations": answers}
    search = model.find_circuit("harmful", steps=steps, **options)
    protected = protected_data(model, "harmful", calibrations=answers)
    unpruned = unpruned_scores(model, "harmful", answers["harmful"], protected)
    one_shot = one_shot_masks(model, unpruned, protected, list(sizes))
    benign = model.find_circuit("benign", steps=steps, **options)
    lines = {
        "search": curve(model, search, whole),
        "one shot": curve(model, one_shot, whole),
        BENIGN: curve(model, benign, whole, target="benign"),
    }
    rows = hc.Rows()
    for name, line in lines.items():
        where = {"mask": name, "split": "heldout"}
        half = curves.w50(line, BUDGETS[line.target])
        rows += line.rows(where) + half.rows("w50", where)

    line = lines["search"]
    size = rows.one("w50", mask="search").mean
    rows += [curves.kept_fall(line, size, {}), *line.at(size)["harmful"].rows({"at": "w50"})]
    half_mask = next(mask for mask in search if mask.fraction == size)
    largest = controls(model, search[-1], answers, seed)
    pair = {name: whole[name] for name in ("harmful", "benign")}
    for name, mask in controls(model, half_mask, answers, seed).items():
        control = curve(model, [mask, largest[name]], pair)
        gap = curves.rate_at(control, mask.fraction).minus(curves.rate_at(line, size))
        rows += [gap.row("gap", {"mask": name})]
        rows += control.rows({"mask": name, "split": "heldout"})
    return rows


def controls(model: hc.Model, mask: hc.WeightMask, answers: dict, seed: int) -> dict:
    """Masks with as many weights as the circuit, chosen in other ways."""
    target, protected = answers["harmful"], protected_data(model, "harmful", calibrations=answers)
    unpruned = unpruned_scores(model, "harmful", target, protected)
    options = {"n_random": 1, "seed": seed, "calibrations": answers, "unpruned": unpruned}
    matched_controls = hc.controls(model, "harmful", mask, contrast="harmful", **options)
    masks = {name: samples[0] for name, samples in matched_controls.items()}

    dear = hc.top_fraction(unpruned.price, 0.005) if unpruned.price else None
    ranked = {
        "unsigned (SNIP)": hc.snip_scores(model.bridge, target.batches),
        "activation norm (Wanda)": hc.wanda_scores(model.bridge, target.batches),
        "magnitude": hc.magnitude_scores(model.bridge),
    }
    for name, scores in ranked.items():
        masks[name] = hc.top_fraction(scores, mask.fraction, within="model", exclude=dear)
    return masks


rows = claim.rows()

# %% [markdown]
# ## What is left
# The curve of a compact circuit that spares the rest is low on the left and flat on the right. Bars
# are 95 % intervals, the widest over seeds. The *worst kept ability* is the lowest of benign
# answers, recognition, explanation and knowledge; along controls only benign answers were measured.

# %%
lines = rows.where(split="heldout", ladder=rows[0].labels["ladder"]).by("mask")
lines.pop(BENIGN, None)  # its target is not harm
names = sorted(lines, key=lambda name: name not in ("search", "one shot"))
points = {name: curves.by_share(lines[name]) for name in names}
claim.figure("What is left", share_figure(points, PANELS, abilities=Roles.standard().kept_rates))


# %%
@claim.key_numbers
def key_numbers(rows: hc.Rows) -> dict[str, str]:
    half = rows.where("w50").by("mask")
    fall = rows.where("kept_fall").largest()
    degenerate = rows.where("harm_degenerate_rate", at="w50").pool("seed").one()
    strongest = rows.where("gap").pool("seed").smallest()
    control = strongest.labels["mask"]
    largest = curves.by_share(rows.where("harm_valid_rate", mask="search", split="heldout"))
    numbers = {"w50, by the search": curves.share_text(half["search"])}
    if BENIGN in half:  # rows from before 30 November lack it
        numbers["w50 of benign answers, by the search"] = curves.share_text(half[BENIGN])
    return numbers | {
        "w50, in one shot": curves.share_text(half["one shot"]),
        "at w50: largest fall of a kept ability": f"{fall:.0%} ({fall.labels['behaviour']})",
        "at w50: answers that are broken": f"{degenerate:.0%}",
        "at w50: smallest gap to a control": f"{strongest:.0%} ({control})",
        f"harm left at {max(largest):.1%}": f"{largest[max(largest)].one():.0%}",
    }


claim.result(rows)

# %% [markdown]
# ## What it does not say
# The claim is about *removal*: to remove these weights ends valid harmful answers. Whether other
# weights would do as well is another question (`stability.py`, `planted.py`). Another one is what
# the answers become: where they turn into incoherent text, a rate of valid harm says less than it
# seems to. And the organism is small: a large model may need another share of its weights.

# %%
claim.main()
