"""Whole neurons, heads and rows, by hand and as every architecture stores them.

Would catch: a slice along the wrong axis, key-value heads with the wrong heads, torn units.
"""

import pytest
import torch
from torch import nn

from harmcircuits.circuits.location import counts_by
from harmcircuits.circuits.masks import WeightMask
from harmcircuits.circuits.sites import Site
from harmcircuits.circuits.units import Units
from harmcircuits.hooks.attribution import random_scores
from harmcircuits.hooks.weights import weight_sites


def site(layer: int, kind: str, shape: tuple[int, int], unit_axis: int) -> Site:
    name = f"blocks.{layer}.{kind}.weight"
    return Site(name, layer, kind, nn.Parameter(torch.zeros(shape)), 1, unit_axis, 2)


# Two neurons of two inputs and one output: three weights each. A head of one row and one column.
SITES = [
    site(0, "attn.q", (2, 2), unit_axis=0),
    site(0, "attn.o", (2, 2), unit_axis=1),
    site(0, "mlp.in", (2, 2), unit_axis=0),
    site(0, "mlp.out", (1, 2), unit_axis=1),
    site(1, "mlp.in", (2, 2), unit_axis=0),
    site(1, "mlp.out", (1, 2), unit_axis=1),
]
HAND = {site.name: site for site in SITES}
SCORES = {
    "blocks.0.attn.q.weight": torch.tensor([[9.0, 9.0], [1.0, -2.0]]),
    "blocks.0.attn.o.weight": torch.tensor([[1.0, 3.0], [1.0, 0.0]]),
    "blocks.0.mlp.in.weight": torch.tensor([[1.0, 2.0], [5.0, -6.0]]),
    "blocks.0.mlp.out.weight": torch.tensor([[3.0, 1.5]]),
    "blocks.1.mlp.in.weight": torch.tensor([[0.0, 0.0], [4.0, 4.0]]),
    "blocks.1.mlp.out.weight": torch.tensor([[-1.0, 1.0]]),
}
FIRST = {"0.mlp.in": [0, 1], "0.mlp.out": [0]}  # neuron 0 of block 0: mean 2
BEST = {"1.mlp.in": [2, 3], "1.mlp.out": [1]}  # neuron 1 of block 1: mean 3
OF_FIRST, OF_BEST = ({"blocks.0.mlp.in.weight": [0]}, {"blocks.1.mlp.out.weight": [1]})


@pytest.mark.parametrize(
    ("unit", "n", "excluded", "expected"),
    [
        ("neuron", 5, {}, BEST),
        ("neuron", 6, {}, FIRST | BEST),
        # One more has a mean above zero: 1/6.
        ("neuron", 12, {}, {"0.mlp.in": [0, 1, 2, 3], "0.mlp.out": [0, 1]} | BEST),
        ("neuron", 3, OF_BEST, FIRST),
        ("neuron", 3, OF_FIRST, BEST),
        # Means 5 and 1/2: q's rows with o's columns.
        ("head", 4, {}, {"0.attn.q": [0, 1], "0.attn.o": [0, 2]}),
        ("row", 6, {}, {"0.attn.q": [0, 1], "1.mlp.in": [2, 3], "0.mlp.out": [0, 1]}),
    ],
)
def test_the_best_units_by_hand(unit, n, excluded, expected):
    barred = {name: torch.tensor(index) for name, index in excluded.items()}
    removed = Units.of(HAND, unit, HAND).largest(SCORES, n, barred)
    chosen = {name: index.tolist() for name, index in removed.items() if len(index)}
    assert chosen == {f"blocks.{name}.weight": index for name, index in expected.items()}


def test_random_units_are_as_many_in_every_layer():
    """Of two neurons in layer 0 and of one in layer 1, as a part of each shows."""
    given = {"blocks.0.mlp.in.weight": torch.tensor([0, 2])}
    given["blocks.1.mlp.out.weight"] = torch.tensor([1])
    drawn = set()
    for seed in range(10):
        removed = Units.of(HAND, "neuron", HAND).random(given, seed=seed)
        assert len(removed["blocks.0.mlp.in.weight"]) == 4
        neuron = int(removed["blocks.1.mlp.out.weight"])
        assert removed["blocks.1.mlp.in.weight"].tolist() == [2 * neuron, 2 * neuron + 1]
        drawn.add(neuron)
    assert drawn == {0, 1}


@pytest.mark.parametrize("name", ["GPT2", "GPTBigCode", "Phi3"])
@pytest.mark.parametrize("unit", ["neuron", "head", "row"])
def test_units_are_whole_and_together_within_the_size(open_model, name, unit):
    n, bridge = 577, open_model(name)
    sites = weight_sites(bridge)
    scores = random_scores(bridge)
    removed = Units.of(sites, unit, sites).largest(dict(scores.values), n, {})
    mask = WeightMask(removed, scores.shapes, scores.source)
    assert 0 < mask.n_removed <= n
    if unit == "row":
        for weight, site in sites.items():
            outputs = mask.dense(weight).movedim(1 - site.input_axis, 0)
            assert (outputs.all(dim=1) == outputs.any(dim=1)).all()
        return
    for count in counts_by(mask, sites, unit).values():
        assert count.n_removed in (0, count.n_weights)


@pytest.mark.parametrize(
    ("name", "unit", "kinds", "word"),
    [
        ("GPT2", "head", ["attn.q", "attn.o"], "attn.q, attn.k, attn.v, attn.o together"),
        ("Llama", "head", ["mlp.in", "mlp.out"], "none in mlp.in, mlp.out"),
        ("Mixtral", "row", ["mlp.router"], "mlp.gate.weight is of experts"),
    ],
)
def test_parts_of_units_are_refused(open_model, name, unit, kinds, word):
    sites = weight_sites(open_model(name))
    within = [weight for weight, site in sites.items() if site.kind in kinds]
    with pytest.raises(ValueError, match=word):
        Units.of(sites, unit, within)
