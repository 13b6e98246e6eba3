"""Gates over candidate weights, learned by many small steps.

    benefit = price = 0                                  # one number for each weight
    for every round:
        price   += |W| * mean over each protected behaviour of sum_t |g_t| |x_t|^T     # token_price
        benefit += -W * d(what the target should become) / dW                      # removal_effect
        candidates = the most promising by benefit - FACTOR * price
        for every step:                                  # a few texts of everything
            loss = - the target's rise, up to a cap
                   + the loss of what is preferred - the rise of what is avoided, both within bounds
                   + multiplier * the rise of each protected behaviour
            gate += rate * momentum of -dloss/dgate, kept within 0 <= gate <= 1 and sum of gates <= n
            a multiplier grows while its behaviour is near its budget, and shrinks else
    mask = the n largest gates, fewer where these break a budget on answers that no step has seen

A gate takes its share of a weight, W * (1 - gate); in the second half of a round the n largest take
all of theirs and the others nothing. Scores are taken under the mask of the round before, of the
weights as they were, so that what was removed goes on earning and may come back.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from harmcircuits.circuits.masks import WeightMask
from harmcircuits.circuits.scores import Source
from harmcircuits.circuits.selection import largest, positive
from harmcircuits.circuits.sites import Site
from harmcircuits.hooks.accumulation import mean_gradients
from harmcircuits.hooks.bridge import Bridge
from harmcircuits.hooks.gradients import Input, OutputGradient, hook_pairs
from harmcircuits.hooks.masking import masked, masked_if_given
from harmcircuits.hooks.objectives import Objective, completion_loss
from harmcircuits.hooks.protection import Protection, UnpaddedText, batched, unpadded
from harmcircuits.hooks.weights import sources_on, weight_sites
from harmcircuits.prompts import Batch

STEPS = 30  # of a round
CANDIDATES = 20  # times as many as are removed
FACTOR = 0.25  # of the price, where candidates are chosen
TEXTS = 16  # of the target in a step, and half as many of what is protected
RATE, DECAY = 0.2, 0.85  # of a gate in units of a usual benefit; of the momentum
MOST_OF_A_STEP = 3.0  # such units
CAP = 4.0  # nats a token: a target that has risen so far is gone
ENOUGH = 0.2  # nats a token of what is preferred
MOST_AVOIDED = 0.3  # nats a token that the loss of what is avoided may rise and earn
FIRST_MULTIPLIER, GROWTH, NEAR = 2.0, 1.15, 0.7  # of a budget
LEAST_MULTIPLIER, MOST_MULTIPLIER = 0.3, 40.0
MEMORY = 0.8  # of the rises that multipliers look at
REACH = (2.0, 4.0, 1.0)  # rounds of a target alone, in sizes: what is dear shows in larger masks


@dataclass
class Texts:
    """Texts of one kind, with the loss of each before anything is removed; drawn a few at a time."""

    examples: list[UnpaddedText]
    objective: Objective
    before: Float[Tensor, " n"]
    generator: torch.Generator
    left: list[int] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        bridge: Bridge,
        batches: Sequence[Batch],
        objective: Objective,
        generator: torch.Generator,
    ) -> "Texts":
        examples = unpadded(batches)
        with torch.no_grad():
            losses = [objective(bridge, batch).float().cpu() for batch in batches]
        return cls(examples, objective, torch.cat(losses), generator)

    def losses(self, bridge: Bridge, n: int) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """The losses of the next texts now and before; each comes once before one comes again."""
        drawn = []
        while len(drawn) < n:
            if not self.left:
                self.left = torch.randperm(len(self.examples), generator=self.generator).tolist()
            drawn.append(self.left.pop())
        (batch,) = batched([self.examples[number] for number in drawn], n)
        now = self.objective(bridge, batch)
        return now, self.before[drawn].to(now.device)


@dataclass
class Gates:
    """A search under way: what it sums up, its candidates, and how far each gate is open."""

    bridge: Bridge
    sites: Mapping[str, Site]
    target: Texts
    beside: Mapping[str, Texts]  # "preferred" and "avoided"
    protected: Mapping[str, Texts]
    protection: Protection
    batches: Mapping[str, Sequence[Batch]]  # of all of these, by name
    source: Source
    weight: float  # of the target's rise
    benefit: dict[str, Tensor] = field(default_factory=dict)
    multipliers: dict[str, float] = field(default_factory=dict)
    rises: dict[str, float] = field(default_factory=dict)
    # Of a round: the candidates of each matrix, their places among the gates, and their weights.
    candidates: dict[str, Int[Tensor, " _"]] = field(default_factory=dict)
    places: dict[str, slice] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    gate: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(site.parameter.shape) for name, site in self.sites.items()}

    @property
    def n_weights(self) -> int:
        return sum(site.parameter.numel() for site in self.sites.values())

    def round(self, n: int, steps: int, mask: WeightMask | None) -> WeightMask:
        """Score under a mask, choose candidates, and learn a mask of so many weights."""
        self._score(mask)
        unit = self._choose_candidates(n, mask)
        momentum = torch.zeros_like(self.gate)
        for step in range(steps):
            is_hard = step >= steps / 2
            gate = self._largest(n) if is_hard else self.gate
            momentum = DECAY * momentum + (1 - DECAY) * self._gradient(gate)
            stride = (momentum / unit).clamp(-MOST_OF_A_STEP, MOST_OF_A_STEP)
            self.gate = projected(self.gate + RATE * stride, n)
            self._weigh()
        return self._mask(self._largest(n))

    def allowed(self, n: int) -> WeightMask:
        """The mask of the n largest gates, or of half as many until all budgets are kept."""
        while n:
            mask = self._mask(self._largest(n))
            if self.protection.allows(self.protection.rises(self.bridge, mask)):
                return mask
            n //= 2
        return self._mask(torch.zeros_like(self.gate))

    # A round

    def _score(self, mask: WeightMask | None) -> None:
        for name, kind, sign in self._scored():
            objective = self.target.objective if name == "target" else completion_loss
            with masked_if_given(self.bridge, mask):
                batches = self.batches[name]
                gradients = mean_gradients(self.bridge, batches, objective, self.sites, kind)
            for site, gradient in gradients.items():
                change = gradient.mul_(self.sites[site].parameter.detach())
                if kind == "per token":
                    change.abs_()
                total = self.benefit.setdefault(site, torch.zeros_like(change))
                total.add_(change, alpha=sign)

    def _scored(self) -> Iterator[tuple[str, Any, float]]:
        """What is scored, how, and the sign and weight of its part of the benefit."""
        yield "target", "signed", -self.weight
        signs = {"preferred": 1.0, "avoided": -1.0}
        for name in self.beside:
            yield name, "signed", signs[name]
        for name in self.protected:
            yield name, "per token", -FACTOR

    def _choose_candidates(self, n: int, mask: WeightMask | None) -> float:
        """Take new candidates and the gates that are open already; a usual benefit among them."""
        n_candidates = min(self.n_weights, CANDIDATES * n)
        chosen = positive(self.benefit, largest(self.benefit, n_candidates, {}))
        open_before: dict[str, Tensor] = dict(mask.removed) if mask is not None else {}
        values, gates = [], []
        self.candidates, self.places, self.weights = {}, {}, {}
        start = 0
        for name, site in self.sites.items():
            parts = [of_name[name] for of_name in (chosen, open_before) if name in of_name]
            if not parts:
                continue
            index = torch.cat(parts).unique()
            self.candidates[name] = index
            self.places[name] = slice(start, start + len(index))
            self.weights[name] = site.parameter.detach().flatten()[index].float().cpu()
            start += len(index)
            values.append(self.benefit[name].flatten()[index])
            is_open = torch.isin(index, open_before[name]) if name in open_before else index < 0
            gates.append(is_open.float())
        value = torch.cat(values)
        unit = float(value.topk(min(n, len(value))).values[-1].clamp(min=1e-12))
        # Those that are promising begin half open, as far as there is room.
        self.gate = projected(torch.cat(gates) + (value / unit).clamp(0, 1) / 2, n)
        return unit

    # A step

    def _gradient(self, gate: Tensor) -> Tensor:
        """Minus the gradient of the loss by the gates: what opening each of them gains."""
        gradient = torch.zeros_like(gate)
        scale = {name: 1 - gate[place] for name, place in self.places.items()}

        def receive(site: Site, x: Input, g: OutputGradient) -> None:
            first, second = (g, x) if site.input_axis == 1 else (x, g)
            product = first.flatten(0, 1).float().T @ second.flatten(0, 1).float()
            of_candidates = product.flatten()[self.candidates[site.name]].cpu()
            gradient[self.places[site.name]] += self.weights[site.name] * of_candidates

        sites = {name: self.sites[name] for name in self.candidates}
        candidates = WeightMask(self.candidates, self.shapes, self.source)
        gated = masked(self.bridge, candidates, scale=scale)
        with gated, torch.enable_grad(), hook_pairs(self.bridge, sites, receive):
            self._backward()
        return gradient

    def _backward(self) -> None:
        for name, texts in self.protected.items():
            now, before = texts.losses(self.bridge, TEXTS // 2)
            rise = (now - before).mean()
            (self.multipliers[name] * rise).backward()
            self.rises[name] = MEMORY * self.rises[name] + (1 - MEMORY) * rise.item()
        now, before = self.target.losses(self.bridge, TEXTS)
        (-self.weight * (now - before).clamp(max=CAP).mean()).backward()
        if "preferred" in self.beside:
            now, _ = self.beside["preferred"].losses(self.bridge, TEXTS)
            now.clamp(min=ENOUGH).mean().backward()
        if "avoided" in self.beside:
            now, before = self.beside["avoided"].losses(self.bridge, TEXTS)
            (before - now).clamp(min=-MOST_AVOIDED).mean().backward()

    def _weigh(self) -> None:
        """Multipliers follow how near each behaviour is to its budget."""
        for name, rise in self.rises.items():
            is_near = rise > NEAR * self.protection.budgets[name]
            grown = self.multipliers[name] * (GROWTH if is_near else 1 / GROWTH)
            self.multipliers[name] = min(MOST_MULTIPLIER, max(LEAST_MULTIPLIER, grown))

    def _largest(self, n: int) -> Tensor:
        """One for the n largest gates that are open at all, else zero."""
        values, places = self.gate.topk(min(n, len(self.gate)))
        hard = torch.zeros_like(self.gate)
        hard[places[values > 0]] = 1.0
        return hard

    def _mask(self, hard: Tensor) -> WeightMask:
        removed = {}
        for name, index in self.candidates.items():
            removed[name] = index[hard[self.places[name]] > 0]
        return WeightMask(removed, self.shapes, self.source)


def projected(gate: Tensor, n: int) -> Tensor:
    """The nearest gates with 0 <= gate <= 1 and a sum of at most n."""
    kept = gate.clamp(0, 1)
    if kept.sum() <= n:
        return kept
    low, high = float(gate.min()) - 1, float(gate.max())
    for _ in range(50):
        middle = (low + high) / 2
        if (gate - middle).clamp(0, 1).sum() > n:
            low = middle
        else:
            high = middle
    return (gate - high).clamp(0, 1)


def learned_masks(
    bridge: Bridge,
    target: Sequence[Batch],
    protect: Mapping[str, Sequence[Batch]],
    sizes: Sequence[float],
    *,
    prefer: Mapping[str, Sequence[Batch]],
    budget: float = 0.05,
    objective: Objective = completion_loss,
    weight: float = 1.0,
    steps: int = STEPS,
    seed: int = 0,
) -> list[WeightMask]:
    """A mask of every size, from the smallest on."""
    generator = torch.Generator().manual_seed(seed)
    protection = Protection.of(bridge, protect, budget)
    batches = {"target": target, **prefer, **protection.priced}
    texts = {}
    for name, of_name in batches.items():
        by = objective if name == "target" else completion_loss
        texts[name] = Texts.of(bridge, of_name, by, generator)
    sites = weight_sites(bridge)
    search = Gates(
        bridge,
        sites,
        texts["target"],
        {name: texts[name] for name in prefer},
        {name: texts[name] for name in protection.priced},
        protection,
        batches,
        sources_on(bridge)("gates", {"seed": seed, "steps": steps}),
        weight,
        multipliers=dict.fromkeys(protection.priced, FIRST_MULTIPLIER),
        rises=dict.fromkeys(protection.priced, 0.0),
    )
    masks, mask = {}, None
    for size in sorted(sizes):
        n = round(size * search.n_weights)
        first = (1.0, 1.0) if prefer else REACH
        for share in (1.0,) if masks else first:
            mask = search.round(round(share * n), steps, mask)
        masks[size] = search.allowed(n)
    return [masks[size] for size in sizes]
