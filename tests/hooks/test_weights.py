"""Units of the weights, and which model and weights a mask was made on.

Would catch: units off the wrong axis, a merged fine-tune that passes for its base.
"""

import warnings

import pytest
import torch

from harmcircuits.circuits.masks import WeightMask, top_fraction
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
    CHANGES[change](weight)
    after = digests()
    assert model_fingerprint(llama) == fingerprint, "which does not see it"
    assert before[0] != after[0]
    if change != "one bit":  # below what bfloat16 holds
        assert before[1] != after[1]


def test_a_mask_of_other_weights_warns_naming_both(open_model, tmp_path):
    """Twins: the same weights, also in another dtype."""
    bridge, path = open_model("Llama"), tmp_path / "m.safetensors"
    mask = top_fraction(magnitude_scores(bridge), 0.01)
    mask.save(path)
    loaded = WeightMask.load(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for other in (bridge, open_model("Llama", dtype=torch.bfloat16)):
            with masked(other, loaded):
                pass

    tuned = open_model("Llama")  # as a fine-tune that was merged: fingerprint of its base
    named_weights(tuned)[NAME].data[3, 5] *= 2
    with pytest.warns(UserWarning) as warned, masked(tuned, loaded):
        pass
    digests = (source_on(each, "test").weights for each in (bridge, tuned))
    for word in ("m.safetensors", "same_model=False", *digests):
        assert word in str(warned[0].message)
