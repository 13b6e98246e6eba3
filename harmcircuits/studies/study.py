"""The main job: find the weights behind a behaviour, remove them, and measure what else is lost.

Score, choose, mask, measure: a grid of masks is measured on the choice split, one of them is chosen
by a rule, and only it and its controls are measured on held-out requests.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.progress import Progress

from harmcircuits.behaviours.model import OTHERS, Calibration, Model, NotShownError
from harmcircuits.circuits.ground_truth import ground_truth_rows
from harmcircuits.circuits.location import location_rows
from harmcircuits.circuits.masks import WeightMask, random_like, top_fraction, union
from harmcircuits.circuits.scores import WeightScores
from harmcircuits.display import plural
from harmcircuits.hooks.accumulation import memory_groups
from harmcircuits.hooks.attribution import all_scores, removal_effect, snip_scores
from harmcircuits.hooks.losses import completion_nll, kl_under, perplexity
from harmcircuits.hooks.masking import masked
from harmcircuits.hooks.search import find_circuit, iterative_pruning
from harmcircuits.hooks.weights import named_weights, weight_sites
from harmcircuits.measurements import Label, Manifest, Measurement, Rows
from harmcircuits.studies.controls import controls
from harmcircuits.studies.diagnostics import diagnostics
from harmcircuits.studies.settings import FOR_REAL_MODELS, StudySettings
from harmcircuits.studies.terms import Terms
from harmcircuits.studies.utility import evaluate_tasks, task_manager

N_DIAGNOSED = 64  # examples behind a gradient norm, which costs as much as their scores


@dataclass(frozen=True)
class Point:
    """One mask of the grid.

    Attributes:
        mask: the weights removed.
        labels: how they were chosen: `selection`, `p` (share protected) and `q` (share removed).
        rows: its figures on the choice split.
    """

    mask: WeightMask
    labels: dict[str, Label]
    rows: Rows = field(repr=False)

    def mean(self, metric: str) -> float:
        """The point's figure for this metric."""
        return self.rows.one(metric).mean


@dataclass(repr=False)
class Study:
    """A run, and everything it measured so far.

    Attributes:
        model: what is studied.
        settings: what is varied.
        out: where rows and masks are written as they come; None keeps them in memory.
        progress: shows how far it is.
        max_memory: bytes for accumulated scores.
        rows: every figure.
        masks: those measured on held-out requests, by name.
        chosen: the operating point; None where no mask keeps the rule.
    """

    model: Model
    settings: StudySettings
    out: Path | None = None
    progress: Progress = field(default_factory=lambda: Progress(disable=True))
    max_memory: int | None = None
    rows: Rows = field(default_factory=Rows)
    masks: dict[str, WeightMask] = field(default_factory=dict)
    chosen: Point | None = None

    def __repr__(self) -> str:
        chosen = f", chose {self.chosen.mask}" if self.chosen else ", chose no mask"
        removed = f"{self.settings.target} of {self.model.name}"
        return f"Study({removed}: {plural(len(self.rows), 'row')}{chosen})"

    @property
    def terms(self) -> Terms:
        """What its rows are called."""
        return Terms.of(self.model, self.settings.target, self.settings.contrast)

    def add(self, rows: Iterable[Measurement]) -> None:
        """Keep rows and write them out at once."""
        rows = Rows(rows)
        self.rows += rows
        if self.out is not None:
            rows.append_to(self.out / "rows.jsonl")

    def note(self, metric: str, value: float, **labels: Label) -> None:
        """Keep one exact figure."""
        labels = {"model": self.model.name, **labels}
        self.add([Measurement.exact(metric, labels, value)])

    def steps(self, name: str, total: int) -> Callable[[], None]:
        """A progress bar's `advance`."""
        task = self.progress.add_task(name, total=total)
        return lambda: self.progress.advance(task)


