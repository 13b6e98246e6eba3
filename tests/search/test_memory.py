"""The memory that scores take: counted by formula, bounded by what is free, as a run takes it.

Would catch: memory counted twice, a bound where all fits or none where it does not.
"""

from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import random_batch

from harmcircuits.batches import Batch
from harmcircuits.hooks.objectives import completion_loss
from harmcircuits.hooks.weights import named_weights
from harmcircuits.search import memory
from harmcircuits.search.attribution import removal_effect
from harmcircuits.search.memory import estimate_memory


def test_memory_is_counted_by_formula(llama):
    batches = [random_batch(2), random_batch(12, 30)]
    n_scored = sum(weight.numel() for weight in named_weights(llama).values())
    n_stored = sum(parameter.numel() for parameter in llama.parameters())
    estimate = estimate_memory(llama, batches)
    assert estimate.scores == 4 * n_scored and not estimate.on_disk
    assert 4 * n_stored <= estimate.weights <= 4.4 * n_stored, "parameters once, and little else"
    assert not any(parameter.grad is not None for parameter in llama.parameters())

    bounded = estimate_memory(llama, batches, max_memory=8000)
    assert 4000 < bounded.scores <= 8000
    assert bounded.on_disk == estimate.scores, "all that is finished"
    twice = estimate_memory(llama, [random_batch(24, 30)])
    assert twice.activations == 2 * estimate.activations

    search = estimate_memory(llama, batches, size=0.01)
    assert search.candidates == 110 * round(0.22 * n_scored)
    assert search.total == estimate.total + search.candidates
    assert estimate_memory(llama, batches, size=0.5).candidates == 110 * n_scored


def test_a_bound_is_chosen_by_what_is_free(llama, monkeypatch):
    """None where all fits, else as much as a pass leaves; the scores are the same."""
    batches = [random_batch()]
    needed = estimate_memory(llama, batches)
    assert 2**20 < memory.free_memory(llama) < 2**50
    free_bytes = partial(memory.free_for_scores, llama, batches, completion_loss)
    expected = removal_effect(llama, batches)
    for free, bound in (
        (needed.scores, None),
        (needed.scores - 1, needed.scores - 1),
        (8000, 8000),
    ):
        room = free + round(memory.SPARE * needed.activations)
        monkeypatch.setattr(memory, "free_memory", lambda bridge, room=room: room)
        assert free_bytes() == bound
        scores = removal_effect(llama, batches, max_memory=bound)
        assert all(map(torch.equal, scores.values.values(), expected.values.values()))
    monkeypatch.setattr(memory, "free_memory", lambda bridge: 0)
    with pytest.raises(ValueError, match="give at least these"):
        removal_effect(llama, batches, max_memory=free_bytes())


def resident(field: str) -> int:
    """Bytes of resident memory: now (VmRSS) or at most so far (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="is counted by Linux")
def test_the_estimate_is_what_a_run_takes(open_model):
    size = dict(n_embd=512, n_inner=2048, n_layer=4, n_head=8, n_positions=128, vocab_size=8000)
    bridge = open_model("GPT2", **size)
    batches = [random_batch(16, 128)]
    estimate = estimate_memory(bridge, batches)
    removal_effect(bridge, [random_batch(1, 128)])  # a library's first run makes more
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident size starts anew
    first = resident("VmRSS")
    removal_effect(bridge, batches)
    growth = resident("VmHWM") - first
    assert 0.7 * growth < estimate.scores + estimate.activations < 1.5 * growth


def test_an_estimate_does_not_believe_the_first_examples(llama):
    width, lengths = 30, [4, 4, *[30] * 6]
    tokens = torch.full((len(lengths), width), 5)
    is_target = torch.zeros(len(lengths), width, dtype=torch.bool)
    for row, length in enumerate(lengths):
        is_target[row, length - 2 : length] = True
    batches = Batch(tokens, is_target), Batch(tokens, is_target.flip(0))
    first, second = (estimate_memory(llama, [batch]).activations for batch in batches)
    assert first == pytest.approx(second, rel=0.05)
