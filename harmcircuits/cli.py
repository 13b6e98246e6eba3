"""`harmcircuits`: the main job from a terminal."""

import time
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from harmcircuits import __version__
from harmcircuits.behaviours.model import Model
from harmcircuits.command_errors import one_sentence
from harmcircuits.display import duration, nearest
from harmcircuits.hooks.loading import load_outline, refuse_device, slow_dtype, usual_dtype
from harmcircuits.hooks.memory import GIB
from harmcircuits.mask_commands import MASK_COMMANDS
from harmcircuits.organisms import FOLDER, ORGANISMS
from harmcircuits.progress import progress_bar
from harmcircuits.studies.cost import Workload, cost_table, estimate_outline, estimate_study
from harmcircuits.studies.models import open_model
from harmcircuits.studies.options import (
    Option,
    custom_model,
    no_custom_model,
    options_of,
    quiet,
    show_files,
    takes_custom_model,
    with_options,
)
from harmcircuits.studies.pairs import values_by_name
from harmcircuits.studies.run import PAGE
from harmcircuits.studies.settings import (
    FOR_REAL_MODELS,
    QUICK_LIMIT,
    QUICK_SHARE,
    StudySettings,
    as_published,
    quick,
)
from harmcircuits.studies.study import refuse_study_folder, study, with_share_of_requests
from harmcircuits.studies.summary import result_tables, summary
from harmcircuits.studies.utility import task_manager

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _shown(name: str, value: Any) -> str:
    """A default as the help shows it."""
    if isinstance(value, bool):
        return name if value else f"no-{name}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}={number}" for name, number in value.items()) or "none"
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "none"
    return str(value) or "none"


def _settings_options() -> dict[str, Option]:
    """An option for each setting; where custom models have another default, both are shown."""
    flags = {"sizes": "--size", "tasks": "--task", "budgets": "--budget-of"}
    options = options_of(StudySettings, flags=flags)
    for name, option in options.items():
        usual, real = getattr(StudySettings(), name), getattr(FOR_REAL_MODELS, name)
        shown = _shown(name, usual)
        if usual != real:
            shown += f"; custom model: {_shown(name, real)}"
        # None where it is not given: --quick and --published have defaults of their own.
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
        str | None,
        typer.Option(help="Model: base, helpful, sft, dpo or planted.", show_default="sft"),
    ] = None,
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
            help="GiB for scores: less takes more passes, and sums go to disk (TMPDIR).",
            show_default="no bound",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Torch device, such as cpu or cuda.")] = "cpu",
    is_quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="A first look: a tenth of the requests, fewer steps, sizes and masks, one search.",
        ),
    ] = False,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the unfinished study of these options in --out."),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Remove the study in --out first, finished or not.")
    ] = False,
) -> None:
    """Score, choose, mask and measure with controls; print tables; write rows, masks and a page."""
    quiet()
    console = Console()
    with one_sentence():
        usual = _usual_settings(model, is_published=settings["published"])
        chosen = _settings(settings, quick(usual) if is_quick else usual)
        bound = _in_bytes(max_memory)
        # What cannot end well is refused before hours of answers.
        _refuse_both(model, organism)
        refuse_device(device)
        refuse_study_folder(out, resume=resume, force=force)
        if chosen.tasks:
            task_manager(chosen.tasks, chosen.tasks_from)
        start = time.monotonic()
        if is_quick and model:
            custom = _fewer_requests(custom)
        with progress_bar() as progress:
            if model:
                spec = custom_model(model, device, **custom)
                show_files([spec], console)
                opened = spec.open(progress=progress)
            else:
                opened = _organism(organism or "sft", organisms, chosen.seed, device, custom)
            if is_quick:
                opened = _fewer_items(opened)
                progress.console.print(_quick_text(chosen, usual, custom if model else {}))
            _say_cost(progress, opened, chosen, bound)
            seconds = {"model and its answers": time.monotonic() - start}
            run = study(
                opened,
                chosen,
                out=out,
                progress=progress,
                max_memory=bound,
                page=True,
                resume=resume,
                force=force,
            )
    console.print(*result_tables(run.rows, run.terms), sep="\n")
    text = summary(run.rows, run.terms)
    console.print(text, highlight=False, markup=False)
    stages = [f"{name} {duration(time_of)}" for name, time_of in {**seconds, **run.seconds}.items()]
    console.print(f"Time: {', '.join(stages)}", highlight=False, markup=False)
    console.print(f"Report: {out / PAGE}", highlight=False, soft_wrap=True, markup=False)


def _refuse_both(model: str, organism: str | None) -> None:
    if model and organism:
        raise ValueError(f"model={model!r} and organism={organism!r}; give one of them")


def _usual_settings(model: str, *, is_published: bool | None) -> StudySettings:
    """The settings before any of them is given."""
    usual = FOR_REAL_MODELS if model else StudySettings()
    return as_published(usual) if is_published else usual


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


def _in_bytes(gibibytes: float | None) -> int | None:
    """A bound on memory, where there is one."""
    return None if gibibytes is None else round(gibibytes * GIB)


