"""The main job: find the weights behind a behaviour, remove them, and measure what else is lost."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.progress import Progress

from harmcircuits.behaviours.calibration import Calibration, NotShownError
from harmcircuits.behaviours.model import OTHERS, Model
from harmcircuits.behaviours.standard import standard_behaviours
from harmcircuits.circuits.location import location_rows
from harmcircuits.display import listed, nearest, plural
from harmcircuits.hooks.accumulation import memory_groups
from harmcircuits.hooks.objectives import token_error
from harmcircuits.hooks.weights import named_weights, weight_sites
from harmcircuits.measurements import write_manifest
from harmcircuits.storage import read_json
from harmcircuits.studies.controls import unpruned_scores
from harmcircuits.studies.diagnostics import diagnostics
from harmcircuits.studies.grid import PUBLISHED, measure_grid, not_kept_rows, operating_point
from harmcircuits.studies.heldout import heldout_rows, measure_heldout
from harmcircuits.studies.run import MANIFEST, PAGE, ROWS_FILE, UNNEEDED, WALKS, Point, Study
from harmcircuits.studies.settings import FOR_REAL_MODELS, StudySettings
from harmcircuits.studies.utility import task_manager

FEWEST_WEIGHTS = 10  # of a mask
N_DIAGNOSED = 64  # examples behind a gradient norm, which costs as much as their scores


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
    page: bool = False,
    resume: bool = False,
    force: bool = False,
) -> Study:
    """Find the weights behind a behaviour, remove them, and measure what else is lost.

    Three ways of choosing are measured at every size on the choice split: the search
    (`Model.find_circuit`), the same in one shot, and the published set difference. The operating
    point of each is the mask that takes most of the target among those that keep the rest (see
    `operating_point`); the chosen one is that of the search. Only these and its controls are then
    measured on held-out requests. With `StudySettings.published` there is one way, and its largest
    mask is measured whatever it does: the published protocol chooses none.

    >>> settings = hc.StudySettings(sizes=(0.002,), steps=2, n_random=1)
    >>> hc.study(model, settings, protect="benign")
    Study(harmful of sft: ... rows, chose ...)

    Args:
        model: from `open_model`.
        settings: the grid; by default the usual one of organisms, or of real models.
        target: the behaviour to remove, in place of the settings'.
        protect: the behaviours to spare, in place of the settings'.
        contrast: the target's harmless counterpart, in place of the settings'.
        out: a new folder for `rows.jsonl`, `manifest.json` and `masks/*.safetensors`. While the
            study is under way `walks` there keeps scores and searches.
        progress: shows how far it is.
        max_memory: bytes for scores that are accumulated, as in `removal_effect`; needs `out`,
            which keeps those of the unpruned model meanwhile.
        page: write `report.html` into `out` too, before the study counts as finished.
        resume: go on with the unfinished study of these settings in `out`, if there is one: it
            measures again, and searches on from where it was interrupted. The rows are the same.
        force: remove the study in `out` first, finished or not.

    Where the model's judge of harm was found not to see it, the loss decides, whatever the settings
    say.

    Raises:
        ValueError: a folder that holds a study, unless `resume` or `force` says what becomes of it,
            or that of other settings; a behaviour that is unknown or not shown, a size of fewer
            than ten weights, a bound too small for a matrix, a bound or a page without `out`, and
            as `evaluate_tasks`.
        OSError: `out` cannot be written. What is in it goes on with `resume`.
    """
    # What can be refused without running the model is refused first.
    settings = _settings(model, settings, target, protect, contrast)
    model = _with_objectives(model, settings)
    run = Study(model, settings, Path(out) if out else None, max_memory=max_memory)
    if progress is not None:
        run.progress = progress
    if page and out is None:
        raise ValueError("page=True writes report.html into a folder; give out=FOLDER too")
    _check(run)
    _prepare_folder(run, resume=resume, force=force)

    n_weights = sum(weight.numel() for weight in named_weights(model.bridge).values())
    run.note("weights_scored", n_weights)
    run.note("tolerance", settings.tolerance)
    run.add(row.labelled(model=model.name) for row in (*model.validation, *model.repeats))
    with run.stage("unpruned model, held out"):
        run.add(heldout_rows(run, {"model": model.name, "mask": "none"}))

    # Score: the target, and what is protected.
    with run.stage("calibration"):
        calibrations = _calibrate(run)
    data = calibrations[settings.target]
    spared = model.protected(settings.target, settings.protect, calibrations)
    run.protected = tuple(spared)
    _note_budgets(run)
    with run.stage("scores"):
        unpruned = unpruned_scores(
            model,
            settings.target,
            data,
            spared,
            # On disk, since the searches hold dense sets of their own.
            folder=run.walks / "scores" if run.walks is not None else None,
            max_memory=max_memory,
        )

    # Choose, on the choice split alone.
    with run.stage("searches and choice"):
        points = measure_grid(run, unpruned, calibrations, spared)
    best = _best(run, points)
    run.chosen = next(iter(best.values()))

    # Measure, on requests that neither scored nor chose it.
    if run.chosen is not None:
        with run.stage("held out, with controls"):
            measure_heldout(run, run.chosen, points, best, unpruned, calibrations)
        sites = weight_sites(model.bridge)
        where = {"model": model.name, "mask": "circuit"}
        run.add(location_rows(run.chosen.mask, sites, where))
    else:
        _keep_tried(run, next(iter(points.values())))
    if run.out is not None and page:
        with run.stage("page"):
            _write_page(run, run.out / PAGE)
    run.finish()
    return run


def _with_objectives(model: Model, settings: StudySettings) -> Model:
    """The model with the target, and the contrast for its twin, scored as the settings say."""
    if settings.scored_by == "loss":
        return model
    scored = []
    for name in (settings.target, settings.contrast):
        if name in model.behaviours and not model.behaviours[name].choices:
            scored.append(replace(model.behaviours[name], objective=token_error))
    return model.with_behaviours(*scored)


def _best(run: Study, points: Mapping[str, Sequence[Point]]) -> dict[str, Point | None]:
    """The operating point of every way of choosing, in their order."""
    settings = run.settings
    if settings.published:
        largest = points[PUBLISHED][-1]
        return {PUBLISHED: largest if largest.mask.n_removed else None}
    best = {}
    for way, of_way in points.items():
        best[way] = operating_point(
            of_way,
            run.rows,
            run.terms,
            tolerance=settings.tolerance,
            budget=settings.budget_of(settings.contrast),
            budgets=settings.budgets,
            decides=settings.decides,
        )
    return best


def _keep_tried(run: Study, points: Sequence[Point]) -> None:
    """Keep the masks of a search that has no operating point, and what is against each."""
    run.add(not_kept_rows(run, points))
    for point in points:
        if not point.mask.n_removed:
            continue
        name = f"tried-{point.labels['q']:g}"
        run.masks[name] = point.mask
        if run.out is not None:
            point.mask.save(run.out / "masks" / f"{name}.safetensors")


def _as_raw_text(model: Model, data: Calibration) -> Calibration:
    """The same answers, to be scored as request, newline and answer, without a chat template."""
    raw = replace(model, template="raw")
    return replace(data, batches=raw.batches(model.behaviours[data.behaviour], data.prompts))


def with_share_of_requests(model: Model, share: float) -> Model:
    """The model asked about a share of the items of every category only, in every split."""
    fewer = model.sampled(share, seed=0)
    return replace(fewer, details={**model.details, "share_of_requests": share})


def _write_page(run: Study, path: Path) -> None:
    # Imported here: drawing takes libraries that a study without a page does not need.
    from harmcircuits.studies.study_page import write_study_page

    write_study_page(run, path)


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
    changes: dict[str, Any] = {}
    if target is not None:
        changes["target"] = target
    if contrast is not None:
        changes["contrast"] = contrast
    if protect is not None:
        changes["protect"] = tuple(protect)
    if model.validation.where(used="no"):
        changes["decides"] = "loss"  # rates of a judge that does not see harm decide nothing
    return replace(settings, **changes)


def _check(run: Study) -> None:
    """Refuse what cannot end well, before anything is written."""
    settings = run.settings
    _ = run.terms  # refuses unknown behaviours, and two that share a metric
    for name in settings.protect:
        if name != OTHERS:
            run.model.behaviour(name)
    known = {*run.model.behaviours, *standard_behaviours()}
    for name in settings.budgets:
        if name not in known:
            raise ValueError(f"budgets: {name!r} is no behaviour; {nearest(name, known)}")
    if settings.target in settings.protect:
        raise ValueError(
            f"protect: {settings.target!r} is what is removed, so it cannot be protected; "
            f"expected some of {', '.join(run.model.others(settings.target))}"
        )
    if settings.prefer:
        run.model.refuse_preferred(settings.target, settings.prefer)
    # Refuses a bound that is too small for a single matrix.
    list(memory_groups(weight_sites(run.model.bridge), run.max_memory))
    if run.max_memory is not None and run.out is None:
        raise ValueError(f"max_memory={run.max_memory:,} keeps scores on disk; give out=FOLDER too")
    _refuse_few_weights(run)
    if settings.tasks:
        task_manager(settings.tasks, settings.tasks_from)  # refuses unknown tasks


def _refuse_few_weights(run: Study) -> None:
    """Raises ValueError for a size of so few weights that no figure could mean anything."""
    n_weights = sum(weight.numel() for weight in named_weights(run.model.bridge).values())
    for size in run.settings.sizes:
        n_removed = round(size * n_weights)
        if n_removed < FEWEST_WEIGHTS:
            raise ValueError(
                f"sizes={size:g}: {plural(n_removed, 'weight')} of {n_weights:,}; expected at "
                f"least {FEWEST_WEIGHTS}, give {FEWEST_WEIGHTS / n_weights:.1g} or more"
            )


def refuse_study_folder(out: Path, *, resume: bool, force: bool) -> None:
    """Raises ValueError for a folder with a study of which it was not said what becomes of it."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; give out= a new folder")
    if resume and force:
        raise ValueError("resume=True and force=True: go on with a study, or remove it; give one")
    is_under_way = (out / WALKS).exists()
    is_finished = (out / ROWS_FILE).exists() and not is_under_way
    if is_finished and not force:
        raise ValueError(
            f"{out} already holds a study, which is finished ({ROWS_FILE}); give another folder, "
            "or force=True to remove it first"
        )
    if is_under_way and not resume and not force:
        raise ValueError(
            f"{out} holds an unfinished study; give resume=True to go on with it, "
            "force=True to remove it first, or another folder"
        )


