"""The search in rounds: score, remove a little, score again, and leave alone what others need.

A baseline of `hc.find_circuit`, which needs a third of the weights or less. The committed rows of
the analyses rest on it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import isclose
from typing import Any, overload

from harmcircuits.behaviours.model import OTHERS, Calibration, Model
from harmcircuits.circuits.masks import Scope, WeightMask, top_fraction, union
from harmcircuits.circuits.scores import Source, WeightScores
from harmcircuits.hooks.attribution import removal_effect, snip_scores
from harmcircuits.hooks.bridge import AnyModel, Bridge, as_bridge
from harmcircuits.hooks.masking import masked_if_given
from harmcircuits.hooks.objectives import Objective, completion_loss
from harmcircuits.prompts import Batch

PROTECT_SHARE = 0.005
ROUNDS = 10


@overload
def prune_in_rounds(
    bridge: AnyModel,
    target: Sequence[Batch],
    protect: Sequence[Sequence[Batch]] = (),
    *,
    size: float,
    protect_share: float = PROTECT_SHARE,
    rounds: int = ROUNDS,
    within: Scope = "model",
    objective: Objective = completion_loss,
    max_memory: int | None = None,
) -> WeightMask: ...


@overload
def prune_in_rounds(
    bridge: AnyModel,
    target: Sequence[Batch],
    protect: Sequence[Sequence[Batch]] = (),
    *,
    size: Sequence[float],
    protect_share: float = PROTECT_SHARE,
    rounds: int = ROUNDS,
    within: Scope = "model",
    objective: Objective = completion_loss,
    max_memory: int | None = None,
) -> list[WeightMask]: ...


def prune_in_rounds(
    bridge: AnyModel,
    target: Sequence[Batch],
    protect: Sequence[Sequence[Batch]] = (),
    *,
    size: float | Sequence[float],
    protect_share: float = PROTECT_SHARE,
    rounds: int = ROUNDS,
    within: Scope = "model",
    objective: Objective = completion_loss,
    max_memory: int | None = None,
) -> WeightMask | list[WeightMask]:
    """The weights whose removal most raises the target's loss, among those nothing protected needs.

    The mask grows in rounds: score, remove a little, and score again under the mask so far. In each
    round the weights with the largest `removal_effect` on the target are taken, except those in the
    top `protect_share` by `snip_scores` of the completion loss of any protected behaviour.

    Args:
        bridge: the model; unchanged afterwards.
        target: batches of the behaviour to remove.
        protect: a list of batches for each behaviour to spare.
        size: share of the block weights to remove; a list of sizes gives a list of masks, all from
            one growth of `rounds` rounds up to the largest.
        protect_share: share of the weights that each protected behaviour keeps out of reach.
        rounds: in how many steps the mask grows; 1 scores the unedited model only.
        within: what weights are ranked together: the whole "model", each "weight" matrix, or "row".
        objective: what the target is scored by.
        max_memory: bytes for accumulated scores (see `removal_effect`); the mask is the same.

    Raises:
        ValueError: no batches, rounds below 1, shares outside [0, 1], protection that leaves too
            few weights, and as `named_weights`.
    """
    bridge = as_bridge(bridge)
    is_list = isinstance(size, Sequence)
    sizes = list(size) if is_list else [size]
    growth = iterative_pruning(
        bridge,
        target,
        protect,
        sizes=sizes,
        protect_share=protect_share,
        rounds=rounds,
        within=within,
        objective=objective,
        max_memory=max_memory,
    )
    by_size = {mask.source.settings["size"]: mask for mask in growth}
    masks = [by_size[_nearest(wanted, by_size)] for wanted in sizes]
    return masks if is_list else masks[0]


def circuit_in_rounds(
    model: Model,
    target: str,
    *,
    size: float,
    protect: str | Iterable[str] = OTHERS,
    protect_share: float = PROTECT_SHARE,
    rounds: int = ROUNDS,
    within: Scope = "model",
    calibrations: Mapping[str, Calibration] | None = None,
    max_memory: int | None = None,
) -> WeightMask:
    """`prune_in_rounds` of a behaviour, on its own verified answers.

    Args:
        model: the model.
        target: the behaviour to remove.
        size: share of the block weights to remove.
        protect: behaviours to spare, as in `Model.find_circuit`.
        protect_share: share of the weights that each of them keeps out of reach.
        rounds: in how many steps the mask grows.
        within: what weights are ranked together.
        calibrations: data to score on, where it is there already.
        max_memory: bytes for accumulated scores.

    Raises:
        ValueError: an unknown behaviour, one that is not shown, and as `prune_in_rounds`.
    """
    refuse_settings([size], protect_share, rounds)
    behaviour = model.behaviour(target)
    protected = model.protected(target, protect, calibrations)
    data = (calibrations or {}).get(target) or model.calibration(target)
    return prune_in_rounds(
        model.bridge,
        data.batches,
        [calibration.batches for calibration in protected.values()],
        size=size,
        protect_share=protect_share,
        rounds=rounds,
        within=within,
        objective=behaviour.objective,
        max_memory=max_memory,
    )


def iterative_pruning(
    bridge: Bridge,
    target: Sequence[Batch],
    protect: Sequence[Sequence[Batch]],
    *,
    sizes: Sequence[float],
    protect_share: float,
    rounds: int,
    within: Scope = "model",
    objective: Objective = completion_loss,
    max_memory: int | None = None,
    first: tuple[WeightScores, Sequence[WeightMask]] | None = None,
) -> Iterator[WeightMask]:
    """The growing mask of `prune_in_rounds`: after every round, and at every size on the way.

    Holds the scores of one behaviour at a time; of what is protected it keeps masks only.

    The other arguments are those of `prune_in_rounds`.

    Args:
        sizes: shares at which to stop on the way; the last round ends at the largest.
        first: the target's scores and the protected weights of the unedited model, where they are
            known already: this saves the first scoring.

    Raises:
        ValueError: as `prune_in_rounds`.
    """
    refuse_settings(sizes, protect_share, rounds)
    largest = max(sizes)
    mask = None
    for number in range(1, rounds + 1):
        if first is None:
            with masked_if_given(bridge, mask):
                protected = _all_protected(bridge, protect, protect_share, within, max_memory)
                scores = removal_effect(bridge, target, objective, max_memory=max_memory)
        else:
            scores, protected = first
            first = None

        # One growth step, cut where a size lies inside it.
        start, end = largest * (number - 1) / rounds, largest * number / rounds
        stops = [stop for stop in sorted(set(sizes)) if _is_between(start, stop, end)]
        parts = [stop - start for stop in stops]
        grown = _grown(mask, scores, protected, [*parts, largest / rounds], within)
        settings = {
            "protect_share": protect_share,
            "within": within,
            "round": number,
            "rounds": rounds,
        }
        for share, removed in zip([*stops, end], grown, strict=True):
            source = _source(scores, protected, {"size": share, **settings})
            mask = WeightMask(removed.removed, scores.shapes, source)
            yield mask
        del scores


def _source(
    scores: WeightScores, protected: Sequence[WeightMask], settings: dict[str, Any]
) -> Source:
    """How a circuit was found, and the scores of the target and of what was protected."""
    origins = [of_behaviour.source.parents[0] for of_behaviour in protected]
    return Source(scores.source.model, "circuit", settings, (scores.source, *origins))


def _all_protected(
    bridge: Bridge,
    protect: Sequence[Sequence[Batch]],
    share: float,
    within: Scope,
    max_memory: int | None,
) -> list[WeightMask]:
    """The protected weights of each behaviour; holds one behaviour's scores at a time."""
    masks = []
    for batches in protect:
        masks.append(protected_weights(bridge, batches, share, within, max_memory))
    return masks


