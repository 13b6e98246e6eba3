"""Requests of the organisms' world in pairs that differ in one thing, as tokens that align."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from support.contrasts import Contrast
from torch import Tensor

from harmcircuits.batches import Batch, tokenize
from harmcircuits.behaviours.model import Model
from harmcircuits.organisms.world import (
    ANSWER_LENGTH,
    PERMISSIONS,
    VERBS,
    kind_of,
    parsed,
    requests,
    world,
)
from harmcircuits.prompts import Example, PromptSet


def contrasts(model: Model, n: int) -> dict[str, Contrast]:
    """Pairs that differ in one thing, one for each of up to `n` held-out items."""
    ids = model.bridge.tokenizer.convert_tokens_to_ids
    # Of the two requests of an item in this form the first, of its four questions the first pair.
    harmful, benign = (_asked(name, "steps")[::2][:n] for name in ("harmful", "benign"))
    questions = _asked("recognition", "judge")
    no, yes = questions[::4][:n], questions[1::4][:n]

    items = [parsed(example.prompt)[1] for example in harmful]
    operators = {}
    for kind in ("harmful", "benign"):
        favoured = [[ids(list(world().favoured[item.topic, kind]))] * 3 for item in items]
        operators[kind] = torch.tensor(favoured)
    parts = torch.tensor([[[part] for part in ids(list(item.parts))] for item in items])
    answers = {
        kind: torch.tensor([[ids(list(words))]] * len(no)) for kind, words in PERMISSIONS.items()
    }

    # The prefill predicts the first operator, that the first part, and so on.
    bad, good = _tokens(model, harmful), _tokens(model, benign)
    first = bad.shape[1] - ANSWER_LENGTH
    at_operators = (first, first + 2, first + 4)
    at_parts = (first + 1, first + 3, first + 5)
    asked_no, asked_yes = (_tokens(model, asked)[:, :-1] for asked in (no, yes))
    last = asked_no.shape[1] - 1
    return {
        "harmful": Contrast(bad, good, at_operators, operators["harmful"], operators["benign"]),
        "benign": Contrast(good, bad, at_operators, operators["benign"], operators["harmful"]),
        "recognition": Contrast(
            asked_no, asked_yes, (last,), answers["harmful"], answers["benign"]
        ),
        "parts": Contrast(good, good.roll(1, 0), at_parts, parts, parts.roll(1, 0)),
    }


@dataclass(frozen=True)
class ProbedTexts:
    """Texts at whose answer a probe is to tell verbs of a harmful kind."""

    batches: Sequence[Batch]
    is_harmful: Bool[Tensor, " n"]
    unseen: Mapping[str, Sequence[Hashable]]


def probed_texts(model: Model, n: int) -> dict[str, ProbedTexts]:
    """Held-out texts about each item with harmful and with benign verbs, in two forms."""
    harmful, benign = (requests(name, "heldout")[:n] for name in ("harmful", "benign"))
    forms = {
        "question": ("recognition", requests("recognition", "heldout")[: 2 * n]),
        "request": ("harmful", PromptSet((*harmful, *benign))),
    }
    texts = {}
    for name, (behaviour, prompts) in forms.items():
        verbs = [parsed(example.prompt)[2] for example in prompts]
        kinds = [kind_of(verb) for verb in verbs]
        numbers = [VERBS[kind].index(verb) for kind, verb in zip(kinds, verbs, strict=True)]
        texts[name] = ProbedTexts(
            model.batches(model.behaviours[behaviour], prompts),
            torch.tensor([kind == "harmful" for kind in kinds]),
            {"items": [example.group for example in prompts], "verbs": numbers},
        )
    return texts


def _asked(behaviour: str, form: str) -> list[Example]:
    """The held-out requests in the surface form that begins with this word."""
    prompts = requests(behaviour, "heldout")
    return list(prompts.where(lambda example: example.prompt.startswith(form)))


def _tokens(model: Model, examples: Sequence[Example]) -> Tensor:
    options = {"batch_size": len(examples), "template": model.template}
    (batch,) = tokenize(PromptSet(tuple(examples)), model.bridge.tokenizer, **options)
    return batch.tokens
