"""Names, kinds and units of the weights, and refusals of blocks that would be covered in part.

Would catch: a router taken for a dense gate, units read off the wrong axis, quantised or unnamed
matrices left out.
"""

import pytest
import torch
from torch import nn

from harmcircuits.circuits.masks import WeightMask
from harmcircuits.circuits.scores import Source
from harmcircuits.hooks.masking import masked
from harmcircuits.hooks.weights import weight_sites

D_HEAD = 6  # as in helpers


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
    assert [name for name in sites if name.startswith("blocks.1.")] == [
        "blocks.1.attn.q.weight",
        "blocks.1.attn.k.weight",
        "blocks.1.attn.v.weight",
        "blocks.1.attn.o.weight",
        "blocks.1.mlp.gate.weight",
        "blocks.1.mlp.experts.gate_up_proj",
        "blocks.1.mlp.experts.down_proj",
    ]
    unhooked = [site for site in sites.values() if not site.is_hooked]
    assert len(unhooked) == 6

    router, up, down = unhooked[3:]
    assert router.kind == "mlp.router"
    assert up.kind == "mlp.experts.gate_up_proj"
    assert down.kind == "mlp.experts.down_proj"
    assert router.parameter.shape == (3, 24)
    assert up.parameter.shape == (3, 80, 24)
    assert down.parameter.shape == (3, 24, 40)

    assert [site.n_units for site in (router, up, down)] == [3, 3, 3]
    assert router.units(torch.tensor([0, 23, 24, 71])).tolist() == [0, 0, 1, 2]
    assert down.units(torch.tensor([960, 2879])).tolist() == [1, 2]
    size = 80 * 24
    assert up.units(torch.tensor([0, size - 1, size, 3 * size - 1])).tolist() == [0, 0, 1, 2]


def test_removing_an_expert_that_no_token_visits_changes_nothing(open_model):
    """Two of three experts a token: the logits change where the third is visited, only there."""
    bridge = open_model("Mixtral", num_hidden_layers=1)
    tokens = torch.arange(3, 12)[None]
    _, cache = bridge.run_with_cache(tokens)
    chosen = cache["blocks.0.mlp.gate.hook_out"].topk(2, dim=-1).indices.view(9, 2)
    before = bridge(tokens)[0]

    site = weight_sites(bridge)["blocks.0.mlp.experts.down_proj"]
    flat = torch.arange(site.parameter.numel())
    for expert in range(3):
        visited = (chosen == expert).any(dim=1)
        assert 0 < visited.sum() < 9, "the comparison must be able to fail"

        removed = {site.name: flat[site.units(flat) == expert]}
        mask = WeightMask(removed, {site.name: (3, 24, 40)}, Source("", "by hand"))
        with masked(bridge, mask, same_model=False):
            change = (bridge(tokens)[0] - before).abs().amax(dim=1)
        assert torch.equal(change > 1e-5, visited)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("Llama", torch.int8), ("GPT2", torch.uint8), ("Mixtral", torch.float8_e4m3fn)],
)
def test_quantised_weights_are_refused_by_name(open_model, name, dtype):
    bridge = open_model(name)
    layer = bridge.blocks[1].attn.o.original_component
    layer.weight = nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)
    reason = rf"blocks\.1\.attn\.o\.weight .*{dtype}.*quantised.*load the model in float32"
    with pytest.raises(ValueError, match=reason):
        weight_sites(bridge)


def test_packed_weights_in_buffers_are_refused_by_name(llama):
    """GPTQ and AWQ keep integers in buffers and have no weight parameter at all."""
    layer = llama.blocks[1].mlp.out.original_component
    del layer.weight
    layer.register_buffer("qweight", torch.zeros(3, 40, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"blocks\.1\..*qweight \(3, 40\) .*int32.*quantised"):
        weight_sites(llama)


def test_blocks_with_other_matrices_are_refused(open_model):
    mixed = open_model("Qwen3Moe", decoder_sparse_step=2)  # a dense layer among sparse ones
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\..*attn\.q, .*not supported"):
        weight_sites(mixed)

    odd = open_model("Llama")
    odd.blocks[1].register_parameter("extra", nn.Parameter(torch.zeros(3, 4)))
    with pytest.raises(ValueError, match=r"blocks\.1\.extra \(3, 4\) .*not supported"):
        weight_sites(odd)
