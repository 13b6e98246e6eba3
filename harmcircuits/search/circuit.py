"""Find a circuit: learn which weights to remove, so that one behaviour goes and others stay.

Every candidate weight W_i has a **gate** z_i: the model runs with W_i (1 - z_i) in its place. With
n the largest number of weights to remove, the search minimises

    L(z) = - w  mean_x min(rise_x, TARGET_CAP)           over texts x of the target
           +    mean_x max(loss_x, PREFERRED_FLOOR)      over preferred answers
           -    mean_x min(rise_x, CONTRAST_CAP)         over the contrast ("avoided")
           + sum_k m_k mean_x max(rise_x - FREE_RISE, 0) over texts of each retain set k

    subject to  0 <= z_i <= 1  and  sum_i z_i <= n

where loss_x is the loss of a text at z, and rise_x = loss_x - (loss_x at z = 0). w is 1, or 4 where
the target is scored by `token_error`. The algorithm:

1. **Score.** At 0, 20, 40 and 60 % of the steps, the benefit of every weight grows by

       w removal_effect(target) - removal_effect(preferred) + removal_effect(contrast)
       - PRICE_WEIGHT sum_k token_price(k)

   with gradients under the mask so far and the weight's original value. So a removed weight still
   counts as useful, and where the mask damages a retain set, the penalties grow with its
   gradients. With `fresh_answers`, the model first answers under the mask so far, and new answers
   join the target (on-policy re-sampling).
2. **Choose candidates.** The 20 n weights of the largest positive benefit, and the weights whose
   gates are open. Open gates stay as they are, every other gate starts at 0.
3. **Step.** With g = -dL/dz on a few texts of each role: the momentum is v <- 0.85 v + 0.15 g, the
   stride s the n-th largest |v| but at least 0.97 times the last stride, and

       z <- the nearest point within the constraints to  z + rate clamp(v / s, -1, 1)

   The rate falls from 0.3 to 0.05, and n grows to its full value in the first 30 % of the steps.
   In the second half the gates are *hard*: the model runs with the n largest at 1 and the others
   at 0, and g goes straight through to z (arXiv 1308.3432).
4. **Weigh the penalties.** After each step m_k grows by 15 % if the running mean of its rise is
   above 70 % of the budget of k, and falls by as much if not; from 2, within 0.3 and 20.
5. **Check.** The mask is the n largest gates that are more than half as open as the largest. On the
   third of the answers that no step reads, no mean loss of a retain set may rise by more than
   70 % of its budget. If one does, its m_k doubles, n shrinks by 5 %, and 5 % more steps follow, up
   to twelve times; after that, n is halved until all budgets are kept. In the second half of the
   steps, every fifth is followed by such a check for the sake of m_k alone.
6. **Shrink.** Each smaller size goes on from there, with 20 % more steps.

`schedule.py` has the steps, `benefits.py` has 1, `step.py` and `circuits/gates.py` have 3,
`texts.py` has the terms of L and 4, `descent.py` the order of all, `folder.py` how to resume.
"""

from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypedDict, Unpack, overload

from tqdm.auto import tqdm

from harmcircuits.batches import Batch
from harmcircuits.circuits.gates import Gates
from harmcircuits.circuits.masks import Scope, WeightMask, refuse_other_weights, top_fraction
from harmcircuits.circuits.scores import Source
from harmcircuits.circuits.sites import Site
from harmcircuits.display import nearest
from harmcircuits.hooks.bridge import AnyModel, Bridge, as_bridge
from harmcircuits.hooks.checks import refuse_batches
from harmcircuits.hooks.objectives import Objective, completion_loss, token_error
from harmcircuits.hooks.weights import Provenance, block_sites, model_fingerprint
from harmcircuits.search.accumulation import GradientSums
from harmcircuits.search.attribution import data_settings, removal_effect, snip_scores
from harmcircuits.search.benefits import Benefits
from harmcircuits.search.descent import FreshAnswers, Search
from harmcircuits.search.folder import SearchFolder
from harmcircuits.search.schedule import Schedule, Size
from harmcircuits.search.texts import Budget, Protect, Protection, TextGroup

