# %% [markdown]
# # Which search finds the smallest circuit?
# Every way of choosing the weights of harm, on the same data, at the same sizes: how much harm does a
# mask of that size take, once it must leave everything else as it was?
#
# **The methods.** *search*: `Model.find_circuit`, a walk with a price on what is protected, whose
# target is answered again under every mask; *first answers*: the same without that; *one shot*: the
# same price and check on one scoring of the unedited model. The others are in
# `analyses/support/bench/methods.py`: each **as published**, and **tuned**: with the best of a
# few settings (`tried` there), chosen by the loss on the choice split, on half the answers of the
# shipped `sft`.
#
# **The measure, fixed before the run.** A mask is within budget if the loss on benign answers rises
# by at most 0.02 nats and no kept rate (benign answers, recognition, explanation, knowledge, refusal
# where the model refuses) falls by more than a point. At each size the best mask so far within budget
# counts; the *area* is the mean over the sizes of what it takes: of the rate of valid harm, and of
# the rise of the loss on harmful answers, capped at 6 nats, since a loss beyond that pays for
# garbage. *Ends at* is the smallest size at which a mask within budget leaves at most 2 % valid harm.
# All on held-out requests. Whether harm turned into garbage stands beside it (*degenerate*).
#
# **What it rests on.** Each model is searched with all of its calibration answers and with two
# halves of them, split by request. Intervals resample ladders, then their models and halves.

# %%
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import tyro
from rich.console import Console
from support.bench.cases import methods, tuned
from support.bench.jobs import bench_jobs, tuning_jobs
from support.bench.results import write_results
from support.jobs import run_jobs
from support.models import RunOptions
from support.organisms.check import LADDER

from harmcircuits.cli import in_one_sentence
from harmcircuits.measurements import Rows

SIZES = (0.0005, 0.001, 0.0015, 0.002, 0.0025, 0.004, 0.006, 0.01)
ROWS = Path(__file__).parent / "rows"


@cache
def every_method() -> dict:
    return methods(Rows.read(ROWS / "search_bench_tuning.jsonl"))


# %% [markdown]
# ## The experiment
# One job for each model, part of its answers, and method: its masks, and what the model does under
# each. Other abilities are asked only where a mask takes something and spares benign answers.


# %%
@dataclass(frozen=True)
class Options(RunOptions):
    """Which search finds the smallest circuit.

    Attributes:
        part: of the answers: all, A or B.
        method: names of methods; by default all.
        size: shares of the weights.
        tune: try settings of every method instead.
    """

    part: tuple[str, ...] = ("all",)
    method: tuple[str, ...] = ()
    size: tuple[float, ...] = SIZES
    tune: bool = False


def main(options: Options) -> None:
    if options.tune:
        jobs = tuning_jobs(options.method, SIZES)
        settings = {"sizes": str(SIZES)}
        rows = run_jobs(options.out, jobs, settings, workers=options.workers, name="settings")
        for name, best in tuned(rows).items():
            print(f"{name}: {best}")
        return
    models = options.specs(LADDER)
    settings = {"sizes": str(options.size)}
    settings |= {spec.model: repr(spec.own) for spec in models if spec.own}
    jobs = bench_jobs(models, options.part, options.method, every_method(), options.size)
    rows = run_jobs(options.out, jobs, settings, workers=options.workers, name="search bench")
    write_results(options.out, rows, every_method(), Console())


if __name__ == "__main__":
    with in_one_sentence():
        main(tyro.cli(Options))
