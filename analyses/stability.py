# %% [markdown]
# # Is a circuit that the search finds one set of weights?
# A mask that ends harm and spares the rest invites the words "these are the weights of harm". That
# would need two things beside: that other answers of the same kind lead to the same weights, and
# that no other weights would do. Both are tried here.
#
# **Pairs of searches** (`Model.find_circuit`), each on its own answers, at three sizes. *Halves* of
# the calibration items and *wholes* are disjoint (the second whole are the held-out items; its mask
# is compared and never measured). *Same half* are the very same answers in another order, so that only the
# third on which protection is checked differs. Beside the search, *three
# walks*: the weights that most of three such orders choose, cut to size; *neurons*: the search that
# takes whole neurons; *rounds* (score, remove a tenth, score again); and *one shot*.
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
import random
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal

import pandas as pd
import typer
from baselines import rounds
from rich.console import Console
from search_bench import with_prompts
from search_results import ENDED, cost_cells
from torch import Tensor

import harmcircuits as hc
from harmcircuits.behaviours.model import Calibration, Model
from harmcircuits.circuits.location import counts_by
from harmcircuits.circuits.scores import Source, WeightScores
from harmcircuits.circuits.sites import Site
from harmcircuits.circuits.units import Unit
from harmcircuits.measurements import Labels, Measurement, Rows
from harmcircuits.organisms import FOLDER
from harmcircuits.prompts import PromptSet
from harmcircuits.studies.jobs import Job, run_jobs
from harmcircuits.studies.models import ModelSpec
from harmcircuits.views.tables import frame_table

RUNGS = ("sft", "dpo")
SIZES = (0.001, 0.002, 0.004)
MEASURED = 0.002  # the size at which what a mask does is measured
DISJOINT_SIZES = (0.002, 0.004)
MOST_DISJOINT = 4
N_RANDOM = 5  # pairs of random masks
LEVELS = ("weight", "neuron", "head")
MASKS = ("searched", "random", "random, same |W|")

Level = Literal["weight", "neuron", "head"]
Data = Mapping[str, Calibration]
Masks = list[hc.WeightMask]

# %% [markdown]
# ## The data of a pair


# %%
def halves(model: Model, data: Data, draw: int) -> tuple[Data, Data]:
    """The answers about half of every topic's items, and those about the others."""
    drawn = with_prompts(model, data, partial(PromptSet.sampled, share=0.5, seed=draw))
    rest = with_prompts(model, data, partial(PromptSet.sampled, share=0.5, seed=draw, rest=True))
    return drawn, rest


def shuffled(model: Model, data: Data, draw: int) -> Data:
    """The same answers in another order: another third of them is checked."""

    def reordered(prompts: PromptSet) -> PromptSet:
        examples = list(prompts)
        random.Random(draw).shuffle(examples)
        return PromptSet(tuple(examples))

    return with_prompts(model, data, reordered)


def heldout(model: Model, data: Data) -> Data:
    """The same behaviours on the held-out items."""
    shown = {}
    for name in data:
        behaviour = model.behaviour(name)
        requests = behaviour.prompts("heldout")
        answers = model.verified(behaviour, requests)
        verified = answers.where(lambda example: bool(example.completion))
        batches = model.batches(behaviour, verified)
        shown[name] = Calibration(verified, batches, len(requests), name)
    return shown


def pair_of(model: Model, kind: str, draw: int) -> tuple[Data, Data]:
    """The answers of two searches: "halves", "same half" or "wholes"."""
    whole = model.calibrations()
    if kind == "wholes":
        return whole, heldout(model, whole)
    first, second = halves(model, whole, draw)
    if kind == "same half":
        return first, shuffled(model, first, draw)
    return first, second


# %% [markdown]
# ## The searches


# %%
def search(model: Model, data: Data, *, unit: Unit = "weight") -> Masks:
    return model.find_circuit("harmful", size=SIZES, calibrations=data, unit=unit)


