"""Bounded memory, several processes and blocks of a matrix give the scores of the plain pass.

Would catch: a matrix that falls between two groups, scores that depend on the bound, processes that
score the same batches or divide by their own count, a process without batches that fails or hangs,
differences between processes that only one of them reports, a block of rows left out, one process
that enters the code for several, a sum that is kept in less than float32.
"""

import os
import subprocess
import sys
from itertools import pairwise
from multiprocessing import set_forkserver_preload
from pathlib import Path

import pytest
import torch
from helpers import random_batch, write_model
from torch import distributed, multiprocessing
from transformer_lens.model_bridge import TransformerBridge

from harmcircuits.circuits.scores import WeightScores
from harmcircuits.hooks import distributed as sharing
from harmcircuits.hooks.absolute import add_absolute
from harmcircuits.hooks.accumulation import _add_signed, memory_groups
from harmcircuits.hooks.attribution import removal_effect, snip_scores
from harmcircuits.hooks.objectives import completion_loss
from harmcircuits.hooks.weights import named_weights, weight_sites

BATCHES = [random_batch(), random_batch(2, 7, seed=1), random_batch(4, 8, seed=2)]
MODELS = ("Llama", "GPT2", "Mixtral")


@pytest.mark.parametrize("name", ["Llama", "GPT2", "GPTNeoX", "GPTJ", "Gemma3", "Bloom", "Mixtral"])
@pytest.mark.parametrize("method", [removal_effect, snip_scores])
def test_a_bound_on_memory_changes_no_bit(open_model, name, method):
    bridge = open_model(name)
    sites = weight_sites(bridge)
    largest = 4 * max(site.parameter.numel() for site in sites.values())
    expected = method(bridge, BATCHES, completion_loss)

    for bound in (largest, 3 * largest):
        assert len(list(memory_groups(sites, bound))) > 1, "one group would bound nothing"
        bounded = method(bridge, BATCHES, completion_loss, max_memory=bound)
        assert bounded.source == expected.source
        assert list(bounded.values) == list(expected.values), "ties go to the earlier matrix"
        for weight, value in expected.values.items():
            assert torch.equal(bounded.values[weight], value)

    with pytest.raises(ValueError, match=f"max_memory={largest - 1:,} .*{largest:,}.*give"):
        method(bridge, BATCHES, completion_loss, max_memory=largest - 1)


def test_groups_fill_the_bound_and_hold_every_matrix_once(llama):
    sites = weight_sites(llama)
    sizes = {name: 4 * site.parameter.numel() for name, site in sites.items()}
    for bound in (max(sizes.values()), 9000, sum(sizes.values())):
        groups = list(memory_groups(sites, bound))
        assert [name for group in groups for name in group] == list(sites)

        for group, following in pairwise(groups):
            size = sum(sizes[name] for name in group)
            first = next(iter(following))
            assert size <= bound < size + sizes[first]

    assert list(memory_groups(sites, None)) == [sites]


