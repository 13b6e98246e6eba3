"""`harmcircuits`: the main job from a terminal."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from harmcircuits import __version__
from harmcircuits.behaviours.model import OTHERS, Model
from harmcircuits.circuits.masks import WeightMask
from harmcircuits.export import export
from harmcircuits.hooks.bridge import Bridge
from harmcircuits.hooks.loading import load_model
from harmcircuits.organisms import FOLDER, load_organism
from harmcircuits.studies import options
from harmcircuits.studies.models import open_model
from harmcircuits.studies.settings import FOR_REAL_MODELS, StudySettings
from harmcircuits.studies.study import study
from harmcircuits.studies.summary import result_tables, summary

GIB = 2**30
DEFAULT = StudySettings()

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _either(name: str) -> str:
    """How the default of a setting is shown that differs between organisms and custom models."""
    return f"{getattr(DEFAULT, name)}; custom model: {getattr(FOR_REAL_MODELS, name)}"


def _show_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"harmcircuits {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Show the version.",
            callback=_show_version,
            is_eager=True,
        ),
    ] = False,
) -> None:
    """Find, mask and measure the weights behind harmful generation."""


@app.command("study")
@options.takes_custom_model
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
    custom: dict[str, Any],
    plain: options.Plain = "",
    target: Annotated[str, typer.Option(help="Behaviour to remove.")] = DEFAULT.target,
    contrast: Annotated[
        str, typer.Option(help="Its harmless counterpart, whose loss may hardly rise.")
    ] = DEFAULT.contrast,
    size: Annotated[
        list[float] | None,
        typer.Option(help="Share of the weights to remove; repeat.", show_default=_either("sizes")),
    ] = None,
    protect_share: Annotated[
        list[float] | None,
        typer.Option(
            help="Share of the weights that each protected behaviour keeps; repeat.",
            show_default=_either("protect_shares"),
        ),
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(
            help="Rounds up to the largest size, scoring again in each.",
            show_default=_either("rounds"),
        ),
    ] = None,
    within: Annotated[
        str, typer.Option(help="Ranking scope: model, weight (each matrix) or row.")
    ] = DEFAULT.within,
    protect: Annotated[
        list[str] | None,
        typer.Option(help="Behaviour to protect; repeat.", show_default="all but the target"),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(help="How far a kept rate may fall.", show_default=_either("tolerance")),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            help="How far the loss on the contrast's answers may rise, nats.",
            show_default=_either("budget"),
        ),
    ] = None,
    n_random: Annotated[
        int, typer.Option(help="Random masks of each kind, as controls.")
    ] = DEFAULT.n_random,
    task: options.Task = None,
    task_limit: options.TaskLimit = DEFAULT.task_limit,
    tasks_from: options.TasksFrom = DEFAULT.tasks_from,
    seed: Annotated[
        int, typer.Option(help="Draws the reference answers and the random masks.")
    ] = DEFAULT.seed,
    max_memory: Annotated[
        float | None,
        typer.Option(
            help="GiB on the devices for accumulated scores: less takes more passes; keeps them in "
            "OUT/scores.",
            show_default="no bound",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Torch device, such as cpu or cuda.")] = "cpu",
) -> None:
    """Score, choose, mask and measure with controls; print tables; write rows, masks and a page.

    The operating point is the mask that takes most valid answers of the target while every kept
    ability stays within the tolerance of the unpruned model, on requests that neither score nor
    measure it. With a budget it is the mask that raises the target's loss most while the contrast's
    stays within the budget.
    """
    _quiet()
    console = Console()
    given = {
        "sizes": size and tuple(size),
        "protect_shares": protect_share and tuple(protect_share),
        "rounds": rounds,
        "tolerance": tolerance,
        "budget": budget,
    }
    try:
        settings = replace(
            FOR_REAL_MODELS if model else DEFAULT,
            target=target,
            contrast=contrast,
            protect=tuple(protect or (OTHERS,)),
            within=within,  # pyright: ignore[reportArgumentType] (StudySettings checks it)
            seed=seed,
            n_random=n_random,
            tasks=tuple(task or ()),
            task_limit=task_limit,
            tasks_from=tasks_from,
            **{name: value for name, value in given.items() if value is not None},
        )
        with _progress() as progress:
            opened = _opened(
                model,
                organism,
                organisms,
                seed,
                device,
                progress,
                **custom,
                plain=plain,
            )
            bound = None if max_memory is None else round(max_memory * GIB)
            result = study(
                opened,
                settings,
                out=out,
                progress=progress,
                max_memory=bound,
            )
    except ValueError as error:
        raise _refused(error) from None
    console.print(*result_tables(result.rows, result.terms), sep="\n")
    text = summary(result.rows, result.terms)
    console.print(
        text,
        highlight=False,
        soft_wrap=True,
        markup=False,
    )
    # Imported here: drawing takes libraries that neither --help nor a study needs.
    from harmcircuits.studies.study_page import write_study_page

    write_study_page(result, out / "report.html")
    console.print(f"Report: {out / 'report.html'}", highlight=False, soft_wrap=True)


@app.command("export")
def export_command(
    mask: Annotated[
        Path,
        typer.Option(help="A saved mask, such as runs/sft/masks/circuit-rounds.safetensors."),
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
    _quiet()
    try:
        removed = WeightMask.load(mask)
        export(_bridge(model, organism, device), removed, out, push_to=push_to or None)
    except ValueError as error:
        raise _refused(error) from None
    text = f"{removed} exported: {out}"
    Console().print(
        text,
        highlight=False,
        soft_wrap=True,
        markup=False,
    )


def _opened(
    model: str,
    organism: str,
    organisms: Path,
    seed: int,
    device: str,
    progress: Progress,
    **custom: Any,
) -> Model:
    """The custom model, or the organism."""
    if model:
        return options.custom_model(model, device, **custom).open(progress=progress)
    options.no_custom_model(**custom)
    return open_model(
        organism,
        seed=seed,
        device=device,
        folder=organisms,
    )


def _bridge(model: str, organism: str, device: str) -> Bridge:
    if bool(model) == bool(organism):
        raise ValueError(
            f"--model {model!r} and --organism {organism!r}; expected exactly one of them"
        )
    if organism:
        return load_organism(organism, device=device)
    return load_model(model, device=device)


def _progress() -> Progress:
    columns = (
        TextColumn("{task.description:>24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=Console(stderr=True))


def _quiet() -> None:
    """No bars of transformers between ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _refused(error: Exception) -> typer.Exit:
    message = escape(" ".join(str(error).split()))
    text = f"[bold red]error:[/] {message}"
    Console(stderr=True).print(text, highlight=False, soft_wrap=True)
    return typer.Exit(2)


if __name__ == "__main__":
    app()
