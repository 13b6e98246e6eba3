"""Faults that a review proved, the smallest case of each; its number stands in the name of the test.

Would catch each of them again. What a GPU alone would show is in `test_pretended_gpu.py`.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import random_batch

import harmcircuits as hc
from harmcircuits.batches import Batch
from harmcircuits.behaviours.generation import GenerationCache, generate
from harmcircuits.behaviours.outcomes import Outcomes
from harmcircuits.behaviours.repeats import IN_TWO_SPLITS, repeat_rows
from harmcircuits.behaviours.request_files import RequestFiles, request_behaviours, request_pairs
from harmcircuits.circuits.masks import N_MAGNITUDE_BINS
from harmcircuits.circuits.scores import Source
from harmcircuits.export import _whole_or_nothing
from harmcircuits.hooks.weights import weights_digest
from harmcircuits.prompts import SPLITS, Example, PromptSet


def half_of_rows(batch: Batch, token: int) -> Batch:
    """Other answers of every third row."""
    tokens = batch.tokens.clone()
    for row in range(2, len(batch), 3):
        tokens[row, batch.is_target[row]] = token
    return Batch(tokens, batch.is_target)


def test_b2_the_digest_sees_pairs_of_signs_and_exchanges(llama):
    weight = hc.named_weights(llama)["blocks.0.mlp.out.weight"].data
    before, digest = weight.clone(), weights_digest(llama)
    changed = before.clone()
    changed[:, 1] *= -1
    exchanged = before.clone()
    exchanged[[0, 1]] = before[[1, 0]]
    for other in (changed, exchanged):
        weight.copy_(other)
        assert weights_digest(llama) != digest
    weight.copy_(before)
    assert weights_digest(llama) == digest


def test_b4_a_folder_belongs_to_one_search(llama, tmp_path):
    target, benign = [random_batch(seed=1)], random_batch(seed=2, n=6)
    loss = hc.completion_loss

    def search(name, objective, protect):
        options = {"size": 0.02, "steps": 2, "folder": tmp_path / name}
        return hc.find_circuit(llama, target, [protect], objective=objective, **options)

    search("a", lambda *pair: loss(*pair), [benign])
    with pytest.raises(ValueError, match="another objective"):
        search("a", lambda *pair: -loss(*pair), [benign])
    with pytest.raises(ValueError, match="another search"):
        search("a", lambda *pair: loss(*pair), [half_of_rows(benign, 7)])


def test_b5_and_b12_settings_of_the_model_bend_no_answer_and_the_cache_sees_what_does(
    sft, tmp_path
):
    prompts = sft.behaviour("harmful").prompts("heldout")[:4]
    cache = GenerationCache(tmp_path, sft.bridge)

    def answers(cache=None):
        return generate(sft.bridge, prompts, prefill="sure", max_new_tokens=9, cache=cache)

    first = answers(cache)
    own = sft.bridge.original_model.generation_config
    own.no_repeat_ngram_size, own.min_new_tokens = 1, 8
    assert answers() == first
    own.no_repeat_ngram_size = own.min_new_tokens = None

    end = own.eos_token_id
    own.eos_token_id = [end, first[0].tokens[3]]
    assert answers(cache) == answers() != first
    own.eos_token_id = end

    block = sft.bridge.original_model.model.layers[1]
    hook = block.register_forward_hook(lambda _, __, output: output.flip(-1))
    assert answers(cache) == answers() != first
    hook.remove()

    # As a template that prints the date: the same request in other tokens.
    template = sft.bridge.tokenizer.chat_template
    sft.bridge.tokenizer.chat_template = template + "sure"
    fresh = answers()
    sft.bridge.tokenizer.chat_template = template
    assert answers(cache) == first
    sft.bridge.tokenizer.chat_template = template + "sure"
    assert answers(cache) == fresh
    sft.bridge.tokenizer.chat_template = template


def test_b6_an_objective_may_run_the_model_without_gradients(llama):
    batch, loss = random_batch(), hc.completion_loss

    def less_a_constant(bridge, batch):
        value = loss(bridge, batch)
        with torch.no_grad():
            constant = loss(bridge, Batch(batch.tokens.flip(0), batch.is_target.flip(0)))
        return value - constant

    expected = hc.removal_effect(llama, [batch]).values
    given = hc.removal_effect(llama, [batch], less_a_constant).values
    for name, value in expected.items():
        torch.testing.assert_close(given[name], value)

    def with_a_lost_pass(bridge, batch):
        value = loss(bridge, batch)
        return value - loss(bridge, batch).detach()

    with pytest.raises(ValueError, match="no_grad"):
        hc.removal_effect(llama, [batch], with_a_lost_pass)


def test_b7_an_estimate_does_not_believe_the_first_examples(llama):
    width, lengths = 30, [4, 4, *[30] * 6]
    tokens = torch.full((len(lengths), width), 5)
    is_target = torch.zeros(len(lengths), width, dtype=torch.bool)
    for row, length in enumerate(lengths):
        is_target[row, length - 2 : length] = True
    batches = Batch(tokens, is_target), Batch(tokens, is_target.flip(0))
    first, second = (hc.estimate_memory(llama, [batch]).activations for batch in batches)
    assert first == pytest.approx(second, rel=0.05)


def test_b9_changes_of_three_samples_move_in_thirds(sft):
    behaviour = sft.behaviour("benign")
    answers = PromptSet(tuple(Example(f"q{n // 3}") for n in range(12)))
    nll = torch.full((4,), float("nan"))

    def outcomes(hits: str) -> Outcomes:
        verdicts = tuple("benign" if hit == "x" else "other" for hit in hits)
        return Outcomes(behaviour, answers, verdicts, nll)

    before, after = outcomes("xx.x..xxx..."), outcomes("x....." + "xx.x..")
    (row,) = after.changes(before, {})
    steps = np.array([-1 / 3, -1 / 3, -1 / 3, 1 / 3])
    exact = hc.Measurement.average(
        "x", {}, torch.from_numpy(steps), ["0", "1", "2", "3"], are_counts=True
    )
    assert (row.low, row.high) == pytest.approx((exact.low, exact.high))


def test_b10_a_group_of_the_held_out_file_is_scored_nowhere():
    asked = [Example(f"use thing {n}", group=f"thing {n}") for n in range(40)]
    measured = [replace(example, prompt=f"how to {example.prompt}") for example in asked[::2]]
    sets = PromptSet(tuple(asked)).splits(PromptSet(tuple(measured)))
    groups = {split: {example.cluster for example in sets[split]} for split in SPLITS}
    assert not groups["heldout"] & (groups["calibration"] | groups["choice"])
    assert len(groups["calibration"] | groups["choice"]) == 20


def test_b11_questions_are_where_their_requests_are_and_the_counter_looks_at_these():
    texts = {"harm": [], "good": [], "other harm": [], "other good": []}
    pairs = []
    for name, of_name in texts.items():
        for number in range(20 if "other" in name else 120):
            of_name.append(f"{name} {number}")
            if "harm" in name:
                group = {"group": f"of {of_name[-1]}"}
                pairs.append(Example(of_name[-1], **group, label="unsafe"))
                pairs.append(Example(f"twin of {of_name[-1]}", **group, label="safe"))
    harmful, benign, *heldout = map(PromptSet.of, texts.values())
    of_heldout = {"harmful_heldout": heldout[0], "benign_heldout": heldout[1]}
    files = RequestFiles(harmful, benign, pairs=PromptSet(tuple(pairs)), **of_heldout)
    behaviours, _ = request_behaviours(files, prefill="")
    scored = {
        example.prompt for split in SPLITS[:2] for example in behaviours["harmful"].prompts(split)
    }
    recognition = behaviours["recognition"]
    questions = recognition.prompts("heldout")
    assert len(questions) == 40
    assert not [example for example in questions if example.prompt.split("Request: ")[1] in scored]
    assert not repeat_rows(behaviours).where(IN_TWO_SPLITS)

    # Questions that ask about what is scored elsewhere are counted by their requests.
    about = recognition.prompts.subjects
    moved = replace(recognition.prompts, subjects={**about, "heldout": about["calibration"]})
    leaking = {**behaviours, "recognition": replace(recognition, prompts=moved)}
    rows = repeat_rows(leaking).where(IN_TWO_SPLITS, behaviour="harmful", measured="recognition")
    assert rows[0].mean == len(about["calibration"]) / 2


def test_b13_random_masks_of_like_magnitude_have_as_many_in_each_bin():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(100, 200, generator=generator)
    index = torch.randperm(weight.numel(), generator=generator)[:900].sort().values
    magnitude = weight.abs().flatten()
    index = torch.cat([index, magnitude.topk(200).indices]).unique()  # much of one bin
    mask = hc.WeightMask({"w": index}, {"w": (100, 200)}, Source("m", "x"))
    drawn = hc.random_like(mask, seed=1, weights={"w": weight})
    rank = magnitude.argsort(stable=True).argsort() * N_MAGNITUDE_BINS // magnitude.numel()

    def in_bins(of_mask):
        return rank[of_mask.removed["w"]].bincount(minlength=N_MAGNITUDE_BINS)

    assert torch.equal(in_bins(drawn), in_bins(mask))
    assert drawn != mask and drawn == hc.random_like(mask, seed=1, weights={"w": weight})
    times = torch.zeros(weight.numel())
    for seed in range(60):
        times[hc.random_like(mask, seed=seed, weights={"w": weight}).removed["w"]] += 1
    of_bin = times[rank == N_MAGNITUDE_BINS - 1]
    expected = 60 * int(in_bins(mask)[-1]) / len(of_bin)
    assert of_bin.mean() == pytest.approx(expected) and of_bin.std() < 2 * expected**0.5


def test_b14_files_of_others_stay(sft, llama, tmp_path):
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        hc.study(sft, out=tmp_path, force=True)
    mine = [tmp_path / "unfinished" / "x", tmp_path / "step-900" / "checkpoint"]
    for path in mine:
        path.parent.mkdir()
        path.write_text("mine")
    options = {"size": 0.01, "steps": 1, "folder": tmp_path}
    first = hc.find_circuit(llama, [random_batch()], **options)
    assert hc.find_circuit(llama, [random_batch()], **options) == first
    assert all(path.read_text() == "mine" for path in mine)


def test_b14_a_failed_rename_leaves_the_folder_that_was_there(tmp_path, monkeypatch):
    folder, rename = tmp_path / "edited", Path.rename
    folder.mkdir()
    (folder / "model").write_text("yesterday's")

    def failing(path, target):
        if path.name == "edited" and path.parent != tmp_path:
            raise OSError(13, "permission denied")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="denied"), _whole_or_nothing(folder) as unfinished:
        (unfinished / "model").write_text("today's")
    assert (folder / "model").read_text() == "yesterday's"


def test_b18_a_mask_of_another_model_is_refused(llama):
    scores = hc.magnitude_scores(llama)
    mask = hc.top_fraction(scores, 0.01)
    other = replace(mask, source=Source("another", "x"))
    for call in (
        lambda: hc.find_circuit(llama, [random_batch()], size=0.01, steps=1, exclude=other),
        lambda: hc.top_fraction(scores, 0.01, exclude=other),
        lambda: scores.sum_over(other),
        lambda: mask & other,
    ):
        with pytest.raises(ValueError, match="another"):
            call()


def test_b20_the_digest_of_requests_holds_what_splits_and_intervals_hang_on():
    first = Example("q", group="g", category="a", label="safe")
    for name in ("group", "category", "label"):
        assert (
            PromptSet((replace(first, **{name: "another"}),)).digest != PromptSet((first,)).digest
        )


def test_b21_no_silent_mean_and_no_silent_loss(llama):
    rows = hc.Rows(hc.Measurement.exact("a", {"m": "x", "seed": seed}, 1.0) for seed in (0, 1))
    with pytest.raises(ValueError, match="pool"):
        rows.frame(index="m", columns="metric")
    assert rows.pool("seed").frame(index="m", columns="metric").loc["x", "a"] == 1.0

    sides = ["unsafe"] * 3 + ["safe"]
    examples = [Example(f"q{n}", category="a", label=side) for n, side in enumerate(sides)]
    with pytest.warns(UserWarning, match="2 requests without a partner"):
        assert len(request_pairs(PromptSet(tuple(examples)))) == 1

    expected = hc.removal_effect(llama, [random_batch()])
    batch = random_batch()
    with torch.inference_mode():
        given = hc.removal_effect(llama, [batch])
    assert all(torch.equal(given.values[name], value) for name, value in expected.values.items())
    mask = hc.top_fraction(expected, 0.01)
    contributions = hc.token_contributions(llama, mask, [batch])
    torch.set_default_dtype(torch.float64)
    try:
        again = hc.token_contributions(llama, mask, [batch])
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(again[0], contributions[0])
