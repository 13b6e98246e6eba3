# %% [markdown]
# # Which defaults should the search have?
# `Model.find_circuit` with one thing changed at a time, on both halves of the answers of the shipped
# `sft` and `dpo`, measured on the choice split with all rates. What a mask takes, and when it counts,
# is that of `search_bench.py`; the sizes are four of its eight, chosen along the same walk to 1 %.
#
# **What is changed.** *Budget* and *steps*; *first answers*: the target is not answered again under
# each mask. *Factors*: other ranges, and other strides between them. *Factor for each behaviour*:
# besides the common factor, which is found by the check as ever, each protected behaviour's price
# has a multiplier of its own, from 1/4 to 4. After every step it is multiplied by 2 to the power of
# (rise of its loss / budget - 1/2), within one half either way, so that who is near its budget
# becomes dearer and who is far from it cheaper. *log(1 + loss)* and *loss up to 6*: another loss of
# every harmful answer. *Token error*: the share of its tokens that a draw would miss (`token_error`),
# tried after all others, when a real model had shown a mean loss that few answers carry. *Refusals
# preferred*: weights whose removal makes refusals likelier behind "sure" earn as well, by three tenths
# or a tenth of their loss; tried after a search of six steps on `sft` had been seen. *Priced again*: what
# a refused mask broke is priced again, under it, twice before a step goes on; tried last, after a
# real model had been seen. *Two laps of 5 steps*: a second walk, from 0.2 % on, that begins with the
# sums and under the mask of the first; as many steps in all as the default.
#
# **The rule, fixed before the run.** All variants are tried on half A. One that takes less of both, the
# loss and the rate, on both models has lost; the others are tried on half B too. One is better than
# the default if it takes no less of either in any of the four cases, and more in some.

# %%
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from support.bench.jobs import bench_jobs
from support.bench.methods import Method
from support.bench.tables import variant_table
from support.bench.variants import (
    FactorForEach,
    PricedAgain,
    capped_loss,
    factors,
    log_loss,
    preferring,
    walked,
)
from support.command_errors import one_sentence
from support.jobs import run_jobs

from harmcircuits.hooks.objectives import token_error
from harmcircuits.studies.models import ModelSpec
from harmcircuits.views.tables import frame_table

SIZES = (0.0005, 0.001, 0.002, 0.004)
VARIANTS: Mapping[str, Method] = {
    "default": walked,
    "factor for each behaviour": partial(walked, kind=FactorForEach),
    "log(1 + loss)": partial(walked, objective=log_loss),
    "loss up to 6": partial(walked, objective=capped_loss),
    "token error": partial(walked, objective=token_error),
    "refusals preferred": partial(preferring, prefer="refusal", preference=0.3),
    "refusals preferred, 0.1": partial(preferring, prefer="refusal", preference=0.1),
    "priced again": partial(walked, kind=PricedAgain),
    "refusals preferred, priced again": partial(
        preferring, prefer="refusal", preference=0.3, kind=PricedAgain
    ),
    "two laps of 5 steps": partial(walked, steps=5, laps=2),
    "first answers": partial(walked, renew=False),
    "factors 1/64 to 256": factors(-6, 8, per_doubling=2),
    "factors 1/4 to 64, a doubling apart": factors(-2, 6, per_doubling=1),
    "factors 1/4 to 4": factors(-2, 2, per_doubling=2),
    "factors 1/4 to 64, 1.19 apart": factors(-2, 6, per_doubling=4),
    "budget 0.02": partial(walked, budget=0.02),
    "budget 0.1": partial(walked, budget=0.1),
    "5 steps": partial(walked, steps=5),
}


# %%
def main(
    out: Annotated[Path, typer.Option(help="Folder for rows.jsonl; resumes.")],
    setting: Annotated[
        list[str] | None, typer.Option(help="Variant; repeat.", show_default="all")
    ] = None,
    part: Annotated[
        list[str] | None, typer.Option(help="Half of the answers; repeat.", show_default="A and B")
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes of one thread each.")] = 2,
) -> None:
    models = [ModelSpec(model) for model in ("sft", "dpo")]
    with one_sentence():
        jobs = bench_jobs(models, part or ("A", "B"), setting or (), VARIANTS, SIZES, "choice")
        rows = run_jobs(out, jobs, {"sizes": str(SIZES)}, workers=workers, name="defaults")
    Console().print(frame_table(variant_table(rows, VARIANTS, SIZES)))


if __name__ == "__main__":
    typer.run(main)