def study(
    model: Model,
    settings: StudySettings | None = None,
    *,
    target: str | None = None,
    protect: str | Sequence[str] | None = None,
    contrast: str | None = None,
    out: str | Path | None = None,
    progress: Progress | None = None,
    max_memory: int | None = None,
) -> Study:
    """Find the weights behind a behaviour, remove them, and measure what else is lost.

    A grid over sizes and protection, in one shot and in rounds, is measured on the choice split.
    The operating point is the mask that takes most of the target among those that keep the rest
    (see `operating_point`). Only it and its controls are then measured on held-out requests.

    >>> settings = hc.StudySettings(sizes=(0.002,), protect_shares=(0.005,), rounds=1, n_random=1)
    >>> hc.study(model, settings, protect="benign")
    Study(harmful of sft: ... rows, chose ...)

    Args:
        model: from `open_model`.
        settings: the grid; by default the usual one of organisms, or of real models.
        target: the behaviour to remove, in place of the settings'.
        protect: the behaviours to spare, in place of the settings'.
        contrast: the target's harmless counterpart, in place of the settings'.
        out: a new folder for `rows.jsonl`, `manifest.json` and `masks/*.safetensors`.
        progress: shows how far it is.
        max_memory: bytes on the devices for accumulated scores, as in `removal_effect`; the
            target's are then kept on disk, in `out`.

    Raises:
        ValueError: a folder that holds another study, a behaviour that is unknown or not shown, a
            bound too small for a matrix or without `out`, and as `evaluate_tasks`.
    """
    settings = _settings(model, settings, target, protect, contrast)
    run = Study(model, settings, Path(out) if out else None, max_memory=max_memory)
    if progress is not None:
        run.progress = progress
    _check(run)
    _write_manifest(run)

    n_weights = sum(weight.numel() for weight in named_weights(model.bridge).values())
    run.note("weights_scored", n_weights)
    run.note("tolerance", settings.tolerance)
    run.add(_heldout_rows(run, {"model": model.name, "mask": "none"}))

    calibrations = _calibrate(run)
    data = calibrations[settings.target]
    spared = model.protected(settings.target, settings.protect, calibrations)
    protected = _protected(run, spared)
    objective = model.behaviours[settings.target].objective
    scores = removal_effect(model.bridge, data.batches, objective, max_memory=max_memory)
    if max_memory is not None and run.out is not None:
        # Rounds score again: never two dense sets in memory.
        scores.save(run.out / "scores")
        scores = WeightScores.load(run.out / "scores")

    points = _grid(run, scores, protected, data, spared)
    run.chosen = operating_point(
        points, run.rows, run.terms, tolerance=settings.tolerance, budget=settings.budget
    )
    if model.ground_truth is not None:
        first_share = protected[settings.protect_shares[0]]
        named = all_scores(model.bridge, data.batches, scores, first_share, seed=settings.seed)
        weights = named_weights(model.bridge)
        run.add(ground_truth_rows(named, model.ground_truth, weights, {"model": model.name}))
    if run.chosen is not None:
        _measure_heldout(
            run,
            run.chosen,
            points,
            scores,
            protected,
            calibrations,
            spared,
        )
        sites = weight_sites(model.bridge)
        where = {"model": model.name, "mask": "circuit"}
        run.add(location_rows(run.chosen.mask, sites, where))
    return run


def operating_point(
    points: Sequence[Point],
    rows: Rows,
    terms: Terms,
    *,
    tolerance: float,
    budget: float | None = None,
) -> Point | None:
    """The point that takes most of the target among those that keep everything else.

    All on the choice split. Kept rates must be within `tolerance` of the unpruned model's; then the
    lowest rate of the target counts. With a `budget` the contrast's loss must not rise further, and
    the highest loss on the target counts: a judge of free text is coarse, and the loss is not. Ties
    go to the smaller mask. None when no point keeps the others, or none takes anything.

    Args:
        points: the grid.
        rows: those of the unpruned model among them.
        terms: which metric shows what.
        tolerance: how far a kept rate may fall.
        budget: how far the contrast's loss may rise, nats per token.
    """
    before = {row.metric: row.mean for row in rows.where(mask="none", split="choice")}
    if budget is None:
        taken, sign = terms.target.metric, 1
    else:
        taken, sign = terms.target.nll_metric, -1

    candidates = []
    for point in points:
        takes = sign * point.mean(taken) < sign * before[taken]
        if takes and _keeps(point, before, terms, tolerance, budget):
            candidates.append(point)

    def rank(point: Point) -> tuple[float, int]:
        return sign * point.mean(taken), point.mask.n_removed

    return min(candidates, key=rank, default=None)


def _keeps(
    point: Point,
    before: Mapping[str, float],
    terms: Terms,
    tolerance: float,
    budget: float | None,
) -> bool:
    """Whether a mask leaves everything but the target within the tolerance and the budget."""
    for rate in terms.kept_rates:
        if rate in before and point.mean(rate) < before[rate] - tolerance:
            return False
    loss = terms.contrast.nll_metric
    return budget is None or point.mean(loss) <= before[loss] + budget


def _settings(
    model: Model,
    settings: StudySettings | None,
    target: str | None,
    protect: str | Sequence[str] | None,
    contrast: str | None,
) -> StudySettings:
    if settings is None:
        settings = StudySettings() if model.is_invented else FOR_REAL_MODELS
    if isinstance(protect, str):
        protect = (protect,)
    changes = {"target": target, "contrast": contrast, "protect": protect and tuple(protect)}
    return replace(
        settings, **{name: value for name, value in changes.items() if value is not None}
    )


