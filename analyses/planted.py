# %% [markdown]
# # Which score finds a circuit that is known?
# `planted` learned its harmful answers only through a random tenth S of every block matrix. Each
# score of the library is held against S, with magnitude and random numbers as controls; then the
# circuits chosen by it. Rows go to `--out`.

# %%
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rounds import protected_weights, prune_in_rounds

import harmcircuits as hc
from harmcircuits.circuits.ground_truth import ground_truth_rows
from harmcircuits.hooks.attribution import all_scores
from harmcircuits.measurements import Measurement
from harmcircuits.organisms import planted_circuit
from harmcircuits.studies.summary import ground_truth_table


# %%
def main(
    out: Annotated[Path | None, typer.Option(help="Rows file to append to.")] = None,
    protect_share: Annotated[
        float, typer.Option(help="Share of weights protected for each other behaviour.")
    ] = 0.005,
    size: Annotated[float, typer.Option(help="Share of weights in a circuit.")] = 0.006,
) -> None:
    model, truth = hc.open_model("planted"), planted_circuit()
    bridge, console = model.bridge, Console()
    shown = [name for name in model.whole_behaviours if name != "refusal"]
    batches = {name: model.calibration(name).batches for name in shown}
    target = batches.pop("harmful")
    others = list(batches.values())

    harm = hc.removal_effect(bridge, target)
    protected = [protected_weights(bridge, spared, protect_share) for spared in others]
    scores = all_scores(bridge, target, harm, protected)
    rows = ground_truth_rows(scores, truth, hc.named_weights(bridge), {"model": "planted"})
    console.print(ground_truth_table(rows))

    searches = {
        "one shot": (1, others),
        "rounds": (10, others),
        "rounds, nothing protected": (10, []),
    }
    for name, (rounds, spared) in searches.items():
        circuit = prune_in_rounds(
            bridge, target, spared, size=size, protect_share=protect_share, rounds=rounds
        )
        random = hc.random_like(circuit)
        for title, mask in ((name, circuit), (f"as many random weights ({name})", random)):
            shared = hc.overlap(mask, truth, n_samples=30)
            where = {"model": "planted", "mask": title, "n_true": truth.n_removed}
            rows += [
                Measurement("overlap_lift", where, shared.lift, *shared.interval, mask.n_removed),
                Measurement.exact("overlap_containment", where, shared.containment[0]),
            ]
            measured = model.measure(mask=mask, labels=where, only=["harmful", "benign"])
            rows += measured
            harmful, benign = measured.one("harm_valid_rate"), measured.one("benign_valid_rate")
            console.print(
                f"{title}: leaves {harmful.mean:.0%} harm, {benign.mean:.0%} benign; "
                f"{shared.containment[0]:.1%} of its weights lie in S; {shared}",
                highlight=False,
            )
    if out:
        rows.append_to(out)


if __name__ == "__main__":
    typer.run(main)
