"""The main job: find the weights behind a behaviour, remove them, and measure what else is lost."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from harmcircuits.behaviours.behaviour import REFUSAL, TARGET, standard_behaviours
from harmcircuits.behaviours.judges import DEGENERATE
from harmcircuits.behaviours.model import OTHERS, Model, other_behaviours, protected_data
from harmcircuits.behaviours.outcomes import Calibration, NotShownError
from harmcircuits.circuits.location import location_rows
from harmcircuits.circuits.masks import WeightMask, random_like, top_fraction
from harmcircuits.display import nearest
from harmcircuits.hooks.losses import completion_nll, kl_under, perplexity
from harmcircuits.hooks.masking import masked_if_given
from harmcircuits.hooks.objectives import completion_loss
from harmcircuits.hooks.weights import named_weights, weight_sites
from harmcircuits.measurements import Label, Labels, Measurement, Rows
from harmcircuits.search.accumulation import memory_groups
from harmcircuits.search.attribution import gradient_norm, snip_scores
from harmcircuits.search.memory import free_for_scores
from harmcircuits.studies.controls import at_once, controls, opposite_sign, unpruned_scores
from harmcircuits.studies.run import PAGE, Point, Study
from harmcircuits.studies.settings import AUTO, FOR_REAL_MODELS, StudySettings
from harmcircuits.studies.summary import CIRCUIT, ONE_SHOT, PUBLISHED, SAME_SIZE, SEARCH, Terms
from harmcircuits.studies.tasks import evaluate_tasks, task_manager

N_DIAGNOSED = 64  # examples behind a gradient norm, which costs as much as their scores
P_OVER_Q = 5  # of the published set difference (arXiv 2604.09544: q = 1e-4, p = 5e-4)
# The circuits of the ways have files of these names.
FILES = {SEARCH: CIRCUIT, ONE_SHOT: "one_shot", PUBLISHED: "published"}
OWN_POINT = "operating point"  # the label `at` of a circuit; or `SAME_SIZE`


def study(
    model: Model,
    settings: StudySettings | None = None,
    *,
    out: str | Path | None = None,
    progress: bool = False,
    max_memory: int | Literal["auto"] | None = None,
    resume: bool = False,
    force: bool = False,
    **changes: Any,
) -> Study:
    """Find weights without which a behaviour goes, remove them, and measure what else is lost.

    Three ways of choosing are measured at every size on the choice split: the search
    (`Model.find_circuit`), the same in one shot, and the published set difference. The operating
    point of each is the mask that leaves fewest answers of the target or broken ones, among those
    that keep the rest (see `operating_point`); the chosen one is that of the search. Only these and
    its controls are then measured on held-out requests.

    >>> settings = hc.StudySettings(sizes=(0.002,), steps=2, n_random=1)
    >>> hc.study(model, settings, protect="benign")
    Study(harmful of sft: ... rows, chose ...)

    Args:
        model: from `open_model`.
        settings: the grid; by default the usual one of organisms, or of real models.
        out: a new folder for `rows.jsonl`, `manifest.json`, `masks/*.safetensors` and, at the end,
            `report.html`. While the study is under way `walks` there keeps scores and searches.
        progress: shows how far it is.
        max_memory: bytes for scores that are accumulated, as in `removal_effect`; needs `out`,
            which keeps those of the unpruned model meanwhile.
        resume: go on with the unfinished study of these settings in `out`, if there is one: it
            measures again, and searches on from where it was interrupted. The rows are the same.
        force: remove the study in `out` first, finished or not.
        changes: fields of `StudySettings`, such as `target`, in place of those of `settings`.

    Raises:
        ValueError: a folder that holds a study, unless `resume` or `force` says what becomes of it,
            or that of other settings; a behaviour that is unknown or not shown, a bound too small
            for a matrix, a bound without `out`, and as `evaluate_tasks`.
        OSError: `out` cannot be written. What is in it goes on with `resume`.
    """
    # What can be refused without running the model is refused first.
    if "protect" in changes:
        names = changes["protect"]
        changes["protect"] = (names,) if isinstance(names, str) else tuple(names)
    usual = StudySettings() if model.is_invented else FOR_REAL_MODELS
    settings = replace(settings or usual, **changes)
    folder = Path(out) if out else None
    if max_memory == "auto":
        target = model.behaviour(settings.target)
        max_memory = free_for_scores(
            model.bridge, model.batches(target, target.references("calibration"))
        )
    run = Study(model, settings, folder, progress, max_memory)
    if folder is None and max_memory is not None:
        raise ValueError(f"max_memory={max_memory} keeps scores in files; give out=FOLDER too")
    _check(run)
    if folder is not None:
        run.begin(folder, resume=resume, force=force)

    n_weights = sum(weight.numel() for weight in named_weights(model.bridge).values())
    run.note("weights_scored", n_weights)
    run.note("tolerance", settings.tolerance)
    run.add(row.labelled(model=model.name) for row in (*model.validation, *model.repeats))
    run.add(_heldout_rows(run, {"model": model.name, "mask": "none"}))

    # Score: the target, and what is protected.
    run.calibrations = _calibrate(run)
    spared = protected_data(model, settings.target, settings.protect, run.calibrations)
    run.protected = tuple(spared)
    run.prefer = _preferred(run)
    for name in run.protected:
        run.note("budget", settings.budget_of(name), behaviour=name)
    run.unpruned = unpruned_scores(
        model,
        settings.target,
        run.calibrations[settings.target],
        spared,
        # On disk, since the searches hold dense sets of their own.
        folder=run.kept_in("scores"),
        max_memory=max_memory,
    )

    # Choose, on the choice split alone.
    points = _measure_grid(run)
    best = {way: _best(run, of_way) for way, of_way in points.items()}
    run.chosen = best[SEARCH]

    # Measure, on requests that neither scored nor chose it.
    if run.chosen is not None:
        _measure_heldout(run, run.chosen.mask, points, best)
        where = {"model": model.name, "mask": CIRCUIT}
        run.add(location_rows(run.chosen.mask, weight_sites(model.bridge), where))
    else:
        _keep_tried(run, points[SEARCH])
    if folder is not None:
        # Imported here: drawing takes libraries that a study without a page does not need.
        from harmcircuits.studies.study_page import write_study_page

        write_study_page(run, folder / PAGE)
    run.finish()
    return run


def _check(run: Study) -> None:
    """Refuse what cannot end well, before anything is written."""
    model, settings = run.model, run.settings
    _ = run.terms  # refuses unknown behaviours, and two that share a metric
    for name in settings.protect:
        if name != OTHERS:
            model.behaviour(name)
    known = {*model.behaviours, *standard_behaviours()}
    for name in settings.named_budgets:
        if name not in known:
            raise ValueError(f"budget: {name!r} is no behaviour; {nearest(name, known)}")
    if settings.target in settings.protect:
        raise ValueError(f"protect: {settings.target!r} is what is removed; leave it out")
    if settings.prefer not in ("", AUTO):
        model.behaviour(settings.prefer)

    # Refuses a bound too small for a single matrix.
    list(memory_groups(weight_sites(model.bridge), run.max_memory))
    if settings.tasks:
        task_manager(list(settings.tasks))  # refuses unknown tasks


def _calibrate(run: Study) -> dict[str, Calibration]:
    """Own verified answers of every behaviour that is scored and shown, with their diagnostics."""
    model, settings = run.model, run.settings
    scored = {settings.target, settings.contrast, *settings.protect}
    if OTHERS in settings.protect:
        scored |= set(other_behaviours(model, settings.target))
    names = [name for name in model.behaviours if name in scored]
    calibrations = {}
    for name in run.shown(names, "calibrate"):
        try:
            calibrations[name] = model.calibration(name)
        except NotShownError:
            if name == settings.target or name in settings.protect:
                raise
            # A behaviour among the "others" may be absent: an unaligned model does not refuse.
            run.note("calibration_yield", 0.0, behaviour=name)
        else:
            _diagnose(run, calibrations[name])
    return calibrations


def _preferred(run: Study) -> str:
    """The behaviour that should take the target's place."""
    settings, calibrations = run.settings, run.calibrations
    if settings.prefer != AUTO:
        return settings.prefer
    return REFUSAL if settings.target == TARGET and REFUSAL in calibrations else ""