def _check(run: Study) -> None:
    """Refuse what cannot end well, before anything is written."""
    settings = run.settings
    _ = run.terms
    for name in settings.protect:
        if name != OTHERS:
            run.model.behaviour(name)
    if settings.target in settings.protect:
        raise ValueError(
            f"protect: {settings.target!r} is what is removed, so it cannot be protected; "
            f"expected some of {', '.join(run.model.others(settings.target))}"
        )
    list(memory_groups(weight_sites(run.model.bridge), run.max_memory))
    if run.max_memory is not None and run.out is None:
        raise ValueError(f"max_memory={run.max_memory:,} keeps scores on disk; give out=FOLDER too")
    if run.out is not None and (run.out / "rows.jsonl").exists():
        raise ValueError(
            f"{run.out} already holds a study (rows.jsonl); give another folder or remove it"
        )
    if settings.tasks:
        task_manager(settings.tasks, settings.tasks_from)


def _write_manifest(run: Study) -> None:
    if run.out is None:
        return
    (run.out / "masks").mkdir(parents=True, exist_ok=True)
    manifest = {"model": run.model.name, **vars(run.settings), **run.model.details}
    Manifest(manifest).save(run.out / "manifest.json")


def _calibrate(run: Study) -> dict[str, Calibration]:
    """Own verified answers of every behaviour that is scored and shown, with their diagnostics."""
    model, settings = run.model, run.settings
    scored = {settings.target, settings.contrast, *settings.protect}
    if OTHERS in settings.protect:
        scored |= set(model.others(settings.target))
    names = [name for name in model.behaviours if name in scored]
    advance = run.steps("calibrate", len(names))
    calibrations = {}
    for name in names:
        try:
            calibrations[name] = model.calibration(name)
        except NotShownError:
            if name == settings.target or name in settings.protect:
                raise
            # An unaligned model, say, does not refuse.
            run.note("calibration_yield", 0.0, behaviour=name)
        else:
            where = {"model": model.name}
            data = {name: calibrations[name]}
            n, bound = N_DIAGNOSED, run.max_memory
            run.add(diagnostics(model, data, where, n_examples=n, max_memory=bound))
        advance()
    return calibrations


def _protected(run: Study, spared: Mapping[str, Calibration]) -> dict[float, list[WeightMask]]:
    """Protect share -> what each behaviour keeps; holds one behaviour's scores at a time."""
    settings = run.settings
    protected: dict[float, list[WeightMask]] = {share: [] for share in settings.protect_shares}
    for data in spared.values():
        scores = snip_scores(run.model.bridge, data.batches, max_memory=run.max_memory)
        for share, masks in protected.items():
            masks.append(top_fraction(scores, share, within=settings.within))
        del scores
    return protected


def _grid(
    run: Study,
    scores: WeightScores,
    protected: Mapping[float, list[WeightMask]],
    data: Calibration,
    spared: Mapping[str, Calibration],
) -> list[Point]:
    """Every mask of the grid on the choice split, and a random and an opposite one of each size."""
    settings = run.settings
    where = {"model": run.model.name, "mask": "none"}
    unpruned = run.model.measure(split="choice", labels=where, only=run.terms.names)
    run.add(unpruned)
    loss = run.terms.contrast.nll_metric
    most = None
    if settings.budget is not None:
        most = unpruned.one(loss).mean + settings.budget

    n_sizes, n_shares = len(settings.sizes), len(settings.protect_shares)
    advance = run.steps("grid", n_shares * (n_sizes + settings.rounds) + 2 * n_sizes)
    points = []
    for number, share in enumerate(settings.protect_shares):
        one_shot = top_fraction(
            scores, settings.sizes, within=settings.within, exclude=union(protected[share])
        )
        for size, mask in zip(settings.sizes, one_shot, strict=True):
            points.append(_measured(run, mask, "circuit", "one shot", share, size))
            advance()
        if number == 0:
            _measure_chance(run, scores, protected[share], one_shot, share, advance)
        for mask in _growth(run, share, data, spared, (scores, protected[share])):
            size = mask.source.settings["size"]
            point = _measured(run, mask, "circuit", "rounds", share, size)
            points.append(point)
            advance()
            if most is not None and point.mean(loss) > most:
                break
    return points


def _measure_chance(
    run: Study,
    scores: WeightScores,
    protected: Sequence[WeightMask],
    one_shot: Sequence[WeightMask],
    share: float,
    advance: Callable[[], None],
) -> None:
    """A random mask and one of the opposite sign of each size: what nothing protects, once."""
    settings = run.settings
    for size, mask in zip(settings.sizes, one_shot, strict=True):
        random = random_like(mask, seed=settings.seed)
        _measured(run, random, "random", "random", share, size)
        advance()
    exclude = union(protected)
    opposite = top_fraction(-scores, settings.sizes, within=settings.within, exclude=exclude)
    for size, mask in zip(settings.sizes, opposite, strict=True):
        _measured(run, mask, "opposite_sign", "opposite sign", share, size)
        advance()


