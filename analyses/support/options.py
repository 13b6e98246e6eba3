"""Command-line options, made from the dataclasses that they fill: names, types, defaults, help."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

import typer
from docstring_parser import parse
from rich.console import Console

from harmcircuits.behaviours.files import RequestFiles
from harmcircuits.behaviours.questions import QuestionTemplates
from harmcircuits.studies.models import ModelSpec
from harmcircuits.studies.pairs import values_by_name

PLAIN_TYPES = (int, float, bool, Path)  # what typer reads; everything else is text


class Option(NamedTuple):
    """An option of a command."""

    kind: Any
    help: str
    shown: str | bool = True
    default: Any = None
    flag: str = ""


def options_of(
    record: type,
    names: Sequence[str] = (),
    *,
    shown: Mapping[str, str] | None = None,
    flags: Mapping[str, str] | None = None,
) -> dict[str, Option]:
    """An option for each field of a dataclass; its help is what the docstring says of the field."""
    texts = _described(record)
    hints = get_type_hints(record)
    options = {}
    for field in fields(record):
        name = field.name
        if names and name not in names:
            continue
        kind = _kind(hints[name])
        options[name] = Option(
            kind,
            _help(texts[name], kind),
            (shown or {}).get(name, True),
            _default(field, kind),
            (flags or {}).get(name, ""),
        )
    return options


def options_of_function(function: Callable[..., Any]) -> dict[str, Option]:
    """An option for each keyword-only parameter; its help is what the docstring says of it."""
    texts = _described(function)
    hints = get_type_hints(function)
    options = {}
    for name, parameter in signature(function).parameters.items():
        if parameter.kind is not Parameter.KEYWORD_ONLY:
            continue
        kind = _kind(hints[name])
        default = parameter.default
        if isinstance(default, tuple):
            default = list(default)
        options[name] = Option(kind, _help(texts.get(name, name), kind), default=default)
    return options


def _described(documented: Any) -> dict[str, str]:
    """What a docstring says of each attribute or argument."""
    texts = {}
    for parameter in parse(documented.__doc__ or "").params:
        words = (parameter.description or "").split()
        texts[parameter.args[-1]] = " ".join(words)
    return texts


def _help(text: str, kind: Any) -> str:
    text = text[0].upper() + text[1:]
    return f"{text} Repeat for several." if get_origin(kind) is list else text


def _kind(hint: Any) -> Any:
    """The type that typer reads: tuples become repeated options, anything unusual text."""
    # tuple[float, ...]    -> list[float]      --size 0.001 --size 0.002
    # Mapping[str, str]    -> list[str]        --column prompt=goal --column category=theme
    # float | None         -> float | None     may be left out
    # str | PromptSet      -> str              a file, on the command line
    if get_origin(hint) in (tuple, Sequence, Mapping):
        return list[_kind(get_args(hint)[0])]
    if isinstance(hint, UnionType) and type(None) in get_args(hint):
        inner = next(kind for kind in get_args(hint) if kind is not type(None))
        return _kind(inner) | None
    return hint if hint in PLAIN_TYPES else str


def _default(field: Field, kind: Any) -> Any:
    if isinstance(field.default, tuple):
        return list(field.default)
    # Without a default is what a factory makes.
    if get_origin(kind) is list:
        return []
    if field.default is MISSING:
        return ""
    return field.default


CUSTOM_MODEL: dict[str, Option] = {
    **options_of(
        RequestFiles,
        shown={
            "harmful": "none",
            "benign": "none",
            "harmful_heldout": "a quarter of the harmful ones",
            "benign_heldout": "a quarter of the benign ones",
            "pairs": "harmful and benign requests by length",
            "borderline": "none",
            "plain": "none",
            "limit_measured": "as --limit",
            "questions": "English",
            "columns": "recognised",
            "behaviours": "none",
        },
        flags={"columns": "--column", "behaviours": "--behaviour"},
    ),
    **options_of(
        ModelSpec,
        (
            "dtype", "device_map", "template", "system", "template_options", "prefill", "judge",
            "max_new_tokens", "batch_size", "samples", "temperature", "top_p", "sampling_seed",
            "cache",
        ),
        shown={
            "dtype": "as stored, or float32 where that is much faster",
            "device_map": "one device",
            "system": "none",
            "template_options": "none",
        },
        flags={"template_options": "--template-option"},
    ),
}  # fmt: skip


def with_options(
    placeholder: str, options: Mapping[str, Option]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator: the command with these options in place of one keyword."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        # def study(*, out, settings, device)  ->  def study(*, out, target, protect, ..., device)
        parameters = list(signature(command).parameters.values())
        names = [parameter.name for parameter in parameters]
        place = names.index(placeholder)
        added = [_parameter(name, option) for name, option in options.items()]

        @wraps(command)
        def run(**values: Any) -> None:
            given = {name: values.pop(name) for name in options}
            command(**{placeholder: given}, **values)

        # typer reads the options off the signature.
        replaced = Signature([*parameters[:place], *added, *parameters[place + 1 :]])
        run.__signature__ = replaced  # pyright: ignore[reportAttributeAccessIssue]
        return run

    return decorate


def _parameter(name: str, option: Option) -> Parameter:
    flags = [option.flag] if option.flag else []
    shown = typer.Option(*flags, help=option.help, show_default=option.shown)
    annotation = Annotated[option.kind, shown]
    return Parameter(name, Parameter.KEYWORD_ONLY, default=option.default, annotation=annotation)


takes_custom_model = with_options("custom", CUSTOM_MODEL)


def custom_model(
    model: str,
    device: str,
    *,
    harmful: str,
    benign: str,
    **options: Any,
) -> ModelSpec:
    """The model and request files of a command line."""
    _refuse_custom(model, harmful, benign, **options)
    path = options.pop("questions", "")
    if path:
        options["questions"] = QuestionTemplates.from_file(path)
    columns = options.get("columns", [])
    options["columns"] = values_by_name(columns, "columns", "prompt=goal")

    of_files = {}
    of_model = {}
    for name, value in options.items():
        owner = of_files if name in _names(RequestFiles) else of_model
        owner[name] = tuple(value) if isinstance(value, list) else value
    files = RequestFiles(harmful, benign, **of_files)
    spec = ModelSpec(model, device=device, files=files, **of_model)
    _ = spec.sampling, spec.chat  # refused here rather than in a worker
    return spec


def _refuse_custom(model: str, harmful: str, benign: str, **options: Any) -> None:
    """Raises ValueError for requests that are missing and options that cannot be."""
    is_own = bool(options.get("behaviours")) and not (harmful or benign)
    if not is_own and not (harmful and benign):
        raise ValueError(f"model={model!r} needs its requests; give harmful=FILE and benign=FILE")
    refuse_answers(
        options.get("template", "chat"),
        max_new_tokens=options.get("max_new_tokens", 1),
        batch_size=options.get("batch_size", 1),
    )


def refuse_answers(template: str, *, max_new_tokens: int, batch_size: int) -> None:
    """Raises ValueError for a template or a size by which no model can answer."""
    if template not in ("chat", "raw"):
        raise ValueError(f"template={template!r}; expected chat or raw")
    for name, value in {"max_new_tokens": max_new_tokens, "batch_size": batch_size}.items():
        if value < 1:
            raise ValueError(f"{name}={value}; expected at least 1")


def show_files(models: Sequence[ModelSpec], console: Console) -> None:
    """Print how each file of requests was read, a line each."""
    files = models[0].files if models else None
    for line in files.shapes if files else ():
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def no_custom_model(**options: Any) -> None:
    """Raises ValueError for an option that is not as usual, which only a custom model takes."""
    for name, value in options.items():
        option = CUSTOM_MODEL[name]
        if value != option.default:
            flag = option.flag or f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag} is for a custom model; give --model FOLDER_OR_ID too")


def specs(
    models: Sequence[str],
    usual: Sequence[str],
    folders: Sequence[Path],
    device: str,
    **options: Any,
) -> tuple[ModelSpec, ...]:
    """One spec a model: custom models where requests are given, else organisms of every folder."""
    if models and any(options.get(name) for name in _names(RequestFiles)):
        return tuple(custom_model(model, device, **options) for model in models)
    no_custom_model(**options)
    organisms = []
    for folder in folders:
        organisms += [ModelSpec(model, folder, device) for model in models or usual]
    return tuple(organisms)


def _names(record: type) -> set[str]:
    return {field.name for field in fields(record)}


def quiet() -> None:
    """No bars of transformers between ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()
