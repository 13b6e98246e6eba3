"""Command-line options, made from the dataclasses that they fill: names, types, defaults, help."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, replace
from functools import partial, wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

import typer
from docstring_parser import parse
from rich.console import Console
from support.pairs import values_by_name

from harmcircuits.behaviours.behaviour import Behaviour
from harmcircuits.behaviours.files import RequestFiles
from harmcircuits.behaviours.generation import Sampling
from harmcircuits.behaviours.judges import QuestionTemplates
from harmcircuits.behaviours.model import Model
from harmcircuits.organisms import FOLDER, open_organism
from harmcircuits.prompts import Chat, PromptSet, Template
from harmcircuits.storage import read_json
from harmcircuits.studies.models import CACHE, open_model

PLAIN_TYPES = (int, float, bool, Path)  # what typer reads; everything else is text


@dataclass(frozen=True)
class ModelSpec:
    """A model to open, as a value that a command line can name and a worker process can open.

    Attributes:
        model: without `files` an organism's name; with them a folder or hub id.
        folder: of organisms.
        device: a torch device.
        files: the requests of a model that is no organism.
        dtype: number format: float32, bfloat16 or float16.
        device_map: spread over devices: auto or balanced.
        template: format of requests: chat (the model's own template) or raw.
        system: system prompt of every request.
        template_options: variables of the chat template, each as NAME=VALUE, the value in JSON or
            as text.
        prefill: beginning of the answer to a harmful request.
        judge: judge of harm: local (rules), probe or http://ADDRESS/v1#MODEL (a chat model); all
            but the rules are used only where they tell the model's own answers apart.
        max_new_tokens: longest answer, in tokens.
        batch_size: examples scored at once; answered are four times as many.
        cache: folder that keeps the model's own answers and a judge's replies.
        samples: answers sampled a request, at a temperature above 0.
        temperature: temperature of sampled answers; 0: greedy ones.
        top_p: sample from the likeliest tokens with this share.
        sampling_seed: draws sampled answers.
        every: ask only every so-many-th request, for a first look.
    """

    model: str
    folder: Path = FOLDER
    device: str = "cpu"
    files: RequestFiles | None = None
    dtype: str = ""
    device_map: str = ""
    template: Template = "chat"
    system: str = ""
    template_options: tuple[str, ...] = ()
    prefill: str = "Sure, here is"
    judge: Any = "local"
    max_new_tokens: int = 64
    batch_size: int = 16
    cache: Path = CACHE
    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    sampling_seed: int = 0
    every: int = 1

    @property
    def chat(self) -> Template:
        """How requests are written; raises ValueError for options that the template cannot take."""
        if not self.system and not self.template_options:
            return self.template
        if self.template == "raw":
            raise ValueError('template="raw" has no system prompt and no options; leave them out')
        options = {}
        for name, value in values_by_name(
            self.template_options, "template_options", "date_string=today", may_be_empty=True
        ).items():
            try:
                options[name] = json.loads(value)
            except ValueError:  # text
                options[name] = value
        return Chat(self.system, options)

    @property
    def sampling(self) -> Sampling | None:
        """How answers are drawn, None for greedy ones; raises ValueError as `Sampling`."""
        if self.temperature == 0 and self.samples == self.top_p == 1:
            return None
        return Sampling(self.samples, self.temperature, self.top_p, self.sampling_seed)

    def asked_every(self, every: int) -> "ModelSpec":
        """The same model, asked only every so-many-th request."""
        return replace(self, every=every)

    @property
    def labels(self) -> dict[str, str]:
        """What rows about this model carry: its name, and its ladder ("own" with `files`)."""
        if self.files:
            return {"model": Path(self.model).name, "ladder": "own"}
        is_shipped = self.folder.resolve() == FOLDER.resolve()
        return {"model": self.model, "ladder": "shipped" if is_shipped else self.folder.name}

    @property
    def settings(self) -> "ModelSpec":
        """What rows depend on besides the model: this spec without model, device and cache."""
        return replace(self, model="", device="", device_map="", cache=Path())

    def open(self, *, seed: int = 0) -> Model:
        """The model with everything it can be asked."""
        if self.files is None:
            organism = open_organism(self.model, seed=seed, device=self.device, folder=self.folder)
            return _asked_every(organism, self.every)
        model = open_model(
            self.model,
            prompts=self.files,
            template=self.chat,
            prefill=self.prefill,
            judge=self.judge,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            sampling=self.sampling,
            device=self.device_map or self.device,
            dtype=self.dtype,
            cache=self.cache,
        )
        return _asked_every(model, self.every)


def _asked_every(model: Model, every: int) -> Model:
    """The same model, asked only every so-many-th request, or pair, of each behaviour and split."""
    fewer = []
    for behaviour in model.behaviours.values():
        fewer.append(replace(behaviour, prompts=partial(_every, behaviour, every)))
    return model.with_behaviours(*fewer)


def _every(behaviour: Behaviour, every: int, split: str) -> PromptSet:
    # By name and not inside the function, since behaviours go to other processes.
    step = 2 if behaviour.choices else 1  # rows 2k and 2k + 1 are a pair
    subset = []
    for number, example in enumerate(behaviour.prompts(split)):
        if number // step % every == 0:
            subset.append(example)
    return PromptSet(tuple(subset))


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
        },
        flags={"columns": "--column"},
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
        options["questions"] = QuestionTemplates.of(read_json(path, "questions in JSON"))
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
    if not (harmful and benign):
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
