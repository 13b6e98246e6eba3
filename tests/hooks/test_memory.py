"""The estimate against what a run takes.

Would catch: activations that are not scaled to the batch, accumulators counted without the bound,
weights counted twice, hooks or gradients left behind by the probe; scores of a step, a group or a
behaviour that are still there when the next ones are made.
"""

import gc
import weakref
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from helpers import random_batch, write_model
from transformer_lens.model_bridge import TransformerBridge

from harmcircuits.hooks.attribution import removal_effect, snip_scores
from harmcircuits.hooks.memory import _LiveBytes, estimate_memory
from harmcircuits.hooks.objectives import completion_loss
from harmcircuits.hooks.search import find_circuit
from harmcircuits.hooks.weights import weight_sites

METHODS = {False: removal_effect, True: snip_scores}
CLEAR_REFS = Path("/proc/self/clear_refs")

ORGANISM = dict(
    hidden_size=128,
    num_hidden_layers=4,
    intermediate_size=512,
    vocab_size=320,
    max_position_embeddings=64,
    num_attention_heads=4,
    num_key_value_heads=2,
)


class LiveInMemory(_LiveBytes):
    """Counts what lies in no file."""

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage.filename is None:
            super()._count(storage)


def measured_peak(bridge, batches, absolute: bool) -> int:
    METHODS[absolute](bridge, batches[:1], completion_loss)  # a library's first run makes more
    with _LiveBytes() as live:
        METHODS[absolute](bridge, batches, completion_loss)
    return live.peak


@pytest.mark.parametrize("absolute", [False, True])
def test_the_estimate_is_what_a_run_takes(open_model, absolute):
    bridge = open_model("Llama")
    batches = [random_batch(2), random_batch(12, 30), random_batch(12, 7)]
    estimate = estimate_memory(bridge, batches, absolute=absolute)
    peak = measured_peak(bridge, batches, absolute)
    assert estimate.accumulators + estimate.activations == pytest.approx(peak, rel=0.1)

    n_scored = sum(site.parameter.numel() for site in weight_sites(bridge).values())
    assert estimate.accumulators == 4 * n_scored
    assert estimate.total == estimate.weights + estimate.accumulators + estimate.activations

    n_stored = sum(parameter.numel() for parameter in bridge.parameters())
    assert 4 * n_stored <= estimate.weights <= 4.4 * n_stored, "parameters once, and little else"
    assert not any(parameter.grad is not None for parameter in bridge.parameters())

    assert not estimate.on_disk
    bounded = estimate_memory(bridge, batches, max_memory=8000)
    assert 4000 < bounded.accumulators <= 8000
    assert bounded.on_disk == 4 * n_scored, "all that is finished"
    assert bounded.total == bounded.weights + bounded.accumulators + bounded.activations


@pytest.mark.parametrize("absolute", [False, True])
def test_the_estimate_at_the_size_of_an_organism(open_model, absolute):
    bridge = open_model("Llama", **ORGANISM)
    batches = [random_batch(64, 16)]
    estimate = estimate_memory(bridge, batches, absolute=absolute)
    peak = measured_peak(bridge, batches, absolute)
    assert estimate.accumulators + estimate.activations == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("protect", [(), [[random_batch(9, 16, seed=1)], [random_batch(12, 16)]]])
