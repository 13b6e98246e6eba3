"""A mask on the Hugging Face hub: its file, a card that says what it is, and its held-out rows."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from harmcircuits.behaviours.calibration import few_answers
from harmcircuits.circuits.hub import MASK_FILE
from harmcircuits.circuits.masks import WeightMask
from harmcircuits.circuits.sites import KINDS, place_of
from harmcircuits.display import listed, plural, share
from harmcircuits.measurements import Rows
from harmcircuits.storage import empty_folder, write_text
from harmcircuits.views.tables import markdown_table

ROWS_FILE = "rows.jsonl"

CARD = """---
{header}
---

# {name}

A weight mask: the places of {n_removed} of the {n_weights} weights ({share}) in the block matrices
of {model}, found by harmcircuits. It holds no weights and no text: set to zero in that model, in
place and reversibly, these weights are what the search below says of them.

| | |
| --- | --- |
| model | {model} |
| model's fingerprint | `{fingerprint}` (the mask is refused on any other) |
| weights | {n_removed} of {n_weights}, {share} |
| mask's digest | `{digest}` |
| made by | {method} |

## Load it

```python
import harmcircuits as hc

bridge = hc.load_model("{model_id}")
with hc.masked(bridge, hc.WeightMask.from_hub("{repo}")):
    ...  # the model without these weights; restored bit for bit on exit
```

## How it was found

{trace}

As recorded in `{file}`, without any prompt or completion (data appear as digests):

```json
{record}
```

## What is left without these weights

{held_out}

## Where they are

{table}

## Use, and misuse

For defensive research: to see which weights carry a behaviour and what else they carry, to remove
it and to test how well that holds. It is no safety guarantee: behaviour may come back with
training, in other words or in other languages, and what was not measured is not known.

It names weights that a behaviour needs, so it must not be used to restore, strengthen or transplant
that behaviour, nor to find out how to undo a safeguard of a model that others rely on.
"""

NO_ROWS = "Not given. `Model.measure(mask=...)` or `harmcircuits measure` measures it."


def push_mask(
    mask: WeightMask,
    repo: str,
    *,
    model: str = "",
    rows: Rows | None = None,
    private: bool = True,
    message: str = "",
    folder: str | Path | None = None,
) -> str:
    """Upload a mask with a card to the Hugging Face hub; its address.

    The card says what the mask is, on which model and how it was found, what is left under it, how
    it is loaded, and what it is for. `WeightMask.from_hub` reads it back. The token is the one that
    huggingface_hub knows: of `hf auth login`, or HF_TOKEN.

    >>> mask = hc.top_fraction(hc.removal_effect(bridge, harm), 0.001)
    >>> hc.push_mask(mask, "someone/mask", model="someone/model", folder="card")  # no network
    'card'

    Args:
        mask: the weights.
        repo: the hub id to upload to, "user/name"; it is made where there is none.
        model: folder or hub id of the model that the mask was made on.
        rows: held-out figures for the card: those of `Model.measure(mask=mask)`, or of a study.
        private: whether a repository that is new is private; one that exists stays as it is.
        message: of the commit; made from the mask's size by default.
        folder: a new or empty one, where the files are written instead and nothing is uploaded: to
            look at the card first.

    Returns:
        The repository's address, or the folder.

    Raises:
        ValueError: a name that is no hub id, rows that do not belong to the mask, a folder that is
            not empty, no permission to write, or no network.
    """
    refuse_repo(repo)
    card = mask_card(mask, repo, model=model, rows=rows)
    if folder is not None:
        _write(mask, card, rows, empty_folder(folder))
        return str(folder)
    with TemporaryDirectory() as temporary:
        _write(mask, card, rows, Path(temporary))
        message = message or f"Mask of {plural(mask.n_removed, 'weight')}"
        return upload(Path(temporary), repo, private=private, message=message)


def upload(folder: Path, repo: str, *, private: bool, message: str) -> str:
    """Upload a folder's files to a model repository of the hub, made where there is none."""
    # Imported here: nothing else needs the hub.
    from huggingface_hub import HfApi

    try:
        HfApi().create_repo(repo, private=private, exist_ok=True)
        HfApi().upload_folder(repo_id=repo, folder_path=folder, commit_message=message)
    except (OSError, ValueError) as error:
        # Every error of huggingface_hub and of its connection is one of these.
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"{repo} cannot be written ({reason}); log in with `hf auth login` or set HF_TOKEN "
            "to a token that may write there, and check the name and the network"
        ) from None
    return f"https://huggingface.co/{repo}"


def refuse_repo(repo: str) -> None:
    """Raises ValueError for what is no hub id."""
    user, _, name = repo.partition("/")
    if not user or not name or "/" in name:
        raise ValueError(f"repository {repo!r}; expected a hub id, user/name")


