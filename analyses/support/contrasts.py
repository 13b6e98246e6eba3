"""Pairs of texts that differ in one thing, and what TransformerLens' tools of analysis say of them."""

import copy
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from harmcircuits.circuits.masks import WeightMask
from harmcircuits.hooks.bridge import Bridge
from harmcircuits.hooks.masking import masked_if_given


@dataclass(frozen=True)
class Contrast:
    """Pairs of texts whose tokens align, and the words that tell them apart."""

    clean: Int[Tensor, "n pos"]
    corrupt: Int[Tensor, "n pos"]
    positions: tuple[int, ...]
    wanted: Int[Tensor, "n positions words"]
    other: Int[Tensor, "n positions words"]

    def metric(self, index: int, logits: Float[Tensor, "1 pos vocab"]) -> Float[Tensor, ""]:
        """The logit difference of one pair, mean over positions and words."""
        at = logits[0, list(self.positions)]
        wanted = at.gather(1, self.wanted[index].to(at.device)).mean()
        return wanted - at.gather(1, self.other[index].to(at.device)).mean()


def node_effects(bridge: Bridge, contrast: Contrast) -> Float[Tensor, "n layer node pos"]:
    """First-order effect of every node on each pair's metric, in logits: attribution patching."""
    from transformer_lens.tools.analysis import attribution_patch

    n_layers, n_heads = bridge.cfg.n_layers, bridge.cfg.n_heads
    n_pairs, n_positions = contrast.clean.shape
    effects = torch.zeros(n_pairs, n_layers, n_heads + 1, n_positions)
    # The tool averages over the texts that it is given, so it gets one pair at a time.
    for index in range(n_pairs):
        clean = contrast.clean[index : index + 1].to(bridge.cfg.device)
        corrupt = contrast.corrupt[index : index + 1].to(bridge.cfg.device)

        def metric(logits: Tensor, of: int = index) -> Tensor:
            return contrast.metric(of, logits)

        scores = attribution_patch(bridge, clean, corrupt, metric).node_scores
        for node, score in scores.items():
            if node.layer is not None:
                number = n_heads if node.head is None else node.head
                effects[index, node.layer, number, node.position] = score
    return effects


def written_logits(
    bridge: Bridge,
    contrast: Contrast,
    mask: WeightMask | None = None,
) -> tuple[list[str], Float[Tensor, "component n"]]:
    """What each component writes of the metric on the clean texts: direct logit attribution."""
    from transformer_lens.tools.analysis import direct_logit_attribution

    with masked_if_given(bridge, mask):
        folded = copy.deepcopy(bridge)
    folded.enable_compatibility_mode()
    with torch.no_grad():
        _, cache = folded.run_with_cache(contrast.clean.to(bridge.cfg.device))
        parts = []
        for place, position in enumerate(contrast.positions):
            for word in range(contrast.wanted.shape[2]):
                part = direct_logit_attribution(
                    folded,
                    cache=cache,
                    answer_tokens=contrast.wanted[:, place, word].to(bridge.cfg.device),
                    incorrect_tokens=contrast.other[:, place, word].to(bridge.cfg.device),
                    pos=position,
                )
                parts.append(part)
    names = [label.replace("_out", "").replace("_", " ") for label in parts[0].labels]
    return names, torch.stack([part.attribution for part in parts]).mean(0).cpu()
