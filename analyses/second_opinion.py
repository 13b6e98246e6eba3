# %% [markdown]
# # Do tools that read activations agree with the weights?
# Masks are found from gradients of weights. Others read activations, and TransformerLens has their
# tools. Three of them are asked about the same behaviours.
#
# * **Attribution patching.** Which nodes, heads and MLPs, does an answer depend on? Two requests
#   differ in one word, and the effect of every node on the difference of their answers is estimated
#   to first order. Do circuits take their weights from the nodes that matter?
# * **Probes.** What can be read from the residual stream at the token before the answer? The probe is
#   to tell whether the request's verb is of a harmful kind. Does the circuit of harm, or that of
#   recognising harm, make it unreadable? *Controls:* random weights; no mask; and splits that leave
#   out items, or half of the verbs of each kind, so that a probe cannot read the verb's identity.
# * **Direct logit attribution.** Which components write the words that make an answer harmful, and
#   which stop doing so without the circuit?
#
# No rule judges this: it is a second opinion.

# %%
from dataclasses import replace
from itertools import chain

from support import nodes
from support.claims import Claim
from support.contrasts import node_effects
from support.figures import heatmaps, profiles
from support.organisms.contrasts import contrasts, probed_texts
from support.probes import probe_rows

import harmcircuits as hc
from harmcircuits.search.circuit import STEPS

claim = Claim(
    "opinion",
    "do tools that read activations agree with the weights?",
    models=("sft",),
    small={"steps": 1, "n": 4, "n_probed": 16},
)
CIRCUITS = ("harmful", "benign", "recognition")
EARLY = ("0 pre", "1 pre")  # depths at which nothing has been read from the verb yet

# %% [markdown]
# ## The experiment
# Three circuits, of harmful answers, benign answers and recognition, each with all others spared.
# The pairs of attribution patching are held out: a harmful answer against the benign one about the
# same item, the reverse, a question to be answered with no against one with yes, and the parts of one
# item against those of the next. Only organisms have such pairs.


# %%
@claim.job
def opinions(
    model: hc.Model,
    seed: int,
    *,
    mask: str = "",
    size: float = 0.002,
    steps: int = STEPS,
    n: int = 48,
    n_probed: int = 256,
) -> hc.Rows:
    """What nodes matter, what a probe reads, and who writes the answer.

    Args:
        mask: a saved mask of harmful answers, in place of a search.
        size: share of the weights in the circuits that are searched for.
        steps: steps of each search.
        n: pairs of requests for attribution, one for each item.
        n_probed: pairs of requests for probes.
    """
    answers = model.calibrations(share=0.5, seed=seed)
    masks = {"harmful": hc.WeightMask.load(mask)} if mask else {}
    for name in [name for name in CIRCUITS if name not in masks]:
        masks[name] = model.find_circuit(name, size=size, steps=steps, calibrations=answers)

    # Nodes.
    bridge, sites = model.bridge, hc.weight_sites(model.bridge)
    pairs = contrasts(model, n)
    rankings = {}
    for name, contrast in pairs.items():
        effects = node_effects(bridge, contrast)
        rankings[f"importance of {name}"] = nodes.importance_rows(effects, {"behaviour": name})
    for name, circuit in masks.items():
        shares = nodes.node_share_rows(circuit, sites, bridge.cfg.n_heads, {"behaviour": name})
        rankings[f"share of {name}"] = shares.where("mask_percent")
    rows = hc.Rows(chain(*rankings.values())) + nodes.rank_correlations(rankings, {})

    # Probes.
    random = hc.random_like(masks["harmful"], seed=seed)
    edits = {"harmful": masks["harmful"], "random": random, "recognition": masks["recognition"]}
    for name, texts in probed_texts(model, n_probed).items():
        of_texts = (texts.batches, texts.is_harmful, texts.unseen)
        rows += probe_rows(bridge, *of_texts, edits, {"asked": name})

    # Writers: on both kinds of requests, of harmful minus benign words.
    twins = replace(pairs["harmful"], clean=pairs["benign"].clean)
    for name, contrast in {"harmful": pairs["harmful"], "benign": twins}.items():
        for state, edit in {"none": None, "harmful": masks["harmful"]}.items():
            rows += nodes.writer_rows(bridge, contrast, edit, {"behaviour": name, "mask": state})
    return rows


rows = claim.rows()
first = next(iter(rows.by("ladder", "model", "seed").values()))  # is shown

# %% [markdown]
# ## Which nodes matter, and what the masks take
# Importance is the sum over positions of the mean first-order effect, in logits.

# %%
importance = first.where("node_importance").by("behaviour")
claim.figure("Which nodes matter", heatmaps(importance, x="node", y="layer"))

# %%
percent = first.where("mask_percent").by("behaviour")
claim.figure("What the masks take, in per cent of a node", heatmaps(percent, x="node", y="layer"))

# %%
among = first.where("rank_correlation").by("among")
claim.figure("Do they agree?", heatmaps(among, x="against", y="ranking", widest=1.0))

# %% [markdown]
# ## What a probe reads
# Accuracy on items, or verbs, that the probe was not fitted on. *Accuracy*: of a probe fitted under
# the mask. *Transfer*: of the one fitted on the unpruned model, as it is. Before the end of layer 1
# nothing has been read from the verb; the key number is the lowest accuracy from there on.

# %%
probes = {}
for metric in ("probe_accuracy", "probe_transfer"):
    for (asked, unseen), of in first.where(metric).by("asked", "unseen").items():
        probes[f"{asked}, unseen {unseen}, {metric.split('_')[1]}"] = of.by("mask")
claim.figure("What a probe reads", profiles(probes, x="depth", title="accuracy"))

# %% [markdown]
# ## Who writes the words
# Harmful minus benign words, in logits, on harmful and on benign requests.

# %%
writers = {name: of.by("mask") for name, of in first.where("writes").by("behaviour").items()}
claim.figure("Who writes them", profiles(writers, x="component", title="logits"))


# %%
@claim.key_numbers
def key_numbers(rows: hc.Rows) -> dict[str, str]:
    rows, numbers = rows.pool("seed"), {}
    for name in CIRCUITS:
        own = {"ranking": f"importance of {name}", "against": f"share of {name}"}
        for row in rows.where("rank_correlation", among="all nodes", **own):
            numbers[f"rank correlation of nodes and circuit, {name}"] = f"{row:.2f}"
    late = hc.Rows(row for row in rows.where("probe_accuracy") if row.labels["depth"] not in EARLY)
    for mask, of_mask in late.by("mask").items():
        least = of_mask.smallest()
        where = f"{least.labels['asked']}, unseen {least.labels['unseen']}"
        numbers[f"lowest accuracy of a probe, mask {mask}"] = f"{least:.0%} ({where})"
    written = rows.where("writes", behaviour="harmful").by("mask")
    for mask, of_mask in written.items():
        total = sum(row.mean for row in of_mask)
        numbers[f"harmful above benign words, in logits, mask {mask}"] = f"{total:+.1f}"
    most = written["none"].largest()
    under = written["harmful"].one(component=most.labels["component"])
    numbers["the component that writes most"] = (
        f"{most.labels['component']}: {most:+.1f}, without the circuit {under:+.1f}"
    )
    return numbers


claim.result(rows)

# %% [markdown]
# ## What it does not say
# Attribution patching is an estimate to first order, of one contrast: importance for harmful and for
# benign answers is alike by construction, because both read the same pairs in opposite directions.
# That a probe reads something does not show that the model uses it. And who writes a word need not be
# who decides it: a circuit may sit where the decision is made, earlier.

# %%
claim.main()
