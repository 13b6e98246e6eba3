"""Command-line options for a custom model and its request files, the same on every command."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from harmcircuits.behaviours.files import RequestFiles
from harmcircuits.behaviours.questions import QuestionTemplates
from harmcircuits.studies.models import ModelSpec

FILE = "JSON Lines or CSV file with a `prompt` column, or dataset id or folder (ID:SPLIT)"


class Option(NamedTuple):
    """An option of a command.

    Attributes:
        kind: the type of its value.
        help: a sentence or two.
        shown: how the default is shown, where its value says too little.
        default: the value, where it is no field of `RequestFiles` or `ModelSpec`.
    """

    kind: type
    help: str
    shown: str | bool = True
    default: Any = None


CUSTOM_MODEL: dict[str, Option] = {
    "harmful": Option(str, f"Harmful requests: {FILE}.", "none"),
    "benign": Option(str, "Benign requests, in the same formats.", "none"),
    "harmful_heldout": Option(str, "Held-out harmful requests.", "a quarter of the harmful ones"),
    "benign_heldout": Option(str, "Held-out benign requests.", "a quarter of the benign ones"),
    "pairs": Option(
        str,
        "For recognition: rows with `label` safe or unsafe, matched by `group`, or by order in a "
        "`category`.",
        "harmful and benign requests by length",
    ),
    "borderline": Option(
        str,
        "Safe requests that look unsafe, such as XSTest; rows labelled unsafe are left out.",
        "none",
    ),
    "questions": Option(
        str, "JSON file with the questions of recognition and explanation.", "English"
    ),
    "limit": Option(int, "At most so many requests (pairs, windows) a split; 0: all."),
    "limit_measured": Option(
        int, "At most so many in choice and held-out, which only measure.", "as --limit"
    ),
    "template": Option(str, "Format of requests: chat (the model's own template) or raw."),
    "prefill": Option(str, "Beginning of the answer to a harmful request."),
    "judge": Option(
        str, "Judge of harm: local (rules), strongreject:FOLDER_OR_ID, or http://ADDRESS/v1#MODEL."
    ),
    "judge_question": Option(
        str, "Text file with StrongREJECT's wording.", "question.txt in its folder"
    ),
    "max_new_tokens": Option(int, "Longest answer, in tokens."),
    "batch_size": Option(int, "Examples scored and answered at once."),
    "samples": Option(int, "Answers sampled a request, at a temperature above 0."),
    "temperature": Option(float, "Temperature of sampled answers; 0: greedy ones."),
    "top_p": Option(float, "Sample from the likeliest tokens with this share."),
    "sampling_seed": Option(int, "Draws sampled answers."),
    "dtype": Option(str, "float32, bfloat16 or float16.", "as stored"),
    "device_map": Option(str, "Spread over devices: auto or balanced.", "one device"),
    "cache": Option(Path, "Folder that keeps the model's own answers and a judge's replies."),
}
DEFAULTS: dict[str, Any] = {}
for _field in (*fields(RequestFiles), *fields(ModelSpec)):
    DEFAULTS[_field.name] = "" if _field.default is MISSING else _field.default
DEFAULTS["questions"] = ""

Plain = Annotated[
    str, typer.Option(help="Plain text file, for perplexity and KL.", show_default="none")
]
Task = Annotated[
    list[str] | None,
    typer.Option(
        help="Task of lm-evaluation-harness, measured at held-out; repeat.", show_default="none"
    ),
]
TaskLimit = Annotated[int, typer.Option(help="At most so many examples a task; 0: all.")]
TasksFrom = Annotated[
    str, typer.Option(help="Folder with further task files.", show_default="none")
]


def with_options(
    placeholder: str, options: Mapping[str, Option]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator: the command with these options in place of one keyword.

    Args:
        placeholder: the keyword, which then holds the options' values by name.
        options: by name.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        parameters = list(signature(command).parameters.values())
        names = [parameter.name for parameter in parameters]
        place = names.index(placeholder)
        added = []
        for name, option in options.items():
            default = DEFAULTS[name] if option.default is None else option.default
            shown = typer.Option(help=option.help, show_default=option.shown)
            annotation = Annotated[option.kind, shown]
            added.append(
                Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            )

        @wraps(command)
        def run(**values: Any) -> None:
            given = {name: values.pop(name) for name in options}
            command(**{placeholder: given}, **values)

        # typer reads the options off the signature.
        replaced = Signature([*parameters[:place], *added, *parameters[place + 1 :]])
        run.__signature__ = replaced  # pyright: ignore[reportAttributeAccessIssue]
        return run

    return decorate


takes_custom_model = with_options("custom", CUSTOM_MODEL)


def custom_model(
    model: str, device: str, *, harmful: str, benign: str, **options: Any
) -> ModelSpec:
    """The model and request files of a command line.

    Args:
        model: folder or hub id.
        device: a torch device.
        harmful: harmful requests.
        benign: benign requests.
        options: fields of `RequestFiles` and `ModelSpec`.

    Raises:
        ValueError: a model without harmful and benign requests, a template or size that cannot be,
            and as `RequestFiles`.
    """
    if not harmful or not benign:
        raise ValueError(
            f"model {model!r} needs its requests; give --harmful FILE and --benign FILE"
        )
    if options.get("template", "chat") not in ("chat", "raw"):
        raise ValueError(f"template={options['template']!r}; expected chat or raw")
    for name in ("max_new_tokens", "batch_size"):
        if options.get(name, 1) < 1:
            raise ValueError(f"{name}={options[name]}; expected at least 1")
    if path := options.pop("questions", ""):
        options["questions"] = QuestionTemplates.from_file(path)

    of_files = {name: options.pop(name) for name in list(options) if name in _names(RequestFiles)}
    files = RequestFiles(harmful, benign, **of_files)
    spec = ModelSpec(
        model,
        device=device,
        files=files,
        **options,
    )
    _ = spec.sampling  # refused here rather than in a worker
    return spec


def no_custom_model(**options: Any) -> None:
    """Raises ValueError for an option that is not as usual, which only a custom model takes."""
    for name, value in options.items():
        if value != DEFAULTS[name]:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} is for a custom model; give --model FOLDER_OR_ID too")


def specs(
    models: Sequence[str],
    usual: Sequence[str],
    folders: Sequence[Path],
    device: str,
    **options: Any,
) -> tuple[ModelSpec, ...]:
    """One spec a model: custom models where requests are given, else organisms of every folder.

    Args:
        models: the models named on the command line.
        usual: organisms, where none is named.
        folders: of organisms.
        device: a torch device.
        options: of custom models.

    Raises:
        ValueError: options of a custom model without one, and as `custom_model`.
    """
    if models and any(options.get(name) for name in _names(RequestFiles)):
        return tuple(custom_model(model, device, **options) for model in models)
    no_custom_model(**options)
    organisms = []
    for folder in folders:
        organisms += [ModelSpec(model, folder, device) for model in models or usual]
    return tuple(organisms)


def _names(record: type) -> set[str]:
    return {field.name for field in fields(record)}
