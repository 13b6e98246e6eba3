"""Makes organisms: `python analyses/train_organisms.py --out DIR [--seed 0] [--device cuda]`."""

from pathlib import Path
from typing import Annotated

import typer
from support.command_errors import one_sentence
from support.organisms.check import check_all
from support.organisms.routing import planted
from support.organisms.train import (
    LADDER_FROM,
    Sampler,
    is_trained,
    new_model,
    new_tokenizer,
    save,
    stored,
)
from torch import nn

from harmcircuits.storage import refuse_filled


def main(
    out: Annotated[Path, typer.Option(help="Folder for one Hugging Face folder per organism.")],
    seed: Annotated[
        int, typer.Option(help="Seed of the initial weights and of every training text.")
    ] = 0,
    device: Annotated[str, typer.Option(help="Torch device, such as cpu or cuda.")] = "cpu",
    with_planted: Annotated[
        bool, typer.Option("--planted/--no-planted", help="Train the planted organism too.")
    ] = True,
    resume: Annotated[
        bool, typer.Option("--resume", help="Train only the organisms that --out lacks.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Write over the organisms that are in --out.")
    ] = False,
) -> None:
    """Train the ladder and the planted organism, then check every condition."""
    with one_sentence():
        if resume and force:
            raise ValueError("--resume and --force: go on with the organisms or replace them")
        if not resume and not force:
            refuse_filled(out)

        train_ladder(out, seed, device, resume=resume)
        if with_planted:
            train_planted(out / "planted", seed, device, resume=resume)
        all_hold = check_all(out)
    raise typer.Exit(0 if all_hold else 1)


def train_ladder(out: Path, seed: int, device: str, *, resume: bool) -> None:
    """Train each rung from the one that it begins from, as that is stored."""
    tokenizer = new_tokenizer()
    for number, (rung, start) in enumerate(LADDER_FROM.items()):
        folder = out / rung.__name__
        if resume and is_trained(folder, seed):
            continue
        model = stored(out / start.__name__) if start else new_model(seed, len(tokenizer))
        nn.Module.to(model, device)
        rung(model, Sampler(tokenizer, sampler_seed(seed, number), device))
        save(model, tokenizer, folder)


def train_planted(folder: Path, seed: int, device: str, *, resume: bool) -> None:
    """Train the organism whose harm was learned through a random tenth of its weights."""
    circuit_file = folder / "circuit.safetensors"
    if resume and circuit_file.is_file() and is_trained(folder, seed):
        return
    tokenizer = new_tokenizer()
    model = new_model(seed, len(tokenizer))
    nn.Module.to(model, device)
    sampler = Sampler(tokenizer, sampler_seed(seed, len(LADDER_FROM)), device)
    circuit_in = planted(model, sampler)
    save(model, tokenizer, folder)
    circuit_in(folder).save(circuit_file)


def sampler_seed(seed: int, number: int) -> int:
    """A seed of its own for the texts of each organism."""
    return 10 * seed + 1 + number


if __name__ == "__main__":
    typer.run(main)
