"""The main job: find the weights behind a behaviour, remove them, and measure what else is lost."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

from harmcircuits.behaviours.behaviour import REFUSAL, TARGET, standard_behaviours
from harmcircuits.behaviours.judges import DEGENERATE
from harmcircuits.behaviours.model import (
    OTHERS,
    Model,
    other_behaviours,
    protected_data,
)
from harmcircuits.behaviours.outcomes import NotShownError
from harmcircuits.circuits.location import location_rows
from harmcircuits.circuits.masks import WeightMask, random_like, top_fraction
from harmcircuits.display import nearest
from harmcircuits.hooks.losses import completion_nll, kl_under, perplexity
from harmcircuits.hooks.masking import masked_if_given
from harmcircuits.hooks.objectives import completion_loss
from harmcircuits.hooks.weights import named_weights, weight_sites
from harmcircuits.measurements import Labels, Measurement, Rows
from harmcircuits.search.accumulation import memory_groups
from harmcircuits.search.attribution import gradient_norm, snip_scores
from harmcircuits.search.memory import free_for_scores
from harmcircuits.studies.controls import (
    controls,
    one_shot_masks,
    opposite_sign,
    unpruned_scores,
)
from harmcircuits.studies.run import PAGE, GridPoint, Study
from harmcircuits.studies.settings import AUTO, FOR_REAL_MODELS, StudySettings
from harmcircuits.studies.summary import (
    CIRCUIT,
    ONE_SHOT,
    PUBLISHED,
    SAME_SIZE,
    SEARCH,
    Roles,
)
from harmcircuits.studies.tasks import evaluate_tasks, task_manager

N_DIAGNOSED = 64  # examples behind a gradient norm, which costs as much as their scores
P_OVER_Q = 5  # of the published set difference (arXiv 2604.09544: q = 1e-4, p = 5e-4)
# Selection -> name of its mask's file
FILES = {
    SEARCH: CIRCUIT,
    ONE_SHOT: "one_shot",
    PUBLISHED: "published",
}
OWN_POINT = "operating point"  # the label `at` of a circuit, if it is not `SAME_SIZE`


Grid = Mapping[str, Sequence[GridPoint]]  # selection -> its masks of every size


class HeldOutMask(NamedTuple):
    """A mask that is measured on held-out requests."""

    name: str  # of its file
    mask: WeightMask
    labels: Labels  # of its rows
    title: str = ""  # in the page's table of shared weights; empty: not in this table


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
    """Find the weights that a behaviour needs, remove them, and measure what else is lost.

    A study measures three ways of choosing at every size on the choice split: the search
    (`Model.find_circuit`), the same in one shot, and the published set difference. The operating
    point of each way is the mask that leaves the fewest target or incoherent answers, among the
    masks that keep everything else (see `operating_point`). The chosen mask is the operating point
    of the search. Held-out requests measure only the operating points and the controls.

    >>> settings = hc.StudySettings(sizes=(0.002,), steps=2, n_random=1)
    >>> hc.study(model, settings, protect="benign")
    Study(harmful of sft: ... rows, chose ...)

    Args:
        model: a model from `open_model`.
        settings: the grid; by default the usual one of organisms, or of real models.
        out: a new folder for `rows.jsonl`, `manifest.json`, `masks/*.safetensors` and, at the end,
            `report.html`. While the study is under way, `walks` there keeps scores and searches.
        progress: whether to show progress bars.
        max_memory: bytes for accumulated scores, as in `removal_effect`; "auto": the free memory.
            A bound needs `out`, where the scores of the unpruned model are kept.
        resume: continue the unfinished study with these settings in `out`, if there is one. It
            repeats the measurements, and continues an interrupted search. The rows are the same.
        force: remove the study in `out` first, finished or not.
        changes: fields of `StudySettings`, such as `target`, that replace those of `settings`.

    Raises:
        ValueError: a folder that holds a study, without `resume` or `force`, or a study with other
            settings; a behaviour that is unknown or not shown; a bound too small for a matrix or
            without `out`; and as `evaluate_tasks`.
        OSError: `out` cannot be written. `resume` continues with what it holds.
    """
    run = Study(model, _complete(model, settings, changes), Path(out) if out else None, progress)
    run.max_memory = _free_memory(run) if max_memory == "auto" else max_memory
    # Everything that can be refused without running the model is refused first.
    _refuse_settings(run)
    _refuse_memory(run)
    if run.out is not None:
        run.begin(run.out, resume=resume, force=force)

    _measure_unpruned(run)
    _score(run)
    grid = _measure_grid(run)
    run.choice = _best(run, grid[SEARCH])
    if run.choice is not None:
        _measure_heldout(run, run.choice.mask, grid)
    else:
        _add_attempts(run, grid[SEARCH])
    if run.out is not None:
        # Imported here: drawing takes libraries that a study without a page does not need.
        from harmcircuits.studies.study_page import write_study_page

        write_study_page(run, run.out / PAGE)
    run.finish()
    return run


def _complete(
    model: Model, settings: StudySettings | None, changes: dict[str, Any]
) -> StudySettings:
    """The settings with their defaults and changes."""
    defaults = StudySettings() if model.is_invented else FOR_REAL_MODELS
    if "protect" in changes:
        names = changes["protect"]
        changes["protect"] = (names,) if isinstance(names, str) else tuple(names)
    return replace(settings or defaults, **changes)


def _free_memory(run: Study) -> int | None:
    target = run.roles.target
    batches = run.model.batches(target, target.references("calibration"))
    return free_for_scores(run.model.bridge, batches)


def _refuse_settings(run: Study) -> None:
    """Refuse unknown names, and a target that is protected."""
    model, settings = run.model, run.settings
    target = run.roles.target.name
    if target in settings.protect:
        raise ValueError(f"protect: {target!r} is the target of the study; remove it from protect")
    for name in (*settings.protect, settings.prefer):
        if name not in ("", OTHERS, AUTO):
            model.behaviour(name)
    names = {*model.behaviours, *standard_behaviours()}
    for name in settings.named_budgets:
        if name not in names:
            raise ValueError(f"budget: {name!r} is no behaviour; {nearest(name, names)}")
    if settings.tasks:
        task_manager(list(settings.tasks))  # refuses unknown tasks


def _refuse_memory(run: Study) -> None:
    """Refuse a memory bound without a folder, or too small for a single matrix."""
    if run.out is None and run.max_memory is not None:
        raise ValueError(f"max_memory={run.max_memory} keeps scores in files; give out=FOLDER too")
    list(memory_groups(weight_sites(run.model.bridge), run.max_memory))


def _measure_unpruned(run: Study) -> None:
    model = run.model
    n_weights = sum(weight.numel() for weight in named_weights(model.bridge).values())
    run.add_figure("weights_scored", n_weights)
    run.add_figure("tolerance", run.settings.tolerance)
    run.add(row.labelled(model=model.name) for row in (*model.validation, *model.repeats))
    run.add(_heldout_rows(run, {"model": model.name, "mask": "none"}))


# Scoring: the target and the retain set, on the model's own answers


def _score(run: Study) -> None:
    """Calibrate, and score the target and the protected behaviours on the unpruned model."""
    model, settings = run.model, run.settings
    _calibrate(run)
    protected = protected_data(model, settings.target, settings.protect, run.calibrations)
    run.protected = tuple(protected)
    run.prefer = settings.prefer
    if settings.prefer == AUTO:
        is_refusal = settings.target == TARGET and REFUSAL in run.calibrations
        run.prefer = REFUSAL if is_refusal else ""
    for name in run.protected:
        run.add_figure("budget", settings.budget_of(name), behaviour=name)
    run.unpruned = unpruned_scores(
        model,
        settings.target,
        run.calibrations[settings.target],
        protected,
        # On disk, since the searches hold dense scores of their own.
        folder=run.walk_folder("scores"),
        max_memory=run.max_memory,
    )


def _calibrate(run: Study) -> None:
    """The model's verified answers for every scored behaviour that it shows, with diagnostics."""
    model, settings = run.model, run.settings
    requested = {settings.target, settings.contrast, *settings.protect}
    if OTHERS in settings.protect:
        requested |= set(other_behaviours(model, settings.target))
    names = [name for name in model.behaviours if name in requested]
    for name in run.with_progress(names, "calibrate"):
        try:
            run.calibrations[name] = model.calibration(name)
        except NotShownError:
            if name == settings.target or name in settings.protect:
                raise
            # The others may be absent: an unaligned model does not refuse.
            run.add_figure("calibration_yield", 0.0, behaviour=name)
        else:
            _diagnose(run, name)


