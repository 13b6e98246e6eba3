"""A mask costs no walk over the model, and no walk is used again on a model that has changed.

Would catch: an edit that goes to a parameter which the model no longer has, a fingerprint of
embeddings that were loaded over, a refusal that is forgotten, a cache that is never used or that is
shared between models.
"""

import copy

import pytest
import torch
from torch import nn

from harmcircuits.circuits.masks import top_fraction
from harmcircuits.hooks import weights
from harmcircuits.hooks.attribution import random_scores
from harmcircuits.hooks.masking import masked
from harmcircuits.hooks.weights import model_fingerprint, named_weights, weight_sites

NAME = "blocks.1.mlp.out.weight"


@pytest.fixture
def walks(monkeypatch):
    """A list that grows with every walk over a model's tensors."""
    walked = []
    walk = weights.stored_tensors

    def counted_walk(bridge):
        walked.append(bridge)
        return walk(bridge)

    monkeypatch.setattr(weights, "stored_tensors", counted_walk)
    return walked


def layer(bridge) -> nn.Module:
    return bridge.blocks[1].mlp.out.original_component


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Mixtral"])
def test_masks_walk_a_model_once(open_model, walks, name):
    bridge = open_model(name)
    other = open_model(name)
    mask = top_fraction(random_scores(bridge), 0.2)

    n_walks = len(walks)
    for _ in range(5):
        with masked(bridge, mask), masked(bridge, mask):
            bridge(torch.arange(3, 9)[None])
    assert len(walks) == n_walks, "neither a mask nor a forward pass makes another model"

    named_weights(other)
    assert len(walks) == n_walks + 1, "every model has its own"


def replaced(bridge) -> None:
    layer(bridge).weight = nn.Parameter(torch.ones_like(layer(bridge).weight))


def replaced_behind_the_module(bridge) -> None:
    layer(bridge)._parameters["weight"] = nn.Parameter(torch.ones_like(layer(bridge).weight))


def ones_state(bridge) -> dict[str, torch.Tensor]:
    state = bridge.original_model.state_dict()
    return {name: torch.ones_like(value) for name, value in state.items()}


def assigned(bridge) -> None:
    bridge.original_model.load_state_dict(ones_state(bridge), assign=True)


def loaded(bridge) -> None:
    bridge.original_model.load_state_dict(ones_state(bridge))


def data_replaced(bridge) -> None:
    layer(bridge).weight.data = torch.ones_like(layer(bridge).weight)


def module_replaced(bridge) -> None:
    module = copy.deepcopy(layer(bridge))
    with torch.no_grad():
        module.weight.fill_(1)
    bridge.blocks[1].mlp.out.set_original_component(module)


CHANGES = [
    replaced,
    replaced_behind_the_module,
    assigned,
    loaded,
    data_replaced,
    module_replaced,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_mask_edits_the_parameter_that_the_model_now_has(llama, change):
    mask = top_fraction(random_scores(llama), 0.2)
    with masked(llama, mask):
        pass  # fills the cache

    change(llama)
    assert (layer(llama).weight == 1).all(), "the change must have happened"
    assert named_weights(llama)[NAME] is layer(llama).weight

    with masked(llama, mask, same_model=False):
        assert torch.equal(layer(llama).weight == 0, mask.dense(NAME))
    assert (layer(llama).weight == 1).all()


@pytest.mark.parametrize("write", ["in place", "data", "load"])
def test_a_fingerprint_is_of_the_values_as_they_are(open_model, llama, write):
    mask = top_fraction(random_scores(llama), 0.2)
    sibling = open_model("Llama", seed=5)
    expected = model_fingerprint(sibling)
    assert model_fingerprint(llama) != expected

    if write == "load":
        llama.original_model.load_state_dict(sibling.original_model.state_dict())
    pairs = zip(llama.original_model.parameters(), sibling.original_model.parameters(), strict=True)
    with torch.no_grad():
        for parameter, value in pairs:
            target = parameter.data if write == "data" else parameter
            target.copy_(value)

    assert model_fingerprint(llama) == expected
    with pytest.raises(ValueError, match="mask was made on model"), masked(llama, mask):
        pass


def test_refusals_are_not_forgotten(llama):
    sites = weight_sites(llama)
    llama.blocks[1].register_buffer("packed", torch.zeros(3, 4, dtype=torch.int8))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"packed \(3, 4\) .*int8.*quantised"):
            weight_sites(llama)

    del llama.blocks[1].packed
    assert list(weight_sites(llama)) == list(sites)

    llama._weights_processed = True
    with pytest.raises(ValueError, match="processed"):
        weight_sites(llama)


def test_a_copy_has_its_own_weights(llama):
    named_weights(llama)
    twin = copy.deepcopy(llama)

    own_weights = named_weights(llama)
    twin_weights = named_weights(twin)
    assert own_weights.keys() == twin_weights.keys()

    live = {id(parameter) for parameter in twin.original_model.parameters()}
    for name, parameter in twin_weights.items():
        assert id(parameter) in live
        assert parameter is not own_weights[name]
