"""What a study costs before it starts."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any, NamedTuple

import torch
from rich.table import Table

from harmcircuits.behaviours.behaviour import Behaviour
from harmcircuits.behaviours.calibration import Calibration
from harmcircuits.behaviours.generation import Sampling
from harmcircuits.behaviours.model import ANSWERED_PER_SCORED, Model
from harmcircuits.behaviours.standard import CONTRAST
from harmcircuits.display import duration, plural
from harmcircuits.hooks.bridge import AnyModel
from harmcircuits.hooks.cost import (
    SearchEstimate,
    Speed,
    Work,
    estimate_search,
    middle_batch,
    n_passes,
    n_tokens,
    search_work,
)
from harmcircuits.hooks.memory import GIB
from harmcircuits.hooks.weights import weight_sites
from harmcircuits.prompts import Batch, prompt_ids
from harmcircuits.studies.heldout import n_heldout_masks
from harmcircuits.studies.settings import StudySettings
from harmcircuits.views.tables import text_table

N_WAYS = 3  # search, random and opposite sign: a mask of each size
N_COMPARED = 2  # one shot and published


@dataclass(frozen=True)
class Measuring:
    """What it takes to measure the model once, on each of the two splits that are measured."""

    choice: Work
    heldout: Work


@dataclass(frozen=True)
class StudyEstimate:
    """What a study takes, before it starts."""

    search: SearchEstimate
    others: float
    unpruned: float
    measuring: float
    n_masks: int

    @property
    def seconds(self) -> float:
        """From its start to its end, where a mask is chosen."""
        return self.search.seconds + self.others + self.unpruned + self.measuring

    def __str__(self) -> str:
        return (
            f"{self.search}\nstudy: about {duration(self.seconds)} (other searches "
            f"{duration(self.others)}, scores of the unpruned model {duration(self.unpruned)}, "
            f"{plural(self.n_masks, 'mask')} measured {duration(self.measuring)})"
        )


class Auxiliaries(NamedTuple):
    """What the searches of a study prefer and avoid."""

    prefer: Sequence[Batch] = ()
    avoid: Sequence[Batch] = ()


NO_AUXILIARIES = Auxiliaries()


def estimate_study(
    model: Model, settings: StudySettings, *, max_memory: int | None = None
) -> StudyEstimate:
    """What a study of a model takes, from one batch that is timed."""
    target = model.calibration(settings.target).batches
    protected = model.protected(settings.target, settings.protect)
    spared = {name: calibration.batches for name, calibration in protected.items()}
    measured = [model.behaviour(name) for name in {settings.target, settings.contrast, *spared}]
    return estimate_of_batches(
        model,
        target,
        spared,
        settings,
        measuring=Measuring(
            choice=_measuring(model, measured, "choice"),
            heldout=_measuring(model, measured, "heldout"),
        ),
        longest_answer=model.max_new_tokens,
        at_once=model.n_answered_at_once,
        max_memory=max_memory,
        speed=Speed.measured(model, middle_batch(target), at_once=model.n_answered_at_once),
        auxiliaries=_auxiliaries(model, settings, protected) if settings.prefer else NO_AUXILIARIES,
    )


def _auxiliaries(
    model: Model, settings: StudySettings, protected: Mapping[str, Calibration]
) -> Auxiliaries:
    return Auxiliaries(
        model.preferred(settings.target, settings.prefer, protected),
        model.avoided(settings.target, settings.prefer, protected),
    )


def estimate_of_batches(
    bridge: AnyModel,
    target: Sequence[Batch],
    spared: Mapping[str, Sequence[Batch]],
    settings: StudySettings,
    *,
    measuring: Measuring,
    longest_answer: int,
    at_once: int,
    max_memory: int | None,
    speed: Speed,
    auxiliaries: Auxiliaries = NO_AUXILIARIES,
) -> StudyEstimate:
    """What a study takes on given calibration data."""

    main = estimate_search(
        bridge,
        target,
        spared,
        size=settings.sizes,
        steps=settings.steps,
        renew=longest_answer,
        protect_first=settings.protect_first,
        prefer=auxiliaries.prefer,
        avoid=auxiliaries.avoid,
        at_once=at_once,
        max_memory=max_memory,
        speed=speed,
    )
    passes = n_passes(bridge, max_memory)
    n_spared = sum(map(n_tokens, spared.values()))
    n_scored = n_tokens(target) + n_spared
    if settings.published:
        # The target's scores are those of the unpruned model, which are counted there.
        main = replace(main, work=Work(scored=n_spared) * passes, steps=1)
    n_ways = N_WAYS
    others = Work()
    if settings.compare:
        usual = {
            "steps": settings.steps,
            "renew": longest_answer,
            "at_once": at_once,
            "n_passes": passes,
            "protect_first": settings.protect_first,
        }
        others = _other_searches(target, spared, settings, auxiliaries, usual)
        n_scored += n_spared  # the published scores
        if settings.scored_by != "loss":
            n_scored += n_tokens(target)  # which are by the loss in any case
        n_ways += N_COMPARED

    n_choice = n_ways * len(settings.sizes)
    n_heldout = n_heldout_masks(settings)
    measured = measuring.choice * n_choice + measuring.heldout * n_heldout
    return StudyEstimate(
        main,
        speed.seconds(others),
        speed.seconds(Work(scored=n_scored) * passes),
        speed.seconds(measured),
        n_choice + n_heldout,
    )


def _other_searches(
    target: Sequence[Batch],
    spared: Mapping[str, Sequence[Batch]],
    settings: StudySettings,
    auxiliaries: Auxiliaries,
    usual: Mapping[str, Any],
) -> Work:
    """One shot; the contrast protected alone, where more is; and the contrast's twin."""
    also = auxiliaries._asdict()
    once = {**usual, "steps": 1, "renew": 0, **also}
    work = search_work(target, spared, n_sizes=len(settings.sizes), **once)
    contrast = spared.get(settings.contrast)
    if contrast is None:
        return work
    twin = {name: batches for name, batches in spared.items() if name != settings.contrast}
    twin[settings.target] = target
    work += search_work(contrast, twin, n_sizes=1, **usual)
    if len(spared) > 1:
        alone = {settings.contrast: contrast}
        work += search_work(target, alone, n_sizes=1, **also, **usual)
    return work


