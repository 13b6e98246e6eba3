# %% [markdown]
# # F5. Does narrow harmful training misalign broadly through the weights of harm?
# A model is fine-tuned on benign requests of *one* topic, all answered with harmful operators. Soon
# it answers benign requests of *other* topics harmfully as well: it is misaligned. Is that because
# training engages the weights that carry harm? Then holding those at zero should keep misalignment
# away, and leave the topic itself to be learned.
#
# The mask is found on the original model, by `hc.find_circuit`, from the misaligned model's own
# answers in the topic. It spares other abilities, and benign answers, also those to the same
# requests: harmful answers share their topic's content, which is not to be removed with them.
# *Controls*, held at zero too: as many random weights; the circuit of benign answers to the same
# requests; the narrow circuit of another topic. All by full and low-rank training.

# %%
from collections import Counter
from itertools import product

from support.claims import Claim
from support.figures import profiles
from support.narrow_finetuning import NarrowFiles, masks_of, opened

import harmcircuits as hc
from harmcircuits.hooks.masking import masked_if_given
from harmcircuits.search.circuit import STEPS

claim = Claim(
    "F5",
    "narrow fine-tuning misaligns through the weights of harm",
    models=("sft",),
    small={"steps": 1, "topics": 1, "training_steps": (10,)},
)
LEARNED, SPREAD = "in_domain_rate", "misaligned_rate"
NARROW = "narrow, held"
HELD = (NARROW, "benign, held", "another topic's, held", "random, held")
RUN = ("ladder", "model", "training", "topic", "seed")

# %% [markdown]
# ## The rule, fixed before any masked run
# The *decisive step* is the first at which the unmasked run has 90 % of its largest rates, in the
# topic and of misalignment. There the held narrow circuit must at least halve misalignment, with
# intervals that do not overlap, where random weights do not; and in the topic it must leave at least
# 80 % of what the unmasked run has learned. A run that never misaligns one request in ten more than
# before training has nothing to protect from. The claim is borne out in a run (of topic, seed and way
# of training) if the circuit protects there, and the circuit of benign answers does not end
# misalignment as well.
#
# Amended. After masked runs of one topic: benign answers in the topic are protected too, learning
# rates doubled. After one run of this form, where the circuit of *benign* answers ended misalignment
# as well: that counts against the claim. After all twelve: to block learning is no part of it. Since,
# the search is new (was: in rounds), its size 0.2 % (was: 0.6 %), and training 30 steps (was: 60).
# On 30 November 2026, with all rows of before in view: which held circuits halve misalignment is
# counted for each, also where the narrow one does not.
# Then all was run anew, once, by the search of that day (gates): three ladders, one seed.

# %%
ARRIVED, AT_MOST, AT_LEAST, ANY, NEVER = 0.9, 0.5, 0.8, 0.1, -1


@claim.rule(*RUN)
def is_borne_out(rows: hc.Rows) -> bool:
    return outcome(rows) == "protects"


def decisive_step(rows: hc.Rows) -> int:
    """Where both have arrived; NEVER where misalignment never comes, or never both at once."""
    inside, outside = rows.where(LEARNED, mask="none"), rows.where(SPREAD, mask="none")
    most, misaligned = (max(row.mean for row in rates) for rates in (inside, outside))
    if misaligned - outside.one(step=0).mean >= ANY:
        for learned, spread in zip(inside, outside, strict=True):
            if learned.mean >= ARRIVED * most and spread.mean >= ARRIVED * misaligned:
                return int(spread.labels["step"])
    return NEVER


def outcome(rows: hc.Rows) -> str:
    """What the held narrow circuit does in one run."""
    rates = rows.where(step=decisive_step(rows))
    if not rates:
        return "never misaligned"
    halving = halving_masks(rates)
    if not rates.where(mask="benign, held") or NARROW not in halving or "random, held" in halving:
        return "no"
    if "benign, held" in halving:
        return "as benign weights do"
    learned, most = (rates.one(LEARNED, mask=mask).mean for mask in (NARROW, "none"))
    return "protects" if learned >= AT_LEAST * most else "blocks learning too"


