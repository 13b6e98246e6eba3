# %% [markdown]
# # Which score finds a circuit that is known?
# `planted` learned its harmful answers only through a random tenth S of every block matrix. Each score of the library is
# held against S, with magnitude and random numbers as controls. Rows go to `--out`.

# %%
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import harmcircuits as hc
from harmcircuits.records import append_rows
from harmcircuits.recovery import every_score, recovery
from harmcircuits.tables import recovery_table


# %%
def main(
    out: Annotated[Path | None, typer.Option(help="Rows file to append to.")] = None,
    p: Annotated[float, typer.Option(help="Share of weights protected for each other behaviour.")] = 0.005,
) -> None:
    subject = hc.organism_subject("planted")
    truth, bridge = hc.planted_circuit(), subject.bridge
    batches = {name: hc.calibrate(subject, name).batches for name in subject.behaviours if name != "refusal"}
    target = batches.pop("harmful")
    harm = hc.removal_effect(bridge, target, hc.completion_loss)
    keep = [hc.sensitivity(bridge, kept, hc.completion_loss) for kept in batches.values()]
    rows = recovery(every_score(bridge, target, harm, keep, p=p), truth, hc.named_weights(bridge), {"model": "planted"})
    if out:
        append_rows(out, rows)
    Console().print(recovery_table(rows))


if __name__ == "__main__":
    typer.run(main)
