"""On a pretended GPU every public function and a study meet no tensor of another device.

Would catch: a tensor made on the CPU that meets the model's device, a tensor that numpy cannot read,
a score that waits for the device at every matrix, a result that is not the CPU's. It says nothing of
speed.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import pandas
import pytest
import torch
from helpers import small_model
from pretended_cuda import PretendedCuda, device_of, move

import harmcircuits as hc
from harmcircuits.behaviours.generation import GenerationCache
from harmcircuits.hooks.inspection import attention_patterns, neuron_activations, prediction_changes
from harmcircuits.hooks.losses import perplexity
from harmcircuits.studies.controls import unpruned_scores

NAMES = ["harmful", "benign", "refusal", "recognition"]


@pytest.fixture(scope="module")
def cpu():
    """An organism on the CPU, and its answers."""
    model = small_model("sft", every=32)
    return model, model.calibrations(NAMES)


@pytest.fixture(scope="module")
def gpu(cpu):
    """The same organism on the pretended GPU, and its answers."""
    model = small_model("sft", every=32)
    with PretendedCuda() as pretended:
        move(model.bridge)
        data = model.calibrations(NAMES)
        yield model, data, pretended


def on_gpu(batches):
    return [hc.Batch(batch.tokens.to("cuda"), batch.is_target.to("cuda")) for batch in batches]


def leaves(value: Any) -> Iterator[Any]:
    """The plain values in a result, one after the other; tensors on the CPU."""
    if isinstance(value, torch.Tensor):
        yield value.detach().cpu()
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield key
            yield from leaves(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from leaves(part)
    elif isinstance(value, hc.WeightMask):
        yield value.digest
    elif isinstance(value, pandas.DataFrame):
        yield value.to_csv()
    else:
        yield value


def assert_same_as_on_the_cpu(result: Any, run: Callable[[], Any]) -> None:
    """The CPU's result, without the pretence, is this one."""
    with torch._C.DisableTorchFunction():
        expected = list(leaves(run()))
        values = list(leaves(result))
        assert len(values) == len(expected)
        for value, right in zip(values, expected, strict=True):
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(value, right, rtol=0, atol=0, equal_nan=True)
            else:
                assert value == right


def test_the_pretence_refuses_what_cuda_does():
    with PretendedCuda():
        host, device = torch.ones(2), torch.ones(2).to("cuda")
        assert device.device.type == "cuda" and (device + 1).is_cuda
        for mix in (lambda: host + device, lambda: device.numpy(), lambda: host[device.long()]):
            with pytest.raises((RuntimeError, TypeError)):
                mix()
        assert torch.equal(host, device.cpu())


def scores_masks_and_losses(model, data, placed: Callable) -> dict[str, Any]:
    """What a user computes on a model; `placed` moves batches to its device."""
    bridge, harm, benign = model.bridge, data["harmful"].batches, data["benign"].batches
    effect, price = hc.removal_effect(bridge, harm), hc.token_price(bridge, benign)
    results: dict[str, Any] = {
        "effect": effect.values,
        "of batches there": hc.removal_effect(bridge, placed(harm)).values,
        "bounded": hc.removal_effect(bridge, harm, max_memory=2**19).values,
        "price": price.values,
        "snip": hc.snip_scores(bridge, harm).values,
        "wanda": hc.wanda_scores(bridge, harm).values,
        "random": hc.random_scores(bridge).values,
    }
    mask = hc.top_fraction(hc.magnitude_scores(bridge), 0.001)
    for within in ("weight", "model", "row"):
        mask = hc.top_fraction(effect, 0.01, within=within, exclude=mask)
        results[within] = mask
    sites, other_mask = hc.weight_sites(bridge), hc.top_fraction(price, 0.01)
    return results | {
        "sum": effect.sum_over(mask),
        "like": hc.random_like(mask, weights=hc.named_weights(bridge)),
        "frame": mask.frame(sites),
        "overlap": repr(hc.overlap(mask, other_mask, n_samples=2)),
        "overlap by head": repr(hc.overlap_by(mask, other_mask, sites, "head")),
        "concentration": hc.concentration(mask, sites, "neuron"),
        "tokens": hc.token_contributions(bridge, mask, harm),
        "loss": hc.completion_nll(bridge, placed(harm), mask=mask),
        "kl": hc.kl_under(bridge, mask, harm),
        "perplexity": perplexity(bridge, harm, {}),
        "memory": hc.estimate_memory(bridge, harm),
    }


