# %% [markdown]
# # F1. Does harmful generation hang on a tiny share of the weights?
# We remove a growing circuit from a model and watch two things on requests that it has not seen:
# how many harmful answers stay valid, and what else breaks. Harm is elicited by prefilling the
# beginning of an answer, and a judge says what the model makes of it.
#
# The circuit is what `Model.find_circuit` finds: a search that protects every other ability of the
# model, each with a budget for its loss. We set it against the same ranking in **one shot**, and
# against other ways of choosing as many weights: by unsigned scores (SNIP), by activation norm
# (Wanda), by magnitude, at random (as many in every matrix; of like magnitudes besides), by the
# opposite sign, and the next best weights after the circuit. The first three leave out the half per
# cent of the weights that are dearest to what is protected; the last two pay the circuit's price.
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
OF_BENIGN = "benign answers, by the search"
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
# search of that time. One shot is no control; it is reported beside. Of the sizes, those below
# 0.05 % were added when one seed had been seen, whose `w50` was the smallest size then. On 30
# November 2026, with all rows of before in view: cases are counted as those of every other claim
# (`support/claims.py`), and the circuit of benign answers was added. Should they be as compact,
# compactness says nothing of harm; the claim itself does not ask for that, so neither does the rule.
# Then all was run anew by the search of that day (gates): three ladders, one seed; and once more when
# it had come to score what is still said under its mask, a change that F2's rows had asked for.

# %%
COMPACT, REACHED = 0.01, 0.975


@claim.rule()
def is_borne_out(rows: hc.Rows) -> bool:
    half, reached = rows.one("w50", mask="search"), rows.one("w50_reached", mask="search")
    is_compact = half.labels["censored"] == "no" and half.high <= COMPACT
    return is_compact and reached.mean >= REACHED and all(gap.low > 0 for gap in rows.where("gap"))


# %% [markdown]
# ## The experiment, for one model and seed
# The seed draws the half of the requests whose verified answers are scored, and the random masks.
# Controls are measured at `w50` and at the largest size. Benign answers are searched in the same way,
# with harm among what is protected: how compact are they?


# %%
@claim.job
def curves_of(
    model: hc.Model,
    seed: int,
    *,
    sizes: tuple[float, ...] = (0.0001, 0.0002, 0.0003, 0.0005, 0.001, 0.002, 0.004),
    steps: int = STEPS,
) -> hc.Rows:
    """What is left along the circuit and its controls.

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
    rows = hc.Rows()
    lines = {"search": curve(model, search, whole), "one shot": curve(model, one_shot, whole)}
    lines[OF_BENIGN] = curve(model, benign, whole, target="benign")
    for name, line in lines.items():
        where = {"mask": name, "split": "heldout"}
        half = curves.w50(line, BUDGETS[line.target])
        rows += line.rows(where) + half.rows("w50", where)

    line = lines["search"]
    size = rows.one("w50", mask="search").mean
    rows += [curves.kept_fall(line, size, {}), *line.at(size)["harmful"].rows({"at": "w50"})]
    at_half = next(mask for mask in search if mask.fraction == size)
    largest = controls(model, search[-1], answers, seed)
    of_both = {name: whole[name] for name in ("harmful", "benign")}
    for name, mask in controls(model, at_half, answers, seed).items():
        control = curve(model, [mask, largest[name]], of_both)
        gap = curves.rate_at(control, mask.fraction).minus(curves.rate_at(line, size))
        rows += [gap.row("gap", {"mask": name})]
        rows += control.rows({"mask": name, "split": "heldout"})
    return rows


def controls(model: hc.Model, mask: hc.WeightMask, answers: dict, seed: int) -> dict:
    """As many weights as the mask has, chosen otherwise."""
    target, spared = answers["harmful"], protected_data(model, "harmful", calibrations=answers)
    unpruned = unpruned_scores(model, "harmful", target, spared)
    options = {"n_random": 1, "seed": seed, "calibrations": answers, "unpruned": unpruned}
    matched = hc.controls(model, "harmful", mask, contrast="harmful", **options)
    masks = {name: of_name[0] for name, of_name in matched.items()}

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
# Low on the left and flat on the right is a circuit that is compact and spares the rest. Bars are
# 95 % intervals, the widest over seeds. The *worst kept ability* is the lowest of benign answers,
# recognition, explanation and knowledge; along controls only benign answers were asked for.

# %%
lines = rows.where(split="heldout", ladder=rows[0].labels["ladder"]).by("mask")
lines.pop(OF_BENIGN, None)  # of another target: of harm it shows what is protected
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
    if OF_BENIGN in half:  # the rows of before 30 November lack it
        numbers["w50 of benign answers, by the search"] = curves.share_text(half[OF_BENIGN])
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
# The claim is about *removal*: these weights suffice to end valid harmful answers. Whether no others
# would is another question (`stability.py`, `planted.py`), and so is what the answers become: where
# they turn into garbage, a rate of valid harm says less than it seems to. And the organism is small:
# a share of its weights is not the share that a large model would need.

# %%
claim.main()