def test_the_estimate_of_a_search_is_what_it_takes(open_model, protect):
    bridge = open_model("Llama", **ORGANISM)
    batches = [random_batch(8, 16), random_batch(3, 16)]
    estimate = estimate_memory(bridge, batches, protect=protect)
    with _LiveBytes() as live:
        find_circuit(bridge, batches, protect, size=0.001, budget=1.0, steps=2)
    searched = estimate.accumulators + estimate.activations + estimate.sums
    assert searched == pytest.approx(live.peak, rel=0.1)

    n_scored = sum(site.parameter.numel() for site in weight_sites(bridge).values())
    assert estimate.accumulators == 4 * n_scored
    assert estimate.sums == 4 * n_scored * (2 if protect else 1)
    assert estimate.total == estimate.weights + searched

    bounded = estimate_memory(bridge, batches, protect=protect, max_memory=500_000)
    assert bounded.accumulators <= 500_000
    assert bounded.on_disk == estimate.sums + estimate.accumulators, "the sums and a step's scores"
    assert bounded.sums == 0
    with LiveInMemory() as live:
        find_circuit(bridge, batches, protect, size=0.001, budget=1.0, steps=2, max_memory=500_000)
    taken = bounded.total - bounded.weights
    assert live.peak <= taken <= 1.3 * live.peak, (
        "a group needs the inputs of its own matrices only"
    )


def test_a_bound_holds_for_all_that_a_search_has_in_memory(llama, monkeypatch):
    n_bytes = [4 * site.parameter.numel() for site in weight_sites(llama).values()]
    bound = 2 * max(n_bytes)
    alive: dict[int, int] = {}
    peaks = []

    def counted_zeros(site):
        zeros = torch.zeros(site.parameter.shape)
        storage = zeros.untyped_storage()
        alive[storage._cdata] = storage.nbytes()
        weakref.finalize(storage, alive.pop, storage._cdata)
        peaks.append(sum(alive.values()))
        return zeros

    monkeypatch.setattr("harmcircuits.hooks.accumulation._zeros", counted_zeros)
    protect = [[random_batch(6, 8, seed=1)], [random_batch(6, 8, seed=2)]]
    options = {"size": 0.05, "steps": 2}
    find_circuit(llama, [random_batch()], protect, max_memory=bound, **options)
    assert max(n_bytes) < max(peaks) <= bound
    assert not alive

    peaks.clear()
    find_circuit(llama, [random_batch()], protect, **options)
    assert max(peaks) > bound, "the bound must have something to do"


def test_no_batches_are_refused(llama):
    with pytest.raises(ValueError, match="estimate_memory: no batches"):
        estimate_memory(llama, [])


def test_a_search_is_not_absolute(llama, batch):
    with pytest.raises(ValueError, match="absolute=True with protect"):
        estimate_memory(llama, [batch], absolute=True, protect=())


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
    """Bytes of resident memory: now (VmRSS) or at most so far (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(which):
            return 1024 * int(line.split()[1])
    raise AssertionError(which)


def estimate_and_growth(folder: str, absolute: bool, queue) -> None:
    torch.set_num_threads(1)
    bridge = TransformerBridge.boot_transformers(folder, device="cpu")
    batches = [random_batch(16, 128)]
    estimate = estimate_memory(bridge, batches, absolute=absolute)

    gc.collect()
    CLEAR_REFS.write_text("5")  # the highest resident size starts anew
    before = resident("VmRSS")
    METHODS[absolute](bridge, batches, completion_loss)
    growth = resident("VmHWM") - before
    queue.put((estimate.accumulators + estimate.activations, growth))


@pytest.mark.slow
@pytest.mark.skipif(not CLEAR_REFS.exists(), reason="resident memory is read as Linux gives it")
@pytest.mark.parametrize("absolute", [False, True])
def test_the_estimate_is_what_the_system_gives(tmp_path, monkeypatch, absolute):
    """Within 10 %, in a new process whose allocator gives back what is freed."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    size = dict(n_embd=512, n_inner=2048, n_layer=4, n_head=8, n_positions=128, vocab_size=8000)
    write_model("GPT2", tmp_path, **size)

    context = get_context("spawn")
    queue = context.Queue()
    arguments = (str(tmp_path), absolute, queue)
    process = context.Process(target=estimate_and_growth, args=arguments)
    process.start()
    estimate, growth = queue.get(timeout=300)
    process.join()
    assert estimate == pytest.approx(growth, rel=0.1)