def mask_card(mask: WeightMask, repo: str, *, model: str = "", rows: Rows | None = None) -> str:
    """The card: what a mask is, where it comes from, how it is loaded and what it is for."""
    header = ["library_name: harmcircuits", "tags: [harmcircuits, interpretability, pruning]"]
    is_local = Path(model).exists()
    if model and not is_local:
        header.append(f"base_model: {model}")
    shown = Path(model).resolve().name if is_local else model  # no path of this machine
    return CARD.format(
        header="\n".join(header),
        name=repo.partition("/")[2],
        repo=repo,
        n_removed=f"{mask.n_removed:,}",
        n_weights=f"{mask.n_weights:,}",
        share=share(mask.fraction),
        model=f"`{shown}`" if model else "a model that this card does not name",
        model_id=shown if model else "THE MODEL'S FOLDER OR HUB ID",
        fingerprint=mask.source.model,
        digest=mask.digest,
        method=mask.source.method,
        trace=_trace_text(mask),
        file=MASK_FILE,
        record=json.dumps(json.loads(mask.source.to_json()), indent=1),
        held_out=_held_out_table(rows, mask) if rows is not None else NO_ROWS,
        table=_place_table(mask),
    )


def _write(mask: WeightMask, card: str, rows: Rows | None, folder: Path) -> None:
    mask.save(folder / MASK_FILE)
    write_text(folder / "README.md", card)
    if rows is not None:
        before, under = _of_mask(rows, mask)
        Rows([*before, *under]).save(folder / ROWS_FILE)


def _trace_text(mask: WeightMask) -> str:
    """The walk of a search, a line a step; of other masks, that there was none."""
    losses = mask.trace.where("target_loss", aim="walk")
    if not losses:
        return f"By `{mask.source.method}`, without a search."
    head = [
        "step",
        "weights",
        "factor of the price",
        "target's loss",
        "largest rise of what is kept",
    ]
    lines = []
    for row in losses:
        lines.append(_step_cells(mask.trace, row.labels["step"], row.mean))
    budgets = mask.source.settings.get("budget", {})
    protected = ", ".join(f"{name} ({value:g})" for name, value in budgets.items()) or "nothing"
    return (
        f"By a search of {plural(len(losses), 'step')}; protected, with the nats per token that "
        f"each may lose: {protected}. Losses are nats per token, on the answers that were scored; "
        "rises, on protected answers that were not."
        f"{_scored_text(mask)}\n\n" + markdown_table(head, lines)
    )


def _scored_text(mask: WeightMask) -> str:
    """On how many answers the search scored; masks of earlier versions do not say."""
    counts = {}
    for row in mask.trace.where("examples_scored"):
        counts[str(row.labels["data"])] = int(row.mean)
    if not counts:
        return ""
    text = f" Scored on {listed(f'{name} {count:,}' for name, count in counts.items())} answers."
    few = few_answers({"target": counts["target"]})
    return f"{text} Warning: {few}." if few else text


def _step_cells(trace: Rows, step: object, loss: float) -> list[str]:
    """What a step accepted: of several masks the one with the smallest factor."""
    where = {"step": step, "aim": "walk", "outcome": "accepted"}
    sizes = trace.where("weights_removed", **where)
    if not sizes:
        return [f"{step}", "none accepted", "", f"{loss:.3f}", ""]
    accepted = min(sizes, key=lambda row: float(row.labels["factor"]))
    factor = float(accepted.labels["factor"])
    rises = trace.where("protected_rise", **where, factor=accepted.labels["factor"])
    largest = max((row.mean for row in rises), default=0.0)
    return [f"{step}", f"{accepted.mean:,.0f}", f"{factor:.3g}", f"{loss:.3f}", f"{largest:+.3f}"]


def _of_mask(rows: Rows, mask: WeightMask) -> tuple[Rows, Rows]:
    """The held-out rows of the unpruned model, and those under the mask."""
    held_out = Rows(row for row in rows if row.labels.get("split", "heldout") == "heldout")
    before = held_out.where(mask="none")
    under = Rows(row for row in held_out if row.labels.get("mask") != "none")

    # A study has figures of many masks. Those under one carry the same labels as its size.
    sizes = under.where("weights_removed")
    if sizes:
        of_size = [row for row in sizes.where(mask="circuit") if row.mean == mask.n_removed]
        under = held_out.where("", **of_size[0].labels) if of_size else Rows()
    if not under:
        raise ValueError(
            f"rows: no held-out figures of a mask of {plural(mask.n_removed, 'weight')}; "
            "give those of model.measure(mask=mask), or of the study that found it"
        )
    return before, under


def _held_out_table(rows: Rows, mask: WeightMask) -> str:
    before, under = _of_mask(rows, mask)
    head = ["held-out figure", "unpruned", "without these weights"]
    lines = []
    for metric in under.metrics:
        if metric == "weights_removed":
            continue
        unpruned = before.where(metric)
        left = f"{unpruned[0]:.3g}" if unpruned else ""
        lines.append([metric, left, f"{under.where(metric)[0]:.3g}"])
    return "Means with 95 % intervals; losses in nats per token.\n\n" + markdown_table(head, lines)


def _place_table(mask: WeightMask) -> str:
    """The mask's weights by layer and kind of matrix."""
    counts: dict[int, dict[str, int]] = {}
    present = set()
    for name, count in mask.counts.items():
        layer, kind = place_of(name)
        present.add(kind)
        of_layer = counts.setdefault(layer, {})
        of_layer[kind] = of_layer.get(kind, 0) + count
    kinds = [kind for kind in KINDS if kind in present]
    lines = []
    for layer in sorted(counts):
        numbers = [f"{counts[layer].get(kind, 0):,}" for kind in kinds]
        lines.append([str(layer), *numbers])
    return markdown_table(["layer", *kinds], lines)
