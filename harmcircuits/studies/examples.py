"""What a mask does to a few held-out examples: arrays and texts for a study's page."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from harmcircuits.behaviours.behaviour import Behaviour
from harmcircuits.behaviours.model import Model
from harmcircuits.circuits.masks import WeightMask
from harmcircuits.hooks.inspection import attention_patterns, token_changes, token_texts
from harmcircuits.hooks.masking import masked
from harmcircuits.measurements import Rows
from harmcircuits.prompts import PromptSet
from harmcircuits.studies.terms import Terms

N_EXAMPLES = 4  # requests of a behaviour
N_HEADS = 4

ColouredText = tuple[list[str], Float[Tensor, " _"]]  # tokens, and a value for each


@dataclass(frozen=True, repr=False)
class Examples:
    """A few held-out requests of the target and of its contrast."""

    tokens: dict[str, list[ColouredText]]
    answers: list[list[str]]
    heads: list[tuple[int, int]]
    text: list[str]
    unpruned: Float[Tensor, "head pos pos"]
    pruned: Float[Tensor, "head pos pos"]


def examples_of(model: Model, mask: WeightMask, terms: Terms, rows: Rows) -> Examples:
    """What a mask does to a few held-out requests."""
    tokens = {}
    answers = []
    for behaviour in (terms.target, terms.contrast):
        requests = _some(behaviour.prompts("heldout"))
        tokens[behaviour.name] = _tokens(model, mask, behaviour, requests)
        answers += _answers(model, mask, behaviour, requests)

    # Attention is that on the first request of the batch.
    heads = _most_pruned_heads(rows)
    requests = _some(terms.target.prompts("heldout"))
    batch = model.batches(terms.target, requests)[0]
    unpruned = attention_patterns(model.bridge, batch, heads)
    with masked(model.bridge, mask):
        pruned = attention_patterns(model.bridge, batch, heads)
    return Examples(
        tokens=tokens,
        answers=answers,
        heads=heads,
        text=token_texts(model.bridge, batch),
        unpruned=unpruned,
        pruned=pruned,
    )


def _tokens(
    model: Model,
    mask: WeightMask,
    behaviour: Behaviour,
    requests: PromptSet,
) -> list[ColouredText]:
    """Each reference answer with its request, and what the mask does to every token."""
    batch = model.batches(behaviour, requests)[0]
    changes = token_changes(model.bridge, mask, batch)  # [example, pos]
    texts = []
    for number in range(len(batch)):
        is_token = batch.is_token[number]
        words = token_texts(model.bridge, batch, number)
        texts.append((words, changes[number][is_token]))
    return texts


def _answers(
    model: Model,
    mask: WeightMask,
    behaviour: Behaviour,
    requests: PromptSet,
) -> list[list[str]]:
    """Request, unpruned answer, masked answer and the verdict on the latter, of each request."""
    before = model.answers(behaviour, requests)
    with masked(model.bridge, mask):
        after = model.answers(behaviour, requests)
    verdicts = model.verdicts(behaviour, after)
    lines = []
    for unpruned, pruned, verdict in zip(before, after, verdicts, strict=True):
        line = [pruned.prompt, unpruned.completion, pruned.completion, verdict]
        lines.append(line)
    return lines


def _some(prompts: PromptSet) -> PromptSet:
    """A few requests, evenly over the set."""
    # Not the first few: requests of one topic follow each other.
    step = max(1, len(prompts) // N_EXAMPLES)
    return prompts[::step][:N_EXAMPLES]


def _most_pruned_heads(rows: Rows) -> list[tuple[int, int]]:
    """(layer, head) of the heads that lose most query and output weights, the most pruned first."""
    removed: dict[tuple[int, int], float] = {}
    for row in rows.where("weights_removed", by="head", kind="head"):
        head = (int(row.labels["layer"]), int(row.labels["index"]))
        removed[head] = removed.get(head, 0) + row.mean
    most_first = sorted(removed, key=lambda head: -removed[head])
    return most_first[:N_HEADS]
