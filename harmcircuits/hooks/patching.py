"""Activation patching between a model and itself under a mask."""

from collections.abc import Hashable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm

from harmcircuits.batches import Batch
from harmcircuits.circuits.masks import WeightMask
from harmcircuits.display import listed
from harmcircuits.hooks.bridge import AnyModel, Bridge, as_bridge, evaluating
from harmcircuits.hooks.checks import refuse_batches, refuse_not_finite
from harmcircuits.hooks.masking import masked
from harmcircuits.hooks.objectives import PerExample, completion_loss
from harmcircuits.measurements import N_RESAMPLES, Label, Labels, Measurement, Rows

COMPONENTS = ("residual", "attention", "mlp", "head")
LEAST_GAP = 0.05  # nats per token; the share of a smaller gap would be noise


class PatchPoint(NamedTuple):
    """A hook point and the labels of its rows, which name the part that is patched."""

    hook: str
    labels: dict[str, Label]

    @property
    def part(self) -> tuple[Any, ...]:
        """The index of the part in [batch pos d], or of a head in [batch pos head d_head]."""
        if "head" in self.labels:
            return ..., self.labels["head"], slice(None)
        if self.labels["position"] == "all":
            return (...,)
        return slice(None), self.labels["position"]


def activation_patching(
    bridge: AnyModel,
    mask: WeightMask,
    batch: Batch,
    *,
    parts: Iterable[str] = COMPONENTS,
    layers: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    groups: Sequence[Hashable] = (),
    labels: Labels | None = None,
    least_gap: float = LEAST_GAP,
    progress: bool = False,
) -> Rows:
    """The loss of the model when one activation comes from the other side of a mask.

    *Restore*: the masked model gets activations of the unpruned model. *Destroy*: the unpruned
    model gets activations of the masked model. With the loss L, a mean over the target tokens of an
    example and then over examples,

        patch_share = (L_patched - L_start) / (L_end - L_start)

    is 0 at the model that gets the activation and 1 at the model that gives it. It may leave
    [0, 1].

    Rows; the last two metrics have the label `direction`:
        reference_nll: L by `state`, "unpruned" or "masked".
        nll_gap: how much the mask raises L.
        patch_change: L_patched - L_start, in nats per token, by `component`, `layer`, `position`
            (its number, or "all" at once) and `head`.
        patch_share: the same as a share of the gap. Its interval resamples both together. Absent
            where the gap is below `least_gap`.

    Positions count from the start of the text, so they should mean the same in every example: give
    one request, or several whose requests and answers are equally long. Patches of all positions at
    once, and of heads, need no alignment.

    >>> mask = hc.top_fraction(hc.removal_effect(bridge, harm), 0.002, within="model")
    >>> rows = hc.activation_patching(bridge, mask, harm[0], parts=["residual"], positions=[])
    >>> shares = rows.where("patch_share", direction="restore")
    >>> [f"{row.labels['layer']}: {row.mean:.0%}" for row in shares]
    ['0 pre: 0%', ..., '3 post: 100%']

    Args:
        bridge: the model.
        mask: the weights to remove.
        batch: requests with answers; the loss is that of the answers.
        parts: "residual" (before a layer, between attention and MLP where one follows the other,
            after the last layer), "attention" and "mlp" (their outputs), "head" (its part of the
            input of the output weights, as in TransformerLens, so that edits of these weights act).
        layers: numbers of the blocks; all by default.
        positions: numbers of the positions to patch one by one; all by default.
        groups: the group of each example, such as its topic; a group is resampled as a whole. By
            default each example is a group.
        labels: further labels of the rows.
        least_gap: the smallest gap, in nats per token, whose shares are computed.
        progress: whether to show a bar.

    Raises:
        ValueError: unknown parts, not exactly one group for each example, and as `masked`.
    """
    bridge = as_bridge(bridge)
    refuse_batches("activation_patching", bridge, [batch])
    groups = groups or range(len(batch))
    labels = labels or {}
    layers = range(len(bridge.blocks)) if layers is None else layers
    positions = range(batch.tokens.shape[1]) if positions is None else positions
    points = _points(bridge, list(parts), layers, positions)
    tokens = batch.tokens.to(bridge.cfg.device)
    # All activations of a large model would not fit in memory.
    hooks = list({point.hook for point in points})
    run = partial(bridge.run_with_cache, tokens, names_filter=hooks)
    sweep = partial(_sweep, bridge, batch, points, progress)

    # A patch writes in place, and gradients must be off. TransformerLens's `resid_mid` is the input
    # of the second norm, and the skip connection past the MLP gets the patch only if the tensor
    # itself changes. With gradients the tensor is cloned first, and only the MLP gets the patch.
    with torch.no_grad(), evaluating(bridge):
        logits, unpruned = run()
        unpruned_nll = answer_losses(logits, batch)
        with masked(bridge, mask):
            logits, edited = run()
            masked_nll = answer_losses(logits, batch)
            refuse_not_finite(
                [batch, batch], torch.cat([unpruned_nll, masked_nll]), completion_loss
            )
            restore = sweep(unpruned)
        destroy = sweep(edited)

    rows = []
    for state, losses in {"unpruned": unpruned_nll, "masked": masked_nll}.items():
        place = {**labels, "state": state}
        rows.append(Measurement.average("reference_nll", place, losses, groups))
    gap = Measurement.average("nll_gap", labels, masked_nll - unpruned_nll, groups)
    rows.append(gap)
    sweeps = {
        "restore": (restore, masked_nll, unpruned_nll),
        "destroy": (destroy, unpruned_nll, masked_nll),
    }
    for direction, (sweep_losses, start, end) in sweeps.items():
        for point, losses in zip(points, sweep_losses, strict=True):
            place = {**labels, "direction": direction, **point.labels}
            change = losses - start
            rows.append(Measurement.average("patch_change", place, change, groups))
            if abs(gap.mean) >= least_gap:
                rows.append(_share(place, change, end - start, groups))
    return Rows(rows)


