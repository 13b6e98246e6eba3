"""Where a mask sits, by hand-made masks.

Would catch: heads read along the wrong axis, a neuron's three matrices kept apart.
"""

import pytest
import torch
from helpers import random_mask

from harmcircuits.circuits.location import (
    Place,
    component_rows,
    concentration,
    counts_by,
    most_removed,
)
from harmcircuits.circuits.masks import WeightMask
from harmcircuits.circuits.scores import Source
from harmcircuits.hooks.weights import weight_sites


def nothing(sites) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(site.parameter).bool() for name, site in sites.items()}


def mask_from(dense: dict[str, torch.Tensor]) -> WeightMask:
    shapes = {name: tuple(value.shape) for name, value in dense.items()}
    removed = {name: value.flatten().nonzero().flatten() for name, value in dense.items()}
    return WeightMask(removed, shapes, Source("model", "test"))


@pytest.mark.parametrize("architecture", ["Llama", "GPT2"])
def test_one_head_and_one_neuron(open_model, architecture):
    """Head 2 of 4 (six columns of the output matrix's input) and neuron 7, however stored."""
    sites = weight_sites(open_model(architecture))
    dense = nothing(sites)
    kinds = ("attn.o", "mlp.in", "mlp.out")
    output, up, down = (dense[f"blocks.1.{kind}.weight"] for kind in kinds)
    is_conv = architecture == "GPT2"
    (output if is_conv else output.T)[12:18] = True
    (up.T if is_conv else up)[7] = True
    (down if is_conv else down.T)[7] = True
    mask = mask_from(dense)

    expected = {"head": (2, 6 * 24, 2 * 6 * 24), "neuron": (7, 2 * 24, (3 - is_conv) * 24)}
    for by, (number, *count) in expected.items():
        counts = counts_by(mask, sites, by)
        touched = {place: tuple(count) for place, count in counts.items() if count.n_removed}
        assert touched == {Place(1, by, number): tuple(count)}
    assert counts_by(mask, sites, "layer")[Place(0)].n_removed == 0
    assert counts_by(mask, sites, "matrix")[Place(1, "mlp.in")] == (24, up.numel())
    of_neurons = concentration(mask, sites, "neuron")
    assert of_neurons.gini == pytest.approx(1 - 1 / 80), "all in one of 80 neurons"
    assert of_neurons.top_share == 1


def test_the_most_removed_come_first_and_heads_bear_what_they_read(llama):
    """Four heads of six rows, two key-value heads: 0 and 1 read the first."""
    sites = weight_sites(llama)
    dense = nothing(sites)
    dense["blocks.0.attn.q.weight"][6:8] = True  # 48 weights of head 1
    dense["blocks.0.attn.v.weight"][0] = True  # 24 of key-value head 0: heads 0 and 1
    dense["blocks.1.attn.o.weight"][:, 18] = True  # 24 of head 3
    dense["blocks.1.mlp.in.weight"][4, :3] = True
    dense["blocks.0.mlp.out.weight"][:4, 9] = True
    mask = mask_from(dense)
    assert most_removed(mask, sites, "head", 9) == [(0, 1), (0, 0), (1, 3)]
    assert most_removed(mask, sites, "neuron", 9) == [(0, 9), (1, 4)]


def test_component_rows_add_up(llama):
    sites = weight_sites(llama)
    mask = random_mask(llama, 0.05)
    rows = component_rows(mask, sites, n_units=1000)
    matrices, units = rows.where(by="matrix"), rows.where(by="unit")
    assert len(matrices) == len(mask.shapes)
    assert sum(row.mean for row in matrices) == mask.n_removed
    for (layer, kind), of_matrix in units.by("layer", "kind").items():
        removed = [row.mean for row in of_matrix]
        assert sum(removed) == matrices.one(layer=layer, kind=kind).mean
        assert removed == sorted(removed, reverse=True)


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_place_is_refused(llama):
    mask = random_mask(llama)
    with pytest.raises(ValueError, match="by='heads'"):
        counts_by(mask, weight_sites(llama), "heads")
