"""Attacks that elicit harm from a model that refuses: what a mask has to withstand.

Three more need no code of their own: prefilling is `Behaviour.prefill`, harmful fine-tuning is `fine_tuning` on harmful
answers, and combinations are these under one another.
"""

from collections.abc import Sequence

from transformer_lens.model_bridge import TransformerBridge

from harmcircuits.circuits.masks import Scope, WeightMask, top_fraction
from harmcircuits.hooks.attribution import sensitivity
from harmcircuits.hooks.objectives import completion_loss
from harmcircuits.prompts import Batch


def refusal_ablation(
    bridge: TransformerBridge,
    refusals: Sequence[Batch],
    benign: Sequence[Batch],
    *,
    q: float = 0.01,
    p: float = 0.01,
    within: Scope = "weight",
) -> WeightMask:
    """The weights whose removal makes a model stop refusing: top_q(sensitivity on refusals) - top_p(on benign answers).

    An unsigned set difference, so fewer than a share `q` of the weights is left; the defaults are the published ones.
    Score the model as the attacker finds it: under a mask, that is inside `masked`. Source: arXiv 2402.05162, section on
    set difference. Raises ValueError for no batches, and as `top_fraction`.
    """
    refusal, kept = (sensitivity(bridge, batches, completion_loss) for batches in (refusals, benign))
    return top_fraction(refusal, q, within=within) - top_fraction(kept, p, within=within)
