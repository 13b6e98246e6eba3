"""Whole neurons, heads and rows, by hand and against explicit slices of every architecture.

Would catch: a slice along the wrong axis, a neuron without one of its matrices, key-value heads
that go with the wrong heads, a sum in place of a mean, a unit beyond the size or torn by what is
excluded, ties that go to the later unit.
"""

import pytest
import torch
from torch import Tensor, nn

from harmcircuits.circuits.location import counts_by
from harmcircuits.circuits.masks import WeightMask
from harmcircuits.circuits.scores import Source
from harmcircuits.circuits.sites import Site
from harmcircuits.circuits.units import Units
from harmcircuits.hooks.weights import weight_sites


def site(layer: int, kind: str, shape: tuple[int, int], unit_axis: int, n_units: int) -> Site:
    name = f"blocks.{layer}.{kind}.weight"
    return Site(name, layer, kind, nn.Parameter(torch.zeros(shape)), 1, unit_axis, n_units)


def by_name(*sites: Site) -> dict[str, Site]:
    return {site.name: site for site in sites}


def random_scores(sites: dict[str, Site], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = {}
    for name, site in sites.items():
        scores[name] = torch.randn(site.parameter.shape, generator=generator)
    return scores


def as_mask(sites: dict[str, Site], removed: dict[str, Tensor]) -> WeightMask:
    shapes = {name: tuple(site.parameter.shape) for name, site in sites.items()}
    return WeightMask(removed, shapes, Source("model", "test"))


# By hand

# Two neurons of two inputs and one output: three weights each. A head of one row and one column.
HAND = by_name(
    site(0, "attn.q", (2, 2), unit_axis=0, n_units=2),
    site(0, "attn.o", (2, 2), unit_axis=1, n_units=2),
    site(0, "mlp.in", (2, 2), unit_axis=0, n_units=2),
    site(0, "mlp.out", (1, 2), unit_axis=1, n_units=2),
    site(1, "mlp.in", (2, 2), unit_axis=0, n_units=2),
    site(1, "mlp.out", (1, 2), unit_axis=1, n_units=2),
)
SCORES = {
    "blocks.0.attn.q.weight": torch.tensor([[9.0, 9.0], [1.0, -2.0]]),
    "blocks.0.attn.o.weight": torch.tensor([[1.0, 3.0], [1.0, 0.0]]),
    "blocks.0.mlp.in.weight": torch.tensor([[1.0, 2.0], [5.0, -6.0]]),
    "blocks.0.mlp.out.weight": torch.tensor([[3.0, 1.5]]),
    "blocks.1.mlp.in.weight": torch.tensor([[0.0, 0.0], [4.0, 4.0]]),
    "blocks.1.mlp.out.weight": torch.tensor([[-1.0, 1.0]]),
}


@pytest.mark.parametrize(
    ("unit", "n", "expected"),
    [
        ("neuron", 2, {}),
        # Means 2, 1/6 in block 0, and -1/3, 3 in block 1: the best comes first.
        ("neuron", 3, {"1.mlp.in": [2, 3], "1.mlp.out": [1]}),
        ("neuron", 5, {"1.mlp.in": [2, 3], "1.mlp.out": [1]}),
        (
            "neuron",
            6,
            {"0.mlp.in": [0, 1], "0.mlp.out": [0], "1.mlp.in": [2, 3], "1.mlp.out": [1]},
        ),
        (
            "neuron",
            12,
            {
                "0.mlp.in": [0, 1, 2, 3],
                "0.mlp.out": [0, 1],
                "1.mlp.in": [2, 3],
                "1.mlp.out": [1],
            },
        ),
        # Means 5 and 1/2: q's rows with o's columns.
        ("head", 4, {"0.attn.q": [0, 1], "0.attn.o": [0, 2]}),
        # A row of mlp.out has two weights as well; the mean of block 0's is 2.25.
        ("row", 4, {"0.attn.q": [0, 1], "1.mlp.in": [2, 3]}),
        ("row", 6, {"0.attn.q": [0, 1], "1.mlp.in": [2, 3], "0.mlp.out": [0, 1]}),
    ],
)
def test_the_best_units_by_hand(unit, n, expected):
    removed = Units.of(HAND, unit, HAND).largest(SCORES, n, {})
    chosen = {name: index.tolist() for name, index in removed.items() if len(index)}
    assert chosen == {f"blocks.{name}.weight": index for name, index in expected.items()}


def test_random_units_are_as_many_in_every_layer():
    """Neurons of 3 weights: of two in layer 0 and of none in layer 1, as a part of each shows."""
    units = Units.of(HAND, "neuron", HAND)
    given = {"blocks.0.mlp.in.weight": torch.tensor([0, 2])}
    assert as_mask(HAND, units.random(given, seed=0)).counts == {
        **dict.fromkeys(HAND, 0),
        "blocks.0.mlp.in.weight": 4,
        "blocks.0.mlp.out.weight": 2,
    }
    one = {"blocks.1.mlp.out.weight": torch.tensor([1])}
    drawn = [units.random(one, seed=seed) for seed in range(10)]
    neurons = {int(removed["blocks.1.mlp.out.weight"]) for removed in drawn}
    assert neurons == {0, 1}
    for removed in drawn:
        first = 2 * int(removed["blocks.1.mlp.out.weight"])
        assert removed["blocks.1.mlp.in.weight"].tolist() == [first, first + 1]


def test_units_of_several_sizes_are_ranked_by_their_means():
    """Rows of 2 and of 8: the longer has the larger sum, the shorter the larger mean."""
    sites = by_name(site(0, "mlp.in", (1, 8), 0, 1), site(0, "mlp.out", (1, 2), 1, 2))
    scores = {
        "blocks.0.mlp.in.weight": torch.full((1, 8), 0.5),
        "blocks.0.mlp.out.weight": torch.full((1, 2), 1.0),
    }
    units = Units.of(sites, "row", sites)
    assert units.sizes.tolist() == [8, 2]
    assert units.sums(scores).tolist() == [4.0, 2.0]
    assert as_mask(sites, units.largest(scores, 9, {})).counts == {
        "blocks.0.mlp.in.weight": 0,
        "blocks.0.mlp.out.weight": 2,
    }


def test_a_unit_with_an_excluded_weight_is_not_chosen():
    excluded = {
        "blocks.0.attn.q.weight": torch.tensor([0]),  # of no neuron
        "blocks.1.mlp.out.weight": torch.tensor([1]),  # of the best neuron
    }
    removed = Units.of(HAND, "neuron", HAND).largest(SCORES, 3, excluded)
    assert removed["blocks.0.mlp.in.weight"].tolist() == [0, 1]
    assert as_mask(HAND, removed).n_removed == 3


# Every way of storing and sharing


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Phi", "GPTBigCode", "Phi3"])
@pytest.mark.parametrize("unit", ["neuron", "head", "row"])
@pytest.mark.parametrize("n", [0, 577, 10**6])
def test_units_are_whole_and_together_within_the_size(open_model, name, unit, n):
    sites = weight_sites(open_model(name))
    units = Units.of(sites, unit, sites)
    removed = units.largest(random_scores(sites), n, {})
    mask = as_mask(sites, removed)
    assert mask.n_removed <= n
    assert n < 1000 or mask.n_removed > 0
    if unit == "row":
        for weight_name, site in sites.items():
            dense = mask.dense(weight_name)
            outputs = dense if site.input_axis == 1 else dense.T
            assert (outputs.all(dim=1) == outputs.any(dim=1)).all()
        return
    for count in counts_by(mask, sites, unit).values():
        assert count.n_removed in (0, count.n_weights)


@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_a_neuron_is_a_slice_of_each_of_its_matrices(open_model, name):
    """The one with the highest score, as its matrices store it."""
    sites = weight_sites(open_model(name))
    scores = {name: torch.zeros(site.parameter.shape) for name, site in sites.items()}
    is_conv = name == "GPT2"
    expected = {name: torch.zeros_like(value, dtype=torch.bool) for name, value in scores.items()}
    for kind in ("in", "out") if is_conv else ("gate", "in", "out"):
        neurons = expected[f"blocks.1.mlp.{kind}.weight"]
        (neurons.T if is_conv != (kind == "out") else neurons)[7] = True
    scores["blocks.1.mlp.in.weight"][expected["blocks.1.mlp.in.weight"]] = 1.0

    mask = as_mask(sites, Units.of(sites, "neuron", sites).largest(scores, 10**6, {}))
    for weight_name in sites:
        assert torch.equal(mask.dense(weight_name), expected[weight_name])


@pytest.mark.parametrize(
    ("name", "best", "together"),
    [
        # Four heads of six dimensions share two key-value heads: each kind by itself.
        ("Llama", "q", {"q": slice(6, 12), "o": slice(6, 12)}),
        ("Llama", "k", {"k": slice(6, 12), "v": slice(6, 12)}),
        ("GPT2", "q", {kind: slice(6, 12) for kind in "qkvo"}),
        ("GPT2", "v", {kind: slice(6, 12) for kind in "qkvo"}),
        ("GPTBigCode", "k", {"k": slice(0, 6), "v": slice(0, 6)}),
    ],
)
def test_a_head_takes_its_keys_and_values_along_where_it_has_its_own(
    open_model, name, best, together
):
    sites = weight_sites(open_model(name))
    scores = {name: torch.zeros(site.parameter.shape) for name, site in sites.items()}
    expected = {name: torch.zeros_like(value, dtype=torch.bool) for name, value in scores.items()}
    for kind, where in together.items():
        weight_name = f"blocks.0.attn.{kind}.weight"
        by_unit = expected[weight_name].movedim(sites[weight_name].unit_axis, 0)
        by_unit[where] = True
    best_name = f"blocks.0.attn.{best}.weight"
    scores[best_name][expected[best_name]] = 1.0

    mask = as_mask(sites, Units.of(sites, "head", sites).largest(scores, 10**6, {}))
    for weight_name in sites:
        assert torch.equal(mask.dense(weight_name), expected[weight_name]), weight_name


# What cannot be


@pytest.mark.parametrize(
    ("name", "unit", "kinds", "word"),
    [
        ("Llama", "neuron", ["mlp.in", "mlp.gate"], "mlp.gate, mlp.in, mlp.out together"),
        ("Llama", "head", ["attn.q"], "attn.q, attn.o together"),
        ("Llama", "head", ["mlp.in", "mlp.out"], "none in mlp.in, mlp.out"),
        ("Mixtral", "neuron", ["mlp.router"], "none in mlp.router"),
        ("Mixtral", "row", ["mlp.router"], "mlp.gate.weight is of experts"),
    ],
)
def test_parts_of_units_are_refused(open_model, name, unit, kinds, word):
    sites = weight_sites(open_model(name))
    within = [weight for weight, site in sites.items() if site.kind in kinds]
    with pytest.raises(ValueError) as error:
        Units.of(sites, unit, within)
    assert word in str(error.value)


def test_query_heads_can_be_chosen_without_those_of_keys_and_values(open_model):
    sites = weight_sites(open_model("Llama"))
    within = [name for name, site in sites.items() if site.kind in ("attn.q", "attn.o")]
    assert Units.of(sites, "head", within).sites.keys() == set(within)
    assert len(Units.of(sites, "head", sites).sites) == 2 * len(within)