def _refuse_other_settings(run: Study, out: Path) -> None:
    before = read_json(out / MANIFEST, "the manifest of a study")["settings"]
    now = json.loads(json.dumps(_manifest_settings(run)))  # as they are in the file
    if before != now:
        changed = [name for name in now if before.get(name) != now[name]]
        raise ValueError(
            f"{out} holds an unfinished study with other settings ({listed(changed)}); "
            "give another folder, or force=True to remove it first"
        )


def _manifest_settings(run: Study) -> dict[str, Any]:
    return {"model": run.model.name, **vars(run.settings), **run.model.details}


def _prepare_folder(run: Study, *, resume: bool, force: bool) -> None:
    """Make the folder of a study, or what is left of an interrupted one, ready for its rows."""
    out, walks = run.out, run.walks
    if out is None or walks is None:
        return
    refuse_study_folder(out, resume=resume, force=force)
    if force:
        for name in (WALKS, UNNEEDED, "masks"):
            shutil.rmtree(out / name, ignore_errors=True)
        for name in (MANIFEST, PAGE):
            (out / name).unlink(missing_ok=True)
    elif walks.exists():
        _refuse_other_settings(run, out)

    # Of an unfinished study the searches stay; what it measured is measured again.
    (out / ROWS_FILE).unlink(missing_ok=True)
    shutil.rmtree(out / UNNEEDED, ignore_errors=True)
    shutil.rmtree(walks / "scores", ignore_errors=True)
    (out / "masks").mkdir(parents=True, exist_ok=True)
    write_manifest(out / MANIFEST, _manifest_settings(run))
    walks.mkdir(exist_ok=True)


