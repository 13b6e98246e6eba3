"""Files of requests as people have them: their rows, and which column holds what."""

import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harmcircuits.display import listed, nearest, plural
from harmcircuits.storage import read_text

COLUMNS = ("prompt", "completion", "category", "group", "label")
REMEDY = "columns={'prompt': 'NAME'}"

Row = Any  # as it is stored: a mapping, if the file is well made
Placed = tuple[str, Row]  # with its place in the file, for error messages
Texts = dict[str, str]  # by our own names


@dataclass(frozen=True)
class Shape:
    """Which column of a file holds what."""

    name: str
    columns: Mapping[str, tuple[str, ...]]
    optional: tuple[str, ...] = ()
    between: str = "\n\n"

    def fits(self, names: Iterable[str]) -> bool:
        """Whether a file with these columns has this shape."""
        names = set(names)
        for ours, theirs in self.columns.items():
            needed = set(theirs) - set(self.optional)
            is_ours = ours in names and ours not in theirs
            if is_ours or not needed <= names:
                return False
        return True

    def within(self, names: Iterable[str]) -> "Shape":
        """The shape of a file with these columns: without those it lacks, with ours besides."""
        names = list(names)
        columns: dict[str, tuple[str, ...]] = {}
        for ours in COLUMNS:
            if ours in names:
                columns[ours] = (ours,)
        for ours, theirs in self.columns.items():
            columns[ours] = tuple(name for name in theirs if name in names)
        in_order = {name: columns[name] for name in COLUMNS if name in columns}
        return Shape(self.name, in_order, between=self.between)

    @property
    def text(self) -> str:
        """Which of our columns comes from where, in a line."""
        parts = []
        for ours, theirs in self.columns.items():
            parts.append(ours if theirs == (ours,) else f"{ours} from {' + '.join(theirs)}")
        columns = ", ".join(parts)
        return f"{self.name}: {columns}" if self.name else columns


REPEATED = "that repeat another left out"

OWN = Shape("", {"prompt": ("prompt",)})
SHAPES = (
    Shape("AdvBench", {"prompt": ("goal",), "completion": ("target",)}),
    Shape(
        "HarmBench",
        {"prompt": ("ContextString", "Behavior"), "category": ("SemanticCategory",)},
        # As its own attacks write a request that has a context.
        between="\n\n---\n\n",
    ),
    Shape(
        "JailbreakBench",
        {"prompt": ("Goal",), "completion": ("Target",), "category": ("Category",)},
    ),
    Shape("StrongREJECT", {"prompt": ("forbidden_prompt",), "category": ("category",)}),
    Shape("XSTest", {"prompt": ("prompt",), "category": ("type",), "label": ("label",)}),
    Shape(
        "Alpaca",
        {"prompt": ("instruction", "input"), "completion": ("output",)},
        optional=("input",),
    ),
    Shape("chat messages", {"prompt": ("messages",)}),
    OWN,
)


@dataclass(frozen=True)
class Requests:
    """The texts of a file by our own names, and how they were read."""

    texts: list[Texts]
    shape: str
    n_left_out: int = 0


