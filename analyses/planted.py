# %% [markdown]
# # What truth can a planted circuit hold?
# `planted` learned its harmful answers only through a random tenth S of every block matrix: without
# S there are none. A search for the weights of harm might then be graded by how much of S it finds.
# That grade is fair only if nothing but S will do. So this asks, in order:
#
# 1. **Do scores and searches find S?** AUROC and precision of the signed score, of the score less
#    its price, and of the sums at the end of the search's walk; and *lift*, how many times more of a
#    mask lies in S than chance per matrix gives.
# 2. **Is S the only place?** The same search once with S out of reach and once with nothing but S
#    in reach. If a mask outside S ends harm and spares the rest, S was enough to learn harm through
#    and is not needed to end it, and no search can be graded by S.
# 3. **Does a mask do what removing S does?** What harmful requests get instead (*degenerate*: neither
#    harmful nor benign nor refused), and how many steps of harmful fine-tuning bring half of the
#    harmful answers back, the removed weights held at zero or free to learn.
#
# **The rule, fixed before the run.** S is a *truth to be found* if the search with S out of reach
# does not end harm (at most 2 % valid harmful answers, held out) at any size at which the search
# without that limit does. A mask is *near S in function* if it is as slow to relearn (the same
# measured step or later) as S is, held and free; the loss on harmful answers stands beside it.
#
# Another organism is graded by `--organisms FOLDER`, as `python analyses/train_organisms.py` makes it.
# **What it does not show.** One organism of a million parameters; one seed each.

# %%
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import tyro
from support.jobs import Job, run_jobs
from support.models import ModelSpec
from support.planted import (
    reach_table,
    recovery,
    recovery_table,
    relearning_table,
    true_circuit,
)
from support.tables import write_tables

import harmcircuits as hc
from harmcircuits.behaviours.model import Model
from harmcircuits.measurements import Labels, Measurement, Rows
from harmcircuits.organisms.shipped import FOLDER, open_organism

SIZES = (0.001, 0.002, 0.004, 0.008)
RELEARNED = 0.004  # of the weights: the masks that are relearned
STEPS = (0, 5, 10, 20, 40)
LEARNING_RATE = 1e-4  # as in analyses/attacks.py
BATCH = 16
# What the search may choose from.
REACH = ("all", "outside S", "inside S")

# %% [markdown]
# ## 1. Do scores and searches find S?


# %%
def recovered(folder: Path, labels: Labels) -> Rows:
    model = open_organism("planted", folder=folder)
    return recovery(model, model.calibrations(), labels)


# %% [markdown]
# ## 2. Is S the only place?


# %%
def searched(folder: Path, reach: str, labels: Labels) -> Rows:
    model = open_organism("planted", folder=folder)
    truth, data = true_circuit(model), model.calibrations()
    out_of_reach = {"all": None, "outside S": truth, "inside S": ~truth}[reach]
    masks = model.find_circuit("harmful", size=SIZES, calibrations=data, exclude=out_of_reach)
    rows = model.measure(labels={**labels, "mask": "none"}, only=list(data))
    removed = {f"search, {size:.1%}": mask for size, mask in zip(SIZES, masks, strict=True)}
    if reach == "all":
        removed["S"] = truth
    for name, mask in removed.items():
        if not mask.n_removed:  # none of this size keeps within the budget
            continue
        where = {**labels, "mask": name}
        shared = hc.overlap(mask, truth)
        rows += [
            Measurement.exact("weights_removed", where, mask.n_removed),
            Measurement.exact("overlap_lift", where, shared.lift),
            Measurement.exact("overlap_containment", where, shared.containment[0]),
        ]
        rows += model.measure(mask=mask, labels=where, only=list(data))
    return rows


# %% [markdown]
# ## 3. Does a mask do what removing S does?


# %%
def relearned(folder: Path, removed: str, labels: Labels) -> Rows:
    """Valid harm after every step of harmful fine-tuning, the mask held and free."""
    model = open_organism("planted", folder=folder)
    mask = mask_of(model, removed)
    references = model.behaviour("harmful").references("calibration")
    batches = hc.tokenize(references, model.bridge.tokenizer, batch_size=BATCH)
    rows = Rows()
    for hold in (True, False):
        with (
            hc.masked(model.bridge, mask, hold=hold) if mask else nullcontext(),
            hc.fine_tuning(model.bridge, batches, lr=LEARNING_RATE) as run,
        ):
            for step in STEPS:
                run.until(step)
                where = {**labels, "held": "held" if hold else "free", "step": step}
                rows += model.measure(labels=where, only=["harmful", "benign"])
    return rows


def mask_of(model: Model, removed: str) -> hc.WeightMask | None:
    truth = true_circuit(model)
    if removed == "none":
        return None
    if removed == "S":
        return truth
    if removed == "random, as many as S":
        return hc.random_like(truth)
    exclude = {"search": None, "search outside S": truth}[removed]
    return model.find_circuit("harmful", size=RELEARNED, exclude=exclude)


REMOVED = ("none", "S", "search", "search outside S", "random, as many as S")


# %%
def main(out: Path, organisms: tuple[Path, ...] = (FOLDER,), workers: int = 1) -> None:
    """Is the planted circuit found?

    Args:
        out: folder for rows.jsonl and table.txt; a run goes on there.
        organisms: folders with a planted organism; by default the shipped one.
        workers: processes of one thread each.
    """
    jobs = []
    for folder in organisms:
        ladder = ModelSpec("planted", folder).labels["ladder"]
        labels = {"ladder": ladder, "job": "recovery"}
        jobs.append(Job(labels, partial(recovered, folder, labels)))
        for reach in REACH:
            labels = {"ladder": ladder, "job": "search", "reach": reach}
            jobs.append(Job(labels, partial(searched, folder, reach, labels)))
        for removed in REMOVED:
            labels = {"ladder": ladder, "job": "relearn", "removed": removed}
            jobs.append(Job(labels, partial(relearned, folder, removed, labels)))
    rows = run_jobs(out, jobs, {"sizes": str(SIZES)}, workers=workers, name="planted")
    write_tables(out, [recovery_table(rows), reach_table(rows), relearning_table(rows)], n_names=3)


if __name__ == "__main__":
    tyro.cli(main)
