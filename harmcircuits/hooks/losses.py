"""What a live model makes of texts: losses, divergences, perplexity, log-odds."""

from collections.abc import Sequence
from dataclasses import replace
from math import exp

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from harmcircuits.circuits.masks import WeightMask
from harmcircuits.hooks.bridge import AnyModel, Bridge, as_bridge
from harmcircuits.hooks.masking import masked, masked_if_given
from harmcircuits.hooks.objectives import choice_tokens, completion_loss, logits_at
from harmcircuits.measurements import Labels, Measurement
from harmcircuits.prompts import Batch, PromptSet, Template, prompt_ids, refuse_no_batches

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
        ValueError: no batches, and as `masked`.
    """
    bridge = as_bridge(bridge)
    refuse_no_batches("completion_nll", batches)
    with torch.no_grad(), masked_if_given(bridge, mask):
        return torch.cat([completion_loss(bridge, batch).cpu() for batch in batches])


def kl_under(bridge: AnyModel, mask: WeightMask, batches: Sequence[Batch]) -> Float[Tensor, " n"]:
    """KL(unpruned || masked) of the next-token distribution; nats, a mean for each example.

    The mean is over all real positions, those of the request among them.

    >>> mask = hc.top_fraction(hc.random_scores(bridge), 0.001)
    >>> hc.kl_under(bridge, mask, benign).mean().item() < 0.1
    True

    Args:
        bridge: the model.
        mask: the weights to remove.
        batches: the texts.

    Raises:
        ValueError: no batches, and as `masked`.
    """
    bridge = as_bridge(bridge)
    refuse_no_batches("kl_under", batches)
    values = []
    with torch.no_grad():
        for batch in batches:
            tokens = batch.tokens.to(bridge.cfg.device)
            before = bridge(tokens)
            with masked(bridge, mask):
                after = bridge(tokens)
            # An example at a time: a batch's distributions over a large vocabulary are gigabytes.
            pairs = zip(before, after, strict=True)
            divergence = torch.stack([_divergence(*pair) for pair in pairs]).cpu()
            n_tokens = batch.is_token.sum(1)
            values.append((divergence * batch.is_token).sum(1) / n_tokens)
    return torch.cat(values)


def perplexity(bridge: Bridge, batches: Sequence[Batch], labels: Labels) -> Measurement:
    """exp of the mean NLL per token over windows of plain text, with its bootstrap interval.

    Args:
        bridge: the model.
        batches: the windows (see `tokenize_text`), which are resampled.
        labels: what the row carries.

    Raises:
        ValueError: no batches.
    """
    nll = completion_nll(bridge, batches)
    mean = Measurement.average("perplexity", labels, nll, range(len(nll)))
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
    """log p(first answer token in `yes`) - log p(it is in `no`) of each request; nats.

    Args:
        bridge: the model.
        prompts: yes-or-no questions.
        yes: words, which count by their first token.
        no: likewise.
        template: how a request is written.

    Raises:
        ValueError: no prompts, and as `choice_tokens`.
    """
    bridge = as_bridge(bridge)
    if not len(prompts):
        raise ValueError("answer_log_odds: no prompts; expected at least one")
    yes_ids, no_ids = choice_tokens(bridge.tokenizer, yes, no)
    contexts = [prompt_ids(example.prompt, bridge.tokenizer, template) for example in prompts]
    values = []
    for start in range(0, len(contexts), N_TOGETHER):
        rows = [torch.tensor(context) for context in contexts[start : start + N_TOGETHER]]
        tokens = pad_sequence(rows, batch_first=True).to(bridge.cfg.device)
        last = torch.tensor([len(row) - 1 for row in rows])
        with torch.no_grad():
            positions, column = last.unique(return_inverse=True)
            at_last = logits_at(bridge, tokens, positions)[torch.arange(len(rows)), column]
        logits = at_last.float()
        values.append(logits[:, yes_ids].logsumexp(1) - logits[:, no_ids].logsumexp(1))
    return torch.cat(values).cpu()


def _divergence(
    before: Float[Tensor, "pos vocab"], after: Float[Tensor, "pos vocab"]
) -> Float[Tensor, " pos"]:
    first, second = before.float().log_softmax(-1), after.float().log_softmax(-1)
    return (first.exp() * (first - second)).sum(-1)
