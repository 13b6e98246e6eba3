"""`harmcircuits`: the main job from a terminal."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from harmcircuits import __version__
from harmcircuits.behaviours.model import Model
from harmcircuits.display import progress_bar
from harmcircuits.mask_commands import MASK_COMMANDS
from harmcircuits.organisms import FOLDER
from harmcircuits.studies.models import open_model
from harmcircuits.studies.options import (
    Option,
    custom_model,
    no_custom_model,
    options_of,
    quiet,
    refused,
    takes_custom_model,
    with_options,
)
from harmcircuits.studies.settings import FOR_REAL_MODELS, StudySettings
from harmcircuits.studies.study import study
from harmcircuits.studies.summary import result_tables, summary

GIB = 2**30

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _settings_options() -> dict[str, Option]:
    """An option for each setting; where custom models have another default, both are shown."""
    options = options_of(
        StudySettings,
        shown={"tasks": "none", "tasks_from": "none"},
        flags={"sizes": "--size", "tasks": "--task"},
    )
    usual, real = StudySettings(), FOR_REAL_MODELS
    for name, option in options.items():
        if getattr(usual, name) != getattr(real, name):
            shown = f"{getattr(usual, name)}; custom model: {getattr(real, name)}"
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
                opened = custom_model(model, device, **custom).open(progress=progress)
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


def _settings(given: dict[str, Any], usual: StudySettings) -> StudySettings:
    """The usual settings with what was given."""
    changes = {}
    for name, value in given.items():
        if value is not None:
            changes[name] = tuple(value) if isinstance(value, list) else value
    return replace(usual, **changes)


def _organism(
    name: str,
    folder: Path,
    seed: int,
    device: str,
    custom: dict[str, Any],
) -> Model:
    no_custom_model(**custom)
    return open_model(name, seed=seed, device=device, folder=folder)


for name, command in MASK_COMMANDS.items():
    app.command(name)(command)

if __name__ == "__main__":
    app()
