"""Activation patching of a model's behaviours, as rows that name tokens, and its circuitsvis views."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from harmcircuits.batches import Batch
from harmcircuits.behaviours.model import Model
from harmcircuits.circuits.masks import WeightMask
from harmcircuits.hooks.bridge import Bridge
from harmcircuits.hooks.inspection import attention_patterns
from harmcircuits.hooks.masking import masked_if_given
from harmcircuits.hooks.patching import activation_patching
from harmcircuits.measurements import Labels, Measurement, Rows
from harmcircuits.prompts import PromptSet
from harmcircuits.views.circuitsvis import Panels, Visual, attention_pairs, coloured_tokens

LEAST_ATTENTION = 0.02  # less is left out of rows


def aligned_requests(model: Model, name: str, n: int) -> tuple[Batch, list[str]]:
    """Held-out requests with reference answers whose positions line up, and what each is about."""
    behaviour = model.behaviour(name)
    references = behaviour.references("heldout")
    if not len(references):
        raise ValueError(f"{model.name} has no reference answers to held-out {name!r} requests")
    first_words = Counter(example.prompt.split()[0] for example in references)
    ((commonest, _),) = first_words.most_common(1)
    alike = references.where(lambda example: example.prompt.split()[0] == commonest)
    of_items = {example.cluster: example for example in alike}

    prompts = PromptSet(tuple(of_items.values()))
    batch, numbers = aligned(model.batches(behaviour, prompts))
    items = list(of_items)
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
    n_answer: int = 8,
    is_whole: bool = False,
    **options: Any,
) -> Rows:
    """`activation_patching` on requests of one behaviour that line up; positions by their tokens."""
    batch, groups = aligned_requests(model, name, n)
    names = _names(model, batch)
    end = int(batch.is_target[0].int().argmax()) + n_answer
    positions = () if is_whole else range(min(end, len(names)))
    swept = activation_patching(
        model, mask, batch, positions=positions, groups=groups, labels=labels, **options
    )
    rows = []
    for row in swept:
        position = row.labels.get("position")
        named = {"position": names[position]} if isinstance(position, int) else {}
        rows.append(row.labelled(**named))
    return Rows(rows)


def attention_rows(
    model: Model, mask: WeightMask, name: str, rows: Rows, labels: Labels, *, n: int, n_heads: int
) -> Rows:
    """Where the heads that restore most attend in the first request, without and with the mask."""
    restored = rows.where("patch_change", component="head", direction="restore")
    strongest = sorted(restored, key=_magnitude, reverse=True)[:n_heads]
    heads = [(int(row.labels["layer"]), int(row.labels["head"])) for row in strongest]
    if not heads:
        return Rows()
    batch, _ = aligned_requests(model, name, n)
    names = _names(model, batch)
    attended = Rows()
    for state, edit in {"unpruned": None, "masked": mask}.items():
        with masked_if_given(model.bridge, edit):
            patterns = attention_patterns(model, batch, heads)
        for (layer, head), pattern in zip(heads, patterns, strict=True):
            where = {**labels, "state": state, "layer": layer, "head": head}
            for position, to in (pattern >= LEAST_ATTENTION).nonzero().tolist():
                place = {**where, "position": names[position], "to": names[to]}
                attended += [Measurement.exact("attention", place, float(pattern[position, to]))]
    return attended


def attention_view(rows: Rows) -> Panels:
    """The attention of a text's heads, unpruned to the left and masked to the right."""
    # Every token attends to something, so it has a row.
    tokens = list(rows.by("position"))
    heads = list(rows.by("layer", "head"))
    patterns = {}
    for state, of_state in rows.by("state").items():
        patterns[state] = torch.zeros(len(heads), len(tokens), len(tokens))
        for row in of_state:
            head = heads.index((row.labels["layer"], row.labels["head"]))
            position = tokens.index(row.labels["position"])
            to = tokens.index(row.labels["to"])
            patterns[state][head, position, to] = row.mean
    return attention_pairs(tokens, patterns["unpruned"], patterns["masked"], heads)


def token_view(rows: Rows) -> Visual:
    """The tokens of a text, coloured by the largest share that a patch at each of them moves."""
    largest = {}
    for position, of_position in rows.by("position").items():
        if position != "all":
            largest[position] = max(row.mean for row in of_position)
    return coloured_tokens(list(largest), torch.tensor(list(largest.values())), largest=1.0)


def _names(model: Model, batch: Batch) -> Sequence[str]:
    """The tokens that all requests share; of a single request only numbers."""
    if len(batch) == 1 and not model.is_invented:
        return [str(number) for number in range(batch.tokens.shape[1])]
    return position_names(model.bridge, batch)


def position_names(bridge: Bridge, batch: Batch) -> list[str]:
    """The number of each position, and the token there where it is the same in every example."""
    names = []
    for number, column in enumerate(batch.tokens.T.tolist()):
        (token,) = bridge.tokenizer.convert_ids_to_tokens(column[:1])
        names.append(f"{number} {token}" if len(set(column)) == 1 else f"{number} …")
    return names


def _magnitude(row: Measurement) -> float:
    return abs(row.mean)
