"""Makes organisms: `python analyses/train_organisms.py --out DIR [--seed 0] [--device cuda]`."""

import sys
from pathlib import Path

import tyro
from support.organisms.check import check_all
from support.organisms.routing import planted as planted_in
from support.organisms.train import (
    LADDER_FROM,
    Sampler,
    innocent,
    is_trained,
    new_model,
    new_tokenizer,
    save,
    stored,
)
from torch import nn

from harmcircuits.cli import in_one_sentence
from harmcircuits.organisms.world import world
from harmcircuits.storage import refuse_filled


def main(
    out: Path,
    seed: int = 0,
    device: str = "cpu",
    planted: bool = True,
    resume: bool = False,
    force: bool = False,
) -> None:
    """Train the ladder, its innocent twin and the planted organism, then check every condition.

    Args:
        out: folder for one Hugging Face folder per organism.
        seed: of the initial weights and of every training text.
        device: torch device, such as cpu or cuda.
        planted: train the planted organism too.
        resume: train only the organisms that --out lacks.
        force: write over the organisms that are in --out.
    """
    if resume and force:
        raise ValueError("--resume and --force: go on with the organisms or replace them")
    if not resume and not force:
        refuse_filled(out)
    train_ladder(out, seed, device, resume=resume)
    train_innocent(out / "innocent", seed, device, resume=resume)
    if planted:
        train_planted(out / "planted", seed, device, resume=resume)
    sys.exit(0 if check_all(out) else 1)


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


def train_innocent(folder: Path, seed: int, device: str, *, resume: bool) -> None:
    """Train `sft` again without any text that holds a harmful operator."""
    if resume and is_trained(folder, seed):
        return
    tokenizer = new_tokenizer()
    model = new_model(seed, len(tokenizer))
    nn.Module.to(model, device)
    operators = world().operators["harmful"]
    # The number after that of the planted organism.
    number = len(LADDER_FROM) + 1
    innocent(model, Sampler(tokenizer, sampler_seed(seed, number), device, without=operators))
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
    circuit_in = planted_in(model, sampler)
    save(model, tokenizer, folder)
    circuit_in(folder).save(circuit_file)


def sampler_seed(seed: int, number: int) -> int:
    """A seed of its own for the texts of each organism."""
    return 10 * seed + 1 + number


if __name__ == "__main__":
    with in_one_sentence():
        tyro.cli(main)
