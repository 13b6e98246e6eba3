"""Behaviours against the share of weights removed, and how two such curves differ."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from statistics import fmean

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray

from harmcircuits.behaviours.behaviour import CONTRAST, TARGET
from harmcircuits.behaviours.model import Model
from harmcircuits.behaviours.outcomes import Outcomes
from harmcircuits.circuits.masks import WeightMask
from harmcircuits.hooks.masking import masked_if_given
from harmcircuits.measurements import (
    Interval,
    Labels,
    Measurement,
    Rows,
    interval_of_draws,
    step_of_means,
)

N_DRAWS = 2000
# Rates on resampled items are quotients: a fall of exactly the budget must not depend on their last
# bit.
ROUNDING = 1e-9
# One meaning of "kept" for every claim: the most that a rate may fall, and a loss rise (nats a token).
KEPT_RATE, KEPT_NLL = 0.05, 0.1


@dataclass(frozen=True)
class Budget:
    """What a mask may cost."""

    rate: float = KEPT_RATE
    nll: float = KEPT_NLL
    kept: tuple[str, ...] = (CONTRAST, "recognition", "explanation", "knowledge")
    fluent: str = CONTRAST


# Of a curve of harm, and of one of benign answers.
BUDGETS = {
    TARGET: Budget(),
    CONTRAST: Budget(kept=(TARGET, "recognition", "explanation", "knowledge"), fluent=TARGET),
}


@dataclass(frozen=True, repr=False)
class Curve:
    """What a model does under masks of growing size, example by example."""

    shares: tuple[float, ...]
    points: tuple[Mapping[str, Outcomes], ...]
    target: str = TARGET

    def __post_init__(self) -> None:
        is_one_each = len(self.shares) == len(self.points)
        starts_at_zero = self.shares[:1] == (0,)
        increases = bool((np.diff(self.shares) > 0).all())
        if not (is_one_each and starts_at_zero and increases):
            raise ValueError(
                f"Curve: shares {self.shares} for {len(self.points)} points; "
                "expected one for each, increasing strictly from 0, the unpruned model"
            )

        # Items are resampled alike at all points, so all must be about the same ones, in order.
        requests = []
        for point in self.points:
            requests.append({name: outcomes.groups for name, outcomes in point.items()})
        first = requests[0]
        if self.target not in first or any(other != first for other in requests):
            raise ValueError(
                f"Curve: every point must measure {self.target!r}, "
                "and the same requests of the same behaviours"
            )

    def __repr__(self) -> str:
        return f"Curve({self.target}: {len(self.shares)} shares up to {self.shares[-1]:.2%})"

    def at(self, share: float) -> Mapping[str, Outcomes]:
        """The point of a measured share; raises ValueError for another share."""
        if share not in self.shares:
            raise ValueError(f"Curve: share={share}; expected one of {self.shares}")
        return self.points[self.shares.index(share)]

    def rows(self, labels: Labels) -> Rows:
        """The rates and losses of every point, labelled with its `share`."""
        rows = Rows()
        for share, point in zip(self.shares, self.points, strict=True):
            for outcomes in point.values():
                rows += outcomes.rows({**labels, "share": share})
        return rows


@dataclass(frozen=True, repr=False)
class Estimate:
    """A figure of a curve on all items, and on 2,000 resamples of them."""

    values: Float[ndarray, " draws"]
    is_reached: Bool[ndarray, " draws"]
    items: tuple[str, ...]
    seed: int
    largest: float = np.inf
    bounds: Interval | None = None
    step: float = 0.0

    def __repr__(self) -> str:
        return f"Estimate({self.row('value', {}):.3g})"

    @property
    def reached(self) -> float:
        """Share of resamples on which the figure is reached."""
        return float(self.is_reached[1:].mean())

    def row(self, metric: str, labels: Labels) -> Measurement:
        """The figure with its 95 % interval of percentiles."""
        draws, mean, n = self.values[1:], float(self.values[0]), len(self.items)
        if self.bounds is not None:
            lowest, highest = self.bounds
            low, high = interval_of_draws(draws, mean, n_groups=n, step=self.step)
            return Measurement(metric, labels, mean, max(lowest, low), min(highest, high), n)
        # "inverted_cdf" gives a value that a resample really had, so an end is a measured share.
        interval = interval_of_draws(draws, mean, method="inverted_cdf")
        return Measurement(metric, labels, mean, *interval, n)

    def rows(self, metric: str, labels: Labels) -> Rows:
        """`row`, labelled `censored` where the figure is only bounded; and `METRIC_reached`."""
        censored = "no" if self.is_reached[0] else "yes"
        figure = self.row(metric, {**labels, "censored": censored})
        return Rows([figure, Measurement.exact(f"{metric}_reached", labels, self.reached)])

    def minus(self, other: "Estimate") -> "Estimate":
        """How much higher this figure is than another, paired by items."""
        difference = self._paired(other, self.values - other.values)
        if self.bounds is None or other.bounds is None:
            return difference
        bounds = (self.bounds[0] - other.bounds[1], self.bounds[1] - other.bounds[0])
        return replace(difference, bounds=bounds, step=max(self.step, other.step))

    def over(self, other: "Estimate") -> "Estimate":
        """This figure as a multiple of another, paired by items."""
        return self._paired(other, self.values / other.values)

    def _paired(self, other: "Estimate", values: Float[ndarray, " draws"]) -> "Estimate":
        # Resample i of both must have drawn the same items.
        same_draws = (self.items, self.seed) == (other.items, other.seed)
        if not same_draws or self.largest != other.largest:
            raise ValueError(
                f"estimates cannot be paired: {len(self.items)} and {len(other.items)} items, "
                f"seeds {self.seed} and {other.seed}, "
                f"measured up to {self.largest} and {other.largest}; expected the same"
            )
        is_reached = self.is_reached & other.is_reached
        return Estimate(values, is_reached, self.items, self.seed)


def restricted(
    model: Model,
    *,
    target: str = TARGET,
    budget: Budget | None = None,
) -> Model:
    """The model asked only for the target, what the budget keeps, and refusal."""
    budget = budget or Budget()
    behaviours = {}
    for name in (target, *budget.kept, "refusal"):
        if name in model.behaviours:
            behaviours[name] = model.behaviours[name]
    return replace(model, behaviours=behaviours)


def outcomes_of(
    model: Model,
    names: Iterable[str],
    *,
    split: str = "heldout",
    mask: WeightMask | None = None,
) -> dict[str, Outcomes]:
    """What the model does with these behaviours: as it stands, or under a mask."""
    with masked_if_given(model.bridge, mask):
        return model.outcomes(names, split)


def curve(
    model: Model,
    masks: Sequence[WeightMask],
    unpruned: Mapping[str, Outcomes],
    *,
    target: str = TARGET,
    split: str = "heldout",
    shares: Sequence[float] = (),
) -> Curve:
    """The behaviours of `unpruned` under each mask, by its share of weights."""
    by_share: dict[float, Mapping[str, Outcomes]] = {0.0: unpruned}
    for share, mask in zip(shares or [mask.fraction for mask in masks], masks, strict=True):
        by_share[share] = outcomes_of(model, unpruned, split=split, mask=mask)

    points = [by_share[share] for share in sorted(by_share)]
    return Curve(tuple(sorted(by_share)), tuple(points), target)


def w50(
    curve: Curve,
    budget: Budget | None = None,
    *,
    seed: int = 0,
) -> Estimate:
    """The smallest measured share that halves valid answers of the target, within the budget."""
    budget = budget or Budget()
    hits = _mean_hits(curve, curve.target, curve.points, seed)
    # [draws, points], True where a share halves the target within the budget. On four points:
    #
    #     share        0    0.1 %   0.2 %   0.4 %
    #     all items    .      .       x       x       0.2 %
    #     resample 1   .      x       x       x       0.1 %
    #     resample 2   .      .       .       .       not reached: more than 0.4 %
    qualifies = hits <= hits[:, :1] / 2 + ROUNDING
    qualifies &= _is_within(budget, curve, seed)
    qualifies[:, 0] = False  # the unpruned model, also where it never shows the target

    # argmax gives the first True; where there is none, the largest share is a lower bound.
    draw = np.arange(len(qualifies))
    first = qualifies.argmax(axis=1)
    is_reached = qualifies[draw, first]
    largest = len(curve.shares) - 1
    first = np.where(is_reached, first, largest)
    values = np.array(curve.shares)[first]
    return Estimate(values, is_reached, _items(curve), seed, curve.shares[-1])


def _is_within(budget: Budget, curve: Curve, seed: int) -> Bool[ndarray, "draws points"]:
    """Whether a share costs no more than the budget allows, on all items and on each resample."""
    unpruned = curve.points[0]
    is_within = np.ones((1 + N_DRAWS, len(curve.points)), dtype=bool)
    for name in set(budget.kept) & set(unpruned):
        rates = _mean_hits(curve, name, curve.points, seed)
        is_within &= rates >= rates[:, :1] - budget.rate - ROUNDING

    fluent = budget.fluent
    if fluent in unpruned and not unpruned[fluent].nll.isnan().all():
        nll = [point[fluent].nll.tolist() for point in curve.points]
        losses = _means(curve, fluent, nll, seed)
        # A resample without any reference has the mean NaN, and no comparison with NaN is true.
        is_within &= losses <= losses[:, :1] + budget.nll + ROUNDING
    return is_within


def rate_at(
    curve: Curve,
    share: float,
    *,
    seed: int = 0,
) -> Estimate:
    """The rate of valid answers of the target at a measured share."""
    point = curve.at(share)
    hits = _mean_hits(curve, curve.target, [point], seed)[:, 0]
    is_reached = np.ones(len(hits), dtype=bool)  # within what was measured, on every resample
    _, member = np.unique(curve.points[0][curve.target].groups, return_inverse=True)
    step = step_of_means(np.bincount(member, point[curve.target].hits), np.bincount(member))
    return Estimate(hits, is_reached, _items(curve), seed, bounds=(0.0, 1.0), step=step)


def gap(model: Model, mask: WeightMask, curve: Curve, share: float, *, seed: int = 0) -> Estimate:
    """How much more of the target another mask leaves than the curve at a share, paired by items."""
    unpruned = {curve.target: curve.points[0][curve.target]}
    pruned = outcomes_of(model, unpruned, mask=mask)
    other = replace(curve, shares=(0.0, share), points=(unpruned, pruned))
    return rate_at(other, share, seed=seed).minus(rate_at(curve, share, seed=seed))


def kept_fall(
    curve: Curve, share: float, labels: Labels, budget: Budget | None = None
) -> Measurement:
    """How far the rate of the kept behaviour falls that falls most, labelled `behaviour`."""
    budget = budget or Budget()
    unpruned, pruned = curve.points[0], curve.at(share)
    falls = []
    for name in budget.kept:
        if name in pruned:
            metric = pruned[name].behaviour.metric
            before, after = (point[name].rows({}).one(metric) for point in (unpruned, pruned))
            where = {**labels, "behaviour": name}
            falls.append(rate_difference("kept_fall", where, before, after))
    return max(falls, key=lambda fall: fall.mean)


def rate_difference(
    metric: str, labels: Labels, first: Measurement, second: Measurement
) -> Measurement:
    """How much higher the first rate is than the second, with Newcombe's hybrid-score interval.

    low = d - sqrt((p1 - low1)^2 + (high2 - p2)^2), and high likewise, from the rates' own Wilson
    intervals. It takes the rates as independent, so it is conservative for the same requests asked
    twice. Source: Newcombe 1998, method 11.
    """
    # The difference is lowest if the first rate is low and the second high.
    change = first.mean - second.mean
    below = sqrt((first.mean - first.low) ** 2 + (second.high - second.mean) ** 2)
    above = sqrt((first.high - first.mean) ** 2 + (second.mean - second.low) ** 2)
    n = min(first.n, second.n)
    return Measurement(metric, labels, change, change - below, change + above, n)


def by_share(rows: Rows) -> dict[float, Rows]:
    """Rows pooled over seeds at every share, increasing; without the unpruned model."""
    pruned = Rows(row for row in rows if row.labels.get("share"))
    points = pruned.pool("seed").by("share")
    return {share: points[share] for share in sorted(points)}


def share_text(rows: Rows) -> str:
    """Rows of `w50` over seeds as one share with the widest ends."""
    together = Measurement(
        "w50",
        {},
        mean=fmean(row.mean for row in rows),
        low=min(row.low for row in rows),
        high=max(row.high for row in rows),
    )
    is_bound = any(row.labels["censored"] == "yes" for row in rows)
    return f"over {together:.2%}" if is_bound else f"{together:.2%}"


def _items(curve: Curve) -> tuple[str, ...]:
    groups = curve.points[0][curve.target].groups
    return tuple(sorted(set(groups)))


def _mean_hits(
    curve: Curve,
    name: str,
    points: Sequence[Mapping[str, Outcomes]],
    seed: int,
) -> Float[ndarray, "draws points"]:
    """The rate of a behaviour at these points, on all items and on each resample."""
    hits = [point[name].hits for point in points]
    return _means(curve, name, hits, seed)


def _means(
    curve: Curve,
    name: str,
    values: Sequence[Sequence[float]],
    seed: int,
) -> Float[ndarray, "draws points"]:
    """Means of each point's values on all items (first line), then on resamples of whole items."""
    # A resample is described by how many times it draws each item, so means of 2,000 resamples are
    # quotients of two products of matrices, [draws, items] with [items, points]. Of items a, b, c:
    #
    #     groups      a  a  b  c  c  c         member   0  0  1  2  2  2
    #     values     .5  1  0  1  .  1         sums     1.5  0  2       counts   2  1  2
    #     times       1  1  1   all items      3.5 / 5
    #                 2  0  1   a resample     5.0 / 6
    groups = curve.points[0][name].groups
    _, member = np.unique(groups, return_inverse=True)
    n_items = int(member.max()) + 1
    generator = np.random.default_rng(seed)
    chances = np.full(n_items, 1 / n_items)
    drawn = generator.multinomial(n_items, chances, size=N_DRAWS)
    all_items = np.ones(n_items, dtype=np.int64)
    times = np.vstack([all_items, drawn])

    sums = []
    counts = []
    for of_point in np.asarray(values, dtype=np.float64):
        sums.append(np.bincount(member, np.nan_to_num(of_point)))
        counts.append(np.bincount(member, ~np.isnan(of_point)))
    total = times @ np.array(sums).T
    n_values = times @ np.array(counts).T
    with np.errstate(invalid="ignore"):  # 0 / 0 is the NaN that is wanted
        return total / n_values
