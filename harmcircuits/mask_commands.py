"""Commands on a mask that is there: compare it, answer and measure under it, give it away."""

import json
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer
from rich.console import Console
from rich.markup import escape

from harmcircuits.behaviours.generation import request_ids
from harmcircuits.behaviours.model import Model
from harmcircuits.circuits.masks import WeightMask
from harmcircuits.circuits.overlap import Overlap, matched_null, overlap, p_value
from harmcircuits.circuits.sites import place_of
from harmcircuits.command_errors import one_sentence
from harmcircuits.display import listed
from harmcircuits.export import export
from harmcircuits.hooks.bridge import Bridge
from harmcircuits.hooks.capacity import context_of
from harmcircuits.hooks.loading import load_model, refuse_device
from harmcircuits.hooks.masking import masked
from harmcircuits.hub import push_mask
from harmcircuits.measurements import ENDS, Interval, Rows
from harmcircuits.organisms import load_organism
from harmcircuits.progress import progress_bar
from harmcircuits.prompts import PromptSet
from harmcircuits.studies.models import open_model
from harmcircuits.studies.options import (
    custom_model,
    no_custom_model,
    quiet,
    refuse_answers,
    takes_custom_model,
)
from harmcircuits.views.tables import text_table

MASK_HELP = "The mask: a saved file, a folder with mask.safetensors, or a hub id."
ORGANISM_HELP = "Instead of a model: base, helpful, sft, dpo or planted."
LONGEST_ANSWER = 64  # tokens, where nothing else is given
DEVICE_HELP = "Torch device, such as cpu or cuda."

MaskOption = Annotated[str, typer.Option(help=MASK_HELP)]
ModelOption = Annotated[
    str,
    typer.Option(help="Folder or hub id of the model that the mask was made on."),
]
OrganismOption = Annotated[str, typer.Option(help=ORGANISM_HELP)]
DeviceOption = Annotated[str, typer.Option(help=DEVICE_HELP)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object a line instead.")]
ScaleOption = Annotated[
    float,
    typer.Option(help="What the mask's weights are multiplied by; 0 removes them."),
]


def generate_command(
    *,
    model: ModelOption = "",
    organism: OrganismOption = "",
    mask: Annotated[str, typer.Option(help=MASK_HELP, show_default="none")] = "",
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="A request. Repeat for several.", show_default="none"),
    ] = None,
    prompts: Annotated[
        str,
        typer.Option(help="Instead: a file of requests (JSON Lines or CSV).", show_default="none"),
    ] = "",
    prefill: Annotated[
        str,
        typer.Option(help="How every answer begins, in the model's mouth.", show_default="none"),
    ] = "",
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            help="Longest answer, in tokens.",
            show_default=f"{LONGEST_ANSWER}, or what the model's context leaves",
        ),
    ] = None,
    scale: ScaleOption = 0.0,
    template: Annotated[
        str,
        typer.Option(help="How requests are written: chat (the model's own template) or raw."),
    ] = "chat",
    batch_size: Annotated[int, typer.Option(help="Requests answered at once.")] = 16,
    as_json: JsonOption = False,
    device: DeviceOption = "cpu",
) -> None:
    """Print the model's answer to each request: unpruned, and under the mask. Greedy."""
    quiet()
    with one_sentence():
        requests = _requests(prompt or [], prompts)
        limit = LONGEST_ANSWER if max_new_tokens is None else max_new_tokens
        refuse_answers(template, max_new_tokens=limit, batch_size=batch_size)
        removed = WeightMask.from_hub(mask) if mask else None
        answering = Model(
            "",
            _bridge(model, organism, device),
            {},
            _no_judge,
            template="raw" if template == "raw" else "chat",
            max_new_tokens=limit,
            n_answered_at_once=batch_size,
        )
        if max_new_tokens is None:
            answering = _within_context(answering, requests, prefill)
        columns = {"unpruned": answering.generate(requests, prefill=prefill)}
        if removed is not None:
            with masked(answering.bridge, removed, scale=scale):
                columns["masked"] = answering.generate(requests, prefill=prefill)
    for number, request in enumerate(requests):
        answers = {name: texts[number] for name, texts in columns.items()}
        if as_json:
            typer.echo(json.dumps({"prompt": request.prompt, **answers}))
        else:
            typer.echo(_labelled({"request": request.prompt, **answers}))


