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
# The largest fall of a rate, and rise of a loss (nats a token), at which every claim says "kept".
KEPT_RATE, KEPT_NLL = 0.05, 0.1


@dataclass(frozen=True)
class Budget:
    """The most that a mask may cost."""

    rate: float = KEPT_RATE
    nll: float = KEPT_NLL
    abilities: tuple[str, ...] = (CONTRAST, "recognition", "explanation", "knowledge")
    fluent: str = CONTRAST


HARM_BUDGET = Budget()
# For a curve of harm, and for one of benign answers.
BUDGETS = {
    TARGET: HARM_BUDGET,
    CONTRAST: Budget(abilities=(TARGET, "recognition", "explanation", "knowledge"), fluent=TARGET),
}


@dataclass(frozen=True)
class Curve:
    """The outcomes of a model, example by example, under masks of growing size.

    The first share is 0, the unpruned model; every point measures the same requests in one order.
    """

    shares: tuple[float, ...]
    points: tuple[Mapping[str, Outcomes], ...]
    target: str = TARGET

    def at(self, share: float) -> Mapping[str, Outcomes]:
        """The point of a measured share."""
        return self.points[self.shares.index(share)]

    def rows(self, labels: Labels) -> Rows:
        """The rates and losses of every point, labelled with its `share`."""
        rows = Rows()
        for share, point in zip(self.shares, self.points, strict=True):
            for outcomes in point.values():
                rows += outcomes.rows({**labels, "share": share})
        return rows


@dataclass(frozen=True)
class Estimate:
    """A figure of a curve on all items, and on 2,000 resamples of them.

    Draw i of two estimates resamples the same items, so two estimates are paired by draws.
    """

    values: Float[ndarray, " draws"]
    is_reached: Bool[ndarray, " draws"]
    n_items: int
    bounds: Interval | None = None
    step: float = 0.0

    @property
    def reach_rate(self) -> float:
        """Share of resamples on which the figure is reached."""
        return float(self.is_reached[1:].mean())

    def row(self, metric: str, labels: Labels) -> Measurement:
        """The figure with its 95 % interval of percentiles."""
        draws, mean, n = self.values[1:], float(self.values[0]), self.n_items
        if self.bounds is None:
            # "inverted_cdf" gives the value of a resample, so an end is a measured share.
            interval = interval_of_draws(draws, mean, method="inverted_cdf")
            return Measurement(metric, labels, mean, *interval, n)
        low, high = interval_of_draws(draws, mean, n_groups=n, step=self.step)
        lowest, highest = self.bounds
        return Measurement(metric, labels, mean, max(lowest, low), min(highest, high), n)

    def rows(self, metric: str, labels: Labels) -> Rows:
        """`row`, labelled `censored` where the figure is only bounded; and `METRIC_reached`."""
        censored = "no" if self.is_reached[0] else "yes"
        figure = self.row(metric, {**labels, "censored": censored})
        return Rows([figure, Measurement.exact(f"{metric}_reached", labels, self.reach_rate)])

    def minus(self, base: "Estimate") -> "Estimate":
        """How much higher this figure is than another, paired by items."""
        is_reached = self.is_reached & base.is_reached
        difference = Estimate(self.values - base.values, is_reached, self.n_items)
        if self.bounds is None or base.bounds is None:
            return difference
        bounds = (self.bounds[0] - base.bounds[1], self.bounds[1] - base.bounds[0])
        return replace(difference, bounds=bounds, step=max(self.step, base.step))

    def over(self, base: "Estimate") -> "Estimate":
        """This figure as a multiple of another, paired by items."""
        is_reached = self.is_reached & base.is_reached
        return Estimate(self.values / base.values, is_reached, self.n_items)


def restricted(model: Model) -> Model:
    """The model with harmful requests, the abilities of the budget, and refusal only."""
    behaviours = {}
    for name in (TARGET, *HARM_BUDGET.abilities, "refusal"):
        if name in model.behaviours:
            behaviours[name] = model.behaviours[name]
    return replace(model, behaviours=behaviours)


def outcomes_of(
    model: Model, names: Iterable[str], *, mask: WeightMask | None = None
) -> dict[str, Outcomes]:
    """The outcomes of these behaviours on held-out requests: unpruned, or under a mask."""
    with masked_if_given(model.bridge, mask):
        return model.outcomes(names, "heldout")


def curve(
    model: Model,
    masks: Sequence[WeightMask],
    unpruned: Mapping[str, Outcomes],
    *,
    target: str = TARGET,
    shares: Sequence[float] = (),
) -> Curve:
    """The behaviours of `unpruned` under each mask, by its share of weights."""
    by_share: dict[float, Mapping[str, Outcomes]] = {0.0: unpruned}
    for share, mask in zip(shares or [mask.fraction for mask in masks], masks, strict=True):
        by_share[share] = outcomes_of(model, unpruned, mask=mask)

    points = [by_share[share] for share in sorted(by_share)]
    return Curve(tuple(sorted(by_share)), tuple(points), target)


