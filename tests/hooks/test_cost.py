"""What a search costs, against what it computes: operations, passes, bytes.

Would catch: a term of the formula that is missing or counted twice, an outline whose shapes are not
the model's, a bound or a renewed target that costs nothing.
"""

from dataclasses import replace
from itertools import count

import pytest
import torch
from helpers import ARCHITECTURES, random_batch
from torch.utils.flop_counter import FlopCounterMode

from harmcircuits.circuits.masks import WeightMask
from harmcircuits.hooks.accumulation import accumulate
from harmcircuits.hooks.cost import Speed, Work, estimate_search, n_tokens, search_work
from harmcircuits.hooks.loading import load_outline
from harmcircuits.hooks.losses import completion_nll
from harmcircuits.hooks.memory import estimate_memory, shared_totals
from harmcircuits.hooks.objectives import completion_loss
from harmcircuits.hooks.protection import checked_batches
from harmcircuits.hooks.search import find_circuit
from harmcircuits.hooks.weights import named_weights, weight_sites
from harmcircuits.prompts import Batch

TARGET = [random_batch(6, 9), random_batch(6, 12, seed=1)]
SPARED = {"first": [random_batch(9, 9, seed=2)], "second": [random_batch(6, 9, seed=3)]}
# TransformerLens splits their fused matrices by their values, which an outline has not.
FUSED = {"GPT2", "Phi3"}
LARGER = dict(
    hidden_size=128,
    num_hidden_layers=3,
    intermediate_size=512,
    vocab_size=512,
    max_position_embeddings=64,
)
# A machine on which a product of two numbers takes a second: then seconds are products.
ONE_A_SECOND = {"tflops": 2e-12}


def answers_at_end(n: int = 4, length: int = 16, n_answer: int = 4) -> Batch:
    tokens = torch.ones(n, length, dtype=torch.int64)
    is_target = torch.zeros(n, length, dtype=torch.bool)
    is_target[:, -n_answer:] = True
    return Batch(tokens, is_target)


