"""From two behaviours to a mask: the weights that matter to one and not to the other."""

from collections.abc import Iterator, Sequence
from functools import reduce
from operator import or_

from transformer_lens.model_bridge import TransformerBridge

from harmcircuits.attribution import removal_effect, sensitivity
from harmcircuits.hooks.masking import masked
from harmcircuits.masks import Scope, WeightMask, empty_like, top_fraction
from harmcircuits.objectives import Objective, completion_loss
from harmcircuits.prompts import Batch
from harmcircuits.scores import Source


def circuit_mask(
    bridge: TransformerBridge,
    target: Sequence[Batch],
    preserve: Sequence[Sequence[Batch]],
    *,
    q: float,
    p: float,
    rounds: int = 1,
    within: Scope = "model",
    objective: Objective = completion_loss,
) -> WeightMask:
    """The share `q` of weights whose removal most raises the target's loss, among those that nothing preserved needs.

    `target`: batches of the behaviour to remove. `preserve`: a list of batches for each behaviour to keep; the top share
    `p` by `sensitivity` of each cannot be chosen. `rounds` > 1 chooses q / rounds at a time and scores everything again
    under the mask so far. Exactly `q` of the weights are removed: one round removes what the published difference
    `top_fraction(harm, q') - top_fraction(keep, p)` removes at a larger q'. Raises ValueError as `circuit_path`.
    """
    return list(circuit_path(bridge, target, preserve, q=q, p=p, rounds=rounds, within=within, objective=objective))[-1]


def circuit_path(
    bridge: TransformerBridge,
    target: Sequence[Batch],
    preserve: Sequence[Sequence[Batch]],
    *,
    q: float,
    p: float,
    rounds: int,
    within: Scope = "model",
    objective: Objective = completion_loss,
) -> Iterator[WeightMask]:
    """The growing mask after each round of `circuit_mask`: `rounds` masks of shares q/rounds, 2q/rounds, ... q.

    Raises ValueError for rounds below 1, fractions outside [0, 1], and a preserved share that leaves too few weights.
    """
    if rounds < 1:
        raise ValueError(f"circuit_path: rounds={rounds}; expected at least 1")
    mask = None
    for number in range(1, rounds + 1):
        if mask is None:
            harm, kept = _scores(bridge, target, preserve, objective, p, within)
            mask = empty_like(harm)
        else:
            with masked(bridge, mask):
                harm, kept = _scores(bridge, target, preserve, objective, p, within)
        chosen = top_fraction(harm, q / rounds, within=within, exclude=reduce(or_, kept, mask))
        settings = {"q": q * number / rounds, "p": p, "within": within, "round": number, "rounds": rounds}
        parents = (harm.source, *(keep.source for keep in kept))
        mask = WeightMask((mask | chosen).removed, mask.shapes, Source(mask.source.model, "circuit", settings, parents))
        yield mask


def _scores(bridge, target, preserve, objective, p, within):
    keep = [top_fraction(sensitivity(bridge, batches, objective), p, within=within) for batches in preserve]
    return removal_effect(bridge, target, objective), keep
