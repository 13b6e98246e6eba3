"""Makes organisms: `python -m harmcircuits.organisms --out DIR [--seed 0] [--device cuda]`."""

import copy
import itertools
from pathlib import Path
from typing import Annotated

import typer
from torch import nn

from harmcircuits.command_errors import one_sentence
from harmcircuits.organisms.check import check_all
from harmcircuits.organisms.routing import planted
from harmcircuits.organisms.train import (
    Sampler,
    base,
    dpo,
    helpful,
    new_model,
    new_tokenizer,
    save,
    sft,
)
from harmcircuits.storage.writing import refuse_filled


def main(
    out: Annotated[Path, typer.Option(help="Folder for one Hugging Face folder per organism.")],
    seed: Annotated[
        int, typer.Option(help="Seed of the initial weights and of every training text.")
    ] = 0,
    device: Annotated[str, typer.Option(help="Torch device, such as cpu or cuda.")] = "cpu",
    with_planted: Annotated[
        bool, typer.Option("--planted/--no-planted", help="Train the planted organism too.")
    ] = True,
    force: Annotated[
        bool, typer.Option("--force", help="Write over the organisms that are in --out.")
    ] = False,
) -> None:
    """Train the ladder and the planted organism, then check every condition.

    Exits with 1 if one does not hold.
    """
    if not force:
        with one_sentence():
            refuse_filled(out)
    tokenizer = new_tokenizer()
    seeds = itertools.count(10 * seed + 1)
    samplers = (Sampler(tokenizer, sampler_seed, device) for sampler_seed in seeds)

    # base -> helpful -> sft
    #                 -> dpo      each from a sampler with a seed of its own
    model = new_model(seed, len(tokenizer))
    nn.Module.to(model, device)
    for rung in (base, helpful):
        rung(model, next(samplers))
        save(model, tokenizer, out / rung.__name__)
    for rung in (sft, dpo):
        aligned = copy.deepcopy(model)
        rung(aligned, next(samplers))
        save(aligned, tokenizer, out / rung.__name__)

    if with_planted:
        model = new_model(seed, len(tokenizer))
        nn.Module.to(model, device)
        circuit_in = planted(model, next(samplers))
        folder = out / "planted"
        save(model, tokenizer, folder)
        circuit_in(folder).save(folder / "circuit.safetensors")
    raise typer.Exit(0 if check_all(out) else 1)


if __name__ == "__main__":
    typer.run(main)
