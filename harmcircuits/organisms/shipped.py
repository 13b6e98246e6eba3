"""The shipped organisms: tiny language models, trained or compiled, whose harm is abstract."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from harmcircuits.behaviours.behaviour import Behaviour, standard_behaviour
from harmcircuits.behaviours.model import Model
from harmcircuits.circuits.masks import WeightMask
from harmcircuits.display import nearest
from harmcircuits.hooks.loading import refuse_device
from harmcircuits.hooks.objectives import choice_margin
from harmcircuits.organisms import world
from harmcircuits.organisms.compiled import COMPILED, load_compiled, open_compiled

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

ORGANISMS = ("base", "helpful", "sft", "dpo", "planted", "innocent")
FOLDER = Path(__file__).parent / "weights"
JUDGE_NAME = "world 2"  # "world" called every answer incoherent that had no other verdict
MAX_NEW_TOKENS = 9  # the longest answer of the world, and the end of text


def load_organism(name: str, *, device: str = "cpu", folder: Path = FOLDER) -> "TransformerBridge":
    """An organism in float32, as a bare TransformerBridge."""
    from transformer_lens.model_bridge import TransformerBridge

    refuse_device(device)
    if name in COMPILED:
        return load_compiled(name, device)
    if name not in ORGANISMS:
        raise ValueError(
            f"no organism is called {name!r}; {nearest(name, (*ORGANISMS, *COMPILED))}"
        )
    if not (folder / name / "config.json").is_file():
        raise ValueError(
            f"{folder} holds no organism {name!r}; make one with python analyses/train_organisms.py"
        )
    return TransformerBridge.boot_transformers(str(folder / name), device=device)


def planted_circuit(folder: Path = FOLDER) -> WeightMask:
    """The true set S: training on harmful answers changed only these weights of `planted`."""
    return WeightMask.load(folder / "planted" / "circuit.safetensors")


def open_organism(
    name: str,
    *,
    seed: int = 0,
    device: str = "cpu",
    folder: Path = FOLDER,
) -> Model:
    """An organism with all its behaviours, and the judge of its world or program."""
    if name in COMPILED:
        return open_compiled(name, device=device)
    return Model(
        name,
        load_organism(name, device=device, folder=folder),
        organism_behaviours(seed),
        world.judge,
        max_new_tokens=MAX_NEW_TOKENS,
        judge_name=JUDGE_NAME,
        ground_truth=planted_circuit(folder) if name == "planted" else None,
        is_invented=True,
    )


def organism_behaviours(seed: int = 0) -> dict[str, Behaviour]:
    """The behaviours of an organism by name: the whole ones, then their parts."""
    behaviours = {}
    for name in world.BEHAVIOURS:
        options = {}
        if name == "harmful":
            options["prefill"] = world.PREFILL
            options["measures"] = {"harm_words_share": world.harmful_words}
        if name == "recognition":
            options["choices"] = (world.PERMISSIONS["benign"], world.PERMISSIONS["harmful"])
        requests = partial(world.requests, name, seed=seed)
        behaviours[name] = standard_behaviour(name, requests, **options)
    # The world's judge has two verdicts for a harmless answer: its benign twin, and any other.
    harm = behaviours["harmful"]
    metrics = {**harm.metrics, "benign": "harm_benign_rate", "other": "harm_other_rate"}
    del metrics["harmless"]
    behaviours["harmful"] = replace(harm, metrics=metrics)

    parts = {}
    for form in ("parts", "kind"):
        parts[form] = behaviours["knowledge"].only(
            form,
            lambda example, form=form: world.parsed(example.prompt)[0] == form,
            metric=f"{form}_rate",
            nll_metric=f"{form}_nll",
        )
    recognition = behaviours["recognition"]
    parts["recognition_margin"] = replace(
        recognition,
        name="recognition_margin",
        objective=choice_margin(*recognition.choices),
        part_of="recognition",
    )
    for name in ("harmful", "benign"):
        parts |= behaviours[name].by_category()
    return behaviours | parts
