"""The measured effect of removing weights: one alone, a pair, or a set."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from harmcircuits.batches import Batch
from harmcircuits.behaviours.behaviour import TARGET
from harmcircuits.behaviours.model import Model
from harmcircuits.behaviours.outcomes import Calibration
from harmcircuits.hooks.bridge import Bridge
from harmcircuits.hooks.objectives import completion_loss
from harmcircuits.hooks.weights import named_weights
from harmcircuits.organisms.compiled import BEHAVIOURS, LETTERS
from harmcircuits.prompts import SPLITS, PromptSet

NEEDED = 0.02  # nats a token that a behaviour's loss rises by without a weight that it needs
Weight = tuple[str, int]  # the name of its matrix, and its flat position there


@dataclass(frozen=True)
class Texts:
    """All requests of the three behaviours with their right answers, read in one pass."""

    tokens: Int[Tensor, "text pos"]
    texts: Int[Tensor, " target"]
    places: Int[Tensor, " target"]  # from which a target is predicted
    targets: Int[Tensor, " target"]
    shares: Float[Tensor, "behaviour target"]  # of a target in the mean loss of its behaviour

    @classmethod
    def of(cls, model: Model, *, every_string: bool = False) -> "Texts":
        """All requests, or those of the 27 strings in which every three letters go together."""
        tokens, is_target, owners = [], [], []
        for number, name in enumerate(BEHAVIOURS):
            behaviour = model.behaviour(name)
            examples = [example for split in SPLITS for example in behaviour.prompts(split)]
            if not every_string:
                examples = [example for example in examples if is_in_array(example.group)]
            for batch in model.batches(behaviour, PromptSet(tuple(examples))):
                tokens += batch.tokens
                is_target += batch.is_target
                owners += [number] * len(batch)
        together = nn.utils.rnn.pad_sequence(tokens, batch_first=True)
        texts, places = nn.utils.rnn.pad_sequence(is_target, batch_first=True).nonzero(
            as_tuple=True
        )
        is_of = torch.tensor(owners)[texts] == torch.arange(len(BEHAVIOURS))[:, None]
        shares = is_of / is_of.sum(dim=1, keepdim=True)
        return cls(together[:, :-1], texts, places - 1, together[texts, places], shares)

    def logits(self, bridge: Bridge) -> Float[Tensor, "target vocab"]:
        """What the model says at each target."""
        with torch.no_grad():
            return bridge.original_model(self.tokens)[self.texts, self.places]

    def are_right(self, bridge: Bridge) -> bool:
        """Whether the likeliest token is the right one at every target."""
        return bool((self.logits(bridge).argmax(dim=1) == self.targets).all())

    def losses(self, bridge: Bridge) -> Float[Tensor, " behaviour"]:
        """The mean loss of each behaviour, nats a token."""
        logits = self.logits(bridge)
        return self.shares @ nn.functional.cross_entropy(logits, self.targets, reduction="none")


def is_in_array(letters: str) -> bool:
    """Whether the letters sum to nothing: an orthogonal array of strength 3 (Rao, 1947)."""
    return sum(LETTERS.index(letter) for letter in letters) % len(LETTERS) == 0


def losses_without(
    bridge: Bridge, texts: Texts, groups: Iterable[Sequence[Weight]]
) -> Float[Tensor, "group behaviour"]:
    """The loss of each behaviour without each group of weights."""
    weights = {name: weight.detach().view(-1) for name, weight in named_weights(bridge).items()}
    losses = []
    for group in groups:
        values = [weights[name][position].item() for name, position in group]
        for name, position in group:
            weights[name][position] = 0.0
        losses.append(texts.losses(bridge))
        for (name, position), value in zip(group, values, strict=True):
            weights[name][position] = value
    return torch.stack(losses)


def nonzero(bridge: Bridge) -> list[Weight]:
    """Every block weight that is not zero."""
    found = []
    for name, weight in named_weights(bridge).items():
        found += [(name, int(position)) for position in weight.detach().flatten().nonzero()]
    return found


def needed_by(
    texts: Texts, bridge: Bridge, weights: Sequence[Weight]
) -> Bool[Tensor, "weight behaviour"]:
    """Whether each behaviour needs each weight: its loss rises without it alone."""
    rises = losses_without(bridge, texts, [[weight] for weight in weights]) - texts.losses(bridge)
    return rises > NEEDED


def needed_in_pairs(
    texts: Texts,
    bridge: Bridge,
    weights: Sequence[Weight],
    needed: Bool[Tensor, "weight behaviour"],
) -> Bool[Tensor, "weight behaviour"]:
    """Whether each behaviour needs one of two weights, of which it needs neither alone.

    Looked for among those whose return changes a loss where all that nobody needs is removed.
    """
    spare = [number for number, row in enumerate(needed) if not row.any()]
    values = named_weights(bridge)
    before = {name: weight.detach().clone() for name, weight in values.items()}
    with torch.no_grad():
        for number in spare:
            name, place = weights[number]
            values[name].view(-1)[place] = 0
        without, redundant = texts.losses(bridge), []
        for number in spare:
            name, place = weights[number]
            values[name].view(-1)[place] = before[name].view(-1)[place]
            if ((texts.losses(bridge) - without).abs() > NEEDED).any():
                redundant.append(number)
            values[name].view(-1)[place] = 0
        for name, weight in before.items():
            values[name].copy_(weight)

    found = torch.zeros_like(needed)
    pairs = list(combinations(redundant, 2))
    if pairs:
        groups = [[weights[first], weights[second]] for first, second in pairs]
        rises = losses_without(bridge, texts, groups) - texts.losses(bridge)
        for pair, rise in zip(pairs, rises, strict=True):
            found[list(pair)] |= rise > NEEDED
    return found


def mean_losses(
    data: Mapping[str, Calibration], n_texts: int = 24
) -> Callable[[Bridge], Float[Tensor, " behaviour"]]:
    """The mean loss of each behaviour on its first answers, nats a token; harm's is the first."""
    batches = {}
    for name in sorted(data, key=lambda name: name != TARGET):
        first = data[name].batches[0]
        batches[name] = Batch(first.tokens[:n_texts], first.is_target[:n_texts])

    def losses(bridge: Bridge) -> Float[Tensor, " behaviour"]:
        with torch.no_grad():
            return torch.stack(
                [completion_loss(bridge, batch).mean() for batch in batches.values()]
            )

    return losses