def _diagnose(run: Study, data: Calibration) -> None:
    """Whether scores can be trusted: yield of verified answers, their loss, its gradient's norm."""
    model = run.model
    # The loss of every example, but the gradient of a few: a norm costs a backward pass.
    n_batches = max(1, N_DIAGNOSED // model.batch_size)
    objective = model.behaviours[data.behaviour].objective
    figures = {
        "calibration_yield": data.n_verified / data.n_asked,
        "calibration_examples": data.n_verified,
        "calibration_nll": completion_nll(model.bridge, data.batches).mean().item(),
        "gradient_norm": gradient_norm(
            model.bridge, data.batches[:n_batches], objective, max_memory=run.max_memory
        ),
    }
    for metric, value in figures.items():
        run.note(metric, value, behaviour=data.behaviour)


# Choosing: the ways at every size, on the choice split


def _measure_grid(run: Study) -> dict[str, list[Point]]:
    """Way of choosing -> its masks of every size on the choice split."""
    where = {"model": run.model.name, "mask": "none"}
    run.add(run.model.measure(split="choice", labels=where, only=run.terms.names))

    masks = _masks(run)
    matched = {
        "random": [random_like(mask, seed=run.settings.seed) for mask in masks[SEARCH]],
        "opposite sign": [opposite_sign(mask, run.unpruned) for mask in masks[SEARCH]],
    }
    points: dict[str, list[Point]] = {}
    for way, of_way in run.shown({**masks, **matched}.items(), "choice"):
        kind = CIRCUIT if way in masks else way.replace(" ", "_")
        points[way] = []
        for size, mask in zip(run.settings.sizes, of_way, strict=True):
            points[way].append(_measured(run, mask, kind, {"selection": way, "q": size}))
    return {way: points[way] for way in masks}


def _masks(run: Study) -> dict[str, list[WeightMask]]:
    """Way of choosing -> its masks, of every size."""
    sizes = run.settings.sizes
    masks = {SEARCH: run.find_circuits("search", sizes, run.protected)}
    if run.settings.compare:
        # Scores of the unpruned model, the same price and check: what learning adds.
        protected = {name: run.calibrations[name] for name in run.protected}
        budget = {name: run.settings.budget_of(name) for name in run.protected}
        masks[ONE_SHOT] = at_once(run.model, run.unpruned, protected, sizes, budget=budget)
        masks[PUBLISHED] = _published(run)
    return masks


def _published(run: Study) -> list[WeightMask]:
    """`set_difference` of every size q and p = 5 q, by the loss; each behaviour is scored once."""
    bridge, settings = run.model.bridge, run.settings
    masks = [top_fraction(run.unpruned.effect, size) for size in settings.sizes]
    shares = [min(1.0, P_OVER_Q * size) for size in settings.sizes]
    for name in run.protected:
        batches = run.calibrations[name].batches
        needed = snip_scores(bridge, batches, completion_loss, max_memory=run.max_memory)
        needed_masks = [top_fraction(needed, share) for share in shares]
        masks = [mask - other for mask, other in zip(masks, needed_masks, strict=True)]
        del needed  # before those of the next behaviour are accumulated
    return masks


def _measured(run: Study, mask: WeightMask, kind: str, how: dict[str, Label]) -> Point:
    """A mask with its figures on the choice split, which the run keeps."""
    where: dict[str, Label] = {"model": run.model.name, "mask": kind, **how}
    rows = run.model.measure(mask=mask, split="choice", labels=where, only=run.terms.measured)
    where["split"] = "choice"
    rows += [Measurement.exact("weights_removed", where, mask.n_removed)]
    run.add(rows)
    return Point(mask, how, rows)


def _best(run: Study, points: Sequence[Point]) -> Point | None:
    """The operating point of a way of choosing."""
    return operating_point(points, _unpruned(run), run.terms, run.settings)


def _unpruned(run: Study) -> dict[str, float]:
    """The unpruned model's figures on the choice split."""
    return {row.metric: row.mean for row in run.rows.where(mask="none", split="choice")}


def operating_point(
    points: Sequence[Point],
    before: Mapping[str, float],
    terms: Terms,
    settings: StudySettings,
) -> Point | None:
    """Of the points that keep everything else, the one that leaves least of the target or broken.

    By rates, not by losses: the loss of what is broken has no upper end.
    """
    target = terms.target
    candidates = []
    for point in points:
        takes = point.mean(target.metric) < before[target.metric]
        if takes and not _not_kept(point, before, terms, settings):
            candidates.append(point)

    def rank(point: Point) -> tuple[float, int]:
        left = point.mean(target.metric)
        if DEGENERATE in target.metrics:
            left += point.mean(target.metrics[DEGENERATE])
        return left, point.mask.n_removed

    return min(candidates, key=rank, default=None)


def _not_kept(
    point: Point, before: Mapping[str, float], terms: Terms, settings: StudySettings
) -> list[tuple[str, str, float]]:
    """Behaviour, figure and change of what a mask does not leave within tolerance and budgets."""
    budgets = settings.named_budgets
    lost = []
    for behaviour in terms.kept:
        name, rate, loss = behaviour.name, behaviour.metric, behaviour.nll_metric
        # A behaviour that the model does not show was not measured.
        if rate in before and point.mean(rate) < before[rate] - settings.tolerance:
            lost.append((name, "rate", point.mean(rate) - before[rate]))
        # Nor is there a loss of one without reference answers.
        has_budget = name in budgets and loss in before
        if has_budget and point.mean(loss) > before[loss] + budgets[name]:
            lost.append((name, "loss", point.mean(loss) - before[loss]))
    return lost


def _keep_tried(run: Study, points: Sequence[Point]) -> None:
    """Keep the masks of a search that has no operating point, and what is against each."""
    for point in points:
        where = {"mask": CIRCUIT, **point.labels, "split": "choice"}
        for behaviour, figure, change in _not_kept(point, _unpruned(run), run.terms, run.settings):
            run.note("not_kept", change, **where, behaviour=behaviour, figure=figure)
        if point.mask.n_removed:
            run.keep(f"tried-{point.labels['q']:g}", point.mask)


# Measuring: the chosen mask, and everything it is compared with, on held-out requests

Named = tuple[str, WeightMask, Labels]  # name of its file, and what its rows carry


def _measure_heldout(
    run: Study,
    chosen: WeightMask,
    points: Mapping[str, Sequence[Point]],
    best: Mapping[str, Point | None],
) -> None:
    """The operating point of each way of choosing, and all controls of the chosen one, held out."""
    model, settings = run.model, run.settings
    batches = run.calibrations[settings.target].batches
    unmasked_nll = completion_nll(model.bridge, batches)
    compared = _compared(run, chosen, points, best)

    # Each is measured and saved before the next is searched for.
    masks = chain(compared, _contrast_alone(run, chosen), _controls(run, chosen))
    for name, mask, labels in run.shown(masks, "held out"):
        run.keep(name, mask)
        run.add(_masked_rows(run, mask, {"model": model.name, **labels}))
        change = completion_nll(model.bridge, batches, mask=mask) - unmasked_nll
        where = {**labels, "split": "calibration"}
        run.note("predicted_loss_change", run.unpruned.effect.sum_over(mask), **where)
        run.note("measured_loss_change", change.mean().item(), **where)


def _compared(
    run: Study,
    chosen: WeightMask,
    points: Mapping[str, Sequence[Point]],
    best: Mapping[str, Point | None],
) -> Iterator[Named]:
    """The mask of each way of choosing: at its operating point, or of the size of the search's."""

    def distance(point: Point) -> int:
        return abs(point.mask.n_removed - chosen.n_removed)

    for way, of_way in points.items():
        point, at = best[way], OWN_POINT
        if point is None:
            point, at = min(of_way, key=distance), SAME_SIZE
        how: Labels = {"at": at, "protected": ", ".join(run.protected)}
        yield FILES[way], point.mask, {"mask": CIRCUIT, **point.labels, **how}


def _contrast_alone(run: Study, chosen: WeightMask) -> Iterator[Named]:
    """The circuit of the same search with only the contrast protected, where that is another."""
    contrast, size = run.settings.contrast, chosen.fraction
    if run.settings.compare and contrast in run.protected and len(run.protected) > 1:
        name = f"circuit-{contrast}_only"
        (alone,) = run.find_circuits(name, [size], [contrast])
        how: Labels = {"selection": SEARCH, "q": size, "protected": contrast}
        yield name, alone, {"mask": CIRCUIT, **how}


def _controls(run: Study, chosen: WeightMask) -> Iterator[Named]:
    """All controls of the chosen mask; of random ones each has its seed in its name."""
    settings = run.settings
    matched = controls(
        run.model,
        settings.target,
        chosen,
        protect=run.protected,
        prefer=run.prefer,
        # The target has no twin, and a twin is a search.
        contrast=settings.contrast if settings.compare else settings.target,
        n_random=settings.n_random,
        seed=settings.seed,
        calibrations=run.calibrations,
        unpruned=run.unpruned,
        progress=run.progress,
        folder=run.kept_in("twin"),
        max_memory=run.max_memory,
    )
    for name, masks in matched.items():
        kind = name.replace(" ", "_")
        for number, mask in enumerate(masks, start=settings.seed):
            if name.startswith("random"):
                yield f"{kind}-{number}", mask, {"mask": kind, "seed": number}
            else:
                yield kind, mask, {"mask": kind}


def _heldout_rows(run: Study, labels: dict[str, Label], mask: WeightMask | None = None) -> Rows:
    """What the model does on held-out requests, its perplexity, and the tasks."""
    model = run.model
    where = {**labels, "split": "heldout"}
    with masked_if_given(model.bridge, mask):
        rows = model.measure(labels=labels, only=run.terms.names)
        if model.plain_text:
            rows += [perplexity(model.bridge, model.plain_text, where)]
        for task, limit in run.settings.tasks.items():
            rows += evaluate_tasks(
                model.bridge,
                [task],
                batch_size=model.batch_size,
                limit=limit or None,
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