def operands(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(16, 40, 30, generator=generator).to(dtype)
    second = torch.randn(16, 40, 50, generator=generator).to(dtype)
    return first, second


def test_float32_operands_are_added_up_in_the_product_itself():
    first, second = operands(torch.float32)
    total = torch.ones(30, 50)
    _add_signed(first, second, total)
    expected = torch.ones(30, 50)
    expected.addmm_(first.flatten(0, 1).T, second.flatten(0, 1))
    assert torch.equal(total, expected)


@pytest.mark.parametrize(
    ("dtype", "least", "most"),
    [(torch.bfloat16, 1e-4, 2**-8), (torch.float16, 0.0, 1e-5)],
    ids=str,
)
def test_a_batch_is_rounded_once_and_sums_are_not(dtype, least, most):
    """300 times the same: rounded to bfloat16 the sum itself would stop growing at 256 of them."""
    first, second = operands(dtype)
    total = torch.zeros(30, 50)
    for _ in range(300):
        _add_signed(first, second, total)
    expected = 300 * torch.einsum("bpi,bpj->ij", first.double(), second.double())
    error = (total - expected).norm() / expected.norm()
    assert least <= error <= most


def test_float16_does_not_overflow():
    first = torch.full((2, 100, 3), 200.0, dtype=torch.float16)
    total = torch.zeros(3, 3)
    _add_signed(first, first, total)
    assert (total == 200 * 200.0**2).all()


@pytest.mark.parametrize("scratch", [None, 1, 20, 150, 10_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_are_the_sum_of_absolute_gradients(scratch, dtype):
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(5, 7, 11, generator=generator).to(dtype)
    second = torch.randn(5, 7, 13, generator=generator).to(dtype)
    total = torch.ones(11, 13)
    add_absolute(first, second, total, scratch=scratch)

    expected = torch.ones(11, 13, dtype=torch.float64)
    for left, right in zip(first.double(), second.double(), strict=True):
        expected += (left.T @ right).abs()
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-5)


def join(rank: int, n_processes: int, folder: str) -> None:
    torch.set_num_threads(1)
    address = f"file://{folder}/rendezvous"
    distributed.init_process_group("gloo", address, rank=rank, world_size=n_processes)


def start(target, n_processes: int, folder: Path) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    arguments = (n_processes, str(folder))
    # Not "fork": this process has threads, whose locks a fork would take along. The server has
    # imported what the processes need, once for all of them.
    set_forkserver_preload([__name__])
    multiprocessing.start_processes(target, arguments, n_processes, start_method="forkserver")


def boot(folder: str | Path, name: str) -> TransformerBridge:
    return TransformerBridge.boot_transformers(
        f"{folder}/{name}", dtype=torch.float32, device="cpu"
    )


def all_scores(bridge) -> dict[str, WeightScores]:
    """Signed and absolute, fewer batches than processes, and more than one group of matrices."""
    return {
        "signed": removal_effect(bridge, BATCHES, completion_loss),
        "absolute": snip_scores(bridge, BATCHES, completion_loss),
        "one_batch": removal_effect(bridge, BATCHES[:1], completion_loss),
        "bounded": snip_scores(bridge, BATCHES, completion_loss, max_memory=30_000),
    }


def score_and_save(rank: int, n_processes: int, folder: str) -> None:
    join(rank, n_processes, folder)
    for name in MODELS:
        for key, scores in all_scores(boot(folder, name)).items():
            scores.save(f"{folder}/{name}-{key}-{rank}")
    distributed.destroy_process_group()


def assert_scores_close(scores: WeightScores, expected: WeightScores) -> None:
    """Float32 sums in another order: 1e-5 of the largest score of each matrix."""
    assert scores.source == expected.source
    assert list(scores.values) == list(expected.values)
    for name, value in expected.values.items():
        tolerance = 1e-5 * value.abs().max().item()
        torch.testing.assert_close(scores.values[name], value, rtol=1e-5, atol=tolerance)


@pytest.mark.parametrize("n_processes", [2, 3])
def test_several_processes_give_the_scores_of_one(tmp_path, n_processes):
    for name in MODELS:
        write_model(name, tmp_path / name)
    start(score_and_save, n_processes, tmp_path)

    for name in MODELS:
        bridge = boot(tmp_path, name)
        for key, expected in all_scores(bridge).items():
            for rank in range(n_processes):
                shared = WeightScores.load(tmp_path / f"{name}-{key}-{rank}")
                assert_scores_close(shared, expected)

        part = removal_effect(bridge, BATCHES[::n_processes], completion_loss)
        whole = removal_effect(bridge, BATCHES, completion_loss)
        for weight, value in whole.values.items():
            difference = (part.values[weight] - value).abs().max()
            assert difference > 1e-2 * value.abs().max(), "the comparison must be able to fail"


def score_what_others_do_not(rank: int, n_processes: int, folder: str) -> None:
    join(rank, n_processes, folder)
    bridge = boot(folder, "Llama")
    others = rf"processes \[1, 2\] of {n_processes} were given other"
    remedy = "give every process all the batches"

    with pytest.raises(ValueError, match=f"{others} batches.*{remedy}"):
        removal_effect(bridge, BATCHES[rank:], completion_loss)
    # In process 0 the bound is too small for any matrix: that must not leave the others waiting.
    with pytest.raises(ValueError, match=f"{others} options.*{remedy}"):
        removal_effect(bridge, BATCHES, completion_loss, max_memory=1 + 10**6 * rank)
    method = snip_scores if rank else removal_effect
    with pytest.raises(ValueError, match=f"{others} options.*{remedy}"):
        method(bridge, BATCHES, completion_loss)

    weight = next(iter(named_weights(bridge).values()))
    with torch.no_grad():
        weight[0, 0] = rank
    with pytest.raises(ValueError, match=f"{others} weights.*{remedy}"):
        removal_effect(bridge, BATCHES, completion_loss)
    distributed.destroy_process_group()


def test_differences_are_refused_in_every_process(tmp_path):
    write_model("Llama", tmp_path / "Llama")
    start(score_what_others_do_not, 3, tmp_path)


@pytest.mark.parametrize("n_batches", [5, 2])
def test_processes_run_every_batch_once_and_add_up_every_total(llama, monkeypatch, n_batches):
    batches = [random_batch(seed=seed) for seed in range(n_batches)]
    sites = dict(list(weight_sites(llama).items())[:4])
    totals = {name: torch.zeros(number) for number, name in enumerate(sites)}
    run = []
    reduced = []

    def accumulate(bridge, share, objective, sites, totals, absolute):
        assert share, "nothing to run, and no gradient would be reached"
        run.extend(share)
        return torch.tensor(1.0 * len(share))

    monkeypatch.setattr(sharing.distributed, "all_reduce", reduced.append)
    monkeypatch.setattr(sharing.distributed, "get_world_size", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(sharing.distributed, "get_rank", lambda rank=rank: rank)
        shared = sharing.shared_among_processes(accumulate)
        shared(llama, batches, completion_loss, sites, totals, "signed")

    assert sorted(map(id, run)) == sorted(map(id, batches))
    losses, sums = reduced[::5], [total for total in reduced if total.ndim]
    assert sum(losses) == n_batches, "the objective's sum comes first"
    assert [len(total) for total in sums] == 3 * [0, 1, 2, 3], "the same calls, in one order"


def test_one_process_does_not_enter_the_code_for_several(llama):
    code = f"""
import sys
import torch
from harmcircuits import Batch, completion_loss, removal_effect
from transformer_lens.model_bridge import TransformerBridge

bridge = TransformerBridge.boot_transformers({str(llama.cfg.model_name)!r}, device="cpu")
batch = Batch(torch.tensor([[3, 4, 5]]), torch.tensor([[False, False, True]]))
removal_effect(bridge, [batch], completion_loss)
assert "harmcircuits.hooks.accumulation" in sys.modules
assert "harmcircuits.hooks.distributed" not in sys.modules
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
