"""Makes organisms: `python analyses/train_organisms.py --out DIR [--seed 0] [--device cuda]`."""

import sys
from collections.abc import Callable
from pathlib import Path

import tyro
from support.organisms.check import check_all
from support.organisms.routing import planted as planted_run
from support.organisms.train import (
    Sampler,
    base,
    dpo,
    helpful,
    innocent,
    is_trained,
    load,
    new_model,
    new_tokenizer,
    save,
    sft,
)
from torch import nn

from harmcircuits.cli import in_one_sentence
from harmcircuits.storage import refuse_filled

CIRCUIT = "circuit.safetensors"
# Each training run with the one whose model it begins from; the seed of its texts is by its place.
TRAINING_RUNS: dict[Callable, Callable | None] = {
    base: None,
    helpful: base,
    sft: helpful,
    dpo: helpful,
    planted_run: None,
    innocent: None,
}


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
    tokenizer = new_tokenizer()
    for number, (training_run, start) in enumerate(TRAINING_RUNS.items()):
        folder = out / training_run.__name__
        if training_run is planted_run and not planted:
            continue
        if resume and is_whole(folder, seed):
            continue
        model = load(out / start.__name__) if start else new_model(seed, len(tokenizer))
        nn.Module.to(model, device)
        sampler = Sampler(tokenizer, 10 * seed + 1 + number, device)
        circuit_in = training_run(model, sampler)
        save(model, tokenizer, folder)
        if circuit_in is not None:
            circuit_in(folder).save(folder / CIRCUIT)
    sys.exit(0 if check_all(out) else 1)


def is_whole(folder: Path, seed: int) -> bool:
    """Whether an organism of this seed is there, and its circuit if it is the planted one."""
    has_circuit = folder.name != planted_run.__name__ or (folder / CIRCUIT).is_file()
    return has_circuit and is_trained(folder, seed)


if __name__ == "__main__":
    with in_one_sentence():
        tyro.cli(main)