def _budgets(given: list[str]) -> dict[str, float]:
    """Budgets by behaviour from texts such as "borderline=0.1"."""
    budgets = {}
    for name, value in values_by_name(given, "budgets", "borderline=0.1").items():
        try:
            budgets[name] = float(value)
        except ValueError:
            raise ValueError(
                f"budgets='{name}={value}': {value!r} is no number; expected nats per token, such "
                f"as '{name}=0.1'"
            ) from None
    return budgets


def _say_cost(
    progress: Progress, model: Model, settings: StudySettings, max_memory: int | None
) -> None:
    """What the study of a real model takes; organisms take minutes."""
    if not model.is_invented:
        estimate = estimate_study(model, settings, max_memory=max_memory)
        progress.console.print(str(estimate), highlight=False, markup=False)


def _fewer_items(model: Model) -> Model:
    """An organism asked about a tenth of its items; a real model has been given few requests."""
    return with_share_of_requests(model, QUICK_SHARE) if model.is_invented else model


def _fewer_requests(custom: dict[str, Any]) -> dict[str, Any]:
    """The options of a custom model with a tenth of each limit."""
    limits = {}
    for name in ("limit", "limit_measured"):
        given = custom[name]
        limits[name] = max(1, round(QUICK_SHARE * given)) if given else 0
    limits["limit"] = limits["limit"] or QUICK_LIMIT
    return {**custom, **limits}


def _quick_text(chosen: StudySettings, usual: StudySettings, custom: dict[str, Any]) -> str:
    """What a first look changes, in a line."""
    requests = "a tenth of the requests"
    if custom:
        requests = f"{custom['limit_measured'] or custom['limit']} requests a split at most"
        if custom["limit_measured"]:
            requests += f" ({custom['limit']} to score on)"
    changes = [requests]
    for name in ("steps", "sizes", "n_random"):
        now, before = getattr(chosen, name), getattr(usual, name)
        if now != before:
            changes.append(f"{name} {_number_text(now)} in place of {_number_text(before)}")
    if usual.compare and not chosen.compare:
        changes.append("no other searches to compare with")
    return f"quick: {'; '.join(changes)}. A first look, and no result."


def _number_text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _organism(
    name: str,
    folder: Path,
    seed: int,
    device: str,
    custom: dict[str, Any],
) -> Model:
    no_custom_model(**custom)
    if name not in ORGANISMS:
        hint = nearest(name, ORGANISMS)
        raise ValueError(f"no organism is called {name!r}; {hint}. For another model give model=")
    return open_model(name, seed=seed, device=device, folder=folder)


@app.command("cost")
def cost_command(
    *,
    model: Annotated[str, typer.Option(help="Folder, hub id or config.json of the model.")],
    answers: Annotated[int, typer.Option(help="Answers of the target to score on.")] = 200,
    protected: Annotated[int, typer.Option(help="Behaviours that are protected.")] = 4,
    protected_answers: Annotated[
        int, typer.Option(help="Answers of each of these to score on.")
    ] = 100,
    measured: Annotated[
        int, typer.Option(help="Requests of each behaviour in the choice and held-out splits.")
    ] = 100,
    request_tokens: Annotated[
        int, typer.Option(help="Tokens of a request, template and all.")
    ] = 40,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 64,
    batch_size: Annotated[
        int, typer.Option(help="Examples scored at once; answered are four times as many.")
    ] = 16,
    steps: Annotated[
        int, typer.Option(help="In how many steps the search's mask grows.")
    ] = FOR_REAL_MODELS.steps,
    sizes: Annotated[int, typer.Option(help="How many sizes are searched for.")] = len(
        FOR_REAL_MODELS.sizes
    ),
    dtype: Annotated[
        str,
        typer.Option(
            help="Number format: float32, bfloat16 or float16.",
            show_default="as stored, or float32 where that is much faster",
        ),
    ] = "",
    max_memory: Annotated[
        float | None,
        typer.Option(help="GiB for scores; sums go to disk then.", show_default="no bound"),
    ] = None,
    tflops: Annotated[
        float | None,
        typer.Option(
            help="Speed of the device, 10^12 operations a second.", show_default="timed on --device"
        ),
    ] = None,
    bandwidth: Annotated[
        float | None,
        typer.Option(
            help="At which it reads weights, 10^9 bytes a second.", show_default="timed on --device"
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Torch device, such as cpu or cuda.")] = "cpu",
) -> None:
    """Estimate memory and time of a search and a study from a model's configuration alone."""
    quiet()
    with one_sentence():
        workload = Workload(
            answers,
            protected,
            protected_answers,
            measured,
            request_tokens,
            max_new_tokens,
            batch_size,
        )
        shares = (1e-5,) * sizes
        settings = replace(FOR_REAL_MODELS, steps=steps, sizes=shares, n_random=3)
        bound = _in_bytes(max_memory)
        refuse_device(device)
        outline = load_outline(model, dtype=dtype or usual_dtype(model, device))
        estimate = estimate_outline(
            outline,
            workload,
            settings,
            max_memory=bound,
            device=device,
            tflops=tflops,
            bandwidth=bandwidth,
        )
        Console().print(cost_table(Path(model).name, outline, estimate))
        slow = slow_dtype(outline, device)
        if slow:
            warnings.warn(slow, stacklevel=1)


for name, command in MASK_COMMANDS.items():
    app.command(name)(command)

if __name__ == "__main__":
    app()
