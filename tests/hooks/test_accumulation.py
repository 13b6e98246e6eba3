"""Bounded memory, many processes and the fused kernel give the scores of the plain pass.

Would catch: a matrix that falls between two groups, scores that depend on the bound, processes that score the same batches
or divide by their own count, a block of rows left out, a kernel that rounds its products.
"""

import os
import weakref
from itertools import pairwise

import pytest
import torch
from conftest import random_batch, write_model
from torch import distributed, multiprocessing
from transformer_lens.model_bridge import TransformerBridge

from harmcircuits import circuits
from harmcircuits.attribution import removal_effect, sensitivity
from harmcircuits.circuits import circuit_mask
from harmcircuits.hooks.absolute import add_absolute, add_absolute_in_blocks
from harmcircuits.hooks.accumulation import groups
from harmcircuits.hooks.weights import weight_sites
from harmcircuits.masks import top_fraction
from harmcircuits.objectives import completion_loss
from harmcircuits.scores import WeightScores

BATCHES = [random_batch(), random_batch(2, 7, seed=1), random_batch(4, 8, seed=2)]


@pytest.mark.parametrize("name", ["Llama", "GPT2", "GPTNeoX", "GPTJ", "Gemma3", "Bloom", "Mixtral"])
@pytest.mark.parametrize("method", [removal_effect, sensitivity])
def test_a_bound_on_memory_changes_no_bit(open_model, name, method):
    bridge = open_model(name)
    largest = max(site.parameter.numel() for site in weight_sites(bridge).values())
    expected = method(bridge, BATCHES, completion_loss)
    for numbers in (largest, 3 * largest):
        assert len(list(groups(weight_sites(bridge), 4 * numbers))) > 1, "one group would bound nothing"
        found = method(bridge, BATCHES, completion_loss, max_memory=4 * numbers)
        assert found.source == expected.source
        assert list(found.values) == list(expected.values), "ties go to the earlier matrix: the order matters"
        assert all(torch.equal(found.values[weight], value) for weight, value in expected.values.items())
    with pytest.raises(ValueError, match=rf"alone take {4 * largest:,}: give at least these"):
        method(bridge, BATCHES, completion_loss, max_memory=4 * largest - 1)


def test_groups_fill_the_bound_and_hold_every_matrix_once(llama):
    sites = weight_sites(llama)
    size = {name: 4 * site.parameter.numel() for name, site in sites.items()}
    for bound in (max(size.values()), 9000, sum(size.values())):
        found = list(groups(sites, bound))
        assert [name for group in found for name in group] == list(sites)
        for group, following in pairwise(found):
            assert sum(map(size.get, group)) <= bound < sum(map(size.get, group)) + size[next(iter(following))]


def test_one_dense_set_of_scores_at_a_time(llama, monkeypatch):
    made, alive = [], []

    def watched(method):
        def score(*arguments, **options):
            alive.append(sum(made_before() is not None for made_before in made))
            made.append(weakref.ref(found := method(*arguments, **options)))
            return found

        return score

    expected = circuit_mask(llama, BATCHES[:1], [BATCHES[1:2], BATCHES[2:]], q=0.1, p=0.1, rounds=2)
    monkeypatch.setattr(circuits, "removal_effect", watched(removal_effect))
    monkeypatch.setattr(circuits, "sensitivity", watched(sensitivity))
    options = {"q": 0.1, "p": 0.1, "rounds": 2, "max_memory": 8000}
    found = circuit_mask(llama, BATCHES[:1], [BATCHES[1:2], BATCHES[2:]], **options)
    assert alive == [0] * 6, "scores of an earlier behaviour are still there when the next one starts"
    assert all(torch.equal(found.removed[name], index) for name, index in expected.removed.items())


def absolute_by_hand(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return sum((f.double().T @ s.double()).abs() for f, s in zip(first, second, strict=True))


@pytest.mark.parametrize("scratch", [None, 1, 20, 150, 10_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_are_the_sum_of_absolute_gradients(scratch, dtype):
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(5, 7, size, generator=generator).to(dtype) for size in (11, 13))
    total = torch.ones(11, 13)
    add_absolute_in_blocks(first, second, total, scratch=scratch)
    torch.testing.assert_close(total.double(), 1 + absolute_by_hand(first, second), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n", "pos", "a", "b"), [(3, 40, 130, 70), (2, 5, 300, 17), (1, 256, 1024, 4096)])
def test_the_fused_kernel_equals_the_blocks(dtype, n, pos, a, b):
    """On CUDA `add_absolute` is the kernel; its first operand is transposed, as a slice of a larger tensor may be."""
    pytest.importorskip("triton")
    generator = torch.Generator("cuda").manual_seed(0)
    first = torch.randn(n, a, pos, generator=generator, device="cuda").to(dtype).mT
    second = torch.randn(n, pos, b, generator=generator, device="cuda").to(dtype)
    fused, blocks = torch.ones(a, b, device="cuda"), torch.ones(a, b, device="cuda")
    add_absolute(first, second, fused)
    add_absolute_in_blocks(first, second, blocks)
    # 1e-4: float32 sums of up to 256 products in another order; one rounding to TensorFloat-32 would be 1e-3.
    torch.testing.assert_close(fused, blocks, rtol=1e-4, atol=1e-4)


def score_and_save(rank: int, n_processes: int, folder: str) -> None:
    torch.set_num_threads(1)
    address = f"file://{folder}/rendezvous"
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=n_processes)
    bridge = TransformerBridge.boot_transformers(f"{folder}/model", dtype=torch.float32, device="cpu")
    for method in (removal_effect, sensitivity):
        method(bridge, BATCHES, completion_loss).save(f"{folder}/{method.__name__}{rank}")
    only_one = removal_effect(bridge, BATCHES[:1], completion_loss)  # the second process has no batch of its own
    only_one.save(f"{folder}/only_one{rank}")
    distributed.destroy_process_group()


def test_two_processes_choose_what_one_does(tmp_path):
    write_model("Llama", tmp_path / "model")
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    multiprocessing.start_processes(score_and_save, (2, str(tmp_path)), nprocs=2, start_method="fork")
    bridge = TransformerBridge.boot_transformers(str(tmp_path / "model"), dtype=torch.float32, device="cpu")
    expected = {method.__name__: method(bridge, BATCHES, completion_loss) for method in (removal_effect, sensitivity)}
    expected["only_one"] = removal_effect(bridge, BATCHES[:1], completion_loss)
    for name, alone in expected.items():
        first, second = (WeightScores.load(tmp_path / f"{name}{rank}") for rank in range(2))
        for weight, value in alone.values.items():
            assert torch.equal(first.values[weight], second.values[weight]), "every process holds the same scores"
            torch.testing.assert_close(first.values[weight], value, rtol=1e-4, atol=1e-7)
        assert first.source == alone.source
        found, wanted = (top_fraction(scores, 0.01, within="model") for scores in (first, alone))
        assert found.counts == wanted.counts
        assert all(torch.equal(found.removed[weight], index) for weight, index in wanted.removed.items())
