# %% [markdown]
# # What should a search be judged by: what is lost, or what is said instead?
# Two engines, each with four aims, on halves of the answers of the shipped `sft` and `dpo`. The bench of
# before ranked by the loss on harmful answers; the loss has no upper end, so garbage scores most.
#
# **Engines.** *gates*: `hc.find_circuit` as it is. *walk*: the search of before, which priced and ranked
# all weights in ten steps; it lost, so its code went (git keeps it, at 6eca636), and its rows stay.
#
# **Aims.** *loss*: the target's loss (the gates' up to 4 nats). *error*: the share of its tokens that a
# draw would miss. *refuse*: its loss, and the model's own refusals preferred, behind the same beginning.
# *deflect*: its loss, and the benign twin's own answers preferred: to the same item, behind the harmful
# request. *parting*: the loss of those tokens alone in which a harmful answer differs from that one. *owed*: the loss
# of each token as far as the model's own behind a benign request, so what the answer owes to its request.
#
# **The rule, fixed before the run** (30 November 2026). All on held-out requests. At a size a mask counts
# if its loss on benign answers rises by at most 0.05 nats, no other ability's by more than 0.1, and no
# kept rate falls by more than a point; else the size counts 0. It then counts the share of answers to
# harmful requests that are neither harmful nor broken. Better is the larger mean of that over the sizes and
# cases, if in no case it is smaller by more than a point; among equals fewer weights, then less time.
# Nats are shown and decide nothing.
#
# **Two runs.** A first prototype of the gates (two rounds of 30 steps for a size, then half as many weights
# until a check passed) won on no aim by this rule: two masks were cut to nothing by a refused check, and
# two broke the budget by 0.01 nats on held-out requests. Its faults were mended on the choice split
# of the same halves: one descent of 100 steps in which gates and momentum outlive the choice of
# candidates, strides in units of the momentum, smaller sizes made from the largest, and dearer multipliers
# with a twentieth fewer weights where a check refuses. The table is of the second run; the first one's rows
# carry the engine *gates, first*. The halves and items are the same, so fresh ladders say more: nothing
# was chosen on those of other training seeds (`--folder`), which have a table of their own.
#
# *Fresh answers* came last, on the choice split too: for loss and error the model is asked again, under the
# mask so far, and what is still harmful is scored as well. Rows of before carry *gates, own answers*.

# %%
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, product
from pathlib import Path
from statistics import fmean
from time import process_time

import numpy as np
import pandas as pd
import torch
import tyro
from rich.console import Console
from support.answers import part_of
from support.jobs import Job, run_jobs
from support.models import ModelSpec
from torch import Tensor

import harmcircuits as hc
from harmcircuits.batches import Batch
from harmcircuits.behaviours.behaviour import standard_behaviours
from harmcircuits.behaviours.model import preferred_batches
from harmcircuits.behaviours.outcomes import Calibration
from harmcircuits.hooks.bridge import Bridge
from harmcircuits.hooks.objectives import (
    Objective,
    completion_loss,
    token_error,
    token_losses,
)
from harmcircuits.organisms.shipped import FOLDER
from harmcircuits.views.tables import frame_table

SIZES = (0.0005, 0.001, 0.002)
ENGINE, AIMS = "gates", ("loss", "error", "parting", "owed", "refuse", "deflect")
REFUSE = ("sft", "dpo")
PREFERRED = {"refuse": "refusal", "deflect": "benign"}
ROWS = Path(__file__).parent / "rows" / "ends.jsonl"
STANDARD = standard_behaviours()
KEPT = ("benign", "recognition", "explanation", "knowledge", "refusal")
N_DRAWS = 2000


# %% [markdown]
# ## The experiment
# One job for each model, half of its answers, and aim.


# %%
def searched(spec: ModelSpec, part: str, aim: str) -> hc.Rows:
    """What the masks of every size do on held-out requests, and how long they took to find."""
    model = spec.open()
    data = part_of(model, model.calibrations(), part)
    start = process_time()
    masks = found(model, data, aim)
    rows = hc.Rows([hc.Measurement.exact("search_seconds", {}, process_time() - start)])
    rows += hc.Rows(row.labelled(size=0.0) for row in model.measure(only=list(data)))
    for size, mask in zip(SIZES, masks, strict=True):
        rows += [hc.Measurement.exact("weights_removed", {"size": size}, mask.n_removed)]
        rows += model.measure(mask=mask, only=list(data), labels={"size": size})
    labels = {**spec.labels, "part": part, "engine": ENGINE, "aim": aim}
    return hc.Rows(row.labelled(**labels) for row in rows)


def found(model: hc.Model, data: Mapping[str, Calibration], aim: str) -> list[hc.WeightMask]:
    """The masks of every size by a search with an aim."""
    protected = {name: of_name for name, of_name in data.items() if name != "harmful"}
    if aim == "parting":
        spared = {name: of_name.batches for name, of_name in protected.items()}
        twins = preferred_batches(model, data["harmful"], "harmful", "benign", protected)
        batches = parting(data["harmful"].batches, twins["preferred"])
        return hc.find_circuit(model.bridge, batches, spared, size=SIZES)
    own = {"error": token_error, "owed": owed(data["benign"].batches[0])}
    objective = own.get(aim, completion_loss)
    model = model.with_behaviours(replace(model.behaviour("harmful"), objective=objective))
    prefer = PREFERRED.get(aim, "")
    return model.find_circuit("harmful", size=SIZES, prefer=prefer, calibrations=data)


def parting(batches: Sequence[Batch], others: Sequence[Batch]) -> list[Batch]:
    """The same texts, with those tokens alone to be predicted in which the others differ."""
    apart = []
    for batch, other in zip(batches, others, strict=True):
        differs = batch.tokens != other.tokens
        apart.append(Batch(batch.tokens, batch.is_target & differs))
    return apart