STEPS = 100
BUDGET = 0.05  # nats per token
ERROR_WEIGHT = 4.0  # w for `token_error`, which is at most 1; for losses in nats w is 1

Sites = Sequence[str] | Callable[[Site], bool]
Prefer = Mapping[Literal["preferred", "avoided"], Sequence[Batch]]
NOTHING: Prefer = MappingProxyType({})


class SearchOptions(TypedDict, total=False):
    """The options of `find_circuit` that have defaults."""

    budget: Budget
    steps: int
    objective: Objective
    prefer: Prefer
    fresh_answers: FreshAnswers | None
    sites: Sites | None
    exclude: WeightMask | None
    folder: str | Path | None
    max_memory: int | None
    progress: bool


@overload
def find_circuit(
    bridge: AnyModel,
    target: Sequence[Batch],
    protect: Protect = (),
    *,
    size: float,
    **options: Unpack[SearchOptions],
) -> WeightMask: ...
@overload
def find_circuit(
    bridge: AnyModel,
    target: Sequence[Batch],
    protect: Protect = (),
    *,
    size: Sequence[float],
    **options: Unpack[SearchOptions],
) -> list[WeightMask]: ...
def find_circuit(
    bridge: AnyModel,
    target: Sequence[Batch],
    protect: Protect = (),
    *,
    size: float | Sequence[float],
    budget: Budget = BUDGET,
    steps: int = STEPS,
    objective: Objective = completion_loss,
    prefer: Prefer = NOTHING,
    fresh_answers: FreshAnswers | None = None,
    sites: Sites | None = None,
    exclude: WeightMask | None = None,
    folder: str | Path | None = None,
    max_memory: int | None = None,
    progress: bool = False,
) -> WeightMask | list[WeightMask]:
    """A mask that removes a target behaviour and keeps the retain sets within their budgets.

    Every promising weight gets a gate. Small steps on a few texts each open the gates of weights
    whose removal raises the target's loss, makes preferred answers likelier, and leaves the losses
    of the retain sets within their budgets. The mask is the weights whose gates are open at the
    end. It is checked on answers that no step reads, every third request of each retain set; where
    one of these losses rises too far, the search goes on with fewer weights. The docstring of
    `harmcircuits.search.circuit` has the objective as a formula and every step.

    A mask has at most `size` of the weights: fewer where fewer are useful, none where no mask keeps
    the budgets. `mask.trace` holds the search as rows: `examples_scored`, the number of examples of
    each `data`; `seen_rise`, the rise of the mean loss of a step's texts, by step and `data` (the
    target's in units of the objective, the others' in nats per token); and for every mask that was
    checked, by size, step and outcome ("accepted" or "refused"), `weights_removed` and for each
    retain set `protected_rise`.

    >>> hc.find_circuit(bridge, harm, protect=[benign], size=0.001, steps=10)
    WeightMask(circuit, ... of 983,040 weights, ...)

    Args:
        bridge: the model; unchanged afterwards.
        target: batches of the behaviour to remove.
        protect: the retain sets, batches of each behaviour to keep: a list of them, or by name.
        size: share of the block weights to remove, at most. A list gives a list of masks: the
            largest is learned first, and the smaller ones are made from it.
        budget: how far the mean loss of each retain set may rise, nats per token; a number, or one
            for each by name.
        steps: the number of steps to the largest size; each smaller size takes a fifth as many.
        objective: scores the target; the retain sets are always scored by `completion_loss`.
        prefer: answers that should take the target's place. "preferred": batches of them, such as
            refusals behind the beginning of the target's answers. "avoided": a contrast that must
            not become likelier with them, such as the same refusals of benign requests behind the
            same beginning. Without a contrast, the mask may also refuse every benign request
            whose answer begins like the target's.
        fresh_answers: makes further batches of the target, such as the answers that the model still
            gives to its requests (on-policy re-sampling). It is called under the mask so far, three
            times in a search, and new answers are scored as well (`examples_added` in the trace, by
            step). Without it, the model may learn to say the same in other words.
        sites: matrices to choose from: names of `named_weights`, or a function that is True for the
            `Site` of such a matrix, as in `lambda site: site.layer > 2 and site.kind == "mlp.out"`.
        exclude: weights that cannot be chosen, so that a second circuit can be found beside a
            first; `size` stays a share of all weights. The mask's settings keep their digest.
        folder: stores the search after every stage; the same search resumes from it.
        max_memory: bytes for scores while they are accumulated (see `removal_effect`). The sum of
            all scores is then in temporary files as well.
        progress: whether to show a bar.

    Raises:
        ValueError: no batches, or a batch that the model cannot read; a size outside (0, 1] or of
            less than one weight; no step; a negative budget; an unknown matrix; an `exclude` of
            another model; a folder of another search; a loss or gradient that is not finite; and as
            `named_weights`.
    """
    bridge = as_bridge(bridge)
    matrices = block_sites(bridge)
    shapes = {name: tuple(site.parameter.shape) for name, site in matrices.items()}
    n_weights = sum(map(prod, shapes.values()))
    shares = list(size) if isinstance(size, Sequence) else [size]
    _refuse_settings(shares, n_weights, steps, prefer)
    if exclude is not None:
        refuse_other_weights("find_circuit: `exclude`", exclude, model_fingerprint(bridge), shapes)
    candidates = _candidates(matrices, sites)

    protection, groups = _texts(bridge, target, objective, prefer, protect, budget)
    settings = {
        "budget": dict(protection.budgets),
        "learning_steps": steps,
        "checked": data_settings(protection.checks)["data"],
        **_changed_settings(sites, candidates, exclude, fresh_answers),
    }
    sizes = [Size(share, round(share * n_weights)) for share in set(shares)]
    no_weights = WeightMask({}, shapes, _source(bridge, groups, settings))
    search = Search(
        bridge,
        groups,
        protection,
        Benefits(GradientSums(candidates, max_memory), exclude.removed if exclude else {}),
        Schedule(steps, sorted(sizes, reverse=True)),
        Gates.over(no_weights, candidates),
        fresh_answers,
    )
    _run(search, folder, progress)
    masks = [search.mask(share) for share in shares]
    return masks if isinstance(size, Sequence) else masks[0]


