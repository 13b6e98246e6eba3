"""Arrays for plots: token and prediction changes under a mask, attention, neurons, residuals."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from harmcircuits.batches import Batch
from harmcircuits.circuits.masks import WeightMask
from harmcircuits.hooks.bridge import AnyModel, Bridge, as_bridge, evaluating, right_padded
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
    # A loss is minus a log-probability.
    change = _mask_effect(bridge, mask, lambda: -token_losses(bridge, batch))
    first = torch.zeros(len(batch), 1)  # nothing predicts the first token
    return torch.cat([first, change], dim=1)


def prediction_changes(
    bridge: AnyModel,
    mask: WeightMask,
    batch: Batch,
) -> Float[Tensor, "pos vocab"]:
    """The change that the mask makes to next-token probabilities, on the first example."""
    bridge = as_bridge(bridge)
    tokens = _first_text(bridge, batch)
    return _mask_effect(bridge, mask, lambda: bridge(tokens)[0].float().softmax(dim=-1))


def _mask_effect(bridge: Bridge, mask: WeightMask, value: Callable[[], Tensor]) -> Tensor:
    """A value of the model under the mask, minus the value without the mask."""
    with torch.no_grad(), evaluating(bridge):
        unpruned = value()
        with masked(bridge, mask):
            pruned = value()
    return (pruned - unpruned).cpu()


def attention_patterns(
    bridge: AnyModel,
    batch: Batch,
    heads: Sequence[tuple[int, int]],
) -> Float[Tensor, "head pos pos"]:
    """The attention of (layer, head) pairs on the first example, without padding."""
    return _activations(bridge, batch, heads, "attn.hook_pattern", axis=0)


def neuron_activations(
    bridge: AnyModel,
    batch: Batch,
    neurons: Sequence[tuple[int, int]],
) -> Float[Tensor, "neuron pos"]:
    """What (layer, neuron) pairs give to the output weights, on the first example, float32."""
    return _activations(bridge, batch, neurons, "mlp.out.hook_in", axis=1).float()


def _activations(
    bridge: AnyModel,
    batch: Batch,
    units: Sequence[tuple[int, int]],
    hook: str,
    axis: int,
) -> Tensor:
    """The activations of (layer, unit) pairs at a hook point of their blocks, by unit."""
    bridge = as_bridge(bridge)
    tokens = _first_text(bridge, batch)
    names = [f"blocks.{layer}.{hook}" for layer, _ in units]
    with torch.no_grad(), evaluating(bridge):
        # All activations of a large model would not fit in memory.
        _, cache = bridge.run_with_cache(tokens, names_filter=names)

    activations = []
    for name, (_, unit) in zip(names, units, strict=True):
        activation = cache[name][0]  # [head, pos, pos] or [pos, neuron]
        activations.append(activation.select(axis, unit).cpu())
    return torch.stack(activations)


def mean_residual(
    bridge: AnyModel,
    rows: Sequence[Sequence[int]],
    layers: Sequence[int],
    *,
    skip: int = 0,
    batch_size: int = 16,
) -> Float[Tensor, "n layer d_model"]:
    """The residual stream after these blocks, averaged over each text's tokens, in float32."""
    bridge = as_bridge(bridge)
    if not rows:
        return torch.empty(0, len(layers), bridge.cfg.d_model)
    refuse_requests("mean_residual: text", bridge, rows)
    residuals: dict[int, Tensor] = {}

    def save(value: Tensor, hook: Any, layer: int) -> None:
        residuals[layer] = value.float().cpu()

    hooks = [(f"blocks.{layer}.hook_out", partial(save, layer=layer)) for layer in layers]
    # The pass ends after the last of these blocks: the unembedding costs as much as blocks.
    n_read = max(layers) + 1
    stop = n_read if n_read < len(bridge.blocks) else None

    means = []
    for tokens, lengths in right_padded(bridge, rows, batch_size):
        with torch.no_grad(), evaluating(bridge), bridge.hooks(fwd_hooks=hooks):
            bridge(tokens, stop_at_layer=stop)
        residual = torch.stack([residuals[layer] for layer in layers])

        position = torch.arange(tokens.shape[1])
        is_text = position < lengths[:, None]  # [batch, pos]
        is_counted = is_text & (position >= skip)
        n_counted = is_counted.sum(dim=1, keepdim=True)
        weights = is_counted / n_counted  # NaN where no token counts
        mean = einsum(residual, weights, "layer batch pos d, batch pos -> batch layer d")
        means.append(mean)

    mean = torch.cat(means)
    is_finite = mean.flatten(1).isfinite().all(dim=1)
    names = [f"mean_residual: text {number}" for number in range(len(rows))]
    refuse_not_finite_texts(names, is_finite)
    return mean


def token_texts(bridge: Bridge, batch: Batch, example: int = 0) -> list[str]:
    """The tokens of an example as the tokenizer writes them, without padding."""
    is_token = batch.is_token[example]
    tokens = batch.tokens[example][is_token]
    return bridge.tokenizer.convert_ids_to_tokens(tokens.tolist())


def vocabulary(bridge: AnyModel) -> list[str]:
    """Every token that the model predicts, as the tokenizer writes it."""
    bridge = as_bridge(bridge)
    d_vocab = bridge.cfg.d_vocab
    n_tokens = min(len(bridge.tokenizer), d_vocab)
    texts = bridge.tokenizer.convert_ids_to_tokens(list(range(n_tokens)))
    # Embeddings often have more rows than tokens, up to a round number.
    return texts + [f"[{number}]" for number in range(n_tokens, d_vocab)]


def _first_text(bridge: Bridge, batch: Batch) -> Int[Tensor, "1 pos"]:
    """The tokens of the first example without padding, on the model's device."""
    refuse_batches("the first example", bridge, [batch])
    n_tokens = int(batch.is_token[0].sum())
    return batch.tokens[:1, :n_tokens].to(bridge.cfg.device)
