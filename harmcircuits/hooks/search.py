"""From behaviours to a circuit: the weights that one needs and the others can do without."""

from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tqdm.auto import tqdm

from harmcircuits.circuits.masks import Scope, WeightMask, refuse_other_weights, top_fraction
from harmcircuits.circuits.sites import Site
from harmcircuits.circuits.units import Unit, Units
from harmcircuits.display import nearest
from harmcircuits.hooks.attribution import data_settings, removal_effect, snip_scores
from harmcircuits.hooks.bridge import AnyModel, as_bridge
from harmcircuits.hooks.checks import refuse_batches
from harmcircuits.hooks.objectives import Objective, completion_loss
from harmcircuits.hooks.protection import Budget, Protect, Protection
from harmcircuits.hooks.walk import PREFERENCE, Walk
from harmcircuits.hooks.weights import block_sites, model_fingerprint, sources_on
from harmcircuits.prompts import Batch

STEPS = 10
BUDGET = 0.05  # nats per token
REACH = 4.0  # times the smallest size: how far the mask grows

Target = Sequence[Batch] | Callable[[WeightMask | None], Sequence[Batch]]
Sites = Sequence[str] | Callable[[Site], bool]
NOTHING: Mapping[str, Sequence[Batch]] = MappingProxyType({})


