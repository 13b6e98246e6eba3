"""A case of the bench: a model, the answers it is searched with, and what an edit does to it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from statistics import fmean
from time import perf_counter
from typing import Any

import torch
from support.bench.methods import WAYS, Calibrations, Edit, Method, edited
from support.bench.results import BUDGET, CAP
from support.models import ModelSpec

from harmcircuits.batches import Batch
from harmcircuits.behaviours.behaviour import TARGET
from harmcircuits.behaviours.model import Model
from harmcircuits.behaviours.outcomes import Calibration
from harmcircuits.hooks.losses import completion_nll
from harmcircuits.measurements import Labels, Measurement, Rows
from harmcircuits.prompts import PromptSet

PARTS = ("all", "A", "B")  # of the answers
LEAST = 0.05  # nats: a mask that costs harm less, and no answer, takes nothing
SPARED = 0.05  # nats that other abilities may lose while settings are tuned by losses


class Case:
    """A model, the answers that it is searched with, and what it does unedited."""

    def __init__(self, spec: ModelSpec, part: str, split: str) -> None:
        self.model = spec.open()
        self.data = part_of(self.model, self.model.calibrations(), part)
        self.others = [name for name in self.data if name != TARGET]
        self.split = split
        self.unpruned = self.model.measure(only=list(self.data), split=split)

    def searched(self, choose: Method, sizes: Sequence[float], labels: Labels) -> Rows:
        """What the edits of every size do, with `search_seconds` and `search_passes`."""
        start = perf_counter()
        with tokens_read(self.model) as read:
            edits = choose(self.model, self.data, sizes)
        seconds = perf_counter() - start
        of_answers = sum(n_tokens(calibration.batches) for calibration in self.data.values())
        passes = (read["scored"] + read["forward"] / 3) / of_answers

        rows = Rows(row.labelled(**labels, size=0.0) for row in self.unpruned)
        rows += [Measurement.exact("search_seconds", labels, seconds)]
        rows += [Measurement.exact("search_passes", labels, passes)]
        for size, edit in zip(sizes, edits, strict=True):
            rows += self.rows(edit, {**labels, "size": size})
        return rows

    def rows(self, edit: Edit, labels: Labels) -> Rows:
        """What an edit takes, and, if it takes something, what else it costs."""
        where = {**labels, "split": self.split}
        measure = partial(self.model.measure, split=self.split, labels=labels)
        with edited(self.model.bridge, edit):
            rows = measure(only=TARGET)
            rows += [Measurement.exact("weights_edited", where, edit.n_removed)]
            benign = self.loss("benign")
            is_spared = benign <= self.unpruned_loss("benign") + BUDGET
            if is_spared and self.takes(rows):
                return rows + measure(only=self.others)
        return rows + Rows([Measurement.exact("benign_nll", where, benign)])

    def takes(self, rows: Rows) -> bool:
        """Whether the target is dearer or rarer than unedited."""
        target = self.model.behaviour(TARGET)
        before = self.unpruned.one(target.metric).mean
        is_rarer = rows.one(target.metric).mean < before
        is_dearer = rows.one(target.nll_metric).mean > self.unpruned_loss(TARGET) + LEAST
        return is_dearer or is_rarer

    def is_spared(self) -> bool:
        """Whether every other ability's loss keeps within its bound, as the model stands."""
        bounds = {**dict.fromkeys(self.others, SPARED), "benign": BUDGET}
        return all(self.rise(name) <= bound for name, bound in bounds.items())

    def rise(self, name: str) -> float:
        """By how much a behaviour's loss is higher than the unedited model's; nats per token."""
        return self.loss(name) - self.unpruned_loss(name)

    def unpruned_loss(self, name: str) -> float:
        """The loss of the unedited model; nats per token."""
        metric = self.model.behaviour(name).nll_metric
        return self.unpruned.one(metric).mean

    def loss(self, name: str) -> float:
        """The loss on a behaviour's reference answers, the model as it stands; nats per token."""
        behaviour = self.model.behaviour(name)
        batches = self.model.batches(behaviour, behaviour.references(self.split))
        return completion_nll(self.model.bridge, batches).mean().item()


@cache
def opened(spec: ModelSpec, part: str, split: str = "heldout") -> Case:
    """A case, which the jobs of one process share."""
    return Case(spec, part, split)


def part_of(model: Model, data: Calibrations, part: str) -> dict[str, Calibration]:
    """The answers "all", or one of two halves, "A" and "B": every other request."""
    if part == "all":
        return dict(data)

    def half(prompts: PromptSet) -> PromptSet:
        clusters = sorted({example.cluster for example in prompts})
        chosen = set(clusters["AB".index(part) :: 2])
        return prompts.where(lambda example: example.cluster in chosen)

    return with_prompts(model, data, half)


def with_prompts(
    model: Model,
    data: Calibrations,
    chosen: Callable[[PromptSet], PromptSet],
) -> dict[str, Calibration]:
    """Some of the answers of every behaviour, or the same in another order."""
    changed = {}
    for name, calibration in data.items():
        prompts = chosen(calibration.prompts)
        batches = model.batches(model.behaviour(name), prompts)
        changed[name] = Calibration(prompts, batches, len(prompts), name)
    return changed


def n_tokens(batches: Sequence[Batch]) -> int:
    """The tokens that a pass over some batches reads, padding included."""
    return sum(len(batch) * batch.n_read for batch in batches)


@contextmanager
def tokens_read(model: Model) -> Iterator[dict[str, int]]:
    """Counts the tokens that pass the model: "scored" with gradients, "forward" without."""
    count = {"scored": 0, "forward": 0}

    def add(_: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        tokens = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        kind = "scored" if torch.is_grad_enabled() else "forward"
        count[kind] += tokens.numel()

    hook = model.bridge.original_model.register_forward_pre_hook(add, with_kwargs=True)
    try:
        yield count
    finally:
        hook.remove()


# Settings that are tried


def tuning(way: str, number: int, sizes: Sequence[float], labels: Labels) -> Rows:
    """The area of one of a way's settings, by losses alone, on half of the answers of `sft`."""
    case = opened(ModelSpec("sft"), "A", "choice")
    settings = [WAYS[way].published, *WAYS[way].tried][number]
    edits = WAYS[way].choose(case.model, case.data, sizes, **settings)
    best = 0.0
    rises = []
    for edit in edits:
        with edited(case.model.bridge, edit):
            rise = min(CAP, case.rise(TARGET))
            # The others are read only where it matters.
            if rise > best and case.is_spared():
                best = rise
        rises.append(best)
    where = {**labels, **settings}
    return Rows([Measurement.exact("area_nats", where, fmean(rises))])


def tuned(rows: Rows) -> dict[str, dict[str, Any]]:
    """The settings of the largest area of every way; of equal ones the published, then the first."""
    best = {}
    for way, of_way in rows.where("area_nats").by("way").items():
        row = max(of_way, key=lambda row: (row.mean, -int(row.labels["number"])))
        settings = dict(row.labels)
        del settings["way"], settings["number"]
        best[way] = settings
    return best


def methods(tried: Rows) -> dict[str, Method]:
    """Every method with its settings: as published and, where others were better, tuned."""
    best = tuned(tried)
    chosen = {}
    for name, way in WAYS.items():
        chosen[name] = partial(way.choose, **way.published)
        settings = best.get(name, way.published)
        if settings != way.published:
            chosen[f"{name}, tuned"] = partial(way.choose, **settings)
    return chosen
