"""Measurements as rows: the only thing that tables and figures are drawn from."""

import json
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from math import sqrt
from pathlib import Path
from statistics import fmean
from typing import Any

Z = 1.959964  # two-sided 95 % of a normal
LIBRARIES = ("harmcircuits", "torch", "transformers", "transformer-lens", "circuitsvis", "plotly")


@dataclass(frozen=True)
class Measurement:
    """One figure: a mean over `n` examples with its 95 % interval [`low`, `high`], and what it was measured on.

    A figure that is exact (a count) has `low` = `mean` = `high`. `labels` say the model, mask, attack, split and settings.
    """

    metric: str
    labels: Mapping[str, str | int | float]
    mean: float
    low: float
    high: float
    n: int = 1

    def __str__(self) -> str:
        return f"{self.metric} {self.mean:.3g} [{self.low:.3g}, {self.high:.3g}]"


@dataclass(frozen=True)
class Manifest:
    """What made a set of rows: command, settings, versions and machine."""

    settings: Mapping[str, Any]
    command: tuple[str, ...] = field(default_factory=lambda: ("harmcircuits", *sys.argv[1:]))
    python: str = platform.python_version()
    machine: str = f"{platform.system()} {platform.machine()}"
    versions: Mapping[str, str] = field(default_factory=lambda: {name: version(name) for name in LIBRARIES})

    def save(self, path: str | Path) -> None:
        """Write this manifest as indented JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a share among n."""
    centre = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return centre - half, centre + half


def append_rows(path: str | Path, rows: Iterable[Measurement]) -> None:
    """Add rows to a JSON Lines file, one object a line, in one write."""
    with Path(path).open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(asdict(row)) + "\n" for row in rows))


def read_rows(path: str | Path) -> list[Measurement]:
    """The rows of a JSON Lines file written by `append_rows`. Raises ValueError for a missing file or a foreign row."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file; expected the rows.jsonl of a study")
    try:
        return [Measurement(**json.loads(line)) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a file of measurements ({error})") from None


def select(rows: Iterable[Measurement], metric: str = "", **labels: str | int | float) -> list[Measurement]:
    """The rows of this metric that carry all these labels, in order."""
    wanted = labels.items()
    return [row for row in rows if metric in ("", row.metric) and wanted <= dict(row.labels).items()]


def pooled(rows: Sequence[Measurement], over: str) -> list[Measurement]:
    """One row for all rows that differ only in the label `over`: their mean, with the widest ends of their intervals."""
    together: dict[tuple, list[Measurement]] = {}
    for row in rows:
        labels = {key: value for key, value in row.labels.items() if key != over}
        together.setdefault((row.metric, *sorted(labels.items(), key=str)), []).append(row)
    found = []
    for same in together.values():
        labels = {key: value for key, value in same[0].labels.items() if key != over}
        low, high = min(row.low for row in same), max(row.high for row in same)
        mean = fmean(row.mean for row in same)
        found.append(Measurement(same[0].metric, labels, mean, low, high, sum(row.n for row in same)))
    return found


def grouped(rows: Iterable[Measurement], names: Sequence[str]) -> list[list[Measurement]]:
    """The rows of every combination of these labels in turn, as they come; raises KeyError for a row without them."""
    together: dict[tuple, list[Measurement]] = {}
    for row in rows:
        together.setdefault(tuple(row.labels[name] for name in names), []).append(row)
    return list(together.values())


def by_model(rows: Sequence[Measurement]) -> dict[str, list[Measurement]]:
    """The rows of each model, by its name; of a ladder that is not the shipped one, by "NAME of LADDER"."""
    keys = dict.fromkeys((row.labels["model"], row.labels["ladder"]) for row in rows)
    names = {(model, ladder): str(model) if ladder == "shipped" else f"{model} of {ladder}" for model, ladder in keys}
    return {name: select(rows, model=model, ladder=ladder) for (model, ladder), name in names.items()}


def resumed(folder: str | Path, settings: Mapping[str, str | int | float]) -> list[Measurement]:
    """The rows of an unfinished run in this folder, none in a new one; makes the folder and its manifest.

    Raises ValueError for a folder that holds rows measured under other settings.
    """
    folder = Path(folder)
    manifest, rows = folder / "manifest.json", folder / "rows.jsonl"
    if manifest.is_file() and (found := json.loads(manifest.read_text(encoding="utf-8"))["settings"]) != dict(settings):
        raise ValueError(f"{folder} holds a run with {found}, not {dict(settings)}; give another folder or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    Manifest(settings).save(manifest)
    return read_rows(rows) if rows.is_file() else []
