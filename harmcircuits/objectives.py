"""What is explained: an objective maps (model, batch) to one value per example, the lower the better."""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from transformer_lens.model_bridge import TransformerBridge

from harmcircuits.prompts import Batch

Objective = Callable[[TransformerBridge, Batch], Float[Tensor, " batch"]]


def completion_loss(bridge: TransformerBridge, batch: Batch) -> Float[Tensor, " batch"]:
    """Mean cross-entropy over the target tokens of each example, in nats per token.

    L_x = -(1/T_x) sum_{t target} log p(token_t | tokens before t). Prompt tokens and padding never count, so every
    example weighs the same whatever its length (arXiv 2604.09544, section on scores).
    """
    losses, is_target = token_losses(bridge, batch)
    return (losses * is_target).sum(dim=1) / is_target.sum(dim=1)


def token_losses(
    bridge: TransformerBridge, batch: Batch
) -> tuple[Float[Tensor, "batch pos-1"], Float[Tensor, "batch pos-1"]]:
    """Cross-entropy (nats) of every token after the first, and 1.0 where it is a target; both float32."""
    tokens = batch.tokens.to(bridge.cfg.device)
    logits = bridge(tokens)[:, :-1].float()
    losses = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    is_target = batch.is_target[:, 1:].to(losses)
    return losses.view_as(is_target), is_target
