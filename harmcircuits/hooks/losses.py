"""What a model does, with 95 % intervals."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from math import exp
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.stats import rankdata
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from harmcircuits.circuits.masks import WeightMask
from harmcircuits.circuits.scores import WeightScores
from harmcircuits.hooks.masking import masked
from harmcircuits.hooks.objectives import choice_tokens, completion_loss, logits_at
from harmcircuits.measurements import Measurement, wilson
from harmcircuits.prompts import Batch, PromptSet, Template, prompt_ids

Labels = Mapping[str, str | int | float]


def rate(metric: str, labels: Labels, hits: Sequence[float], groups: Sequence[Hashable]) -> Measurement:
    """Share of hits with its Wilson interval, counting each group once: answers about one item are not independent.

    The interval is that of n = number of groups, so it is conservative when examples within a group disagree. Raises
    ValueError for no examples, or groups that are not one an example.
    """
    _check(metric, hits, groups)
    mean, n = float(np.mean(hits)), len(set(groups))
    low, high = wilson(mean, n)
    return Measurement(metric, labels, mean, max(0.0, min(mean, low)), min(1.0, max(mean, high)), len(hits))


def average(
    metric: str, labels: Labels, values: Float[Tensor, " n"], groups: Sequence[Hashable], *, seed: int = 0
) -> Measurement:
    """Mean of the values with a percentile bootstrap interval that resamples whole groups (2,000 resamples).

    Raises ValueError for no examples, or groups that are not one a value.
    """
    _check(metric, values, groups)
    _, member = np.unique([str(group) for group in groups], return_inverse=True)
    sums, sizes = np.bincount(member, values.cpu().double().numpy()), np.bincount(member)
    drawn = np.random.default_rng(seed).integers(len(sums), size=(2000, len(sums)))
    low, high = np.quantile(sums[drawn].sum(1) / sizes[drawn].sum(1), [0.025, 0.975])
    mean = float(sums.sum() / sizes.sum())
    return Measurement(metric, labels, mean, min(mean, float(low)), max(mean, float(high)), len(values))


def difference(metric: str, labels: Labels, first: Measurement, second: Measurement) -> Measurement:
    """How much higher the first rate is than the second, with Newcombe's hybrid-score interval from their Wilson intervals.

    low = d - sqrt((p1 - low1)^2 + (high2 - p2)^2), high likewise. It takes the rates as independent, so it is conservative
    for the same requests asked twice. Source: Newcombe 1998, method 10.
    """
    change = first.mean - second.mean
    below = ((first.mean - first.low) ** 2 + (second.high - second.mean) ** 2) ** 0.5
    above = ((first.high - first.mean) ** 2 + (second.mean - second.low) ** 2) ** 0.5
    return Measurement(metric, labels, change, change - below, change + above, min(first.n, second.n))


def exact(metric: str, labels: Labels, value: float) -> Measurement:
    """A figure without sampling error, such as a count."""
    return Measurement(metric, labels, value, value, value)


def completion_nll(bridge: TransformerBridge, batches: Sequence[Batch]) -> Float[Tensor, " n"]:
    """`completion_loss` of every example, without gradients: nats per token. Raises ValueError for no batches."""
    _some("completion_nll", batches)
    with torch.no_grad():
        return torch.cat([completion_loss(bridge, batch).cpu() for batch in batches])


def kl_under(bridge: TransformerBridge, mask: WeightMask, batches: Sequence[Batch]) -> Float[Tensor, " n"]:
    """KL(unpruned || masked) of the next-token distribution, mean over all real positions of each example; nats.

    Raises ValueError for no batches, and as `masked`.
    """
    _some("kl_under", batches)
    values = []
    with torch.no_grad():
        for batch in batches:
            tokens = batch.tokens.to(bridge.cfg.device)
            before = bridge(tokens)
            with masked(bridge, mask):
                after = bridge(tokens)
            # An example at a time: the distributions of a whole batch over a large vocabulary are gigabytes in float32.
            divergence = torch.stack([_divergence(*both) for both in zip(before, after, strict=True)]).cpu()
            values.append((divergence * batch.is_token).sum(1) / batch.is_token.sum(1))
    return torch.cat(values)


def _divergence(before: Float[Tensor, "pos vocab"], after: Float[Tensor, "pos vocab"]) -> Float[Tensor, " pos"]:
    first, second = before.float().log_softmax(-1), after.float().log_softmax(-1)
    return (first.exp() * (first - second)).sum(-1)


def perplexity(bridge: TransformerBridge, batches: Sequence[Batch], labels: Labels) -> Measurement:
    """exp of the mean NLL per token over windows of plain text (see `tokenize_text`), with its bootstrap interval over
    them.

    Raises ValueError for no batches.
    """
    nll = completion_nll(bridge, batches)
    found = average("perplexity", labels, nll, range(len(nll)))
    return replace(found, mean=exp(found.mean), low=exp(found.low), high=exp(found.high))


def answer_log_odds(
    bridge: TransformerBridge, prompts: PromptSet, yes: Sequence[str], no: Sequence[str], *, template: Template = "chat"
) -> Float[Tensor, " n"]:
    """log p(first answer token in `yes`) - log p(in `no`) of each request; nats.

    Words count by their first token. Raises ValueError for no prompts, and as `choice_tokens`.
    """
    _some("answer_log_odds", prompts.examples)
    yes_ids, no_ids = choice_tokens(bridge.tokenizer, yes, no)
    contexts = [prompt_ids(example.prompt, bridge.tokenizer, template) for example in prompts]
    values = []
    for start in range(0, len(contexts), 64):
        rows = [torch.tensor(context) for context in contexts[start : start + 64]]
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(bridge.cfg.device)
        last = torch.tensor([len(row) - 1 for row in rows])
        with torch.no_grad():
            positions, column = last.unique(return_inverse=True)
            logits = logits_at(bridge, tokens, positions)[torch.arange(len(rows)), column].float()
        values.append(logits[:, yes_ids].logsumexp(1) - logits[:, no_ids].logsumexp(1))
    return torch.cat(values).cpu()


def auroc(values: Float[Tensor, " n"], is_positive: Bool[Tensor, " n"]) -> float:
    """Chance that a positive's value exceeds a negative's, ties counted half: the area under the ROC curve.

    Raises ValueError unless there is at least one of each.
    """
    n_positive, n = int(is_positive.sum()), len(is_positive)
    if not 0 < n_positive < n:
        raise ValueError(f"auroc: {n_positive} positives among {n}; expected at least one of each kind")
    ranks = rankdata(values.cpu().numpy())[is_positive.cpu().numpy()].sum()
    return float((ranks - n_positive * (n_positive + 1) / 2) / (n_positive * (n - n_positive)))


def auroc_over(
    metric: str, labels: Labels, values: Float[Tensor, " n"], is_positive: Bool[Tensor, " n"], groups: Sequence[Hashable]
) -> Measurement:
    """`auroc` with a percentile bootstrap interval that resamples whole groups (200 resamples, seed 0).

    Every group must hold positives and negatives in the same proportion, as matched pairs do. Raises ValueError for no
    examples, or groups that are not one a value.
    """
    _check(metric, values, groups)
    _, member = np.unique([str(group) for group in groups], return_inverse=True)
    rows = [torch.from_numpy(np.flatnonzero(member == number)) for number in range(member.max() + 1)]
    generator = np.random.default_rng(0)
    draws = [torch.cat([rows[i] for i in generator.integers(len(rows), size=len(rows))]) for _ in range(200)]
    low, high = np.quantile([auroc(values[draw], is_positive[draw]) for draw in draws], [0.025, 0.975])
    mean = auroc(values, is_positive)
    return Measurement(metric, labels, mean, min(mean, float(low)), max(mean, float(high)), len(values))


def predicted_change(scores: WeightScores, mask: WeightMask) -> float:
    """First-order prediction of the change of the objective under the mask: the sum of `removal_effect` over it."""
    return sum(scores.values[name].flatten()[index].double().sum().item() for name, index in mask.removed.items())


def _some(what: str, values: Sequence[Any]) -> None:
    if not len(values):
        raise ValueError(f"{what}: nothing to measure; expected at least one")


def _check(metric: str, values: Sequence[Any] | Tensor, groups: Sequence[Hashable]) -> None:
    if not len(values):
        raise ValueError(f"{metric}: no examples to measure; expected at least one")
    if len(groups) != len(values):
        raise ValueError(f"{metric}: {len(groups)} groups for {len(values)} values; give one for each")
