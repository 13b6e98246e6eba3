"""The chosen mask, and everything it is compared with, on held-out requests."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import NamedTuple

from harmcircuits.behaviours.calibration import Calibration
from harmcircuits.circuits.masks import WeightMask
from harmcircuits.hooks.losses import completion_nll, kl_under, perplexity
from harmcircuits.hooks.masking import masked_if_given
from harmcircuits.measurements import Label, Measurement, Rows
from harmcircuits.studies.controls import Unpruned, controls
from harmcircuits.studies.grid import ONE_SHOT, PUBLISHED, SEARCH
from harmcircuits.studies.run import Point, Study
from harmcircuits.studies.settings import StudySettings
from harmcircuits.studies.utility import evaluate_tasks

# The way that is studied gives the circuit; what it is compared with has files of these names.
CIRCUIT = "circuit"
FILES = {ONE_SHOT: "one_shot", PUBLISHED: "published"}
# The label `at` of a circuit: its way's own operating point, or the size of the chosen one.
OWN_POINT = "operating point"
SAME_SIZE = "same size"


class NamedMask(NamedTuple):
    """A mask with the name of its file, and what its rows carry besides the model."""

    name: str
    mask: WeightMask
    labels: dict[str, Label]


def measure_heldout(
    run: Study,
    chosen: Point,
    points: Mapping[str, Sequence[Point]],
    best: Mapping[str, Point | None],
    unpruned: Unpruned,
    calibrations: Mapping[str, Calibration],
) -> None:
    """The operating point of each way of choosing, and all controls of the chosen one, held out."""
    model, settings = run.model, run.settings
    data = calibrations[settings.target]
    # Scores by another figure predict no loss, so none is read.
    unmasked_nll = None
    if settings.scored_by == "loss":
        unmasked_nll = completion_nll(model.bridge, data.batches)
    compared = _compared(run, chosen.mask, points, best)
    alone = _contrast_alone(run, chosen.mask, calibrations)
    matched = _controls(run, chosen.mask, unpruned, calibrations)
    advance = run.steps("held-out, with controls", n_heldout_masks(settings))

    # Each is measured and saved before the next is searched for.
    for name, mask, labels in chain(compared, alone, matched):
        run.masks[name] = mask
        if run.out is not None:
            mask.save(run.out / "masks" / f"{name}.safetensors")
        run.add(masked_rows(run, mask, {"model": model.name, **labels}))
        if unmasked_nll is not None:
            change = completion_nll(model.bridge, data.batches, mask=mask) - unmasked_nll
            where = {**labels, "split": "calibration"}
            run.note("predicted_loss_change", unpruned.effect.sum_over(mask), **where)
            run.note("measured_loss_change", change.mean().item(), **where)
        advance()


def n_heldout_masks(settings: StudySettings) -> int:
    """How many masks `measure_heldout` measures, where more than the contrast is protected."""
    n_masks = 3 + 2 * settings.n_random  # search, opposite sign, second slice; both random kinds
    if settings.compare:
        n_masks += 4  # one shot, published, the contrast alone protected, and its twin
    return n_masks


def _compared(
    run: Study,
    chosen: WeightMask,
    points: Mapping[str, Sequence[Point]],
    best: Mapping[str, Point | None],
) -> Iterator[NamedMask]:
    """The mask of each way of choosing: at its operating point, or of the size of the search's."""
    studied = next(iter(points))
    for way, of_way in points.items():
        point, at = best[way], OWN_POINT
        if point is None:
            point, at = _nearest(of_way, chosen), SAME_SIZE
        how: dict[str, Label] = {"at": at, "protected": ", ".join(run.protected)}
        file = CIRCUIT if way == studied else FILES[way]
        yield NamedMask(file, point.mask, {"mask": CIRCUIT, **point.labels, **how})


def _nearest(points: Sequence[Point], mask: WeightMask) -> Point:
    """The point that removes most nearly as many weights as a mask."""
    return min(points, key=lambda point: abs(point.mask.n_removed - mask.n_removed))


def _contrast_alone(
    run: Study,
    chosen: WeightMask,
    calibrations: Mapping[str, Calibration],
) -> Iterator[NamedMask]:
    """The circuit of the same search with only the contrast protected, where that is another."""
    contrast, size = run.settings.contrast, chosen.fraction
    is_another = contrast in run.protected and len(run.protected) > 1
    if not run.settings.compare or not is_another:
        return
    name = f"circuit-{contrast}_only"
    (alone,) = run.find_circuits(name, [size], calibrations, [contrast])
    labels: dict[str, Label] = {"selection": SEARCH, "q": size, "protected": contrast}
    yield NamedMask(name, alone, {"mask": CIRCUIT, **labels})


def _controls(
    run: Study,
    chosen: WeightMask,
    unpruned: Unpruned,
    calibrations: Mapping[str, Calibration],
) -> Iterator[NamedMask]:
    """All controls of the chosen mask; of random ones each has its seed in its name."""
    settings = run.settings
    # The target has no twin, and a twin is a search.
    contrast = settings.contrast if settings.compare else settings.target
    matched = controls(
        run.model,
        settings.target,
        chosen,
        protect=run.protected,
        contrast=contrast,
        n_random=settings.n_random,
        seed=settings.seed,
        calibrations=calibrations,
        unpruned=unpruned,
        progress=run.progress,
        folder=run.walks / "twin" if run.walks is not None else None,
        max_memory=run.max_memory,
    )
    for name, masks in matched.items():
        kind = name.replace(" ", "_")
        for number, mask in enumerate(masks, start=settings.seed):
            if name.startswith("random"):
                yield NamedMask(f"{kind}-{number}", mask, {"mask": kind, "seed": number})
            else:
                yield NamedMask(kind, mask, {"mask": kind})


def heldout_rows(run: Study, labels: dict[str, Label], mask: WeightMask | None = None) -> Rows:
    """What the model does on held-out requests, its perplexity, and the tasks."""
    model, settings = run.model, run.settings
    where = {**labels, "split": "heldout"}
    with masked_if_given(model.bridge, mask):
        rows = model.measure(labels=labels, only=run.terms.names)
        if model.plain_text:
            rows += [perplexity(model.bridge, model.plain_text, where)]
        if settings.tasks:
            rows += evaluate_tasks(
                model.bridge,
                settings.tasks,
                batch_size=model.batch_size,
                limit=settings.task_limit or None,
                include_path=settings.tasks_from,
                labels=where,
            )
    return rows


def masked_rows(run: Study, mask: WeightMask, labels: dict[str, Label]) -> Rows:
    """Held-out rows under a mask, its size, and the divergence on texts."""
    model, contrast = run.model, run.terms.contrast
    rows = heldout_rows(run, labels, mask)
    where = {**labels, "split": "heldout"}
    rows += [Measurement.exact("weights_removed", where, mask.n_removed)]
    references = contrast.references("heldout")
    divergence = kl_under(model.bridge, mask, model.batches(contrast, references))
    groups = [example.cluster for example in references]
    rows += [Measurement.average(run.terms.kl_metric, where, divergence, groups)]
    if model.plain_text:
        divergence = kl_under(model.bridge, mask, model.plain_text)
        rows += [Measurement.average("plain_kl", where, divergence, range(len(divergence)))]
    return rows
