"""`harmcircuits`: the main job from a terminal."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformer_lens.model_bridge import TransformerBridge
from transformers.utils import logging

from harmcircuits.circuits.masks import WeightMask
from harmcircuits.export import export
from harmcircuits.organisms import FOLDER, load_organism, organism_subject
from harmcircuits.studies import options
from harmcircuits.studies.models import load_model
from harmcircuits.studies.study import FOR_REAL_MODELS, Settings, run_study
from harmcircuits.views.page import write_report
from harmcircuits.views.tables import result_tables, verdict

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
DEFAULT = Settings()


def _either(name: str) -> str:
    return f"{getattr(DEFAULT, name)}; your model: {getattr(FOR_REAL_MODELS, name)}"


@app.callback()
def main() -> None:
    """Find, mask and measure the weights behind harmful generation."""


@app.command()
@options.takes_own_model
def study(
    *,
    out: Annotated[Path, typer.Option(help="Folder for rows.jsonl, masks/, manifest.json and report.html.")],
    organism: Annotated[str, typer.Option(help="Model: base, helpful, sft, dpo or planted.")] = "sft",
    organisms: Annotated[Path, typer.Option(help="Folder of organisms you trained.", show_default="shipped")] = FOLDER,
    model: Annotated[
        str, typer.Option(help="Instead: any model, folder or hub id; with --harmful and --benign.", show_default="none")
    ] = "",
    own: dict[str, Any],
    plain: options.Plain = "",
    q: Annotated[list[float] | None, typer.Option(help="Share to remove; repeat.", show_default=_either("q"))] = None,
    p: Annotated[list[float] | None, typer.Option(help="Share to protect; repeat.", show_default=_either("p"))] = None,
    rounds: Annotated[
        int | None, typer.Option(help="Rounds up to the largest q, scoring again in each.", show_default=_either("rounds"))
    ] = None,
    within: Annotated[str, typer.Option(help="Ranking scope: model, weight (each matrix) or row.")] = DEFAULT.within,
    protect: Annotated[
        list[str] | None, typer.Option(help="Behaviour to protect; repeat.", show_default="all but harmful")
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="How far a kept rate may fall.", show_default=_either("tolerance"))
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(help="How far the loss on benign answers may rise, nats.", show_default=_either("budget")),
    ] = None,
    n_random: Annotated[int, typer.Option(help="Random masks of each kind, as controls.")] = DEFAULT.n_random,
    task: options.Task = None,
    task_limit: options.TaskLimit = DEFAULT.task_limit,
    tasks_from: options.TasksFrom = DEFAULT.tasks_from,
    seed: Annotated[int, typer.Option(help="Draws the reference answers and the random masks.")] = DEFAULT.seed,
    max_memory: Annotated[
        float | None,
        typer.Option(
            help="GiB on the devices for accumulating scores: less takes more passes; keeps them in OUT/scores.",
            show_default="no bound",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Torch device, such as cpu or cuda.")] = "cpu",
) -> None:
    """Score, choose, mask and measure with controls; print tables; write rows, masks and a report.

    The operating point is the mask that lowers valid harmful answers most while benign answers, recognition, explanation
    and knowledge each stay within the tolerance of the unpruned model, on requests that neither score nor measure it. With
    a budget, it is the mask that raises the loss on harmful answers most while that on benign ones stays within the budget.
    """
    logging.disable_progress_bar()
    console = Console()
    columns = (TextColumn("{task.description:>24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    usual = FOR_REAL_MODELS if model else DEFAULT
    try:
        chosen = {"q": q and tuple(q), "p": p and tuple(p), "rounds": rounds, "tolerance": tolerance, "budget": budget}
        settings = replace(
            usual,
            within=within,  # pyright: ignore[reportArgumentType] (Settings checks it)
            protect=tuple(protect or ()),
            seed=seed,
            n_random=n_random,
            tasks=tuple(task or ()),
            task_limit=task_limit,
            tasks_from=tasks_from,
            **{name: value for name, value in chosen.items() if value is not None},
        )
        asked = {**own, "plain": plain}
        spec = options.own_model(model, device, **asked) if model else options.no_own_model(**asked)
        with Progress(*columns, console=Console(stderr=True)) as progress:
            if spec:
                subject = spec.open(progress=progress)
            else:
                subject = organism_subject(organism, seed=seed, device=device, folder=organisms)
            bound = None if max_memory is None else round(max_memory * 2**30)
            result = run_study(subject, settings, out, progress, max_memory=bound)
    except ValueError as error:
        raise _refused(error) from None
    console.print(*result_tables(result.rows), sep="\n")
    console.print(verdict(result.rows), highlight=False, soft_wrap=True, markup=False)
    write_report(result, out / "report.html")
    console.print(f"Report: {out / 'report.html'}", highlight=False, soft_wrap=True)


@app.command("export")
def export_folder(
    mask: Annotated[Path, typer.Option(help="A saved mask, such as runs/sft/masks/circuit-rounds.safetensors.")],
    out: Annotated[Path, typer.Option(help="Folder to write; it must not exist yet, or be empty.")],
    model: Annotated[str, typer.Option(help="Folder or hub id of the model that the mask was made on.")] = "",
    organism: Annotated[str, typer.Option(help="Instead of a model: base, helpful, sft, dpo or planted.")] = "",
    push_to: Annotated[str, typer.Option(help="Hub id to upload to, private if it is new.", show_default="none")] = "",
    device: Annotated[str, typer.Option(help="Torch device, such as cpu or cuda.")] = "cpu",
) -> None:
    """Write the model without the mask's weights as a Hugging Face folder, checked by reloading it."""
    logging.disable_progress_bar()
    try:
        removed = WeightMask.load(mask)
        bridge = _opened(model, organism, device)
        export(bridge, removed, out, push_to=push_to or None)
    except ValueError as error:
        raise _refused(error) from None
    Console().print(f"{removed} exported: {out}", highlight=False, soft_wrap=True, markup=False)


def _opened(model: str, organism: str, device: str) -> TransformerBridge:
    if bool(model) == bool(organism):
        raise ValueError(f"--model {model!r} and --organism {organism!r}; expected exactly one of them")
    if organism:
        return load_organism(organism, device=device)
    return load_model(model, device=device)


def _refused(error: Exception) -> typer.Exit:
    message = escape(" ".join(str(error).split()))
    Console(stderr=True).print(f"[bold red]error:[/] {message}", highlight=False, soft_wrap=True)
    return typer.Exit(2)


if __name__ == "__main__":
    app()