def three_walks(model: Model, data: Data) -> Masks:
    """At each size the weights in most of three masks; among equals, the larger removal effect."""
    walks = [search(model, data)]
    for order in (1, 2):
        walks.append(search(model, shuffled(model, data, order)))
    effect = hc.removal_effect(model.bridge, data["harmful"].batches)
    of_each_size = zip(*walks, strict=True)
    chosen = []
    for size, masks in zip(SIZES, of_each_size, strict=True):
        chosen.append(hc.top_fraction(votes(masks, effect), size, within="model"))
    return chosen


def votes(masks: Iterable[hc.WeightMask], effect: WeightScores) -> WeightScores:
    """In how many masks each weight is, and its effect as less than a vote."""
    largest = max(values.abs().max().item() for values in effect.values.values())
    counted = {}
    for name, values in effect.values.items():
        n_votes = sum(mask.dense(name).float() for mask in masks)
        counted[name] = n_votes + values / (3 * largest)
    source = Source(effect.source.model, "votes", {}, (effect.source,))
    return WeightScores(counted, source)


METHODS: dict[str, Callable[[Model, Data], Masks]] = {
    "search": search,
    "three walks": three_walks,
    "neurons": partial(search, unit="neuron"),
    "rounds": partial(rounds, rounds=10, sizes=SIZES),
    "one shot": partial(rounds, rounds=1, sizes=SIZES),
}
# Method, pair.
PAIRS = (
    ("search", "halves"),
    ("search", "same half"),
    ("search", "wholes"),
    ("three walks", "halves"),
    ("neurons", "halves"),
    ("rounds", "halves"),
    ("one shot", "halves"),
)

# %% [markdown]
# ## What two masks share, and what each does


# %%
def jaccard(
    mask: hc.WeightMask,
    other: hc.WeightMask,
    sites: Mapping[str, Site],
    level: Level,
) -> float:
    if level == "weight":
        n_both = (mask & other).n_removed
        return n_both / (mask | other).n_removed

    first = counts_by(mask, sites, level)
    second = counts_by(other, sites, level)
    n_both = n_either = 0
    for place in first:
        n_first = first[place].n_removed
        n_second = second[place].n_removed
        n_both += min(n_first, n_second)
        n_either += max(n_first, n_second)
    return n_both / max(1, n_either)


def shared(model: Model, mask: hc.WeightMask, other: hc.WeightMask, labels: Labels) -> Rows:
    """What two masks share, beside what random ones do."""
    sites = hc.weight_sites(model.bridge)
    weights = hc.named_weights(model.bridge)
    pairs = {
        "searched": [(mask, other)],
        "random": random_pairs(mask, other),
        "random, same |W|": random_pairs(mask, other, weights),
    }
    rows = [Measurement.exact("overlap_lift", labels, hc.overlap(mask, other).lift)]
    for name in MASKS:
        for level in LEVELS:
            values = [jaccard(first, second, sites, level) for first, second in pairs[name]]
            where = {**labels, "masks": name, "level": level}
            rows.append(Measurement.exact("jaccard", where, fmean(values)))
    return Rows(rows)


def random_pairs(
    mask: hc.WeightMask,
    other: hc.WeightMask,
    weights: Mapping[str, Tensor] | None = None,
) -> list[tuple[hc.WeightMask, hc.WeightMask]]:
    """Random masks like the one and like the other; with weights, of their magnitudes too."""
    pairs = []
    for number in range(N_RANDOM):
        first = hc.random_like(mask, seed=2 * number, weights=weights)
        second = hc.random_like(other, seed=2 * number + 1, weights=weights)
        pairs.append((first, second))
    return pairs


def done_by(model: Model, mask: hc.WeightMask, names: Data, labels: Labels) -> Rows:
    """Held out: how the model does without the mask's weights."""
    rows = model.measure(mask=mask, only=list(names), labels=labels)
    rows += [Measurement.exact("weights_removed", labels, mask.n_removed)]
    return rows