@takes_custom_model
def measure_command(
    *,
    mask: MaskOption,
    model: ModelOption = "",
    organism: OrganismOption = "",
    custom: dict[str, Any],
    scale: ScaleOption = 0.0,
    split: Annotated[
        str, typer.Option(help="Requests to measure on: heldout, choice or calibration.")
    ] = "heldout",
    behaviour: Annotated[
        list[str] | None,
        typer.Option(help="A behaviour to measure. Repeat for several.", show_default="all"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="A new file for the rows (JSON Lines).", show_default="none"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file of --out.")] = False,
    as_json: JsonOption = False,
    device: DeviceOption = "cpu",
) -> None:
    """Measure a model as it is and under a mask, without a search."""
    quiet()
    with one_sentence():
        _refuse_existing(out, force)
        removed = WeightMask.from_hub(mask)
        opened = _model(model, organism, device, custom)
        rows = _measured(opened, removed, scale, split, behaviour or [])
        if out is not None:
            rows.save(out)
    if as_json:
        for row in rows:
            typer.echo(json.dumps(vars(row)))
        return
    grid = text_table(escape(f"{opened.name}, {split}"), ["figure", "unpruned", "masked"])
    for metric in rows.metrics:
        of_metric = rows.where(metric)
        cells = [f"{row:.3g}" for row in of_metric]
        grid.add_row(escape(metric), *cells)
    Console().print(grid)


def overlap_command(
    masks: Annotated[
        list[str],
        typer.Argument(help="Two masks or more: files, folders with mask.safetensors, or hub ids."),
    ],
    *,
    by: Annotated[
        str, typer.Option(help="Within each place: layer or kind.", show_default="the whole model")
    ] = "",
    as_json: JsonOption = False,
) -> None:
    """Show what masks of one model share, pair by pair, against chance."""
    with one_sentence():
        if len(masks) < 2:
            raise ValueError(f"{listed(masks)}: one mask; give two or more to compare")
        if by not in ("", "layer", "kind"):
            raise ValueError(f"by={by!r}; expected layer or kind")
        opened = {name: WeightMask.from_hub(name) for name in masks}
        names = _short_names(masks)
        lines = []
        for first, second in combinations(opened, 2):
            pair = (names[first], names[second])
            lines += _compared(pair, opened[first], opened[second], by)
    if as_json:
        for line in lines:
            typer.echo(json.dumps(line.as_json()))
        return
    columns = ["masks", "first", "second", "shared", "by chance", "p", "Jaccard", "lift"]
    grid = text_table("Shared weights", columns)
    for line in lines:
        grid.add_row(*line.cells)
    Console().print(grid)


def export_command(
    mask: MaskOption,
    out: Annotated[Path, typer.Option(help="Folder to write; it must not exist yet, or be empty.")],
    model: ModelOption = "",
    organism: OrganismOption = "",
    push_to: Annotated[
        str, typer.Option(help="Hub id to upload to, private if it is new.", show_default="none")
    ] = "",
    force: Annotated[
        bool, typer.Option("--force", help="Replace a folder that this command wrote.")
    ] = False,
    device: DeviceOption = "cpu",
) -> None:
    """Write the model without the mask's weights as a Hugging Face folder; reload it as a check."""
    quiet()
    with one_sentence():
        removed = WeightMask.from_hub(mask)
        refuse_device(device)
        opened = _bridge(model, organism, device)
        export(opened, removed, out, push_to=push_to or None, force=force)
    text = f"{removed} exported: {out}"
    Console().print(text, highlight=False, soft_wrap=True, markup=False)


def push_mask_command(
    mask: Annotated[str, typer.Argument(help="A saved mask, such as masks/circuit.safetensors.")],
    *,
    to: Annotated[str, typer.Option(help="Hub id to upload to: user/name.")],
    model: Annotated[
        str,
        typer.Option(
            help="Hub id of the model that it was made on, for the card.", show_default="not named"
        ),
    ] = "",
    rows: Annotated[
        Path | None,
        typer.Option(
            help="Held-out rows for the card: a study's rows.jsonl, or those of `measure --out`.",
            show_default="none",
        ),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Make a repository that is new public.")
    ] = False,
    message: Annotated[
        str, typer.Option(help="Of the commit.", show_default="made from the size")
    ] = "",
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write the files to this folder and upload nothing: to look at the card first.",
            show_default="none",
        ),
    ] = None,
) -> None:
    """Upload a mask with a card to the Hugging Face hub, private if it is new."""
    with one_sentence():
        removed = WeightMask.load(mask)
        address = push_mask(
            removed,
            to,
            model=model,
            rows=Rows.read(rows) if rows is not None else None,
            private=not public,
            message=message,
            folder=out,
        )
    done = "written" if out is not None else "uploaded"
    Console().print(f"{removed} {done}: {address}", highlight=False, soft_wrap=True, markup=False)


def _refuse_existing(out: Path | None, force: bool) -> None:
    """Raises ValueError for a file that is there and may not be replaced, and for a folder."""
    if out is None or not out.exists():
        return
    if out.is_dir():
        raise ValueError(f"{out} is a folder; give a file that does not exist yet")
    if not force:
        raise ValueError(f"{out} exists; give a file that does not exist yet, or force=True")


def _requests(texts: Sequence[str], file: str) -> PromptSet:
    if bool(texts) == bool(file):
        raise ValueError(
            f"{len(texts)} of --prompt and --prompts {file!r}; expected one or more --prompt TEXT, "
            "or --prompts FILE"
        )
    return PromptSet.read(file) if file else PromptSet.of(texts)


def _within_context(model: Model, requests: PromptSet, prefill: str) -> Model:
    """The model with answers that its context has room for behind the longest request."""
    context = context_of(model.bridge)
    ids = request_ids(
        model.bridge,
        requests,
        prefill=prefill,
        max_new_tokens=0,
        template=model.template,
    )
    if context is None:
        return model
    room = max(1, context - max(map(len, ids)))
    return replace(model, max_new_tokens=min(model.max_new_tokens, room))


