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
#
# **Settled.** By the rule no setting is better than the defaults, so the code of the variants went;
# git keeps it (`analyses/support/bench/variants.py` at 086252b). The rows stay.

# %%
from pathlib import Path

from rich.console import Console
from support.bench.tables import variant_table

from harmcircuits.measurements import Rows
from harmcircuits.views.tables import frame_table

SIZES = (0.0005, 0.001, 0.002, 0.004)
VARIANTS = (
    "default",
    "factor for each behaviour",
    "log(1 + loss)",
    "loss up to 6",
    "token error",
    "refusals preferred",
    "refusals preferred, 0.1",
    "priced again",
    "refusals preferred, priced again",
    "two laps of 5 steps",
    "first answers",
    "factors 1/64 to 256",
    "factors 1/4 to 64, a doubling apart",
    "factors 1/4 to 4",
    "factors 1/4 to 64, 1.19 apart",
    "budget 0.02",
    "budget 0.1",
    "5 steps",
)

# %%
rows = Rows.read(Path(__file__).parent / "rows" / "search_defaults.jsonl")

if __name__ == "__main__":
    Console().print(frame_table(variant_table(rows, VARIANTS, SIZES)))
