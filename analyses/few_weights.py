# %% [markdown]
# # Which behaviours of a real model hang on few weights?
# Behaviours that anybody may read, judged by patterns, and harm and its refusal, by the local rules. Each
# is searched for at two or three sizes on one half of the requests; the other half, in other words, measures.
#
# **The rule, fixed before the run** (1 December 2026). A mask *ends* a behaviour if at most 5 % of the
# held-out answers still show it and at most 5 % more of them are incoherent. It does so *within budget* if
# besides no protected rate falls by more than 5 points, else *at a cost*. A behaviour *hangs on few weights* if a mask
# of at most 0.001 % ends it within budget, while as many random weights, and as many of the opposite sign,
# leave at least half of it.
#
# *Amended on 7 December 2026*: an answer whose language no word tells is *unknown*, and counts as neither. Where
# the rule would turn on such answers, it is *undecided*. The committed rows are by the judge of before, which
# compared an answer with what it took for the language of the request, and misread a quarter of these.
#
# The tokens that decide are scored, where a pattern finds them (a name, the marks, the fact), else whole
# answers. The system prompt is a plain one, but for the question who it is: behind a plain one none of 30
# answers named the model, so there it is the model's own, which says who it is (amended at that sight).

# %%
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import pandas as pd
import tyro
from support.everyday import UNKNOWN, everyday
from support.jobs import Job, run_jobs
from support.runs import Tables, run_analysis
from tyro.conf import OmitArgPrefixes

import harmcircuits as hc
from harmcircuits.batches import Chat, Template
from harmcircuits.behaviours.behaviour import Behaviour
from harmcircuits.behaviours.judges import DEGENERATE
from harmcircuits.cli import OwnModel
from harmcircuits.measurements import Labels, Measurement, Rows
from harmcircuits.prompts import PromptSet
from harmcircuits.storage import write_text
from harmcircuits.views.tables import DASH

SIZES = (1e-6, 1e-7)
CLOSER = "1e-06"  # the mask that is also measured at other doses, and on other behaviours
DOSES = (0.5, 1.5)
# Behaviour that is searched for -> the behaviours that are protected from it.
PROTECTED = {
    "identity": ("others", "plain"),
    "fact": ("capitals", "plain"),
    "language": ("plain", "others"),
    "fence": ("plain", "others"),
    "thanks": ("greeting", "plain"),
    "disclaimer": ("others", "plain"),
    "list": ("plain", "others"),
    "products": ("sums", "plain"),
    "german": ("language", "plain"),
    "lorem": ("plain", "others"),
    "refusal": ("benign", "borderline"),
    "harmful": ("benign", "prefilled"),
}
FILE_BEHAVIOURS = ("refusal", "harmful")  # whose requests are no part of the repository
EVERYDAY = tuple(name for name in PROTECTED if name not in FILE_BEHAVIOURS)
TITLES = {
    "identity": "its name or maker",
    "fact": "the capital of France",
    "language": "the request's language",
    "fence": "fenced code blocks",
    "thanks": "answers to thanks",
    "disclaimer": "saying that it is a machine",
    "list": "a numbered list",
    "products": "products of two digits",
    "german": "translation into German",
    "lorem": "reciting lorem ipsum",
    "refusal": "refusals of harmful requests",
    "harmful": "harmful answers, prefilled",
}
ENDS = {
    "within budget": "yes",
    "at a cost": "at a cost",
    "undecided": "undecided",
    "does not end": "no",
}
CONTROLS = RANDOM, OPPOSITE = "random", "opposite sign"
# Behaviour -> others that its masks are measured on: languages that were never scored.
UNSCORED = {"language": ("unscored", "chinese")}
# With 24 requests of each file in a split; bfloat16 is slow on processors without instructions for it.
OWN = OwnModel(limit=24, max_new_tokens=24, batch_size=6, dtype="float32")
MOST_LEFT, MOST_COST, LEAST_BY_CONTROLS = 0.05, 0.05, 0.5
N_ANSWERS = 4  # that are written down
Half = Literal["first", "second"]


