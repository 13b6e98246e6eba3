"""Which model to study: a value that can be named on a command line, sent to a worker, and opened there."""

from dataclasses import dataclass, replace
from pathlib import Path

from harmcircuits.behaviours import Subject
from harmcircuits.organisms import FOLDER, detailed_behaviours, organism_subject


@dataclass(frozen=True)
class SubjectSpec:
    """An organism by name, from the shipped ladder or from a `folder` of organisms that you trained."""

    model: str
    folder: Path = FOLDER
    device: str = "cpu"

    @property
    def labels(self) -> dict[str, str]:
        """What rows about this model carry: its name, and the ladder it belongs to."""
        return {"model": self.model, "ladder": "shipped" if self.folder.resolve() == FOLDER.resolve() else self.folder.name}

    def open(self, *, seed: int = 0) -> Subject:
        """The model with everything it can be asked, parts of behaviours included; reference answers drawn with `seed`.

        Raises ValueError as `organism_subject`.
        """
        subject = organism_subject(self.model, seed=seed, device=self.device, folder=self.folder)
        return replace(subject, behaviours=detailed_behaviours(seed))