def products(work) -> float:
    """Half the floating-point operations: a product comes with a sum."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 2


def test_the_formula_is_what_is_computed(open_model):
    # torch counts no products that are added up in place, as those of float32 scores are.
    bridge = open_model("Llama", dtype=torch.bfloat16, **LARGER)
    batch = answers_at_end()
    speed = Speed.of_machine(bridge, batch, **ONE_A_SECOND)
    sites = weight_sites(bridge)
    totals = shared_totals(sites)
    read = products(lambda: completion_nll(bridge, [batch]))
    scored = products(
        lambda: accumulate(bridge, [batch], completion_loss, sites, totals, "per token")
    )
    n = n_tokens([batch])
    # What attention does beside its matrices is left out: L / 6d of a pass, and as much backwards.
    assert n * speed.read == pytest.approx(read, rel=0.04)
    assert n * speed.score == pytest.approx(scored, rel=0.04)
    assert n * speed.read < read and n * speed.score < scored


def test_the_next_tokens_are_counted_for_each_answer_or_read_once(open_model):
    bridge = open_model("Llama", **LARGER)
    batch = answers_at_end()
    n_weights = sum(weight.numel() for weight in named_weights(bridge).values())
    n_output = LARGER["vocab_size"] * LARGER["hidden_size"]
    computed = Speed.of_machine(bridge, batch, **ONE_A_SECOND)
    assert computed.decode == pytest.approx(len(batch) * (n_weights + n_output))
    # Two bytes a second: the weights, of four bytes each, take two seconds each.
    read = Speed.of_machine(bridge, batch, tflops=1e6, bandwidth=2e-9)
    assert read.decode == pytest.approx(2 * (n_weights + n_output))


@pytest.mark.parametrize("renew", [0, 5])
@pytest.mark.parametrize("protect", [{}, SPARED])
def test_a_search_computes_what_is_said(llama, monkeypatch, protect, renew):
    """Tokens that pass the model, against those of a search; the number of masks tried is its own."""
    tokens = {True: 0, False: 0}
    forward = type(llama).forward

    def counted(self, given, *arguments, **options):
        tokens[torch.is_grad_enabled()] += given.numel()
        return forward(self, given, *arguments, **options)

    monkeypatch.setattr(type(llama), "forward", counted)
    # Masks that are met again are not checked again; here they count as others.
    numbers = count()
    monkeypatch.setattr(WeightMask, "digest", property(lambda _: str(next(numbers))))
    renewed = (lambda _: TARGET) if renew else None
    options = {"size": [0.05, 0.1], "steps": 3}
    mask = find_circuit(llama, TARGET, protect, **options, renew=renewed, budget=1.0)[0]
    tried = len(mask.trace.where("weights_removed"))
    assert tried

    work = search_work(TARGET, protect, n_sizes=2, steps=3, renew=renew, n_passes=1)
    assert work.scored == tokens[True]
    n_checked = n_tokens(checked_batches(SPARED))
    requests = sum(int((~batch.is_target & batch.is_token).sum()) for batch in TARGET)
    n_renewed = (2 + 2 * 3) if renew else 0
    said = work.read - n_renewed * requests
    if protect:
        said += n_checked * (tried - work.chosen)
    assert said == tokens[False]
    assert work.decoded == n_renewed * renew * len(TARGET)
    options = {"n_sizes": 2, "steps": 3, "renew": renew, "n_passes": 1}
    together = search_work(TARGET, protect, **options, at_once=sum(map(len, TARGET)))
    assert together == replace(work, decoded=n_renewed * renew), "all answers in one batch"


def test_a_bound_takes_more_passes_and_less_memory(llama):
    n_bytes = [4 * weight.numel() for weight in named_weights(llama).values()]
    speed = Speed(1.0, 0.0, 0.0, 0.0)
    options = {"size": 0.1, "steps": 2, "speed": speed}
    free = estimate_search(llama, TARGET, SPARED, **options)
    bound = estimate_search(llama, TARGET, SPARED, **options, max_memory=2 * max(n_bytes))
    assert bound.seconds >= 3 * free.seconds
    assert bound.memory.accumulators < free.memory.accumulators
    assert "GiB on disk, about" in str(bound) and "on disk" not in str(free)
    expected = estimate_memory(llama, TARGET, protect=SPARED)
    assert free.memory == expected


def test_an_estimate_says_memory_steps_and_parts(llama):
    speed = Speed(score=1.0, read=0.1, decode=2.0, choose=0.5)
    options = {"size": 0.1, "steps": 2, "renew": 3, "speed": speed}
    estimate = estimate_search(llama, TARGET, SPARED, **options)
    assert estimate.seconds == pytest.approx(
        estimate.work.scored
        + 0.1 * estimate.work.read
        + 2.0 * estimate.work.decoded
        + 0.5 * estimate.work.chosen
    )
    text = str(estimate)
    assert "(2 steps of " in text and "in all scores " in text
    assert "checks " in text and "answers " in text
    alone = str(estimate_search(llama, TARGET, size=0.1, steps=1, speed=speed))
    assert "(1 step of " in alone and "answers" not in alone


def test_the_speed_that_is_timed_is_of_what_is_run(llama):
    speed = Speed.measured(llama, TARGET[0])
    assert min(speed.score, speed.read, speed.decode, speed.choose) > 0
    assert speed.score > speed.read
    assert not any(parameter.grad is not None for parameter in llama.parameters())


def test_no_batches_are_refused(llama):
    with pytest.raises(ValueError, match="estimate_search: no batches"):
        estimate_search(llama, [], size=0.1)


def test_work_adds_up():
    work = Work(1, 2, 3, 4) * 2 + Work(scored=1)
    assert work == Work(3, 4, 6, 8)
    assert n_tokens(TARGET) == 6 * 8 + 6 * 11  # the last is predicted and not read


# Outlines


@pytest.mark.parametrize("name", sorted(ARCHITECTURES.keys() - FUSED))
def test_an_outline_has_the_model_s_shapes(open_model, name):
    bridge = open_model(name)
    outline = load_outline(bridge.cfg.model_name, dtype="float32")
    shapes = {name: weight.shape for name, weight in named_weights(bridge).items()}
    assert {name: weight.shape for name, weight in named_weights(outline).items()} == shapes
    assert all(weight.is_meta for weight in named_weights(outline).values())


@pytest.mark.parametrize("name", ["Llama", "GPTNeoX", "Gemma2"])
def test_an_outline_costs_what_the_model_does(open_model, name):
    bridge = open_model(name)
    outline = load_outline(bridge.cfg.model_name + "/config.json", dtype="float32")
    expected = estimate_memory(bridge, TARGET, protect=SPARED)
    memory = estimate_memory(outline, TARGET, protect=SPARED)
    assert (memory.accumulators, memory.sums) == (expected.accumulators, expected.sums)
    assert memory.weights == pytest.approx(expected.weights, rel=0.1)
    assert memory.activations == pytest.approx(expected.activations, rel=0.05)


@pytest.mark.parametrize("name", sorted(FUSED))
def test_matrices_that_only_values_tell_apart_are_refused(open_model, name):
    with pytest.raises(ValueError, match="load it and use estimate_search"):
        load_outline(open_model(name).cfg.model_name)


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no configuration of a language model"):
        load_outline(str(tmp_path))
    with pytest.raises(ValueError, match="dtype='int8'; expected one of float32"):
        load_outline(str(tmp_path), dtype="int8")