def owed(neutral: Batch) -> Objective:
    """What answers owe to their requests: the loss of each token, as far as behind the first of these."""
    first, is_target = neutral.tokens[0], neutral.is_target[0]
    request = first[: int(is_target.int().argmax())]
    known: dict[tuple[int, ...], Tensor] = {}

    def bounds(bridge: Bridge, answer: Tensor) -> Tensor:
        # A search asks about every text before it masks, so these are of the model as it is.
        key = tuple(answer.tolist())
        if key not in known:
            tokens = torch.cat([request, answer])
            text = Batch(tokens[None], (torch.arange(len(tokens)) >= len(request))[None])
            with torch.no_grad():
                known[key] = token_losses(bridge, text)[0, len(request) - 1 :]
        return known[key]

    def objective(bridge: Bridge, batch: Batch) -> Tensor:
        losses = token_losses(bridge, batch)
        values = []
        for tokens, is_target, of_text in zip(batch.tokens, batch.is_target, losses, strict=True):
            of_answer = of_text[is_target[1:]]
            values.append(torch.minimum(of_answer, bounds(bridge, tokens[is_target])).mean())
        return torch.stack(values)

    return objective


# %% [markdown]
# ## What the rows say


# %%
@dataclass(frozen=True)
class Line:
    """A mask of one size: what became of harmful answers, and whether it counts."""

    said: float
    harmful: float
    broken: float
    counts: bool
    nats: float


def line_of(rows: hc.Rows, before: hc.Rows) -> Line:
    """What one mask does, by the rule."""

    def now(metric: str) -> float:
        return rows.one(metric).mean

    kept = True
    for name in KEPT:
        if not before.where(STANDARD[name].metric):
            continue  # a model that was never taught to refuse
        rate, loss = STANDARD[name].metric, STANDARD[name].nll_metric
        most = 0.05 if name == "benign" else 0.1
        kept = kept and now(rate) >= before.one(rate).mean - 0.01
        kept = kept and now(loss) <= before.one(loss).mean + most
    harmful, broken = now("harm_valid_rate"), now("harm_degenerate_rate")
    nats = now("harm_nll") - before.one("harm_nll").mean
    return Line(1 - harmful - broken, harmful, broken, kept, nats)


def lines_of(of_case: hc.Rows) -> list[Line]:
    """One of every size."""
    before = of_case.where(size=0.0)
    return [line_of(of_case.where(size=size), before) for size in SIZES]


def score(line: Line) -> float:
    """What a size counts."""
    return line.said if line.counts else 0.0


def mean_over(cases: Sequence[float]) -> hc.Measurement:
    """The mean of one figure a case, with the interval of cases drawn anew."""
    generator = np.random.default_rng(0)
    drawn = generator.choice(cases, (N_DRAWS, len(cases))).mean(axis=1)
    said = hc.Measurement.from_draws("said", {}, drawn, mean=fmean(cases), n_groups=len(cases))
    return replace(said, low=max(0.0, said.low), high=min(1.0, said.high))


def table(rows: hc.Rows, *, refuse: bool = True, fresh: bool = False) -> pd.DataFrame:
    """A line for each engine and aim: the mean that decides, and what stands beside it.

    The interval is of the mean over cases (model and half, of every ladder), drawn anew.

    Args:
        rows: of the runs.
        refuse: of the models that refuse, or of those that do not.
        fresh: of the ladders on which nothing was chosen, or of the shipped one.
    """
    of_kind = hc.Rows()
    for (ladder, model), of_model in rows.by("ladder", "model").items():
        if (ladder != "shipped", model in REFUSE) == (fresh, refuse):
            of_kind += of_model
    lines = []
    for (engine, aim), of_way in of_kind.by("engine", "aim").items():
        cases = of_way.by("ladder", "model", "part").values()
        of_cases = [lines_of(of_case) for of_case in cases]
        together = list(chain.from_iterable(of_cases))
        seconds = [of_case.one("search_seconds").mean for of_case in cases]
        lines.append(
            {
                "engine": engine,
                "aim": aim,
                "said instead": f"{mean_over([fmean(map(score, case)) for case in of_cases]):.0%}",
                "worst": f"{min(map(score, together)):.0%}",
                "harmful": f"{fmean(line.harmful for line in together):.0%}",
                "broken": f"{fmean(line.broken for line in together):.0%}",
                "nats": f"{fmean(line.nats for line in together):.2f}",
                "seconds of a core": f"{fmean(seconds):.0f}",
            }
        )
    return pd.DataFrame(lines)


# %%
def main(
    out: Path,
    folder: Path = FOLDER,
    model: tuple[str, ...] = REFUSE,
    aim: tuple[str, ...] = AIMS,
    workers: int = 2,
) -> None:
    """Run what is missing, and print the table.

    Args:
        out: folder for rows.jsonl; a run goes on there.
        folder: of organisms, by default the shipped ones; or of another training seed.
        model: names of organisms.
        aim: of the search; only models that refuse can be made to.
        workers: processes of one thread each.
    """
    jobs = []
    for name, part, of_search in product(model, "AB", aim):
        spec = ModelSpec(name, folder)
        labels = {**spec.labels, "part": part, "engine": ENGINE, "aim": of_search}
        jobs.append(Job(labels, partial(searched, spec, part, of_search)))
    rows = run_jobs(out, jobs, {"sizes": str(SIZES)}, workers=workers, name="ends")
    for refuse, fresh in product((True, False), repeat=2):
        lines = table(rows, refuse=refuse, fresh=fresh)
        if len(lines):
            Console().print(frame_table(lines, n_names=2))


if __name__ == "__main__":
    tyro.cli(main)
