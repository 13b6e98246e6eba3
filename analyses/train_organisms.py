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
    load,
    new_model,
    new_tokenizer,
    save,
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
    """Train the ladder, the innocent and the planted organism, then check every condition.

    Args:
        out: folder with a Hugging Face folder for each organism.
        seed: seed of the initial weights and of the training texts.
        device: torch device, such as cpu or cuda.
        planted: also train the planted organism.
        resume: train only the organisms that --out lacks.
        force: replace the organisms in --out.
    """
    if resume and force:
        raise ValueError("--resume and --force exclude each other; expected one of them")
    if not resume and not force:
        refuse_filled(out)
    train_ladder(out, seed, device, resume=resume)
    train_innocent(out / "innocent", seed, device, resume=resume)
    if planted:
        train_planted(out / "planted", seed, device, resume=resume)
    sys.exit(0 if check_all(out) else 1)


def train_ladder(out: Path, seed: int, device: str, *, resume: bool) -> None:
    """Train each checkpoint from the saved one that it begins from."""
    tokenizer = new_tokenizer()
    for number, (training_run, start) in enumerate(LADDER_FROM.items()):
        folder = out / training_run.__name__
        if resume and is_trained(folder, seed):
            continue
        model = load(out / start.__name__) if start else new_model(seed, len(tokenizer))
        nn.Module.to(model, device)
        training_run(model, Sampler(tokenizer, sampler_seed(seed, number), device))
        save(model, tokenizer, folder)


def train_innocent(folder: Path, seed: int, device: str, *, resume: bool) -> None:
    """Train `sft` again on texts without harmful operators."""
    if resume and is_trained(folder, seed):
        return
    tokenizer = new_tokenizer()
    model = new_model(seed, len(tokenizer))
    nn.Module.to(model, device)
    forbidden = world().operators["harmful"]
    # The planted organism has the number before this one.
    number = len(LADDER_FROM) + 1
    innocent(model, Sampler(tokenizer, sampler_seed(seed, number), device, forbidden))
    save(model, tokenizer, folder)


def train_planted(folder: Path, seed: int, device: str, *, resume: bool) -> None:
    """Train the organism whose harm is learned by a random tenth of its weights."""
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
    """The seed of the texts of an organism."""
    return 10 * seed + 1 + number


if __name__ == "__main__":
    with in_one_sentence():
        tyro.cli(main)