def _calibrate(run: Study) -> dict[str, Calibration]:
    """Own verified answers of every behaviour that is scored and shown, with their diagnostics."""
    model, settings = run.model, run.settings
    names = _scored(run)
    advance = run.steps("calibrate", len(names))
    calibrations = {}
    for name in names:
        try:
            calibrations[name] = model.calibration(name)
        except NotShownError:
            if name == settings.target or name in settings.protect:
                raise
            # A behaviour among the "others" may be absent: an unaligned model does not refuse.
            run.note("calibration_yield", 0.0, behaviour=name)
        else:
            rows = diagnostics(
                model,
                {name: calibrations[name]},
                {"model": model.name},
                n_examples=N_DIAGNOSED,
                max_memory=run.max_memory,
            )
            run.add(rows)
        advance()
    if settings.published:
        return {name: _as_raw_text(model, data) for name, data in calibrations.items()}
    return calibrations


def _scored(run: Study) -> list[str]:
    """The behaviours that are scored if they are shown, in the model's order."""
    model, settings = run.model, run.settings
    scored = {settings.target, settings.contrast, *settings.protect}
    if OTHERS in settings.protect:
        scored |= set(model.others(settings.target))
    return [name for name in model.behaviours if name in scored]


def _note_budgets(run: Study) -> None:
    """What each protected behaviour may lose; the published protocol knows no budget."""
    if not run.settings.published:
        for name in run.protected:
            run.note("budget", run.settings.budget_of(name), behaviour=name)
