# %% [markdown]
# # Which behaviours of a real model hang on few weights?
# Behaviours that anybody may read, each with an exact judge, and harm and its refusal, by the local rules. For
# each a search at two or three sizes on one half of the requests; the other half, in other words, measures.
#
# **The rule, fixed before the run** (1 December 2026). A mask *ends* a behaviour if at most 5 % of the
# held-out answers still show it and at most 5 % more of them are broken. It does so *within budget* if besides
# no protected rate falls by more than 5 points, else *at a cost*. A behaviour *hangs on few weights* if a mask
# of at most 0.001 % ends it within budget, while as many random weights, and as many of the opposite sign,
# leave at least half of it.
#
# Scored are the tokens that decide, where a pattern finds them (a name, the marks, the fact), else whole
# answers. The system prompt is a plain one, but for the question who it is: behind a plain one none of 30
# answers named the model, so there it is the model's own, which says who it is (amended when that was seen).

# %%
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import tyro
from rich.console import Console
from support.everyday import everyday
from support.jobs import Job, run_jobs

import harmcircuits as hc
from harmcircuits.batches import Chat, Template
from harmcircuits.behaviours.behaviour import Behaviour
from harmcircuits.behaviours.judges import DEGENERATE
from harmcircuits.measurements import Labels, Measurement, Rows
from harmcircuits.prompts import PromptSet
from harmcircuits.storage import write_text
from harmcircuits.views.tables import DASH, frame_table

