"""Finding a circuit: a walk over masks on which the target pays and what is protected has a price.

    benefit = price = 0                                  # one number for each weight
    for step in 1 ... steps:
        price   += |W| * mean over each protected behaviour of sum_t |g_t| |x_t|^T   # token_price
        benefit += -W * mean over the target of sum_t g_t x_t^T                   # removal_effect
        n      = round(size * n_weights * step / steps)
        factor = the smallest tried whose mask passes the check
        mask   = the n largest of benefit - factor * price, as far as they are above zero

The benefit is taken under the mask accepted so far, the price under the mask refused last: there
the protected losses have risen, so the weights that broke them are dear. `W` are the weights before
anything is removed, also where a mask has zeroed them: a removed weight goes on earning what it
would if it were there, and may come back.

The check is made on protected answers that the price has not seen (see `Protection`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, overload

import torch
from jaxtyping import Float
from rich.progress import Progress
from torch import Tensor

from harmcircuits.circuits.masks import Scope, WeightMask, top_fraction
from harmcircuits.circuits.scores import Source
from harmcircuits.circuits.selection import largest
from harmcircuits.circuits.sites import Site
from harmcircuits.display import listed, progress_bar
from harmcircuits.hooks.accumulation import mean_gradients
from harmcircuits.hooks.attribution import removal_effect, score_source, snip_scores
from harmcircuits.hooks.bridge import AnyModel, Bridge, as_bridge
from harmcircuits.hooks.masking import masked_if_given
from harmcircuits.hooks.objectives import Objective, completion_loss
from harmcircuits.hooks.protection import Budget, Protect, Protection
from harmcircuits.hooks.walk_files import KeptWalk, read_walk, write_walk
from harmcircuits.hooks.weights import model_fingerprint, weight_sites, weights_digest
from harmcircuits.measurements import Label, Measurement, Rows
from harmcircuits.prompts import Batch, refuse_no_batches

STEPS = 10
BUDGET = 0.05  # nats per token

# What the price may be multiplied by: from a quarter to 64, each 1.41 times the one before. A
# larger stride would jump over the masks that break little, which teach most.
FACTORS = tuple(2 ** (number / 2) for number in range(-4, 13))
FIRST_RUNG = FACTORS.index(1.0)
# A refused mask under which a loss rises further has broken everything: nothing is learned from it,
# and its gradients would swamp the sums.
MOST_TO_LEARN_FROM = 1.5  # nats per token

Totals = dict[str, Float[Tensor, "..."]]


@overload
def find_circuit(
    bridge: AnyModel,
    target: Sequence[Batch],
    protect: Protect = (),
    *,
    size: float,
    budget: Budget = BUDGET,
    steps: int = STEPS,
    objective: Objective = completion_loss,
    layers: Sequence[int] | None = None,
    kinds: Sequence[str] | None = None,
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
    objective: Objective = completion_loss,
    layers: Sequence[int] | None = None,
    kinds: Sequence[str] | None = None,
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
    objective: Objective = completion_loss,
    layers: Sequence[int] | None = None,
    kinds: Sequence[str] | None = None,
    stop: Callable[[Bridge], bool] | None = None,
    progress: bool | Progress = False,
    folder: str | Path | None = None,
    max_memory: int | None = None,
) -> WeightMask | list[WeightMask]:
    """The weights that carry a target and that nothing protected needs.

    In `steps` steps a mask grows to the largest size; in each, all weights are chosen afresh by
    sums over the steps so far (see the head of this module):

        removal effect on the target - factor * token price of what is protected

    with the smallest factor tried under which no protected loss rises by more than its budget, on
    answers that the price has not seen. Then every size gets its own factor in the same way.

    A mask has at most `size` of the weights: fewer where fewer are worth their price. `mask.trace`
    holds what was tried, as rows labelled by step, share, factor and outcome ("accepted" or
    "refused"): `weights_removed`, and for each protected behaviour `protected_rise`; and for each
    step the `target_loss` under its mask, its `predicted_change` (of first order) and
    `measured_change`.

    >>> hc.find_circuit(bridge, harm, protect=[benign], size=[0.0005, 0.001], steps=2)
    [WeightMask(circuit, 491 of 983,040 weights, 0.05%),
     WeightMask(circuit, 983 of 983,040 weights, 0.10%)]

    Args:
        bridge: the model; unchanged afterwards.
        target: batches of the behaviour to remove.
        protect: batches of each behaviour to spare: a list of them, or by name.
        size: share of the block weights to remove, at most; a list gives a list of masks.
        budget: how far the mean loss of each protected behaviour may rise, nats per token; a
            number, or one for each by name.
        steps: in how many steps the mask grows to the largest size.
        objective: what the target is scored by; what is protected, always by `completion_loss`.
        layers: numbers of the blocks to choose from; all by default.
        kinds: kinds of matrices to choose from, such as "mlp.out"; all by default.
        stop: asked after every step, with the model under the accepted mask; True ends the walk.
        progress: whether to show a bar; or the bars to add one to.
        folder: keeps the walk after every step; the same search goes on from there.
        max_memory: bytes on the devices for accumulated scores (see `removal_effect`). The two sums
            are then in host memory.

    Raises:
        ValueError: no batches, sizes outside (0, 1], a negative budget, fewer than one step, no
            such layer or kind, a folder of another search, and as `named_weights`.
    """
    bridge = as_bridge(bridge)
    is_list = isinstance(size, Sequence)
    sizes = list(size) if is_list else [size]
    refuse_settings(sizes, steps)
    refuse_no_batches("find_circuit", target)
    sites = _sites(bridge, layers, kinds)
    protection = Protection.of(bridge, protect, budget)

    settings: dict[str, Any] = {"budget": dict(protection.budgets), "steps": steps}
    if layers is not None:
        settings["layers"] = list(layers)
    if kinds is not None:
        settings["kinds"] = list(kinds)
    parents = [score_source(bridge, "removal_effect", target, objective)]
    for batches in protection.priced.values():
        parents.append(score_source(bridge, "token_price", batches, completion_loss))
    source = Source(model_fingerprint(bridge), "circuit", settings, tuple(parents))

    walk = _Walk(bridge, target, objective, protection, sites, source, max(sizes), max_memory)
    with _bars(progress) as bars:
        task = bars.add_task("search", total=steps + len(sizes))
        done = walk.resume(folder)
        bars.advance(task, done)
        for step in range(done + 1, steps + 1):
            walk.step(step, steps)
            walk.keep(folder, step)
            bars.advance(task)
            if walk.is_to_stop(stop):
                break
        masks = []
        for share in sizes:
            masks.append(walk.mask_of(share))
            bars.advance(task)
    return masks if is_list else masks[0]


class _Try(NamedTuple):
    """A mask that was checked: accepted if no protected loss rises beyond its budget."""

    mask: WeightMask
    rung: int  # of FACTORS
    rises: Sequence[Measurement]
    is_accepted: bool

    @property
    def teaches(self) -> bool:
        """Whether it was refused, and broke so little that it shows what broke."""
        return not self.is_accepted and max(row.mean for row in self.rises) <= MOST_TO_LEARN_FROM


@dataclass
class _Walk:
    """A search under way: its sums, the masks that it stands on, and what it has tried."""

    bridge: Bridge
    target: Sequence[Batch]
    objective: Objective
    protection: Protection
    sites: Mapping[str, Site]
    source: Source
    largest_size: float
    max_memory: int | None
    benefit: Totals = field(default_factory=dict)
    price: Totals = field(default_factory=dict)
    reached: float = (
        0.0  # the size of the last step; less than the largest where a walk was stopped
    )
    rung: int = FIRST_RUNG
    accepted: WeightMask | None = None
    refused: WeightMask | None = None
    target_loss: float | None = None
    trace: Rows = field(default_factory=Rows)

    def step(self, number: int, of: int) -> None:
        """Add to the sums, and move to the mask that they now say."""
        self._add_price()
        effect = self._add_benefit()
        if self.target_loss is None:
            self.target_loss = self._mean_loss()

        share = self.largest_size * number / of
        self.reached = share
        labels: dict[str, Label] = {"step": number, "share": share}
        accepted, refused = self._cheapest(share, labels)
        before = self.accepted
        if accepted is not None:
            self.accepted = accepted.mask
            self.rung = accepted.rung
        else:
            # Even the dearest fails: stay, and learn from what failed.
            self.rung = len(FACTORS) - 1
        self.refused = refused.mask if refused is not None and refused.teaches else None

        predicted = _sum_over(effect, self.accepted) - _sum_over(effect, before)
        loss = self._mean_loss()
        for metric, value in (
            ("target_loss", loss),
            ("predicted_change", predicted),
            ("measured_change", loss - self.target_loss),
        ):
            self.trace += [Measurement.exact(metric, labels, value)]
        self.target_loss = loss

    def mask_of(self, share: float) -> WeightMask:
        """The mask of a size, with the factor that it needs itself."""
        share = min(share, self.reached)
        labels: dict[str, Label] = {"step": "end", "share": share}
        accepted, _ = self._cheapest(share, labels)
        if accepted is not None:
            mask, rung = accepted.mask, accepted.rung
        else:
            mask, rung = self._last_resort(share), self.rung
        settings = {
            "size": share,
            "n_wanted": round(share * self.n_weights),
            "factor": FACTORS[rung],
            **self.source.settings,
        }
        source = replace(mask.source, settings=settings)
        return replace(mask, source=source, trace=self.trace)

    def _add_price(self) -> None:
        """What removing each weight may cost, under the mask that was refused last."""
        under = self.accepted if self.refused is None else self.refused
        for batches in self.protection.priced.values():
            with masked_if_given(self.bridge, under):
                gradients = mean_gradients(
                    self.bridge,
                    batches,
                    completion_loss,
                    self.sites,
                    _unchanged,
                    kind="per token",
                    max_memory=self.max_memory,
                )
            # Outside the mask: here the weights are whole.
            for name, total in _multiplied(gradients, self.sites):
                self._add(self.price, name, total.abs_())

    def _add_benefit(self) -> Totals:
        """What removing each weight does to the target, under the mask accepted so far."""
        with masked_if_given(self.bridge, self.accepted):
            gradients = mean_gradients(
                self.bridge,
                self.target,
                self.objective,
                self.sites,
                _unchanged,
                max_memory=self.max_memory,
            )
        effect = {}
        for name, total in _multiplied(gradients, self.sites):
            effect[name] = total.neg_()
            self._add(self.benefit, name, effect[name])
        return effect

    def _add(self, sums: Totals, name: str, values: Tensor) -> None:
        if name in sums:
            sums[name].add_(values)
        else:
            sums[name] = values.clone()

    def _cheapest(
        self, share: float, labels: Mapping[str, Label]
    ) -> tuple[_Try | None, _Try | None]:
        """The mask with the smallest factor that passes the check, and the nearest that does not.

        Factors are tried one by one from the last one: downwards while masks pass, or upwards until
        one does. Nothing proves that a larger factor costs less, so it is the smallest *tried*.
        """
        first = self._try(share, self.rung, labels)
        if first.is_accepted:
            rungs = range(self.rung - 1, -1, -1) if self.protection.priced else ()
        else:
            rungs = range(self.rung + 1, len(FACTORS))

        last = first
        for rung in rungs:
            current = self._try(share, rung, labels)
            if first.is_accepted and not current.is_accepted:
                return last, current
            if current.is_accepted and not first.is_accepted:
                return current, last
            last = current
        return (last, None) if first.is_accepted else (None, last)

    def _try(self, share: float, rung: int, labels: Mapping[str, Label]) -> _Try:
        mask = self._chosen(share, FACTORS[rung])
        where = {**labels, "factor": FACTORS[rung]}
        rises = self.protection.rises(self.bridge, mask, where)
        is_accepted = self.protection.allows(rises)

        outcome = "accepted" if is_accepted else "refused"
        size = Measurement.exact("weights_removed", where, mask.n_removed)
        self.trace += [row.labelled(outcome=outcome) for row in (size, *rises)]
        return _Try(mask, rung, rises, is_accepted)

    def _chosen(self, share: float, factor: float) -> WeightMask:
        """The largest of benefit - factor * price, but none that is zero or below."""
        scores = _Difference(self.benefit, self.price, factor)
        n_candidates = sum(value.numel() for value in self.benefit.values())
        n = min(round(share * self.n_weights), n_candidates)
        removed = {}
        for name, index in largest(scores, n, {}).items():
            chosen = scores[name].flatten()[index.to(scores[name].device)]
            removed[name] = index[(chosen > 0).cpu()]
        return WeightMask(removed, self.shapes, self.source)

    def _last_resort(self, share: float) -> WeightMask:
        """Where no factor passes: what was accepted last if it is no larger, or nothing."""
        mask = self.accepted
        if mask is not None and mask.n_removed <= round(share * self.n_weights):
            return mask
        return WeightMask({}, self.shapes, self.source)

    def _mean_loss(self) -> float:
        """The target's mean objective under the mask accepted so far."""
        with torch.no_grad(), masked_if_given(self.bridge, self.accepted):
            losses = [self.objective(self.bridge, batch).float().cpu() for batch in self.target]
        return torch.cat(losses).mean().item()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all block matrices: also of those from which nothing may be chosen."""
        return {
            name: tuple(site.parameter.shape) for name, site in weight_sites(self.bridge).items()
        }

    @property
    def n_weights(self) -> int:
        return sum(site.parameter.numel() for site in weight_sites(self.bridge).values())

    def is_to_stop(self, stop: Callable[[Bridge], bool] | None) -> bool:
        """What a caller's `stop` says of the model under the accepted mask."""
        if stop is None:
            return False
        with masked_if_given(self.bridge, self.accepted) as bridge:
            return stop(bridge)

    def keep(self, folder: str | Path | None, step: int) -> None:
        """Write everything into the folder, in place of the step before."""
        if folder is None:
            return
        state = {
            "step": step,
            "rung": self.rung,
            "reached": self.reached,
            "target_loss": self.target_loss,
        }
        sums = {"benefit": self.benefit, "price": self.price}
        masks = {"accepted": self.accepted, "refused": self.refused}
        write_walk(folder, self._key, KeptWalk(state, sums, masks, self.trace))

    def resume(self, folder: str | Path | None) -> int:
        """Go on from what the folder holds; the steps that were done there."""
        walk = read_walk(folder, self._key) if folder is not None else None
        if walk is None:
            return 0
        self.rung = walk.state["rung"]
        self.reached = walk.state["reached"]
        self.target_loss = walk.state["target_loss"]
        self.accepted = walk.masks["accepted"]
        self.refused = walk.masks["refused"]
        self.trace = walk.trace
        self.benefit = self._on_devices(walk.sums["benefit"])
        self.price = self._on_devices(walk.sums["price"])
        return walk.state["step"]

    def _on_devices(self, sums: Mapping[str, Tensor]) -> Totals:
        """Each matrix's sum beside its weight, or in host memory under a bound."""
        if self.max_memory is not None:
            return dict(sums)
        return {name: sum.to(self.sites[name].parameter.device) for name, sum in sums.items()}

    @property
    def _key(self) -> str:
        """What a walk must have in common with another to go on from it."""
        digest = weights_digest(self.bridge)
        return f"{self.source.to_json()} size={self.largest_size} weights={digest}"


