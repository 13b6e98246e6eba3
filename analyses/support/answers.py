"""Parts of a model's calibration answers, for searches on less than all of them."""

from collections.abc import Callable, Mapping, Sequence

from harmcircuits.batches import Batch
from harmcircuits.behaviours.behaviour import TARGET
from harmcircuits.behaviours.model import Model
from harmcircuits.behaviours.outcomes import Calibration
from harmcircuits.prompts import PromptSet

Calibrations = Mapping[str, Calibration]


def part_of(model: Model, data: Calibrations, part: str) -> dict[str, Calibration]:
    """The answers "all", or one of two halves, "A" and "B": every second request."""
    if part == "all":
        return dict(data)

    def half(prompts: PromptSet) -> PromptSet:
        clusters = sorted({example.cluster for example in prompts})
        half_clusters = set(clusters["AB".index(part) :: 2])
        return prompts.where(lambda example: example.cluster in half_clusters)

    return with_prompts(model, data, half)


def with_prompts(
    model: Model,
    data: Calibrations,
    change: Callable[[PromptSet], PromptSet],
) -> dict[str, Calibration]:
    """The answers of every behaviour, in another order or some of them."""
    changed = {}
    for name, calibration in data.items():
        prompts = change(calibration.prompts)
        batches = model.batches(model.behaviour(name), prompts)
        changed[name] = Calibration(prompts, batches, len(prompts), name)
    return changed


def batches_of(data: Calibrations) -> tuple[Sequence[Batch], list[Sequence[Batch]]]:
    """The harmful answers, and the answers of each other ability."""
    protected = []
    for name, calibration in data.items():
        if name != TARGET:
            protected.append(calibration.batches)
    return data[TARGET].batches, protected
