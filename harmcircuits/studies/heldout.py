"""The chosen mask, and everything it is compared with, on held-out requests."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from harmcircuits.behaviours.model import Calibration
from harmcircuits.circuits.masks import WeightMask, top_fraction, union
from harmcircuits.circuits.scores import WeightScores
from harmcircuits.hooks.losses import completion_nll, kl_under, perplexity
from harmcircuits.hooks.masking import masked_if_given
from harmcircuits.measurements import Label, Measurement, Rows
from harmcircuits.studies.controls import controls
from harmcircuits.studies.rounds import prune_in_rounds
from harmcircuits.studies.run import Point, Study
from harmcircuits.studies.utility import evaluate_tasks

# A mask with the name of its file, and what its rows carry besides the model.
NamedMask = tuple[str, WeightMask, dict[str, Label]]


def measure_heldout(
    run: Study,
    chosen: Point,
    points: Sequence[Point],
    scores: WeightScores,
    protected: Mapping[float, list[WeightMask]],
    calibrations: Mapping[str, Calibration],
    spared: Mapping[str, Calibration],
) -> None:
    """The operating point, the other way of choosing at its size, and all controls, held out.

    Args:
        run: keeps the rows and the masks.
        chosen: the operating point.
        points: the grid that it is one of.
        scores: of the target, on the unpruned model.
        protected: protect share -> what each behaviour keeps.
        calibrations: data of every behaviour that is scored.
        spared: data of those that are protected.
    """
    model, settings = run.model, run.settings
    data = calibrations[settings.target]
    unmasked_nll = completion_nll(model.bridge, data.batches)
    share = float(chosen.labels["p"])
    first = (scores, protected[share])
    circuits = _circuits(run, chosen, points, first, calibrations, spared)
    matched = _controls(run, chosen, first, calibrations, spared)
    n_masks = 6 + 2 * settings.n_random + bool(settings.search_size)
    advance = run.steps("held-out, with controls", n_masks)

    # Each is measured and saved before the next is searched for.
    for name, mask, labels in chain(circuits, matched):
        run.masks[name] = mask
        if run.out is not None:
            mask.save(run.out / "masks" / f"{name}.safetensors")
        run.add(masked_rows(run, mask, {"model": model.name, **labels}))
        change = completion_nll(model.bridge, data.batches, mask=mask) - unmasked_nll
        where = {**labels, "split": "calibration"}
        run.note("predicted_loss_change", scores.sum_over(mask), **where)
        run.note("measured_loss_change", change.mean().item(), **where)
        advance()


def _circuits(
    run: Study,
    chosen: Point,
    points: Sequence[Point],
    first: tuple[WeightScores, Sequence[WeightMask]],
    calibrations: Mapping[str, Calibration],
    spared: Mapping[str, Calibration],
) -> Iterator[NamedMask]:
    """The circuit by search, in rounds, in one shot, and with less protection."""
    settings, size = run.settings, chosen.mask.fraction
    data = calibrations[settings.target]
    how: dict[str, Label] = {"p": chosen.labels["p"], "q": size, "protected": ", ".join(spared)}
    kind: dict[str, Label] = {"mask": "circuit"}
    selection = str(chosen.labels["selection"])

    if settings.search_size:
        by_search = run.model.find_circuit(
            settings.target,
            size=settings.search_size,
            protect=list(spared),
            calibrations=calibrations,
            progress=run.progress,
            max_memory=run.max_memory,
        )
        of_search: dict[str, Label] = {"q": settings.search_size, "protected": how["protected"]}
        yield "circuit-search", by_search, {**kind, "selection": "search", **of_search}

    rounds = chosen.mask if selection == "rounds" else _nearest_in_rounds(points, chosen)
    yield "circuit-rounds", rounds, {**kind, "selection": "rounds", **how}

    scores, protected = first
    one_shot = top_fraction(scores, size, within=settings.within, exclude=union(protected))
    yield "circuit-one_shot", one_shot, {**kind, "selection": "one shot", **how}

    contrast = settings.contrast
    if contrast in spared and len(spared) > 1:
        alone = prune_in_rounds(
            run.model.bridge,
            data.batches,
            [spared[contrast].batches],
            size=size,
            within=settings.within,
            objective=run.model.behaviours[settings.target].objective,
            **_search(run, chosen),
        )
        name = f"circuit-{selection.replace(' ', '_')}-{contrast}_only"
        yield name, alone, {**kind, **how, "selection": selection, "protected": contrast}


def _controls(
    run: Study,
    chosen: Point,
    first: tuple[WeightScores, Sequence[WeightMask]],
    calibrations: Mapping[str, Calibration],
    spared: Mapping[str, Calibration],
) -> Iterator[NamedMask]:
    """All controls of the chosen mask; of random ones each has its seed in its name."""
    settings = run.settings
    matched = controls(
        run.model,
        settings.target,
        chosen.mask,
        protect=list(spared),
        contrast=settings.contrast,
        n_random=settings.n_random,
        seed=settings.seed,
        calibrations=calibrations,
        first=first,
        **_search(run, chosen),
    )
    for name, masks in matched.items():
        kind = name.replace(" ", "_")
        for number, mask in enumerate(masks, start=settings.seed):
            if name.startswith("random"):
                yield f"{kind}-{number}", mask, {"mask": kind, "seed": number}
            else:
                yield kind, mask, {"mask": kind}


def _search(run: Study, chosen: Point) -> dict[str, Any]:
    """How the chosen mask was found, for searches that are compared with it."""
    in_rounds = chosen.labels["selection"] == "rounds"
    return {
        "protect_share": float(chosen.labels["p"]),
        "rounds": chosen.mask.source.settings["round"] if in_rounds else 1,
        "max_memory": run.max_memory,
    }


def _nearest_in_rounds(points: Sequence[Point], chosen: Point) -> WeightMask:
    """The mask chosen in rounds under the same protection whose size is nearest."""
    in_rounds = (point for point in points if point.labels["selection"] == "rounds")
    same = [point for point in in_rounds if point.labels["p"] == chosen.labels["p"]]
    size = chosen.mask.n_removed
    return min(same, key=lambda point: abs(point.mask.n_removed - size)).mask


def heldout_rows(run: Study, labels: dict[str, Label], mask: WeightMask | None = None) -> Rows:
    """What the model does on held-out requests, its perplexity, and the tasks.

    Args:
        run: names the model and the tasks.
        labels: what the rows carry.
        mask: weights removed meanwhile.
    """
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
    """Held-out rows under a mask, its size, and the divergence on texts.

    Args:
        run: names the model and the tasks.
        mask: the weights to remove.
        labels: what the rows carry.
    """
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
