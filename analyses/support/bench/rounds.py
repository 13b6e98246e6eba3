"""The search in rounds: score, remove a little, score again, and leave alone what others need."""

from collections.abc import Iterator, Sequence
from math import isclose
from typing import Any

from harmcircuits.batches import Batch
from harmcircuits.circuits.masks import WeightMask, top_fraction, union
from harmcircuits.circuits.scores import Source, WeightScores
from harmcircuits.hooks.bridge import AnyModel, Bridge, as_bridge
from harmcircuits.hooks.masking import masked_if_given
from harmcircuits.search.attribution import removal_effect, snip_scores

PROTECT_SHARE = 0.005
ROUNDS = 10


def prune_in_rounds(
    bridge: AnyModel,
    target: Sequence[Batch],
    protect: Sequence[Sequence[Batch]],
    *,
    sizes: Sequence[float],
    protect_share: float = PROTECT_SHARE,
    rounds: int = ROUNDS,
) -> list[WeightMask]:
    """A mask of each size: the weights whose removal most raises the target's loss."""
    refuse_settings(sizes, protect_share, rounds)
    growth = growing_mask(
        as_bridge(bridge),
        target,
        protect,
        sizes=sizes,
        protect_share=protect_share,
        rounds=rounds,
    )
    by_size = {mask.source.settings["size"]: mask for mask in growth}
    masks = []
    for wanted in sizes:
        nearest = min(by_size, key=lambda size: abs(size - wanted))
        masks.append(by_size[nearest])
    return masks


def growing_mask(
    bridge: Bridge,
    target: Sequence[Batch],
    protect: Sequence[Sequence[Batch]],
    *,
    sizes: Sequence[float],
    protect_share: float,
    rounds: int,
) -> Iterator[WeightMask]:
    """The mask of `prune_in_rounds` after every round, and at every size on the way."""
    largest = max(sizes)
    mask = None
    for number in range(1, rounds + 1):
        with masked_if_given(bridge, mask):
            protected = [needed_weights(bridge, batches, protect_share) for batches in protect]
            scores = removal_effect(bridge, target)
        taken = [*protected, mask] if mask is not None else protected

        start = largest * (number - 1) / rounds
        stops = _stops(sizes, start, end=largest * number / rounds)
        # The last part is the whole round, without the rounding of a difference.
        parts = [*(stop - start for stop in stops[:-1]), largest / rounds]
        exclude = union(taken)
        added = [top_fraction(scores, part, within="model", exclude=exclude) for part in parts]

        before = mask
        settings = {
            "protect_share": protect_share,
            "within": "model",
            "round": number,
            "rounds": rounds,
        }
        for size, part in zip(stops, added, strict=True):
            removed = part if before is None else before | part
            source = _source(scores, protected, {"size": size, **settings})
            mask = WeightMask(removed.removed, scores.shapes, source)
            yield mask


def _stops(sizes: Sequence[float], start: float, end: float) -> list[float]:
    """The sizes that lie inside a round, and its end."""
    inside = [size for size in sorted(set(sizes)) if _is_between(start, size, end)]
    return [*inside, end]


def _source(
    scores: WeightScores, protected: Sequence[WeightMask], settings: dict[str, Any]
) -> Source:
    origins = [needed.source.parents[0] for needed in protected]
    return Source(scores.source.model, "circuit", settings, (scores.source, *origins))


def needed_weights(bridge: Bridge, batches: Sequence[Batch], share: float) -> WeightMask:
    """The top `share` by `snip_scores` of the completion loss: what a circuit must leave alone."""
    return top_fraction(snip_scores(bridge, batches), share, within="model")


def refuse_settings(sizes: Sequence[float], protect_share: float, rounds: int) -> None:
    """Raises ValueError for a size, share or number of rounds that cannot be."""
    if rounds < 1:
        raise ValueError(f"prune_in_rounds: rounds={rounds}; expected at least 1")
    if not sizes or not all(0 < size <= 1 for size in sizes):
        raise ValueError(
            f"prune_in_rounds: sizes={list(sizes)}; expected shares of the weights in (0, 1]"
        )
    if not 0 <= protect_share <= 1:
        raise ValueError(
            f"prune_in_rounds: protect_share={protect_share}; expected a share in [0, 1]"
        )


def _is_between(start: float, size: float, end: float) -> bool:
    """Strictly between, up to the rounding of a quotient."""
    is_an_end = isclose(size, start, rel_tol=1e-9) or isclose(size, end, rel_tol=1e-9)
    return start < size < end and not is_an_end
