"""What a model can read, and numbers that are NaN or infinite: which example, which loss.

Where in the model such a number begins, `torch.autograd.detect_anomaly` says.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from harmcircuits.batches import Batch, padding_id, refuse_no_batches
from harmcircuits.circuits.scores import not_finite
from harmcircuits.hooks.bridge import Bridge
from harmcircuits.hooks.objectives import Objective

# What configurations call the context. Those without any of these, such as BLOOM, set no bound.
CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len")
NOT_FINITE = (
    "look for NaN in the weights; float16 ends at 65,504, so open the model in bfloat16 or float32"
)


class NotFiniteError(ValueError):
    """A number that is NaN or infinite, and the number of its example where that is known."""

    def __init__(self, text: str, index: int | None = None) -> None:
        super().__init__(text)
        self.index = index


def context_of(bridge: Bridge) -> int | None:
    """How many tokens the model was made for; None where its configuration sets no bound."""
    config = getattr(getattr(bridge, "original_model", None), "config", None)
    lengths = [getattr(config, name, None) for name in CONTEXT_NAMES]
    return max((length for length in lengths if isinstance(length, int)), default=None)


def refuse_batches(function: str, bridge: Bridge, batches: Any) -> None:
    """Check that there are token batches, and that the model can read them."""
    refuse_no_batches(function, batches)
    limits = _limits(bridge)
    lengths = torch.cat([batch.is_token.sum(dim=1) for batch in batches]).tolist()
    largest = torch.cat([batch.tokens.amax(dim=1) for batch in batches]).tolist()
    for index, place in enumerate(_places(batches)):
        fault = _fault(lengths[index], largest[index], *limits)
        if fault:
            raise ValueError(f"{function}: {place} has {fault}")


def refuse_requests(
    place: str,
    bridge: Bridge,
    requests: Sequence[Sequence[int]],
    max_new_tokens: int,
) -> None:
    """Check that the model can read these requests, and has room for an answer."""
    limits = _limits(bridge)
    for number, request in enumerate(requests):
        fault = _fault(len(request) + max_new_tokens, max(request), *limits)
        if fault:
            answer = f" (max_new_tokens={max_new_tokens} among them)" if max_new_tokens else ""
            raise ValueError(f"{place} {number} has {fault}{answer}")
    fault = _fault(0, padding_id(bridge.tokenizer), *limits)
    if fault:
        raise ValueError(f"the tokenizer pads with {fault}")


def _limits(bridge: Bridge) -> tuple[int | None, int | None]:
    """How many tokens a text may have, and how many there are to choose from."""
    model: Any = getattr(bridge, "original_model", None)
    if not hasattr(model, "get_input_embeddings"):
        return context_of(bridge), None
    return context_of(bridge), model.get_input_embeddings().weight.shape[0]


def _fault(n_tokens: int, largest: int, context: int | None, vocabulary: int | None) -> str:
    """Why a model cannot read a text, with the remedy; nothing where it can."""
    if context is not None and n_tokens > context:
        return f"{n_tokens} tokens, the model's context is {context}; shorten it, or leave it out"
    if vocabulary is not None and largest >= vocabulary:
        return (
            f"token {largest}, the model's embedding has {vocabulary}; give the tokenizer that "
            "belongs to the model, or resize the embedding (resize_token_embeddings)"
        )
    return ""


def refuse_not_finite(
    batches: Sequence[Batch],
    losses: Float[Tensor, " n"],
    objective: Objective,
) -> None:
    """Check the losses of examples."""
    if losses.isfinite().all():
        return
    index = int((~losses.isfinite()).int().argmax())
    value = f"{_name(objective)} is {losses[index].item()}"
    raise NotFiniteError(f"{_places(batches)[index]}: {value}; {NOT_FINITE}", index)


def refuse_not_finite_gradients(gradients: Mapping[str, Tensor], objective: Objective) -> None:
    """Check what was summed over examples whose losses are finite."""
    name = not_finite(gradients)
    if name:
        raise NotFiniteError(
            f"the gradient of {_name(objective)} at {name} is not finite, its values are; "
            f"{NOT_FINITE}, or make it smaller"
        )


def refuse_not_finite_texts(names: Sequence[str], is_finite: Bool[Tensor, " n"]) -> None:
    """Check what was computed of each text."""
    if not is_finite.all():
        index = int((~is_finite).int().argmax())
        raise NotFiniteError(
            f"{names[index]}: what the model computes is not finite; {NOT_FINITE}", index
        )


@contextmanager
def of_data(name: str) -> Iterator[None]:
    """While open, an error about an example says whose it is."""
    try:
        yield
    except NotFiniteError as error:
        raise NotFiniteError(f"{name}: {error}", error.index) from None


def _places(batches: Sequence[Batch]) -> list[str]:
    """What to call each example."""
    places = []
    for number, batch in enumerate(batches):
        for row in range(len(batch)):
            places.append(f"example {len(places)} (row {row} of batch {number})")
    return places


def _name(objective: Objective) -> str:
    return getattr(objective, "__name__", type(objective).__name__)
