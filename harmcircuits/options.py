"""The options that name a model of one's own and its texts, the same on every command line."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from harmcircuits.questions import Wording
from harmcircuits.requests import Texts
from harmcircuits.subjects import SubjectSpec

FILE = "JSON Lines or CSV file with a `prompt` column, or dataset id or folder (ID:SPLIT)"
Harmful = Annotated[str, typer.Option(help=f"Harmful requests: {FILE}.", show_default="none")]
Benign = Annotated[str, typer.Option(help="Benign requests, in the same formats.", show_default="none")]
HarmfulHeldout = Annotated[
    str, typer.Option(help="Held-out harmful requests.", show_default="a quarter of the harmful ones")
]
BenignHeldout = Annotated[str, typer.Option(help="Held-out benign requests.", show_default="a quarter of the benign ones")]
Pairs = Annotated[
    str,
    typer.Option(
        help="For recognition: rows with `label` safe or unsafe, matched by `group`, or by order in a `category`.",
        show_default="harmful and benign requests by length",
    ),
]
Borderline = Annotated[
    str, typer.Option(help="Safe requests that look unsafe, such as XSTest; rows labelled unsafe are left out.")
]
WordingFile = Annotated[
    str, typer.Option(help="JSON file with the questions of recognition and explanation.", show_default="English")
]
Plain = Annotated[str, typer.Option(help="Plain text file, for perplexity and KL.", show_default="none")]
Limit = Annotated[int, typer.Option(help="At most so many requests (pairs, windows) a split; 0: all.")]
LimitMeasured = Annotated[
    int, typer.Option(help="At most so many in choice and held-out, which only measure.", show_default="as --limit")
]
Template = Annotated[str, typer.Option(help="Format of requests: chat (the model's own template) or raw.")]
Prefill = Annotated[str, typer.Option(help="Beginning of the answer to a harmful request.")]
JudgeName = Annotated[
    str, typer.Option(help="Judge of harm: local (rules), strongreject:FOLDER_OR_ID, or http://ADDRESS/v1#MODEL.")
]
JudgeQuestion = Annotated[
    str, typer.Option(help="Text file with StrongREJECT's wording.", show_default="question.txt in its folder")
]
MaxNewTokens = Annotated[int, typer.Option(help="Longest answer, in tokens.")]
BatchSize = Annotated[int, typer.Option(help="Examples scored and answered at once.")]
Samples = Annotated[int, typer.Option(help="Answers sampled a request, at a temperature above 0.")]
Temperature = Annotated[float, typer.Option(help="Temperature of sampled answers; 0: greedy ones.")]
TopP = Annotated[float, typer.Option(help="Sample from the likeliest tokens with this share.")]
SamplingSeed = Annotated[int, typer.Option(help="Draws sampled answers.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.", show_default="as stored")]
DeviceMap = Annotated[str, typer.Option(help="Spread over devices: auto or balanced.", show_default="one device")]
Task = Annotated[
    list[str] | None,
    typer.Option(help="Task of lm-evaluation-harness, measured at held-out; repeat.", show_default="none"),
]
TaskLimit = Annotated[int, typer.Option(help="At most so many examples a task; 0: all.")]
TasksFrom = Annotated[str, typer.Option(help="Folder with task files of your own.", show_default="none")]
Cache = Annotated[Path, typer.Option(help="Folder that keeps the model's own answers and a judge's replies.")]

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


def no_texts(**texts: Any) -> None:
    """Raises ValueError where texts are given, which only a model of one's own can be asked."""
    for name, value in texts.items():
        if value:
            raise ValueError(f"--{name.replace('_', '-')} is for a model of your own; give --model FOLDER_OR_ID too")


def specs(
    models: Sequence[str], usual: Sequence[str], folders: Sequence[Path], device: str, **options: Any
) -> tuple[SubjectSpec, ...]:
    """One spec a model: models of one's own where texts are given, else organisms (or the `usual` ones) of every folder.

    Raises ValueError for texts without models, and as `own_model`.
    """
    texts = {name: value for name, value in options.items() if name in Texts.__dataclass_fields__}
    if models and any(texts.values()):
        return tuple(own_model(model, device, **options) for model in models)
    no_texts(**texts, temperature=options.get("temperature"), samples=options.get("samples", 1) - 1)
    return tuple(SubjectSpec(model, folder, device) for folder in folders for model in models or usual)
