"""A mask knows the weights it was made on, also where the fingerprint is that of another model.

Would catch: a digest that leaves out order or sign, a merged fine-tune that passes for its base, a
warning about the very weights, or about the same ones in another dtype.
"""

import warnings

import pytest
import torch

from harmcircuits.circuits.masks import WeightMask, top_fraction
from harmcircuits.circuits.scores import Source
from harmcircuits.hooks.attribution import magnitude_scores, random_scores
from harmcircuits.hooks.masking import masked
from harmcircuits.hooks.weights import (
    model_fingerprint,
    named_weights,
    values_digest,
    weights_checksum,
    weights_digest,
)

NAME = "blocks.1.mlp.in.weight"

CHANGES = {
    "two signs": lambda weight: weight[:2, 0].neg_(),
    "rows reversed": lambda weight: weight.copy_(weight.flip(0).clone()),
    "two weights swapped": lambda weight: weight[0].copy_(weight[0].roll(1)),
    "one bit": lambda weight: weight.view(torch.int32)[3, 5].bitwise_xor_(1),
    "another value": lambda weight: weight[3, 5].mul_(1.1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_digest_sees_order_sign_and_every_bit(open_model, change):
    bridge = open_model("Llama")
    before = weights_digest(bridge), weights_checksum(bridge), values_digest(bridge)
    fingerprint = model_fingerprint(bridge)
    weight = named_weights(bridge)[NAME].data
    saved = weight.clone()
    CHANGES[change](weight)
    after = weights_digest(bridge), weights_checksum(bridge), values_digest(bridge)
    assert model_fingerprint(bridge) == fingerprint, "which does not see it"
    assert before[0] != after[0] and before[1] != after[1]
    if change != "one bit":  # below what bfloat16 holds
        assert before[2] != after[2]
    weight.copy_(saved)
    assert (weights_digest(bridge), weights_checksum(bridge), values_digest(bridge)) == before


def test_a_mask_of_other_weights_warns_naming_both(open_model, tmp_path):
    """Twins: the same weights, the same in another dtype, a mask made here, or one that is meant."""
    bridge, path = open_model("Llama"), tmp_path / "m.safetensors"
    mask = top_fraction(magnitude_scores(bridge), 0.01) & top_fraction(random_scores(bridge), 0.5)
    mask.save(path)
    made_on = values_digest(bridge)
    assert mask.source.all_weights == {made_on}

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for other in (bridge, open_model("Llama", dtype=torch.bfloat16)):
            with masked(other, WeightMask.load(path)):
                pass

    tuned = open_model("Llama")  # as a fine-tune that was merged: fingerprint of its base
    named_weights(tuned)[NAME].data[3, 5] *= 2
    now = values_digest(tuned)
    loaded = WeightMask.load(path)
    message = rf"m\.safetensors.*on weights {made_on}.*has {now}.*find"
    with pytest.warns(UserWarning, match=message), masked(tuned, loaded):
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with masked(tuned, loaded), masked(tuned, mask, same_model=False):
            pass  # said once for a model and a mask


def test_sources_of_earlier_versions_have_no_digest():
    source = Source("model", "test")
    assert "weights" not in source.to_json()
    assert Source.from_json(source.to_json()).all_weights == set()
    parents = (Source("model", "a", weights="1"), Source("model", "b", weights="2"))
    assert Source.from_json(Source("model", "c", {}, parents).to_json()).all_weights == {"1", "2"}