@dataclass(frozen=True)
class LastPass:
    """What a last pass leaves removed, after removals and after returns; and what it cost."""

    grown: list[Weight]
    removed: list[Weight]
    n_passes: int


def last_pass(
    bridge: Bridge,
    losses: Callable[[Bridge], Float[Tensor, " behaviour"]],
    mask: Sequence[Weight],
    candidates: Sequence[Weight],
) -> LastPass:
    """Removes and returns single weights by what that does to the losses; the target's is the first.

    A candidate is removed where the target's loss rises by more than NEEDED; then a weight is returned
    where that costs the target's loss no more than NEEDED in all. Neither where another loss would be
    more than NEEDED above where it was before anything was removed, and higher than before the step.
    """
    weights = {name: weight.detach().view(-1) for name, weight in named_weights(bridge).items()}
    values = {(name, place): weights[name][place].item() for name, place in [*mask, *candidates]}

    def put(weight: Weight, value: float) -> Float[Tensor, " behaviour"]:
        weights[weight[0]][weight[1]] = value
        return losses(bridge)

    unpruned = losses(bridge)

    def is_spared(after: Float[Tensor, " b"], before: Float[Tensor, " b"]) -> bool:
        return bool((after <= torch.maximum(unpruned + NEEDED, before + 1e-6))[1:].all())

    removed = list(mask)
    for weight in removed:
        weights[weight[0]][weight[1]] = 0
    now, n_passes = losses(bridge), 2
    tried = [weight for weight in candidates if weight not in set(mask)]
    for weight in tried:
        after = put(weight, 0)
        if after[0] > now[0] + NEEDED and is_spared(after, now):
            now = after
            removed.append(weight)
        else:
            weights[weight[0]][weight[1]] = values[weight]

    grown, least = list(removed), now[0] - NEEDED
    for weight in grown:
        after = put(weight, values[weight])
        if after[0] >= least and is_spared(after, now):
            now = after
            removed.remove(weight)
        else:
            weights[weight[0]][weight[1]] = 0
    for weight in grown:
        weights[weight[0]][weight[1]] = values[weight]
    return LastPass(grown, removed, n_passes + len(tried) + len(grown))