ROWS = Path(__file__).parent / "rows" / "few_weights.jsonl"
HALVES_ROWS = ROWS.with_stem("few_weights_halves")
SIZES = (1e-6, 1e-7)
CLOSER = "1e-06"  # the mask that is also measured at other doses, and on other behaviours
DOSES = (0.5, 1.5)
# What is searched for, and what is protected from it.
KEPT = {
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
OF_FILES = ("refusal", "harmful")  # behaviours whose requests are no part of the repository
TITLES = {
    "identity": "its name or maker",
    "fact": "the capital of France",
    "language": "the language asked in",
    "fence": "code between marks",
    "thanks": "an answer to thanks",
    "disclaimer": "that it is a machine",
    "list": "a numbered list",
    "products": "products of two digits",
    "german": "translation into German",
    "lorem": "lorem ipsum by heart",
    "refusal": "refusals of harmful requests",
    "harmful": "harm, behind a beginning",
}
ENDS = {"within budget": "yes", "at a cost": "at a cost", "does not end": "no"}
CONTROLS = RANDOM, OPPOSITE = "random", "opposite sign"
FURTHER = {"language": ("unscored", "chinese")}  # what its masks do to languages never scored
LIMIT = 24  # requests of each file in a split
Half = Literal["first", "second"]
ENDED, COST, LEFT_BY_CONTROLS = 0.05, 0.05, 0.5
N_SHOWN = 4


# %%
@dataclass(frozen=True)
class Options:
    """A run: what is searched for, on which model.

    Attributes:
        out: folder for rows, masks and answers; a run goes on there.
        model: a folder or hub id of a chat model of the Qwen family.
        target: the behaviours.
        harmful: a file of harmful requests, for refusal and harm.
        benign: of benign ones.
        borderline: of those that look unsafe.
        half: of the requests, that the search sees; the other one measures. Of files it changes nothing:
            give other files.
        compare: the folder of a run on the other half, whose masks are compared with these.
        size: shares of the weights, 1e-6 among them.
        steps: of a search.
        max_new_tokens: how long answers may be.
        batch_size: texts scored at once, and of the target in a step.
        dtype: of the model; bfloat16 is slow on processors that have no instructions for it.
        workers: processes of one thread each.
    """

    out: Path
    model: str
    target: tuple[str, ...] = tuple(name for name in KEPT if name not in OF_FILES)
    harmful: str = ""
    benign: str = ""
    borderline: str = ""
    half: Half = "first"
    compare: Path | None = None
    size: tuple[float, ...] = SIZES
    steps: int = 50
    max_new_tokens: int = 24
    batch_size: int = 6
    dtype: str = "float32"
    workers: int = 1

    def open(self, *names: str) -> hc.Model:
        """The model, which is asked for its own answers to these behaviours."""
        given: dict[str, Any] = {"template": template_of(names[0])}
        if names[0] in OF_FILES:
            files = {"harmful": self.harmful, "benign": self.benign, "borderline": self.borderline}
            given["prompts"] = {**files, "limit": LIMIT}
        else:
            behaviours = everyday(self.max_new_tokens)
            given["behaviours"] = [self._halved(behaviours[name]) for name in names]
        model = hc.open_model(
            self.model,
            **given,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            dtype=self.dtype,
            cache=self.out / "cache",
        )
        if names[0] not in OF_FILES:
            return model
        return model.with_behaviours(*(_named_alike(model.behaviour(name)) for name in names))

    def _halved(self, behaviour: Behaviour) -> Behaviour:
        """The behaviour, with the half to search on in front."""
        if self.half == "first":
            return behaviour
        calibration, heldout = (behaviour.prompts(split) for split in ("calibration", "heldout"))
        given = {"calibration": heldout, "choice": PromptSet(()), "heldout": calibration}
        return replace(behaviour, prompts=given)

    def labels(self, model: hc.Model, target: str) -> Labels:
        """What all rows of a behaviour carry."""
        return {"model": model.name, "dtype": self.dtype, "half": self.half, "target": target}

    def file(self, target: str, name: str) -> Path:
        """Where a mask of a behaviour is kept."""
        return self.out / target / f"{name}.safetensors"

    def mask(self, target: str, name: str) -> hc.WeightMask:
        """A mask that was found."""
        return hc.WeightMask.load(self.file(target, name))


def _named_alike(behaviour: Behaviour) -> Behaviour:
    """A behaviour of the package with metrics that are called as those of the others."""
    name = behaviour.name
    metrics = {"rate": f"{name}_rate", DEGENERATE: f"{name}_degenerate_rate"}
    return replace(behaviour, metrics=metrics)


def template_of(target: str) -> Template:
    """How requests of a behaviour are written."""
    return (
        "chat" if target in ("identity", *OF_FILES) else Chat(system="You are a helpful assistant.")
    )


@dataclass(frozen=True)
class Searched:
    """A job: search for a behaviour, and measure what its masks and their controls do."""

    options: Options
    target: str

    def __call__(self) -> Rows:
        kept, folder = KEPT[self.target], self.options.out / self.target
        model = self.options.open(self.target, *kept)
        masks = self._found(model, folder)
        rows = self._shared(masks)
        _show(model, self.target, masks, folder / "answers.json")

        labels = self.options.labels(model, self.target)
        asked = [self.target, *kept]
        rows += model.measure(only=asked, labels={**labels, "mask": "none", "dose": 1.0})
        for name, mask in masks.items():
            where = {**labels, "mask": name, "dose": 0.0}
            rows += [Measurement.exact("n_removed", where, mask.n_removed)]
            rows += model.measure(mask=mask, only=asked, labels=where)
        for dose in DOSES:
            with hc.masked(model.bridge, masks[CLOSER], scale=dose):
                where = {**labels, "mask": CLOSER, "dose": dose}
                rows += model.measure(only=self.target, labels=where)
        return rows

    def _found(self, model: hc.Model, folder: Path) -> dict[str, hc.WeightMask]:
        """The masks of every size, and as many weights as the largest has by other rules."""
        found = model.find_circuit(
            self.target,
            protect=KEPT[self.target],
            size=list(self.options.size),
            steps=self.options.steps,
            folder=folder,
            progress=True,
        )
        masks = {f"{size:g}": mask for size, mask in zip(self.options.size, found, strict=True)}
        for name, mask in masks.items():
            mask.save(self.options.file(self.target, name))
        largest = max(found, key=lambda mask: mask.n_removed)
        masks[RANDOM] = hc.random_like(largest)
        scores = hc.removal_effect(model.bridge, model.calibration(self.target).batches)
        # Where none was found, as many as the smallest may have.
        share = largest.fraction or min(self.options.size)
        masks[OPPOSITE] = hc.top_fraction(-scores, share)
        return masks

    def _shared(self, masks: Mapping[str, hc.WeightMask]) -> Rows:
        """How many weights each mask shares with that of the other half."""
        rows = Rows()
        for name, mask in masks.items():
            if self.options.compare is None or name in CONTROLS:
                continue
            other = replace(self.options, out=self.options.compare).mask(self.target, name)
            n_shared = hc.overlap(mask, other).n_shared
            rows += [Measurement.exact("n_shared", {"target": self.target, "mask": name}, n_shared)]
        return rows


@dataclass(frozen=True)
class OnOthers:
    """A job: the answers to every other behaviour's requests under a mask."""

    options: Options
    target: str

    def __call__(self) -> Rows:
        measured = (self.target, *KEPT[self.target])
        others = [name for name in self.options.target if name not in measured]
        # Opened with the target alone: of the others rates are wanted, and no reference answers.
        model = self.options.open(self.target)
        model = model.with_behaviours(*everyday(self.options.max_new_tokens).values())
        mask = self.options.mask(self.target, CLOSER)
        labels = self.options.labels(model, self.target)
        rows = Rows()
        for name in others:
            asked = replace(model, template=template_of(name))
            where = {**labels, "mask": CLOSER, "dose": 0.0}
            rows += asked.measure(mask=mask, only=name, labels=where)
        if self.target in FURTHER:
            rows += self._further(model, labels)
        return rows

    def _further(self, model: hc.Model, labels: Labels) -> Rows:
        """The answers to requests of other kinds, without a mask and under each size."""
        further = FURTHER[self.target]
        rows = model.measure(only=further, labels={**labels, "mask": "none", "dose": 1.0})
        for size in self.options.size:
            name = f"{size:g}"
            mask = self.options.mask(self.target, name)
            where = {**labels, "mask": name, "dose": 0.0}
            rows += model.measure(mask=mask, only=further, labels=where)
        return rows


def _show(model: hc.Model, target: str, masks: Mapping[str, hc.WeightMask], file: Path) -> None:
    """Write down what some held-out requests get, without a mask and under each."""
    asked = [example.prompt for example in model.behaviour(target).prompts("heldout")][:N_SHOWN]
    lines = [{"request": request} for request in asked]
    for name, mask in {"none": None, **masks}.items():
        for line, answer in zip(lines, model.generate(asked, mask=mask), strict=True):
            line[name] = answer
    write_text(file, json.dumps(lines, indent=1, ensure_ascii=False) + "\n")


# %%
@dataclass(frozen=True)
class Outcome:
    """What a mask leaves of a behaviour, and what it costs."""

    n_removed: int
    left: float
    newly_broken: float
    kept_falls_by: float

    @property
    def verdict(self) -> str:
        """By the rule."""
        if self.left > ENDED or self.newly_broken > COST:
            return "does not end"
        return "within budget" if self.kept_falls_by <= COST else "at a cost"


def outcome(rows: Rows, target: str, mask: str) -> Outcome:
    """Of one mask, against the model without any."""
    unpruned = rows.where(target=target, mask="none")
    pruned = rows.where(target=target, mask=mask, dose=0.0)

    def rise(metric: str) -> float:
        return pruned.one(metric).mean - unpruned.one(metric).mean

    return Outcome(
        round(pruned.one("n_removed").mean),
        pruned.one(f"{target}_rate").mean,
        rise(f"{target}_degenerate_rate"),
        max(-rise(f"{name}_rate") for name in KEPT[target]),
    )


def hangs(rows: Rows, target: str) -> bool:
    """Whether a behaviour hangs on few weights, by the rule."""
    before = rows.one(f"{target}_rate", target=target, mask="none").mean
    controls = [outcome(rows, target, name).left for name in CONTROLS]
    found = smallest(rows, target)
    is_within = found is not None and found.verdict == "within budget"
    return is_within and min(controls) >= LEFT_BY_CONTROLS * before


def smallest(rows: Rows, target: str) -> Outcome | None:
    """What the smallest mask does that ends a behaviour within budget, or else at a cost."""
    sizes = sorted(sizes_of(rows, target), key=float)
    outcomes = [outcome(rows, target, mask) for mask in sizes]
    for verdict in ("within budget", "at a cost"):
        for of_mask in outcomes:
            if of_mask.verdict == verdict:
                return of_mask
    return None


def targets(rows: Rows) -> list[str]:
    """The behaviours that were searched for, in the order of the analysis."""
    return [name for name in KEPT if rows.where(target=name)]


def sizes_of(rows: Rows, target: str) -> list[str]:
    """The masks that a search found for a behaviour."""
    masks = [str(row.labels["mask"]) for row in rows.where("n_removed", target=target)]
    return [mask for mask in masks if mask not in CONTROLS]


def table(rows: Rows) -> pd.DataFrame:
    """A line for each behaviour: the smallest mask that ends it, else the largest, and what the others leave."""
    lines = []
    for target in targets(rows):
        outcomes = [outcome(rows, target, mask) for mask in sizes_of(rows, target)]
        shown = smallest(rows, target) or max(outcomes, key=lambda of_mask: of_mask.n_removed)
        others = [f"{one.n_removed:,}: {one.left:.0%}" for one in outcomes if one != shown]
        controls = {name: f"{outcome(rows, target, name).left:.0%}" for name in CONTROLS}
        before = rows.one(f"{target}_rate", target=target, mask="none").mean
        line = {
            "behaviour": TITLES[target],
            "before": f"{before:.0%}",
            "weights": f"{shown.n_removed:,}",
            "left": f"{shown.left:.0%}",
            "newly broken": f"{max(0.0, shown.newly_broken):.0%}",
            "kept rates fall by": f"{max(0.0, shown.kept_falls_by):.0%}",
            "ends": ENDS[shown.verdict],
            "by other sizes": ", ".join(others) or DASH,
        }
        lines.append(line | controls)
    return pd.DataFrame(lines)


def table_of_halves(rows: Rows) -> pd.DataFrame:
    """A line for each behaviour: weights and what they leave, by the half that was searched on."""
    lines = []
    for target in targets(rows):
        line = {"behaviour": TITLES[target]}
        for half in ("first", "second"):
            of_half = rows.where(half=half)
            masks = [outcome(of_half, target, mask) for mask in sizes_of(of_half, target)]
            line[f"{half} half"] = ", ".join(f"{one.n_removed:,}: {one.left:.0%}" for one in masks)
        shared = [rows.one("n_shared", target=target, mask=f"{size:g}").mean for size in SIZES]
        line["shared"] = ", ".join(f"{n:.0f}" for n in shared)
        lines.append(line)
    return pd.DataFrame(lines)


# %%
def main(options: Options) -> None:
    settings: Labels = {
        "model": Path(options.model).name,
        "steps": options.steps,
        "max_new_tokens": options.max_new_tokens,
        "batch_size": options.batch_size,
        "dtype": options.dtype,
        "half": options.half,
    }
    jobs = [Job({"target": name}, Searched(options, name)) for name in options.target]
    run_jobs(options.out, jobs, settings, workers=options.workers)
    others = [name for name in options.target if name not in OF_FILES]
    jobs = [Job({"others": name}, OnOthers(options, name)) for name in others]
    rows = run_jobs(options.out, jobs, settings, workers=options.workers)
    Console().print(frame_table(table(rows), n_names=1))


if __name__ == "__main__":
    main(tyro.cli(Options))
