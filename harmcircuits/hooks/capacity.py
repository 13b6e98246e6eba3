"""What a model can read: texts no longer than its context, of tokens that its embedding has."""

from collections.abc import Sequence
from typing import Any

from harmcircuits.display import plural
from harmcircuits.hooks.bridge import Bridge
from harmcircuits.prompts import Batch, padding_id, refuse_no_batches

# What configurations call the context. Those without any of these, such as BLOOM, set no bound.
CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len")


def context_of(bridge: Bridge) -> int | None:
    """How many tokens the model was made for; None where its configuration sets no bound."""
    config = getattr(getattr(bridge, "original_model", None), "config", None)
    lengths = [getattr(config, name, None) for name in CONTEXT_NAMES]
    return max((length for length in lengths if isinstance(length, int)), default=None)


def vocabulary_of(bridge: Bridge) -> int | None:
    """How many tokens the model's embedding has; None where there is no embedding to look at."""
    model: Any = getattr(bridge, "original_model", None)
    if not hasattr(model, "get_input_embeddings"):
        return None
    return model.get_input_embeddings().weight.shape[0]


def refuse_batches(function: str, bridge: Bridge, batches: Any) -> None:
    """Check that there are token batches, and that the model can read them."""
    refuse_no_batches(function, batches)
    n_before = 0
    for number, batch in enumerate(batches):
        row, fault = _fault(bridge, batch)
        if fault:
            index = n_before + row
            raise ValueError(f"{function}: example {index} (row {row} of batch {number}) {fault}")
        n_before += len(batch)


def _fault(bridge: Bridge, batch: Batch) -> tuple[int, str]:
    """The row that the model cannot read, and why with the remedy; or 0 and nothing."""
    context, vocabulary = context_of(bridge), vocabulary_of(bridge)
    width = batch.tokens.shape[1]
    if context is not None and width > context:
        lengths = batch.is_token.sum(dim=1)
        row, length = int(lengths.argmax()), int(lengths.max())
        if length <= context:
            return row, f"is padded to {width} tokens, {_too_long(context)}; pad it less"
        return row, f"has {length} tokens, {_too_long(context)}; shorten it, or leave it out"
    if vocabulary is None or batch.tokens.is_meta:
        return 0, ""
    is_unknown = (batch.tokens >= vocabulary) | (batch.tokens < 0)
    if not is_unknown.any():
        return 0, ""
    row = int(is_unknown.any(dim=1).int().argmax())
    token = int(batch.tokens[row][is_unknown[row]][0])
    return row, f"has {_unknown_token(bridge, token, vocabulary)}"


def refuse_requests(
    place: str,
    bridge: Bridge,
    requests: Sequence[Sequence[int]],
    max_new_tokens: int,
) -> None:
    """Check that the model can read these requests, and has room for an answer."""
    context, vocabulary = context_of(bridge), vocabulary_of(bridge)
    for number, request in enumerate(requests):
        fault = _request_fault(bridge, request, max_new_tokens, context, vocabulary)
        if fault:
            raise ValueError(f"{place} {number} has {fault}")
    padding = padding_id(bridge.tokenizer)
    if vocabulary is not None and padding >= vocabulary:
        raise ValueError(f"the tokenizer pads with {_unknown_token(bridge, padding, vocabulary)}")


def _request_fault(
    bridge: Bridge,
    request: Sequence[int],
    max_new_tokens: int,
    context: int | None,
    vocabulary: int | None,
) -> str:
    """Why the model cannot read a request or has no room for its answer; nothing where it can."""
    length = plural(len(request), "token")
    if not request:
        return "no tokens, so there is nothing to answer; leave it out"
    if context is not None and len(request) > context:
        return f"{length}, {_too_long(context)}; shorten it, or leave it out"
    if context is not None and len(request) + max_new_tokens > context:
        return (
            f"{length} and its answer up to max_new_tokens={max_new_tokens}, {_too_long(context)}; "
            "shorten the request, leave it out, or give a smaller max_new_tokens="
        )
    if vocabulary is not None and max(request) >= vocabulary:
        return _unknown_token(bridge, max(request), vocabulary)
    return ""


def _too_long(context: int) -> str:
    return f"the model's context is {context:,}"


def _unknown_token(bridge: Bridge, token: int, vocabulary: int) -> str:
    """A token that the embedding lacks, the two sizes, and the remedy."""
    tokenizer = getattr(bridge, "tokenizer", None)
    sizes = f"the model's embedding has {vocabulary:,}"
    text = ""
    if tokenizer is not None:
        text = f" ({tokenizer.convert_ids_to_tokens(token)!r})" if token >= 0 else ""
        sizes = f"the tokenizer has {len(tokenizer):,} tokens, {sizes}"
    return (
        f"token {token}{text}; {sizes}: give the tokenizer that belongs to the model, or resize "
        "the embedding before it is opened (resize_token_embeddings of transformers)"
    )
