"""`harmcircuits`: the main job from a terminal."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

Q, P, ROUNDS = (0.001, 0.002, 0.004, 0.006, 0.01), (0.005, 0.01, 0.02), 10


@app.callback()
def main() -> None:
    """Find, mask and measure the weights behind harmful generation."""


@app.command()
def study(
    out: Annotated[Path, typer.Option(help="Folder for rows.jsonl, masks/, manifest.json and report.html.")],
    organism: Annotated[str, typer.Option(help="Shipped model: base, helpful, sft, dpo or planted.")] = "sft",
    q: Annotated[list[float], typer.Option(help="Shares of weights to remove; repeat for a grid.")] = list(Q),  # noqa: B006
    p: Annotated[list[float], typer.Option(help="Shares to protect for each kept behaviour; repeat.")] = list(P),  # noqa: B006
    rounds: Annotated[int, typer.Option(help="Rounds up to the largest q, scoring again in each.")] = ROUNDS,
    within: Annotated[str, typer.Option(help="Ranking scope: model, weight (each matrix) or row.")] = "model",
    protect: Annotated[list[str] | None, typer.Option(help="Behaviours to protect; repeat. Default: all others.")] = None,
    seed: Annotated[int, typer.Option(help="Draws the reference answers and the random masks.")] = 0,
    device: Annotated[str, typer.Option(help="Torch device, such as cpu or cuda.")] = "cpu",
) -> None:
    """Score, choose, mask and measure with controls; print a table; write rows, masks and a report.

    The operating point is the mask that lowers valid harmful answers most while benign answers, recognition, explanation
    and knowledge each stay within one point of the unpruned model, judged on requests that neither scored nor measure it.
    """
    console = Console()
    try:
        _study(console, out, organism, device, q=q, p=p, rounds=rounds, within=within, protect=protect or [], seed=seed)
    except ValueError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {error}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None


def _study(console: Console, out: Path, organism: str, device: str, *, q, p, rounds, within, protect, seed) -> None:
    from transformers.utils import logging

    from harmcircuits.organisms import organism_subject
    from harmcircuits.report import write_report
    from harmcircuits.study import Settings, run_study
    from harmcircuits.tables import result_tables, verdict

    logging.disable_progress_bar()
    settings = Settings(tuple(q), tuple(p), rounds, within, tuple(protect), seed)
    subject = organism_subject(organism, seed=seed, device=device)
    columns = (TextColumn("{task.description:>24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        result = run_study(subject, settings, out, progress)
    console.print(*result_tables(result.rows), sep="\n")
    console.print(verdict(result.rows), highlight=False, soft_wrap=True)
    write_report(result, out / "report.html")
    console.print(f"Report: {out / 'report.html'}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    app()
