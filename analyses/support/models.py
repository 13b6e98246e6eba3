"""The models that an analysis opens, by values that a command line gives and another process takes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from tyro.conf import OmitArgPrefixes

from harmcircuits.behaviours.behaviour import Behaviour
from harmcircuits.behaviours.model import Model
from harmcircuits.cli import OwnModel
from harmcircuits.opening import open_model
from harmcircuits.organisms.shipped import FOLDER, open_organism
from harmcircuits.prompts import PromptSet


@dataclass(frozen=True)
class ModelSpec:
    """A model to open: an organism of a folder, or with `own` one that is no organism."""

    model: str
    folder: Path = FOLDER
    device: str = "cpu"
    own: OwnModel | None = None
    every: int = 1  # asks only every so-many-th request, for a first look

    @property
    def labels(self) -> dict[str, str]:
        """What rows about this model carry: its name, and its ladder."""
        if self.own is not None:
            return {"model": Path(self.model).name, "ladder": "own"}
        is_shipped = self.folder.resolve() == FOLDER.resolve()
        return {"model": self.model, "ladder": "shipped" if is_shipped else self.folder.name}

    def open(self, *, seed: int = 0) -> Model:
        """The model with everything it can be asked."""
        if self.own is None:
            model = open_organism(self.model, seed=seed, device=self.device, folder=self.folder)
        else:
            model = open_model(self.model, device=self.device, **self.own.arguments)
        fewer = []
        for behaviour in model.behaviours.values():
            fewer.append(replace(behaviour, prompts=partial(every_so_many, behaviour, self.every)))
        return model.with_behaviours(*fewer)


def every_so_many(behaviour: Behaviour, every: int, split: str) -> PromptSet:
    """Every so-many-th request, or pair of requests, of a behaviour."""
    # By name and not inside a method, since behaviours go to other processes.
    step = 2 if behaviour.choices else 1  # rows 2k and 2k + 1 are a pair
    subset = []
    for number, example in enumerate(behaviour.prompts(split)):
        if number // step % every == 0:
            subset.append(example)
    return PromptSet(tuple(subset))


@dataclass(frozen=True)
class RunOptions:
    """What every run takes.

    Attributes:
        out: folder for rows.jsonl and what is made of it; a run goes on there.
        model: names of organisms; or, with --harmful and --benign, folders or hub ids.
        organisms: folders of ladders, each with these organisms; by default the shipped one.
        workers: processes of one thread each.
        device: torch device, such as cpu or cuda.
        own: a model that is no organism.
    """

    out: Path
    model: tuple[str, ...] = ()
    organisms: tuple[Path, ...] = ()
    workers: int = 2
    device: str = "cpu"
    own: OmitArgPrefixes[OwnModel] = OwnModel()  # noqa: RUF009

    def specs(self, usual: Sequence[str]) -> list[ModelSpec]:
        """The models of one's own where requests are given, else organisms of every folder."""
        if self.own.arguments["prompts"]:
            return [ModelSpec(model, device=self.device, own=self.own) for model in self.model]
        return organisms(self.model or usual, self.organisms, self.device)


def organisms(
    names: Sequence[str], folders: Sequence[Path] = (), device: str = "cpu"
) -> list[ModelSpec]:
    """Organisms of every folder, by default of the shipped one."""
    specs = []
    for folder in folders or (FOLDER,):
        specs += [ModelSpec(name, folder, device) for name in names]
    return specs