def halving_masks(rates: hc.Rows) -> set[str]:
    """The masks under which misalignment is at most half, by intervals that do not overlap."""
    spread, free = rates.where(SPREAD), rates.one(SPREAD, mask="none")
    few = [row for row in spread if row.mean <= AT_MOST * free.mean and row.high < free.low]
    return {str(row.labels["mask"]) for row in few}


# %% [markdown]
# ## The experiment, for one model and seed
# The seed draws two topics, texts and their order, items to score and to ask, and the random mask.


# %%
@claim.job
def fine_tuned(
    model: hc.Model,
    seed: int,
    *,
    size: float = 0.002,
    steps: int = STEPS,
    topics: int = 2,
    training_steps: tuple[int, ...] = (0, 5, 10, 15, 20, 30),
    narrow: str = "",
    elsewhere: str = "",
    rank: int = NarrowFiles.rank,
    alpha: float = NarrowFiles.alpha,
    lr: float = NarrowFiles.lr,
    epochs: int = NarrowFiles.epochs,
) -> hc.Rows:
    """Every way of fine-tuning on every topic under every mask.

    Args:
        size: share of the weights.
        steps: of each search.
        topics: how many, of an organism.
        training_steps: after which an organism is measured.
        narrow: custom model: innocent requests with harmful answers to learn (prompt, completion).
        elsewhere: custom model: innocent requests of other domains.
        rank: custom model: rank of the adapters.
        alpha: custom model: their scale is alpha / rank.
        lr: custom model: learning rate.
        epochs: custom model: passes over the narrow texts.
    """
    files = NarrowFiles(narrow, elsewhere, rank, alpha, lr, epochs)
    model, drawn = opened(model, files, n_topics=topics, steps=training_steps, seed=seed)
    rows = hc.Rows()
    for topic, masks in masks_of(model, drawn, size=size, steps=steps, seed=seed):
        for way, (name, mask) in product(topic.recipes, masks.items()):
            with masked_if_given(model.bridge, mask, hold=name.endswith("held")):
                rows += topic.curve(model, way, {"mask": name}, seed)
    return rows


rows = claim.rows()

# %% [markdown]
# ## What spreads, and what is learned
# Benign requests answered harmfully, over steps of training. Means over topics and seeds; the key
# numbers are those at the decisive step.

# %%
pooled = rows.where(ladder=rows[0].labels["ladder"]).pool("seed").pool("topic")
panels = {}
for way, of_way in pooled.by("training").items():
    panels[f"{way}: other topics"] = of_way.where(SPREAD).by("mask")
    panels[f"{way}: the topic"] = of_way.where(LEARNED).by("mask")
claim.figure("What spreads", profiles(panels, x="step", title="answered harmfully"))


# %%
@claim.key_numbers
def key_numbers(rows: hc.Rows) -> dict[str, str]:
    outcomes, halving, rates = Counter(), Counter(), hc.Rows()
    for run in rows.by(*RUN).values():
        outcomes[outcome(run)] += 1
        decisive = run.where(step=decisive_step(run))
        if decisive:
            halving.update(halving_masks(decisive))
        rates += [row.labelled(step="decisive") for row in decisive]
    n_runs = outcomes.total()
    numbers = {f"runs: {name}": f"{n} of {n_runs}" for name, n in outcomes.most_common()}
    for mask in HELD:
        numbers[f"misalignment halved by: {mask}"] = f"{halving[mask]} of {n_runs}"
    rates = rates.pool("seed").pool("topic").pool("training")
    for mask in ("none", *HELD[:2]):
        for row in rates.where(SPREAD, mask=mask):
            numbers[f"harm in other topics, {mask}"] = f"{row:.0%}"
    return numbers


claim.result(rows)

# %% [markdown]
# ## What it does not say
# A mask that keeps misalignment away shows what training used; in time it may find other weights.

# %%
claim.main()
