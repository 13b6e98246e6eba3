"""The grid of masks on the choice split, and the rule that chooses one of them."""

from collections.abc import Callable, Iterator, Mapping, Sequence

from harmcircuits.behaviours.model import Calibration
from harmcircuits.circuits.masks import WeightMask, random_like, top_fraction, union
from harmcircuits.circuits.scores import WeightScores
from harmcircuits.measurements import Label, Measurement, Rows
from harmcircuits.studies.rounds import iterative_pruning
from harmcircuits.studies.run import Point, Study
from harmcircuits.studies.terms import Terms


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
    lowest rate of the target wins. With a `budget` the contrast's loss must not rise by more than
    it, and the highest loss on the target wins: the verdicts on free text are coarse, and the loss
    is not. Ties go to the smaller mask. None if no point keeps the others, or none takes anything.

    Args:
        points: the grid.
        rows: those of the unpruned model among them.
        terms: which metric shows what.
        tolerance: how far a kept rate may fall.
        budget: how far the contrast's loss may rise, nats per token.
    """
    unpruned = rows.where(mask="none", split="choice")
    before = {row.metric: row.mean for row in unpruned}
    # What is taken falls: a rate of valid answers, or, as its sign is turned, a loss that rises.
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
        # A behaviour that the model does not show was not measured.
        if rate in before and point.mean(rate) < before[rate] - tolerance:
            return False
    loss = terms.contrast.nll_metric
    return budget is None or point.mean(loss) <= before[loss] + budget


def measure_grid(
    run: Study,
    scores: WeightScores,
    protected: Mapping[float, list[WeightMask]],
    data: Calibration,
    spared: Mapping[str, Calibration],
) -> list[Point]:
    """Every mask of the grid on the choice split, and a random and an opposite one of each size.

    Args:
        run: keeps the rows.
        scores: of the target, on the unpruned model.
        protected: protect share -> what each behaviour keeps.
        data: the target's calibration data.
        spared: data of what is protected, scored again in each round.
    """
    settings = run.settings
    where = {"model": run.model.name, "mask": "none"}
    unpruned = run.model.measure(split="choice", labels=where, only=run.terms.names)
    run.add(unpruned)
    loss = run.terms.contrast.nll_metric
    largest_loss = None
    if settings.budget is not None:
        largest_loss = unpruned.one(loss).mean + settings.budget

    # For each share the sizes in one shot and the rounds; and once a random mask and one of the
    # opposite sign of each size.
    n_sizes, n_shares = len(settings.sizes), len(settings.protect_shares)
    n_steps = n_shares * (n_sizes + settings.rounds) + 2 * n_sizes
    advance = run.steps("grid", n_steps)
    points = []
    for number, share in enumerate(settings.protect_shares):
        one_shot = top_fraction(
            scores,
            settings.sizes,
            within=settings.within,
            exclude=union(protected[share]),
        )
        for size, mask in zip(settings.sizes, one_shot, strict=True):
            points.append(_measured(run, mask, "circuit", "one shot", share, size))
            advance()
        if number == 0:
            _measure_chance(run, scores, protected[share], one_shot, share, advance)
        # Each round is measured before the next one starts: one that is past the budget ends the
        # growth, and the rounds after it are never searched for.
        for mask in _growth(run, share, data, spared, (scores, protected[share])):
            size = mask.source.settings["size"]
            point = _measured(run, mask, "circuit", "rounds", share, size)
            points.append(point)
            advance()
            if largest_loss is not None and point.mean(loss) > largest_loss:
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
    """A random mask and one of the opposite sign of each size, measured for one protect share."""
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
    """A mask with its figures on the choice split, which the run keeps."""
    # The names under which the paper varies them: p is what is protected, q what is removed.
    how: dict[str, Label] = {"selection": selection, "p": share, "q": size}
    where = {"model": run.model.name, "mask": kind, **how}
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
