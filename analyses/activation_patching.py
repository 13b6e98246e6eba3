# %% [markdown]
# # Which activations carry a harmful answer?
# A mask is an edit in place, so TransformerLens' own patching runs on top of it. Both runs read the
# same tokens, a request with its reference answer; only the weights differ. *Restore*: the masked
# model gets activations of the unpruned one. *Destroy*: the unpruned model gets activations of the
# masked one. Either way 0 is the model patched into and 1 the model patched from, on the mean loss
# of the reference answer.

# %%
import os

os.environ.setdefault("TQDM_DISABLE", "1")  # TransformerLens draws a bar for each of its sweeps

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, cast

import pandas as pd
import torch
import typer
from jaxtyping import Float
from rounds import circuit_in_rounds
from torch import Tensor
from torch.nn import functional
from transformer_lens import patching

import harmcircuits as hc
from harmcircuits.hooks.bridge import Bridge
from harmcircuits.measurements import Measurement, Rows
from harmcircuits.organisms.world import VERBS, world
from harmcircuits.views.figures import heatmaps
from harmcircuits.views.page import paragraphs, plot, section, write_page

LEAST_GAP = 0.05  # nats; below it there is nothing to restore, and a share of it would be noise
PARTS = ("residual", "attention", "mlp", "head", "head_result")
Metric = Callable[[Float[Tensor, "batch pos vocab"]], Float[Tensor, " batch"]]


# %% [markdown]
# The held-out requests of one surface form all have the same length, so a position means the same
# thing in each.


# %%
def aligned_requests(model: hc.Model, behaviour: str, n: int) -> hc.PromptSet:
    """Up to `n` held-out requests of the form "steps : VERB ITEM", one for each item."""
    references = model.behaviours[behaviour].references("heldout")
    aligned = references.where(lambda example: example.prompt.startswith("steps"))
    of_items = {example.cluster: example for example in aligned}
    return hc.PromptSet(tuple(of_items.values()))[:n]


def one_batch(model: hc.Model, prompts: hc.PromptSet) -> hc.Batch:
    """All requests with their reference answers, after the harmful requests' prefill as context."""
    prefill = model.behaviours["harmful"].prefill
    options = {"batch_size": len(prompts), "template": model.template, "prefill": prefill}
    return hc.tokenize(prompts, model.bridge.tokenizer, **options)[0]


def roles(model: hc.Model, batch: hc.Batch) -> list[str]:
    """The word at each position, or what kind of word where it differs from request to request."""
    of_world = world()
    kinds = {
        "verb": set(chain(*VERBS.values())),
        "item": set(of_world.items),
        "operator": set(chain(*of_world.operators.values())),
        "part": set(chain(*of_world.parts.values())),
    }
    names: list[str] = []
    for column in batch.tokens.T.tolist():
        words = set(model.bridge.tokenizer.convert_ids_to_tokens(column))
        fitting = [kind for kind, members in kinds.items() if words <= members]
        name = fitting[0] if fitting else words.pop()
        seen = sum(earlier.startswith(name) for earlier in names)
        names.append(f"{name} {seen + 1}" if name in ("operator", "part") else name)
    return names


def reference_nll(batch: hc.Batch) -> Metric:
    """A metric for TransformerLens' patching: `completion_loss` of each example, from logits."""

    def metric(logits: Float[Tensor, "batch pos vocab"]) -> Float[Tensor, " batch"]:
        tokens = batch.tokens.to(logits.device)[:, 1:]
        is_target = batch.is_target.to(logits.device)[:, 1:]
        predictions = logits[:, :-1].float().transpose(1, 2)
        losses = functional.cross_entropy(predictions, tokens, reduction="none")
        return (losses * is_target).sum(1) / is_target.sum(1)

    return metric