def _run(search: Search, folder: str | Path | None, progress: bool) -> None:
    """Run all stages that a search has not run, and save it after each."""
    search_folder = SearchFolder.of(search, folder) if folder is not None else None
    if search_folder:
        search_folder.resume(search)
    stages = range(search.stage, search.schedule.n_stages)
    bar = {"desc": "search", "initial": search.stage, "total": search.schedule.n_stages}
    for _ in tqdm(stages, **bar, disable=not progress, leave=False):
        search.advance()
        if search_folder:
            search_folder.save(search)


def _texts(
    bridge: Bridge,
    target: Sequence[Batch],
    objective: Objective,
    prefer: Prefer,
    protect: Protect,
    budget: Budget,
) -> tuple[Protection, list[TextGroup]]:
    """The retain sets, and all texts that the search reads, with their losses now."""
    refuse_batches("find_circuit", bridge, target)
    for role, batches in prefer.items():
        refuse_batches(f"find_circuit: {role}", bridge, batches)
    protection = Protection.of(bridge, protect, budget)

    weight = ERROR_WEIGHT if objective is token_error else 1.0
    groups = [TextGroup("target", "target", objective, weight)]
    groups += [TextGroup(role, role) for role in prefer]
    for name in protection.training:
        groups.append(TextGroup(name, "protected", budget=protection.budgets[name]))
    data = [target, *prefer.values(), *protection.training.values()]
    for group, batches in zip(groups, data, strict=True):
        group.extend(bridge, batches)
    return protection, groups


