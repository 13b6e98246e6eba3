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


def token_changes(
    bridge: AnyModel,
    mask: WeightMask,
    batch: Batch,
) -> Float[Tensor, "batch pos"]:
    """The change that the mask makes to each token's log-probability, in nats.

    Below zero: the token becomes less likely. The first token is predicted by nothing and gets 0.

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
    # A loss is minus a log-probability, hence the order of the difference.
    change = (before - after).cpu()
    of_first = torch.zeros(len(batch), 1)
    return torch.cat([of_first, change], dim=1)


def attention_patterns(
    bridge: AnyModel,
    batch: Batch,
    heads: Sequence[tuple[int, int]],
) -> Float[Tensor, "head pos pos"]:
    """Attention of some heads on the first example, without padding.

    Inside `masked` it is the attention of the edited model.

    Args:
        bridge: the model.
        batch: the texts.
        heads: (layer, head) of each.
    """
    bridge = as_bridge(bridge)
    n_tokens = int(batch.is_token[0].sum())
    tokens = batch.tokens[:1, :n_tokens].to(bridge.cfg.device)
    names = {_pattern_name(layer) for layer, _ in heads}
    with torch.no_grad():
        # Only these are kept: all activations of a large model would not fit in memory.
        _, cache = bridge.run_with_cache(tokens, names_filter=lambda name: name in names)

    patterns = []
    for layer, head in heads:
        pattern = cache[_pattern_name(layer)]  # [batch, head, pos, pos]
        patterns.append(pattern[0, head].cpu())
    return torch.stack(patterns)


def token_texts(bridge: Bridge, batch: Batch, example: int = 0) -> list[str]:
    """The tokens of an example as the tokenizer writes them, without padding."""
    is_token = batch.is_token[example]
    tokens = batch.tokens[example][is_token]
    return bridge.tokenizer.convert_ids_to_tokens(tokens.tolist())


def _pattern_name(layer: int) -> str:
    return f"blocks.{layer}.attn.hook_pattern"
