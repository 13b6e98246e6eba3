"""Bounded memory, many processes and the fused kernel give the scores of the plain pass.

Would catch: a matrix that falls between two groups, scores that depend on the bound, processes that score the same batches,
add them up in another order or divide by their own count, a block of rows left out, a kernel that rounds its products.
"""

import os
import weakref
from itertools import pairwise

import pytest
import torch
from conftest import random_batch, write_model
from torch import distributed, multiprocessing
from transformer_lens.model_bridge import TransformerBridge

from harmcircuits.circuits.scores import WeightScores
from harmcircuits.hooks import distributed as processes
from harmcircuits.hooks import search as circuits
from harmcircuits.hooks.absolute import add_absolute, add_absolute_in_blocks
from harmcircuits.hooks.accumulation import groups
from harmcircuits.hooks.attribution import removal_effect, sensitivity
from harmcircuits.hooks.objectives import completion_loss
from harmcircuits.hooks.search import circuit_mask
from harmcircuits.hooks.weights import weight_sites

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


MODELS = ("Llama", "GPT2", "Mixtral")


def score_and_save(rank: int, n_processes: int, folder: str) -> None:
    torch.set_num_threads(1)
    address = f"file://{folder}/rendezvous"
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=n_processes)
    for name in MODELS:
        bridge = TransformerBridge.boot_transformers(f"{folder}/{name}", dtype=torch.float32, device="cpu")
        for key, scores in all_scores(bridge).items():
            scores.save(f"{folder}/{name}-{key}-{rank}")
    for batches, options, reason in (
        (BATCHES[rank:], {}, r"processes \[1\] of 2 were given other batches"),
        (BATCHES, {"max_memory": 10**6 + rank}, "other matrices or options"),
    ):
        with pytest.raises(ValueError, match=reason):
            removal_effect(bridge, batches, completion_loss, **options)
    distributed.destroy_process_group()


def all_scores(bridge) -> dict[str, WeightScores]:
    """Three batches for two processes, one batch for two, and more than one group of matrices."""
    found = {method.__name__: method(bridge, BATCHES, completion_loss) for method in (removal_effect, sensitivity)}
    found["one_batch"] = removal_effect(bridge, BATCHES[:1], completion_loss)
    found["bounded"] = sensitivity(bridge, BATCHES, completion_loss, max_memory=30_000)
    return found


def test_two_processes_give_every_bit_of_one(tmp_path):
    for name in MODELS:
        write_model(name, tmp_path / name)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    multiprocessing.start_processes(score_and_save, (2, str(tmp_path)), nprocs=2, start_method="fork")
    for name in MODELS:
        bridge = TransformerBridge.boot_transformers(str(tmp_path / name), dtype=torch.float32, device="cpu")
        for key, alone in all_scores(bridge).items():
            for rank in range(2):
                found = WeightScores.load(tmp_path / f"{name}-{key}-{rank}")
                assert (found.source, list(found.values)) == (alone.source, list(alone.values))
                assert all(torch.equal(found.values[weight], value) for weight, value in alone.values.items()), (name, key)


def test_processes_own_every_matrix_once_and_run_every_batch_once(monkeypatch):
    names, batches = [f"w{i}" for i in range(5)], [random_batch(seed=i) for i in range(5)]
    monkeypatch.setattr(processes.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(processes.distributed, "get_world_size", lambda: 3)
    owned, run = [], []
    for rank in range(3):
        monkeypatch.setattr(processes.distributed, "get_rank", lambda rank=rank: rank)
        one = processes.Processes(names, "cpu")
        owned += [name for name in names if one.owns(name)]
        turns = list(one.turns(batches))
        assert len(turns) == 2, "all take part in every turn: each adds up its matrices"
        run += turns
    assert sorted(owned) == names
    assert [sum(batch is other for other in run) for batch in batches] == [2, 1, 1, 1, 1], "the first stands in once"