def _grown(
    mask: WeightMask | None,
    scores: WeightScores,
    protected: Sequence[WeightMask],
    parts: Sequence[float],
    within: Scope,
) -> list[WeightMask]:
    """The mask with each of these shares of the best unprotected weights added to it."""
    taken = [*protected, mask] if mask is not None else protected
    added = top_fraction(scores, parts, within=within, exclude=union(taken))
    if mask is None:
        return added
    return [mask | part for part in added]


def protected_weights(
    bridge: Bridge,
    batches: Sequence[Batch],
    share: float,
    within: Scope = "model",
    max_memory: int | None = None,
) -> WeightMask:
    """The top `share` by `snip_scores` of the completion loss: what a circuit must leave alone.

    The scores themselves are not kept.

    Args:
        bridge: the model.
        batches: of the behaviour to spare.
        share: of the weights.
        within: what weights are ranked together.
        max_memory: bytes for accumulated scores.

    Raises:
        ValueError: as `snip_scores` and `top_fraction`.
    """
    scores = snip_scores(bridge, batches, completion_loss, max_memory=max_memory)
    return top_fraction(scores, share, within=within)


def refuse_settings(size: float | Sequence[float], protect_share: float, rounds: int) -> None:
    """Raises ValueError for a size, share or number of rounds that cannot be."""
    sizes = list(size) if isinstance(size, Sequence) else [size]
    if rounds < 1:
        raise ValueError(f"prune_in_rounds: rounds={rounds}; expected at least 1")
    if not sizes or not all(0 < size <= 1 for size in sizes):
        shown = sizes[0] if len(sizes) == 1 else list(sizes)
        raise ValueError(
            f"prune_in_rounds: size={shown}; expected a share of the weights in (0, 1]"
        )
    if not 0 <= protect_share <= 1:
        raise ValueError(
            f"prune_in_rounds: protect_share={protect_share}; expected a share in [0, 1]"
        )


def _is_between(start: float, size: float, end: float) -> bool:
    """Strictly between, up to the rounding of a quotient."""
    is_an_end = isclose(size, start, rel_tol=1e-9) or isclose(size, end, rel_tol=1e-9)
    return start < size < end and not is_an_end


def _nearest(size: float, sizes: Sequence[float] | dict[float, WeightMask]) -> float:
    return min(sizes, key=lambda other: abs(other - size))