def _diagnose(run: Study, name: str) -> None:
    """Whether scores can be trusted: yield of verified answers, their loss, its gradient's norm."""
    model, data = run.model, run.calibrations[name]
    # The loss of every example, but the gradient of a few: a norm costs a backward pass.
    batches = data.batches[: max(1, N_DIAGNOSED // model.batch_size)]
    objective = model.behaviours[name].objective
    norm = gradient_norm(model.bridge, batches, objective, max_memory=run.max_memory)
    figures = {
        "calibration_yield": data.n_verified / data.n_asked,
        "calibration_examples": data.n_verified,
        "calibration_nll": completion_nll(model.bridge, data.batches).mean().item(),
        "gradient_norm": norm,
    }
    for metric, value in figures.items():
        run.add_figure(metric, value, behaviour=name)


# Choosing: masks of every size, on the choice split


def _measure_grid(run: Study) -> Grid:
    """The masks of every size, with figures on the choice split."""
    model, settings, roles = run.model, run.settings, run.roles
    where = {"model": model.name, "mask": "none"}
    run.add(model.measure(split="choice", labels=where, only=roles.names))

    masks = _grid_masks(run)
    searched = masks[SEARCH]
    masks["random"] = [random_like(mask, seed=settings.seed) for mask in searched]
    masks["opposite sign"] = [opposite_sign(mask, run.unpruned) for mask in searched]
    grid = {}
    for selection in run.with_progress(masks, "choice"):
        kind = CIRCUIT if selection in FILES else selection.replace(" ", "_")
        grid[selection] = []
        for size, mask in zip(settings.sizes, masks[selection], strict=True):
            labels = {"selection": selection, "q": size}
            where = {"model": model.name, "mask": kind, **labels}
            rows = model.measure(mask=mask, split="choice", labels=where, only=roles.choice_names)
            where["split"] = "choice"
            rows += [Measurement.exact("weights_removed", where, mask.n_removed)]
            run.add(rows)
            grid[selection].append(GridPoint(mask, labels, rows))
    return grid


def _grid_masks(run: Study) -> dict[str, list[WeightMask]]:
    """Selection -> its masks of every size."""
    sizes = run.settings.sizes
    masks = {SEARCH: run.find_circuits("search", sizes, run.protected)}
    if run.settings.compare:
        # With the search's price and check: the difference is what learning adds.
        protected = {name: run.calibrations[name] for name in run.protected}
        budget = {name: run.settings.budget_of(name) for name in run.protected}
        masks[ONE_SHOT] = one_shot_masks(run.model, run.unpruned, protected, sizes, budget=budget)
        masks[PUBLISHED] = _published(run)
    return masks


def _published(run: Study) -> list[WeightMask]:
    """`set_difference` by the loss at every size q, with p = 5 q; each behaviour scored once."""
    sizes = run.settings.sizes
    masks = [top_fraction(run.unpruned.effect, size) for size in sizes]
    for name in run.protected:
        scores = snip_scores(
            run.model.bridge,
            run.calibrations[name].batches,
            completion_loss,
            max_memory=run.max_memory,
        )
        for number, size in enumerate(sizes):
            masks[number] -= top_fraction(scores, min(1.0, P_OVER_Q * size))
        del scores  # frees memory for the next behaviour's scores
    return masks


def _best(run: Study, points: Sequence[GridPoint]) -> GridPoint | None:
    return operating_point(points, _baseline(run), run.roles, run.settings)


def _baseline(run: Study) -> dict[str, float]:
    """The unpruned model's figures on the choice split."""
    return {row.metric: row.mean for row in run.rows.where(mask="none", split="choice")}


def operating_point(
    points: Sequence[GridPoint],
    baseline: Mapping[str, float],
    roles: Roles,
    settings: StudySettings,
) -> GridPoint | None:
    """The point with the fewest target or incoherent answers, among those that keep all else.

    By rates and not by losses: the loss of a broken behaviour has no upper end.
    """
    target = roles.target

    def rank(point: GridPoint) -> tuple[float, int]:
        rate = point.mean(target.metric)
        if DEGENERATE in target.metrics:
            rate += point.mean(target.metrics[DEGENERATE])
        return rate, point.mask.n_removed

    candidates = []
    for point in points:
        is_lower = point.mean(target.metric) < baseline[target.metric]
        if is_lower and not _violations(point, baseline, roles, settings):
            candidates.append(point)
    return min(candidates, key=rank, default=None)


def _violations(
    point: GridPoint,
    baseline: Mapping[str, float],
    roles: Roles,
    settings: StudySettings,
) -> list[tuple[str, str, float]]:
    """Behaviour, figure and change of every figure beyond the tolerance or its budget."""
    budgets = settings.named_budgets
    violations = []
    for behaviour in roles.abilities:
        name, rate, loss = behaviour.name, behaviour.metric, behaviour.nll_metric
        # A behaviour that the model does not show has no figures.
        if rate in baseline and point.mean(rate) < baseline[rate] - settings.tolerance:
            violations.append((name, "rate", point.mean(rate) - baseline[rate]))
        # A behaviour without reference answers has no loss.
        has_budget = name in budgets and loss in baseline
        if has_budget and point.mean(loss) > baseline[loss] + budgets[name]:
            violations.append((name, "loss", point.mean(loss) - baseline[loss]))
    return violations


def _add_attempts(run: Study, points: Sequence[GridPoint]) -> None:
    """Add the masks of a search without an operating point, and their violations."""
    for point in points:
        where = {"mask": CIRCUIT, **point.labels, "split": "choice"}
        violations = _violations(point, _baseline(run), run.roles, run.settings)
        for behaviour, figure, change in violations:
            run.add_figure("not_kept", change, **where, behaviour=behaviour, figure=figure)
        if point.mask.n_removed:
            run.add_mask(f"tried-{point.labels['q']:g}", point.mask)


# Measuring: the chosen mask, other ways of choosing, and the controls, on held-out requests


def _measure_heldout(run: Study, circuit: WeightMask, grid: Grid) -> None:
    bridge = run.model.bridge
    batches = run.calibrations[run.settings.target].batches
    unpruned_nll = completion_nll(bridge, batches)

    # Each mask is measured and saved before the next search begins.
    masks = chain(
        _compared_masks(run, circuit, grid),
        _contrast_only(run, circuit),
        _control_masks(run, circuit),
    )
    for name, mask, labels, title in run.with_progress(masks, "held out"):
        run.add_mask(name, mask)
        if title:
            run.titles[name] = title
        run.add(_masked_rows(run, mask, {"model": run.model.name, **labels}))
        change = completion_nll(bridge, batches, mask=mask) - unpruned_nll
        where = {**labels, "split": "calibration"}
        run.add_figure("predicted_loss_change", run.unpruned.effect.sum_over(mask), **where)
        run.add_figure("measured_loss_change", change.mean().item(), **where)
    where = {"model": run.model.name, "mask": CIRCUIT}
    run.add(location_rows(circuit, weight_sites(bridge), where))


def _compared_masks(run: Study, circuit: WeightMask, grid: Grid) -> Iterator[HeldOutMask]:
    """The mask of each way of choosing: at its operating point, or of about the circuit's size."""

    def distance(point: GridPoint) -> int:
        return abs(point.mask.n_removed - circuit.n_removed)

    for selection, name in FILES.items():
        if selection not in grid:
            continue
        point, at = _best(run, grid[selection]), OWN_POINT
        if point is None:
            point, at = min(grid[selection], key=distance), SAME_SIZE
        protected = ", ".join(run.protected)
        labels = {"mask": CIRCUIT, **point.labels, "at": at, "protected": protected}
        title = selection if name != CIRCUIT else ""
        yield HeldOutMask(name, point.mask, labels, title)


def _contrast_only(run: Study, circuit: WeightMask) -> Iterator[HeldOutMask]:
    """The circuit of a search that protects only the contrast, if the study protects more."""
    contrast, size = run.settings.contrast, circuit.fraction
    if run.settings.compare and contrast in run.protected and len(run.protected) > 1:
        name = f"circuit-{contrast}_only"
        (mask,) = run.find_circuits(name, [size], [contrast])
        labels = {"mask": CIRCUIT, "selection": SEARCH, "q": size, "protected": contrast}
        yield HeldOutMask(name, mask, labels, f"{contrast} only protected")


def _control_masks(run: Study, circuit: WeightMask) -> Iterator[HeldOutMask]:
    """The controls of the circuit; the name of a random one has its seed."""
    settings = run.settings
    masks_of = controls(
        run.model,
        settings.target,
        circuit,
        protect=run.protected,
        prefer=run.prefer,
        contrast=settings.contrast if settings.compare else "",  # a twin is a search
        n_random=settings.n_random,
        seed=settings.seed,
        calibrations=run.calibrations,
        unpruned=run.unpruned,
        progress=run.progress,
        folder=run.walk_folder("twin"),
        max_memory=run.max_memory,
    )
    for name, masks in masks_of.items():
        kind = name.replace(" ", "_")
        title = name if name in masks_of.searched else ""
        for seed, mask in enumerate(masks, start=settings.seed):
            if not name.startswith("random"):
                yield HeldOutMask(kind, mask, {"mask": kind}, title)
                continue
            title = f"random, seed {seed}" if name == "random" else ""
            yield HeldOutMask(f"{kind}-{seed}", mask, {"mask": kind, "seed": seed}, title)


def _heldout_rows(run: Study, labels: Labels, mask: WeightMask | None = None) -> Rows:
    """Held-out rows of the behaviours, the perplexity, and the tasks."""
    model = run.model
    where = {**labels, "split": "heldout"}
    with masked_if_given(model.bridge, mask):
        rows = model.measure(labels=labels, only=run.roles.names)
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


def _masked_rows(run: Study, mask: WeightMask, labels: Labels) -> Rows:
    """Held-out rows under a mask, its size, and the divergence on texts."""
    model, roles = run.model, run.roles
    rows = _heldout_rows(run, labels, mask)
    where = {**labels, "split": "heldout"}
    rows += [Measurement.exact("weights_removed", where, mask.n_removed)]
    references = roles.contrast.references("heldout")
    divergence = kl_under(model.bridge, mask, model.batches(roles.contrast, references))
    groups = [example.cluster for example in references]
    rows += [Measurement.average(roles.kl_metric, where, divergence, groups)]
    if model.plain_text:
        divergence = kl_under(model.bridge, mask, model.plain_text)
        rows += [Measurement.average("plain_kl", where, divergence, range(len(divergence)))]
    return rows
