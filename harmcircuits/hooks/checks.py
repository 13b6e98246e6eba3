"""Checks before and after a pass, whose errors name the example and the loss.

Before: whether the model can read a text. After: whether a number is NaN or infinite.
`torch.autograd.detect_anomaly` tells where in the model such a number begins.
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

# Names of the context length in configurations. A model without any of them, such as BLOOM, has no
# limit.
CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len")
NOT_FINITE = (
    "look for NaN in the weights; float16 ends at 65,504, so open the model in bfloat16 or float32"
)


class NotFiniteError(ValueError):
    """A number is NaN or infinite. `index` is the number of its example, if there is one."""

    def __init__(self, text: str, index: int | None = None) -> None:
        super().__init__(text)
        self.index = index


def context_of(bridge: Bridge) -> int | None:
    """The most tokens that a text may have; None where the configuration sets no limit."""
    config = getattr(bridge.original_model, "config", None)
    lengths = [getattr(config, name, None) for name in CONTEXT_NAMES]
    return max((length for length in lengths if isinstance(length, int)), default=None)


def refuse_batches(function: str, bridge: Bridge, batches: Any) -> None:
    """Check that there are token batches, and that the model can read them."""
    refuse_no_batches(function, batches)
    lengths = torch.cat([batch.is_token.sum(dim=1) for batch in batches]).tolist()
    largest = torch.cat([batch.tokens.amax(dim=1) for batch in batches]).tolist()
    for index, place in enumerate(_places(batches)):
        fault = _fault(bridge, lengths[index], largest[index])
        if fault:
            raise ValueError(f"{function}: {place} has {fault}")


def refuse_requests(
    place: str,
    bridge: Bridge,
    requests: Sequence[Sequence[int]],
    max_new_tokens: int = 0,
) -> None:
    """Check that the model can read these requests, and has room for an answer."""
    for number, request in enumerate(requests):
        fault = _fault(bridge, len(request) + max_new_tokens, max(request))
        if fault:
            answer = f" (max_new_tokens={max_new_tokens} among them)" if max_new_tokens else ""
            raise ValueError(f"{place} {number} has {fault}{answer}")

    fault = _fault(bridge, 0, padding_id(bridge.tokenizer))
    if fault:
        raise ValueError(f"the tokenizer pads with {fault}")


def _fault(bridge: Bridge, n_tokens: int, largest: int) -> str:
    """Why the model cannot read a text, with the remedy; empty where it can."""
    context = context_of(bridge)
    if context is not None and n_tokens > context:
        return f"{n_tokens} tokens, the model's context is {context}; shorten it, or leave it out"
    if not hasattr(bridge.original_model, "get_input_embeddings"):  # a compiled organism
        return ""
    vocabulary = bridge.original_model.get_input_embeddings().weight.shape[0]
    if largest >= vocabulary:
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
    is_finite = losses.isfinite()
    if is_finite.all():
        return
    index = int(is_finite.int().argmin())  # the first one
    value = f"{_name(objective)} is {losses[index].item()}"
    raise NotFiniteError(f"{_places(batches)[index]}: {value}; {NOT_FINITE}", index)


def refuse_not_finite_gradients(gradients: Mapping[str, Tensor], objective: Objective) -> None:
    """Check sums of gradients over examples whose losses are finite."""
    name = not_finite(gradients)
    if name:
        raise NotFiniteError(
            f"the gradient of {_name(objective)} at {name} is not finite, but its values are; "
            f"{NOT_FINITE}, or scale the objective down"
        )


def refuse_not_finite_texts(names: Sequence[str], is_finite: Bool[Tensor, " n"]) -> None:
    """Check the results of texts, one for each."""
    if not is_finite.all():
        index = int(is_finite.int().argmin())  # the first one
        raise NotFiniteError(
            f"{names[index]}: the model's output is not finite; {NOT_FINITE}", index
        )


@contextmanager
def naming_data(name: str) -> Iterator[None]:
    """While open, an error about an example begins with the name of the data."""
    try:
        yield
    except NotFiniteError as error:
        raise NotFiniteError(f"{name}: {error}", error.index) from None


def _places(batches: Sequence[Batch]) -> list[str]:
    """The name of each example in an error."""
    places = []
    for number, batch in enumerate(batches):
        for row in range(len(batch)):
            places.append(f"example {len(places)} (row {row} of batch {number})")
    return places


def _name(objective: Objective) -> str:
    return getattr(objective, "__name__", type(objective).__name__)