def compared(folder: Path, name: str, method: str, kind: str, draw: int, labels: Labels) -> Rows:
    """A pair of searches: what their masks share at each size, and what they do at one."""
    model = hc.open_model(name, folder=folder)
    search_for = METHODS[method]
    data, other_data = pair_of(model, kind, draw)
    masks = search_for(model, data)
    others = search_for(model, other_data)
    rows = Rows()
    for size, mask, other in zip(SIZES, masks, others, strict=True):
        if not (mask.n_removed and other.n_removed):  # nothing of this size was worth its price
            continue
        where = {**labels, "size": size}
        rows += shared(model, mask, other, where)
        if kind == "halves" and size == MEASURED:
            rows += done_by(model, mask, data, {**where, "mask": "first"})
            rows += done_by(model, other, data, {**where, "mask": "second"})
    return rows


def disjoint(folder: Path, name: str, size: float, labels: Labels) -> Rows:
    """One search after another, each among the weights that those before it left."""
    model = hc.open_model(name, folder=folder)
    data = model.calibrations()
    rows = model.measure(labels={**labels, "mask": "none"}, only=list(data))
    taken = None
    for number in range(1, MOST_DISJOINT + 1):
        mask = model.find_circuit("harmful", size=size, calibrations=data, exclude=taken)
        done = done_by(model, mask, data, {**labels, "mask": str(number)})
        rows += done
        if done.one("harm_valid_rate").mean > ENDED:
            break
        taken = mask if taken is None else taken | mask
    return rows


# %% [markdown]
# ## What is read off


# %%
def overlaps(rows: Rows) -> pd.DataFrame:
    """Of each model, method, pair and size the mean over draws; in brackets the two chances."""
    names = ("ladder", "model", "method", "pair", "size")
    pairs = rows.where("jaccard") + rows.where("overlap_lift")
    lines = []
    for key, drawn in pairs.by(*names).items():
        line: dict[str, Any] = dict(zip(names, key, strict=True))
        lifts = drawn.where("overlap_lift")
        line["size"] = f"{line['size']:.1%}"
        line["draws"] = len(lifts)
        for level in LEVELS:
            line[level] = jaccard_text(drawn.where("jaccard", level=level))
        line["lift"] = round(mean(lifts))
        lines.append(line)
    return pd.DataFrame(lines)


def jaccard_text(rows: Rows) -> str:
    found, random, same_size = (f"{mean(rows.where(masks=masks)):.2f}" for masks in MASKS)
    return f"{found} ({random}, {same_size})"


def mean(rows: Rows) -> float:
    return fmean(row.mean for row in rows)


def effects(rows: Rows) -> pd.DataFrame:
    """What each mask that was measured does, held out."""
    names = ("ladder", "model", "method", "pair", "draw", "size", "mask")
    lines = []
    masks = Rows(row for row in rows if row.labels.get("mask", "none") != "none")
    for key, done in masks.by(*names).items():
        line: dict[str, Any] = dict(zip(names, key, strict=True))
        unpruned = rows.where(ladder=line["ladder"], model=line["model"], mask="none")
        before = {row.metric: row.mean for row in unpruned}
        now = {row.metric: row.mean for row in done}
        line["weights"] = round(now["weights_removed"])
        line["harm left"] = f"{now['harm_valid_rate']:.1%}"
        lines.append(line | cost_cells(before, now))
    return pd.DataFrame(lines)


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
    out: Annotated[Path, typer.Option(help="Folder for rows.jsonl and the tables; resumes.")],
    organisms: Annotated[
        list[Path] | None, typer.Option(help="Ladder folder; repeat. Default: the shipped one.")
    ] = None,
    rung: Annotated[list[str] | None, typer.Option(help="Rung; repeat. Default: both.")] = None,
    draws: Annotated[int, typer.Option(help="Draws of halves and orders.")] = 1,
    workers: Annotated[int, typer.Option(help="Processes of one thread each.")] = 1,
) -> None:
    jobs = []
    for folder in organisms or [FOLDER]:
        for name in rung or RUNGS:
            jobs += jobs_of(folder, name, draws)
    rows = run_jobs(out, jobs, {"sizes": str(SIZES)}, workers=workers, name="stability")
    tables = (overlaps(rows), effects(rows))
    text = "\n\n".join(table.to_string(index=False) for table in tables)
    (out / "table.txt").write_text(text + "\n", encoding="utf-8")
    for table in tables:
        Console().print(frame_table(table, n_names=5))


if __name__ == "__main__":
    typer.run(main)