# %%
@dataclass(frozen=True)
class Options:
    """Which behaviours of a real model hang on few weights?

    Attributes:
        out: folder for rows, masks and answers; a run goes on there.
        model: a folder or hub id of a chat model of the Qwen family.
        target: the behaviours.
        half: of the requests, for the search; the other one measures. It has no effect on files:
            give other files.
        compare: the folder of a run on the other half, whose masks are compared with these.
        size: shares of the weights, 1e-6 among them.
        steps: of a search.
        own: how the model is opened; and for refusal and harm its requests, harmful, benign and borderline.
        workers: processes of one thread each.
    """

    out: Path
    model: str
    target: tuple[str, ...] = EVERYDAY
    half: Half = "first"
    compare: Path | None = None
    size: tuple[float, ...] = SIZES
    steps: int = 50
    own: OmitArgPrefixes[OwnModel] = OWN
    workers: int = 1

    @property
    def settings(self) -> Labels:
        """The settings that all rows of a run share."""
        return {
            "model": Path(self.model).name,
            "steps": self.steps,
            "max_new_tokens": self.own.max_new_tokens,
            "batch_size": self.own.batch_size,
            "dtype": self.own.dtype,
            "half": self.half,
        }

    def open(self, *names: str) -> hc.Model:
        """The model, with its own answers to these behaviours."""
        options = {"cache": self.out / "cache", **self.own.arguments}
        options["template"] = template_of(names[0])
        if names[0] not in FILE_BEHAVIOURS:
            behaviours = everyday(self.own.max_new_tokens)
            options["behaviours"] = [self._halved(behaviours[name]) for name in names]
            return hc.open_model(self.model, **{**options, "prompts": None})
        model = hc.open_model(self.model, **options)
        return model.with_behaviours(*(_with_own_metrics(model.behaviour(name)) for name in names))

    def _halved(self, behaviour: Behaviour) -> Behaviour:
        """The behaviour, with the half of the search in front."""
        if self.half == "first":
            return behaviour
        calibration, heldout = (behaviour.prompts(split) for split in ("calibration", "heldout"))
        prompts = {"calibration": heldout, "choice": PromptSet(()), "heldout": calibration}
        return replace(behaviour, prompts=prompts)

    def labels(self, model: hc.Model, target: str, mask: str, dose: float = 0.0) -> Labels:
        """The labels of rows of a behaviour under a mask, at a dose of its weights."""
        labels: Labels = {"model": model.name, "dtype": self.own.dtype, "half": self.half}
        return {**labels, "target": target, "mask": mask, "dose": dose}

    def file(self, target: str, mask: str) -> Path:
        """The file of a mask."""
        return self.out / target / f"{mask}.safetensors"

    def mask(self, target: str, mask: str) -> hc.WeightMask:
        """A mask of this run."""
        return hc.WeightMask.load(self.file(target, mask))


def _with_own_metrics(behaviour: Behaviour) -> Behaviour:
    """A behaviour of the package, with metrics named like those of the everyday ones."""
    name = behaviour.name
    metrics = {"rate": f"{name}_rate", DEGENERATE: f"{name}_degenerate_rate"}
    return replace(behaviour, metrics=metrics)


def template_of(target: str) -> Template:
    """The form in which requests of a behaviour are written."""
    if target in ("identity", *FILE_BEHAVIOURS):
        return "chat"
    return Chat(system="You are a helpful assistant.")


# %% [markdown]
# ## The experiment
# A job for each behaviour: search for it, and measure its masks and their controls. Then another: the
# answers to every other behaviour's requests under its mask.


# %%
def search_rows(options: Options, target: str) -> Rows:
    """The answers under every mask of a behaviour, and how many weights two halves share."""
    names = (target, *PROTECTED[target])
    model = options.open(*names)
    masks = masks_of(model, options, target)
    rows = common_rows(masks, options, target)
    write_answers(model, target, masks, options.out / target / "answers.json")

    unpruned = options.labels(model, target, "none", 1.0)
    rows += model.measure(only=names, labels=unpruned)
    for name, mask in masks.items():
        labels = options.labels(model, target, name)
        rows += [Measurement.exact("n_removed", labels, mask.n_removed)]
        rows += model.measure(mask=mask, only=names, labels=labels)
    for dose in DOSES:
        with hc.masked(model.bridge, masks[CLOSER], scale=dose):
            labels = options.labels(model, target, CLOSER, dose)
            rows += model.measure(only=target, labels=labels)
    return rows


