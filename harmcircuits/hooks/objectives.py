"""What is explained: an objective maps (model, batch) to one value per example, the lower the better."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from transformer_lens.model_bridge import TransformerBridge

from harmcircuits.prompts import Batch

Objective = Callable[[TransformerBridge, Batch], Float[Tensor, " batch"]]


def completion_loss(bridge: TransformerBridge, batch: Batch) -> Float[Tensor, " batch"]:
    """Mean cross-entropy over the target tokens of each example, in nats per token.

    L_x = -(1/T_x) sum_{t target} log p(token_t | tokens before t). Prompt tokens and padding never count, so every
    example weighs the same whatever its length (arXiv 2604.09544, section on scores).
    """
    tokens, is_target = batch.tokens[:, 1:].to(bridge.cfg.device), batch.is_target[:, 1:].to(bridge.cfg.device)
    positions = is_target.any(dim=0).nonzero().flatten()
    is_target = is_target[:, positions]
    logits = logits_at(bridge, batch.tokens, positions)[is_target].float()
    losses = functional.cross_entropy(logits, tokens[:, positions].to(logits.device)[is_target], reduction="none")
    return losses.new_zeros(is_target.shape).masked_scatter(is_target, losses).sum(dim=1) / is_target.sum(dim=1)


def logits_at(
    bridge: TransformerBridge, tokens: Int[Tensor, "batch pos"], positions: Int[Tensor, " n"]
) -> Float[Tensor, "batch n vocab"]:
    """The logits at these positions only.

    Where the model can leave the others out they are not computed: over a large vocabulary they cost as much as blocks do.
    """
    tokens = tokens.to(bridge.cfg.device)
    if "logits_to_keep" in inspect.signature(bridge.original_model.forward).parameters:
        return bridge(tokens, logits_to_keep=positions.to(tokens.device))
    return bridge(tokens)[:, positions]


def token_losses(
    bridge: TransformerBridge, batch: Batch
) -> tuple[Float[Tensor, "batch pos-1"], Float[Tensor, "batch pos-1"]]:
    """Cross-entropy (nats) of every token after the first, and 1.0 where it is a target; both float32."""
    tokens = batch.tokens.to(bridge.cfg.device)
    logits = bridge(tokens)[:, :-1].float()
    losses = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    is_target = batch.is_target[:, 1:].to(losses)
    return losses.view_as(is_target), is_target


def choice_margin(yes: Sequence[str], no: Sequence[str]) -> Objective:
    """The objective -log(p(right words) / p(wrong words)) of the first target token of a yes-or-no answer, in nats.

    The right words are those of `yes` and `no` among which the target is; words count by their first token. Below zero
    where the model is right. The objective raises ValueError for a word without tokens, a token that stands for both, and a
    target that is neither.
    """

    def margin(bridge: TransformerBridge, batch: Batch) -> Float[Tensor, " batch"]:
        yes_ids, no_ids = choice_tokens(bridge.tokenizer, yes, no)
        first = batch.is_target.int().argmax(dim=1)
        row = torch.arange(len(batch))
        target = batch.tokens[row, first]
        is_yes = torch.isin(target, torch.tensor(yes_ids))
        if not (is_yes | torch.isin(target, torch.tensor(no_ids))).all():
            raise ValueError(f"choice_margin: an answer opens with none of {[*yes, *no]}; keep only such answers")
        positions, column = (first - 1).unique(return_inverse=True)
        logits = logits_at(bridge, batch.tokens, positions)[row, column].float()
        odds = logits[:, yes_ids].logsumexp(1) - logits[:, no_ids].logsumexp(1)
        return torch.where(is_yes.to(odds.device), -odds, odds)

    return margin


def choice_tokens(tokenizer: Any, yes: Sequence[str], no: Sequence[str]) -> tuple[list[int], list[int]]:
    """The first tokens of the yes words and of the no words.

    Raises ValueError for no words, a word without tokens, or a token that stands for both.
    """
    if not yes or not no:
        raise ValueError(f"choice_tokens: yes words {list(yes)}, no words {list(no)}; give at least one of each")
    yes_ids, no_ids = (sorted({_first_token(word, tokenizer) for word in words}) for words in (yes, no))
    if set(yes_ids) & set(no_ids):
        raise ValueError(f"choice_tokens: {list(yes)} and {list(no)} share a first token; choose other words")
    return yes_ids, no_ids


def _first_token(word: str, tokenizer: Any) -> int:
    tokens = tokenizer.encode(word, add_special_tokens=False)
    if not tokens:
        raise ValueError(f"choice_tokens: {word!r} has no tokens; give another word")
    return tokens[0]
