# %% [markdown]
# # Is a circuit that the search finds one set of weights?
# A mask that ends harm and spares the rest invites the words "these are the weights of harm". That
# would need two more things: other answers of the same kind lead to the same weights, and no other
# weights would do. Both are tried here.
#
# **Pairs of searches** (`Model.find_circuit`), each on its own answers, at three sizes. *Halves* of
# the calibration items and *wholes* are disjoint (the second whole are the held-out items; its mask
# is compared and never measured). *Same half* are the very same answers in another order, so only
# the third on which protection is checked differs. Beside the search: *three searches*, the weights
# that most of three such orders choose, cut to size. Rows of *neurons*, *rounds* and *one shot* are of
# searches that lost; their code is in the git history at b6a5f48.
#
# **What is measured.** Jaccard: weights in both masks over weights in either. The same of neurons
# and of heads, by the number of weights that a mask takes of each (the sum of the smaller over the
# sum of the larger numbers). Chance is the mean of pairs of random masks with as many weights in
# every matrix, and of others that match the magnitudes too. *Lift*: common weights over those
# expected by chance per matrix. Each half's mask is measured on held-out requests: it *ends* harm
# if at most 2 % valid harmful answers are left, and *spares* the rest if the loss on benign answers
# rises by at most 0.02 nats and no protected rate falls by more than a point.
#
# **Disjoint circuits.** A search, another among the weights that it left, and so on up to four,
# as long as the previous one ended harm.
#
# **The rule, fixed before the run.** At 0.2 % of the weights, the circuit is *one set* if disjoint
# halves have Jaccard 0.5 or more on every model; *one function* if every half's mask ends harm and
# spares the rest; *not the only one* if at least two disjoint masks do. Any of these may hold.
#
# **What it does not show.** Two training runs of small models in invented words. Draws of halves
# overlap with one another, so their spread is no interval for other items. Chance knows matrices and
# magnitudes; a circuit may be stable because a score prefers some rows and columns.

# %%
from functools import partial

import tyro
from support.jobs import Job
from support.models import ModelSpec, RunOptions
from support.runs import Tables, run_analysis
from support.stability import SIZES, compared, disjoint, effect_table, overlap_table
from tyro.conf import OmitArgPrefixes

MODELS = ("sft", "dpo")
DISJOINT_SIZES = (0.002, 0.004)
# Method, pair.
PAIRS = (
    ("search", "halves"),
    ("search", "same half"),
    ("search", "wholes"),
    ("three searches", "halves"),
)
TABLES: Tables = {"overlaps": overlap_table, "effects": effect_table}


# %%
def jobs_of(spec: ModelSpec, draws: int) -> list[Job]:
    """Every search of one model."""
    place = (spec.folder, spec.model)
    jobs = []
    for size in DISJOINT_SIZES:
        labels = {**spec.labels, "method": "search", "pair": "disjoint", "draw": 0, "size": size}
        jobs.append(Job(labels, partial(disjoint, *place, size, labels)))
    for method, pair in PAIRS:
        for draw in range(1 if pair == "wholes" else draws):
            labels = {**spec.labels, "method": method, "pair": pair, "draw": draw}
            jobs.append(Job(labels, partial(compared, *place, method, pair, draw, labels)))
    return jobs


def main(run: OmitArgPrefixes[RunOptions], draws: int = 1) -> None:
    """How stable are circuits?

    Args:
        run: the models, and how they run.
        draws: of halves and orders.
    """
    jobs = []
    for spec in run.specs(MODELS):
        jobs += jobs_of(spec, draws)
    options = {"workers": run.workers, "name": "stability", "n_names": 5}
    run_analysis(run.out, jobs, {"sizes": str(SIZES)}, TABLES, **options)


if __name__ == "__main__":
    tyro.cli(main)
