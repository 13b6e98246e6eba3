"""Files of requests in published formats: their rows, with our names for the columns."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from harmcircuits.display import listed, nearest, plural

COLUMNS = ("prompt", "completion", "category", "group", "label")

# Format -> our field -> its columns, whose texts are joined.
FORMATS: dict[str, dict[str, tuple[str, ...]]] = {
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
# HarmBench's own attacks write a context and its request in this way.
SEPARATORS = {"HarmBench": "\n\n---\n\n"}


class RequestTable(NamedTuple):
    """The rows of a file with our field names, and how the file was read."""

    texts: list[dict[str, str]]
    shape: str
    n_left_out: int


def rows_of(source: Any) -> list[Any] | None:
    """The rows of a file, dataset, DataFrame or list of dicts; None for anything else."""
    if isinstance(source, str | Path):
        return _stored_rows(str(source))
    if hasattr(source, "columns"):  # a DataFrame, whose iterator gives names of columns
        return source.to_dict("records")
    if hasattr(source, "column_names"):
        return list(source)
    is_table = isinstance(source, list | tuple) and source and isinstance(source[0], Mapping)
    return list(source) if is_table else None


def _stored_rows(source: str) -> list[Any]:
    path = Path(source)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        return _dataset_rows(source)
    try:
        return reader(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{source}: cannot be read as {path.suffix}, UTF-8 ({error})") from None


def request_table(
    rows: Iterable[Any],
    origin: str,
    columns: Mapping[str, str],
) -> RequestTable:
    """The requests of rows, each a text or an object with columns; repeated rows once."""
    table = [row if isinstance(row, Mapping) else {"prompt": row} for row in rows]
    names = list(dict.fromkeys(chain.from_iterable(table)))
    file_format, sources = _sources(origin, names, columns)
    separator = SEPARATORS.get(file_format, "\n\n")

    notes: Counter[str] = Counter()
    texts = {}
    for number, row in enumerate(table, start=1):
        try:
            fields = _fields(row, sources, separator, notes)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{origin}, row {number}: {error}") from None
        texts.setdefault(tuple(fields.items()), fields)

    n_left_out = len(table) - len(texts)
    counts = {"that repeat another left out": n_left_out, **notes}
    shape = [f"{origin}: {_origins(file_format, sources)}", plural(len(texts), "request")]
    shape += [f"{count:,} {note}" for note, count in counts.items() if count]
    return RequestTable(list(texts.values()), "; ".join(shape), n_left_out)


def _origins(file_format: str, sources: Mapping[str, tuple[str, ...]]) -> str:
    """The format, and the columns of each field, for people."""
    fields = []
    for name, source in sources.items():
        fields.append(name if source == (name,) else f"{name} from {' + '.join(source)}")
    prefix = f"{file_format}: " if file_format else ""
    return prefix + ", ".join(fields)


def _sources(
    origin: str,
    names: list[str],
    columns: Mapping[str, str],
) -> tuple[str, dict[str, tuple[str, ...]]]:
    """The format of a file with columns of these names, and the columns of each field."""
    file_format = _format(origin, names, columns)
    # A column that the caller names comes first, then one of the field's own name.
    sources = dict(FORMATS[file_format])
    sources |= {name: (name,) for name in names}
    sources |= {field: (column,) for field, column in columns.items()}
    present = {}
    for field in COLUMNS:
        if field in sources:
            present[field] = tuple(name for name in sources[field] if name in names)
    return file_format, present


def _format(origin: str, names: list[str], columns: Mapping[str, str]) -> str:
    """The first format whose columns are all there; none where the caller names the prompts."""
    for field, column in columns.items():
        if field not in COLUMNS or column not in names:
            raise ValueError(
                f"{origin}: columns={{{field!r}: {column!r}}}; expected one of {listed(COLUMNS)} "
                f"and a column of the file ({nearest(column, names)})"
            )
    if "prompt" in columns:
        return ""
    for file_format, sources in FORMATS.items():
        needed = set(chain.from_iterable(sources.values())) - OPTIONAL
        if needed <= set(names):
            return file_format
    raise ValueError(
        f"{origin}: which column holds the requests? It has "
        f"{listed(names, limit=20) or 'no rows'}; name the column by "
        "columns={'prompt': 'NAME'}"
    )


def _fields(
    row: Mapping[str, Any],
    sources: Mapping[str, tuple[str, ...]],
    separator: str,
    notes: Counter[str],
) -> dict[str, str]:
    """A row with our field names."""
    fields = {}
    for field, names in sources.items():
        values = [row.get(name) for name in names]
        # An empty cell of a table is NaN, which is not equal to itself.
        texts = [str(value) for value in values if value is not None and value == value]
        fields[field] = separator.join(filter(None, texts))

    messages = row.get(sources["prompt"][0])
    if isinstance(messages, list):
        fields |= _exchange(messages, notes)
    if not fields["prompt"].strip():
        raise ValueError(f"no {' + '.join(sources['prompt'])}; each row needs a prompt")
    return fields


def _exchange(messages: list[Any], notes: Counter[str]) -> dict[str, str]:
    """The request of a chat, and its answer if there is one."""
    turns = [message for message in messages if message["role"] != "system"]
    notes["system turns left out"] += len(messages) - len(turns)
    roles = [turn["role"] for turn in turns]
    if roles not in (["user"], ["user", "assistant"]):
        raise ValueError(
            f"turns of {listed(roles) or 'nobody'}; expected one turn of the user, and the "
            "assistant's answer or none: the model would not see earlier turns"
        )
    contents = [turn["content"] for turn in turns]
    return dict(zip(("prompt", "completion"), contents, strict=False))


# Formats


def _json(path: Path) -> list[Any]:
    """The items of an array, or of lines with an object or a text each."""
    text = path.read_text(encoding="utf-8-sig")
    try:
        content = json.loads(text)
    except ValueError:
        # Not `splitlines`: it also splits at characters that a prompt may hold.
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    return content if isinstance(content, list) else [content]


def _csv(path: Path) -> list[Any]:
    import pandas

    header = path.read_text(encoding="utf-8-sig").partition("\n")[0]
    if not header:
        return []
    # The separator of a spreadsheet depends on the decimal mark of its country.
    separator = max(",;\t", key=header.count)
    table = pandas.read_csv(
        path, sep=separator, dtype=str, keep_default_na=False, encoding="utf-8-sig"
    )
    if not isinstance(table.index, pandas.RangeIndex):  # pandas makes it of the extra cell
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
    # `save_to_disk` writes one dataset, or a folder for each split; `load_dataset` reads neither.
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
