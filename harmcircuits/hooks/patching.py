"""Activation patching between a model and itself under a mask."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
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
from harmcircuits.hooks.bridge import AnyModel, Bridge, as_bridge
from harmcircuits.hooks.checks import refuse_batches, refuse_not_finite
from harmcircuits.hooks.masking import masked
from harmcircuits.hooks.objectives import completion_loss
from harmcircuits.measurements import N_RESAMPLES, Label, Labels, Measurement, Rows

PARTS = ("residual", "attention", "mlp", "head")
LEAST_GAP = 0.05  # nats a token; a share of a smaller gap would be noise

Metric = Callable[[Float[Tensor, "batch pos vocab"]], Float[Tensor, " batch"]]
# Where a patch is, as labels of its row, and what it adds to the loss of each example.
Change = tuple[dict[str, Label], Float[Tensor, " batch"]]


class Point(NamedTuple):
    """Where activations are patched in one layer."""

    part: str
    layer: int
    title: str
    activation: str

    @property
    def hook(self) -> str:
        """The hook's full name."""
        from transformer_lens.utilities import get_act_name

        return get_act_name(self.activation, self.layer)


def activation_patching(
    bridge: AnyModel,
    mask: WeightMask,
    batch: Batch,
    *,
    parts: Iterable[str] = PARTS,
    layers: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    groups: Sequence[Hashable] = (),
    labels: Labels | None = None,
    least_gap: float = LEAST_GAP,
    progress: bool = False,
) -> Rows:
    """What the loss becomes when one activation comes from the other side of a mask.

    *Restore*: the masked model gets activations of the unpruned one. *Destroy*: the unpruned model
    gets activations of the masked one. With the loss L, a mean over the target tokens of an
    example and then over examples,

        patch_share = (L_patched - L_start) / (L_end - L_start)

    is 0 at the model patched into and 1 at the model patched from. It may leave [0, 1].

    Rows, with the label `direction` from the third on:
        reference_nll: L by `state`, "unpruned" or "masked".
        nll_gap: how much the mask raises it.
        patch_change: L_patched - L_start, in nats a token, by `component`, `layer`, `position` (its
            number, or "all" at once) and `head`.
        patch_share: the same as a share, whose interval resamples it with the gap; none where the
            gap is below `least_gap`.

    Positions count from the start of the text, so they should mean the same in every example: give
    one request, or several whose requests and answers are equally long. What is patched at all
    positions at once, and heads, need no alignment.

    >>> mask = hc.top_fraction(hc.removal_effect(bridge, harm), 0.002, within="model")
    >>> rows = hc.activation_patching(bridge, mask, harm[0], parts=["residual"], positions=[])
    >>> shares = rows.where("patch_share", direction="restore")
    >>> [f"{row.labels['layer']}: {row.mean:.0%}" for row in shares]
    ['0 pre: 0%', ..., '3 post: 100%']

    Args:
        bridge: the model.
        mask: the weights to remove.
        batch: requests with answers; the loss is that of the answers.
        parts: "residual" (before a layer, between attention and MLP where these follow each other,
            after the last), "attention" and "mlp" (what each adds), "head" (before the output
            weights, as TransformerLens does, so that edits of these stay).
        layers: numbers of the blocks; all by default.
        positions: numbers of the positions patched one by one; all by default.
        groups: what each example is about, to be resampled together; by default each by itself.
        labels: what the rows carry besides.
        least_gap: in nats a token.
        progress: whether to show a bar.

    Raises:
        ValueError: unknown parts, not exactly one group for each example, and
            as `masked`.
    """
    bridge = as_bridge(bridge)
    refuse_batches("activation_patching", bridge, [batch])
    groups = list(groups) or list(range(len(batch)))
    points = _points(bridge, list(parts), layers)
    numbers = range(batch.tokens.shape[1]) if positions is None else positions
    tokens, metric = batch.tokens.to(bridge.cfg.device), loss_of_logits(batch)
    hooks = {point.hook for point in points}
    # Only these are kept: all activations of a large model would not fit in memory.
    of_points = {"names_filter": lambda name: name in hooks}

    # A patch writes in place, and gradients must be off: what TransformerLens calls `resid_mid` is
    # the input of the second norm, and the skip connection past the MLP sees a patch there only if
    # the tensor itself is changed. With gradients on it is cloned first, and the MLP alone sees it.
    with torch.no_grad():
        unpruned_logits, unpruned = bridge.run_with_cache(tokens, **of_points)
        before = metric(unpruned_logits)
        with masked(bridge, mask):
            masked_logits, edited = bridge.run_with_cache(tokens, **of_points)
            after = metric(masked_logits)
            refuse_not_finite([batch, batch], torch.cat([before, after]), completion_loss)
            bar = tqdm(points, desc="restore", disable=not progress, leave=False)
            restore = [*_patches(bridge, batch, unpruned, after, bar, numbers)]
        bar = tqdm(points, desc="destroy", disable=not progress, leave=False)
        destroy = [*_patches(bridge, batch, edited, before, bar, numbers)]

    labels = labels or {}
    gap = Measurement.average("nll_gap", labels, after - before, groups)
    rows = Rows()
    for state, losses in {"unpruned": before, "masked": after}.items():
        where = {**labels, "state": state}
        rows += [Measurement.average("reference_nll", where, losses, groups)]
    rows += [gap]
    ways = {"restore": (restore, before - after), "destroy": (destroy, after - before)}
    for direction, (changes, whole) in ways.items():
        for place, values in changes:
            where = {**labels, "direction": direction, **place}
            rows += [Measurement.average("patch_change", where, values, groups)]
            if abs(gap.mean) >= least_gap:
                rows += [_share(where, values, whole, groups)]
    return rows


