"""What is explained: an objective maps (model, batch) to a value per example, lower is better."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from harmcircuits.hooks.bridge import Bridge
from harmcircuits.prompts import Batch

Objective = Callable[[Any, Batch], Float[Tensor, " batch"]]


def completion_loss(bridge: Bridge, batch: Batch) -> Float[Tensor, " batch"]:
    """Mean cross-entropy over the target tokens of each example, in nats per token.

    L_x = -(1/T_x) sum_{t target} log p(token_t | tokens before t). Prompt tokens and padding never
    count, so every example weighs the same whatever its length (arXiv 2604.09544, on scores).

    >>> hc.completion_loss(bridge, harm[0]).shape
    torch.Size([24])

    Args:
        bridge: the model.
        batch: the texts.
    """
    device = bridge.cfg.device
    # A token is predicted at the position before it.
    tokens = batch.tokens[:, 1:].to(device)
    is_target = batch.is_target[:, 1:].to(device)

    positions = is_target.any(dim=0).nonzero().flatten()
    is_target = is_target[:, positions]
    logits = logits_at(bridge, batch.tokens, positions)[is_target].float()
    targets = tokens[:, positions].to(logits.device)[is_target]
    losses = functional.cross_entropy(logits, targets, reduction="none")

    per_position = losses.new_zeros(is_target.shape).masked_scatter(is_target, losses)
    return per_position.sum(dim=1) / is_target.sum(dim=1)


def logits_at(
    bridge: Bridge,
    tokens: Int[Tensor, "batch pos"],
    positions: Int[Tensor, " n"],
) -> Float[Tensor, "batch n vocab"]:
    """The logits at these positions only.

    Where the model can leave the others out they are not computed: over a large vocabulary they
    cost as much as blocks do.

    Args:
        bridge: the model.
        tokens: token ids.
        positions: the same ones in every row.
    """
    tokens = tokens.to(bridge.cfg.device)
    takes_positions = inspect.signature(bridge.original_model.forward).parameters
    if "logits_to_keep" in takes_positions:
        return bridge(tokens, logits_to_keep=positions.to(tokens.device))
    return bridge(tokens)[:, positions]


def token_losses(bridge: Bridge, batch: Batch) -> Float[Tensor, "batch next"]:
    """Cross-entropy (nats, float32) of every token after the first.

    Args:
        bridge: the model.
        batch: the texts.
    """
    tokens = batch.tokens.to(bridge.cfg.device)
    logits = bridge(tokens)[:, :-1].float()
    targets = tokens[:, 1:]
    losses = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(targets.shape)


def choice_margin(yes: Sequence[str], no: Sequence[str]) -> Objective:
    """The objective -log(p(right words) / p(wrong words)) of a yes-or-no answer, in nats.

    Taken at the first target token; the right words are those of `yes` and `no` among which it is.
    Below zero where the model is right.

    >>> margin = hc.choice_margin(yes=["yes", "fine"], no=["no", "never"])
    >>> hc.removal_effect(bridge, model.calibration("recognition").batches, margin)
    WeightScores(removal_effect of 24 examples, 983,040 weights)

    Args:
        yes: words, which count by their first token.
        no: likewise.

    Raises:
        ValueError: when it is used: as `choice_tokens`, and for a target that is in neither.
    """

    def margin(bridge: Bridge, batch: Batch) -> Float[Tensor, " batch"]:
        yes_ids, no_ids = choice_tokens(bridge.tokenizer, yes, no)
        first = batch.is_target.int().argmax(dim=1)
        row = torch.arange(len(batch))
        target = batch.tokens[row, first]
        is_yes = torch.isin(target, torch.tensor(yes_ids))
        is_no = torch.isin(target, torch.tensor(no_ids))
        if not (is_yes | is_no).all():
            raise ValueError(
                f"choice_margin: an answer opens with none of {[*yes, *no]}; keep only such answers"
            )
        positions, column = (first - 1).unique(return_inverse=True)
        logits = logits_at(bridge, batch.tokens, positions)[row, column].float()
        odds = logits[:, yes_ids].logsumexp(1) - logits[:, no_ids].logsumexp(1)
        return torch.where(is_yes.to(odds.device), -odds, odds)

    return margin


def choice_tokens(
    tokenizer: Any,
    yes: Sequence[str],
    no: Sequence[str],
) -> tuple[list[int], list[int]]:
    """The first tokens of the yes words and of the no words.

    Args:
        tokenizer: a Hugging Face tokenizer.
        yes: words.
        no: words.

    Raises:
        ValueError: no words, a word without tokens, or a token that stands for both.
    """
    if not yes or not no:
        raise ValueError(
            f"choice_tokens: yes words {list(yes)}, no words {list(no)}; give at least one of each"
        )
    yes_ids = sorted({_first_token(word, tokenizer) for word in yes})
    no_ids = sorted({_first_token(word, tokenizer) for word in no})
    if set(yes_ids) & set(no_ids):
        raise ValueError(
            f"choice_tokens: {list(yes)} and {list(no)} share a first token; choose other words"
        )
    return yes_ids, no_ids


def _first_token(word: str, tokenizer: Any) -> int:
    tokens = tokenizer.encode(word, add_special_tokens=False)
    if not tokens:
        raise ValueError(f"choice_tokens: {word!r} has no tokens; give another word")
    return tokens[0]
