"""The models that an analysis opens, as values that go to other processes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
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
    every: int = 1  # only every n-th request is asked, for a first look

    @property
    def labels(self) -> dict[str, str]:
        """The labels of rows about this model: its name, and its ladder."""
        if self.own is not None:
            return {"model": Path(self.model).name, "ladder": "own"}
        is_shipped = self.folder.resolve() == FOLDER.resolve()
        return {"model": self.model, "ladder": "shipped" if is_shipped else self.folder.name}

    def open(self, *, seed: int = 0) -> Model:
        """The model with all its behaviours."""
        if self.own is None:
            model = open_organism(self.model, seed=seed, device=self.device, folder=self.folder)
        else:
            model = open_model(self.model, device=self.device, **self.own.arguments)
        sparse = []
        for behaviour in model.behaviours.values():
            prompts = partial(every_nth, behaviour, self.every)
            sparse.append(replace(behaviour, prompts=prompts))
        return model.with_behaviours(*sparse)


def every_nth(behaviour: Behaviour, every: int, split: str) -> PromptSet:
    """Every n-th request, or pair of requests, of a behaviour."""
    # At the top of the module, because behaviours are pickled for other processes.
    step = 2 if behaviour.choices else 1  # rows 2k and 2k + 1 are a pair
    subset = []
    for number, example in enumerate(behaviour.prompts(split)):
        if number // step % every == 0:
            subset.append(example)
    return PromptSet(tuple(subset))


@dataclass(frozen=True)
class RunOptions:
    """The options of every run.

    Attributes:
        out: folder for rows.jsonl and its tables; an unfinished run goes on there.
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
        """The user's own models where requests are given, else organisms of every folder."""
        if self.own.arguments["prompts"]:
            return [ModelSpec(model, device=self.device, own=self.own) for model in self.model]

        pairs = product(self.organisms or (FOLDER,), self.model or usual)
        return [ModelSpec(name, folder, self.device) for folder, name in pairs]
