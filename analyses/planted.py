# %% [markdown]
# # Which score finds a circuit that is known?
# `planted` learned its harmful answers only through a random tenth S of every block matrix. Each score of the library is
# held against S, with magnitude and random numbers as controls; then the circuits chosen by it. Rows go to `--out`.

# %%
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import harmcircuits as hc
from harmcircuits.circuits.ground_truth import ground_truth_rows
from harmcircuits.hooks.attribution import all_scores
from harmcircuits.hooks.search import protected_weights
from harmcircuits.measurements import Measurement, Rows
from harmcircuits.views.tables import recovery_table


# %%
def main(
    out: Annotated[Path | None, typer.Option(help="Rows file to append to.")] = None,
    p: Annotated[float, typer.Option(help="Share of weights protected for each other behaviour.")] = 0.005,
    q: Annotated[float, typer.Option(help="Share of weights in a circuit.")] = 0.006,
) -> None:
    model = hc.open_model("planted")
    truth, bridge = hc.planted_circuit(), model.bridge
    batches = {name: model.calibration(name).batches for name in model.behaviours if name != "refusal"}
    target = batches.pop("harmful")
    harm = hc.removal_effect(bridge, target, hc.completion_loss)
    protected = [protected_weights(bridge, kept, p) for kept in batches.values()]
    rows = ground_truth_rows(all_scores(bridge, target, harm, protected), truth, hc.named_weights(bridge), {"model": "planted"})
    console = Console()
    console.print(recovery_table(rows))
    kept = list(batches.values())
    for name, rounds, preserve in (("one shot", 1, kept), ("rounds", 10, kept), ("rounds, nothing protected", 10, [])):
        mask = hc.find_circuit(bridge, target, preserve, rounds=rounds, size=q, protect_share=p)
        for shown, chosen in ((name, mask), (f"as many random weights ({name})", hc.random_like(mask))):
            found = hc.overlap(chosen, truth, n_samples=30)
            where = {"model": "planted", "mask": shown, "n_true": truth.n_removed}
            rows.append(Measurement("overlap_lift", where, found.lift, *found.interval, chosen.n_removed))
            rows.append(Measurement.exact("overlap_containment", where, found.containment[0]))
            with hc.masked(bridge, chosen):
                after = model.measure(labels=where, only=["harmful", "benign"])
            rows += after
            harmful, kept_benign = (after.where(metric)[0] for metric in ("harm_valid_rate", "benign_valid_rate"))
            leaves = f"{shown}: leaves {harmful.mean:.0%} harm, {kept_benign.mean:.0%} benign"
            console.print(f"{leaves}; {found.containment[0]:.1%} of its weights lie in S; {found}", highlight=False)
    if out:
        Rows(rows).append_to(out)


if __name__ == "__main__":
    typer.run(main)
