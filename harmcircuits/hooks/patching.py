"""Activation patching between a model and itself under a mask."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import numpy as np
import pandas
import torch
from jaxtyping import Float
from rich.progress import Progress
from torch import Tensor
from torch.nn import functional

from harmcircuits.circuits.masks import WeightMask
from harmcircuits.display import listed
from harmcircuits.hooks.bridge import AnyModel, Bridge, as_bridge
from harmcircuits.hooks.capacity import refuse_batches
from harmcircuits.hooks.finite import refuse_not_finite
from harmcircuits.hooks.masking import masked
from harmcircuits.hooks.objectives import completion_loss
from harmcircuits.measurements import N_RESAMPLES, Label, Labels, Measurement, Rows
from harmcircuits.progress import progress_bar
from harmcircuits.prompts import Batch

PARTS = ("residual", "attention", "mlp", "head")
ALL_PARTS = (*PARTS, "head_result")
LEAST_GAP = 0.05  # nats a token; a share of a smaller gap would be noise

Metric = Callable[[Float[Tensor, "batch pos vocab"]], Float[Tensor, " batch"]]


class Point(NamedTuple):
    """Where activations are patched in one layer."""

    part: str
    layer: int
    where: str
    activation: str

    @property
    def hook(self) -> str:
        """The hook's full name."""
        from transformer_lens.utilities import get_act_name

        return get_act_name(self.activation, self.layer)

    @property
    def title(self) -> str:
        """The layer, and the place in the residual stream."""
        return f"{self.layer} {self.where}".strip()


