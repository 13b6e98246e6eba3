"""Names, kinds and units of the weights, refusals of blocks that would be covered in part, and which
model and weights a mask was made on.

Would catch: a router taken for a dense gate, units read off the wrong axis, quantised or unnamed
matrices left out, masks of earlier versions that are no longer known to be of their model, a merged
fine-tune that passes for its base.
"""

import warnings

import pytest
import torch
from torch import nn

from harmcircuits.circuits.masks import WeightMask, top_fraction
from harmcircuits.circuits.scores import Source
from harmcircuits.hooks.attribution import magnitude_scores, random_scores
from harmcircuits.hooks.masking import masked
from harmcircuits.hooks.weights import (
    model_fingerprint,
    named_weights,
    source_on,
    weight_sites,
    weights_digest,
)
from harmcircuits.organisms import FOLDER, load_organism

D_HEAD = 6  # as in helpers
NAME = "blocks.1.mlp.in.weight"


@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_units_are_the_heads_and_neurons_that_a_weight_touches(open_model, name):
    """Of an all-ones matrix, in the orientation of its kind: whole rows or columns of a unit."""
    for site in weight_sites(open_model(name)).values():
        shape = site.parameter.shape
        unit = site.units(torch.arange(shape.numel())).view(shape)
        assert unit.unique().tolist() == list(range(site.n_units))

        if site.unit_axis == 1:
            unit = unit.T
        assert (unit == unit[:, :1]).all(), "a unit is whole rows or columns"
        unit_size = D_HEAD if site.kind.startswith("attn") else 1
        assert torch.equal(unit[:, 0], torch.arange(len(unit)) // unit_size), site.name

        reads_units = site.kind in ("attn.o", "mlp.out")
        assert site.unit_axis == (site.input_axis if reads_units else 1 - site.input_axis)


def test_experts_and_router_by_hand(open_model):
    sites = weight_sites(open_model("Mixtral"))
    router = sites["blocks.1.mlp.gate.weight"]
    up = sites["blocks.1.mlp.experts.gate_up_proj"]
    down = sites["blocks.1.mlp.experts.down_proj"]
    assert list(sites.values())[-3:] == [router, up, down]
    assert router.kind == "mlp.router"
    assert router.parameter.shape == (3, 24)
    assert up.parameter.shape == (3, 80, 24)
    assert down.parameter.shape == (3, 24, 40)
    for site in (router, up, down):
        assert not site.is_hooked
        unit = site.units(torch.arange(site.parameter.numel())).view(3, -1)
        assert torch.equal(unit, torch.arange(3)[:, None].expand_as(unit))


# Refusals


def quantised(bridge, dtype=torch.int8) -> None:
    layer = bridge.blocks[1].attn.o.original_component
    layer.weight = nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)


def packed(bridge) -> None:
    """GPTQ and AWQ keep integers in buffers and have no weight parameter at all."""
    layer = bridge.blocks[1].mlp.out.original_component
    del layer.weight
    layer.register_buffer("qweight", torch.zeros(3, 40, dtype=torch.int32))


def odd(bridge) -> None:
    bridge.blocks[1].register_parameter("extra", nn.Parameter(torch.zeros(3, 4)))


REFUSALS = [
    ("Llama", quantised, ["blocks.1.attn.o.weight", "int8", "load the model in float32"]),
    ("GPT2", quantised, ["blocks.1.attn.o.weight", "quantised"]),
    ("Llama", packed, ["blocks.1.", "qweight (3, 40)", "int32", "quantised"]),
    ("Llama", odd, ["blocks.1.extra (3, 4)", "attn.q, ", "not supported"]),
    (
        "Llama",
        lambda bridge: bridge.enable_compatibility_mode(),
        ["enable_compatibility_mode", "fresh"],
    ),
]


