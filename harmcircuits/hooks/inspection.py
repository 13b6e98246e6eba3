"""Arrays for views: what a mask does to each token's probability, and where heads attend."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from harmcircuits.circuits.masks import WeightMask
from harmcircuits.hooks.bridge import AnyModel, Bridge, as_bridge
from harmcircuits.hooks.masking import masked
from harmcircuits.hooks.objectives import token_losses
from harmcircuits.prompts import Batch


def token_changes(bridge: AnyModel, mask: WeightMask, batch: Batch) -> Float[Tensor, "batch pos"]:
    """What the mask does to each token's log-probability, in nats; below zero: less likely.

    The first token, which nothing predicts, counts 0.

    Args:
        bridge: the model.
        mask: the weights to remove.
        batch: the texts.

    Raises:
        ValueError: as `masked`.
    """
    bridge = as_bridge(bridge)
    with torch.no_grad():
        before = token_losses(bridge, batch)
        with masked(bridge, mask):
            after = token_losses(bridge, batch)
    first = torch.zeros(len(batch), 1)
    return torch.cat([first, (before - after).cpu()], dim=1)


def attention_patterns(
    bridge: AnyModel, batch: Batch, heads: Sequence[tuple[int, int]]
) -> Float[Tensor, "head pos pos"]:
    """Attention of some heads on the first example, without padding; inside `masked`, the mask's.

    Args:
        bridge: the model.
        batch: the texts.
        heads: (layer, head) of each.
    """
    bridge = as_bridge(bridge)
    tokens = batch.tokens[:1, : int(batch.is_token[0].sum())]
    names = {f"blocks.{layer}.attn.hook_pattern" for layer, _ in heads}
    with torch.no_grad():
        _, cache = bridge.run_with_cache(
            tokens.to(bridge.cfg.device), names_filter=lambda name: name in names
        )
    patterns = []
    for layer, head in heads:
        patterns.append(cache[f"blocks.{layer}.attn.hook_pattern"][0, head].cpu())
    return torch.stack(patterns)


def token_texts(bridge: Bridge, batch: Batch, example: int = 0) -> list[str]:
    """The tokens of an example as the tokenizer writes them, without padding."""
    real = batch.tokens[example][batch.is_token[example]]
    return bridge.tokenizer.convert_ids_to_tokens(real.tolist())
