"""Losses, divergences, perplexity and log-odds of a live model on texts."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from math import exp

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from harmcircuits.batches import Batch, Template, prompt_ids
from harmcircuits.circuits.masks import WeightMask
from harmcircuits.hooks.bridge import AnyModel, Bridge, as_bridge
from harmcircuits.hooks.checks import (
    refuse_batches,
    refuse_not_finite,
    refuse_not_finite_texts,
    refuse_requests,
)
from harmcircuits.hooks.masking import masked, masked_if_given
from harmcircuits.hooks.objectives import (
    choice_tokens,
    completion_loss,
    log_odds,
    logits_at_own_position,
)
from harmcircuits.measurements import Labels, Measurement
from harmcircuits.prompts import PromptSet

N_TOGETHER = 64  # requests whose log-odds are read in one pass


def completion_nll(
    bridge: AnyModel, batches: Sequence[Batch], *, mask: WeightMask | None = None
) -> Float[Tensor, " n"]:
    """`completion_loss` of every example, without gradients: nats per token.

    >>> hc.completion_nll(bridge, harm).shape
    torch.Size([24])

    Args:
        bridge: the model.
        batches: the texts.
        mask: weights removed while it reads them.

    Raises:
        ValueError: no batches, a loss that is not finite, and as `masked`.
    """
    bridge = as_bridge(bridge)
    refuse_batches("completion_nll", bridge, batches)
    losses = []
    with torch.no_grad(), masked_if_given(bridge, mask):
        for batch in batches:
            losses.append(completion_loss(bridge, batch).cpu())
        nll = torch.cat(losses)
        refuse_not_finite(batches, nll, completion_loss)
    return nll


def kl_under(
    bridge: AnyModel,
    mask: WeightMask,
    batches: Sequence[Batch],
) -> Float[Tensor, " n"]:
    """KL(unpruned || masked) of the next-token distribution; nats, a mean for each example.

    The mean is over all positions that are no padding, the request's included.

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
    divergence = partial(_mean_divergence, mask)
    with torch.no_grad():
        values = torch.cat([divergence(bridge, batch) for batch in batches])
    refuse_not_finite(batches, values, divergence)
    return values


def perplexity(bridge: Bridge, batches: Sequence[Batch], labels: Labels) -> Measurement:
    """exp of the mean NLL per token over windows of plain text, with its bootstrap interval."""
    nll = completion_nll(bridge, batches)
    windows = range(len(nll))  # each is a group by itself
    mean = Measurement.average("perplexity", labels, nll, windows)
    # exp grows with its argument, so the ends of the interval may be carried over.
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
) -> Float[Tensor, " n"]:
    """log p(first answer token in `yes`) - log p(it is in `no`) of each request; nats."""
    bridge = as_bridge(bridge)
    yes_ids, no_ids = choice_tokens(bridge.tokenizer, yes, no)
    contexts = []
    for example in prompts:
        context = prompt_ids(example.prompt, bridge.tokenizer, template)
        contexts.append(context)
    refuse_requests("answer_log_odds: request", bridge, contexts, max_new_tokens=0)

    values = []
    for start in range(0, len(contexts), N_TOGETHER):
        rows = [torch.tensor(context) for context in contexts[start : start + N_TOGETHER]]
        # Padded on the right with any token: attention is causal, so it reaches no answer.
        tokens = pad_sequence(rows, batch_first=True).to(bridge.cfg.device)
        last = torch.tensor([len(row) - 1 for row in rows])  # where the answer is predicted
        with torch.no_grad():
            logits = logits_at_own_position(bridge, tokens, last)
        values.append(log_odds(logits, yes_ids, no_ids))
    odds = torch.cat(values).cpu()
    names = [f"answer_log_odds: request {number}" for number in range(len(contexts))]
    refuse_not_finite_texts(names, odds.isfinite())
    return odds


def _mean_divergence(
    mask: WeightMask,
    bridge: Bridge,
    batch: Batch,
) -> Float[Tensor, " batch"]:
    """`kl_under` of one batch."""
    tokens = batch.tokens.to(bridge.cfg.device)
    before = bridge(tokens)
    with masked(bridge, mask):
        after = bridge(tokens)

    # An example at a time: a batch's distributions over a large vocabulary are gigabytes.
    per_example = []
    for unpruned, pruned in zip(before, after, strict=True):
        per_example.append(_divergence(unpruned, pruned))
    divergence = torch.stack(per_example).cpu()  # [batch, pos]

    # Padding has a divergence too, which does not count.
    total = divergence.where(batch.is_token, 0).sum(dim=1)
    return total / batch.is_token.sum(dim=1)


def _divergence(
    before: Float[Tensor, "pos vocab"],
    after: Float[Tensor, "pos vocab"],
) -> Float[Tensor, " pos"]:
    """sum_v p(v) (log p(v) - log q(v)) at every position, p before and q after."""
    first = before.float().log_softmax(dim=-1)
    second = after.float().log_softmax(dim=-1)
    terms = first.exp() * (first - second)
    return terms.sum(dim=-1)
