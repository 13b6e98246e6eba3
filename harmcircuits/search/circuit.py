"""From behaviours to a circuit: weights without which one goes and the others stay."""

from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

from tqdm.auto import tqdm

from harmcircuits.batches import Batch
from harmcircuits.circuits.masks import Scope, WeightMask, refuse_other_weights, top_fraction
from harmcircuits.circuits.scores import Source
from harmcircuits.circuits.sites import Site
from harmcircuits.display import nearest
from harmcircuits.hooks.bridge import AnyModel, Bridge, as_bridge
from harmcircuits.hooks.checks import refuse_batches
from harmcircuits.hooks.objectives import Objective, completion_loss, token_error
from harmcircuits.hooks.weights import Provenance, block_sites, model_fingerprint
from harmcircuits.search.attribution import data_settings, removal_effect, snip_scores
from harmcircuits.search.descent import FreshAnswers, Search, Size, Worth
from harmcircuits.search.texts import Budget, Protect, Protection, Role, Texts

STEPS = 100
BUDGET = 0.05  # nats per token
ERROR_WEIGHT = 4.0  # of the target's `token_error`, which is at most 1, beside losses in nats

Sites = Sequence[str] | Callable[[Site], bool]
NOTHING: Mapping[str, Sequence[Batch]] = MappingProxyType({})


def find_circuit(
    bridge: AnyModel,
    target: Sequence[Batch],
    protect: Protect = (),
    *,
    size: float | Sequence[float],
    budget: Budget = BUDGET,
    steps: int = STEPS,
    objective: Objective = completion_loss,
    prefer: Mapping[str, Sequence[Batch]] = NOTHING,
    fresh_answers: FreshAnswers | None = None,
    sites: Sites | None = None,
    exclude: WeightMask | None = None,
    folder: str | Path | None = None,
    max_memory: int | None = None,
    progress: bool = False,
) -> Any:
    """Weights without which a target behaviour goes and what is protected stays.

    Every weight that is promising gets a gate, and many small steps on a few texts each open the
    gates whose weights raise the target's loss, make what is preferred likelier, and leave the
    losses of what is protected within their budgets (`harmcircuits.search.descent` has the whole in
    ten lines). The mask is the weights whose gates are open at the end. It is checked on answers
    that no step has seen, every third request of what is protected; where one of these losses rises
    by more than its budget, the search goes on with fewer weights.

    A mask has at most `size` of the weights: fewer where fewer are worth it, none where no mask
    keeps within the budget. `mask.trace` holds what was seen, as rows: `seen_rise`, of the mean
    loss of a step's texts, by step and `data` (the target's in units of the objective, the others'
    in nats per token); for every mask that was checked, by size, step and outcome ("accepted" or
    "refused"), `weights_removed` and for each protected behaviour `protected_rise`; and on how many
    examples each was scored, `examples_scored` by `data`.

    >>> hc.find_circuit(bridge, harm, protect=[benign], size=0.001, steps=10)
    WeightMask(circuit, ... of 983,040 weights, ...)

    Args:
        bridge: the model; unchanged afterwards.
        target: batches of the behaviour to remove.
        protect: batches of each behaviour to spare: a list of them, or by name.
        size: share of the block weights to remove, at most; a list gives a list of masks: the
            largest is learned first, the smaller ones are made from it.
        budget: how far the mean loss of each protected behaviour may rise, nats per token; a
            number, or one for each by name.
        steps: in which the gates of the largest size are learned; a smaller size takes a fifth of
            these more.
        objective: what the target is scored by; what is protected, always by `completion_loss`.
        prefer: batches of what the model should say instead, as "preferred", such as refusals
            behind the beginning of the target's answers: gates that make them likelier open as
            well. And as "avoided" of what may not become likelier with that, such as the same
            refusals of benign requests behind the same beginning: without them, what makes the
            target refuse makes all else refuse that begins alike.
        fresh_answers: makes further batches of the target, such as what the model still says to its
            requests. It is called with the mask so far in place, three times in a search, and what
            it gives is scored as well (`examples_added` in the trace, by step). Without it, an
            answer that is as bad in other words may take the place of those that are scored.
        sites: matrices to choose from: names of `named_weights`, or a function of a `Site` that
            says whether, such as `lambda site: site.layer > 2 and site.kind == "mlp.out"`.
        exclude: weights that cannot be chosen, so that a second circuit can be found beside a
            first; `size` stays a share of all weights. The mask's settings keep their digest.
        folder: keeps the search after every part; the same search goes on from there.
        max_memory: bytes for scores that are accumulated (see `removal_effect`). Their sum is then
            in temporary files as well.
        progress: whether to show a bar.

    Raises:
        ValueError: no batches or some that the model cannot read, sizes outside (0, 1] or of less
            than a weight, no step, a negative budget, no such matrix, an `exclude` of other
            weights, a folder of another search, a loss or gradient that is not finite, and as
            `named_weights`.
    """
    bridge = as_bridge(bridge)
    matrices = block_sites(bridge)
    shapes = {name: tuple(site.parameter.shape) for name, site in matrices.items()}
    n_weights = sum(map(prod, shapes.values()))
    shares = list(size) if isinstance(size, Sequence) else [size]
    _refuse_sizes(shares, n_weights)
    if steps < 1:
        raise ValueError(f"find_circuit: steps={steps}; expected at least 1")
    if exclude is not None:
        refuse_other_weights("find_circuit: `exclude`", exclude, model_fingerprint(bridge), shapes)
    candidates = _candidates(matrices, sites)

    refuse_batches("find_circuit", bridge, target)
    for name, batches in prefer.items():
        refuse_batches(f"find_circuit: {name}", bridge, batches)
    protection = Protection.of(bridge, protect, budget)
    texts = _texts(bridge, target, objective, prefer, protection)

    settings: dict[str, Any] = {"budget": dict(protection.budgets), "learning_steps": steps}
    settings["checked"] = data_settings(protection.checked)["data"]
    settings |= _unusual(sites, candidates, exclude, fresh_answers)
    search = Search(
        bridge,
        texts,
        protection,
        Worth(bridge, candidates, max_memory),
        shapes,
        {} if exclude is None else exclude.removed,
        _source(bridge, texts, settings),
        [Size(share, round(share * n_weights)) for share in set(shares)],
        steps,
        fresh_answers,
    )
    search.resume(folder)
    stages = range(search.stage, search.n_stages)
    bar = {"desc": "search", "initial": search.stage, "total": search.n_stages}
    for _ in tqdm(stages, **bar, disable=not progress, leave=False):
        search.advance()
        search.keep(folder)
    masks = [search.found(share) for share in shares]
    return masks if isinstance(size, Sequence) else masks[0]