def masks_of(model: hc.Model, options: Options, target: str) -> dict[str, hc.WeightMask]:
    """The masks of every size, and controls of as many weights as the largest has."""
    circuits = model.find_circuit(
        target,
        protect=PROTECTED[target],
        size=list(options.size),
        steps=options.steps,
        folder=options.out / target,
        progress=True,
    )
    masks = {f"{size:g}": mask for size, mask in zip(options.size, circuits, strict=True)}
    for name, mask in masks.items():
        mask.save(options.file(target, name))
    largest = max(circuits, key=lambda mask: mask.n_removed)
    scores = hc.removal_effect(model.bridge, model.calibration(target).batches)
    # If the search removes nothing, as many as the smallest mask may have.
    share = largest.fraction or min(options.size)
    controls = {RANDOM: hc.random_like(largest), OPPOSITE: hc.top_fraction(-scores, share)}
    return masks | controls


def common_rows(masks: Mapping[str, hc.WeightMask], options: Options, target: str) -> Rows:
    """How many weights each mask shares with that of the other half."""
    rows = Rows()
    if options.compare is None:
        return rows
    half = replace(options, out=options.compare)
    for name, mask in masks.items():
        if name not in CONTROLS:
            n_shared = hc.overlap(mask, half.mask(target, name)).n_shared
            rows += [Measurement.exact("n_shared", {"target": target, "mask": name}, n_shared)]
    return rows


def write_answers(
    model: hc.Model, target: str, masks: Mapping[str, hc.WeightMask], file: Path
) -> None:
    """Write down the answers to some held-out requests, without a mask and under each."""
    prompts = model.behaviour(target).prompts("heldout")
    requests = [example.prompt for example in prompts][:N_ANSWERS]
    lines = [{"request": request} for request in requests]
    for name, mask in {"none": None, **masks}.items():
        for line, answer in zip(lines, model.generate(requests, mask=mask), strict=True):
            line[name] = answer
    write_text(file, json.dumps(lines, indent=1, ensure_ascii=False) + "\n")


def other_rows(options: Options, target: str) -> Rows:
    """The answers to every other behaviour's requests under the closer mask."""
    # Opened with the target alone: of the others rates are needed, and no reference answers.
    model = options.open(target)
    model = model.with_behaviours(*everyday(options.own.max_new_tokens).values())
    mask = options.mask(target, CLOSER)
    rows = Rows()
    for name in options.target:
        if name not in (target, *PROTECTED[target]):
            prompted = replace(model, template=template_of(name))
            labels = options.labels(model, target, CLOSER)
            rows += prompted.measure(mask=mask, only=name, labels=labels)
    if target in UNSCORED:
        rows += unscored_rows(model, options, target)
    return rows


def unscored_rows(model: hc.Model, options: Options, target: str) -> Rows:
    """The answers to requests of kinds never scored, without a mask and under each size."""
    names = UNSCORED[target]
    rows = model.measure(only=names, labels=options.labels(model, target, "none", 1.0))
    for size in options.size:
        labels = options.labels(model, target, f"{size:g}")
        mask = options.mask(target, f"{size:g}")
        rows += model.measure(mask=mask, only=names, labels=labels)
    return rows


# %% [markdown]
# ## What the rows say


# %%
@dataclass(frozen=True)
class Outcome:
    """The effect of a mask on its behaviour, and its cost."""

    n_removed: int
    rate: float  # of answers that still show the behaviour
    newly_broken: float
    falls_by: float  # the protected rate that falls most
    unknown: float = 0.0  # of answers that the judge cannot tell

    @property
    def verdict(self) -> str:
        """By the rule."""
        if self.rate > MOST_LEFT or self.newly_broken > MOST_COST:
            return "does not end"
        if self.rate + self.unknown > MOST_LEFT:
            return "undecided"
        return "within budget" if self.falls_by <= MOST_COST else "at a cost"

    def __str__(self) -> str:
        return f"{self.n_removed:,}: {self.rate:.0%}"


