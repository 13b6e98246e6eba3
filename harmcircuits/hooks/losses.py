"""Losses, divergences, perplexity and log-odds of a live model on texts."""

from collections.abc import Sequence
from dataclasses import replace
from math import exp

import torch
from jaxtyping import Float
from torch import Tensor

from harmcircuits.batches import Batch, Template, opening_ids, prompt_ids
from harmcircuits.circuits.masks import WeightMask
from harmcircuits.hooks.bridge import AnyModel, Bridge, as_bridge, evaluating, right_padded
from harmcircuits.hooks.checks import (
    refuse_batches,
    refuse_not_finite,
    refuse_not_finite_texts,
    refuse_requests,
)
from harmcircuits.hooks.masking import masked, masked_if_given
from harmcircuits.hooks.objectives import (
    PerExample,
    choice_tokens,
    completion_loss,
    log_odds,
    logits_at_own_position,
)
from harmcircuits.measurements import Labels, Measurement
from harmcircuits.prompts import PromptSet

N_TOGETHER = 64  # requests in one pass for log-odds


def completion_nll(
    bridge: AnyModel, batches: Sequence[Batch], *, mask: WeightMask | None = None
) -> Float[Tensor, " n"]:
    """`completion_loss` of every example, without gradients: nats per token.

    >>> hc.completion_nll(bridge, harm).shape
    torch.Size([24])

    Args:
        bridge: the model.
        batches: the texts.
        mask: weights that are removed meanwhile.

    Raises:
        ValueError: no batches, a loss that is not finite, and as `masked`.
    """
    bridge = as_bridge(bridge)
    refuse_batches("completion_nll", bridge, batches)
    with torch.no_grad(), evaluating(bridge), masked_if_given(bridge, mask):
        nll = torch.cat([completion_loss(bridge, batch).cpu() for batch in batches])
    refuse_not_finite(batches, nll, completion_loss)
    return nll


def kl_under(
    bridge: AnyModel,
    mask: WeightMask,
    batches: Sequence[Batch],
) -> Float[Tensor, " n"]:
    """KL(unpruned || masked) of the next-token distribution; nats, a mean for each example.

    The mean is over all positions except padding; the request's positions count.

    >>> mask = hc.top_fraction(hc.random_scores(bridge), 0.001)
    >>> hc.kl_under(bridge, mask, benign).mean().item() < 0.1
    True

    Args:
        bridge: the model.
        mask: the weights to remove.
        batches: the texts.

    Raises:
        ValueError: no batches, a divergence that is not finite, and as `masked`.
    """
    bridge = as_bridge(bridge)
    refuse_batches("kl_under", bridge, batches)

    def kl_divergence(bridge: Bridge, batch: Batch) -> PerExample:
        tokens = batch.tokens.to(bridge.cfg.device)
        unpruned = bridge(tokens)
        with masked(bridge, mask):
            pruned = bridge(tokens)

        # An example at a time: a batch's distributions over a large vocabulary are gigabytes.
        examples = zip(unpruned, pruned, strict=True)
        per_position = torch.stack([_divergence(*logits) for logits in examples]).cpu()
        # The divergence at padding does not count.
        total = per_position.where(batch.is_token, 0).sum(dim=1)
        return total / batch.is_token.sum(dim=1)

    with torch.no_grad(), evaluating(bridge):
        divergence = torch.cat([kl_divergence(bridge, batch) for batch in batches])
    refuse_not_finite(batches, divergence, kl_divergence)
    return divergence


def _divergence(
    p_logits: Float[Tensor, "pos vocab"],
    q_logits: Float[Tensor, "pos vocab"],
) -> Float[Tensor, " pos"]:
    """sum_v p(v) (log p(v) - log q(v)) at every position."""
    log_p = p_logits.float().log_softmax(dim=-1)
    log_q = q_logits.float().log_softmax(dim=-1)
    terms = log_p.exp() * (log_p - log_q)
    return terms.sum(dim=-1)


def perplexity(bridge: Bridge, batches: Sequence[Batch], labels: Labels) -> Measurement:
    """exp of the mean NLL per token over windows of plain text, with its bootstrap interval."""
    nll = completion_nll(bridge, batches)
    windows = range(len(nll))  # each window is a group by itself
    mean = Measurement.average("perplexity", labels, nll, windows)
    # exp is increasing, so it maps the ends of one interval to the ends of the other.
    return replace(
        mean,
        mean=exp(mean.mean),
        low=exp(mean.low),
        high=exp(mean.high),
    )


def answer_log_odds(
    bridge: AnyModel,
    prompts: PromptSet,
    yes: Sequence[str],
    no: Sequence[str],
    *,
    template: Template = "chat",
    prefill: str = "",
) -> Float[Tensor, " n"]:
    """log p(first token in `yes`) - log p(it is in `no`), after each request and prefill; nats."""
    bridge = as_bridge(bridge)
    tokenizer = bridge.tokenizer
    yes_ids, no_ids = choice_tokens(tokenizer, yes, no)
    opening = opening_ids(prefill, tokenizer)
    contexts = [prompt_ids(example.prompt, tokenizer, template) + opening for example in prompts]
    refuse_requests("answer_log_odds: request", bridge, contexts)

    values = []
    for tokens, lengths in right_padded(bridge, contexts, N_TOGETHER):
        with torch.no_grad(), evaluating(bridge):
            # The last token of a request predicts the answer.
            logits = logits_at_own_position(bridge, tokens, lengths - 1)
        values.append(log_odds(logits, yes_ids, no_ids))
    odds = torch.cat(values).cpu()

    names = [f"answer_log_odds: request {number}" for number in range(len(contexts))]
    refuse_not_finite_texts(names, odds.isfinite())
    return odds