def _source(bridge: Bridge, groups: Sequence[TextGroup], settings: Mapping[str, Any]) -> Source:
    """How the masks of a search are made: its settings, and the scores it learns from."""
    source = Provenance.of(bridge).source
    parents = []
    for group in groups:
        method = "token_price" if group.role == "protected" else "removal_effect"
        parents.append(source(method, data_settings(group.batches, group.objective)))
    return source("circuit", settings, tuple(parents))


def _changed_settings(
    sites: Sites | None,
    candidates: Mapping[str, Site],
    exclude: WeightMask | None,
    fresh_answers: FreshAnswers | None,
) -> dict[str, Any]:
    """Settings that differ from their defaults."""
    settings: dict[str, Any] = {}
    if sites is not None:
        settings["sites"] = list(candidates)
    if exclude is not None:
        settings["excluded"] = exclude.digest
    if fresh_answers is not None:
        settings["fresh_answers"] = True
    return settings


def _candidates(matrices: Mapping[str, Site], sites: Sites | None) -> dict[str, Site]:
    """The matrices to choose weights from."""
    if sites is None:
        return dict(matrices)
    if callable(sites):
        return {name: site for name, site in matrices.items() if sites(site)}
    for name in sites:
        if name not in matrices:
            raise ValueError(f"find_circuit: sites: no {name!r}; {nearest(name, matrices)}")
    return {name: site for name, site in matrices.items() if name in sites}


def _refuse_settings(shares: Sequence[float], n_weights: int, steps: int, prefer: Prefer) -> None:
    if not shares or max(shares) > 1 or round(min(shares) * n_weights) < 1:
        raise ValueError(
            f"find_circuit: size={shares}; expected shares in (0, 1], of at least one of "
            f"the {n_weights:,} weights ({1 / n_weights:.1g})"
        )
    if steps < 1:
        raise ValueError(f"find_circuit: steps={steps}; expected at least 1")
    unknown = prefer.keys() - {"preferred", "avoided"}
    if unknown:
        raise ValueError(
            f'find_circuit: prefer: {min(unknown)!r}; expected "preferred" and "avoided"'
        )


def set_difference(
    bridge: AnyModel,
    target: Sequence[Batch],
    protect: Sequence[Sequence[Batch]],
    *,
    q: float,
    p: float,
    signed: bool = True,
    within: Scope = "weight",
    objective: Objective = completion_loss,
    max_memory: int | None = None,
) -> WeightMask:
    """The published set difference: the top `q` on the target without the top `p` on others.

    top(removal_effect of the target, q) - top(snip_scores of each retain set, p), each within
    its own matrix and on the unedited model, so fewer than `q` of the weights remain. Source: arXiv
    2604.09544; unsigned, arXiv 2402.05162.

    >>> hc.set_difference(bridge, harm, [benign], q=0.01, p=0.01)
    WeightMask(difference, ... of 983,040 weights, ...)

    Args:
        bridge: the model.
        target: batches of the behaviour to remove.
        protect: the retain sets: batches of each behaviour to keep.
        q: share of the weights that the target's ranking gives.
        p: share of the weights that each retain set keeps.
        signed: score the target by `removal_effect`; False: by `snip_scores`.
        within: the weights that are ranked together, as in `top_fraction`.
        objective: scores the target.
        max_memory: as in `removal_effect`.

    Raises:
        ValueError: no batches, and as `top_fraction`.
    """
    bridge = as_bridge(bridge)
    score = removal_effect if signed else snip_scores
    scores = score(bridge, target, objective, max_memory=max_memory)
    mask = top_fraction(scores, q, within=within)
    del scores
    for batches in protect:
        needed = snip_scores(bridge, batches, completion_loss, max_memory=max_memory)
        mask = mask - top_fraction(needed, p, within=within)
    return mask
