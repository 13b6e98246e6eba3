"""The estimate against what a run takes.

Would catch: activations that are not scaled to the batch, accumulators counted without the bound, weights counted twice,
hooks or gradients left behind by the probe.
"""

import gc
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from conftest import random_batch, write_model
from transformer_lens.model_bridge import TransformerBridge

from harmcircuits.hooks.attribution import removal_effect, sensitivity
from harmcircuits.hooks.memory import _LiveBytes, estimate_memory, fitting_batches
from harmcircuits.hooks.objectives import completion_loss
from harmcircuits.hooks.weights import weight_sites

METHODS = {False: removal_effect, True: sensitivity}


@pytest.mark.parametrize("absolute", [False, True])
def test_the_estimate_is_what_a_run_takes(open_model, absolute):
    bridge, batches = open_model("Llama"), [random_batch(2), random_batch(12, 30), random_batch(12, 7)]
    found = estimate_memory(bridge, batches, absolute=absolute)
    with _LiveBytes() as live:
        METHODS[absolute](bridge, batches, completion_loss)
    assert found.accumulators + found.activations == pytest.approx(live.peak, rel=0.1)
    n_scored = sum(site.parameter.numel() for site in weight_sites(bridge).values())
    assert found.accumulators == 4 * n_scored
    assert found.total == found.weights + found.accumulators + found.activations
    n_stored = sum(parameter.numel() for parameter in bridge.parameters())
    assert 4 * n_stored <= found.weights <= 4.4 * n_stored, "parameters once, and little else"
    assert not any(parameter.grad is not None for parameter in bridge.parameters())
    bounded = estimate_memory(bridge, batches, max_memory=8000)
    assert 4000 < bounded.accumulators <= 8000


ORGANISM = dict(
    hidden_size=128, num_hidden_layers=4, intermediate_size=512, vocab_size=320, max_position_embeddings=64,
    num_attention_heads=4, num_key_value_heads=2,
)  # fmt: skip


@pytest.mark.parametrize("absolute", [False, True])
def test_the_estimate_at_the_size_of_an_organism(open_model, absolute):
    bridge, batches = open_model("Llama", **ORGANISM), [random_batch(64, 16)]
    found = estimate_memory(bridge, batches, absolute=absolute)
    with _LiveBytes() as live:
        METHODS[absolute](bridge, batches, completion_loss)
    assert found.accumulators + found.activations == pytest.approx(live.peak, rel=0.1)


@pytest.mark.parametrize("absolute", [False, True])
def test_batches_fill_the_memory_they_are_given(llama, absolute):
    batches = [random_batch(12, 20), random_batch(40, 30, seed=1)]
    alone, bound = (estimate_memory(llama, [random_batch(n, 30, seed=1)], absolute=absolute).activations for n in (1, 6))
    found = fitting_batches(llama, batches, bound, absolute=absolute)
    for part, whole in (([b for b in found if b.tokens.shape[1] == one.tokens.shape[1]], one) for one in batches):
        assert torch.equal(torch.cat([b.tokens for b in part]), whole.tokens), "every example once, in order"
        assert torch.equal(torch.cat([b.is_target for b in part]), whole.is_target)
    size = max(map(len, found))
    assert size == 6
    with pytest.raises(ValueError, match="one example of 30 tokens takes"):
        fitting_batches(llama, batches, alone // 2, absolute=absolute)


def test_no_batches_are_refused(llama):
    with pytest.raises(ValueError, match="fitting_batches: no batches"):
        fitting_batches(llama, [], 1000)
    with pytest.raises(ValueError, match="estimate_memory: no batches"):
        estimate_memory(llama, [])


def test_live_bytes_by_hand():
    with _LiveBytes() as live:
        first = torch.zeros(1000)
        first.view(10, 100).add_(1)  # no new memory
        second = first + 1
        del first
        third = torch.zeros(500)
        del second, third
    assert live.peak == 8000


def resident(which: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(which)).split()[1])


def estimated_and_measured(folder: str, absolute: bool, queue) -> None:
    torch.set_num_threads(1)
    bridge, batches = TransformerBridge.boot_transformers(folder, device="cpu"), [random_batch(16, 128)]
    found = estimate_memory(bridge, batches, absolute=absolute)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident size starts anew
    before = resident("VmRSS")
    METHODS[absolute](bridge, batches, completion_loss)
    queue.put((found.accumulators + found.activations, resident("VmHWM") - before))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory is read as Linux gives it")
@pytest.mark.parametrize("absolute", [False, True])
def test_the_estimate_is_what_the_system_gives(tmp_path, monkeypatch, absolute):
    """Within 10 % of the growth of resident memory, in a new process whose allocator gives back what is freed."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    size = dict(n_embd=512, n_inner=2048, n_layer=4, n_head=8, n_positions=128, vocab_size=8000)
    write_model("GPT2", tmp_path, **size)
    context = get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=estimated_and_measured, args=(str(tmp_path), absolute, queue))
    process.start()
    estimate, measured = queue.get(timeout=300)
    process.join()
    assert estimate == pytest.approx(measured, rel=0.1)