# %% [markdown]
# Every sweep below is TransformerLens' own. It has none for the last residual, for all positions at
# once, or for what a head writes; those go through its `generic_activation_patch`. `head` patches a
# head's output before its W_O, as TransformerLens does, so edits of W_O stay; `head_result` patches
# what it adds to the residual stream.
#
# A setter must write in place and gradients must be off: `hook_resid_mid` is the input of the
# second norm, and the skip connection past the MLP sees a patch there only if the tensor itself is
# changed. (With gradients on, TransformerLens clones first, and its own `get_act_patch_resid_mid`
# then patches the MLP's input alone.)


# %%
def whole_layer_patch_setter(corrupted: Tensor, index: Sequence[int], clean: Any) -> Tensor:
    corrupted[:] = clean
    return corrupted


def sweeps(
    bridge: Bridge, batch: hc.Batch, source: patching.ActivationCache, parts: Sequence[str]
) -> Iterator[tuple[str, str, patching.PatchingResult]]:
    """(component, point in the layer, result) of each sweep over the bridge as it stands.

    Needs `use_attn_result` on, when the source was cached and now.
    """
    last, n_positions = bridge.cfg.n_layers - 1, batch.tokens.shape[1]
    given = (bridge, batch.tokens.to(bridge.cfg.device), source, reference_nll(batch))
    generic = partial(patching.generic_activation_patch, *given, reduce="none", baseline=True)
    sweep = cast("Callable[..., patching.PatchingResult]", generic)
    for layer in range(last + 1) if "residual" in parts else ():
        places = [(layer, position) for position in range(n_positions)]
        each = pd.DataFrame(places, columns=["layer", "pos"])
        whole = pd.DataFrame({"layer": [layer]})
        for point in ("pre", "mid", "post") if layer == last else ("pre", "mid"):
            name = f"resid_{point}"
            yield "residual", point, sweep(patching.layer_pos_patch_setter, name, index_df=each)
            yield "residual", point, sweep(whole_layer_patch_setter, name, index_df=whole)
    ready: dict[str, Callable[..., patching.PatchingResult]] = {
        "attention": patching.get_act_patch_attn_out,
        "mlp": patching.get_act_patch_mlp_out,
        "head": patching.get_act_patch_attn_head_out_all_pos,
    }
    for part in parts:
        if part in ready:
            yield part, "", ready[part](*given, reduce="none", baseline=True)
    if "head_result" in parts:
        setter = patching.layer_head_vector_patch_setter
        yield "head_result", "", sweep(setter, "result", index_axis_names=("layer", "head"))


def patched_rows(
    bridge: Bridge,
    mask: hc.WeightMask,
    batch: hc.Batch,
    names: Sequence[str],
    groups: Sequence[str],
    labels: dict[str, str],
    parts: Sequence[str] = PARTS,
    *,
    least_gap: float = LEAST_GAP,
) -> Rows:
    """Rows of both directions: `patch_change` in nats, and `patch_share` of the gap, if any.

    share = (patched - start) / (end - start), each the mean loss over requests; the interval
    resamples items with the gap held fixed. Without a gap of `least_gap` there are no shares.
    """
    tokens, metric = batch.tokens.to(bridge.cfg.device), reference_nll(batch)
    bridge.set_use_attn_result(True)
    try:
        with torch.no_grad():
            unpruned_logits, unpruned = bridge.run_with_cache(tokens)
            with hc.masked(bridge, mask):
                masked_logits, edited = bridge.run_with_cache(tokens)
                restore = list(sweeps(bridge, batch, unpruned, parts))
            destroy = list(sweeps(bridge, batch, edited, parts))
    finally:
        bridge.set_use_attn_result(False)
    loss = {"unpruned": metric(unpruned_logits).cpu(), "masked": metric(masked_logits).cpu()}
    rows = Rows()
    for state, values in loss.items():
        rows += [Measurement.average("reference_nll", {**labels, "state": state}, values, groups)]
    change = loss["masked"] - loss["unpruned"]
    gap = Measurement.average("nll_gap", labels, change, groups)
    rows += [gap]
    for direction, swept, whole in (
        ("restore", restore, -gap.mean),
        ("destroy", destroy, gap.mean),
    ):
        for component, point, result in swept:
            cells = result.index_df.to_dict("records")
            for cell, values in zip(cells, result.effect().flatten(0, -2), strict=True):
                place = {
                    "direction": direction,
                    "component": component,
                    **_place(cell, point, names),
                }
                row = Measurement.average("patch_change", {**labels, **place}, values, groups)
                rows += [row]
                if abs(whole) >= least_gap:
                    rows += [_share(row, whole)]
    return rows