def answer_losses(logits: Float[Tensor, "batch pos vocab"], batch: Batch) -> PerExample:
    """`completion_loss` of each example, from the logits of all its tokens."""
    tokens = batch.tokens[:, 1:].to(logits.device)
    is_target = batch.is_target[:, 1:].to(logits.device)
    predictions = logits[:, :-1].float().transpose(1, 2)
    losses = functional.cross_entropy(predictions, tokens, reduction="none")
    total = (losses * is_target).sum(dim=1)
    return total / is_target.sum(dim=1)


def _points(
    bridge: Bridge,
    components: list[str],
    layers: Sequence[int],
    positions: Sequence[int],
) -> list[PatchPoint]:
    """The points of these components, layer by layer."""
    if not components or not set(components) <= set(COMPONENTS):
        raise ValueError(
            f"activation_patching: parts={components}; expected some of {listed(COMPONENTS)}"
        )
    whole = [{"position": position} for position in (*positions, "all")]
    heads = [{"head": head, "position": "all"} for head in range(bridge.cfg.n_heads)]
    places = dict.fromkeys(components, whole)
    if "head" in components:
        places["head"] = heads
    points = []
    for layer in layers:
        for component, title, hook in _hooks(bridge, layer):
            for place in places.get(component, []):
                labels = {"component": component, "layer": title, **place}
                points.append(PatchPoint(hook, labels))
    return points


def _hooks(bridge: Bridge, layer: int) -> Iterator[tuple[str, str, str]]:
    """The component, the label and the name of each hook point of a layer."""
    block = f"blocks.{layer}"
    yield "residual", f"{layer} pre", f"{block}.hook_resid_pre"
    # Where attention and MLP read the same stream, nothing is between them.
    if f"{block}.hook_resid_mid" in bridge.hook_dict:
        yield "residual", f"{layer} mid", f"{block}.hook_resid_mid"
    # The stream after any other layer is the stream before the next layer.
    if layer == len(bridge.blocks) - 1:
        yield "residual", f"{layer} post", f"{block}.hook_resid_post"
    yield "attention", f"{layer}", f"{block}.hook_attn_out"
    yield "mlp", f"{layer}", f"{block}.hook_mlp_out"
    yield "head", f"{layer}", f"{block}.attn.hook_z"


def _sweep(
    bridge: Bridge,
    batch: Batch,
    points: Sequence[PatchPoint],
    progress: bool,
    source: Any,
) -> list[PerExample]:
    """The losses under each patch of an activation of the source, in the model's current state."""
    tokens = batch.tokens.to(bridge.cfg.device)
    losses = []
    for point in tqdm(points, desc="patches", disable=not progress, leave=False):
        hook = partial(_write, source=source[point.hook], index=point.part)
        with bridge.hooks(fwd_hooks=[(point.hook, hook)]):
            losses.append(answer_losses(bridge(tokens), batch))
    return losses


def _write(value: Tensor, hook: Any, source: Tensor, index: tuple[Any, ...]) -> None:
    value[index] = source[index]


def _share(
    labels: Labels,
    change: PerExample,
    gap: PerExample,
    groups: Sequence[Hashable],
) -> Measurement:
    """A change as a share of the gap, a ratio of means, with its bootstrap interval."""
    names = [str(group) for group in groups]
    _, member = np.unique(names, return_inverse=True)
    changes = np.bincount(member, change.cpu().double())
    gaps = np.bincount(member, gap.cpu().double())
    mean = float(changes.sum() / gaps.sum())

    generator = np.random.default_rng(0)
    index = generator.integers(len(gaps), size=(N_RESAMPLES, len(gaps)))
    totals = gaps[index].sum(axis=1)
    draws = changes[index].sum(axis=1) / totals
    return Measurement.from_draws(
        "patch_share",
        labels,
        draws,
        mean=mean + 0.0,  # a negative zero would be shown as -0
        n=len(change),
        n_groups=len(gaps),
    )