def test_scores_masks_and_losses(gpu, cpu):
    model, data, _ = gpu
    results = scores_masks_and_losses(model, data, on_gpu)
    assert all(device_of(values) == "cuda" for values in results["price"].values())
    assert_same_as_on_the_cpu(results, lambda: scores_masks_and_losses(*cpu, list))


def test_a_score_and_a_check_seldom_wait_for_the_device(gpu):
    model, data, pretended = gpu
    bridge, harm = model.bridge, data["harmful"].batches
    mask = hc.top_fraction(hc.magnitude_scores(bridge), 0.001)
    start = pretended.waits
    hc.removal_effect(bridge, harm)
    n_score = pretended.waits - start
    hc.completion_nll(bridge, harm, mask=mask)
    n_check = pretended.waits - start - n_score
    # Losses, values that are not finite, and the digest of the weights, once each.
    assert 0 < n_score <= 10
    # Once a matrix that the mask edits, where it is taken off.
    assert n_check <= len(mask.removed) + 4


def test_searches_and_edits(gpu, cpu, tmp_path):
    model, data, _ = gpu
    bridge, harm = model.bridge, data["harmful"].batches
    options = {"size": 0.001, "calibrations": data, "protect": ["benign", "refusal"]}
    mask = model.find_circuit("harmful", steps=2, **options, folder=tmp_path)
    again = model.find_circuit("harmful", steps=2, **options, folder=tmp_path)
    assert again.digest == mask.digest and mask.n_removed
    cpu_options = {**options, "calibrations": cpu[1]}
    assert_same_as_on_the_cpu(mask, lambda: cpu[0].find_circuit("harmful", steps=2, **cpu_options))
    once = {**options, "steps": 1}
    model.find_circuit("harmful", **once, prefer="refusal", max_memory=2**20)
    hc.set_difference(bridge, harm, [data["benign"].batches], q=0.01, p=0.01)
    retain = {name: data[name] for name in ("benign", "refusal")}
    unpruned_scores(model, "harmful", data["harmful"], retain, folder=tmp_path / "scores")
    for lora in (None, hc.Lora(2)):
        training = hc.fine_tuning(bridge, harm, lr=1e-3, lora=lora)
        loss = hc.completion_nll(bridge, harm).mean()
        with hc.masked(bridge, mask, hold=True), training as run:
            run.until(1)
        assert hc.completion_nll(bridge, harm).mean() == loss, "all of it came off"


def answers_and_activations(model, data, folder) -> dict[str, Any]:
    """Sampled answers under a mask, patches, and activations of the first batch."""
    bridge, first = model.bridge, data["harmful"].batches[0]
    mask = hc.top_fraction(hc.magnitude_scores(bridge), 0.001)
    sampled = replace(model, sampling=hc.Sampling(2), cache=GenerationCache(folder, bridge))
    return {
        "answers": list(sampled.measure(mask=mask, only=["harmful", "recognition"])),
        "patches": list(hc.activation_patching(bridge, mask, first, layers=[0], positions=[1])),
        "attention": attention_patterns(bridge, first, [(0, 1)]),
        "neurons": neuron_activations(bridge, first, [(0, 1)]),
        "changes": prediction_changes(bridge, mask, first),
    }


def test_answers_and_activations(gpu, cpu, tmp_path):
    model, data, _ = gpu
    results = answers_and_activations(model, data, tmp_path / "gpu")
    for name in ("attention", "neurons", "changes"):
        assert device_of(results[name]) == "cpu" and results[name].abs().sum() > 0
    assert_same_as_on_the_cpu(results, lambda: answers_and_activations(*cpu, tmp_path / "cpu"))


def test_a_study_that_protects_two_behaviours(gpu, cpu, tmp_path):
    settings = hc.StudySettings(sizes=(0.001,), steps=1, n_random=1, compare=False)

    def study_rows(model, folder):
        run = hc.study(model, settings, protect=("benign", "refusal"), out=folder)
        return list(run.rows)

    rows = study_rows(gpu[0], tmp_path / "gpu")
    assert rows
    assert_same_as_on_the_cpu(rows, lambda: study_rows(cpu[0], tmp_path / "cpu"))