def _share(row: Measurement, whole: float) -> Measurement:
    """A change as a share of the whole change, whose sign may turn the interval's ends around."""
    low, high = sorted((row.low / whole, row.high / whole))
    return replace(row, metric="patch_share", mean=row.mean / whole, low=low, high=high)


def _place(cell: dict[str, int], point: str, names: Sequence[str]) -> dict[str, str | int]:
    layer = {"layer": f"{cell['layer']} {point}".strip()}
    if "head" in cell:
        return {**layer, "head": cell["head"], "position": "all"}
    return {**layer, "position": names[cell["pos"]] if "pos" in cell else "all"}


# %% [markdown]
# Figures and words come from the rows alone.


# %%
def page(rows: Rows, path: Path) -> None:
    """The result in words; then residual stream, sublayers, heads, harmful beside benign texts."""

    def panel(
        component: str, direction: str, behaviour: str = "harmful", metric: str = "patch_share"
    ) -> Rows:
        where = {
            "component": component,
            "direction": direction,
            "behaviour": behaviour,
            "mask": "circuit",
        }
        return rows.where(metric, **where)

    ways = {
        "restore": "unpruned into masked: share restored",
        "destroy": "masked into unpruned: share destroyed",
    }
    residual = {text: panel("residual", way) for way, text in ways.items()}
    sublayers = {
        f"{part}, {way}": panel(part, way) for part in ("attention", "mlp") for way in ways
    }
    heads = {f"{part}, {way}": panel(part, way) for part in ("head", "head_result") for way in ways}
    twins = {
        f"{behaviour} requests, {way}, nats": panel("residual", way, behaviour, "patch_change")
        for behaviour in ("harmful", "benign")
        for way in ways
    }
    across = partial(heatmaps, x="position", y="layer")
    sections = [
        section(
            "Residual stream",
            "Before a layer (pre), between attention and MLP (mid), after the last (post); each "
            "position alone, then all.",
            plot(across(residual), first=True),
        ),
        section(
            "Attention and MLP",
            "Their outputs at each position.",
            plot(across(sublayers, widest=0.4)),
        ),
        section(
            "Heads",
            "Before W_O (head), and what each adds to the residual stream (head_result); all "
            "positions at once.",
            plot(heatmaps(heads, x="head", y="layer", widest=0.4)),
        ),
        section(
            "Harmful requests and their benign twins", "Change of the loss.", plot(across(twins))
        ),
    ]
    write_page(
        path, "Which activations carry a harmful answer", [paragraphs(reading(rows)), *sections]
    )


def reading(rows: Rows) -> str:
    """What the rows say, in plain words."""
    circuit = rows.where(mask="circuit", behaviour="harmful")
    nll = {row.labels["state"]: row.mean for row in circuit.where("reference_nll")}
    text = (
        f"{circuit.one('nll_gap').n} held-out harmful requests of one form: the mask raises the "
        f"loss of the reference answer from {nll['unpruned']:.2f} to {nll['masked']:.2f} nats per "
        "token."
    )
    if not circuit.where("patch_share"):
        nothing = "there is nothing to restore, so no share is given"
        return f"{text} That is less than {LEAST_GAP} nats: {nothing}."
    sentences = [text]
    for direction, verb in (("restore", "restores"), ("destroy", "destroys")):
        sentences += _patches(circuit.where("patch_share", direction=direction), verb)
    controls = {
        "the same requests under a random mask of equal size": {
            "mask": "random",
            "behaviour": "harmful",
        },
        "the benign twins' requests under the circuit": {"mask": "circuit", "behaviour": "benign"},
    }
    for name, where in controls.items():
        control = rows.where(**where)
        gap, patched = control.one("nll_gap"), control.where("patch_change")
        widest = empty = ""
        if patched:
            most = max(abs(row.mean) for row in patched)
            widest = f", and no patch moves it by more than {most:.3f}"
        if not control.where("patch_share"):
            empty = "; there is nothing to restore, so no share is given"
        sentences.append(
            f"Control, {name}: the loss changes, in nats, by {gap:.3f}{widest}{empty}."
        )
    return "\n".join(sentences)


