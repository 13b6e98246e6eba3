"""The same seed gives the same scores, masks and answers; what else changes them, and how far.

The bounds and the table are those of docs/trusted.md, which `-m slow -s` prints.
"""

from contextlib import contextmanager
from dataclasses import replace

import oracle
import pytest
import torch
from helpers import random_batch, small_model
from torch.nn.utils.rnn import pad_sequence
from transformer_lens.model_bridge import TransformerBridge

from harmcircuits.behaviours.generation import generate
from harmcircuits.circuits.masks import top_fraction
from harmcircuits.circuits.scores import WeightScores
from harmcircuits.hooks.attribution import removal_effect
from harmcircuits.hooks.search import find_circuit
from harmcircuits.organisms import FOLDER
from harmcircuits.prompts import Batch, PromptSet, tokenize

DTYPES = (torch.float32, torch.bfloat16)
# Relative to the norm of a matrix's scores. bfloat16 has eight bits: 2^-8 a rounding.
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 0.03}


def batched(batches: list[Batch], size: int, *, extra: int = 0, step: int = 1) -> list[Batch]:
    """The same examples in batches of another size, with more padding or in reverse order."""
    examples = [(tokens[0], is_target) for tokens, is_target in oracle.examples(batches)][::step]
    together = []
    for start in range(0, len(examples), size):
        columns = zip(*examples[start : start + size], strict=True)
        padded = [pad_sequence(list(column), batch_first=True) for column in columns]
        together.append(Batch(*(torch.nn.functional.pad(part, (0, extra)) for part in padded)))
    return together


# What is changed -> how the examples are batched.
CHANGES = {
    "nothing": dict(size=8),
    "one example at a time": dict(size=1),
    "all examples at once": dict(size=1000),
    "16 positions of padding more": dict(size=8, extra=16),
    "examples in reverse order": dict(size=8, step=-1),
    "two threads": dict(size=8),
}


@contextmanager
def threads(change: str):
    torch.set_num_threads(2 if change == "two threads" else 1)
    yield
    torch.set_num_threads(1)


def scores_under(bridge, batches: list[Batch], change: str) -> WeightScores:
    with threads(change):
        return removal_effect(bridge, batched(batches, **CHANGES[change]))


def largest_change(scores: WeightScores, before: WeightScores) -> float:
    """Of the matrix that changes most: the norm of the change over that of its scores."""
    changes = []
    for name, value in before.values.items():
        changes.append(((scores.values[name] - value).norm() / value.norm()).item())
    return max(changes)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_changes_the_scores_of_a_tiny_model(open_model, dtype):
    """Doing the same again changes nothing at all."""
    bridge, batches = open_model("Llama", dtype=dtype), [random_batch(12, seed=2)]
    before = scores_under(bridge, batches, "nothing")
    for change in CHANGES:
        changed = largest_change(scores_under(bridge, batches, change), before)
        assert changed <= (0.0 if change == "nothing" else BOUNDS[dtype])
    others = removal_effect(bridge, [random_batch(12, seed=3)])
    assert largest_change(others, before) > 10 * BOUNDS[dtype], "the comparison can fail"


def test_a_search_gives_the_same_mask_again(llama):
    masks = []
    for seed in (1, 99):
        torch.manual_seed(seed)  # what the global generator holds does not matter
        target, spared = [random_batch()], [random_batch(2, 7, seed=1)]
        mask = find_circuit(llama, target, [spared], size=0.02, steps=2)
        masks.append((mask.digest, mask.trace, mask.source))
    assert masks[0] == masks[1]


def test_the_padding_side_of_a_tokenizer_changes_nothing(open_model):
    """Answers are padded on the left and scored texts on the right, whatever it says."""
    bridge = open_model("Llama", vocab_size=320)
    figures = []
    for bridge.tokenizer.padding_side in ("left", "right"):
        batches = tokenize([("use it", "sure"), ("how to use it ?", "sure")], bridge.tokenizer)
        answers = generate(bridge, PromptSet.of(["use it", "how to use it ?"]), max_new_tokens=4)
        figures.append((batches[0].tokens.tolist(), answers))
    assert figures[0] == figures[1]


@pytest.mark.slow
def test_what_changes_the_figures_of_an_organism():
    """The bounds are those that docs/trusted.md states; the table is printed."""
    batches = small_model("sft", every=4).calibration("harmful").batches
    cells: dict[str, list[str]] = {change: [] for change in CHANGES}
    for dtype in DTYPES:
        bridge = TransformerBridge.boot_transformers(str(FOLDER / "sft"), dtype=dtype, device="cpu")
        before, figures = scores_under(bridge, batches, "nothing"), []
        for change, options in CHANGES.items():
            at_once = {1: 1, 1000: 10_000}.get(options["size"], 32)
            model = replace(small_model("sft", every=4), bridge=bridge, n_answered_at_once=at_once)
            scores = scores_under(bridge, batches, change)
            old, new = (top_fraction(each, 0.001, within="model") for each in (before, scores))
            rates = []
            with threads(change):
                answers = [example.completion for example in model.outcomes("harmful").answers]
                for mask in (None, new):
                    row = model.measure(only="harmful", mask=mask).one("harm_valid_rate")
                    rates.append(row.mean)
            figures.append((answers, rates))
            n_other = sum(a != b for a, b in zip(figures[0][0], answers, strict=True))
            moved = max(abs(a - b) for a, b in zip(figures[0][1], rates, strict=True))
            changed, weights = largest_change(scores, before), (old - new).n_removed / old.n_removed
            cells[change] += f"{changed:.1e} {weights:.2%} {n_other} {100 * moved:.1f}".split()
            assert changed <= BOUNDS[dtype]
    print()
    for change, texts in cells.items():
        print(f"| {change} | {' | '.join(texts)} |")
