"""Activation patching of a model's behaviours, as rows that name tokens, and its circuitsvis views."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from harmcircuits.batches import Batch
from harmcircuits.behaviours.model import Model
from harmcircuits.circuits.masks import WeightMask
from harmcircuits.hooks.inspection import attention_patterns
from harmcircuits.hooks.masking import masked_if_given
from harmcircuits.hooks.patching import activation_patching
from harmcircuits.measurements import Labels, Measurement, Rows
from harmcircuits.prompts import PromptSet
from harmcircuits.views.circuitsvis import Panels, Visual, attention_pairs, coloured_tokens

LEAST_ATTENTION = 0.02  # rows leave out smaller values
N_ANSWER = 8  # tokens of an answer that are patched
N_HEADS = 4


def aligned_requests(model: Model, name: str, n: int) -> tuple[Batch, list[str]]:
    """Held-out requests with reference answers whose positions line up, and their items."""
    behaviour = model.behaviour(name)
    references = behaviour.references("heldout")
    if not len(references):
        raise ValueError(f"{model.name} has no reference answers to held-out {name!r} requests")
    first_words = Counter(example.prompt.split()[0] for example in references)
    ((commonest, _),) = first_words.most_common(1)
    alike = references.where(lambda example: example.prompt.split()[0] == commonest)
    by_item = {example.cluster: example for example in alike}

    batch, numbers = aligned(model.batches(behaviour, PromptSet(tuple(by_item.values()))))
    items = list(by_item)
    groups = [items[number] for number in numbers[:n]]
    return Batch(batch.tokens[:n], batch.is_target[:n]), groups


def aligned(batches: Sequence[Batch]) -> tuple[Batch, list[int]]:
    """The most examples whose answers begin and end at the same position, and their numbers."""
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


def patching_rows(
    model: Model,
    mask: WeightMask,
    name: str,
    labels: Labels,
    *,
    n: int,
    is_whole: bool = False,
    **options: Any,
) -> Rows:
    """`activation_patching` on requests of one behaviour that line up; positions by their tokens."""
    batch, groups = aligned_requests(model, name, n)
    names = position_names(model, batch)
    end = int(batch.is_target[0].int().argmax()) + N_ANSWER
    positions = () if is_whole else range(min(end, len(names)))
    options |= {"positions": positions, "groups": groups, "labels": labels}
    rows = []
    for row in activation_patching(model, mask, batch, **options):
        position = row.labels.get("position")
        if isinstance(position, int):
            row = row.labelled(position=names[position])
        rows.append(row)
    return Rows(rows)


def attention_rows(
    model: Model, mask: WeightMask, name: str, patches: Rows, labels: Labels, *, n: int
) -> Rows:
    """Where the heads that restore most attend in the first request, without and with the mask."""
    restored = patches.where("patch_change", component="head", direction="restore")
    strongest = sorted(restored, key=lambda row: abs(row.mean), reverse=True)[:N_HEADS]
    heads = [(int(row.labels["layer"]), int(row.labels["head"])) for row in strongest]
    if not heads:
        return Rows()
    batch, _ = aligned_requests(model, name, n)
    names = position_names(model, batch)
    rows = Rows()
    for state, edit in {"unpruned": None, "masked": mask}.items():
        with masked_if_given(model.bridge, edit):
            patterns = attention_patterns(model, batch, heads)
        for (layer, head), pattern in zip(heads, patterns, strict=True):
            where = {**labels, "state": state, "layer": layer, "head": head}
            for position, to in (pattern >= LEAST_ATTENTION).nonzero().tolist():
                place = {**where, "position": names[position], "to": names[to]}
                rows += [Measurement.exact("attention", place, float(pattern[position, to]))]
    return rows


def attention_view(rows: Rows) -> Panels:
    """The attention of a text's heads, unpruned to the left and masked to the right."""
    # Every token attends to something, so it has a row.
    tokens = list(rows.by("position"))
    heads = list(rows.by("layer", "head"))
    patterns = {}
    for state, state_rows in rows.by("state").items():
        patterns[state] = torch.zeros(len(heads), len(tokens), len(tokens))
        for row in state_rows:
            head = heads.index((row.labels["layer"], row.labels["head"]))
            position = tokens.index(row.labels["position"])
            to = tokens.index(row.labels["to"])
            patterns[state][head, position, to] = row.mean
    return attention_pairs(tokens, patterns["unpruned"], patterns["masked"], heads)


def token_view(rows: Rows) -> Visual:
    """The tokens of a text, coloured by the largest share that a patch at each of them moves."""
    shares = {}
    for position, patches in rows.by("position").items():
        if position != "all":
            shares[position] = patches.largest().mean
    return coloured_tokens(list(shares), torch.tensor(list(shares.values())), largest=1.0)


def position_names(model: Model, batch: Batch) -> list[str]:
    """The number of each position, and the token there where it is the same in every example.

    A single request of a user has numbers only, since rows must not quote it.
    """
    if len(batch) == 1 and not model.is_invented:
        return [str(number) for number in range(batch.tokens.shape[1])]
    names = []
    for number, column in enumerate(batch.tokens.T.tolist()):
        (token,) = model.bridge.tokenizer.convert_ids_to_tokens(column[:1])
        names.append(f"{number} {token}" if len(set(column)) == 1 else f"{number} …")
    return names
