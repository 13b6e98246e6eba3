"""Behaviours against the share of weights removed, and how two such curves differ."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray

from harmcircuits.behaviours.model import Model
from harmcircuits.behaviours.outcomes import Outcomes
from harmcircuits.behaviours.standard import CONTRAST, TARGET
from harmcircuits.circuits.masks import WeightMask
from harmcircuits.hooks.masking import masked
from harmcircuits.measurements import Labels, Measurement, Rows

N_DRAWS = 2000
# Rates on resampled items are quotients: a fall of exactly the budget must not depend on their last
# bit.
ROUNDING = 1e-9


@dataclass(frozen=True)
class Budget:
    """What a mask may cost.

    Attributes:
        rate: how far each kept behaviour's rate may fall.
        nll: how far the loss of `fluent` may rise, nats per token.
        kept: the behaviours whose rates count.
        fluent: the behaviour whose loss counts.
    """

    rate: float = 0.05
    nll: float = 0.1
    kept: tuple[str, ...] = (CONTRAST, "recognition", "explanation", "knowledge")
    fluent: str = CONTRAST


@dataclass(frozen=True, repr=False)
class Curve:
    """What a model does under masks of growing size, example by example.

    Attributes:
        shares: the share of weights removed at each point, strictly increasing from 0, the unpruned
            model.
        points: what the model then does with the requests of each behaviour.
        target: the behaviour that is removed.

    Raises:
        ValueError: shares that do not increase from 0, points that lack the target, or that measure
            different behaviours or requests.
    """

    shares: tuple[float, ...]
    points: tuple[Mapping[str, Outcomes], ...]
    target: str = TARGET

    def __post_init__(self) -> None:
        starts_at_zero = self.shares[:1] == (0,)
        increases = bool((np.diff(self.shares) > 0).all())
        if len(self.shares) != len(self.points) or not starts_at_zero or not increases:
            raise ValueError(
                f"Curve: shares {self.shares} for {len(self.points)} points; "
                "expected one for each, increasing strictly from 0, the unpruned model"
            )
        requests = []
        for point in self.points:
            requests.append({name: outcomes.groups for name, outcomes in point.items()})
        if self.target not in requests[0] or any(other != requests[0] for other in requests):
            raise ValueError(
                f"Curve: every point must measure {self.target!r}, "
                "and the same requests of the same behaviours"
            )

    def __repr__(self) -> str:
        return f"Curve({self.target}: {len(self.shares)} shares up to {self.shares[-1]:.2%})"

    def rows(self, labels: Labels) -> Rows:
        """The rates and losses of every point, labelled with its `share`."""
        rows = Rows()
        for share, point in zip(self.shares, self.points, strict=True):
            for outcomes in point.values():
                rows += outcomes.rows({**labels, "share": share})
        return rows


@dataclass(frozen=True, repr=False)
class Estimate:
    """A figure of a curve on all items, and on 2,000 resamples of them.

    Estimates over the same items with the same seed are resampled alike, so their difference and
    ratio are paired.

    Attributes:
        values: the figure, then its values on resamples.
        is_reached: False where the figure lies beyond what was measured; the value is then
            `largest`, a lower bound.
        items: what is resampled.
        seed: draws the resamples.
        largest: the largest share measured.
    """

    values: Float[ndarray, " draws"]
    is_reached: Bool[ndarray, " draws"]
    items: tuple[str, ...]
    seed: int
    largest: float = np.inf

    def __repr__(self) -> str:
        return f"Estimate({self.row('value', {}):.3g})"

    @property
    def reached(self) -> float:
        """Share of resamples on which the figure is reached."""
        return float(self.is_reached[1:].mean())

    def row(self, metric: str, labels: Labels) -> Measurement:
        """The figure with its 95 % percentile interval."""
        return Measurement.of_draws(
            metric,
            labels,
            self.values[1:],
            mean=float(self.values[0]),
            n=len(self.items),
            method="inverted_cdf",
        )

    def rows(self, metric: str, labels: Labels) -> Rows:
        """`row`, labelled `censored` where the figure is only bounded; and `METRIC_reached`."""
        censored = "no" if self.is_reached[0] else "yes"
        figure = self.row(metric, {**labels, "censored": censored})
        return Rows([figure, Measurement.exact(f"{metric}_reached", labels, self.reached)])

    def minus(self, other: "Estimate") -> "Estimate":
        """How much higher this figure is than another, paired by items; ValueError as `over`."""
        return self._paired(other, self.values - other.values)

    def over(self, other: "Estimate") -> "Estimate":
        """This figure as a multiple of another, paired by items.

        A figure that is not reached counts as the largest measured share, so the ratio lies between
        1 and the truth.

        Args:
            other: the divisor.

        Raises:
            ValueError: estimates over other items, of other seeds, or up to different sizes.
        """
        return self._paired(other, self.values / other.values)

    def _paired(self, other: "Estimate", values: Float[ndarray, " draws"]) -> "Estimate":
        mine = (self.items, self.seed, self.largest)
        if mine != (other.items, other.seed, other.largest):
            raise ValueError(
                f"estimates cannot be paired: {len(self.items)} and {len(other.items)} items, "
                f"seeds {self.seed} and {other.seed}, "
                f"measured up to {self.largest} and {other.largest}; expected the same"
            )
        return Estimate(values, self.is_reached & other.is_reached, self.items, self.seed)


def restricted(
    model: Model,
    *,
    target: str = TARGET,
    budget: Budget | None = None,
) -> Model:
    """The model asked only for the target, what the budget keeps, and refusal.

    Args:
        model: the model.
        target: what is removed.
        budget: what must be kept; the usual one by default.
    """
    names = (target, *(budget or Budget()).kept, "refusal")
    behaviours = {name: model.behaviours[name] for name in names if name in model.behaviours}
    return replace(model, behaviours=behaviours)


def outcomes_of(
    model: Model,
    names: Iterable[str],
    *,
    split: str = "heldout",
) -> dict[str, Outcomes]:
    """What the model as it stands does with these behaviours."""
    return {name: model.outcomes(name, split) for name in names}


def curve(
    model: Model,
    masks: Iterable[WeightMask],
    unpruned: Mapping[str, Outcomes],
    *,
    target: str = TARGET,
    split: str = "heldout",
) -> Curve:
    """The behaviours of `unpruned` under each mask, by its share of weights.

    Args:
        model: the model.
        masks: of different sizes.
        unpruned: `outcomes_of` the model without a mask.
        target: what is removed.
        split: what is measured.

    Raises:
        ValueError: as `Curve`.
    """
    points: dict[float, Mapping[str, Outcomes]] = {0.0: unpruned}
    for mask in masks:
        with masked(model.bridge, mask):
            points[mask.fraction] = outcomes_of(model, unpruned, split=split)
    shares = sorted(points)
    return Curve(tuple(shares), tuple(points[share] for share in shares), target)


def w50(
    curve: Curve,
    budget: Budget | None = None,
    *,
    seed: int = 0,
) -> Estimate:
    """The smallest measured share that halves valid answers of the target, within the budget.

    Only measured shares count: nothing is interpolated, since the weights in between would be
    another mask. Kept behaviours and losses that the curve does not measure are not in the budget.
    Where no share qualifies, the value is the largest measured; a resample without any reference of
    the fluent behaviour reaches no share.

    Args:
        curve: what is measured.
        budget: what a mask may cost; the usual one by default.
        seed: draws the resamples.
    """
    budget = budget or Budget()
    unpruned = curve.points[0]
    hits = _means(curve, curve.target, [point[curve.target].hits for point in curve.points], seed)
    qualifies = hits <= hits[:, :1] / 2 + ROUNDING
    for name in set(budget.kept) & set(unpruned):
        rates = _means(curve, name, [point[name].hits for point in curve.points], seed)
        qualifies &= rates >= rates[:, :1] - budget.rate - ROUNDING
    fluent = budget.fluent
    if fluent in unpruned and not unpruned[fluent].nll.isnan().all():
        losses = _means(curve, fluent, [point[fluent].nll.tolist() for point in curve.points], seed)
        qualifies &= losses <= losses[:, :1] + budget.nll + ROUNDING
    qualifies[:, 0] = False

    # argmax finds the first True; where there is none, the largest share is a lower bound.
    first = qualifies.argmax(axis=1)
    is_reached = qualifies[np.arange(len(first)), first]
    first = np.where(is_reached, first, len(curve.shares) - 1)
    values = np.array(curve.shares)[first]
    return Estimate(values, is_reached, _items(curve), seed, curve.shares[-1])


def area(curve: Curve, *, seed: int = 0) -> Estimate:
    """Mean rate of valid answers of the target over the logarithm of the share.

    From the smallest to the largest measured, straight between points. 0: gone at the smallest
    share; the unpruned rate: never touched. The budget plays no part.

    Args:
        curve: what is measured.
        seed: draws the resamples.

    Raises:
        ValueError: fewer than two masks.
    """
    if len(curve.shares) < 3:
        raise ValueError(
            f"area: shares {curve.shares}; expected the unpruned model and at least two masks"
        )
    masked_points = curve.points[1:]
    hits = _means(curve, curve.target, [point[curve.target].hits for point in masked_points], seed)
    x = np.log(curve.shares[1:])
    values = np.trapezoid(hits, x, axis=1) / (x[-1] - x[0])
    return Estimate(values, np.ones(len(values), dtype=bool), _items(curve), seed)


def rate_at(
    curve: Curve,
    share: float,
    *,
    seed: int = 0,
) -> Estimate:
    """The rate of valid answers of the target at a measured share.

    Args:
        curve: what is measured.
        share: one of its shares.
        seed: draws the resamples.

    Raises:
        ValueError: another share.
    """
    if share not in curve.shares:
        raise ValueError(f"rate_at: share={share}; expected one of {curve.shares}")
    point = curve.points[curve.shares.index(share)]
    hits = _means(curve, curve.target, [point[curve.target].hits], seed)[:, 0]
    return Estimate(hits, np.ones(len(hits), dtype=bool), _items(curve), seed)


def by_share(rows: Rows) -> dict[float, Rows]:
    """Rows pooled over seeds at every share, increasing; without the unpruned model.

    A logarithmic axis has no place for a share of 0.
    """
    pruned = Rows(row for row in rows if row.labels.get("share"))
    points = pruned.pool("seed").by("share")
    return {share: points[share] for share in sorted(points)}


def share_text(rows: Rows) -> str:
    """Rows of `w50` over seeds as one share with the widest ends; "over" it if one is bounded."""
    over = "over " if any(row.labels["censored"] == "yes" for row in rows) else ""
    together = Measurement(
        "w50",
        {},
        fmean(row.mean for row in rows),
        min(row.low for row in rows),
        max(row.high for row in rows),
    )
    return f"{over}{together:.2%}"


def log_spaced(last: int, n: int) -> tuple[int, ...]:
    """At most `n` whole numbers from 1 to `last`, evenly on a logarithmic scale, each once."""
    return tuple(sorted({round(number) for number in np.geomspace(1, last, n)}))


def _items(curve: Curve) -> tuple[str, ...]:
    return tuple(sorted(set(curve.points[0][curve.target].groups)))


def _means(
    curve: Curve,
    name: str,
    values: Sequence[Sequence[float]],
    seed: int,
) -> Float[ndarray, "draws points"]:
    """Means of each point's values on all items (first line), then on resamples of whole items.

    The draws depend on the seed and the number of items only, so behaviours and curves about the
    same items share them. Values that are NaN are left out; a resample that holds nothing else has
    the mean NaN.
    """
    _, member = np.unique(curve.points[0][name].groups, return_inverse=True)
    n_items = int(member.max()) + 1
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(n_items, np.full(n_items, 1 / n_items), size=N_DRAWS)
    times = np.vstack([np.ones(n_items, dtype=np.int64), drawn])

    sums, counts = [], []
    for of_point in np.asarray(values, dtype=np.float64):
        sums.append(np.bincount(member, np.nan_to_num(of_point)))
        counts.append(np.bincount(member, ~np.isnan(of_point)))
    with np.errstate(invalid="ignore"):
        return (times @ np.array(sums).T) / (times @ np.array(counts).T)
