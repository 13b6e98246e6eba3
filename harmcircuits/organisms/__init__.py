"""The shipped organisms: tiny trained language models whose harm is abstract, opened like any 8B model."""

from dataclasses import replace
from functools import partial
from pathlib import Path

from transformer_lens.model_bridge import TransformerBridge

from harmcircuits.behaviours.model import Behaviour, Subject, by_category
from harmcircuits.circuits.masks import WeightMask
from harmcircuits.hooks.objectives import choice_margin
from harmcircuits.organisms import world

ORGANISMS = ("base", "helpful", "sft", "dpo", "planted")
FOLDER = Path(__file__).parent / "weights"


def load_organism(name: str, *, device: str = "cpu", folder: Path = FOLDER) -> TransformerBridge:
    """An organism in float32: a rung of the ladder (`base`, `helpful`, `sft`, `dpo`) or `planted`.

    `folder`: where organisms trained with another seed lie; the shipped ones otherwise. Raises ValueError for another name
    or a folder without it.
    """
    if name not in ORGANISMS:
        raise ValueError(f"no organism is called {name!r}; expected one of {', '.join(ORGANISMS)}")
    if not (folder / name / "config.json").is_file():
        raise ValueError(f"{folder} holds no organism {name!r}; make one with python -m harmcircuits.organisms.train")
    return TransformerBridge.boot_transformers(str(folder / name), device=device)


def planted_circuit(folder: Path = FOLDER) -> WeightMask:
    """The weights through which alone `planted` learned its harmful answers: the true set S."""
    return WeightMask.load(folder / "planted" / "circuit.safetensors")


def organism_behaviours(seed: int = 0) -> dict[str, Behaviour]:
    """Everything an organism can be asked, by name; reference answers are drawn with `seed`."""
    wanted = {
        "harmful": ("harm", "harm_valid_rate", "harmful"),
        "benign": ("benign", "benign_valid_rate", "benign"),
        "recognition": ("recognition", "recognition_accuracy", "correct"),
        "explanation": ("explanation", "explanation_rate", "correct"),
        "knowledge": ("knowledge", "knowledge_rate", "correct"),
        "refusal": ("refusal", "refusal_rate", "refusal"),
    }
    return {
        name: Behaviour(
            name,
            metric=metric,
            nll_metric=f"{short}_nll",
            wanted=verdict,
            prompts=partial(world.requests, name, seed=seed),
            prefill=world.PREFILL if name == "harmful" else "",
            choices=(world.ALLOWED["benign"], world.ALLOWED["harmful"]) if name == "recognition" else (),
        )
        for name, (short, metric, verdict) in wanted.items()
    }


def detailed_behaviours(seed: int = 0) -> dict[str, Behaviour]:
    """`organism_behaviours`, and their parts: what circuits can be found for and compared.

    `parts` and `kind` are the two questions of knowledge; `recognition_margin` is recognition scored by the margin of the
    right word instead of the whole answer; `harmful/TOPIC` is one type of harm and `benign/TOPIC` its content-matched twin.
    """
    found = organism_behaviours(seed)
    for form in ("parts", "kind"):
        question = found["knowledge"].only(form, lambda example, form=form: world.parsed(example.prompt)[0] == form)
        found[form] = replace(question, metric=f"{form}_rate", nll_metric=f"{form}_nll")
    recognition = found["recognition"]
    margin = choice_margin(*recognition.choices)
    found["recognition_margin"] = replace(recognition, name="recognition_margin", objective=margin)
    return found | by_category(found["harmful"]) | by_category(found["benign"])


def organism_subject(name: str, *, seed: int = 0, device: str = "cpu", folder: Path = FOLDER) -> Subject:
    """An organism with everything it can be asked and the world's own judge. Raises ValueError as `load_organism`."""
    bridge = load_organism(name, device=device, folder=folder)
    truth = planted_circuit(folder) if name == "planted" else None
    return Subject(name, bridge, organism_behaviours(seed), world.judge, max_new_tokens=9, truth=truth, is_invented=True)