@dataclass(frozen=True)
class _Difference(Mapping[str, Tensor]):
    """benefit - factor * price, a matrix at a time: as a whole it never exists."""

    benefit: Totals
    price: Totals
    factor: float

    def __getitem__(self, name: str) -> Tensor:
        if not self.price:
            return self.benefit[name]
        return torch.sub(self.benefit[name], self.price[name], alpha=self.factor)

    def __iter__(self) -> Iterator[str]:
        return iter(self.benefit)

    def __len__(self) -> int:
        return len(self.benefit)


def _multiplied(
    gradients: Totals, sites: Mapping[str, Site]
) -> Iterator[tuple[str, Float[Tensor, "..."]]]:
    """Each gradient times its weight, in place."""
    for name, gradient in gradients.items():
        weight = sites[name].parameter.detach()
        yield name, gradient.mul_(weight.to(gradient.device))


def _unchanged(_: Site, gradient: Tensor) -> Tensor:
    return gradient


def _sum_over(values: Totals, mask: WeightMask | None) -> float:
    total = 0.0
    for name, index in mask.removed.items() if mask is not None else ():
        chosen = values[name].flatten()[index.to(values[name].device)]
        total += chosen.double().sum().item()
    return total


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


def refuse_settings(sizes: Sequence[float], steps: int) -> None:
    """Raises ValueError for a size or number of steps that cannot be."""
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
    """The weights whose removal makes a model stop refusing: an attack that a mask must withstand.

    The unsigned `set_difference`. Score the model as the attacker finds it: under a mask, that is
    inside `masked`. Source: arXiv 2402.05162, section on set difference; its defaults.

    Args:
        bridge: the model.
        refusals: refusals of harmful requests.
        spared: answers whose weights the attacker leaves alone.
        size: top share on refusals.
        protect_share: top share on what is spared.
        within: what weights are ranked together.

    Raises:
        ValueError: no batches, and as `top_fraction`.
    """
    return set_difference(
        bridge, refusals, [spared], q=size, p=protect_share, signed=False, within=within
    )
