"""A study under way: its model and settings, every row and mask so far, and its folder."""

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tqdm.auto import tqdm

from harmcircuits.behaviours.model import Model
from harmcircuits.behaviours.outcomes import Calibration
from harmcircuits.circuits.masks import WeightMask
from harmcircuits.display import listed, plural
from harmcircuits.measurements import Label, Measurement, Rows, write_manifest
from harmcircuits.storage import read_json, refuse_filled
from harmcircuits.studies.controls import Unpruned
from harmcircuits.studies.settings import StudySettings
from harmcircuits.studies.summary import Terms

# In the folder of a study. While it is under way WALKS keeps scores and searches.
ROWS_FILE, MANIFEST, PAGE, MASKS, WALKS = (
    "rows.jsonl", "manifest.json", "report.html", "masks", "walks",
)  # fmt: skip
UNNEEDED = ".walks"  # what is left to remove of a finished study

Item = TypeVar("Item")


@dataclass(frozen=True)
class Point:
    """One mask of the grid."""

    mask: WeightMask
    labels: dict[str, Label]
    rows: Rows = field(repr=False)

    def mean(self, metric: str) -> float:
        """The point's figure for this metric."""
        return self.rows.one(metric).mean


@dataclass(repr=False)
class Study:
    """A run, and everything it measured so far."""

    model: Model
    settings: StudySettings
    out: Path | None = None
    progress: bool = False
    max_memory: int | None = None
    calibrations: dict[str, Calibration] = field(default_factory=dict)
    protected: tuple[str, ...] = ()
    prefer: str = ""  # what takes the target's place; empty for nothing
    unpruned: Unpruned = field(init=False)  # while it is under way
    rows: Rows = field(default_factory=Rows)
    masks: dict[str, WeightMask] = field(default_factory=dict)
    chosen: Point | None = None

    def __repr__(self) -> str:
        chosen = f", chose {self.chosen.mask}" if self.chosen else ", chose no mask"
        removed = f"{self.settings.target} of {self.model.name}"
        return f"Study({removed}: {plural(len(self.rows), 'row')}{chosen})"

    @property
    def terms(self) -> Terms:
        """What its rows are called."""
        settings = self.settings
        return Terms.of(self.model, settings.target, settings.contrast, self.protected)

    def kept_in(self, name: str) -> Path | None:
        """Where scores or a search are kept while the study is under way; None in memory."""
        return self.out / WALKS / name if self.out is not None else None

    def find_circuits(
        self, name: str, sizes: Sequence[float], protect: Sequence[str], **options: Any
    ) -> list[WeightMask]:
        """The target's circuits of these sizes by one search."""
        return self.model.find_circuit(
            self.settings.target,
            size=list(sizes),
            protect=protect,
            budget={behaviour: self.settings.budget_of(behaviour) for behaviour in protect},
            prefer=self.prefer,
            calibrations=self.calibrations,
            progress=self.progress,
            folder=self.kept_in(name),
            max_memory=self.max_memory,
            **{"steps": self.settings.steps, **options},
        )

    def add(self, rows: Iterable[Measurement]) -> None:
        """Keep rows and write them out at once."""
        # At once: an interrupted study leaves what it measured.
        rows = Rows(rows)
        self.rows += rows
        if self.out is not None:
            rows.append_to(self.out / ROWS_FILE)

    def note(self, metric: str, value: float, **labels: Label) -> None:
        """Keep one exact figure."""
        labels = {"model": self.model.name, **labels}
        self.add([Measurement.exact(metric, labels, value)])

    def keep(self, name: str, mask: WeightMask) -> None:
        """Keep a mask under the name of its file."""
        self.masks[name] = mask
        if self.out is not None:
            mask.save(self.out / MASKS / f"{name}.safetensors")

    def shown(self, items: Iterable[Item], name: str) -> Iterator[Item]:
        """The same items, with a bar that shows how many are done."""
        return iter(tqdm(items, desc=name, disable=not self.progress, leave=False))

    def begin(self, out: Path, *, resume: bool, force: bool) -> None:
        """Make the folder, or what an interrupted study left there, ready for rows."""
        refuse_study_folder(out, resume=resume, force=force)
        settings = {"model": self.model.name, **vars(self.settings), **self.model.details}
        if force:
            for name in (WALKS, UNNEEDED, MASKS):
                shutil.rmtree(out / name, ignore_errors=True)
            (out / PAGE).unlink(missing_ok=True)
        elif (out / WALKS).exists():
            before = read_json(out / MANIFEST, "the manifest of a study")["settings"]
            now = json.loads(json.dumps(settings))  # as they are in the file
            changed = [name for name in now if before.get(name) != now[name]]
            if changed:
                raise ValueError(
                    f"{out} holds an unfinished study with other settings ({listed(changed)}); "
                    "give another folder, or force=True to remove it first"
                )
        # The searches stay; what was measured is measured again.
        (out / ROWS_FILE).unlink(missing_ok=True)
        shutil.rmtree(out / WALKS / "scores", ignore_errors=True)
        write_manifest(out / MANIFEST, settings)
        (out / MASKS).mkdir(exist_ok=True)
        (out / WALKS).mkdir(exist_ok=True)  # last: from now on it is under way

    def finish(self) -> None:
        """Leave the scores and searches: from now on the folder holds a finished study."""
        del self.unpruned
        if self.out is not None:
            # By a new name first: killed while it removes them, the study is finished all the same.
            unneeded = (self.out / WALKS).rename(self.out / UNNEEDED)
            shutil.rmtree(unneeded)


def refuse_study_folder(out: Path, *, resume: bool, force: bool) -> None:
    """Raises ValueError for a folder with a study of which it was not said what becomes of it."""
    has_manifest = (out / MANIFEST).is_file()
    is_under_way = has_manifest and (out / WALKS).exists()
    is_finished = has_manifest and (out / ROWS_FILE).exists() and not is_under_way
    if not is_under_way and not is_finished:
        refuse_filled(out)
    if is_finished and not force:
        raise ValueError(
            f"{out} holds a finished study; give another folder, or force=True to remove it first"
        )
    if is_under_way and not resume and not force:
        raise ValueError(
            f"{out} holds an unfinished study; give resume=True to go on with it, "
            "force=True to remove it first, or another folder"
        )
