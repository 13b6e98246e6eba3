"""The measured effect of removing weights: one alone, a pair, or a set."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
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

    def losses(self, bridge: Bridge) -> Float[Tensor, " behaviour"]:
        """The mean loss of each behaviour, nats a token."""
        with torch.no_grad():
            logits = bridge.original_model(self.tokens)[self.texts, self.places]
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


def needed_by(texts: Texts, bridge: Bridge, weights: Sequence[Weight]) -> torch.Tensor:
    """Whether each behaviour needs each weight: [weight, behaviour]."""
    rises = losses_without(bridge, texts, [[weight] for weight in weights]) - texts.losses(bridge)
    return rises > NEEDED
