"""Objectives: functions of (model, batch) that give a value per example; lower is better."""

import inspect
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from harmcircuits.batches import Batch
from harmcircuits.display import listed
from harmcircuits.hooks.bridge import Bridge

PerExample = Float[Tensor, " batch"]
Objective = Callable[[Any, Batch], PerExample]


def completion_loss(bridge: Bridge, batch: Batch) -> Float[Tensor, " batch"]:
    """Mean cross-entropy over the target tokens of each example, in nats per token.

    L_x = -(1/T_x) sum_{t target} log p(token_t | tokens before t). Prompt tokens and padding never
    count, so every example weighs the same at any length (arXiv 2604.09544, on scores).

    >>> hc.completion_loss(bridge, harm[0]).shape
    torch.Size([24])

    Args:
        bridge: the model.
        batch: the texts.
    """
    return _mean_over_targets(bridge, batch, lambda losses: losses)


def token_error(bridge: Bridge, batch: Batch) -> PerExample:
    """Mean of 1 - p over the target tokens of each example: how often a sampled token differs."""
    return _mean_over_targets(bridge, batch, lambda losses: 1 - losses.neg().exp())


def _mean_over_targets(
    bridge: Bridge,
    batch: Batch,
    value: Callable[[Tensor], Tensor],
) -> PerExample:
    """A function of the cross-entropy of each target token, averaged in each example."""
    # A token is predicted at the position before it, so the targets move one to the left:
    #
    #     tokens            <bos>  how   ?   sure   it  <eos>
    #     position            0     1    2     3     4     5
    #     is_target           .     .    .     x     x     x
    #     predicted at        .     .    x     x     x     .
    #
    # On the CPU: when memory is estimated, tensors of the model have no values.
    next_tokens = batch.tokens[:, 1:].cpu()
    is_target = batch.is_target[:, 1:].cpu()

    # Only the positions at which some example has a target: [batch, n].
    positions = is_target.any(dim=0).nonzero().flatten()
    next_tokens = next_tokens[:, positions]
    is_target = is_target[:, positions]

    # [batch, n, vocab], then [targets, vocab], example after example. The name is used again, so
    # that the larger tensor is freed before the conversion to float32.
    logits = logits_at(bridge, batch.tokens, positions)
    places = is_target.nonzero().to(logits.device)
    row, column = places.unbind(dim=1)
    logits = logits[row, column]
    logits = logits.float()
    targets = next_tokens[is_target].to(logits.device)
    losses = functional.cross_entropy(logits, targets, reduction="none")
    values = value(losses)

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
    if _takes_positions(type(bridge.original_model)):
        return bridge(tokens, logits_to_keep=positions.to(tokens.device))
    return bridge(tokens)[:, positions]


@cache
def _takes_positions(model_class: type) -> bool:
    """Whether `forward` can compute some logits only; not every model of transformers can."""
    return "logits_to_keep" in inspect.signature(model_class.forward).parameters


def logits_at_own_position(
    bridge: Bridge,
    tokens: Int[Tensor, "batch pos"],
    position: Int[Tensor, " batch"],
) -> Float[Tensor, "batch vocab"]:
    """The logits of each row at a position of its own, in float32."""
    # `logits_at` takes the same positions for all rows. So it gets every position that occurs, and
    # each row then picks its column:
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
) -> PerExample:
    """log p(token in `yes_ids`) - log p(token in `no_ids`) of each row, in nats."""
    # Both terms have the same softmax normaliser, so it need not be computed.
    yes = logits[:, yes_ids].logsumexp(dim=1)
    no = logits[:, no_ids].logsumexp(dim=1)
    return yes - no


def token_losses(bridge: Bridge, batch: Batch) -> Float[Tensor, "batch next"]:
    """Cross-entropy (nats, float32) of every token after the first."""
    tokens = batch.tokens.to(bridge.cfg.device)
    targets = tokens[:, 1:]
    logits = bridge(tokens)[:, :-1].float()

    losses = functional.cross_entropy(
        logits.flatten(0, 1),  # batch and position as one axis
        targets.flatten(),
        reduction="none",
    )
    return losses.view(targets.shape)


def choice_margin(yes: Sequence[str], no: Sequence[str]) -> Objective:
    """The objective -log(p(right words) / p(wrong words)) of a yes-or-no answer, in nats.

    Computed at the first target token. If that token begins a `yes` word, the `yes` words are right
    and the `no` words wrong; otherwise the reverse. Negative where the model is right.

    >>> margin = hc.choice_margin(yes=["yes", "fine"], no=["no", "never"])
    >>> hc.removal_effect(bridge, model.calibration("recognition").batches, margin)
    WeightScores(removal_effect of 24 examples, 983,040 weights)

    Args:
        yes: words, of which only the first token counts.
        no: words, of which only the first token counts.

    Raises:
        ValueError: when the objective is called: yes and no words with the same first token, and a
            target that begins neither a yes word nor a no word.
    """

    def margin(bridge: Bridge, batch: Batch) -> PerExample:
        # The tokenizer, which decides the first tokens of the words, comes with the bridge.
        yes_ids, no_ids = choice_tokens(bridge.tokenizer, yes, no)

        row = torch.arange(len(batch))
        first = batch.is_target.int().argmax(dim=1)  # argmax gives the first True
        target = batch.tokens[row, first]
        is_yes = torch.isin(target, torch.tensor(yes_ids))
        is_no = torch.isin(target, torch.tensor(no_ids))
        rows = (~is_yes & ~is_no).nonzero().flatten().tolist()
        if rows:
            raise ValueError(
                f"choice_margin: the answers in rows {listed(rows)} of the batch begin with none "
                f"of {[*yes, *no]}; remove these answers"
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
    # Sets, because two words may begin with the same token.
    encode = partial(tokenizer.encode, add_special_tokens=False)
    yes_ids = {encode(word)[0] for word in yes}
    no_ids = {encode(word)[0] for word in no}
    if yes_ids & no_ids:
        raise ValueError(
            f"choice_tokens: {list(yes)} and {list(no)} share a first token; choose other words"
        )
    return sorted(yes_ids), sorted(no_ids)
