"""A study under way: its model and settings, its rows and masks so far, and its folder."""

import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from tqdm.auto import tqdm

from harmcircuits.behaviours.model import Model
from harmcircuits.behaviours.outcomes import Calibration
from harmcircuits.circuits.masks import WeightMask
from harmcircuits.display import listed, plural
from harmcircuits.measurements import Label, Labels, Measurement, Rows, write_manifest
from harmcircuits.storage import read_json, refuse_filled
from harmcircuits.studies.controls import UnprunedScores
from harmcircuits.studies.settings import StudySettings
from harmcircuits.studies.summary import Roles

# In the folder of a study
ROWS_FILE = "rows.jsonl"
MANIFEST = "manifest.json"
PAGE = "report.html"
MASKS = "masks"
WALKS = "walks"  # scores and searches; only there while the study is under way
UNNEEDED = ".walks"  # the same of a finished study, until it is removed

Element = TypeVar("Element")


@dataclass(frozen=True)
class GridPoint:
    """One mask of the grid."""

    mask: WeightMask
    labels: Labels
    rows: Rows = field(repr=False)

    def mean(self, metric: str) -> float:
        """The mask's figure for this metric."""
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
    prefer: str = ""  # the behaviour that replaces the target; empty for none
    unpruned: UnprunedScores = field(init=False)  # while the study is under way
    rows: Rows = field(default_factory=Rows)
    masks: dict[str, WeightMask] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)  # name of a mask -> its title in a table
    choice: GridPoint | None = None

    def __repr__(self) -> str:
        outcome = f", chose {self.choice.mask}" if self.choice else ", chose no mask"
        subject = f"{self.settings.target} of {self.model.name}"
        return f"Study({subject}: {plural(len(self.rows), 'row')}{outcome})"

    @property
    def roles(self) -> Roles:
        """The behaviours in their roles; ValueError for unknown ones and for a common metric."""
        settings = self.settings
        return Roles.of(self.model, settings.target, settings.contrast, self.protected)

    def walk_folder(self, name: str) -> Path | None:
        """The folder for scores or a search while the study is under way; None in memory."""
        return self.out / WALKS / name if self.out is not None else None

    def find_circuits(
        self, name: str, sizes: Sequence[float], protect: Sequence[str]
    ) -> list[WeightMask]:
        """The target's circuits of these sizes by one search."""
        return self.model.find_circuit(
            self.settings.target,
            size=list(sizes),
            steps=self.settings.steps,
            protect=protect,
            budget={behaviour: self.settings.budget_of(behaviour) for behaviour in protect},
            prefer=self.prefer,
            calibrations=self.calibrations,
            progress=self.progress,
            folder=self.walk_folder(name),
            max_memory=self.max_memory,
        )

    def add(self, rows: Iterable[Measurement]) -> None:
        """Add rows, and write them to the folder."""
        # At once: an interrupted study leaves everything it measured.
        rows = Rows(rows)
        self.rows += rows
        if self.out is not None:
            rows.append_to(self.out / ROWS_FILE)

    def add_figure(self, metric: str, value: float, **labels: Label) -> None:
        """Add a row with an exact figure."""
        labels = {"model": self.model.name, **labels}
        self.add([Measurement.exact(metric, labels, value)])

    def add_mask(self, name: str, mask: WeightMask) -> None:
        """Add a mask, and save it under this name."""
        self.masks[name] = mask
        if self.out is not None:
            mask.save(self.out / MASKS / f"{name}.safetensors")

    def with_progress(self, elements: Iterable[Element], name: str) -> Iterable[Element]:
        """The same elements, with a progress bar."""
        return tqdm(elements, desc=name, disable=not self.progress, leave=False)

    def begin(self, out: Path, *, resume: bool, force: bool) -> None:
        """Prepare the folder for rows; continue an unfinished study there."""
        refuse_study_folder(out, resume=resume, force=force)
        settings = {"model": self.model.name, **vars(self.settings), **self.model.details}
        if force:
            for name in (WALKS, UNNEEDED, MASKS):
                shutil.rmtree(out / name, ignore_errors=True)
            (out / PAGE).unlink(missing_ok=True)
        elif (out / WALKS).exists():
            refuse_changes(out, settings)
        # The searches stay; the study takes all measurements again.
        (out / ROWS_FILE).unlink(missing_ok=True)
        shutil.rmtree(out / WALKS / "scores", ignore_errors=True)
        write_manifest(out / MANIFEST, settings)
        (out / MASKS).mkdir(exist_ok=True)
        (out / WALKS).mkdir(exist_ok=True)  # last: its presence marks the study as under way

    def finish(self) -> None:
        """Drop the scores and searches: the folder then holds a finished study."""
        del self.unpruned
        if self.out is not None:
            # Renamed first: a study that is killed while it removes them is still finished.
            unneeded = (self.out / WALKS).rename(self.out / UNNEEDED)
            shutil.rmtree(unneeded)


def refuse_study_folder(out: Path, *, resume: bool, force: bool) -> None:
    """Refuse a folder that holds a study, unless resume or force is given."""
    has_manifest = (out / MANIFEST).is_file()
    if has_manifest and (out / WALKS).exists():
        if not resume and not force:
            raise ValueError(
                f"{out} holds an unfinished study; give resume=True to continue it, "
                "force=True to remove it first, or another folder"
            )
    elif has_manifest and (out / ROWS_FILE).exists():
        if not force:
            raise ValueError(
                f"{out} holds a finished study; give another folder, or force=True to remove it "
                "first"
            )
    else:
        refuse_filled(out)


def refuse_changes(out: Path, settings: dict[str, object]) -> None:
    """Refuse to continue an unfinished study with other settings."""
    manifest = read_json(out / MANIFEST, "the manifest of a study")
    settings = json.loads(json.dumps(settings))  # in the form of the file
    earlier = manifest["settings"]
    # Of both: a file or a behaviour may be gone.
    names = dict.fromkeys([*earlier, *settings])
    changes = [name for name in names if earlier.get(name) != settings.get(name)]
    if changes:
        raise ValueError(
            f"{out} holds an unfinished study with other settings ({listed(changes)}); "
            "give another folder, or force=True to remove it first"
        )
