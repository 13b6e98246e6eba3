"""Numbers that are NaN or infinite, put in on purpose: what is said of each, and that it is said.

Would catch: a score, loss, rate or answer that is computed from NaN and looks like any other; an
error that names another example, weight or layer than the one at fault; one that names none; a
process that waits for others which have ended; a check that runs the model again where nothing is
wrong.
"""

import math
import re

import pytest
import torch
from helpers import random_batch, write_model
from test_accumulation import BATCHES as SHARED
from test_accumulation import boot, join, start
from torch import distributed

from harmcircuits.behaviours.generation import Sampling, generate
from harmcircuits.circuits.masks import WeightMask
from harmcircuits.hooks import finite
from harmcircuits.hooks.attribution import (
    gradient_norm,
    magnitude_scores,
    removal_effect,
    snip_scores,
    token_contributions,
    token_price,
    wanda_scores,
)
from harmcircuits.hooks.finetuning import fine_tuning
from harmcircuits.hooks.finite import NotFiniteError
from harmcircuits.hooks.inspection import mean_residual
from harmcircuits.hooks.losses import answer_log_odds, completion_nll, kl_under
from harmcircuits.hooks.objectives import completion_loss
from harmcircuits.hooks.patching import activation_patching
from harmcircuits.hooks.search import find_circuit
from harmcircuits.hooks.weights import named_weights, source_on
from harmcircuits.prompts import Batch, PromptSet

BATCHES = [random_batch(3, seed=1), random_batch(3, seed=2)]
WEIGHT = "blocks.1.mlp.in.weight"
READS_ALL = {"vocab_size": 320, "max_position_embeddings": 64}  # of the tests' tokenizer
TEXTS = PromptSet.of(["use it", "clean it", "how to use it ?"])

# What reads batches, each with the same call.
READERS = {
    "removal_effect": lambda bridge: removal_effect(bridge, BATCHES),
    "snip_scores": lambda bridge: snip_scores(bridge, BATCHES),
    "snip_scores before": lambda bridge: snip_scores(bridge, BATCHES, average="before_abs"),
    "token_price": lambda bridge: token_price(bridge, BATCHES),
    "bounded": lambda bridge: removal_effect(bridge, BATCHES, max_memory=30_000),
    "wanda_scores": lambda bridge: wanda_scores(bridge, BATCHES),
    "gradient_norm": lambda bridge: gradient_norm(bridge, BATCHES),
    "completion_nll": lambda bridge: completion_nll(bridge, BATCHES),
    "kl_under": lambda bridge: kl_under(bridge, small_mask(bridge), BATCHES),
    "token_contributions": lambda bridge: token_contributions(bridge, small_mask(bridge), BATCHES),
    "activation_patching": lambda bridge: activation_patching(
        bridge, small_mask(bridge), BATCHES[0], parts=["mlp"], positions=[]
    ),
    "find_circuit": lambda bridge: find_circuit(bridge, BATCHES, size=0.01, steps=1),
}


def small_mask(bridge) -> WeightMask:
    """Weights of the first block, so that those of the second stay as they are."""
    shapes = {name: tuple(weight.shape) for name, weight in named_weights(bridge).items()}
    source = source_on(bridge, "test")
    return WeightMask({"blocks.0.attn.q.weight": torch.arange(20)}, shapes, source)


def embedding(bridge) -> torch.Tensor:
    return bridge.original_model.get_input_embeddings().weight


def spoil(bridge, value: float) -> None:
    weights = bridge.state_dict(keep_vars=True)
    with torch.no_grad():
        weights[WEIGHT][2, 3] = value


