"""Where a mask sits, by hand-made masks.

Would catch: heads read along the wrong axis, a neuron's three matrices kept apart, a Gini
coefficient that chance inflates.
"""

import pytest
import torch

from harmcircuits.circuits.location import (
    Place,
    component_rows,
    concentration,
    counts_by,
    gini,
    most_removed,
    parts_of,
)
from harmcircuits.circuits.masks import WeightMask, random_like, top_fraction, union
from harmcircuits.circuits.scores import Source
from harmcircuits.hooks.attribution import random_scores
from harmcircuits.hooks.weights import model_fingerprint, weight_sites


def mask_from(bridge, dense: dict[str, torch.Tensor]) -> WeightMask:
    shapes = {name: tuple(site.parameter.shape) for name, site in weight_sites(bridge).items()}
    removed = {name: value.flatten().nonzero().flatten() for name, value in dense.items()}
    return WeightMask(removed, shapes, Source(model_fingerprint(bridge), "test"))


@pytest.mark.parametrize("architecture", ["Llama", "GPT2"])
def test_one_head_and_one_neuron(open_model, architecture):
    """Head 2 of 4 (six columns of the output matrix's input) and neuron 7.

    In whichever axis they are stored.
    """
    bridge = open_model(architecture)
    sites = weight_sites(bridge)
    dense = {
        name: torch.zeros_like(site.parameter, dtype=torch.bool) for name, site in sites.items()
    }
    output, up, down = (
        dense[f"blocks.1.{kind}.weight"] for kind in ("attn.o", "mlp.in", "mlp.out")
    )
    is_conv = architecture == "GPT2"
    (output if is_conv else output.T)[12:18] = True
    (up.T if is_conv else up)[7] = True
    (down if is_conv else down.T)[7] = True
    mask = mask_from(bridge, dense)
    heads = {
        place: count for place, count in counts_by(mask, sites, "head").items() if count.n_removed
    }
    assert heads == {Place(1, "head", 2): (6 * 24, 2 * 6 * 24)}
    neurons = {
        place: count for place, count in counts_by(mask, sites, "neuron").items() if count.n_removed
    }
    assert neurons == {Place(1, "neuron", 7): (2 * 24, (2 if is_conv else 3) * 24)}
    assert counts_by(mask, sites, "layer")[Place(0)].n_removed == 0
    assert counts_by(mask, sites, "matrix")[Place(1, "mlp.in")] == (24, up.numel())
    assert concentration(mask, sites, "neuron").gini == pytest.approx(1 - 1 / 80), (
        "all in one of 80 neurons"
    )
    assert concentration(mask, sites, "neuron").top_share == 1


def test_gini_against_its_definition():
    values = torch.tensor([0.0, 1.0, 1.0, 4.0, 10.0])
    pairs = (values[:, None] - values[None, :]).abs().sum()
    assert gini(values) == pytest.approx(float(pairs / (2 * 5 * values.sum())))
    assert gini(torch.full((9,), 3)) == pytest.approx(0)


def test_a_random_mask_is_as_concentrated_as_its_controls(llama):
    sites = weight_sites(llama)
    mask = top_fraction(random_scores(llama), 0.1, within="weight")
    chance = [
        concentration(random_like(mask, seed=seed), sites, "neuron").gini for seed in range(20)
    ]
    assert min(chance) - 0.05 < concentration(mask, sites, "neuron").gini < max(chance) + 0.05
    assert min(chance) > 0.05, "sparse masks are unequal by chance alone"


@pytest.mark.usefixtures("unchecked")
def test_errors_name_what_is_wrong(llama):
    sites, mask = weight_sites(llama), top_fraction(random_scores(llama), 0.1)
    with pytest.raises(ValueError, match="expected"):
        counts_by(mask, sites, "expert")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="sites lack blocks"):
        counts_by(mask, {"blocks.0.mlp.in.weight": sites["blocks.0.mlp.in.weight"]}, "layer")
    with pytest.raises(ValueError, match="no weight of any head"):
        concentration(
            mask_from(llama, {"blocks.0.mlp.in.weight": torch.ones(40, 24)}), sites, "head"
        )
    for bad in (torch.tensor([]), torch.tensor([0.0, 0.0]), torch.tensor([-1.0, 2.0])):
        with pytest.raises(ValueError, match="gini"):
            gini(bad)


@pytest.mark.parametrize("by", ["layer", "matrix", "unit"])
def test_the_parts_of_a_mask_are_disjoint_and_make_it_up(open_model, by):
    bridge = open_model("Llama")
    sites = weight_sites(bridge)
    mask = top_fraction(random_scores(bridge), 0.02, within="model")
    parts = parts_of(mask, sites, by)
    assert sum(part.n_removed for part in parts.values()) == mask.n_removed
    assert union(list(parts.values())).digest == mask.digest

    counted = {"layer": ["layer"], "matrix": ["matrix"], "unit": ["head", "neuron"]}[by]
    counts = {}
    for kind in counted:
        counts |= counts_by(mask, sites, kind)
    of_parts = {place: part.n_removed for place, part in parts.items()}
    assert of_parts == {place: count.n_removed for place, count in counts.items() if count[0]}


@pytest.mark.usefixtures("unchecked")
def test_parts_refuse_another_way_of_cutting(open_model):
    bridge = open_model("Llama")
    mask = top_fraction(random_scores(bridge), 0.02)
    with pytest.raises(ValueError, match=r"'head'.*unit"):
        parts_of(mask, weight_sites(bridge), "head")
    with pytest.raises(ValueError, match="sites lack blocks"):
        parts_of(mask, {}, "layer")


# What a view opens into


def test_the_most_removed_come_first_and_heads_bear_what_they_read(llama):
    """Four heads of six rows, two key-value heads: 0 and 1 read the first."""
    sites = weight_sites(llama)
    dense = {
        name: torch.zeros_like(site.parameter, dtype=torch.bool) for name, site in sites.items()
    }
    dense["blocks.0.attn.q.weight"][6:8] = True  # 48 weights of head 1
    dense["blocks.0.attn.v.weight"][0] = True  # 24 of key-value head 0: heads 0 and 1
    dense["blocks.1.attn.o.weight"][:, 18] = True  # 24 of head 3
    dense["blocks.1.mlp.in.weight"][4, :3] = True
    dense["blocks.0.mlp.out.weight"][:4, 9] = True
    mask = mask_from(llama, dense)
    assert most_removed(mask, sites, "head", 9) == [(0, 1), (0, 0), (1, 3)]
    assert most_removed(mask, sites, "head", 1) == [(0, 1)]
    assert most_removed(mask, sites, "neuron", 9) == [(0, 9), (1, 4)]


def test_component_rows_add_up(llama):
    sites = weight_sites(llama)
    mask = top_fraction(random_scores(llama), 0.05, within="model")
    rows = component_rows(mask, sites, {"model": "m"}, n_units=1000)
    matrices, units = rows.where(by="matrix"), rows.where(by="unit")
    assert len(matrices) == len(mask.shapes)
    assert sum(row.mean for row in matrices) == mask.n_removed
    for (layer, kind), of_matrix in units.by("layer", "kind").items():
        whole = matrices.one(layer=layer, kind=kind)
        assert sum(row.mean for row in of_matrix) == whole.mean
        n_units = sites[f"blocks.{layer}.{kind}.weight"].n_units
        assert {row.labels["of"] * n_units for row in of_matrix} == {whole.labels["of"]}
    few = component_rows(mask, sites, n_units=2).where(by="unit")
    for of_matrix in few.by("layer", "kind").values():
        first, second = of_matrix
        assert first.mean >= second.mean