def loss_of_logits(batch: Batch) -> Metric:
    """`completion_loss` as a metric for TransformerLens' patching: of each example, from logits."""

    def metric(logits: Float[Tensor, "batch pos vocab"]) -> Float[Tensor, " batch"]:
        tokens = batch.tokens[:, 1:].to(logits.device)
        is_target = batch.is_target[:, 1:].to(logits.device)
        predictions = logits[:, :-1].float().transpose(1, 2)
        losses = functional.cross_entropy(predictions, tokens, reduction="none")
        return (losses * is_target).sum(dim=1) / is_target.sum(dim=1)

    return metric


def _points(bridge: Bridge, parts: list[str], layers: Sequence[int] | None) -> list[Point]:
    """The points of these parts, layer by layer."""
    if not parts or not set(parts) <= set(PARTS):
        raise ValueError(f"activation_patching: parts={parts}; expected some of {listed(PARTS)}")
    points = []
    n_layers = len(bridge.blocks)
    for layer in range(n_layers) if layers is None else layers:
        middle = Point("residual", layer, f"{layer} mid", "resid_mid")
        of_layer = [Point("residual", layer, f"{layer} pre", "resid_pre")]
        # Where attention and MLP read the same stream, there is nothing between them.
        if middle.hook in bridge.hook_dict:
            of_layer.append(middle)
        # After any other layer is before the next one.
        if layer == n_layers - 1:
            of_layer.append(Point("residual", layer, f"{layer} post", "resid_post"))
        of_layer.append(Point("attention", layer, f"{layer}", "attn_out"))
        of_layer.append(Point("mlp", layer, f"{layer}", "mlp_out"))
        of_layer.append(Point("head", layer, f"{layer}", "z"))
        points += [point for point in of_layer if point.part in parts]
    return points


def _patches(
    bridge: Bridge,
    batch: Batch,
    source: Any,
    start: Float[Tensor, " batch"],
    points: Iterable[Point],
    positions: Sequence[int],
) -> Iterator[Change]:
    """Every patch of activations from the source into the bridge as it stands."""
    tokens, metric = batch.tokens.to(bridge.cfg.device), loss_of_logits(batch)
    for point in points:
        where: dict[str, Label] = {"component": point.part, "layer": point.title}
        cells: list[tuple[dict[str, Label], tuple[Any, ...]]] = []
        if point.part == "head":
            for head in range(bridge.cfg.n_heads):
                cells.append(({"head": head, "position": "all"}, (..., head, slice(None))))
        else:
            for number in positions:
                cells.append(({"position": number}, (slice(None), number)))
            cells.append(({"position": "all"}, (...,)))
        for place, cell in cells:

            def patch(value: Tensor, hook: Any, cell: Any = cell, name: str = point.hook) -> None:
                value[cell] = source[name][cell]

            with bridge.hooks(fwd_hooks=[(point.hook, patch)]):
                loss = metric(bridge(tokens))
            yield {**where, **place}, loss - start


def _share(
    labels: Labels,
    change: Float[Tensor, " batch"],
    whole: Float[Tensor, " batch"],
    groups: Sequence[Hashable],
) -> Measurement:
    """A change as a share of the whole change, a ratio of means, with its bootstrap interval."""
    _, member = np.unique([str(group) for group in groups], return_inverse=True)
    changes = np.bincount(member, change.cpu().double())
    wholes = np.bincount(member, whole.cpu().double())
    mean = float(changes.sum() / wholes.sum()) + 0.0  # a negative zero would be shown as -0

    drawn = np.random.default_rng(0).integers(len(wholes), size=(N_RESAMPLES, len(wholes)))
    draws = changes[drawn].sum(axis=1) / wholes[drawn].sum(axis=1)
    return Measurement.from_draws(
        "patch_share", labels, draws, mean=mean, n=len(change), n_groups=len(wholes)
    )
