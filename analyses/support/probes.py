"""What a linear probe reads from the residual stream, without masks and with them; as rows."""

from collections.abc import Hashable, Mapping, Sequence
from itertools import product
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from harmcircuits.batches import Batch
from harmcircuits.circuits.masks import WeightMask
from harmcircuits.hooks.bridge import Bridge
from harmcircuits.hooks.masking import masked_if_given
from harmcircuits.measurements import Labels, Measurement, Rows


def probe_rows(
    bridge: Bridge,
    batches: Sequence[Batch],
    is_positive: Bool[Tensor, " n"],
    unseen: Mapping[str, Sequence[Hashable]],
    masks: Mapping[str, WeightMask],
    labels: Labels,
) -> Rows:
    """Accuracy at the token before the answer, by `depth`, `mask` and what was left out (`unseen`)."""
    from transformer_lens.tools.analysis import fit_sparse_probe

    clusters = next(iter(unseen.values()))
    unpruned: dict[tuple[str, str], Any] = {}
    rows = Rows()
    for name, mask in {"none": None, **masks}.items():
        with masked_if_given(bridge, mask):
            streams = streams_before_answers(bridge, batches)
        for (depth, features), (split, groups) in product(streams.items(), unseen.items()):
            probe = fit_sparse_probe(
                features,
                is_positive,
                k=features.shape[1],
                groups=_numbered(groups),
                test_fraction=0.5,
                preprocess="standardize",
            )
            first = unpruned.setdefault((depth, split), probe)
            where = {**labels, "unseen": split, "mask": name, "depth": depth}
            for metric, used in (("probe_accuracy", probe), ("probe_transfer", first)):
                tested = [clusters[number] for number in used.test_indices.tolist()]
                hits = _hits(used, features, is_positive)
                rows += [Measurement.rate(metric, where, hits, tested)]
    return rows


def streams_before_answers(
    bridge: Bridge, batches: Sequence[Batch]
) -> dict[str, Float[Tensor, "n d_model"]]:
    """The residual stream at the token before the first target, by depth; on the CPU."""
    last = len(bridge.blocks) - 1
    depths = {f"{layer} pre": f"blocks.{layer}.hook_resid_pre" for layer in range(last + 1)}
    depths[f"{last} post"] = f"blocks.{last}.hook_resid_post"
    # A bridge's own hooks go by another name than the one that is asked for.
    hooks = {bridge.hook_dict[name].name for name in depths.values()} | set(depths.values())

    streams: dict[str, list[Tensor]] = {depth: [] for depth in depths}
    for batch in batches:
        tokens = batch.tokens.to(bridge.cfg.device)
        with torch.no_grad():
            _, cache = bridge.run_with_cache(tokens, names_filter=lambda name: name in hooks)
        before = batch.is_target.int().argmax(1) - 1
        for depth, name in depths.items():
            streams[depth].append(cache[name][torch.arange(len(batch)), before].cpu())
    return {depth: torch.cat(values) for depth, values in streams.items()}


def _numbered(groups: Sequence[Hashable]) -> Int[Tensor, " n"]:
    """A number for each distinct group, in the order in which they come."""
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    return torch.tensor([numbers[group] for group in groups])


def _hits(
    probe: Any, features: Float[Tensor, "n d_model"], is_positive: Bool[Tensor, " n"]
) -> list[bool]:
    """Whether the probe is right on each text that it was not fitted on."""
    test = probe.test_indices
    chosen = features[test][:, probe.selected_features].double()
    scaled = (chosen - probe.preprocess_mean) / probe.preprocess_scale
    says_positive = scaled @ probe.coefficients + probe.intercept > 0
    return (says_positive == is_positive[test]).tolist()