@dataclass
class _Table:
    """Rows as they are stored, and what is noticed while they are read."""

    origin: str
    rows: list[Placed]
    notes: dict[str, int] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The columns, in the order in which they are met."""
        names: dict[str, None] = {}
        for _, row in self.rows:
            names |= dict.fromkeys(row)
        return list(names)

    def note(self, text: str) -> None:
        self.notes[text] = self.notes.get(text, 0) + 1


def read_requests(source: str | Path, columns: Mapping[str, str] | None = None) -> Requests:
    """The requests of a file or dataset."""
    suffix = Path(source).suffix.lower()
    if suffix in _READERS:
        rows = _READERS[suffix](_existing(source))
    elif Path(source).is_file():
        raise ValueError(
            f"{source}: no format of requests; expected {listed(_READERS)}, or a dataset"
        )
    else:
        name, config, split = _dataset_parts(str(source))
        try:
            rows = _dataset_rows(name, config, split)
        except (OSError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"{source}: neither a file of requests ({listed(_READERS)}) nor a dataset that "
                f"can be opened; expected NAME, NAME:SPLIT or NAME:CONFIG:SPLIT ({error})"
            ) from None
    return requests_of(rows, str(source), columns)


def requests_of(
    rows: Iterable[Placed], origin: str, columns: Mapping[str, str] | None = None
) -> Requests:
    """The requests of rows."""
    table = _Table(origin, [(place, _as_row(place, row)) for place, row in rows])
    if not table.rows:
        raise ValueError(f"{origin}: no rows; expected at least one prompt")
    shape = _shape(table, dict(columns or {}))
    distinct: dict[tuple[str, ...], Texts] = {}
    for place, row in table.rows:
        texts = _texts(table, shape, place, row)
        key = tuple(texts.get(name, "") for name in COLUMNS)
        if key in distinct:
            table.note(REPEATED)
        distinct.setdefault(key, texts)

    notes = [f"{number:,} {note}" for note, number in table.notes.items()]
    summary = "; ".join([shape.text, plural(len(distinct), "request"), *notes])
    n_left_out = table.notes.get(REPEATED, 0)
    return Requests(list(distinct.values()), f"{origin}: {summary}", n_left_out)


def given_rows(source: Any) -> list[Placed] | None:
    """The rows of a list of dicts, a loaded dataset or a DataFrame; None for anything else."""
    if hasattr(source, "to_dict") and hasattr(source, "columns"):
        source = source.to_dict("records")  # a DataFrame, which otherwise gives its columns' names
    if hasattr(source, "column_names") or isinstance(source, list | tuple):
        rows = list(source)
        if rows and all(isinstance(row, Mapping) for row in rows):
            return [(f"given row {number}", row) for number, row in enumerate(rows, start=1)]
    return None


def _shape(table: _Table, columns: dict[str, str]) -> Shape:
    """The shape of the rows: the columns that were given, and those that are recognised."""
    names = table.names
    for ours, theirs in columns.items():
        if ours not in COLUMNS:
            raise ValueError(f"columns: {ours!r} is no column; {nearest(ours, COLUMNS)}")
        if theirs not in names:
            raise ValueError(f"{table.origin}: no column {theirs!r}; {nearest(theirs, names)}")
    given = {ours: (theirs,) for ours, theirs in columns.items()}
    if "prompt" in given:
        return Shape("", given).within(names)
    for shape in SHAPES:
        if shape.fits(names):
            return Shape(
                shape.name,
                {**shape.columns, **given},
                between=shape.between,
            ).within(names)
    raise ValueError(
        f"{table.origin}: which column holds the requests? It has {listed(names, most=20)}; "
        f"say which by {REMEDY}"
    )


def _as_row(place: str, row: Row) -> Mapping[str, Any]:
    if isinstance(row, str):
        return {"prompt": row}
    if not isinstance(row, Mapping):
        kind = type(row).__name__
        raise ValueError(f"{place}: {kind}; expected an object with the columns, or a text")
    return row


def _texts(table: _Table, shape: Shape, place: str, row: Mapping[str, Any]) -> Texts:
    """A row by our own names."""
    stored = row.get(shape.columns["prompt"][0])
    texts = _last_exchange(table, place, stored) if isinstance(stored, list) else {}
    for ours, theirs in shape.columns.items():
        if ours not in texts:
            parts = [_text(place, name, row.get(name), ours) for name in theirs]
            texts[ours] = shape.between.join(filter(None, parts))
    if not texts["prompt"].strip():
        names = " + ".join(f'"{name}"' for name in shape.columns["prompt"])
        raise ValueError(f"{place}: no {names}; each row needs a prompt of text that is not empty")
    return texts


def _text(place: str, name: str, value: Any, ours: str) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    # A number may name a group or a category, but a request that is one is a slip.
    is_text = isinstance(value, str) or (ours != "prompt" and isinstance(value, int | float))
    if not is_text:
        raise ValueError(f"{place}: {name!r} is {type(value).__name__}; expected text")
    return str(value)


def _last_exchange(table: _Table, place: str, turns: list[Any]) -> Texts:
    """The last request of a chat and the answer to it."""
    exchange = []
    for turn in turns:
        role, text = _role_and_text(place, turn)
        if role == "system":
            table.note("system turns left out")
        else:
            exchange.append((role, text))
    roles = [role for role, _ in exchange]
    if roles not in (["user"], ["user", "assistant"]):
        raise ValueError(
            f"{place}: turns of {listed(roles) or 'nobody'}; expected one of the user, and the "
            "assistant's answer to it or none: earlier turns would not be put to the model"
        )
    texts = [text for _, text in exchange]
    return dict(zip(("prompt", "completion"), texts, strict=False))


def _role_and_text(place: str, turn: Any) -> tuple[str, str]:
    role = turn.get("role") if isinstance(turn, Mapping) else None
    text = turn.get("content") if isinstance(turn, Mapping) else None
    if not isinstance(role, str) or not isinstance(text, str):
        raise ValueError(
            f'{place}: a turn of the chat is not {{"role": text, "content": text}}, as expected'
        )
    return role, text


# Formats


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        kind = "a folder, not a file" if path.is_dir() else "no such file"
        raise ValueError(f"{path}: {kind}; give the path of an existing prompt file")
    return path


def _decoded(path: Path) -> str:
    return read_text(path, "an existing prompt file")


def _lines(path: Path) -> list[tuple[str, str]]:
    """The lines that are not blank, each with its place."""
    # Not by `splitlines`, which also splits at characters that a prompt may hold.
    lines = enumerate(_decoded(path).split("\n"), start=1)
    return [(f"{path}, line {number}", line.strip()) for number, line in lines if line.strip()]


def _json_lines(path: Path) -> list[Placed]:
    rows = []
    for place, line in _lines(path):
        try:
            rows.append((place, json.loads(line)))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{place}: not JSON ({error.msg}); expected one object a line, "
                "or one array in a file that ends in .json"
            ) from None
    return rows


def _json(path: Path) -> list[Placed]:
    """An array, or a file of lines that is called .json."""
    text = _decoded(path)
    try:
        stored = json.loads(text)
    except json.JSONDecodeError as error:
        if not text.lstrip().startswith("["):
            return _json_lines(path)
        raise ValueError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from None
    rows = stored if isinstance(stored, list) else [stored]
    return [(f"{path}, item {number}", row) for number, row in enumerate(rows, start=1)]


def _csv(path: Path) -> list[Placed]:
    text = _decoded(path)
    header = text.partition("\n")[0]
    # A spreadsheet separates by what its country does not use as a decimal mark.
    delimiter = max(",;\t", key=header.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[Placed] = []
    try:
        for number, row in enumerate(reader, start=1):
            place = f"{path}, row {number}"
            if None in row:
                raise ValueError(
                    f"{place}: more cells than the header has columns; "
                    "put text with commas in it into quotation marks"
                )
            rows.append((place, row))
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: not CSV ({error})") from None
    return rows


def _plain_lines(path: Path) -> list[Placed]:
    return list(_lines(path))


def _parquet(path: Path) -> list[Placed]:
    # Imported here: only this format needs it.
    from pyarrow import ArrowException
    from pyarrow.parquet import read_table

    try:
        rows = read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read as Parquet ({error})") from None
    return [(f"{path}, row {number}", row) for number, row in enumerate(rows, start=1)]


_READERS: dict[str, Callable[[Path], list[Placed]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".txt": _plain_lines,
    ".parquet": _parquet,
}


def _dataset_parts(source: str) -> tuple[str, str | None, str]:
    """Name, configuration and split of "NAME", "NAME:SPLIT" or "NAME:CONFIG:SPLIT"."""
    # A split may hold a colon of its own: "train[10:20]".
    parts = re.split(r":(?![^\[]*\])", source)
    if len(parts) > 3:
        raise ValueError(f"{source}: expected NAME, NAME:SPLIT or NAME:CONFIG:SPLIT")
    name, config, split = parts[0], None, "train"
    if len(parts) > 1:
        split = parts[-1]
    if len(parts) > 2:
        config = parts[1]
    return name, config, split


def _dataset_rows(name: str, config: str | None, split: str) -> list[Placed]:
    # Imported here: it takes seconds.
    from datasets import load_dataset, load_from_disk

    # What `save_to_disk` wrote is opened in another way: a set, or one folder for each split.
    saved = Path(name) if split == "train" else Path(name, split)
    for folder in (saved, Path(name, split)):
        if (folder / "state.json").is_file():
            rows = load_from_disk(str(folder))
            break
    else:
        rows = load_dataset(name, config, split=split)
    return [(f"{name}[{split}], row {number}", dict(row)) for number, row in enumerate(rows)]
