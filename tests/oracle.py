"""Scores and overlap, written to be read.

Scores are plain autograd, one example at a time, without padding; every architecture must agree with
them (`tests/search/test_attribution.py`). They use the library's names of the weights and the meaning
of their axes, and the hook points of TransformerLens.
"""

from collections.abc import Iterator, Sequence
from itertools import product

import torch
from torch import Tensor

from harmcircuits.batches import Batch
from harmcircuits.circuits.masks import WeightMask
from harmcircuits.hooks.bridge import Bridge
from harmcircuits.hooks.weights import named_weights, weight_sites

Values = dict[str, Tensor]

# Scores


def examples(batches: Sequence[Batch]) -> Iterator[tuple[Tensor, Tensor]]:
    """The tokens [1 pos] of each example without its padding, and which of them are targets."""
    for batch in batches:
        for row in range(len(batch)):
            end = int(batch.is_target[row].nonzero().max()) + 1
            yield batch.tokens[row : row + 1, :end], batch.is_target[row, :end]


def loss(bridge: Bridge, tokens: Tensor, is_target: Tensor) -> Tensor:
    """L = -(1/T) sum over the T target tokens of log p(token | tokens before it)."""
    log_p = bridge(tokens)[0].log_softmax(dim=-1)
    terms = []
    for position in is_target.nonzero().flatten().tolist():
        terms.append(-log_p[position - 1, tokens[0, position]])
    return torch.stack(terms).mean()


def gradients(bridge: Bridge, batches: Sequence[Batch]) -> list[Values]:
    """dL/dW of every example, by the name of the weight."""
    weights = named_weights(bridge)
    example_gradients = []
    for tokens, is_target in examples(batches):
        value = loss(bridge, tokens, is_target)
        weight_gradients = torch.autograd.grad(value, list(weights.values()))
        example_gradients.append(dict(zip(weights, weight_gradients, strict=True)))
    return example_gradients


def removal_effect(bridge: Bridge, example_gradients: Sequence[Values]) -> Values:
    """-W * mean over examples of dL/dW."""
    scores = {}
    for name, weight in named_weights(bridge).items():
        mean = torch.stack([gradients[name] for gradients in example_gradients]).mean(dim=0)
        scores[name] = -weight.detach() * mean
    return scores


def snip_scores(bridge: Bridge, example_gradients: Sequence[Values], average: str) -> Values:
    """|W| * mean of |dL/dW| ("after_abs"), or |W * mean of dL/dW| ("before_abs")."""
    if average == "before_abs":
        scores = removal_effect(bridge, example_gradients)
        return {name: value.abs() for name, value in scores.items()}
    scores = {}
    for name, weight in named_weights(bridge).items():
        mean = torch.stack([gradients[name].abs() for gradients in example_gradients]).mean(dim=0)
        scores[name] = weight.detach().abs() * mean
    return scores


def token_price(
    bridge: Bridge, batches: Sequence[Batch], example_gradients: Sequence[Values]
) -> Values:
    """|W| * mean over examples of the sum over positions t of |g_t| |x_t|^T.

    x is a matrix's input and g the loss's gradient at its output. Experts and routers, which have
    no hook points, have |W| * mean of |dL/dW|.
    """
    sites = weight_sites(bridge)
    price = snip_scores(bridge, example_gradients, "after_abs")
    for name, site in sites.items():
        if site.is_hooked:
            price[name] = torch.zeros_like(price[name])
    hooked = [site for site in sites.values() if site.is_hooked]
    inputs, outputs = {}, {}
    forward = [(site.hook_in, lambda x, hook: inputs.update({hook.name: x})) for site in hooked]
    backward = [(site.hook_out, lambda g, hook: outputs.update({hook.name: g})) for site in hooked]
    n_examples = sum(map(len, batches))
    for tokens, is_target in examples(batches):
        with bridge.hooks(fwd_hooks=forward, bwd_hooks=backward):
            loss(bridge, tokens, is_target).backward()
        for site in hooked:
            x, g = inputs[site.hook_in].detach().flatten(2)[0], outputs[site.hook_out].flatten(2)[0]
            for position in range(len(x)):
                # As the weight is stored: its rows are outputs, or inputs.
                part = torch.outer(g[position], x[position]).abs()
                part = part if site.input_axis == 1 else part.T
                price[site.name] += site.parameter.detach().abs() * part / n_examples
    for parameter in bridge.parameters():
        parameter.grad = None
    return price


def wanda_scores(bridge: Bridge, batches: Sequence[Batch]) -> Values:
    """|W_oi| * square root of the mean over all real tokens of x_i squared."""
    inputs: dict[str, list[Tensor]] = {}
    for tokens, _ in examples(batches):
        _, cache = bridge.run_with_cache(tokens)
        for name, site in weight_sites(bridge).items():
            inputs.setdefault(name, []).append(cache[site.hook_in].flatten(2)[0])
    scores = {}
    for name, site in weight_sites(bridge).items():
        rms = torch.cat(inputs[name]).square().mean(dim=0).sqrt()
        scores[name] = site.parameter.abs() * (rms if site.input_axis == 1 else rms[:, None])
    return {name: value.detach() for name, value in scores.items()}


# Overlap: the weights that two masks share, and the number that they share by chance


def removed_weights(mask: WeightMask) -> set[tuple[str, int]]:
    """Every weight that a mask removes: the name of its matrix, and its place there."""
    weights = set()
    for name, index in mask.removed.items():
        for place in index.tolist():
            weights.add((name, place))
    return weights


def shared_by_chance(mask: WeightMask, second_mask: WeightMask) -> float:
    """How many weights two random masks share that remove as many of each matrix.

    A weight is in a mask with the mask's share of its matrix, and in both with their product.
    """
    n_shared = 0.0
    for name in mask.shapes:
        first, second = mask.dense(name).double(), second_mask.dense(name).double()
        n_shared += first.numel() * first.mean().item() * second.mean().item()
    return n_shared


def shared_by_rows_and_columns(mask: WeightMask, second_mask: WeightMask) -> float:
    """How many weights two random masks share that remove as many of each row and each column.

    For matrices of a dozen weights, since all such masks are listed. The two are independent.
    """
    n_shared = 0.0
    for name in mask.shapes:
        first = torch.stack(all_like(mask.dense(name).long())).double().mean(dim=0)
        second = torch.stack(all_like(second_mask.dense(name).long())).double().mean(dim=0)
        n_shared += (first * second).sum().item()
    return n_shared


def all_like(dense: Tensor) -> list[Tensor]:
    """All matrices of zeros and ones with the sums of this one's rows and of its columns."""
    matrices = []
    for bits in product((0, 1), repeat=dense.numel()):
        matrix = torch.tensor(bits).view(dense.shape)
        if torch.equal(matrix.sum(0), dense.sum(0)) and torch.equal(matrix.sum(1), dense.sum(1)):
            matrices.append(matrix)
    return matrices