def _no_judge(_prompt: str, _completion: str) -> str:
    """Answers that are only shown get no verdict."""
    return ""


def _labelled(texts: dict[str, str]) -> str:
    """A line for each text, its name before it; a line break in a text stays in its column."""
    width = max(map(len, texts))
    lines = []
    for name, text in texts.items():
        indented = text.replace("\n", "\n" + " " * (width + 2))
        lines.append(f"{name:>{width}}: {indented}")
    return "\n".join(lines) + "\n"


def _measured(
    model: Model, mask: WeightMask, scale: float, split: str, only: Sequence[str]
) -> Rows:
    """The figures of the unpruned model and of the masked one, told apart by the label "mask"."""
    rows = Rows()
    for name in ("none", "given"):
        labels: dict[str, Any] = {"model": model.name, "mask": name}
        edited = nullcontext()
        if name != "none":
            labels["scale"] = scale
            edited = masked(model.bridge, mask, scale=scale)
        with edited:
            rows += model.measure(split=split, only=only, labels=labels)
    return rows


class _Line(NamedTuple):
    """A pair of masks, in the whole model or in one place, against chance."""

    pair: tuple[str, str]
    place: str
    shared: Overlap
    chance: Interval
    p: float

    @property
    def cells(self) -> list[str]:
        name = escape(" / ".join(self.pair) + (f", {self.place}" if self.place else ""))
        low, high = self.shared.interval
        return [
            name,
            f"{self.shared.n_first:,}",
            f"{self.shared.n_second:,}",
            f"{self.shared.n_shared:,}",
            f"{self.chance[0]:,.0f} to {self.chance[1]:,.0f}",
            f"{self.p:.2g}",
            f"{self.shared.jaccard:.3f}",
            f"{self.shared.lift:.2f} [{low:.2f}, {high:.2f}]",
        ]

    def as_json(self) -> dict[str, Any]:
        """Its figures by name; null where there is none."""
        low, high = self.shared.interval
        figures = {
            "n_first": self.shared.n_first,
            "n_second": self.shared.n_second,
            "n_shared": self.shared.n_shared,
            "n_expected": self.shared.n_expected,
            "chance_low": self.chance[0],
            "chance_high": self.chance[1],
            "p": self.p,
            "jaccard": self.shared.jaccard,
            "lift": self.shared.lift,
            "lift_low": low,
            "lift_high": high,
        }
        known = {name: value if np.isfinite(value) else None for name, value in figures.items()}
        first, second = self.pair
        return {"first": first, "second": second, "place": self.place, **known}


def _compared(
    pair: tuple[str, str], first: WeightMask, second: WeightMask, by: str
) -> Iterator[_Line]:
    """A line for the whole model, or for each place from which both masks remove something."""
    overlap(first, second)  # refuses masks of two models, whose places could still agree
    places: dict[str, list[str]] = {}
    for name in first.shapes:
        layer, kind = place_of(name)
        place = {"": "", "layer": f"layer {layer}", "kind": kind}[by]
        places.setdefault(place, []).append(name)
    for place, names in places.items():
        of_first, of_second = _within(first, names), _within(second, names)
        if of_first.n_removed and of_second.n_removed:
            shared = overlap(of_first, of_second)
            null = matched_null(of_first, of_second)
            low, high = np.quantile(null, ENDS).tolist()
            yield _Line(pair, place, shared, (low, high), p_value(shared.n_shared, null))


def _within(mask: WeightMask, names: Sequence[str]) -> WeightMask:
    """The part of a mask that lies in these matrices."""
    removed = {name: mask.removed[name] for name in names if name in mask.removed}
    shapes = {name: mask.shapes[name] for name in names}
    return WeightMask(removed, shapes, mask.source)


def _short_names(paths: Sequence[str]) -> dict[str, str]:
    """The files' own names where these tell the masks apart, else all of what was given."""
    stems = {path: Path(path).stem for path in paths}
    if len(set(stems.values())) == len(stems):
        return stems
    return {path: path for path in paths}


def _refuse_both(model: str, organism: str) -> None:
    if bool(model) == bool(organism):
        raise ValueError(
            f"--model {model!r} and --organism {organism!r}; expected exactly one of them"
        )


def _model(model: str, organism: str, device: str, custom: dict[str, Any]) -> Model:
    _refuse_both(model, organism)
    if organism:
        no_custom_model(**custom)
        return open_model(organism, device=device)
    spec = custom_model(model, device, **custom)
    with progress_bar() as progress:
        return spec.open(progress=progress)


def _bridge(model: str, organism: str, device: str) -> Bridge:
    _refuse_both(model, organism)
    if organism:
        return load_organism(organism, device=device)
    return load_model(model, device=device)


MASK_COMMANDS = {
    "generate": generate_command,
    "measure": measure_command,
    "overlap": overlap_command,
    "export": export_command,
    "push-mask": push_mask_command,
}