@pytest.mark.parametrize(("name", "change", "words"), REFUSALS)
def test_what_scores_and_masks_would_leave_out_is_refused_by_name(open_model, name, change, words):
    bridge = open_model(name)
    weight_sites(bridge)
    change(bridge)
    with pytest.raises(ValueError) as error:
        weight_sites(bridge)
    for word in words:
        assert word in str(error.value)


# Which model, and which weights of it


def test_the_fingerprint_tells_checkpoints_apart_and_ignores_masks_and_dtype(open_model, llama):
    fingerprint = model_fingerprint(llama)
    sibling = open_model("Llama", seed=5)
    with masked(llama, top_fraction(random_scores(llama), 0.2)):
        assert model_fingerprint(llama) == fingerprint
    assert model_fingerprint(open_model("Llama", dtype=torch.bfloat16)) == fingerprint
    assert model_fingerprint(sibling) != fingerprint
    llama.original_model.load_state_dict(sibling.original_model.state_dict())
    assert model_fingerprint(llama) == model_fingerprint(sibling)


def test_fingerprints_and_digests_are_those_that_files_hold():
    """Of the shipped models, as masks of earlier versions name them."""
    mask = WeightMask.load(FOLDER / "planted" / "circuit.safetensors")
    bridge = load_organism("planted")
    assert mask.source.model == model_fingerprint(bridge) == "d56587129d1d509a"
    assert weights_digest(bridge) == "00787ef86bc792f4"
    assert source_on(bridge, "test").weights == "9a530716eef473d9"


CHANGES = {
    "two signs": lambda weight: weight[:2, 0].neg_(),
    "rows reversed": lambda weight: weight.copy_(weight.flip(0).clone()),
    "two weights swapped": lambda weight: weight[0].copy_(weight[0].roll(1)),
    "one bit": lambda weight: weight.view(torch.int32)[3, 5].bitwise_xor_(1),
    "another value": lambda weight: weight[3, 5].mul_(1.1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_digest_sees_order_sign_and_every_bit(llama, change):
    def digests() -> list[str]:
        return [weights_digest(llama), source_on(llama, "test").weights]

    before, fingerprint = digests(), model_fingerprint(llama)
    weight = named_weights(llama)[NAME].data
    saved = weight.clone()
    CHANGES[change](weight)
    after = digests()
    assert model_fingerprint(llama) == fingerprint, "which does not see it"
    assert before[0] != after[0]
    if change != "one bit":  # below what bfloat16 holds
        assert before[1] != after[1]
    weight.copy_(saved)
    assert digests() == before


def test_a_mask_of_other_weights_warns_naming_both(open_model, tmp_path):
    """Twins: the same weights, the same in another dtype, a mask made here, or one that is meant."""
    bridge, path = open_model("Llama"), tmp_path / "m.safetensors"
    mask = top_fraction(magnitude_scores(bridge), 0.01) & top_fraction(random_scores(bridge), 0.5)
    mask.save(path)
    made_on = source_on(bridge, "test").weights
    assert mask.source.all_weights == {made_on}

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for other in (bridge, open_model("Llama", dtype=torch.bfloat16)):
            with masked(other, WeightMask.load(path)):
                pass

    tuned = open_model("Llama")  # as a fine-tune that was merged: fingerprint of its base
    named_weights(tuned)[NAME].data[3, 5] *= 2
    loaded = WeightMask.load(path)
    with pytest.warns(UserWarning) as warned, masked(tuned, loaded):
        pass
    for word in ("m.safetensors", made_on, source_on(tuned, "test").weights, "same_model=False"):
        assert word in str(warned[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with masked(tuned, loaded), masked(tuned, mask, same_model=False):
            pass  # said once for a model and a file


def test_sources_of_earlier_versions_have_no_digest():
    source = Source("model", "test")
    assert "weights" not in source.to_json()
    assert Source.from_json(source.to_json()).all_weights == set()
    parents = (Source("model", "a", weights="1"), Source("model", "b", weights="2"))
    assert Source.from_json(Source("model", "c", {}, parents).to_json()).all_weights == {"1", "2"}
