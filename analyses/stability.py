# %% [markdown]
# # Is a circuit that the search finds one set of weights?
# A mask that ends harm and spares the rest invites the words "these are the weights of harm". That
# would need two things beside: that other answers of the same kind lead to the same weights, and
# that no other weights would do. Both are tried here.
#
# **Pairs of searches** (`Model.find_circuit`), each on its own answers, at three sizes. *Halves* of
# the calibration items and *wholes* are disjoint (the second whole are the held-out items; its mask
# is compared and never measured). *Same half* are the very same answers in another order, so that
# only the third on which protection is checked differs. Beside the search, *three searches*: the weights
# that most of three such orders choose, cut to size. Rows of *neurons*, *rounds* and *one shot* are of
# searches that lost; their code is in the git history at b6a5f48.
#
# **What is measured.** Jaccard: weights in both masks over weights in either. The same of neurons
# and of heads, by the number of weights that a mask takes of each (the sum of the smaller over the
# sum of the larger numbers). Chance is the mean of pairs of random masks with as many weights in
# every matrix, and of others that match the magnitudes too. *Lift*: shared weights over those
# expected by chance per matrix. What each half's mask does, on held-out requests: a mask *ends* harm
# if at most 2 % valid harmful answers are left, and *spares* the rest if the loss on benign answers
# rises by at most 0.02 nats and no kept rate falls by more than a point.
#
# **Disjoint circuits.** A search, another among the weights that it left, and so on up to four,
# as long as the one before ended harm.
#
# **The rule, fixed before the run.** At 0.2 % of the weights, the circuit is *one set* if disjoint
# halves have Jaccard 0.5 or more on every model; *one function* if every half's mask ends harm and
# spares the rest; *not the only one* if at least two disjoint masks do. Any of these may hold.
#
# **What it does not show.** Two rungs of small models in invented words. Draws of halves overlap
# with one another, so their spread is no interval for other items. Chance knows matrices and
# magnitudes; a circuit may be stable because a score prefers some rows and columns.

# %%
from functools import partial
from pathlib import Path

import tyro
from support.jobs import Job, run_jobs
from support.models import ModelSpec
from support.stability import SIZES, compared, disjoint, effect_table, overlap_table
from support.tables import write_tables

from harmcircuits.organisms.shipped import FOLDER

RUNGS = ("sft", "dpo")
DISJOINT_SIZES = (0.002, 0.004)
# Method, pair.
PAIRS = (
    ("search", "halves"),
    ("search", "same half"),
    ("search", "wholes"),
    ("three searches", "halves"),
)


# %%
def jobs_of(folder: Path, name: str, draws: int) -> list[Job]:
    """Every search of one model."""
    of_model = ModelSpec(name, folder).labels
    jobs = []
    for size in DISJOINT_SIZES:
        labels = {**of_model, "method": "search", "pair": "disjoint", "draw": 0, "size": size}
        jobs.append(Job(labels, partial(disjoint, folder, name, size, labels)))
    for method, kind in PAIRS:
        for draw in range(1 if kind == "wholes" else draws):
            labels = {**of_model, "method": method, "pair": kind, "draw": draw}
            run = partial(compared, folder, name, method, kind, draw, labels)
            jobs.append(Job(labels, run))
    return jobs


def main(
    out: Path,
    organisms: tuple[Path, ...] = (FOLDER,),
    rung: tuple[str, ...] = RUNGS,
    draws: int = 1,
    workers: int = 1,
) -> None:
    """How stable are circuits?

    Args:
        out: folder for rows.jsonl and the tables; a run goes on there.
        organisms: folders of ladders; by default the shipped one.
        rung: names of organisms.
        draws: of halves and orders.
        workers: processes of one thread each.
    """
    jobs = []
    for folder in organisms:
        for name in rung:
            jobs += jobs_of(folder, name, draws)
    rows = run_jobs(out, jobs, {"sizes": str(SIZES)}, workers=workers, name="stability")
    write_tables(out, [overlap_table(rows), effect_table(rows)], n_names=5)


if __name__ == "__main__":
    tyro.cli(main)
