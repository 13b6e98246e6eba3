"""From behaviours to a circuit: the weights that one needs and the others can do without."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, get_args, overload

from rich.progress import Progress

from harmcircuits.circuits.masks import Scope, WeightMask, top_fraction
from harmcircuits.circuits.sites import Site
from harmcircuits.circuits.units import Unit, Units
from harmcircuits.display import listed
from harmcircuits.hooks.attribution import data_settings, removal_effect, snip_scores
from harmcircuits.hooks.bridge import AnyModel, Bridge, as_bridge
from harmcircuits.hooks.checks import refuse_batches
from harmcircuits.hooks.objectives import Objective, completion_loss
from harmcircuits.hooks.protection import (
    Budget,
    Protect,
    Protection,
    budget_with_first_tokens,
    named,
    with_first_tokens,
)
from harmcircuits.hooks.walk import AuxiliaryLoss, Walk
from harmcircuits.hooks.weights import source_on, weight_sites
from harmcircuits.progress import progress_bar
from harmcircuits.prompts import Batch

STEPS = 10
BUDGET = 0.05  # nats per token
REACH = 4.0
PREFERENCE = 0.3  # of a nat of the target's loss


@overload
def find_circuit(
    bridge: AnyModel,
    target: Sequence[Batch],
    protect: Protect = (),
    *,
    size: float,
    budget: Budget = BUDGET,
    steps: int = STEPS,
    reach: float = REACH,
    unit: Unit = "weight",
    objective: Objective = completion_loss,
    layers: Sequence[int] | None = None,
    kinds: Sequence[str] | None = None,
    exclude: WeightMask | None = None,
    renew: Callable[[Bridge], Sequence[Batch]] | None = None,
    prefer: Sequence[Batch] = (),
    avoid: Sequence[Batch] = (),
    preference: float = PREFERENCE,
    protect_first: int = 0,
    stop: Callable[[Bridge], bool] | None = None,
    progress: bool | Progress = False,
    folder: str | Path | None = None,
    max_memory: int | None = None,
) -> WeightMask: ...


@overload
def find_circuit(
    bridge: AnyModel,
    target: Sequence[Batch],
    protect: Protect = (),
    *,
    size: Sequence[float],
    budget: Budget = BUDGET,
    steps: int = STEPS,
    reach: float = REACH,
    unit: Unit = "weight",
    objective: Objective = completion_loss,
    layers: Sequence[int] | None = None,
    kinds: Sequence[str] | None = None,
    exclude: WeightMask | None = None,
    renew: Callable[[Bridge], Sequence[Batch]] | None = None,
    prefer: Sequence[Batch] = (),
    avoid: Sequence[Batch] = (),
    preference: float = PREFERENCE,
    protect_first: int = 0,
    stop: Callable[[Bridge], bool] | None = None,
    progress: bool | Progress = False,
    folder: str | Path | None = None,
    max_memory: int | None = None,
) -> list[WeightMask]: ...


def find_circuit(
    bridge: AnyModel,
    target: Sequence[Batch],
    protect: Protect = (),
    *,
    size: float | Sequence[float],
    budget: Budget = BUDGET,
    steps: int = STEPS,
    reach: float = REACH,
    unit: Unit = "weight",
    objective: Objective = completion_loss,
    layers: Sequence[int] | None = None,
    kinds: Sequence[str] | None = None,
    exclude: WeightMask | None = None,
    renew: Callable[[Bridge], Sequence[Batch]] | None = None,
    prefer: Sequence[Batch] = (),
    avoid: Sequence[Batch] = (),
    preference: float = PREFERENCE,
    protect_first: int = 0,
    stop: Callable[[Bridge], bool] | None = None,
    progress: bool | Progress = False,
    folder: str | Path | None = None,
    max_memory: int | None = None,
) -> WeightMask | list[WeightMask]:
    """The weights that carry a target and that nothing protected needs.

    In `steps` steps a mask grows beyond the size wanted; in each, all weights are chosen afresh by
    sums over the steps so far (`harmcircuits.hooks.walk` has the whole in ten lines):

        removal effect on the target - factor * token price of what is protected

    with the smallest factor tried under which no protected loss rises by more than its budget, on
    answers that the price has not seen. After each step a mask of every size is chosen in the same
    way; of each size the one is returned that takes most of the target (with `prefer`: that raises
    most of the target's loss less that of what is preferred; with `avoid`: and more that of what is
    avoided).

    A mask has at most `size` of the weights: fewer where fewer are worth their price, none where no
    mask keeps within the budget. `mask.trace` holds what was tried, as rows labelled by step, aim
    ("walk", or "size" for masks of the sizes wanted) and share: for every mask, by factor and
    outcome ("accepted" or "refused"), `weights_removed` and for each protected behaviour
    `protected_rise`; the `target_loss`, and with `prefer` and `avoid` the `preferred_loss` and
    `avoided_loss`, under what was accepted; for sizes `target_left`, the number of examples that
    `renew` gave; for the walk `predicted_change` (of first order) and `measured_change` of the
    loss; and on how many examples the target and each protected behaviour were scored,
    `examples_scored` by `data`.

    >>> hc.find_circuit(bridge, harm, protect=[benign], size=[0.0005, 0.001], steps=2)
    [WeightMask(circuit, 492 of 983,040 weights, 0.05%),
     WeightMask(circuit, 983 of 983,040 weights, 0.10%)]

    Args:
        bridge: the model; unchanged afterwards.
        target: batches of the behaviour to remove.
        protect: batches of each behaviour to spare: a list of them, or by name.
        size: share of the block weights to remove, at most; a list gives a list of masks.
        budget: how far the mean loss of each protected behaviour may rise, nats per token; a
            number, or one for each by name.
        steps: in how many steps the mask grows.
        reach: how far it grows: to so many times the smallest size, and at least to the largest.
            What is dear shows in larger masks, and a small one is then chosen with that knowledge.
        unit: what is chosen whole: "weight"; "neuron" of the MLPs, its row of mlp.in and mlp.gate
            and its column of mlp.out; "head" of attention, its rows of attn.q and its columns of
            attn.o, and its rows of attn.k and attn.v where each head has its own (with grouped
            queries a key-value head is a unit by itself); "row", what one output of a matrix is
            computed with. Units are ranked by their mean score a weight and taken from the best
            down while they are within the size; those with an excluded weight are not. The other
            matrices stay whole. `hc.counts_by` reads the mask.
        objective: what the target is scored by; what is protected, always by `completion_loss`.
        layers: numbers of the blocks to choose from; all by default.
        kinds: kinds of matrices to choose from, such as "mlp.out"; all by default.
        exclude: weights that cannot be chosen, so that a second circuit can be found beside a
            first; `size` stays a share of all weights. The mask's settings keep their digest.
        renew: further batches of the target, from the model under the mask so far; each step scores
            `target` and these. A model that loses the words of an answer may go on in others, and
            these would never pay.
        prefer: batches of what the model should say instead, such as refusals behind the beginning
            of the target's answers. Weights whose removal makes them likelier earn as well: the
            search raises `objective` of the target less `preference` times their `completion_loss`.
        avoid: batches of what may not become likelier with that, such as the same refusals of
            benign requests, behind the same beginning: `preference` times their loss is raised.
            Without them, what makes the target refuse makes all else refuse that begins alike.
        preference: what a nat of the loss of preferred or avoided answers counts beside one of the
            target's.
        protect_first: protect the first so many tokens of every protected answer by themselves as
            well, with the budget of the whole or one of their own, as "benign, first 8 tokens".
            They decide whether an answer refuses, and the mean over a long answer hides them. 0:
            do not.
        stop: asked after every step, with the model under the accepted mask; True ends the walk.
        progress: whether to show a bar; or the bars to add one to.
        folder: keeps the walk after every step; the same search goes on from there.
        max_memory: bytes for scores that are accumulated (see `removal_effect`). The two sums are
            then in temporary files as well.

    Raises:
        ValueError: no batches or some that the model cannot read, sizes outside (0, 1] or of less
            than a weight, a negative budget, preference or number of tokens, fewer than one step,
            no such unit, layer or kind, no units in these or parts of some, an `exclude` of other
            weights, a folder of another search, a loss or gradient that is not finite, and as
            `named_weights`.
    """
    bridge = as_bridge(bridge)
    is_list = isinstance(size, Sequence)
    sizes = list(size) if is_list else [size]
    refuse_settings(sizes, steps, reach, unit, preference, protect_first)
    refuse_batches("find_circuit", bridge, target)
    auxiliaries = _auxiliaries(bridge, prefer, avoid)
    _refuse_no_weights(bridge, sizes)
    sites = _sites(bridge, layers, kinds)
    units = None
    if unit != "weight":
        units = Units.of(weight_sites(bridge), unit, sites)
        sites = {name: sites[name] for name in units.sites}
    _refuse_other_weights(bridge, exclude)
    protection = Protection.of(
        bridge,
        with_first_tokens(protect, protect_first),
        budget_with_first_tokens(budget, named(protect), protect_first),
    )

    settings = {
        "budget": dict(protection.budgets),
        "steps": steps,
        "reach": reach,
        "renewed": renew is not None,
        **_limits(unit, layers, kinds, exclude, protect_first),
    }
    parents = [source_on(bridge, "removal_effect", data_settings(target, objective))]
    if auxiliaries:
        settings["preference"] = preference
    for auxiliary in auxiliaries:
        data = data_settings(auxiliary.batches, completion_loss)
        parents.append(source_on(bridge, "removal_effect", data))
    for batches in protection.priced.values():
        data = data_settings(batches, completion_loss)
        parents.append(source_on(bridge, "token_price", data))
    source = source_on(bridge, "circuit", settings, tuple(parents))

    largest_size = min(1.0, max([*sizes, reach * min(sizes)]))
    walk = Walk(
        bridge,
        target,
        renew,
        objective,
        protection,
        sites,
        units,
        {} if exclude is None else exclude.removed,
        source,
        sizes,
        largest_size,
        max_memory,
        auxiliaries,
        preference,
    )
    with _bars(progress) as bars:
        done = walk.resume(folder)
        task = bars.add_task("search", total=steps, completed=done)
        for step in range(done + 1, steps + 1):
            walk.step(step, steps)
            walk.keep(folder, step)
            bars.advance(task)
            if walk.is_to_stop(stop):
                break
    masks = walk.masks()
    return masks if is_list else masks[0]


def _auxiliaries(
    bridge: Bridge, prefer: Sequence[Batch], avoid: Sequence[Batch]
) -> list[AuxiliaryLoss]:
    """What is preferred, and what is avoided, as far as there is any."""
    auxiliaries = [AuxiliaryLoss("preferred", prefer, 1.0), AuxiliaryLoss("avoided", avoid, -1.0)]
    auxiliaries = [auxiliary for auxiliary in auxiliaries if auxiliary.batches]
    for auxiliary in auxiliaries:
        refuse_batches(f"find_circuit: {auxiliary.name}", bridge, auxiliary.batches)
    return auxiliaries


def _sites(
    bridge: Bridge, layers: Sequence[int] | None, kinds: Sequence[str] | None
) -> dict[str, Site]:
    """The matrices of these layers and kinds."""
    sites = weight_sites(bridge)
    _refuse_unknown("layers", layers, sorted({site.layer for site in sites.values()}))
    _refuse_unknown("kinds", kinds, sorted({site.kind for site in sites.values()}))
    chosen = {}
    for name, site in sites.items():
        is_of_layers = layers is None or site.layer in layers
        is_of_kinds = kinds is None or site.kind in kinds
        if is_of_layers and is_of_kinds:
            chosen[name] = site
    return chosen


def _refuse_no_weights(bridge: Bridge, sizes: Sequence[float]) -> None:
    """Raises ValueError for a share of the weights that is less than one of them."""
    n_weights = sum(site.parameter.numel() for site in weight_sites(bridge).values())
    for size in sizes:
        if round(size * n_weights) < 1:
            raise ValueError(
                f"find_circuit: size={size:g}: not one of {n_weights:,} weights; give "
                f"{1 / n_weights:.1g} or more"
            )


def _limits(
    unit: Unit,
    layers: Sequence[int] | None,
    kinds: Sequence[str] | None,
    exclude: WeightMask | None,
    protect_first: int,
) -> dict[str, Any]:
    """What the mask's settings say of the choice; nothing where all is as it is by default."""
    limits: dict[str, Any] = {}
    if unit != "weight":
        limits["unit"] = unit
    if layers is not None:
        limits["layers"] = list(layers)
    if kinds is not None:
        limits["kinds"] = list(kinds)
    if exclude is not None:
        limits["excluded"] = exclude.digest
    if protect_first:
        limits["protect_first"] = protect_first
    return limits