@dataclass(frozen=True)
class Workload:
    """The data of a study that is only thought of."""

    answers: int
    n_protected: int
    protected_answers: int
    measured: int
    request_tokens: int
    longest_answer: int
    batch_size: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            least = 0 if name == "n_protected" else 1
            if value < least:
                raise ValueError(f"{name}={value}; expected at least {least}")

    @property
    def target(self) -> list[Batch]:
        """Batches of the target."""
        return self._batches(self.answers)

    @property
    def spared(self) -> dict[str, list[Batch]]:
        """Batches of what is protected, of which the first is the contrast."""
        names = [CONTRAST, *(f"protected {number}" for number in range(2, self.n_protected + 1))]
        return {name: self._batches(self.protected_answers) for name in names[: self.n_protected]}

    @property
    def answered_at_once(self) -> int:
        """How many answers are made at once."""
        return ANSWERED_PER_SCORED * self.batch_size

    @property
    def measuring(self) -> Work:
        """What measuring the model once takes."""
        n_requests = self.measured * (1 + self.n_protected)
        n_batches = ceil(n_requests / self.answered_at_once)
        request_and_answer = 2 * self.request_tokens + self.longest_answer
        return Work(read=n_requests * request_and_answer, decoded=n_batches * self.longest_answer)

    def _batches(self, n_examples: int) -> list[Batch]:
        """Examples of equal length, each of a request of its own: its first token is its number."""
        length = self.request_tokens + self.longest_answer
        batches = []
        for start in range(0, n_examples, self.batch_size):
            end = min(n_examples, start + self.batch_size)
            tokens = torch.ones(end - start, length, dtype=torch.int64)
            tokens[:, 0] = torch.arange(start, end)
            is_target = torch.zeros(tokens.shape, dtype=torch.bool)
            is_target[:, self.request_tokens :] = True
            batches.append(Batch(tokens, is_target))
        return batches


def estimate_outline(
    outline: AnyModel,
    workload: Workload,
    settings: StudySettings,
    *,
    max_memory: int | None = None,
    device: str = "cpu",
    tflops: float | None = None,
    bandwidth: float | None = None,
) -> StudyEstimate:
    """What a study of a model that is not loaded takes."""
    target = workload.target
    return estimate_of_batches(
        outline,
        target,
        workload.spared,
        settings,
        measuring=Measuring(workload.measuring, workload.measuring),
        longest_answer=workload.longest_answer,
        at_once=workload.answered_at_once,
        max_memory=max_memory,
        speed=Speed.of_machine(
            outline,
            target[0],
            at_once=workload.answered_at_once,
            device=device,
            tflops=tflops,
            bandwidth=bandwidth,
        ),
    )


def cost_table(name: str, outline: AnyModel, estimate: StudyEstimate) -> Table:
    """The estimate, a line for each thing that takes memory or time."""
    sites = weight_sites(outline)
    n_block = sum(site.parameter.numel() for site in sites.values())
    grid = text_table(f"{name}: {n_block:,} block weights (estimated)", ["", "memory", "time"])
    memory = estimate.search.memory
    for title, n_bytes in {
        "the model": memory.weights,
        "scores of a step": memory.accumulators,
        "activations of a batch": memory.activations,
        "sums of a search": memory.sums,
        "in all": memory.total,
        "temporary files (TMPDIR)": memory.on_disk,
    }.items():
        if n_bytes:
            grid.add_row(title, f"{n_bytes / GIB:.2f} GiB", "")
    grid.add_section()
    for title, seconds in {
        f"search, {plural(estimate.search.steps, 'step')}": estimate.search.seconds,
        "other searches of a study": estimate.others,
        "scores of the unpruned model": estimate.unpruned,
        f"measuring {plural(estimate.n_masks, 'mask')}": estimate.measuring,
        "study in all": estimate.seconds,
    }.items():
        grid.add_row(title, "", duration(seconds))
    return grid


def _measuring(model: Model, behaviours: Sequence[Behaviour], split: str) -> Work:
    """Answering the requests of a split, all behaviours together, and reading references."""
    n_read = 0
    n_answers: Counter[tuple[int, Sampling | None]] = Counter()  # by what shares batches
    for behaviour in behaviours:
        requests = behaviour.prompts(split)
        n_samples = model.n_samples(behaviour)
        tokenizer = model.bridge.tokenizer
        lengths = [len(prompt_ids(e.prompt, tokenizer, model.template)) for e in requests]
        n_read += sum(lengths) * n_samples
        references = behaviour.references(split)
        if len(references):
            n_read += n_tokens(model.batches(behaviour, references))
        n_answers[model.answer_kind(behaviour)] += len(requests) * n_samples

    decoded = 0
    for (longest, _), number in n_answers.items():
        decoded += longest * ceil(number / model.n_answered_at_once)
    return Work(read=n_read, decoded=decoded)
