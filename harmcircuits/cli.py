"""`harmcircuits`: the main job from a terminal."""

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoConfig
from transformers.utils import logging

from harmcircuits.export import export
from harmcircuits.masks import WeightMask
from harmcircuits.organisms import FOLDER, load_organism, organism_subject
from harmcircuits.report import write_report
from harmcircuits.study import Settings, run_study
from harmcircuits.tables import result_tables, verdict

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
DEFAULT = Settings()


@app.callback()
def main() -> None:
    """Find, mask and measure the weights behind harmful generation."""


@app.command()
def study(
    out: Annotated[Path, typer.Option(help="Folder for rows.jsonl, masks/, manifest.json and report.html.")],
    organism: Annotated[str, typer.Option(help="Model: base, helpful, sft, dpo or planted.")] = "sft",
    organisms: Annotated[Path, typer.Option(help="Folder of organisms you trained.", show_default="shipped")] = FOLDER,
    q: Annotated[list[float] | None, typer.Option(help="Share to remove; repeat.", show_default=str(DEFAULT.q))] = None,
    p: Annotated[list[float] | None, typer.Option(help="Share to protect; repeat.", show_default=str(DEFAULT.p))] = None,
    rounds: Annotated[int, typer.Option(help="Rounds up to the largest q, scoring again in each.")] = DEFAULT.rounds,
    within: Annotated[str, typer.Option(help="Ranking scope: model, weight (each matrix) or row.")] = DEFAULT.within,
    protect: Annotated[
        list[str] | None, typer.Option(help="Behaviour to protect; repeat.", show_default="all but harmful")
    ] = None,
    seed: Annotated[int, typer.Option(help="Draws the reference answers and the random masks.")] = DEFAULT.seed,
    device: Annotated[str, typer.Option(help="Torch device, such as cpu or cuda.")] = "cpu",
) -> None:
    """Score, choose, mask and measure with controls; print tables; write rows, masks and a report.

    The operating point is the mask that lowers valid harmful answers most while benign answers, recognition, explanation
    and knowledge each stay within one point of the unpruned model, on requests that neither score nor measure it.
    """
    logging.disable_progress_bar()
    console = Console()
    columns = (TextColumn("{task.description:>24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        settings = Settings(
            q=tuple(q or DEFAULT.q),
            p=tuple(DEFAULT.p if p is None else p),
            rounds=rounds,
            within=within,  # pyright: ignore[reportArgumentType] (Settings checks it)
            protect=tuple(protect or ()),
            seed=seed,
        )
        subject = organism_subject(organism, seed=seed, device=device, folder=organisms)
        with Progress(*columns, console=Console(stderr=True)) as progress:
            result = run_study(subject, settings, out, progress)
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
    try:
        dtype = AutoConfig.from_pretrained(model).dtype or torch.float32
        return TransformerBridge.boot_transformers(model, dtype=dtype, device=device)
    except OSError as error:
        raise ValueError(f"--model {model!r} cannot be loaded; expected a folder or a hub id ({error})") from None


def _refused(error: Exception) -> typer.Exit:
    message = escape(" ".join(str(error).split()))
    Console(stderr=True).print(f"[bold red]error:[/] {message}", highlight=False, soft_wrap=True)
    return typer.Exit(2)


if __name__ == "__main__":
    app()
