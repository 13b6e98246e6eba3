"""Objectives: functions of (model, batch) that give a value per example; lower is better."""

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from harmcircuits.batches import Batch
from harmcircuits.display import listed
from harmcircuits.hooks.bridge import Bridge

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
    return _mean_over_targets(bridge, batch, _cross_entropy)


def token_error(bridge: Bridge, batch: Batch) -> Float[Tensor, " batch"]:
    """Mean over the target tokens of each example of 1 - p: how often a draw would miss them."""
    return _mean_over_targets(bridge, batch, _error)


def _cross_entropy(
    logits: Float[Tensor, "targets vocab"], targets: Int[Tensor, " targets"]
) -> Float[Tensor, " targets"]:
    return functional.cross_entropy(logits, targets, reduction="none")


def _error(
    logits: Float[Tensor, "targets vocab"], targets: Int[Tensor, " targets"]
) -> Float[Tensor, " targets"]:
    return 1 - _cross_entropy(logits, targets).neg().exp()


def _mean_over_targets(
    bridge: Bridge,
    batch: Batch,
    value: Callable[[Tensor, Tensor], Float[Tensor, " targets"]],
) -> Float[Tensor, " batch"]:
    """The mean of a value over the target tokens of each example."""
    # A token is predicted at the position before it, so the targets move one to the left:
    #
    #     tokens            <bos>  how   ?   sure   it  <eos>
    #     position            0     1    2     3     4     5
    #     is_target           .     .    .     x     x     x
    #     predicted at        .     .    x     x     x     .
    # Where they are is found before anything runs: a model's outline has no values to look at.
    next_tokens = batch.tokens[:, 1:].cpu()
    is_target = batch.is_target[:, 1:].cpu()

    # Only positions at which some example has a target: [batch, n] from here on.
    positions = is_target.any(dim=0).nonzero().flatten()
    next_tokens = next_tokens[:, positions]
    is_target = is_target[:, positions]
    row, column = is_target.nonzero(as_tuple=True)

    # [batch, n, vocab], then [targets, vocab]: all targets in a row, example after example. The
    # name is used again, so that the larger tensor is free before it is turned into float32.
    logits = logits_at(bridge, batch.tokens, positions)
    row, column = row.to(logits.device), column.to(logits.device)
    logits = logits[row, column]
    logits = logits.float()
    targets = next_tokens[is_target].to(logits.device)
    values = value(logits, targets)

    # Back to [batch, n], with zeros where an example has no target.
    zeros = values.new_zeros(is_target.shape)
    per_position = zeros.index_put((row, column), values)
    n_targets = is_target.sum(dim=1).to(values.device)
    return per_position.sum(dim=1) / n_targets


def logits_at(
    bridge: Bridge,
    tokens: Int[Tensor, "batch pos"],
    positions: Int[Tensor, " n"],
) -> Float[Tensor, "batch n vocab"]:
    """The logits at these positions only."""
    n_read = int(positions.max()) + 1
    tokens = tokens[:, :n_read].to(bridge.cfg.device)
    if _can_leave_logits_out(type(bridge.original_model)):
        return bridge(tokens, logits_to_keep=positions.to(tokens.device))
    return bridge(tokens)[:, positions]


@cache
def _can_leave_logits_out(model_class: type) -> bool:
    """Whether its `forward` takes the positions; not every model of transformers does."""
    return "logits_to_keep" in inspect.signature(model_class.forward).parameters


def logits_at_own_position(
    bridge: Bridge,
    tokens: Int[Tensor, "batch pos"],
    position: Int[Tensor, " batch"],
) -> Float[Tensor, "batch vocab"]:
    """The logits of each row at a position of its own, in float32."""
    # `logits_at` takes the same positions for all rows. So it is given every position that occurs,
    # and each row then picks its column:
    #
    #     position    5  7  5
    #     positions   5  7
    #     column      0  1  0
    positions, column = position.unique(return_inverse=True)
    row = torch.arange(len(tokens))
    logits = logits_at(bridge, tokens, positions)
    return logits[row, column].float()


def log_odds(
    logits: Float[Tensor, "batch vocab"],
    yes_ids: Sequence[int],
    no_ids: Sequence[int],
) -> Float[Tensor, " batch"]:
    """log p(token in `yes_ids`) - log p(token in `no_ids`) of each row, in nats."""
    # The normaliser of the softmax is the same in both terms, so it need not be computed.
    yes = logits[:, yes_ids].logsumexp(dim=1)
    no = logits[:, no_ids].logsumexp(dim=1)
    return yes - no


def token_losses(bridge: Bridge, batch: Batch) -> Float[Tensor, "batch next"]:
    """Cross-entropy (nats, float32) of every token after the first."""
    tokens = batch.tokens.to(bridge.cfg.device)
    targets = tokens[:, 1:]
    logits = bridge(tokens)[:, :-1].float()

    flat_logits = rearrange(logits, "batch next vocab -> (batch next) vocab")
    flat_targets = rearrange(targets, "batch next -> (batch next)")
    losses = functional.cross_entropy(flat_logits, flat_targets, reduction="none")
    return losses.view(targets.shape)


def choice_margin(yes: Sequence[str], no: Sequence[str]) -> Objective:
    """The objective -log(p(right words) / p(wrong words)) of a yes-or-no answer, in nats.

    Taken at the first target token. If that is one of the `yes` words, these are right and the
    `no` words wrong; otherwise the reverse. Below zero where the model is right.

    >>> margin = hc.choice_margin(yes=["yes", "fine"], no=["no", "never"])
    >>> hc.removal_effect(bridge, model.calibration("recognition").batches, margin)
    WeightScores(removal_effect of 24 examples, 983,040 weights)

    Args:
        yes: words, which count by their first token.
        no: words, which count by their first token.

    Raises:
        ValueError: when the objective is called: as `choice_tokens`, and for a target that is
            neither a yes word nor a no word.
    """

    def margin(bridge: Bridge, batch: Batch) -> Float[Tensor, " batch"]:
        # Only now is there a tokenizer that says which tokens the words begin with.
        yes_ids, no_ids = choice_tokens(bridge.tokenizer, yes, no)

        row = torch.arange(len(batch))
        first = batch.is_target.int().argmax(dim=1)  # argmax gives the first True
        target = batch.tokens[row, first]
        is_yes = torch.isin(target, torch.tensor(yes_ids))
        is_no = torch.isin(target, torch.tensor(no_ids))
        is_neither = ~(is_yes | is_no)
        if is_neither.any():
            rows = is_neither.nonzero().flatten().tolist()
            raise ValueError(
                f"choice_margin: the answers in rows {listed(rows)} of the batch open with none of "
                f"{[*yes, *no]}; keep only answers that do"
            )

        logits = logits_at_own_position(bridge, batch.tokens, first - 1)
        odds = log_odds(logits, yes_ids, no_ids)
        return torch.where(is_yes.to(odds.device), -odds, odds)

    return margin


def choice_tokens(
    tokenizer: Any,
    yes: Sequence[str],
    no: Sequence[str],
) -> tuple[list[int], list[int]]:
    """The first tokens of the yes words and of the no words."""
    # As sets, because two words may begin with the same token.
    yes_ids = {tokenizer.encode(word, add_special_tokens=False)[0] for word in yes}
    no_ids = {tokenizer.encode(word, add_special_tokens=False)[0] for word in no}
    if yes_ids & no_ids:
        raise ValueError(
            f"choice_tokens: {list(yes)} and {list(no)} share a first token; choose other words"
        )
    return sorted(yes_ids), sorted(no_ids)
