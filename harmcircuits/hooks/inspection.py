"""Arrays of a live model: what a mask does to each token, where heads attend, what neurons do."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from harmcircuits.circuits.masks import WeightMask
from harmcircuits.hooks.bridge import AnyModel, Bridge, as_bridge
from harmcircuits.hooks.capacity import refuse_batches, refuse_requests
from harmcircuits.hooks.finite import refuse_not_finite_answers
from harmcircuits.hooks.masking import masked
from harmcircuits.hooks.objectives import token_losses
from harmcircuits.prompts import Batch


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
    hooks = {layer: _neurons_hook(bridge, layer) for layer, _ in neurons}
    if not neurons:
        raise ValueError("neuron_activations: no neurons; expected at least one")
    tokens = _first_text(bridge, batch)
    with torch.no_grad():
        _, cache = bridge.run_with_cache(tokens, names_filter=lambda name: name in hooks.values())

    activations = []
    for layer, neuron in neurons:
        of_layer = cache[hooks[layer]][0]  # [pos, d_mlp]
        if not 0 <= neuron < of_layer.shape[1]:
            raise ValueError(
                f"neuron_activations: ({layer}, {neuron}); layer {layer} has neurons 0 to "
                f"{of_layer.shape[1] - 1}"
            )
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
    _refuse_unreadable(rows, layers, skip, n_layers)
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
        weights = counts / (lengths - skip)[:, None]
        stream = torch.stack([residuals[layer].float().cpu() for layer in layers])
        means.append(einsum(stream, weights, "layer batch pos d, batch pos -> batch layer d"))
    residual = torch.cat(means)
    is_finite = residual.flatten(1).isfinite().all(dim=1)
    refuse_not_finite_answers("mean_residual: text", bridge, rows, is_finite)
    return residual


def streams_before_answers(
    bridge: AnyModel, batches: Sequence[Batch]
) -> dict[str, Float[Tensor, "n d_model"]]:
    """The residual stream at the token before the first target, by depth; on the CPU."""
    bridge = as_bridge(bridge)
    last = len(bridge.blocks) - 1
    depths = {f"{layer} pre": f"blocks.{layer}.hook_resid_pre" for layer in range(last + 1)}
    depths[f"{last} post"] = f"blocks.{last}.hook_resid_post"
    # A bridge's own hooks go by another name than the one that is asked for.
    hooks = {bridge.hook_dict[name].name for name in depths.values()} | set(depths.values())

    refuse_batches("streams_before_answers", bridge, batches)
    streams: dict[str, list[Tensor]] = {depth: [] for depth in depths}
    for batch in batches:
        tokens = batch.tokens.to(bridge.cfg.device)
        with torch.no_grad():
            _, cache = bridge.run_with_cache(tokens, names_filter=lambda name: name in hooks)
        before = batch.is_target.int().argmax(1) - 1
        for depth, name in depths.items():
            streams[depth].append(cache[name][torch.arange(len(batch)), before].cpu())
    return {depth: torch.cat(values) for depth, values in streams.items()}


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


def position_names(bridge: AnyModel, batch: Batch) -> list[str]:
    """The number of each position, and the token there where it is the same in every example."""
    bridge = as_bridge(bridge)
    names = []
    for number, column in enumerate(batch.tokens.T.tolist()):
        (token,) = bridge.tokenizer.convert_ids_to_tokens(column[:1])
        names.append(f"{number} {token}" if len(set(column)) == 1 else f"{number} …")
    return names


def _refuse_unreadable(
    rows: Sequence[Sequence[int]],
    layers: Sequence[int],
    skip: int,
    n_layers: int,
) -> None:
    unknown = [layer for layer in layers if not 0 <= layer < n_layers]
    if unknown or not layers:
        raise ValueError(
            f"mean_residual: layers={list(layers)}; expected some of 0 to {n_layers - 1}"
        )
    for number, row in enumerate(rows):
        if len(row) <= skip:
            raise ValueError(
                f"mean_residual: text {number} has {len(row)} tokens; expected more than {skip}"
            )


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


def _neurons_hook(bridge: Bridge, layer: int) -> str:
    """Where a layer's neurons are read; raises ValueError where it has none."""
    name = f"blocks.{layer}.mlp.out.hook_in"
    if name not in bridge.hook_dict:
        raise ValueError(
            f"neuron_activations: layer {layer} has no neurons (no {name}); expected a layer with "
            f"an MLP, 0 to {len(bridge.blocks) - 1}, that is not of experts"
        )
    return name


def _pattern_name(layer: int) -> str:
    return f"blocks.{layer}.attn.hook_pattern"