def _texts(
    bridge: Bridge,
    target: Sequence[Batch],
    objective: Objective,
    prefer: Mapping[str, Sequence[Batch]],
    protection: Protection,
) -> list[Texts]:
    """All that a search scores and learns from."""
    weight = ERROR_WEIGHT if objective is token_error else 1.0
    texts = [Texts.of(bridge, "target", "target", target, objective, weight=weight)]
    for name, batches in prefer.items():
        if name not in ("preferred", "avoided"):
            raise ValueError(f'find_circuit: prefer: {name!r}; expected "preferred" and "avoided"')
        texts.append(Texts.of(bridge, name, cast(Role, name), batches))
    for name, batches in protection.priced.items():
        budget = protection.budgets[name]
        texts.append(Texts.of(bridge, name, "protected", batches, budget=budget))
    return texts


def _source(bridge: Bridge, texts: Sequence[Texts], settings: Mapping[str, Any]) -> Source:
    """How a mask is made: from which scores of which data."""
    source = Provenance.of(bridge).source
    parents = []
    for of_kind in texts:
        method = "token_price" if of_kind.role == "protected" else "removal_effect"
        parents.append(source(method, data_settings(of_kind.batches, of_kind.objective)))
    return source("circuit", settings, tuple(parents))


def _unusual(
    sites: Sites | None,
    candidates: Mapping[str, Site],
    exclude: WeightMask | None,
    fresh_answers: FreshAnswers | None,
) -> dict[str, Any]:
    """The settings that are not as by default."""
    settings: dict[str, Any] = {}
    if sites is not None:
        settings["sites"] = list(candidates)
    if exclude is not None:
        settings["excluded"] = exclude.digest
    if fresh_answers is not None:
        settings["fresh_answers"] = True
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
