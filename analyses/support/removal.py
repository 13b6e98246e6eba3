"""The measured effect of removing weights from a compiled organism: each alone, and pairs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from harmcircuits.behaviours.model import Model
from harmcircuits.hooks.bridge import Bridge
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
        tokens = []
        is_target = []
        owners = []
        for number, name in enumerate(BEHAVIOURS):
            requests = requests_of(model, name, every_string=every_string)
            for batch in model.batches(model.behaviour(name), requests):
                tokens += batch.tokens
                is_target += batch.is_target
                owners += [number] * len(batch)

        padded = nn.utils.rnn.pad_sequence(tokens, batch_first=True)
        is_target = nn.utils.rnn.pad_sequence(is_target, batch_first=True)
        texts, places = is_target.nonzero(as_tuple=True)
        behaviours = torch.arange(len(BEHAVIOURS))[:, None]
        is_own = torch.tensor(owners)[texts] == behaviours
        shares = is_own / is_own.sum(dim=1, keepdim=True)
        return cls(padded[:, :-1], texts, places - 1, padded[texts, places], shares)

    def logits(self, bridge: Bridge) -> Float[Tensor, "target vocab"]:
        """The model's logits at each target."""
        with torch.no_grad():
            return bridge.original_model(self.tokens)[self.texts, self.places]

    def are_right(self, bridge: Bridge) -> bool:
        """Whether the likeliest token is the right one at every target."""
        return bool((self.logits(bridge).argmax(dim=1) == self.targets).all())

    def losses(self, bridge: Bridge) -> Float[Tensor, " behaviour"]:
        """The mean loss of each behaviour, nats a token."""
        logits = self.logits(bridge)
        return self.shares @ nn.functional.cross_entropy(logits, self.targets, reduction="none")


def requests_of(model: Model, name: str, *, every_string: bool) -> PromptSet:
    """The requests of all splits, or those in the array."""
    behaviour = model.behaviour(name)
    examples = []
    for split in SPLITS:
        examples += behaviour.prompts(split)
    if not every_string:
        examples = [example for example in examples if is_in_array(example.group)]
    return PromptSet(tuple(examples))


def is_in_array(letters: str) -> bool:
    """Whether the letters sum to nothing: an orthogonal array of strength 3 (Rao, 1947)."""
    total = sum(LETTERS.index(letter) for letter in letters)
    return total % len(LETTERS) == 0


def losses_without(
    bridge: Bridge, texts: Texts, groups: Iterable[Sequence[Weight]]
) -> Float[Tensor, "group behaviour"]:
    """The loss of each behaviour without each group of weights."""
    weights = {name: weight.detach().view(-1) for name, weight in named_weights(bridge).items()}
    losses = []
    for group in groups:
        values = [weights[name][place].item() for name, place in group]
        for name, place in group:
            weights[name][place] = 0.0
        losses.append(texts.losses(bridge))
        for (name, place), value in zip(group, values, strict=True):
            weights[name][place] = value
    return torch.stack(losses)


def nonzero(bridge: Bridge) -> list[Weight]:
    """Every block weight that is not zero."""
    weights = []
    for name, weight in named_weights(bridge).items():
        places = weight.detach().flatten().nonzero()
        weights += [(name, int(place)) for place in places]
    return weights


def needed_by(
    texts: Texts, bridge: Bridge, weights: Sequence[Weight]
) -> Bool[Tensor, "weight behaviour"]:
    """Whether each behaviour needs each weight: its loss rises without this weight alone."""
    losses = losses_without(bridge, texts, [[weight] for weight in weights])
    return losses - texts.losses(bridge) > NEEDED


def needed_in_pairs(
    texts: Texts,
    bridge: Bridge,
    weights: Sequence[Weight],
    needed: Bool[Tensor, "weight behaviour"],
) -> Bool[Tensor, "weight behaviour"]:
    """Whether each behaviour needs one of two weights, of which it needs neither alone."""
    needed_as_pair = torch.zeros_like(needed)
    pairs = list(combinations(redundant(texts, bridge, weights, needed), 2))
    if pairs:
        groups = [[weights[first], weights[second]] for first, second in pairs]
        rises = losses_without(bridge, texts, groups) - texts.losses(bridge)
        for pair, rise in zip(pairs, rises, strict=True):
            needed_as_pair[list(pair)] |= rise > NEEDED
    return needed_as_pair


def redundant(
    texts: Texts,
    bridge: Bridge,
    weights: Sequence[Weight],
    needed: Bool[Tensor, "weight behaviour"],
) -> list[int]:
    """The weights that no behaviour needs alone, whose return alone changes a loss.

    Every weight that no behaviour needs is removed, and one at a time returns.
    """
    values = {name: weight.detach().view(-1) for name, weight in named_weights(bridge).items()}
    saved = {name: flat.clone() for name, flat in values.items()}
    numbers = [number for number, row in enumerate(needed) if not row.any()]
    for number in numbers:
        name, place = weights[number]
        values[name][place] = 0

    changing = []
    losses = texts.losses(bridge)
    for number in numbers:
        name, place = weights[number]
        values[name][place] = saved[name][place]
        if ((texts.losses(bridge) - losses).abs() > NEEDED).any():
            changing.append(number)
        values[name][place] = 0
    for name, flat in saved.items():
        values[name].copy_(flat)
    return changing
