"""Arrays of a live model: what a mask does to each token, where heads attend, what neurons do."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from harmcircuits.batches import Batch
from harmcircuits.circuits.masks import WeightMask
from harmcircuits.hooks.bridge import AnyModel, Bridge, as_bridge
from harmcircuits.hooks.checks import refuse_batches, refuse_not_finite_texts, refuse_requests
from harmcircuits.hooks.masking import masked
from harmcircuits.hooks.objectives import token_losses


def token_changes(
    bridge: AnyModel,
    mask: WeightMask,
    batch: Batch,
) -> Float[Tensor, "batch pos"]:
    """The change that the mask makes to each token's log-probability, in nats."""
    bridge = as_bridge(bridge)
    before, after = _without_and_with(bridge, mask, lambda: token_losses(bridge, batch))
    # A loss is minus a log-probability, hence the order of the difference.
    change = (before - after).cpu()
    of_first = torch.zeros(len(batch), 1)
    return torch.cat([of_first, change], dim=1)


def attention_patterns(
    bridge: AnyModel,
    batch: Batch,
    heads: Sequence[tuple[int, int]],
) -> Float[Tensor, "head pos pos"]:
    """Attention of some heads on the first example, without padding."""
    bridge = as_bridge(bridge)
    tokens = _first_text(bridge, batch)
    names = {_pattern_name(layer) for layer, _ in heads}
    with torch.no_grad():
        # Only these are kept: all activations of a large model would not fit in memory.
        _, cache = bridge.run_with_cache(tokens, names_filter=lambda name: name in names)

    patterns = []
    for layer, head in heads:
        pattern = cache[_pattern_name(layer)]  # [batch, head, pos, pos]
        patterns.append(pattern[0, head].cpu())
    return torch.stack(patterns)


def neuron_activations(
    bridge: AnyModel,
    batch: Batch,
    neurons: Sequence[tuple[int, int]],
) -> Float[Tensor, "neuron pos"]:
    """What some neurons hand to the output weights, on the first example without padding."""
    bridge = as_bridge(bridge)
    hooks = {layer: f"blocks.{layer}.mlp.out.hook_in" for layer, _ in neurons}
    tokens = _first_text(bridge, batch)
    with torch.no_grad():
        _, cache = bridge.run_with_cache(tokens, names_filter=lambda name: name in hooks.values())

    activations = []
    for layer, neuron in neurons:
        of_layer = cache[hooks[layer]][0]  # [pos, d_mlp]
        activations.append(of_layer[:, neuron].float().cpu())
    return torch.stack(activations)


def prediction_changes(
    bridge: AnyModel,
    mask: WeightMask,
    batch: Batch,
) -> Float[Tensor, "pos vocab"]:
    """The change that the mask makes to what is predicted after each token of the first example."""
    bridge = as_bridge(bridge)
    tokens = _first_text(bridge, batch)
    before, after = _without_and_with(
        bridge, mask, lambda: bridge(tokens)[0].float().softmax(dim=-1)
    )
    return (after - before).cpu()


def mean_residual(
    bridge: AnyModel,
    rows: Sequence[Sequence[int]],
    layers: Sequence[int],
    *,
    skip: int = 0,
    batch_size: int = 16,
) -> Float[Tensor, "n layer d_model"]:
    """The residual stream after some blocks, a mean over each text's tokens, in float32."""
    bridge = as_bridge(bridge)
    n_layers = len(bridge.blocks)
    if not rows:
        return torch.empty(0, len(layers), bridge.cfg.d_model)
    refuse_requests("mean_residual: text", bridge, rows, max_new_tokens=0)
    residuals: dict[int, Tensor] = {}

    def keep(value: Tensor, hook: Any, layer: int) -> None:
        residuals[layer] = value

    hooks = [(f"blocks.{layer}.hook_out", partial(keep, layer=layer)) for layer in layers]
    # What comes after the last of them is not computed: the unembedding costs as much as blocks.
    end = max(layers) + 1
    stop = end if end < n_layers else None
    means = []
    for start in range(0, len(rows), batch_size):
        texts = [torch.tensor(row) for row in rows[start : start + batch_size]]
        lengths = torch.tensor([len(text) for text in texts])
        # Padded on the right with any token: attention is causal, so it reaches no text.
        tokens = pad_sequence(texts, batch_first=True).to(bridge.cfg.device)
        with torch.no_grad(), bridge.hooks(fwd_hooks=hooks):
            bridge(tokens, stop_at_layer=stop)

        position = torch.arange(tokens.shape[1])
        counts = (position >= skip) & (position < lengths[:, None])  # [batch, pos]
        weights = counts / counts.sum(dim=1, keepdim=True)  # NaN for a text without any
        stream = torch.stack([residuals[layer].float().cpu() for layer in layers])
        means.append(einsum(stream, weights, "layer batch pos d, batch pos -> batch layer d"))
    residual = torch.cat(means)
    is_finite = residual.flatten(1).isfinite().all(dim=1)
    names = [f"mean_residual: text {number}" for number in range(len(rows))]
    refuse_not_finite_texts(names, is_finite)
    return residual


def token_texts(bridge: Bridge, batch: Batch, example: int = 0) -> list[str]:
    """The tokens of an example as the tokenizer writes them, without padding."""
    is_token = batch.is_token[example]
    tokens = batch.tokens[example][is_token]
    return bridge.tokenizer.convert_ids_to_tokens(tokens.tolist())


def vocabulary(bridge: AnyModel) -> list[str]:
    """Every token that the model predicts, as the tokenizer writes it."""
    bridge = as_bridge(bridge)
    n_known = len(bridge.tokenizer)
    # Embeddings are often padded to a round number.
    unknown = [f"[{number}]" for number in range(n_known, bridge.cfg.d_vocab)]
    known = range(min(n_known, bridge.cfg.d_vocab))
    return [*bridge.tokenizer.convert_ids_to_tokens(list(known)), *unknown]


def _without_and_with(
    bridge: Bridge, mask: WeightMask, value: Callable[[], Tensor]
) -> tuple[Tensor, Tensor]:
    """A value of the model as it stands, and under the mask."""
    with torch.no_grad():
        before = value()
        with masked(bridge, mask):
            after = value()
    return before, after


def _first_text(bridge: Bridge, batch: Batch) -> Int[Tensor, "1 pos"]:
    """The tokens of the first example without padding, where the model is."""
    refuse_batches("the first example", bridge, [batch])
    n_tokens = int(batch.is_token[0].sum())
    return batch.tokens[:1, :n_tokens].to(bridge.cfg.device)


def _pattern_name(layer: int) -> str:
    return f"blocks.{layer}.attn.hook_pattern"
