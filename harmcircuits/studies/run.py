"""A study under way: its model and settings, and every row and mask so far."""

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.progress import Progress

from harmcircuits.behaviours.calibration import Calibration
from harmcircuits.behaviours.model import Model
from harmcircuits.circuits.masks import WeightMask
from harmcircuits.display import plural
from harmcircuits.hooks.walk_files import forget_sums
from harmcircuits.measurements import Label, Measurement, Rows
from harmcircuits.studies.settings import StudySettings
from harmcircuits.studies.terms import Terms

# In the folder of a study.
ROWS_FILE, MANIFEST, WALKS = "rows.jsonl", "manifest.json", "walks"
PAGE = "report.html"
UNNEEDED = ".walks"  # what is left to remove of a finished study


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
    progress: Progress = field(default_factory=lambda: Progress(disable=True))
    max_memory: int | None = None
    protected: tuple[str, ...] = ()
    rows: Rows = field(default_factory=Rows)
    masks: dict[str, WeightMask] = field(default_factory=dict)
    chosen: Point | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def __repr__(self) -> str:
        chosen = f", chose {self.chosen.mask}" if self.chosen else ", chose no mask"
        removed = f"{self.settings.target} of {self.model.name}"
        return f"Study({removed}: {plural(len(self.rows), 'row')}{chosen})"

    @property
    def terms(self) -> Terms:
        """What its rows are called."""
        settings = self.settings
        return Terms.of(self.model, settings.target, settings.contrast, self.protected)

    @property
    def walks(self) -> Path | None:
        """Where scores and searches are kept while the study is under way; None in memory."""
        return self.out / WALKS if self.out is not None else None

    def find_circuits(
        self,
        name: str,
        sizes: Sequence[float],
        calibrations: Mapping[str, Calibration],
        protect: Iterable[str],
        **options: Any,
    ) -> list[WeightMask]:
        """The target's circuits of these sizes by one search."""
        settings = self.settings
        spared = list(protect)
        folder = self.walks / name if self.walks is not None else None
        masks = self.model.find_circuit(
            settings.target,
            size=list(sizes),
            protect=spared,
            budget={behaviour: settings.budget_of(behaviour) for behaviour in spared},
            prefer=settings.prefer,
            protect_first=settings.protect_first,
            calibrations=calibrations,
            progress=self.progress,
            folder=folder,
            max_memory=self.max_memory,
            **{"steps": settings.steps, **options},
        )
        if folder is not None:
            forget_sums(folder)
        return masks

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

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A part of the study, whose time is told at the end."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = time.monotonic() - start

    def finish(self) -> None:
        """Write the rows as a whole, and leave the searches: from now on the folder is finished."""
        if self.out is None or self.walks is None:
            return
        # As one block, so that a part of it that is lost later shows.
        self.rows.save(self.out / ROWS_FILE)
        # By a new name first: killed while it removes them, the folder is finished all the same.
        unneeded = self.out / UNNEEDED
        self.walks.rename(unneeded)
        shutil.rmtree(unneeded)

    def steps(self, name: str, total: int) -> Callable[[], None]:
        """A function that moves a new progress bar on by one step."""
        task = self.progress.add_task(name, total=total)
        return lambda: self.progress.advance(task)
