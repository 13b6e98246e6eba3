"""Files of requests as people have them: their rows, and which column holds what."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harmcircuits.display import listed, nearest, plural

COLUMNS = ("prompt", "completion", "category", "group", "label")

# The columns of known files by our own names, the first that fit; several are joined.
KNOWN: dict[str, dict[str, tuple[str, ...]]] = {
    "XSTest": {"prompt": ("prompt",), "category": ("type",), "label": ("label",)},
    "": {"prompt": ("prompt",)},
    "AdvBench": {"prompt": ("goal",), "completion": ("target",)},
    "HarmBench": {"prompt": ("ContextString", "Behavior"), "category": ("SemanticCategory",)},
    "JailbreakBench": {
        "prompt": ("Goal",),
        "completion": ("Target",),
        "category": ("Category",),
    },
    "StrongREJECT": {"prompt": ("forbidden_prompt",), "category": ("category",)},
    "Alpaca": {"prompt": ("instruction", "input"), "completion": ("output",)},
    "chat messages": {"prompt": ("messages",)},
}
OPTIONAL = {"input"}
# HarmBench as its own attacks write a request that has a context.
BETWEEN = {"HarmBench": "\n\n---\n\n"}


@dataclass(frozen=True)
class Requests:
    """The texts of a file by our own names, and how they were read."""

    texts: list[dict[str, str]]
    shape: str
    n_left_out: int = 0


def read_requests(source: str | Path, columns: Mapping[str, str] | None = None) -> Requests:
    """The requests of a file or dataset."""
    path = Path(source)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        return requests_of(_dataset_rows(str(source)), str(source), columns)
    try:
        rows = reader(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{source}: cannot be read as {path.suffix}, UTF-8 ({error})") from None
    return requests_of(rows, str(source), columns)


def given_rows(source: Any) -> list[Any] | None:
    """The rows of a list of dicts, a loaded dataset or a DataFrame; None for anything else."""
    if hasattr(source, "columns"):  # a DataFrame, which otherwise gives its columns' names
        source = source.to_dict("records")
    is_table = isinstance(source, list | tuple) and source and isinstance(source[0], Mapping)
    return list(source) if is_table or hasattr(source, "column_names") else None


def requests_of(
    rows: Iterable[Any], origin: str, columns: Mapping[str, str] | None = None
) -> Requests:
    """The requests of rows, each an object with columns or a text; repeated ones once."""
    table = [row if isinstance(row, Mapping) else {"prompt": row} for row in rows]
    names = list(dict.fromkeys(name for row in table for name in row))
    shape, known = _columns(origin, names, dict(columns or {}))

    notes: Counter[str] = Counter()
    texts = {}
    for number, row in enumerate(table, start=1):
        try:
            of_row = _texts(row, known, BETWEEN.get(shape, "\n\n"), notes)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{origin}, row {number}: {error}") from None
        texts.setdefault(tuple(of_row.items()), of_row)

    n_left_out = len(table) - len(texts)
    sources = []
    for ours, theirs in known.items():
        sources.append(ours if theirs == (ours,) else f"{ours} from {' + '.join(theirs)}")
    parts = [f"{shape}: {', '.join(sources)}" if shape else ", ".join(sources)]
    parts.append(plural(len(texts), "request"))
    if n_left_out:
        parts.append(f"{n_left_out:,} that repeat another left out")
    parts += [f"{number:,} {note}" for note, number in notes.items()]
    return Requests([*texts.values()], f"{origin}: {'; '.join(parts)}", n_left_out)


def _columns(
    origin: str, names: list[str], chosen: dict[str, str]
) -> tuple[str, dict[str, tuple[str, ...]]]:
    """What a file with these columns is known as, and which of them holds what."""
    for ours, theirs in chosen.items():
        if ours not in COLUMNS or theirs not in names:
            raise ValueError(
                f"{origin}: columns={{{ours!r}: {theirs!r}}}; expected one of {listed(COLUMNS)} "
                f"and a column of the file ({nearest(theirs, names)})"
            )
    fitting = [""] if "prompt" in chosen else []
    for shape, known in KNOWN.items():
        needed = {name for theirs in known.values() for name in theirs} - OPTIONAL
        if needed <= set(names):
            fitting.append(shape)
    if not fitting:
        raise ValueError(
            f"{origin}: which column holds the requests? It has "
            f"{listed(names, limit=20) or 'no rows'}; say which by columns={{'prompt': 'NAME'}}"
        )
    columns = dict(KNOWN[fitting[0]])
    columns |= {ours: (ours,) for ours in COLUMNS if ours in names}
    columns |= {ours: (theirs,) for ours, theirs in chosen.items()}
    present = {}
    for ours in COLUMNS:
        if ours in columns:
            present[ours] = tuple(name for name in columns[ours] if name in names)
    return fitting[0], present


def _texts(
    row: Mapping[str, Any],
    columns: Mapping[str, tuple[str, ...]],
    between: str,
    notes: Counter[str],
) -> dict[str, str]:
    """A row by our own names."""
    stored = row.get(columns["prompt"][0])
    exchange = _exchange(stored, notes) if isinstance(stored, list) else {}
    texts = {}
    for ours, theirs in columns.items():
        values = [row.get(name) for name in theirs]
        # NaN, which tables have for nothing, is not equal to itself.
        parts = [str(value) for value in values if value is not None and value == value]
        texts[ours] = exchange.get(ours, between.join(filter(None, parts)))
    texts |= exchange
    if not texts["prompt"].strip():
        raise ValueError(f"no {' + '.join(columns['prompt'])}; each row needs a prompt")
    return texts


def _exchange(turns: list[Any], notes: Counter[str]) -> dict[str, str]:
    """The request of a chat and the answer to it, if there is one."""
    exchange = []
    for turn in turns:
        if turn["role"] == "system":
            notes["system turns left out"] += 1
        else:
            exchange.append((turn["role"], turn["content"]))
    roles = [role for role, _ in exchange]
    if roles not in (["user"], ["user", "assistant"]):
        raise ValueError(
            f"turns of {listed(roles) or 'nobody'}; expected one of the user, and the assistant's "
            "answer or none: earlier turns would not be put to the model"
        )
    contents = [content for _, content in exchange]
    return dict(zip(("prompt", "completion"), contents, strict=False))


# Formats


def _json(path: Path) -> list[Any]:
    """The items of an array, or an object or a text a line."""
    text = path.read_text(encoding="utf-8-sig")
    try:
        stored = json.loads(text)
    except ValueError:
        # Not by `splitlines`, which also splits at characters that a prompt may hold.
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    return stored if isinstance(stored, list) else [stored]


def _csv(path: Path) -> list[Any]:
    import pandas

    header = path.read_text(encoding="utf-8-sig").partition("\n")[0]
    if not header:
        return []
    # A spreadsheet separates by what its country does not use as a decimal mark.
    separator = max(",;\t", key=header.count)
    table = pandas.read_csv(
        path, sep=separator, dtype=str, keep_default_na=False, encoding="utf-8-sig"
    )
    if not isinstance(table.index, pandas.RangeIndex):  # what pandas makes of one cell more
        raise ValueError("a row has more cells than the header has columns")
    return table.to_dict("records")


def _plain_lines(path: Path) -> list[Any]:
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    return [line.strip() for line in lines if line.strip()]


def _parquet(path: Path) -> list[Any]:
    from pyarrow.parquet import read_table

    return read_table(path).to_pylist()


READERS: dict[str, Callable[[Path], list[Any]]] = {
    ".jsonl": _json,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".txt": _plain_lines,
    ".parquet": _parquet,
}


def _dataset_rows(source: str) -> list[Any]:
    """The rows of "NAME", "NAME:SPLIT" or "NAME:CONFIG:SPLIT": a hub id or a folder."""
    # Imported here: it takes seconds.
    from datasets import load_dataset, load_from_disk

    # A split may hold a colon of its own: "train[10:20]".
    name, *parts = re.split(r":(?![^\[]*\])", source)
    split = parts.pop() if parts else "train"
    # What `save_to_disk` wrote is opened in another way: a set, or one folder for each split.
    for folder in (Path(name), Path(name, split)):
        if (folder / "state.json").is_file():
            return list(load_from_disk(str(folder)))
    try:
        return list(load_dataset(name, *parts, split=split))
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        raise ValueError(
            f"{source}: neither a file of requests ({listed(READERS)}) nor a dataset that "
            f"can be opened; expected NAME, NAME:SPLIT or NAME:CONFIG:SPLIT ({error})"
        ) from None
