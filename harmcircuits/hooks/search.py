"""From two behaviours to a mask: the weights that matter to one and not to the other."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import reduce
from operator import or_

from transformer_lens.model_bridge import TransformerBridge

from harmcircuits.circuits.masks import Scope, WeightMask, top_fraction
from harmcircuits.circuits.scores import Source, WeightScores
from harmcircuits.hooks.attribution import removal_effect, sensitivity
from harmcircuits.hooks.masking import masked
from harmcircuits.hooks.objectives import Objective, completion_loss
from harmcircuits.prompts import Batch


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
    max_memory: int | None = None,
) -> WeightMask:
    """The share `q` of weights whose removal most raises the target's loss, among those that nothing preserved needs.

    `target`: batches of the behaviour to remove, scored by `objective`. `preserve`: a list of batches for each behaviour to
    keep; the top share `p` by `sensitivity` of its completion loss cannot be chosen. `rounds` > 1 chooses q / rounds at a
    time and scores everything again under the mask so far. Exactly `q` of the weights are removed: one round removes what
    the published difference `top_fraction(harm, q') - top_fraction(keep, p)` removes at a larger q'. `max_memory` is that
    of `removal_effect`: the mask is the same. Raises ValueError as `circuit_path`.
    """
    options = {"rounds": rounds, "within": within, "objective": objective, "max_memory": max_memory}
    return list(circuit_path(bridge, target, preserve, q=q, p=p, **options))[-1]


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
    max_memory: int | None = None,
    first: tuple[WeightScores, Sequence[WeightMask]] | None = None,
) -> Iterator[WeightMask]:
    """The growing mask after each round of `circuit_mask`: `rounds` masks of shares q/rounds, 2q/rounds, ... q.

    Holds the scores of one behaviour at a time; of what is preserved it keeps the protected weights only. `first`: the
    target's scores and the masks of what is protected, where they are known already, which saves the first scoring.
    Raises ValueError for rounds below 1, fractions outside [0, 1], and a preserved share that leaves too few weights.
    """
    if rounds < 1:
        raise ValueError(f"circuit_path: rounds={rounds}; expected at least 1")
    mask = None
    for number in range(1, rounds + 1):
        with masked(bridge, mask) if mask else nullcontext():
            if first and not mask:
                harm, protected = first
            else:
                options = {"p": p, "within": within, "max_memory": max_memory}
                protected = [most_needed(bridge, batches, **options) for batches in preserve]
                harm = removal_effect(bridge, target, objective, max_memory=max_memory)
        taken = [*protected, mask] if mask else protected
        chosen = best_unprotected(harm, taken, q=q / rounds, within=within)
        settings = {"q": q * number / rounds, "p": p, "within": within, "round": number, "rounds": rounds}
        parents = (harm.source, *(found.source.parents[0] for found in protected))
        source = Source(harm.source.model, "circuit", settings, parents)
        mask = WeightMask((mask | chosen if mask else chosen).removed, harm.shapes, source)
        del harm
        yield mask


def most_needed(
    bridge: TransformerBridge,
    batches: Sequence[Batch],
    *,
    p: float,
    within: Scope = "model",
    max_memory: int | None = None,
) -> WeightMask:
    """What a circuit must leave alone: the top share `p` by `sensitivity` of the completion loss; its scores are not kept.

    Raises ValueError as `sensitivity` and `top_fraction`.
    """
    return top_fraction(sensitivity(bridge, batches, completion_loss, max_memory=max_memory), p, within=within)


def best_unprotected(
    harm: WeightScores, protected: Sequence[WeightMask], *, q: float, within: Scope = "model"
) -> WeightMask:
    """The top share `q` of `harm` among weights that no mask of `protected` holds. Raises ValueError as `top_fraction`."""
    return top_fraction(harm, q, within=within, exclude=reduce(or_, protected) if protected else None)