def find_circuit(
    bridge: AnyModel,
    target: Target,
    protect: Protect = (),
    *,
    size: float | Sequence[float],
    budget: Budget = BUDGET,
    steps: int | Sequence[float] = STEPS,
    objective: Objective = completion_loss,
    prefer: Mapping[str, Sequence[Batch]] = NOTHING,
    sites: Sites | None = None,
    exclude: WeightMask | None = None,
    unit: Unit = "weight",
    folder: str | Path | None = None,
    max_memory: int | None = None,
    progress: bool = False,
) -> Any:
    """The weights that carry a target and that nothing protected needs.

    In several steps a mask grows beyond the size wanted; in each, all weights are chosen afresh by
    sums over the steps so far (`harmcircuits.hooks.walk` has the whole in ten lines):

        removal effect on the target - factor * token price of what is protected

    with the smallest factor tried under which no protected loss rises by more than its budget, on
    answers that the price has not seen. After each step a mask of every size is chosen in the same
    way; of each size the one is returned that takes most of the target.

    A mask has at most `size` of the weights: fewer where fewer are worth their price, none where no
    mask keeps within the budget. `mask.trace` holds what was tried, as rows labelled by step, aim
    ("walk", or "size" for masks of the sizes wanted) and share: for every mask, by factor and
    outcome ("accepted" or "refused"), `weights_removed` and for each protected behaviour
    `protected_rise`; under what was accepted the `target_loss`, and with `prefer` the
    `preferred_loss` and `avoided_loss`; for sizes `target_left`, the number of examples that the
    target gave anew; for the walk `predicted_change` (of first order) and `measured_change` of the
    loss of all that was scored in the step, what the target gave anew among it; and on how many
    examples each was scored, `examples_scored` by `data`.

    >>> hc.find_circuit(bridge, harm, protect=[benign], size=[0.0005, 0.001], steps=2)
    [WeightMask(circuit, 492 of 983,040 weights, 0.05%),
     WeightMask(circuit, 983 of 983,040 weights, 0.10%)]

    Args:
        bridge: the model; unchanged afterwards.
        target: batches of the behaviour to remove. Or a function that gives them: called with None
            before anything is removed, and in later steps with the mask that is on the model, for
            further batches that are scored as well. A model that loses the words of an answer may
            go on in others, and these would never pay.
        protect: batches of each behaviour to spare: a list of them, or by name.
        size: share of the block weights to remove, at most; a list gives a list of masks.
        budget: how far the mean loss of each protected behaviour may rise, nats per token; a
            number, or one for each by name.
        steps: in how many steps the mask grows, evenly to four times the smallest size and at least
            to the largest: what is dear shows in larger masks, and a small one is then chosen with
            that knowledge. One step goes to the size. Or the share of the weights at each step.
        objective: what the target is scored by; what is protected, always by `completion_loss`.
        prefer: batches of what the model should say instead, as "preferred", such as refusals
            behind the beginning of the target's answers: weights whose removal makes them likelier
            earn as well. And as "avoided" of what may not become likelier with that, such as the
            same refusals of benign requests behind the same beginning: without them, what makes
            the target refuse makes all else refuse that begins alike. A nat of their loss counts
            0.3 of one of the target's.
        sites: matrices to choose from: names of `named_weights`, or a function of a `Site` that
            says whether, such as `lambda site: site.layer > 2 and site.kind == "mlp.out"`.
        exclude: weights that cannot be chosen, so that a second circuit can be found beside a
            first; `size` stays a share of all weights. The mask's settings keep their digest.
        unit: what is chosen whole: "weight"; "neuron" of the MLPs, its row of mlp.in and mlp.gate
            and its column of mlp.out; "head" of attention, its rows of attn.q and its columns of
            attn.o, and its rows of attn.k and attn.v where each head has its own (with grouped
            queries a key-value head is a unit by itself); "row", what one output of a matrix is
            computed with. Units are ranked by their mean score a weight and taken from the best
            down while they are within the size.
        folder: keeps the walk after every step; the same search goes on from there. An objective is
            known by its value on the target, a function that gives the target by its name.
        max_memory: bytes for scores that are accumulated (see `removal_effect`). The two sums are
            then in temporary files as well.
        progress: whether to show a bar.

    Raises:
        ValueError: no batches or some that the model cannot read, sizes outside (0, 1] or of less
            than a weight, no step, a negative budget, no such matrix, no units in these or
            parts of some, an `exclude` of other weights, a folder of another search, a loss or
            gradient that is not finite, and as `named_weights`.
    """
    bridge = as_bridge(bridge)
    matrices = block_sites(bridge)
    shapes = {name: tuple(site.parameter.shape) for name, site in matrices.items()}
    sizes = list(size) if isinstance(size, Sequence) else [size]
    _refuse_sizes(sizes, sum(map(prod, shapes.values())))
    shares = _shares(steps, sizes)
    if exclude is not None:
        refuse_other_weights("find_circuit: `exclude`", exclude, model_fingerprint(bridge), shapes)
    candidates = _candidates(matrices, sites)
    units = None
    if unit != "weight":
        units = Units.of(matrices, unit, candidates)
        candidates = {name: candidates[name] for name in units.sites}

    answers = target(None) if callable(target) else target
    refuse_batches("find_circuit", bridge, answers)
    for name, batches in prefer.items():
        refuse_batches(f"find_circuit: {name}", bridge, batches)
    protection = Protection.of(bridge, protect, budget)

    scored = [("removal_effect", answers, objective)]
    scored += [("removal_effect", batches, completion_loss) for batches in prefer.values()]
    scored += [("token_price", batches, completion_loss) for batches in protection.priced.values()]
    source = sources_on(bridge)
    parents = []
    for method, batches, by in scored:
        parents.append(source(method, data_settings(batches, by)))
    settings: dict[str, Any] = {"budget": dict(protection.budgets), "renewed": callable(target)}
    settings["checked"] = data_settings(protection.checked)["data"]
    settings |= _settings_of_steps(steps)
    settings |= _unusual(prefer, sites, candidates, exclude, unit)

    walk = Walk(
        bridge,
        answers,
        target if callable(target) else None,
        objective,
        protection,
        prefer,
        candidates,
        shapes,
        units,
        {} if exclude is None else exclude.removed,
        source("circuit", settings, tuple(parents)),
        sizes,
        max_memory,
    )
    done = walk.resume(folder)
    numbers = range(done + 1, len(shares) + 1)
    for number in tqdm(
        numbers,
        desc="search",
        initial=done,
        total=len(shares),
        disable=not progress,
        leave=False,
    ):
        walk.step(number, shares[number - 1])
        walk.keep(folder, number)
    masks = walk.masks()
    return masks if isinstance(size, Sequence) else masks[0]


