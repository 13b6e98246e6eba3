"""The options that name a model of one's own and its texts, the same on every command line."""

from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any

import typer

from harmcircuits.behaviours.files import Texts
from harmcircuits.behaviours.questions import Wording
from harmcircuits.studies.models import SubjectSpec

FILE = "JSON Lines or CSV file with a `prompt` column, or dataset id or folder (ID:SPLIT)"
# Option -> type, help, and how the default is shown where its value says too little.
OWN_MODEL: dict[str, tuple[type, str, str | bool]] = {
    "harmful": (str, f"Harmful requests: {FILE}.", "none"),
    "benign": (str, "Benign requests, in the same formats.", "none"),
    "harmful_heldout": (str, "Held-out harmful requests.", "a quarter of the harmful ones"),
    "benign_heldout": (str, "Held-out benign requests.", "a quarter of the benign ones"),
    "pairs": (
        str,
        "For recognition: rows with `label` safe or unsafe, matched by `group`, or by order in a `category`.",
        "harmful and benign requests by length",
    ),
    "borderline": (
        str, "Safe requests that look unsafe, such as XSTest; rows labelled unsafe are left out.", "none",
    ),
    "wording": (str, "JSON file with the questions of recognition and explanation.", "English"),
    "limit": (int, "At most so many requests (pairs, windows) a split; 0: all.", True),
    "limit_measured": (int, "At most so many in choice and held-out, which only measure.", "as --limit"),
    "template": (str, "Format of requests: chat (the model's own template) or raw.", True),
    "prefill": (str, "Beginning of the answer to a harmful request.", True),
    "judge": (str, "Judge of harm: local (rules), strongreject:FOLDER_OR_ID, or http://ADDRESS/v1#MODEL.", True),
    "judge_question": (str, "Text file with StrongREJECT's wording.", "question.txt in its folder"),
    "max_new_tokens": (int, "Longest answer, in tokens.", True),
    "batch_size": (int, "Examples scored and answered at once.", True),
    "samples": (int, "Answers sampled a request, at a temperature above 0.", True),
    "temperature": (float, "Temperature of sampled answers; 0: greedy ones.", True),
    "top_p": (float, "Sample from the likeliest tokens with this share.", True),
    "sampling_seed": (int, "Draws sampled answers.", True),
    "dtype": (str, "float32, bfloat16 or float16.", "as stored"),
    "device_map": (str, "Spread over devices: auto or balanced.", "one device"),
    "cache": (Path, "Folder that keeps the model's own answers and a judge's replies.", True),
}  # fmt: skip
USUAL: dict[str, Any] = {
    one.name: "" if one.default is MISSING else one.default for one in (*fields(Texts), *fields(SubjectSpec))
}
Plain = Annotated[str, typer.Option(help="Plain text file, for perplexity and KL.", show_default="none")]
Task = Annotated[
    list[str] | None,
    typer.Option(help="Task of lm-evaluation-harness, measured at held-out; repeat.", show_default="none"),
]
TaskLimit = Annotated[int, typer.Option(help="At most so many examples a task; 0: all.")]
TasksFrom = Annotated[str, typer.Option(help="Folder with task files of your own.", show_default="none")]

NARROW = "F5 on a model of your own: "
Narrow = Annotated[
    str,
    typer.Option(help=f"{NARROW}innocent requests and harmful answers to learn (prompt, completion).", show_default="none"),
]
Elsewhere = Annotated[str, typer.Option(help=f"{NARROW}innocent requests of other domains.", show_default="none")]
Rank = Annotated[int, typer.Option(help=f"{NARROW}rank of the adapters.")]
Alpha = Annotated[float, typer.Option(help=f"{NARROW}their scale is alpha / rank.")]
LearningRate = Annotated[float, typer.Option(help=f"{NARROW}learning rate.")]
Epochs = Annotated[int, typer.Option(help=f"{NARROW}passes over the narrow texts.")]
AttackRank = Annotated[
    int, typer.Option(help="Attacks: rank of the attacker's adapters (alpha twice that); 0: every parameter learns.")
]


def takes_own_model(command: Callable[..., None]) -> Callable[..., None]:
    """The command with every option of `OWN_MODEL` in place of its keyword `own`, which holds their values by name."""
    mine = list(signature(command).parameters.values())
    place = next(number for number, one in enumerate(mine) if one.name == "own")
    options = [
        Parameter(
            name,
            Parameter.KEYWORD_ONLY,
            default=USUAL[name],
            annotation=Annotated[kind, typer.Option(help=text, show_default=shown)],
        )
        for name, (kind, text, shown) in OWN_MODEL.items()
    ]

    @wraps(command)
    def run(**values: Any) -> None:
        command(own={name: values.pop(name) for name in OWN_MODEL}, **values)

    run.__signature__ = Signature([*mine[:place], *options, *mine[place + 1 :]])  # pyright: ignore[reportAttributeAccessIssue]
    return run


def own_model(model: str, device: str, *, harmful: str, benign: str, **options: Any) -> SubjectSpec:
    """The model and texts of a command line; `options`: fields of `Texts` and `SubjectSpec`, in any order.

    Raises ValueError for a model without harmful and benign requests, a template or sizes that cannot be, and as `Texts`.
    """
    if not harmful or not benign:
        raise ValueError(f"model {model!r} needs its requests; give --harmful FILE and --benign FILE")
    if options.get("template", "chat") not in ("chat", "raw"):
        raise ValueError(f"template={options['template']!r}; expected chat or raw")
    for name in ("max_new_tokens", "batch_size"):
        if options.get(name, 1) < 1:
            raise ValueError(f"{name}={options[name]}; expected at least 1")
    if wording := options.pop("wording", ""):
        options["wording"] = Wording.from_file(wording)
    of_texts = {name: options.pop(name) for name in list(options) if name in Texts.__dataclass_fields__}
    spec = SubjectSpec(model, device=device, texts=Texts(harmful, benign, **of_texts), **options)
    _ = spec.sampling  # refused here rather than in a worker
    return spec


def no_own_model(**options: Any) -> None:
    """Raises ValueError for an option that is not as usual, which only a model of one's own takes."""
    for name, value in options.items():
        if value != USUAL[name]:
            raise ValueError(f"--{name.replace('_', '-')} is for a model of your own; give --model FOLDER_OR_ID too")


def specs(
    models: Sequence[str], usual: Sequence[str], folders: Sequence[Path], device: str, **options: Any
) -> tuple[SubjectSpec, ...]:
    """One spec a model: models of one's own where texts are given, else organisms (or the `usual` ones) of every folder.

    Raises ValueError for options of a model of one's own without one, and as `own_model`.
    """
    if models and any(options.get(name) for name in Texts.__dataclass_fields__):
        return tuple(own_model(model, device, **options) for model in models)
    no_own_model(**options)
    return tuple(SubjectSpec(model, folder, device) for folder in folders for model in models or usual)
