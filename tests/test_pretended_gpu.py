"""On a GPU, pretended: every public function and a study meet no tensor of another device.

Would catch: what was made on the CPU met by what is on the model's device, a tensor that numpy
cannot read, a score that waits for the device at every matrix. It says nothing of numbers or speed.
"""

from dataclasses import replace

import pytest
import torch
from helpers import small_model
from pretended_cuda import PretendedCuda, device_of, move

import harmcircuits as hc
from harmcircuits.batches import Batch
from harmcircuits.behaviours.generation import GenerationCache
from harmcircuits.hooks.generation import Sampling
from harmcircuits.hooks.inspection import attention_patterns, neuron_activations, prediction_changes
from harmcircuits.hooks.losses import perplexity
from harmcircuits.studies.controls import unpruned_scores


@pytest.fixture(scope="module")
def gpu():
    """An organism on the pretended GPU, and its answers."""
    model = small_model("sft", every=32)
    with PretendedCuda() as pretended:
        move(model.bridge)
        data = model.calibrations(["harmful", "benign", "refusal", "recognition"])
        yield model, data, pretended


def on_gpu(batches):
    return [Batch(batch.tokens.to("cuda"), batch.is_target.to("cuda")) for batch in batches]


def test_the_pretence_refuses_what_cuda_does():
    with PretendedCuda():
        here, there = torch.ones(2), torch.ones(2).to("cuda")
        assert there.device.type == "cuda" and (there + 1).is_cuda
        for mix in (lambda: here + there, lambda: there.numpy(), lambda: here[there.long()]):
            with pytest.raises((RuntimeError, TypeError)):
                mix()
        assert torch.equal(here, there.cpu())


def test_scores_masks_and_losses(gpu):
    model, data, _ = gpu
    bridge, harm, benign = model.bridge, data["harmful"].batches, data["benign"].batches
    scores = hc.removal_effect(bridge, harm)
    hc.removal_effect(bridge, on_gpu(harm))
    hc.removal_effect(bridge, harm, max_memory=2**19)
    price = hc.token_price(bridge, benign)
    assert all(device_of(values) == "cuda" for values in price.values.values())
    for make in (hc.snip_scores, hc.wanda_scores):
        make(bridge, harm)
    hc.random_scores(bridge)
    mask = hc.top_fraction(hc.magnitude_scores(bridge), 0.001)
    for within in ("weight", "model", "row"):
        mask = hc.top_fraction(scores, 0.01, within=within, exclude=mask)
    scores.sum_over(mask)
    sites = hc.weight_sites(bridge)
    hc.random_like(mask, weights=hc.named_weights(bridge))
    mask.frame(sites)
    other = hc.top_fraction(price, 0.01)
    hc.overlap(mask, other, n_samples=2)
    hc.overlap_by(mask, other, sites, "head")
    hc.concentration(mask, sites, "neuron")
    hc.token_contributions(bridge, mask, harm)
    hc.completion_nll(bridge, on_gpu(harm), mask=mask)
    hc.kl_under(bridge, mask, harm)
    perplexity(bridge, harm, {})
    hc.estimate_memory(bridge, harm)


def test_a_score_and_a_check_seldom_wait_for_the_device(gpu):
    model, data, pretended = gpu
    bridge, harm = model.bridge, data["harmful"].batches
    mask = hc.top_fraction(hc.magnitude_scores(bridge), 0.001)
    before = pretended.waits
    hc.removal_effect(bridge, harm)
    of_score = pretended.waits - before
    hc.completion_nll(bridge, harm, mask=mask)
    of_check = pretended.waits - before - of_score
    # Losses, values that are not finite, and the digest of the weights, once each.
    assert 0 < of_score <= 10
    # Once a matrix that the mask edits, where it is lifted.
    assert of_check <= len(mask.removed) + 4


def test_searches_and_edits(gpu, tmp_path):
    model, data, _ = gpu
    bridge, harm = model.bridge, data["harmful"].batches
    options = {"size": 0.001, "calibrations": data, "protect": ["benign", "refusal"]}
    mask = model.find_circuit("harmful", steps=2, **options, folder=tmp_path)
    again = model.find_circuit("harmful", steps=2, **options, folder=tmp_path)
    assert again.digest == mask.digest and mask.n_removed
    once = {**options, "steps": 1}
    model.find_circuit("harmful", **once, prefer="refusal", max_memory=2**20)
    hc.set_difference(bridge, harm, [data["benign"].batches], q=0.01, p=0.01)
    spared = {name: data[name] for name in ("benign", "refusal")}
    unpruned_scores(model, "harmful", data["harmful"], spared, folder=tmp_path / "scores")
    for lora in (None, hc.Lora(2)):
        training = hc.fine_tuning(bridge, harm, lr=1e-3, lora=lora)
        before = hc.completion_nll(bridge, harm).mean()
        with hc.masked(bridge, mask, hold=True), training as run:
            run.until(1)
        assert hc.completion_nll(bridge, harm).mean() == before, "all of it came off"


def test_answers_and_activations(gpu, tmp_path):
    model, data, _ = gpu
    bridge, harm = model.bridge, data["harmful"].batches
    mask = hc.top_fraction(hc.magnitude_scores(bridge), 0.001)
    sampled = replace(model, sampling=Sampling(2), cache=GenerationCache(tmp_path, bridge))
    sampled.measure(mask=mask, only=["harmful", "recognition"])
    hc.activation_patching(bridge, mask, harm[0], layers=[0], positions=[1])
    of_first = [
        attention_patterns(bridge, harm[0], [(0, 1)]),
        neuron_activations(bridge, harm[0], [(0, 1)]),
        prediction_changes(bridge, mask, harm[0]),
    ]
    assert all(device_of(values) == "cpu" and values.abs().sum() > 0 for values in of_first)


def test_b1_a_study_that_protects_two_behaviours(gpu, tmp_path):
    model, _, _ = gpu
    settings = hc.StudySettings(sizes=(0.001,), steps=1, n_random=1, compare=False)
    run = hc.study(model, settings, protect=("benign", "refusal"), out=tmp_path / "run")
    assert run.rows