def _patches(shares: Rows, verb: str) -> list[str]:
    """What patches in one direction do, the circuit on harmful requests."""
    residual = shares.where(component="residual")
    steps = residual.where(position="all")
    first = next(row for row in steps if row.mean >= 0.9)
    # + 0.0: no -0%.
    shares_by_depth = [(row.labels["layer"], round(row.mean, 2) + 0.0) for row in steps]
    each = ", ".join(f"{layer} {share:.0%}" for layer, share in shares_by_depth)

    largest: dict[str, float] = {}
    for row in residual:
        position = str(row.labels["position"])
        if position != "all":
            largest[position] = max(largest.get(position, 0.0), row.mean)
    matter = [position for position, share in largest.items() if share >= 0.05]
    rest = max((share for share in largest.values() if share < 0.05), default=0.0)

    sublayers = shares.where(component="attention") + shares.where(component="mlp")
    strongest = []
    for row in sorted(sublayers, key=_mean, reverse=True)[:3]:
        at = row.labels
        strongest.append(f"{at['component']} {at['layer']} at {at['position']} ({row.mean:.0%})")
    head = max(shares.where(component="head_result"), key=_mean)
    return [
        f"Patching every position of the residual stream {verb}, by depth: {each}.",
        f"It reaches 90 % first at {first.labels['layer']} ({first:.0%}). At the last depth it is "
        "100 % by construction: only the final norm and the unembedding follow, and no mask "
        "touches them.",
        f"Of single positions only {', '.join(matter)} matter; every other stays at or below "
        f"{rest:.1%} at any depth.",
        f"The strongest sublayer outputs are {', '.join(strongest)}; the strongest head alone "
        f"writes {head.mean:.1%} (layer {head.labels['layer']}, head {head.labels['head']}).",
    ]


def _mean(row: Measurement) -> float:
    return row.mean


# %%
def main(
    out: Annotated[Path, typer.Option(help="Folder for rows.jsonl and activation_patching.html.")],
    organism: Annotated[str, typer.Option(help="Which organism.")] = "sft",
    mask: Annotated[
        Path | None, typer.Option(help="A saved mask; otherwise the circuit chosen in rounds.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Rounds in which the circuit is chosen.")] = 10,
    n: Annotated[int, typer.Option(help="Requests to patch on, one for each item.")] = 64,
) -> None:
    model = hc.open_model(organism)
    circuit = hc.WeightMask.load(mask) if mask else find_circuit(model, rounds)
    out.mkdir(parents=True, exist_ok=True)
    rows = Rows()
    random = hc.random_like(circuit)
    for name, edit, behaviour, parts in (
        ("circuit", circuit, "harmful", PARTS),
        ("circuit", circuit, "benign", ("residual",)),
        ("random", random, "harmful", ()),
    ):
        prompts = aligned_requests(model, behaviour, n)
        batch, groups = one_batch(model, prompts), [example.cluster for example in prompts]
        labels = {"model": organism, "mask": name, "behaviour": behaviour}
        rows += patched_rows(model.bridge, edit, batch, roles(model, batch), groups, labels, parts)
    rows.append_to(out / "rows.jsonl")
    page(rows, out / "activation_patching.html")
    print(reading(rows))


def find_circuit(model: hc.Model, rounds: int) -> hc.WeightMask:
    """The circuit of harmful answers at the README's operating point, all others protected."""
    return circuit_in_rounds(model, "harmful", size=0.006, protect_share=0.005, rounds=rounds)


if __name__ == "__main__":
    typer.run(main)