def _growth(
    run: Study,
    share: float,
    data: Calibration,
    spared: Mapping[str, Calibration],
    first: tuple[WeightScores, Sequence[WeightMask]],
) -> Iterator[WeightMask]:
    """The circuit after each round, up to the largest size."""
    settings = run.settings
    return iterative_pruning(
        run.model.bridge,
        data.batches,
        [other.batches for other in spared.values()],
        sizes=[max(settings.sizes)],
        protect_share=share,
        rounds=settings.rounds,
        within=settings.within,
        objective=run.model.behaviours[settings.target].objective,
        first=first,
        max_memory=run.max_memory,
    )


def _measured(
    run: Study,
    mask: WeightMask,
    kind: str,
    selection: str,
    share: float,
    size: float,
) -> Point:
    """A mask with its figures on the choice split, which are kept."""
    how: dict[str, Label] = {"selection": selection, "p": share, "q": size}
    where = {"model": run.model.name, "mask": kind, **how}
    rows = run.model.measure(mask=mask, split="choice", labels=where, only=run.terms.measured)
    where["split"] = "choice"
    rows += [Measurement.exact("weights_removed", where, mask.n_removed)]
    run.add(rows)
    return Point(mask, how, rows)


def _measure_heldout(
    run: Study,
    chosen: Point,
    points: Sequence[Point],
    scores: WeightScores,
    protected: Mapping[float, list[WeightMask]],
    calibrations: Mapping[str, Calibration],
    spared: Mapping[str, Calibration],
) -> None:
    """The operating point, the other way of choosing at its size, and all controls, held out."""
    model, settings = run.model, run.settings
    data = calibrations[settings.target]
    unmasked_nll = completion_nll(model.bridge, data.batches)
    share = float(chosen.labels["p"])
    first = (scores, protected[share])
    advance = run.steps("held-out, with controls", 6 + 2 * settings.n_random)

    def measure(mask: WeightMask, kind: str, name: str = "", **labels: Label) -> None:
        name = f"{kind}-{name}" if name else kind
        run.masks[name] = mask
        if run.out is not None:
            mask.save(run.out / "masks" / f"{name}.safetensors")
        run.add(_masked_rows(run, mask, {"model": model.name, "mask": kind, **labels}))
        change = completion_nll(model.bridge, data.batches, mask=mask) - unmasked_nll
        where = {"mask": kind, **labels, "split": "calibration"}
        run.note("predicted_loss_change", scores.sum_over(mask), **where)
        run.note("measured_loss_change", change.mean().item(), **where)
        advance()

    for name, mask, labels in _circuits(run, chosen, points, first, data, spared):
        measure(mask, "circuit", name, **labels)

    matched = controls(
        model,
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
                measure(mask, kind, str(number), seed=number)
            else:
                measure(mask, kind)


def _circuits(
    run: Study,
    chosen: Point,
    points: Sequence[Point],
    first: tuple[WeightScores, Sequence[WeightMask]],
    data: Calibration,
    spared: Mapping[str, Calibration],
) -> Iterator[tuple[str, WeightMask, dict[str, Label]]]:
    """(name, mask, labels) of the circuit in rounds, in one shot, and with less protection."""
    settings, size = run.settings, chosen.mask.fraction
    how: dict[str, Label] = {"p": chosen.labels["p"], "q": size, "protected": ", ".join(spared)}
    selection = str(chosen.labels["selection"])

    rounds = chosen.mask if selection == "rounds" else _nearest_in_rounds(points, chosen)
    yield "rounds", rounds, {"selection": "rounds", **how}

    scores, protected = first
    one_shot = top_fraction(scores, size, within=settings.within, exclude=union(protected))
    yield "one_shot", one_shot, {"selection": "one shot", **how}

    contrast = settings.contrast
    if contrast in spared and len(spared) > 1:
        alone = find_circuit(
            run.model.bridge,
            data.batches,
            [spared[contrast].batches],
            size=size,
            within=settings.within,
            objective=run.model.behaviours[settings.target].objective,
            **_search(run, chosen),
        )
        name = f"{selection.replace(' ', '_')}-{contrast}_only"
        yield name, alone, {**how, "selection": selection, "protected": contrast}


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


def _heldout_rows(run: Study, labels: dict[str, Label], mask: WeightMask | None = None) -> Rows:
    """What the model does on held-out requests, its perplexity, and the tasks."""
    model, settings = run.model, run.settings
    where = {**labels, "split": "heldout"}
    with masked(model.bridge, mask) if mask is not None else nullcontext():
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


def _masked_rows(run: Study, mask: WeightMask, labels: dict[str, Label]) -> Rows:
    """Held-out rows under a mask, its size, and the divergence on texts."""
    model, contrast = run.model, run.terms.contrast
    rows = _heldout_rows(run, labels, mask)
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
