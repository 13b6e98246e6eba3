"""Bounded memory, several processes and blocks of a matrix give the scores of the plain pass.

Would catch: a matrix between two groups, processes that divide by their own count or wait for ever.
"""

import math
from multiprocessing import set_forkserver_preload

import pytest
import torch
from helpers import random_batch, write_model
from torch import distributed, multiprocessing

from harmcircuits.circuits.scores import WeightScores
from harmcircuits.hooks.checks import NotFiniteError
from harmcircuits.hooks.loading import load_model
from harmcircuits.hooks.objectives import completion_loss
from harmcircuits.hooks.weights import weight_sites
from harmcircuits.search import accumulation
from harmcircuits.search.accumulation import add_absolute, add_product, memory_groups
from harmcircuits.search.attribution import removal_effect, snip_scores

BATCHES = [random_batch(), random_batch(2, 7, seed=1), random_batch(4, 8, seed=2)]
MODEL = "Mixtral"  # has matrices with hook points and without
N_PROCESSES = 3


@pytest.mark.parametrize(("name", "method"), [("GPT2", removal_effect), ("Mixtral", snip_scores)])
def test_a_bound_on_memory_changes_no_bit(open_model, name, method):
    bridge = open_model(name)
    sites = weight_sites(bridge)
    largest = 4 * max(site.parameter.numel() for site in sites.values())
    expected = method(bridge, BATCHES)
    assert len(list(memory_groups(sites, largest))) > 1, "one group would bound nothing"
    bounded = method(bridge, BATCHES, max_memory=largest)
    assert bounded.source == expected.source
    assert list(bounded.values) == list(expected.values), "ties go to the earlier matrix"
    for weight, value in expected.values.items():
        assert torch.equal(bounded.values[weight], value)
    with pytest.raises(ValueError, match="max_memory"):
        method(bridge, BATCHES, max_memory=largest - 1)


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [(torch.float32, 0.0, 1e-5), (torch.bfloat16, 1e-4, 2**-8), (torch.float16, 0.0, 1e-5)],
    ids=str,
)
def test_a_batch_is_rounded_once_and_sums_are_not(dtype, low, high):
    """300 times the same: rounded to bfloat16 the sum itself would stop growing at 256 of them."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(16, 40, 30, generator=generator).to(dtype)
    second = torch.randn(16, 40, 50, generator=generator).to(dtype)
    total = torch.zeros(30, 50)
    for _ in range(300):
        add_product(first, second, total)
    expected = 300 * torch.einsum("bpi,bpj->ij", first.double(), second.double())
    error = (total - expected).norm() / expected.norm()
    assert low <= error <= high

    large, total = torch.full((2, 100, 3), 200.0, dtype=dtype), torch.zeros(3, 3)
    add_product(large, large, total)
    assert (total == 200 * 200.0**2).all() or dtype == torch.bfloat16, "beyond float16's range"


@pytest.mark.parametrize(
    ("scratch", "dtype"),
    [(None, torch.float32), (1, torch.bfloat16), (20, torch.float32), (150, torch.bfloat16)],
    ids=str,
)
def test_blocks_are_the_sum_of_absolute_gradients(scratch, dtype):
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(5, 7, 11, generator=generator).to(dtype)
    second = torch.randn(5, 7, 13, generator=generator).to(dtype)
    total = torch.ones(11, 13)
    add_absolute(first, second, total, scratch=scratch)
    expected = torch.ones(11, 13, dtype=torch.float64)
    for rows, columns in zip(first.double(), second.double(), strict=True):
        expected += (rows.T @ columns).abs()
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-5)


def test_shares_add_up_to_all_batches(llama, monkeypatch):
    """Each process in turn, its sums added to those of the others in place of an all_reduce."""
    sites, sums = weight_sites(llama), []
    expected = accumulation.mean_gradients(llama, BATCHES, completion_loss, sites)
    calls = []
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(
        distributed, "all_gather", lambda numbers, own: [t.copy_(own) for t in numbers]
    )
    monkeypatch.setattr(distributed, "all_reduce", lambda value: calls.append(value.clone()))
    for rank in range(2):
        calls.clear()
        monkeypatch.setattr(distributed, "get_rank", lambda rank=rank: rank)
        totals = {name: torch.ones(site.parameter.shape) for name, site in sites.items()}
        accumulation.add_gradients(llama, BATCHES, completion_loss, sites, totals, "signed", 1.0)
        sums = [a + b for a, b in zip(sums, calls, strict=True)] if sums else list(calls)
    losses = torch.cat([completion_loss(llama, batch) for batch in BATCHES]).detach()
    torch.testing.assert_close(sums[-1], losses)
    for total, mean in zip(sums[:-1], expected.values(), strict=True):
        torch.testing.assert_close(total, 1 + mean)  # what was there is counted once


def all_scores(bridge) -> dict[str, WeightScores]:
    """Signed and absolute, fewer batches than processes, and more than one group of matrices."""
    return {
        "signed": removal_effect(bridge, BATCHES),
        "absolute": snip_scores(bridge, BATCHES),
        "one batch": removal_effect(bridge, BATCHES[:1]),
        "bounded": snip_scores(bridge, BATCHES, max_memory=30_000),
    }


def one_is_infinite(bridge, batch):
    """The loss, infinite on the second batch, which process 1 alone runs."""
    losses = completion_loss(bridge, batch)
    return losses * math.inf if torch.equal(batch.tokens, BATCHES[1].tokens) else losses


def work(rank: int, folder: str) -> None:
    """What a process does: its share of the scores, then what all must refuse together."""
    torch.set_num_threads(1)
    address = f"file://{folder}/rendezvous"
    distributed.init_process_group("gloo", address, rank=rank, world_size=N_PROCESSES)
    bridge = load_model(f"{folder}/{MODEL}")
    for key, scores in all_scores(bridge).items():
        scores.save(f"{folder}/{key}-{rank}")

    # In process 0 the bound is too small for any matrix: that must not leave the others waiting.
    for batches, bound in ((BATCHES[rank:], None), (BATCHES, 1 + 10**6 * rank)):
        with pytest.raises(ValueError, match=r"processes \[1, 2\] of 3 .* give every process all"):
            removal_effect(bridge, batches, max_memory=bound)
    with pytest.raises(NotFiniteError, match=r"example 3 \(row 0 of batch 1\): one_is_infinite"):
        removal_effect(bridge, BATCHES, one_is_infinite)
    distributed.destroy_process_group()


@pytest.mark.slow
def test_several_processes_give_the_scores_of_one(tmp_path, monkeypatch):
    write_model(MODEL, tmp_path / MODEL)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    # Not "fork": this process has threads, whose locks a fork would take along. The server has
    # imported what the processes need, once for all of them.
    set_forkserver_preload([__name__])
    arguments = (str(tmp_path),)
    multiprocessing.start_processes(work, arguments, N_PROCESSES, start_method="forkserver")

    bridge = load_model(f"{tmp_path}/{MODEL}")
    for key, expected in all_scores(bridge).items():
        for rank in range(N_PROCESSES):
            scores = WeightScores.load(tmp_path / f"{key}-{rank}")
            assert scores.source == expected.source
            for name, value in expected.values.items():
                tolerance = 1e-5 * value.abs().max().item()  # sums in another order
                torch.testing.assert_close(scores.values[name], value, rtol=0, atol=tolerance)
