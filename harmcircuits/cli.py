"""`harmcircuits`: the main job from a terminal."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from harmcircuits import __version__
from harmcircuits.behaviours.model import Model
from harmcircuits.circuits.masks import WeightMask
from harmcircuits.display import progress_bar
from harmcircuits.export import export
from harmcircuits.hooks.bridge import Bridge
from harmcircuits.hooks.loading import load_model
from harmcircuits.organisms import FOLDER, load_organism
from harmcircuits.studies.models import open_model
from harmcircuits.studies.options import (
    Option,
    custom_model,
    no_custom_model,
    options_of,
    quiet,
    refused,
    show_files,
    takes_custom_model,
    with_options,
)
from harmcircuits.studies.settings import FOR_REAL_MODELS, StudySettings
from harmcircuits.studies.study import study
from harmcircuits.studies.summary import result_tables, summary

GIB = 2**30

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _shown(value: Any) -> str:
    """A default as the help shows it."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name}={number}" for name, number in value.items()) or "none"
    return str(value)


def _settings_options() -> dict[str, Option]:
    """An option for each setting; where custom models have another default, both are shown."""
    options = options_of(
        StudySettings,
        shown={"tasks": "none", "tasks_from": "none"},
        flags={"sizes": "--size", "tasks": "--task", "budgets": "--budget-of"},
    )
    usual, real = StudySettings(), FOR_REAL_MODELS
    for name, option in options.items():
        if getattr(usual, name) != getattr(real, name):
            shown = f"{_shown(getattr(usual, name))}; custom model: {_shown(getattr(real, name))}"
            # None tells a default from the same value given.
            options[name] = option._replace(kind=option.kind | None, shown=shown, default=None)
    return options


def _show_version(is_asked: bool) -> bool:
    if is_asked:
        typer.echo(f"harmcircuits {__version__}")
        raise typer.Exit
    return is_asked


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    """Find, mask and measure the weights behind harmful generation."""


@app.command("study")
@takes_custom_model
@with_options("settings", _settings_options())
def study_command(
    *,
    out: Annotated[
        Path, typer.Option(help="Folder for rows.jsonl, masks/, manifest.json and report.html.")
    ],
    organism: Annotated[
        str, typer.Option(help="Model: base, helpful, sft, dpo or planted.")
    ] = "sft",
    organisms: Annotated[
        Path, typer.Option(help="Folder of organisms you trained.", show_default="shipped")
    ] = FOLDER,
    model: Annotated[
        str,
        typer.Option(
            help="Instead: any model, folder or hub id; with --harmful and --benign.",
            show_default="none",
        ),
    ] = "",
    settings: dict[str, Any],
    custom: dict[str, Any],
    max_memory: Annotated[
        float | None,
        typer.Option(
            help="GiB on the devices for accumulated scores: less takes more passes.",
            show_default="no bound",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Torch device, such as cpu or cuda.")] = "cpu",
) -> None:
    """Score, choose, mask and measure with controls; print tables; write rows, masks and a page.

    The search is compared with the same in one shot and with the published set difference. The
    operating point of each is the mask that takes most valid answers of the target (or raises its
    loss most) while every kept ability stays within the tolerance of the unpruned model and the
    contrast's loss within the budget, on requests that neither score nor measure it. Interrupted
    and run again with the same options, it searches on from where it stopped.
    """
    quiet()
    console = Console()
    try:
        chosen = _settings(settings, FOR_REAL_MODELS if model else StudySettings())
        with progress_bar() as progress:
            if model:
                spec = custom_model(model, device, **custom)
                show_files([spec], console)
                opened = spec.open(progress=progress)
            else:
                opened = _organism(organism, organisms, chosen.seed, device, custom)
            bound = None if max_memory is None else round(max_memory * GIB)
            run = study(opened, chosen, out=out, progress=progress, max_memory=bound)
    except ValueError as error:
        raise refused(error) from None
    console.print(*result_tables(run.rows, run.terms), sep="\n")
    text = summary(run.rows, run.terms)
    console.print(text, highlight=False, soft_wrap=True, markup=False)

    # Imported here: drawing takes libraries that neither --help nor a study needs.
    from harmcircuits.studies.study_page import write_study_page

    write_study_page(run, out / "report.html")
    console.print(f"Report: {out / 'report.html'}", highlight=False, soft_wrap=True)


@app.command("export")
def export_command(
    mask: Annotated[
        Path,
        typer.Option(help="A saved mask, such as runs/sft/masks/circuit.safetensors."),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write; it must not exist yet, or be empty.")],
    model: Annotated[
        str, typer.Option(help="Folder or hub id of the model that the mask was made on.")
    ] = "",
    organism: Annotated[
        str, typer.Option(help="Instead of a model: base, helpful, sft, dpo or planted.")
    ] = "",
    push_to: Annotated[
        str, typer.Option(help="Hub id to upload to, private if it is new.", show_default="none")
    ] = "",
    device: Annotated[str, typer.Option(help="Torch device, such as cpu or cuda.")] = "cpu",
) -> None:
    """Write the model without the mask's weights as a Hugging Face folder; reload it as a check."""
    quiet()
    try:
        removed = WeightMask.load(mask)
        export(_bridge(model, organism, device), removed, out, push_to=push_to or None)
    except ValueError as error:
        raise refused(error) from None
    text = f"{removed} exported: {out}"
    Console().print(text, highlight=False, soft_wrap=True, markup=False)


def _settings(given: dict[str, Any], usual: StudySettings) -> StudySettings:
    """The usual settings with what was given."""
    changes = {}
    for name, value in given.items():
        if name != "budgets" and value is not None:
            changes[name] = tuple(value) if isinstance(value, list) else value
    # One budget that is given holds for all behaviours that have none of their own.
    budgets = {} if "budget" in changes else usual.budgets
    changes["budgets"] = {**budgets, **_budgets(given["budgets"] or [])}
    return replace(usual, **changes)


def _budgets(given: list[str]) -> dict[str, float]:
    """Budgets by behaviour from texts such as "borderline=0.1"."""
    budgets = {}
    for text in given:
        name, _, value = text.partition("=")
        try:
            budgets[name] = float(value)
        except ValueError:
            raise ValueError(f"--budget-of {text!r}; expected NAME=NATS") from None
    return budgets


def _organism(
    name: str,
    folder: Path,
    seed: int,
    device: str,
    custom: dict[str, Any],
) -> Model:
    no_custom_model(**custom)
    return open_model(name, seed=seed, device=device, folder=folder)


def _bridge(model: str, organism: str, device: str) -> Bridge:
    if bool(model) == bool(organism):
        raise ValueError(
            f"--model {model!r} and --organism {organism!r}; expected exactly one of them"
        )
    if organism:
        return load_organism(organism, device=device)
    return load_model(model, device=device)


if __name__ == "__main__":
    app()