def _shares(steps: int | Sequence[float], sizes: Sequence[float]) -> list[float]:
    """The share of the weights that the mask of each step may have."""
    if isinstance(steps, Sequence):
        shares = list(steps)
    else:
        # What a single step learns beyond the sizes comes too late for them.
        reach = REACH if steps > 1 else 1.0
        shares = even_shares(steps, max([*sizes, reach * min(sizes)]))
    if not shares or not all(0 < share <= 1 for share in shares):
        raise ValueError(
            f"find_circuit: steps={steps}; expected at least 1, or shares of the weights in (0, 1]"
        )
    return shares


def even_shares(n_steps: int, largest: float) -> list[float]:
    """The shares of a walk that grows evenly to a size, and at most to all weights."""
    largest = min(1.0, largest)
    return [largest * number / n_steps for number in range(1, n_steps + 1)]


def _settings_of_steps(steps: int | Sequence[float]) -> dict[str, Any]:
    if isinstance(steps, Sequence):
        return {"steps": list(steps)}
    return {"steps": steps, "reach": REACH if steps > 1 else 1.0}


def _unusual(
    prefer: Mapping[str, Sequence[Batch]],
    sites: Sites | None,
    candidates: Mapping[str, Site],
    exclude: WeightMask | None,
    unit: Unit,
) -> dict[str, Any]:
    """The settings that are not as by default."""
    settings: dict[str, Any] = {}
    if prefer:
        settings["preference"] = PREFERENCE
    if sites is not None:
        settings["sites"] = list(candidates)
    if exclude is not None:
        settings["excluded"] = exclude.digest
    if unit != "weight":
        settings["unit"] = unit
    return settings


def _candidates(matrices: Mapping[str, Site], sites: Sites | None) -> dict[str, Site]:
    """The matrices to choose from."""
    if sites is None:
        return dict(matrices)
    if callable(sites):
        chosen = {name: site for name, site in matrices.items() if sites(site)}
    else:
        for name in sites:
            if name not in matrices:
                raise ValueError(f"find_circuit: sites: no {name!r}; {nearest(name, matrices)}")
        chosen = {name: site for name, site in matrices.items() if name in sites}
    return chosen


def _refuse_sizes(sizes: Sequence[float], n_weights: int) -> None:
    if not sizes or max(sizes) > 1 or round(min(sizes) * n_weights) < 1:
        raise ValueError(
            f"find_circuit: size={sizes}; expected shares in (0, 1], of at least one of "
            f"the {n_weights:,} weights ({1 / n_weights:.1g})"
        )


def set_difference(
    bridge: AnyModel,
    target: Sequence[Batch],
    spared: Sequence[Sequence[Batch]],
    *,
    q: float,
    p: float,
    signed: bool = True,
    within: Scope = "weight",
    objective: Objective = completion_loss,
    max_memory: int | None = None,
) -> WeightMask:
    """The published search: the top `q` on the target less the top `p` on what is spared.

    top(removal_effect of the target, q) - top(snip_scores of each spared behaviour, p), each within
    its own matrix and on the unedited model, so fewer than `q` of the weights remain. Source: arXiv
    2604.09544; unsigned, arXiv 2402.05162 (set difference).

    >>> hc.set_difference(bridge, harm, [benign], q=0.01, p=0.01)
    WeightMask(difference, ... of 983,040 weights, ...)

    Args:
        bridge: the model.
        target: batches of the behaviour to remove.
        spared: batches of each behaviour whose weights are left alone.
        q: share of the weights taken on the target.
        p: share of the weights that each spared behaviour keeps.
        signed: score the target by `removal_effect`; False: by `snip_scores`.
        within: what weights are ranked together.
        objective: what the target is scored by.
        max_memory: as in `removal_effect`.

    Raises:
        ValueError: no batches, and as `top_fraction`.
    """
    bridge = as_bridge(bridge)
    score = removal_effect if signed else snip_scores
    scores = score(bridge, target, objective, max_memory=max_memory)
    mask = top_fraction(scores, q, within=within)
    del scores
    for batches in spared:
        needed = snip_scores(bridge, batches, completion_loss, max_memory=max_memory)
        mask = mask - top_fraction(needed, p, within=within)
    return mask