def _refuse_other_weights(bridge: Bridge, exclude: WeightMask | None) -> None:
    if exclude is None:
        return
    shapes = {name: tuple(site.parameter.shape) for name, site in weight_sites(bridge).items()}
    if dict(exclude.shapes) != shapes:
        odd = sorted(set(exclude.shapes.items()) ^ set(shapes.items()))[:2]
        raise ValueError(
            "find_circuit: `exclude` is a mask of other weights than this model's; "
            f"they differ in {odd}; give a mask that was made on it"
        )


def _refuse_unknown(option: str, wanted: Sequence[Any] | None, known: Sequence[Any]) -> None:
    if wanted is None:
        return
    unknown = [value for value in wanted if value not in known]
    if unknown or not wanted:
        raise ValueError(
            f"find_circuit: {option}={list(wanted)}; this model has {listed(known, most=40)}; "
            "name at least one of them, or leave it out for all"
        )


def _bars(progress: bool | Progress) -> AbstractContextManager[Progress]:
    """Bars that are there already, new ones, or none that can be seen."""
    if isinstance(progress, Progress):
        return nullcontext(progress)
    return progress_bar() if progress else Progress(disable=True)


def refuse_settings(
    sizes: Sequence[float],
    steps: int,
    reach: float,
    unit: str,
    preference: float,
    protect_first: int,
) -> None:
    """Raises ValueError for a size, number or unit that cannot be."""
    if not preference >= 0:
        raise ValueError(f"find_circuit: preference={preference}; expected 0 or more")
    if protect_first < 0:
        raise ValueError(f"find_circuit: protect_first={protect_first}; expected 0 or more tokens")
    if unit not in get_args(Unit):
        raise ValueError(
            f"find_circuit: unit={unit!r}; expected {listed(map(repr, get_args(Unit)))}"
        )
    if reach < 1:
        raise ValueError(f"find_circuit: reach={reach}; expected 1 or more")
    if steps < 1:
        raise ValueError(f"find_circuit: steps={steps}; expected at least 1")
    if not sizes or not all(0 < size <= 1 for size in sizes):
        shown = sizes[0] if len(sizes) == 1 else list(sizes)
        raise ValueError(f"find_circuit: size={shown}; expected a share of the weights in (0, 1]")


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


def refusal_ablation(
    bridge: Bridge,
    refusals: Sequence[Batch],
    spared: Sequence[Batch],
    *,
    size: float = 0.01,
    protect_share: float = 0.01,
    within: Scope = "weight",
) -> WeightMask:
    """The weights without which a model stops refusing: an attack that a mask must withstand."""
    return set_difference(
        bridge, refusals, [spared], q=size, p=protect_share, signed=False, within=within
    )