def only_token(token: int, row: int) -> list[Batch]:
    """Batches of ordinary tokens but for one, which stands in one example alone."""
    batches = [random_batch(3, seed=1), random_batch(3, seed=2)]
    for batch in batches:
        batch.tokens[batch.tokens == token] = 4
    batch = batches[row // 3]
    batch.tokens[row % 3, 1] = token
    return batches


# Weights


def test_a_weight_that_is_not_finite_is_named(open_model):
    bridge = open_model("Llama")
    for read in READERS.values():
        read(bridge)  # as it is, nothing is said
    spoil(bridge, math.nan)
    for name, read in READERS.items():
        with pytest.raises(NotFiniteError) as caught:
            read(bridge)
        text = str(caught.value)
        assert f"{WEIGHT} holds 1 value that is NaN or infinite (float32)" in text, name
        assert "example 0 (row 0 of batch 0" in text, name
        assert "open the model again" in text, name
        assert not re.search(r"tensor\(|\[\d+, ", text), "no tokens are shown"
        assert caught.value.index == 0, name
    spoil(bridge, math.inf)
    with pytest.raises(NotFiniteError, match=f"{WEIGHT} holds 1 value"):
        removal_effect(bridge, BATCHES)


@pytest.mark.parametrize("name", ["GPT2", "Mixtral", "Phi3"])
def test_a_weight_is_named_as_it_is_scored_where_it_is_fused_or_of_experts(open_model, name):
    bridge = open_model(name)
    last = list(named_weights(bridge))[-1]
    with torch.no_grad():
        named_weights(bridge)[last][..., 0] = math.nan
    with pytest.raises(NotFiniteError, match=rf"{re.escape(last)} holds .* NaN or infinite"):
        removal_effect(bridge, BATCHES)


def test_scores_without_data_name_the_weight_too(open_model):
    bridge = open_model("Llama")
    spoil(bridge, math.nan)
    with pytest.raises(ValueError, match=f"{WEIGHT} holds a score that is not finite"):
        magnitude_scores(bridge)


# Examples


def test_the_example_at_fault_is_named(open_model):
    bridge = open_model("Llama")
    completion_nll(bridge, only_token(7, 0))
    with torch.no_grad():
        embedding(bridge)[7] = math.inf
    for row in (0, 4, 5):
        place = rf"example {row} \(row {row % 3} of batch {row // 3}, \d tokens\): completion_loss"
        for read in (completion_nll, removal_effect, token_price):
            with pytest.raises(NotFiniteError, match=place) as caught:
                read(bridge, only_token(7, row))
            assert caught.value.index == row
            assert "embed.weight holds" in str(caught.value)


def test_an_objective_is_named_where_the_model_is_finite(llama):
    def odd(bridge, batch):
        losses = completion_loss(bridge, batch)
        return losses / (batch.tokens[:, 0] != 9).float()

    batches = [random_batch(3, seed=1), random_batch(3, seed=2)]
    for batch in batches:
        batch.tokens[:, 0] = 8
    removal_effect(llama, batches, odd)
    batches[1].tokens[1, 0] = 9
    with pytest.raises(
        NotFiniteError,
        match=r"example 4 .*: odd is inf; every activation of the model is finite, so look at odd",
    ):
        removal_effect(llama, batches, odd)


def test_a_gradient_is_named_where_the_loss_is_finite(llama):
    class Steep(torch.autograd.Function):
        """The identity, whose gradient is not a number."""

        @staticmethod
        def forward(ctx, values):
            return values.clone()

        @staticmethod
        def backward(ctx, *gradients):
            return gradients[0] * math.nan

    def steep(bridge, batch):
        losses = completion_loss(bridge, batch)
        return Steep.apply(losses) if (batch.tokens[:, 0] == 9).any() else losses

    batches = [random_batch(1, seed=seed) for seed in range(3)]
    for number, batch in enumerate(batches):
        batch.tokens[:, 0] = 9 if number == 2 else 8
    removal_effect(llama, batches[:2], steep)
    with pytest.raises(
        NotFiniteError,
        match=r"example 2 .*gradient of steep is not finite; first at the output of blocks\.1\.mlp",
    ):
        removal_effect(llama, batches, steep)


def test_nothing_is_run_again_where_all_is_finite(llama, monkeypatch):
    def fail(*_):
        raise AssertionError("looked for a fault that is not there")

    expected = removal_effect(llama, BATCHES)
    monkeypatch.setattr(finite, "_example", fail)
    monkeypatch.setattr(finite, "_in_forward", fail)
    calls = []

    def counted(bridge, batch):
        calls.append(batch)
        return completion_loss(bridge, batch)

    scores = removal_effect(llama, BATCHES, counted)
    assert len(calls) == len(BATCHES)
    for name, value in expected.values.items():
        assert torch.equal(scores.values[name], value)


# float16


@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_float16_scores_are_those_of_float32_where_sums_leave_its_range(open_model, name):
    """The objective times 4,096: gradients fit float16, most products with inputs do not."""
    half = open_model(name, dtype=torch.float16)
    whole = open_model(name)
    batches = [random_batch(800, seed=1)]

    def large(bridge, batch):
        return 4096 * completion_loss(bridge, batch)

    scores, expected = removal_effect(half, batches, large), removal_effect(whole, batches, large)
    largest = 0.0
    for weight, value in expected.values.items():
        assert scores.values[weight].dtype == torch.float32
        # float16 has 11 bits: 0.05 % an operation, over some tens of operations in depth.
        tolerance = 0.02 * value.abs().max().item()
        torch.testing.assert_close(scores.values[weight], value, rtol=0.02, atol=tolerance)
        gradient = value * len(batches[0]) / named_weights(whole)[weight].detach()
        largest = max(largest, gradient.abs().max().item())
    assert largest > torch.finfo(torch.float16).max, "a sum in float16 would be infinite"


def test_an_activation_that_overflows_in_float16_is_named(open_model):
    bridge = open_model("Llama", dtype=torch.float16)
    readers = (completion_nll, removal_effect, snip_scores, wanda_scores)
    for read in readers:
        read(bridge, BATCHES)
    weights = bridge.state_dict(keep_vars=True)
    with torch.no_grad():
        weights["blocks.1.mlp.in.weight"].mul_(3000)
        weights["blocks.1.mlp.gate.weight"].mul_(3000)
    for read in readers:
        with pytest.raises(NotFiniteError) as caught:
            read(bridge, BATCHES)
        text = str(caught.value)
        assert "first activation that is not finite is blocks.1.mlp.out.hook_in, in float16" in text
        assert "65,504; open the model with dtype='bfloat16' or 'float32'" in text
    # The same weights are no fault of theirs: in a wider format all is finite.
    assert completion_nll(bridge.to(torch.float32), BATCHES).isfinite().all()


def test_a_gradient_that_overflows_in_float16_is_named(open_model):
    bridge = open_model("Llama", dtype=torch.float16)

    def enormous(bridge, batch):
        return 1e6 * completion_loss(bridge, batch)

    assert enormous(bridge, BATCHES[0]).isfinite().all()
    with pytest.raises(
        NotFiniteError,
        match=r"example 0 .*gradient of enormous is not finite; first at the output of blocks\.1\."
        r".* in float16, which ends at 65,504",
    ):
        removal_effect(bridge, BATCHES, enormous)


# Answers


@pytest.mark.parametrize("sampling", [None, Sampling(samples=2, temperature=0.5, seed=1)])
def test_answers_of_logits_that_are_nan_are_refused(open_model, sampling):
    bridge = open_model("Llama", **READS_ALL)
    answers = generate(bridge, TEXTS, sampling=sampling, max_new_tokens=5)
    token = bridge.tokenizer.convert_tokens_to_ids("how")
    with torch.no_grad():
        embedding(bridge)[token] = math.nan
    with pytest.raises(
        NotFiniteError, match=r"request 2: logits are not finite; .*holds"
    ) as caught:
        generate(bridge, TEXTS, sampling=sampling, max_new_tokens=5, batch_size=2)
    assert caught.value.index == 2
    assert "how to use" not in str(caught.value), "requests are not shown"
    n_of_two = 2 * (sampling.samples if sampling else 1)
    others = generate(bridge, TEXTS[:2], sampling=sampling, max_new_tokens=5)
    assert others == answers[:n_of_two]


def test_log_odds_and_residuals_name_the_text(open_model):
    bridge = open_model("Llama", **READS_ALL)
    rows = [[1, 5, 6], [1, 7, 6]]
    assert answer_log_odds(bridge, TEXTS, ["yes"], ["no"]).isfinite().all()
    mean_residual(bridge, rows, [1])
    with torch.no_grad():
        embedding(bridge)[bridge.tokenizer.convert_tokens_to_ids("how")] = math.nan
        embedding(bridge)[7] = math.inf
    with pytest.raises(NotFiniteError, match="log_odds: request 2: logits are not finite"):
        answer_log_odds(bridge, TEXTS, ["yes"], ["no"])
    with pytest.raises(NotFiniteError, match=r"mean_residual: text 1: .* are not finite"):
        mean_residual(bridge, rows, [1])


# Runs


def test_a_search_says_whose_example_it_is(open_model):
    bridge = open_model("Llama")
    batches = only_token(7, 4)
    others = [batch for batch in only_token(7, 0)[1:]]
    find_circuit(bridge, others, protect={"benign": batches}, size=0.01, steps=1)
    with torch.no_grad():
        embedding(bridge)[7] = math.inf
    with pytest.raises(NotFiniteError, match=r"^benign, (priced|checked)"):
        find_circuit(bridge, others, protect={"benign": batches}, size=0.01, steps=1)
    with pytest.raises(NotFiniteError, match=r"^target: example 4 "):
        find_circuit(bridge, batches, protect={"benign": others}, size=0.01, steps=1)


def test_training_says_which_example_before_a_weight_is_written(open_model):
    bridge = open_model("Llama")
    batches = only_token(7, 4)[1:]
    with torch.no_grad():
        embedding(bridge)[7] = math.inf
    before = named_weights(bridge)[WEIGHT].clone()
    with (
        pytest.raises(NotFiniteError, match=r"loss is nan at step 0; lower lr.*example 1 \(row 1"),
        fine_tuning(bridge, batches, lr=0.1) as run,
    ):
        run.until(1)
    assert torch.equal(named_weights(bridge)[WEIGHT], before)


def score_with_one_that_is_infinite(rank: int, n_processes: int, folder: str) -> None:
    join(rank, n_processes, folder)
    bridge = boot(folder, "Llama")

    def odd(bridge, batch):
        losses = completion_loss(bridge, batch)
        # The second batch, which process 1 alone runs.
        return losses * math.inf if torch.equal(batch.tokens, SHARED[1].tokens) else losses

    with pytest.raises(NotFiniteError, match="example"):
        removal_effect(bridge, [SHARED[0], SHARED[1]], odd)
    distributed.destroy_process_group()


def test_every_process_says_so_and_none_waits(tmp_path):
    write_model("Llama", tmp_path / "Llama")
    start(score_with_one_that_is_infinite, 2, tmp_path)
