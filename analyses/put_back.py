# %% [markdown]
# # Which of the removed weights carry the harm: a few, or all of them?
# The search gives a set of weights without which harmful answers end. It does not say whether each
# of them counts. So we take the pruned model and put removed weights **back**: one layer, one
# matrix, one head or neuron at a time, and then more and more heads and neurons, the most useful
# first. The effect is measured by the loss on held-out harmful reference answers:
#
# $$\text{restored} = \frac{\text{loss, pruned} - \text{loss, with the part back}}
#                         {\text{loss, pruned} - \text{loss, unpruned}}$$
#
# 0: the part restores nothing; 1: the loss is the unpruned model's again. The parts of a circuit need
# not add up to 1. If each part alone restores nothing and all together everything, harm passes through
# the circuit like a current through switches in a row; if a part alone restores much, it is a switch
# parallel to the others.

# %%
import random
from functools import reduce
from operator import or_

import numpy as np
from support.claims import Claim
from support.figures import heatmaps, profiles
from support.parts import parts_of

import harmcircuits as hc
from harmcircuits.circuits.location import location_rows
from harmcircuits.measurements import Measurement
from harmcircuits.search.circuit import STEPS

claim = Claim(
    "parts",
    "a few heads and neurons of the circuit carry most of it",
    models=("sft", "dpo"),
    small={"steps": 2, "every": 1},
)

# %% [markdown]
# ## The rule, fixed before any run
# In a model and seed, a few units carry most of the circuit if the tenth of its heads and neurons
# that restores most, put back together, restores at least half, by its interval. The units are
# ranked on the choice split, one at a time, and the figure is read on held-out requests. The control
# is a tenth drawn at random.

# %%
TENTH, HALF = 0.1, 0.5


@claim.rule()
def is_carried_by_few(rows: hc.Rows) -> bool:
    return rows.one("restored", order="best first", share=TENTH).low >= HALF


# %% [markdown]
# ## The experiment, for one model and seed
# The circuit is found on the half of the requests that the seed draws, and protects all other abilities.


# %%
@claim.job
def parts_back(
    model: hc.Model,
    seed: int,
    *,
    size: float = 0.002,
    steps: int = STEPS,
    every: int = 4,
    shares: tuple[float, ...] = (0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0),
) -> hc.Rows:
    """The share of the loss that parts of the circuit restore, alone and together.

    Args:
        size: share of the weights in the circuit.
        steps: steps of the search.
        every: only every n-th request is measured.
        shares: of the heads and neurons that are put back together.
    """
    calibrations = model.calibrations(share=0.5, seed=seed)
    circuit = model.find_circuit("harmful", size=size, steps=steps, calibrations=calibrations)
    sites = hc.weight_sites(model.bridge)
    rows = location_rows(circuit, sites, {"by": "circuit"})
    held_out = Restored(model, circuit, "heldout", every)
    for by in ("layer", "matrix"):
        for place, part in parts_of(circuit, sites, by).items():
            where = {"back": by, "layer": place.layer, "kind": place.part or "all"}
            rows += [held_out.row(part, where)]

    units = list(parts_of(circuit, sites, "unit").values())
    choice = Restored(model, circuit, "choice", every)
    alone = [choice.row(part, {}).mean for part in units]
    orders = {
        "best first": np.argsort(alone)[::-1].tolist(),
        "random": random.Random(seed).sample(range(len(units)), len(units)),
    }
    rows += [Measurement.exact("units", {}, len(units))]
    rows += [Measurement.exact("best_alone", {}, max(alone))]
    for order, numbers in orders.items():
        for share in shares:
            n_back = max(1, round(share * len(units)))
            part = reduce(or_, [units[number] for number in numbers[:n_back]])
            rows += [held_out.row(part, {"order": order, "share": share})]
    return rows


class Restored:
    """How much of a circuit's loss comes back with a part of it, on one split."""

    def __init__(self, model: hc.Model, circuit: hc.WeightMask, split: str, every: int) -> None:
        behaviour = model.behaviour("harmful")
        examples = behaviour.references(split)[::every]
        self.groups = [example.cluster for example in examples]
        self.bridge, self.circuit = model.bridge, circuit
        self.batches = model.batches(behaviour, examples)
        self.pruned = self.loss(circuit)
        self.gap = (self.pruned - hc.completion_nll(self.bridge, self.batches)).mean()

    def loss(self, mask: hc.WeightMask):
        with hc.masked(self.bridge, mask):
            return hc.completion_nll(self.bridge, self.batches)

    def row(self, part: hc.WeightMask, labels: dict) -> Measurement:
        values = (self.pruned - self.loss(self.circuit - part)) / self.gap
        return Measurement.average("restored", labels, values, self.groups)


rows = claim.rows()

# %% [markdown]
# ## One part at a time, and more and more of them
# The first ladder: the share of the loss that one matrix restores (mean over seeds). Below, the share
# that heads and neurons restore together, the best first and at random.

# %%
first = rows.where(ladder=rows[0].labels["ladder"]).pool("seed")
matrices = first.where(back="matrix").by("model")
claim.figure("One matrix put back", heatmaps(matrices, x="kind", y="layer"))

# %%
together = hc.Rows(row for row in first if "order" in row.labels)
lines = {name: model_rows.by("order") for name, model_rows in together.by("model").items()}
claim.figure("Heads and neurons put back", profiles(lines, x="share", title="restored"))

# %% [markdown]
# ## Do circuits of different models sit in the same places?
# The share of each matrix that the circuit takes, and its rank correlation between models and
# ladders (means over seeds): does a circuit found in one model say anything about another's?

# %%
places = rows.where("weights_removed", by="matrix").pool("seed")
counts = places.frame(index=["layer", "kind", "of"], columns=["ladder", "model"])
shares = counts.div(counts.index.get_level_values("of").to_numpy(), axis=0)
(100 * shares).round(2)

# %%
shares.corr(method="spearman").round(2)


# %%
@claim.key_numbers
def key_numbers(rows: hc.Rows) -> dict[str, str]:
    pooled = rows.pool("seed")
    tenth = pooled.where("restored", share=TENTH)
    layer = pooled.where("restored", back="layer").largest()
    return {
        "heads and neurons that the circuit touches": f"{pooled.one('units').mean:.0f}",
        "restored by the most useful of them alone": f"{pooled.one('best_alone').mean:.0%}",
        "restored by the best tenth": f"{tenth.one(order='best first'):.0%}",
        "restored by a tenth drawn at random": f"{tenth.one(order='random'):.0%}",
        "restored by the most useful layer": f"{layer:.0%} (layer {layer.labels['layer']})",
    }


claim.result(rows)

# %%
claim.main()
