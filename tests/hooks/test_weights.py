"""Which model and weights a mask was made on.

Would catch: a merged fine-tuning with the digest of its base.
"""

from dataclasses import replace

import pytest
import torch
from helpers import random_mask
from transformer_lens.model_bridge import TransformerBridge

from harmcircuits.circuits.masks import WeightMask
from harmcircuits.export import export
from harmcircuits.hooks.masking import masked
from harmcircuits.hooks.weights import (
    Provenance,
    changed_weights,
    model_fingerprint,
    named_weights,
    weights_digest,
)
from harmcircuits.organisms.shipped import FOLDER, load_organism

NAME = "blocks.1.mlp.in.weight"


def test_the_fingerprint_tells_checkpoints_apart_and_ignores_masks_and_dtype(open_model, llama):
    fingerprint = model_fingerprint(llama)
    sibling = open_model("Llama", seed=5)
    with masked(llama, random_mask(llama)):
        assert model_fingerprint(llama) == fingerprint
    assert model_fingerprint(open_model("Llama", dtype=torch.bfloat16)) == fingerprint
    assert model_fingerprint(sibling) != fingerprint
    llama.original_model.load_state_dict(sibling.original_model.state_dict())
    assert model_fingerprint(llama) == model_fingerprint(sibling)


def test_fingerprints_and_digests_are_those_that_files_hold():
    """Those of a shipped model, which masks of earlier versions hold."""
    mask = WeightMask.load(FOLDER / "planted" / "circuit.safetensors")
    bridge = load_organism("planted")
    assert mask.source.model == model_fingerprint(bridge) == "d56587129d1d509a"
    assert weights_digest(bridge) == "00787ef86bc792f4"
    assert Provenance.of(bridge).source("test").weights_digest == "9a530716eef473d9"


def test_the_digests_see_every_bit_and_what_bfloat16_holds(llama):
    """Order and sign are in a test below."""

    def digests() -> tuple[str, ...]:
        return (
            model_fingerprint(llama),
            Provenance.of(llama).source("test").weights_digest,
            weights_digest(llama),
        )

    weight, original = named_weights(llama)[NAME].data, digests()
    weight.view(torch.int32)[3, 5] ^= 1
    one_bit = digests()
    assert one_bit[:2] == original[:2] and one_bit[2] != original[2]
    weight[3, 5] *= 1.1
    larger = digests()
    assert larger[0] == original[0] and larger[1] != original[1]


def test_the_changed_weights_are_those_of_the_edit(open_model, llama, tmp_path):
    twin = open_model("Llama")
    assert len(changed_weights(llama, twin)) == 0
    weight = named_weights(twin)[NAME].data
    weight.view(torch.int32)[3, 5] ^= 1
    assert changed_weights(llama, twin).removed[NAME].tolist() == [3 * weight.shape[1] + 5]

    mask = random_mask(llama, 0.1)
    folder = export(llama, mask, tmp_path / "edited")
    edited = TransformerBridge.boot_transformers(str(folder), dtype=torch.float32, device="cpu")
    assert changed_weights(llama, edited) == mask
    with pytest.raises(ValueError, match="not of one shape and dtype"):
        changed_weights(llama, open_model("Llama", dtype=torch.bfloat16))


def test_a_mask_of_other_weights_warns_naming_both(open_model, tmp_path, recwarn):
    """Twins: the same weights, also in another dtype."""
    bridge, path = open_model("Llama"), tmp_path / "m.safetensors"
    random_mask(bridge, 0.01).save(path)
    loaded = WeightMask.load(path)
    for twin in (bridge, open_model("Llama", dtype=torch.bfloat16)):
        with masked(twin, loaded):
            assert not recwarn.list

    tuned = open_model("Llama")  # like a merged fine-tuning: the fingerprint is that of its base
    named_weights(tuned)[NAME].data[3, 5] *= 2
    with pytest.warns(UserWarning) as warned, masked(tuned, loaded):
        pass
    digests = (Provenance.of(model).source("test").weights_digest for model in (bridge, tuned))
    for word in ("m.safetensors", "same_model=False", *digests):
        assert word in str(warned[0].message)

    # In memory too; and a file that holds another mask since is compared again.
    tuned = open_model("Llama")
    named_weights(tuned)[NAME].data[3, 5] *= 2
    with (
        pytest.warns(UserWarning, match="other") as warned,
        masked(tuned, replace(loaded, file="")),
    ):
        pass
    random_mask(tuned, 0.01).save(path)
    with masked(tuned, WeightMask.load(path)):
        assert len(warned) == 1


def test_the_digest_sees_pairs_of_signs_and_exchanges(llama):
    weight = named_weights(llama)["blocks.0.mlp.out.weight"].data
    original, digest = weight.clone(), weights_digest(llama)
    flipped = original.clone()
    flipped[:, 1] *= -1
    exchanged = original.clone()
    exchanged[[0, 1]] = original[[1, 0]]
    for values in (flipped, exchanged):
        weight.copy_(values)
        assert weights_digest(llama) != digest
    weight.copy_(original)
    assert weights_digest(llama) == digest