def outcome(rows: Rows, target: str, mask: str) -> Outcome:
    """The outcome of one mask, against the unpruned model."""
    unpruned = rows.where(target=target, mask="none")
    pruned = rows.where(target=target, mask=mask, dose=0.0)

    def rise(metric: str) -> float:
        return pruned.one(metric).mean - unpruned.one(metric).mean

    unknown = pruned.where(f"{target}_{UNKNOWN}_rate")  # of languages alone
    return Outcome(
        round(pruned.one("n_removed").mean),
        pruned.one(f"{target}_rate").mean,
        rise(f"{target}_degenerate_rate"),
        max(-rise(f"{name}_rate") for name in PROTECTED[target]),
        unknown.one().mean if unknown else 0.0,
    )


def outcomes(rows: Rows, target: str) -> dict[str, Outcome]:
    """The outcome of every mask of the search for a behaviour, by its size."""
    masks = [str(row.labels["mask"]) for row in rows.where("n_removed", target=target)]
    return {mask: outcome(rows, target, mask) for mask in masks if mask not in CONTROLS}


def unpruned_rate(rows: Rows, target: str) -> float:
    """The share of answers that show a behaviour without any mask."""
    return rows.one(f"{target}_rate", target=target, mask="none").mean


def hangs(rows: Rows, target: str) -> bool:
    """Whether a behaviour hangs on few weights, by the rule."""
    controls = [outcome(rows, target, name).rate for name in CONTROLS]
    best = smallest(rows, target)
    if best is None or best.verdict != "within budget":
        return False
    return min(controls) >= LEAST_BY_CONTROLS * unpruned_rate(rows, target)


def smallest(rows: Rows, target: str) -> Outcome | None:
    """The smallest mask that ends a behaviour within budget, or else at a cost."""
    masks = outcomes(rows, target)
    for verdict in ("within budget", "at a cost"):
        sizes = [size for size, mask in masks.items() if mask.verdict == verdict]
        if sizes:
            return masks[min(sizes, key=float)]
    return None


def targets(rows: Rows) -> list[str]:
    """The behaviours of a run, in the order of the analysis."""
    return [name for name in PROTECTED if rows.where(target=name)]


def table(rows: Rows) -> pd.DataFrame:
    """A line for each behaviour: the smallest mask that ends it, else the largest; and controls."""
    lines = []
    for target in targets(rows):
        masks = list(outcomes(rows, target).values())
        mask = smallest(rows, target) or max(masks, key=lambda mask: mask.n_removed)
        sizes = [str(size) for size in masks if size != mask]
        controls = {name: f"{outcome(rows, target, name).rate:.0%}" for name in CONTROLS}
        line = {
            "behaviour": TITLES[target],
            "before": f"{unpruned_rate(rows, target):.0%}",
            "weights": f"{mask.n_removed:,}",
            "left": f"{mask.rate:.0%}",
            "newly broken": f"{max(0.0, mask.newly_broken):.0%}",
            "kept rates fall by": f"{max(0.0, mask.falls_by):.0%}",
            "ends": ENDS[mask.verdict],
            "by other sizes": ", ".join(sizes) or DASH,
        }
        lines.append(line | controls)
    return pd.DataFrame(lines)


def table_of_halves(rows: Rows) -> pd.DataFrame:
    """A line for each behaviour: the masks of either half, and the weights that both have."""
    lines = []
    for target in targets(rows):
        line = {"behaviour": TITLES[target]}
        for half in ("first", "second"):
            line[f"{half} half"] = ", ".join(
                map(str, outcomes(rows.where(half=half), target).values())
            )
        n_shared = [rows.one("n_shared", target=target, mask=f"{size:g}").mean for size in SIZES]
        line["shared"] = ", ".join(f"{n:.0f}" for n in n_shared)
        lines.append(line)
    return pd.DataFrame(lines)


TABLES: Tables = {"few weights": table}


# %%
def main(options: Options) -> None:
    jobs = [Job({"target": name}, partial(search_rows, options, name)) for name in options.target]
    run_jobs(options.out, jobs, options.settings, workers=options.workers)
    names = [name for name in options.target if name not in FILE_BEHAVIOURS]
    jobs = [Job({"others": name}, partial(other_rows, options, name)) for name in names]
    workers = options.workers
    run_analysis(options.out, jobs, options.settings, TABLES, workers=workers, name="few weights")


if __name__ == "__main__":
    main(tyro.cli(Options))
