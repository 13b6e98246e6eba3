"""The same seed gives the same scores, masks, answers and rows; what else changes them, and how far.

Would catch: a figure that depends on what ran before, padding that leaks into a score, a bound in
docs/trusted.md that no longer holds. Twin: other examples change the scores by more than the bounds.

    python -m pytest tests/studies/test_determinism.py -m slow -s      prints the table
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from helpers import random_batch, small_model
from transformer_lens.model_bridge import TransformerBridge

from harmcircuits.behaviours.model import Model
from harmcircuits.circuits.masks import WeightMask, top_fraction
from harmcircuits.circuits.scores import WeightScores
from harmcircuits.hooks.attribution import removal_effect
from harmcircuits.hooks.search import find_circuit
from harmcircuits.organisms import FOLDER
from harmcircuits.prompts import Batch, tokenize
from harmcircuits.studies.settings import StudySettings
from harmcircuits.studies.study import study

DTYPES = (torch.float32, torch.bfloat16)
SHARE = 0.001
Batches = list[Batch]


def examples_of(batches: Batches) -> Batches:
    """A batch for each example, without padding."""
    examples = []
    for batch in batches:
        for row in range(len(batch)):
            n_tokens = int(batch.is_target[row].nonzero().max()) + 1
            place = slice(row, row + 1), slice(n_tokens)
            examples.append(Batch(batch.tokens[place], batch.is_target[place]))
    return examples


def batched(batches: Batches, size: int, *, extra: int = 0, reverse: bool = False) -> Batches:
    """The same examples in batches of another size, with more padding or in reverse order."""
    examples = examples_of(batches)
    if reverse:
        examples.reverse()
    together = []
    for start in range(0, len(examples), size):
        some = examples[start : start + size]
        width = max(example.tokens.shape[1] for example in some) + extra
        tokens = torch.zeros(len(some), width, dtype=torch.int64)
        is_target = torch.zeros(len(some), width, dtype=torch.bool)
        for row, example in enumerate(some):
            n_tokens = example.tokens.shape[1]
            tokens[row, :n_tokens] = example.tokens[0]
            is_target[row, :n_tokens] = example.is_target[0]
        together.append(Batch(tokens, is_target))
    return together


@contextmanager
def threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# What is changed -> the batches, and how many threads there are.
CHANGES: dict[str, tuple[Callable[[Batches], Batches], int]] = {
    "nothing": (lambda batches: batched(batches, 8), 1),
    "one example at a time": (lambda batches: batched(batches, 1), 1),
    "all examples at once": (lambda batches: batched(batches, 1000), 1),
    "16 positions of padding more": (lambda batches: batched(batches, 8, extra=16), 1),
    "examples in reverse order": (lambda batches: batched(batches, 8, reverse=True), 1),
    "two threads": (lambda batches: batched(batches, 8), 2),
}


def scores_under(bridge: TransformerBridge, batches: Batches, change: str) -> WeightScores:
    rebatch, n_threads = CHANGES[change]
    with threads(n_threads):
        return removal_effect(bridge, rebatch(batches))


def largest_change(scores: WeightScores, before: WeightScores) -> float:
    """By how much the scores of the matrix that changes most do: the norm of the change over theirs."""
    changes = []
    for name, value in before.values.items():
        change = (scores.values[name] - value).norm() / value.norm()
        changes.append(change.item())
    return max(changes)


def exchanged(mask: WeightMask, before: WeightMask) -> float:
    """The share of a mask that other weights take the place of."""
    return (before - mask).n_removed / before.n_removed


def assert_equal(first: WeightScores, second: WeightScores) -> None:
    for name, value in first.values.items():
        assert torch.equal(value, second.values[name]), name


# A tiny model

TINY = [random_batch(12, seed=2)]
# Relative to the norm of a matrix's scores. bfloat16 has eight bits: 2^-8 a rounding.
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 0.03}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_the_scores_of_a_tiny_model(open_model, dtype, change):
    """Doing the same again changes nothing at all."""
    bridge = open_model("Llama", dtype=dtype)
    before = scores_under(bridge, TINY, "nothing")
    scores = scores_under(bridge, TINY, change)
    bound = 0.0 if change == "nothing" else BOUNDS[dtype]
    assert largest_change(scores, before) <= bound
    if change == "nothing":
        assert_equal(scores, before)
        others = removal_effect(bridge, [random_batch(12, seed=3)])
        assert largest_change(others, before) > 10 * BOUNDS[dtype], "the comparison can fail"


def test_a_search_gives_the_same_mask_again(llama):
    options = {"size": 0.02, "steps": 3}
    target, spared = [random_batch()], [random_batch(2, 7, seed=1)]
    first = find_circuit(llama, target, [spared], **options)
    torch.manual_seed(99)  # what the global generator holds does not matter
    second = find_circuit(llama, target, [spared], **options)
    assert (first.digest, first.trace, first.source) == (
        second.digest,
        second.trace,
        second.source,
    )


# An organism


@pytest.fixture(scope="module")
def model() -> Model:
    return small_model("sft", every=16)


def test_measuring_gives_the_same_rows_again(model):
    first = model.measure(only=["harmful", "benign"])
    torch.manual_seed(99)
    assert model.measure(only=["harmful", "benign"]) == first


def test_the_padding_side_of_a_tokenizer_changes_nothing(model):
    """Answers are padded on the left and scored texts on the right, whatever it says."""
    tokenizer = model.bridge.tokenizer
    prompts = model.calibration("harmful").prompts
    side = tokenizer.padding_side
    batches, answers = {}, {}
    try:
        for tokenizer.padding_side in ("left", "right"):
            batches[tokenizer.padding_side] = tokenize(prompts, tokenizer)
            answers[tokenizer.padding_side] = model.generate(prompts)
    finally:
        tokenizer.padding_side = side
    assert answers["left"] == answers["right"]
    for left, right in zip(batches["left"], batches["right"], strict=True):
        assert torch.equal(left.tokens, right.tokens)


@pytest.mark.slow
def test_a_study_gives_the_same_rows_and_masks_again(model):
    settings = StudySettings(sizes=(0.02,), steps=2, budget=1.0, tolerance=1.0, n_random=1)
    first, second = (study(model, settings, protect=["benign"]) for _ in range(2))
    assert first.rows == second.rows
    masks = [{name: mask.digest for name, mask in run.masks.items()} for run in (first, second)]
    assert masks[0] == masks[1]


@pytest.mark.slow
def test_what_changes_the_figures_of_an_organism():
    """The bounds are those that docs/trusted.md states; the table is printed."""
    batches = small_model("sft", every=4).calibration("harmful").batches
    cells: dict[str, list[str]] = {change: [] for change in CHANGES}
    for dtype in DTYPES:
        model = small_model("sft", every=4)
        bridge = TransformerBridge.boot_transformers(str(FOLDER / "sft"), dtype=dtype, device="cpu")
        model = replace(model, bridge=bridge)
        before, first = scores_under(bridge, batches, "nothing"), None
        for change in CHANGES:
            scores = scores_under(bridge, batches, change)
            masks = [top_fraction(each, SHARE, within="model") for each in (before, scores)]
            rates = rates_under(model, masks[1], change)
            first = first or rates
            n_other = sum(a != b for a, b in zip(first[2], rates[2], strict=True))
            moved = max(abs(rates[0] - first[0]), abs(rates[1] - first[1]))
            score, weights = largest_change(scores, before), exchanged(masks[1], masks[0])
            cells[change] += [f"{score:.1e}", f"{weights:.2%}", f"{n_other}", f"{100 * moved:.1f}"]
            assert score <= BOUNDS[dtype]
    print()
    for change, texts in cells.items():
        print(f"| {change} | {' | '.join(texts)} |")


def rates_under(model: Model, mask: WeightMask, change: str) -> tuple[float, float, list[str]]:
    """Valid harm of the model and under the mask, and all of the model's answers."""
    sizes = {"one example at a time": 1, "all examples at once": 10_000}
    model = replace(model, n_answered_at_once=sizes.get(change, 32))
    with threads(CHANGES[change][1]):
        answers = model.outcomes("harmful").answers
        row = model.measure(only="harmful").one("harm_valid_rate")
        under = model.measure(only="harmful", mask=mask).one("harm_valid_rate")
    return row.mean, under.mean, [example.completion for example in answers]
