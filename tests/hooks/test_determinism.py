"""The same seed gives the same scores, masks and answers; other changes move them within bounds.

The bounds are those of docs/log/trusted.md.
"""

import oracle
import pytest
import torch
from helpers import random_batch
from torch.nn.utils.rnn import pad_sequence

import harmcircuits as hc
from harmcircuits.behaviours.generation import generate

# Relative to the norm of a matrix's scores. bfloat16 has eight bits: 2^-8 a rounding.
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 0.03}


def batched(batches: list[hc.Batch], size: int, *, extra: int = 0, step: int = 1) -> list[hc.Batch]:
    """The same examples in batches of another size, with more padding or in reverse order."""
    examples = [(tokens[0], is_target) for tokens, is_target in oracle.examples(batches)][::step]
    batches = []
    for start in range(0, len(examples), size):
        columns = zip(*examples[start : start + size], strict=True)
        padded = [pad_sequence(list(column), batch_first=True) for column in columns]
        batches.append(hc.Batch(*(torch.nn.functional.pad(part, (0, extra)) for part in padded)))
    return batches


# Change -> how the examples are batched.
CHANGES = {
    "nothing": dict(size=8),
    "one example at a time": dict(size=1),
    "all examples at once": dict(size=1000),
    "16 positions of padding more": dict(size=8, extra=16),
    "examples in reverse order": dict(size=8, step=-1),
    "two threads": dict(size=8),
}


def largest_change(scores: hc.WeightScores, reference: hc.WeightScores) -> float:
    """Of the matrix that changes most: the norm of the change over that of its scores."""
    changes = []
    for name, value in reference.values.items():
        changes.append(float((scores.values[name] - value).norm() / value.norm()))
    return max(changes)


@pytest.mark.parametrize(
    ("name", "method", "dtype"),
    [
        ("Llama", hc.removal_effect, torch.float32),
        ("Llama", hc.removal_effect, torch.bfloat16),
        ("Mixtral", hc.snip_scores, torch.float32),
        ("GPT2", hc.token_price, torch.float32),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_the_bounds_of_changes_of_the_scores_of_a_tiny_model(open_model, name, method, dtype):
    """A repetition changes nothing at all."""
    bridge, batches = open_model(name, dtype=dtype), [random_batch(12, seed=2)]
    reference = method(bridge, batched(batches, size=8))
    for change, options in CHANGES.items():
        torch.set_num_threads(2 if change == "two threads" else 1)
        scores = method(bridge, batched(batches, **options))
        torch.set_num_threads(1)
        bound = 0.0 if change == "nothing" else BOUNDS[dtype]
        assert largest_change(scores, reference) <= bound
        if options.get("step") is None:
            assert scores.source == reference.source, "the digest of the data is of its examples"
    distant = method(bridge, [random_batch(12, seed=3)])
    assert largest_change(distant, reference) > 10 * BOUNDS[dtype], "the comparison can fail"


def test_a_search_gives_the_same_mask_again(llama):
    masks = []
    for seed in (1, 99):
        torch.manual_seed(seed)  # the global generator does not matter
        target, protected = [random_batch()], [random_batch(2, 7, seed=1)]
        mask = hc.find_circuit(llama, target, [protected], size=0.02, steps=2)
        masks.append((mask.digest, mask.trace, mask.source))
    assert masks[0] == masks[1]


def test_the_padding_side_of_a_tokenizer_changes_nothing(open_model):
    """Answers are padded on the left and scored texts on the right, whatever it says."""
    bridge = open_model("Llama", vocab_size=320)
    figures = []
    for bridge.tokenizer.padding_side in ("left", "right"):
        batches = hc.tokenize([("use it", "sure"), ("how to use it ?", "sure")], bridge.tokenizer)
        answers = generate(bridge, hc.PromptSet.of(["use it", "how to use it ?"]), max_new_tokens=4)
        figures.append((batches[0].tokens.tolist(), answers))
    assert figures[0] == figures[1]