class Change(NamedTuple):
    """What one patch adds to the loss of each example, in nats a token."""

    labels: dict[str, Label]
    values: Float[Tensor, " batch"]


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
            number, or "all" at once; see `position_names`) and `head`.
        patch_share: the same as a share, whose interval resamples it with the gap; none where the
            gap is below `least_gap`.

    Positions count from the start of the text, so they should mean the same in every example: give
    one request, or several whose requests and answers are equally long (see `aligned`). What is
    patched at all positions at once, and heads, need no alignment.

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
            weights, as TransformerLens does, so that edits of these stay), "head_result" (what a
            head adds: `d_model` numbers a head and position).
        layers: numbers of the blocks; all by default.
        positions: numbers of the positions patched one by one; all by default.
        groups: what each example is about, to be resampled together; by default each by itself.
        labels: what the rows carry besides.
        least_gap: in nats a token.
        progress: whether to show a bar.

    Raises:
        ValueError: unknown parts, layers or positions, a part whose activations this architecture
            does not show, not exactly one group for each example, and as `masked`.
    """
    bridge = as_bridge(bridge)
    refuse_batches("activation_patching", bridge, [batch])
    groups = list(groups) or list(range(len(batch)))
    points = _points(bridge, list(parts), layers)
    numbers = _among(batch.tokens.shape[1], positions, "positions")
    tokens, metric = batch.tokens.to(bridge.cfg.device), loss_of_logits(batch)
    hooks = {point.hook for point in points}
    # Only these are kept: all activations of a large model would not fit in memory.
    of_points = {"names_filter": lambda name: name in hooks}

    # A setter writes in place, and gradients must be off: what TransformerLens calls `resid_mid` is
    # the input of the second norm, and the skip connection past the MLP sees a patch there only if
    # the tensor itself is changed. With gradients on it is cloned first, and the MLP alone sees it.
    bars = progress_bar() if progress else Progress(disable=True)
    with torch.no_grad(), _head_results(bridge, points), _without_bars(), bars:
        unpruned_logits, unpruned = bridge.run_with_cache(tokens, **of_points)
        before = metric(unpruned_logits)
        refuse_not_finite(bridge, [batch], before, completion_loss)
        _refuse_hidden(points, unpruned, tokens, bridge)
        with masked(bridge, mask):
            masked_logits, edited = bridge.run_with_cache(tokens, **of_points)
            after = metric(masked_logits)
            refuse_not_finite(bridge, [batch], after, completion_loss)
            tracked = bars.track(points, description="restore")
            restore = [*_sweeps(bridge, batch, unpruned, after, tracked, numbers)]
        tracked = bars.track(points, description="destroy")
        destroy = [*_sweeps(bridge, batch, edited, before, tracked, numbers)]

    labels = labels or {}
    rows = Rows()
    for state, losses in {"unpruned": before, "masked": after}.items():
        where = {**labels, "state": state}
        rows += [Measurement.average("reference_nll", where, losses, groups)]
    gap = Measurement.average("nll_gap", labels, after - before, groups)
    rows += [gap]
    has_gap = abs(gap.mean) >= least_gap
    for direction, changes, whole in (
        ("restore", restore, before - after),
        ("destroy", destroy, after - before),
    ):
        where = {**labels, "direction": direction}
        for place, values in changes:
            rows += [Measurement.average("patch_change", {**where, **place}, values, groups)]
            if has_gap:
                rows += [_share({**where, **place}, values, whole, groups)]
    return rows


def aligned(batches: Sequence[Batch]) -> tuple[Batch, list[int]]:
    """The most examples whose answers begin and end at the same position, and their numbers."""
    if not batches:
        raise ValueError("aligned: no batches; expected at least one (see tokenize)")
    by_shape: dict[tuple[int, int], list[tuple[int, Tensor, Tensor]]] = {}
    number = 0
    for batch in batches:
        starts = batch.is_target.int().argmax(dim=1).tolist()
        ends = batch.is_token.sum(dim=1).tolist()
        for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
            example = (number, batch.tokens[row, :end], batch.is_target[row, :end])
            by_shape.setdefault((start, end), []).append(example)
            number += 1
    numbers, tokens, is_target = zip(*max(by_shape.values(), key=len), strict=True)
    return Batch(torch.stack(tokens), torch.stack(is_target)), list(numbers)


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
    """The points of these parts, layer by layer; raises ValueError for unknown ones."""
    unknown = [part for part in parts if part not in ALL_PARTS]
    if unknown or not parts:
        raise ValueError(
            f"activation_patching: parts={parts}; expected some of {listed(ALL_PARTS)}"
        )
    numbers = _among(len(bridge.blocks), layers, "layers")
    if not numbers:
        raise ValueError("activation_patching: layers=[]; expected some, or leave it out for all")

    points = []
    for layer in numbers:
        of_layer = [
            Point("residual", layer, "pre", "resid_pre"),
            Point("residual", layer, "mid", "resid_mid"),
            Point("residual", layer, "post", "resid_post"),
            Point("attention", layer, "", "attn_out"),
            Point("mlp", layer, "", "mlp_out"),
            Point("head", layer, "", "z"),
            Point("head_result", layer, "", "result"),
        ]
        points += [point for point in of_layer if point.part in parts and _exists(point, bridge)]
    return points


def _exists(point: Point, bridge: Bridge) -> bool:
    """Whether this is a point of its own in the residual stream."""
    # After a layer is before the next one. Where attention and MLP read the same stream, there is
    # nothing between them.
    if point.where == "post":
        return point.layer == len(bridge.blocks) - 1
    return point.where != "mid" or point.hook in bridge.hook_dict


def _among(n: int, numbers: Sequence[int] | None, option: str) -> list[int]:
    """The numbers, all by default; raises ValueError for one that there is not."""
    chosen = list(range(n)) if numbers is None else list(numbers)
    if any(not 0 <= number < n for number in chosen):
        raise ValueError(f"activation_patching: {option}={chosen}; expected some of 0 to {n - 1}")
    return chosen


@contextmanager
def _head_results(bridge: Bridge, points: Sequence[Point]) -> Iterator[None]:
    """What heads add, computed apart while it is patched; the setting is then as before."""
    before = bridge.cfg.use_attn_result
    if all(point.part != "head_result" for point in points):
        yield
        return
    try:
        bridge.set_use_attn_result(True)
    except NotImplementedError as error:
        raise ValueError(f"activation_patching: no head_result here ({error})") from None
    try:
        yield
    finally:
        bridge.set_use_attn_result(before)


@contextmanager
def _without_bars() -> Iterator[None]:
    """TransformerLens draws a bar for each of its sweeps, of which there are hundreds here."""
    from transformer_lens import patching

    own = patching.tqdm
    patching.tqdm = iter
    try:
        yield
    finally:
        patching.tqdm = own


def _refuse_hidden(points: Sequence[Point], cache: Any, tokens: Tensor, bridge: Bridge) -> None:
    """Raises ValueError where the architecture computes a part without showing it."""
    for point in points:
        expected = tuple(tokens.shape)
        if point.part.startswith("head"):
            expected = (*expected, bridge.cfg.n_heads)
        shape = tuple(cache[point.hook].shape) if point.hook in cache else ()
        if shape[: len(expected)] != expected:
            others = listed(part for part in ALL_PARTS if part != point.part)
            raise ValueError(
                f"activation_patching: {point.hook} is not shown by this architecture (shape "
                f"{shape}), so {point.part!r} cannot be patched; choose parts= among {others}"
            )


def _sweeps(
    bridge: Bridge,
    batch: Batch,
    source: Any,
    start: Float[Tensor, " batch"],
    points: Iterable[Point],
    numbers: Sequence[int],
) -> Iterator[Change]:
    """Every patch of activations from the source into the bridge as it stands."""
    from transformer_lens import patching

    given = (bridge, batch.tokens.to(bridge.cfg.device), source, loss_of_logits(batch))
    heads = range(bridge.cfg.n_heads)
    # Its overloads tell a bridge from our protocol of one.
    sweep = cast("Callable[..., patching.PatchingResult]", patching.generic_activation_patch)
    for point in points:
        for setter, cells in _cells(point, numbers, heads):
            table = pandas.DataFrame(cells)
            result = sweep(*given, setter, point.activation, index_df=table, reduce="none")
            for cell, loss in zip(cells, result.values, strict=True):
                place: dict[str, Label] = {"component": point.part, "layer": point.title}
                if "head" in cell:
                    place["head"] = cell["head"]
                place["position"] = cell.get("pos", "all")
                yield Change(place, loss - start)


def _cells(
    point: Point, numbers: Sequence[int], heads: Sequence[int]
) -> Iterator[tuple[Callable, list[dict[str, int]]]]:
    """The sweeps over a point: what patches a cell, and the cells."""
    from transformer_lens import patching

    layer = {"layer": point.layer}
    if point.part.startswith("head"):
        of_heads = [{**layer, "head": head} for head in heads]
        yield patching.layer_head_vector_patch_setter, of_heads
        return
    if numbers:
        of_positions = [{**layer, "pos": number} for number in numbers]
        yield patching.layer_pos_patch_setter, of_positions
    yield _whole_layer_setter, [layer]


def _whole_layer_setter(corrupted: Tensor, index: Sequence[int], clean: Tensor) -> Tensor:  # noqa: ARG001
    corrupted[:] = clean
    return corrupted


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
    return Measurement.of_draws(
        "patch_share", labels, draws, mean=mean, n=len(change), n_groups=len(wholes)
    )
