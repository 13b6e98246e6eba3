"""The ways of choosing weights at every size, on the choice split, and the best mask of each."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Literal, NamedTuple

from harmcircuits.behaviours.calibration import Calibration
from harmcircuits.circuits.masks import WeightMask, random_like, top_fraction
from harmcircuits.hooks.attribution import removal_effect, snip_scores
from harmcircuits.hooks.objectives import completion_loss
from harmcircuits.measurements import Label, Measurement, Rows
from harmcircuits.studies.controls import Unpruned, opposite_sign
from harmcircuits.studies.run import Point, Study
from harmcircuits.studies.settings import Decides
from harmcircuits.studies.terms import Terms

SEARCH = "search"
ONE_SHOT = "one shot"
PUBLISHED = "published"
WAYS = (SEARCH, ONE_SHOT, PUBLISHED)

NO_BUDGETS: Mapping[str, float] = MappingProxyType({})

P_OVER_Q = 5  # of the published set difference (arXiv 2604.09544: q = 1e-4, p = 5e-4)


def operating_point(
    points: Sequence[Point],
    rows: Rows,
    terms: Terms,
    *,
    tolerance: float,
    budget: float,
    budgets: Mapping[str, float] = NO_BUDGETS,
    decides: Decides = "rate",
) -> Point | None:
    """The point that takes most of the target among those that keep everything else."""
    before = _unpruned(rows)
    # What is taken falls: a rate of valid answers, or, as its sign is turned, a loss that rises.
    taken, sign = terms.target.metric, 1
    if decides == "loss":
        taken, sign = terms.target.nll_metric, -1

    budgets = {terms.contrast.name: budget, **budgets}
    candidates = []
    for point in points:
        takes = sign * point.mean(taken) < sign * before[taken]
        if takes and not _not_kept(point, before, terms, tolerance, budgets):
            candidates.append(point)

    def rank(point: Point) -> tuple[float, int]:
        return sign * point.mean(taken), point.mask.n_removed

    return min(candidates, key=rank, default=None)


def not_kept_rows(run: Study, points: Sequence[Point]) -> Rows:
    """What each mask does not keep, by the rule of `operating_point`: `not_kept` is the change."""
    settings, terms = run.settings, run.terms
    before = _unpruned(run.rows)
    budgets = {terms.contrast.name: settings.budget_of(terms.contrast.name), **settings.budgets}
    rows = Rows()
    for point in points:
        where: dict[str, Label] = {"model": run.model.name, "mask": "circuit", **point.labels}
        where["split"] = "choice"
        for lost in _not_kept(point, before, terms, settings.tolerance, budgets):
            labels = {**where, "behaviour": lost.behaviour, "figure": lost.figure}
            rows += [Measurement.exact("not_kept", labels, lost.change)]
    return rows


class _NotKept(NamedTuple):
    """A figure of a kept behaviour that changes by more than it may."""

    behaviour: str
    figure: Literal["rate", "loss"]
    change: float


def _unpruned(rows: Rows) -> dict[str, float]:
    """The unpruned model's figures on the choice split."""
    return {row.metric: row.mean for row in rows.where(mask="none", split="choice")}


def _not_kept(
    point: Point,
    before: Mapping[str, float],
    terms: Terms,
    tolerance: float,
    budgets: Mapping[str, float],
) -> list[_NotKept]:
    """What a mask does not leave within the tolerance and the budgets."""
    lost = []
    for behaviour in terms.kept:
        name, rate, loss = behaviour.name, behaviour.metric, behaviour.nll_metric
        # A behaviour that the model does not show was not measured.
        if rate in before and point.mean(rate) < before[rate] - tolerance:
            lost.append(_NotKept(name, "rate", point.mean(rate) - before[rate]))
        # Nor is there a loss of one without reference answers.
        has_budget = name in budgets and loss in before
        if has_budget and point.mean(loss) > before[loss] + budgets[name]:
            lost.append(_NotKept(name, "loss", point.mean(loss) - before[loss]))
    return lost


def measure_grid(
    run: Study,
    unpruned: Unpruned,
    calibrations: Mapping[str, Calibration],
    spared: Mapping[str, Calibration],
) -> dict[str, list[Point]]:
    """Way of choosing -> its masks of every size on the choice split."""
    where = {"model": run.model.name, "mask": "none"}
    run.add(run.model.measure(split="choice", labels=where, only=run.terms.names))

    sizes = run.settings.sizes
    masks = _masks(run, unpruned, calibrations, spared)
    first = next(iter(masks.values()))
    controls = {
        "random": [random_like(mask, seed=run.settings.seed) for mask in first],
        "opposite sign": [opposite_sign(mask, unpruned) for mask in first],
    }
    n_ways = len(masks) + len(controls)
    advance = run.steps("choice", n_ways * len(sizes))
    points: dict[str, list[Point]] = {}
    for way, of_way in (masks | controls).items():
        kind = "circuit" if way in masks else way.replace(" ", "_")
        points[way] = []
        for size, mask in zip(sizes, of_way, strict=True):
            points[way].append(_measured(run, mask, kind, {"selection": way, "q": size}))
            advance()
    return {way: points[way] for way in masks}


def _masks(
    run: Study,
    unpruned: Unpruned,
    calibrations: Mapping[str, Calibration],
    spared: Mapping[str, Calibration],
) -> dict[str, list[WeightMask]]:
    """Way of choosing -> its masks, of every size; first the one that is studied."""
    sizes = run.settings.sizes
    target = calibrations[run.settings.target]
    if run.settings.published:
        return {PUBLISHED: _published(run, unpruned, target, spared)}
    masks = {SEARCH: run.find_circuits("search", sizes, calibrations, spared)}
    if run.settings.compare:
        # One scoring of the unpruned model, the same price and check: what the walk adds.
        options = {"steps": 1, "reach": 1, "renew": False}
        masks[ONE_SHOT] = run.find_circuits("one_shot", sizes, calibrations, spared, **options)
        masks[PUBLISHED] = _published(run, unpruned, target, spared)
    return masks


def _published(
    run: Study,
    unpruned: Unpruned,
    target: Calibration,
    spared: Mapping[str, Calibration],
) -> list[WeightMask]:
    """`set_difference` of every size q and p = 5 q, by the loss; each behaviour is scored once."""
    sizes = run.settings.sizes
    shares = [min(1.0, P_OVER_Q * size) for size in sizes]
    scores = unpruned.effect
    if run.settings.scored_by != "loss":
        scores = removal_effect(run.model.bridge, target.batches, max_memory=run.max_memory)
    masks = top_fraction(scores, sizes)
    for data in spared.values():
        needed = snip_scores(
            run.model.bridge, data.batches, completion_loss, max_memory=run.max_memory
        )
        needed_masks = top_fraction(needed, shares)
        masks = [mask - other for mask, other in zip(masks, needed_masks, strict=True)]
        del needed  # before those of the next behaviour are accumulated
    return masks


def _measured(run: Study, mask: WeightMask, kind: str, how: dict[str, Label]) -> Point:
    """A mask with its figures on the choice split, which the run keeps."""
    where: dict[str, Label] = {"model": run.model.name, "mask": kind, **how}
    rows = run.model.measure(
        mask=mask,
        split="choice",
        labels=where,
        only=run.terms.measured,
    )
    where["split"] = "choice"
    rows += [Measurement.exact("weights_removed", where, mask.n_removed)]
    run.add(rows)
    return Point(mask, how, rows)