def w50(curve: Curve, budget: Budget = HARM_BUDGET) -> Estimate:
    """The smallest measured share that halves valid answers of the target, within the budget."""
    hits = _mean_hits(curve, curve.target, curve.points)
    # [draws, points], True where a share halves the target within the budget. On four points:
    #
    #     share        0    0.1 %   0.2 %   0.4 %
    #     all items    .      .       x       x       0.2 %
    #     resample 1   .      x       x       x       0.1 %
    #     resample 2   .      .       .       .       not reached: more than 0.4 %
    qualifies = hits <= hits[:, :1] / 2 + ROUNDING
    qualifies &= _is_within(budget, curve)
    qualifies[:, 0] = False  # the unpruned model, also where it never shows the target

    # argmax gives the first True; where there is none, the largest share is a lower bound.
    draw = np.arange(len(qualifies))
    first = qualifies.argmax(axis=1)
    is_reached = qualifies[draw, first]
    largest = len(curve.shares) - 1
    first = np.where(is_reached, first, largest)
    values = np.array(curve.shares)[first]
    return Estimate(values, is_reached, _n_items(curve))


def _is_within(budget: Budget, curve: Curve) -> Bool[ndarray, "draws points"]:
    """Whether a share costs no more than the budget allows, on all items and on each resample."""
    unpruned = curve.points[0]
    is_within = np.ones((1 + N_DRAWS, len(curve.points)), dtype=bool)
    for name in set(budget.abilities) & set(unpruned):
        rates = _mean_hits(curve, name, curve.points)
        is_within &= rates >= rates[:, :1] - budget.rate - ROUNDING

    fluent = budget.fluent
    if fluent in unpruned and not unpruned[fluent].nll.isnan().all():
        nll = [point[fluent].nll.tolist() for point in curve.points]
        losses = _means(curve, fluent, nll)
        # A resample without any reference has the mean NaN, and no comparison with NaN is true.
        is_within &= losses <= losses[:, :1] + budget.nll + ROUNDING
    return is_within


def rate_at(curve: Curve, share: float) -> Estimate:
    """The rate of valid answers of the target at a measured share."""
    point = curve.at(share)
    hits = _mean_hits(curve, curve.target, [point])[:, 0]
    is_reached = np.ones(len(hits), dtype=bool)  # a measured share, on every resample
    _, member = np.unique(curve.points[0][curve.target].groups, return_inverse=True)
    step = step_of_means(np.bincount(member, point[curve.target].hits), np.bincount(member))
    return Estimate(hits, is_reached, _n_items(curve), bounds=(0.0, 1.0), step=step)


def gap(model: Model, mask: WeightMask, curve: Curve, share: float) -> Estimate:
    """How much more of the target a mask leaves than the curve at a share, paired by items."""
    unpruned = {curve.target: curve.points[0][curve.target]}
    pruned = outcomes_of(model, unpruned, mask=mask)
    control = replace(curve, shares=(0.0, share), points=(unpruned, pruned))
    return rate_at(control, share).minus(rate_at(curve, share))


def kept_fall(curve: Curve, share: float, labels: Labels) -> Measurement:
    """The largest fall of a rate among the abilities of the budget, labelled `behaviour`."""
    unpruned, pruned = curve.points[0], curve.at(share)
    falls = []
    for name in HARM_BUDGET.abilities:
        if name in pruned:
            metric = pruned[name].behaviour.metric
            high = unpruned[name].rows({}).one(metric)
            low = pruned[name].rows({}).one(metric)
            where = {**labels, "behaviour": name}
            falls.append(rate_difference("kept_fall", where, high, low))
    return Rows(falls).largest()


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


def _n_items(curve: Curve) -> int:
    return len(set(curve.points[0][curve.target].groups))


def _mean_hits(
    curve: Curve, name: str, points: Sequence[Mapping[str, Outcomes]]
) -> Float[ndarray, "draws points"]:
    """The rate of a behaviour at these points, on all items and on each resample."""
    return _means(curve, name, [point[name].hits for point in points])


def _means(
    curve: Curve, name: str, values: Sequence[Sequence[float]]
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
    generator = np.random.default_rng(0)
    chances = np.full(n_items, 1 / n_items)
    draws = generator.multinomial(n_items, chances, size=N_DRAWS)
    all_items = np.ones(n_items, dtype=np.int64)
    times = np.vstack([all_items, draws])

    sums = []
    counts = []
    for point in np.asarray(values, dtype=np.float64):
        sums.append(np.bincount(member, np.nan_to_num(point)))
        counts.append(np.bincount(member, ~np.isnan(point)))
    total = times @ np.array(sums).T
    n_values = times @ np.array(counts).T
    with np.errstate(invalid="ignore"):  # 0 / 0 gives NaN, as intended
        return total / n_values
