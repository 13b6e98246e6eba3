"""Selection and set algebra against brute force; files round-trip.

Would catch: a threshold that takes more or fewer where scores tie, a control unlike its mask.
"""

import copy
import operator
import pickle
from dataclasses import replace

import pytest
import torch
from helpers import random_mask
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from harmcircuits.circuits.masks import (
    N_MAGNITUDE_BINS,
    WeightMask,
    random_like,
    top_fraction,
    union,
)
from harmcircuits.circuits.scores import Source, WeightScores
from harmcircuits.hooks.weights import weight_sites
from harmcircuits.measurements import Measurement, Rows
from harmcircuits.organisms.shipped import FOLDER
from harmcircuits.search.attribution import magnitude_scores

SOURCE = Source("model", "test", {"seed": 1}, (Source("model", "parent"),))
SHAPES = {"a": (3, 4), "b": (2, 5)}


def scores_of(*values) -> WeightScores:
    tensors = {f"w{i}": torch.tensor(v, dtype=torch.float32) for i, v in enumerate(values)}
    return WeightScores(tensors, SOURCE)


def mask_of(**removed: list[int]) -> WeightMask:
    tensors = {name: torch.tensor(index, dtype=torch.int64) for name, index in removed.items()}
    return WeightMask(tensors, SHAPES, SOURCE)


def lists(mask: WeightMask) -> dict[str, list[int]]:
    return {name: index.tolist() for name, index in mask.removed.items()}


# Few distinct values, so that ties are everywhere.
def matrix(shape: tuple[int, int]):
    row = st.lists(st.integers(-2, 2), min_size=shape[1], max_size=shape[1])
    return st.lists(row, min_size=shape[0], max_size=shape[0])


shapes = st.tuples(st.integers(1, 5), st.integers(1, 6))
matrices = st.lists(shapes.flatmap(matrix), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(matrices, st.floats(0, 1), st.sampled_from(["weight", "model", "row"]))
def test_selection_equals_brute_force(values, fraction, within):
    scores = scores_of(*values)
    scopes: dict = {}
    for name, value in scores.values.items():
        for place, score in enumerate(value.flatten().tolist()):
            row = place // value.shape[1]
            scope = {"weight": name, "model": "", "row": (name, row)}[within]
            scopes.setdefault(scope, []).append((name, place, score))

    expected: dict[str, list[int]] = {}
    for entries in scopes.values():
        count = max(1, int(fraction * len(entries) + 0.5)) if fraction else 0
        # A stable sort: ties by position.
        for name, place, _ in sorted(entries, key=lambda entry: -entry[2])[:count]:
            expected.setdefault(name, []).append(place)
    expected = {name: sorted(places) for name, places in expected.items()}
    assert lists(top_fraction(scores, fraction, within=within)) == expected


def test_stacked_experts_are_ranked_by_rows_of_their_last_axis():
    generator = torch.Generator().manual_seed(0)
    flat = scores_of(torch.randint(5, (6, 5), generator=generator).tolist())  # ties included
    stacked = WeightScores({"w0": flat.values["w0"].view(2, 3, 5)}, SOURCE)
    masks = []
    for scores in (flat, stacked):
        exclude = top_fraction(scores, 0.2, within="row")
        masks.append(top_fraction(scores, 0.4, within="row", exclude=exclude))
    assert lists(masks[0]) == lists(masks[1])
    assert masks[1].dense("w0").sum(dim=2).tolist() == [[2, 2, 2], [2, 2, 2]]


SCORES = scores_of([[5.0, 4, 3, 2, 1]])
FIRST = top_fraction(SCORES, 0.2)
REFUSALS = [
    (lambda: top_fraction(SCORES, 1.1), "0, 1"),
    (lambda: top_fraction(SCORES, 0.9, within="row", exclude=FIRST), "leaves fewer"),
    (lambda: top_fraction(SCORES, 0.2, exclude=mask_of(a=[0])), "same weights"),
    (lambda: mask_of(a=[3, 3]), "increase strictly"),
    (lambda: mask_of(a=[12]), "0, 12"),
    (lambda: mask_of(c=[0]), "c is not among the shapes"),
    (lambda: mask_of(a=[1]) & WeightMask({}, {"a": (3, 4)}, SOURCE), "'b'"),
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("call", "word"), REFUSALS)
def test_what_cannot_be_is_refused(call, word):
    with pytest.raises(ValueError, match=word):
        call()


indices = st.fixed_dictionaries(
    {"a": st.sets(st.integers(0, 11)).map(sorted), "b": st.sets(st.integers(0, 9)).map(sorted)}
)


@settings(max_examples=60, deadline=None)
@given(indices, indices)
def test_algebra_is_that_of_sets(first_indices, second_indices):
    first, second = mask_of(**first_indices), mask_of(**second_indices)
    for operation in (operator.and_, operator.or_, operator.sub):
        combined = operation(first, second)
        for name in SHAPES:
            expected = operation(set(first_indices[name]), set(second_indices[name]))
            assert lists(combined).get(name, []) == sorted(expected)
    assert union([first, second]) == first | second

    assert first.counts == {name: len(index) for name, index in first_indices.items()}
    assert first.fraction == len(first) / 22 == sum(first.counts.values()) / 22
    others = ~first
    for name in SHAPES:
        assert torch.equal(others.dense(name), ~first.dense(name))
    assert others.source.parents == (first.source,)
    assert ~others == first


def test_masks_are_equal_when_they_are_the_same_weights_of_the_same_model():
    mask = mask_of(a=[1, 2], b=[5])
    assert mask == (mask | mask), "however it was made"
    assert mask.digest == mask_of(b=[5], a=[1, 2]).digest == "57a5299881ac7e3f"
    for other in (mask_of(a=[1, 2]), mask_of(a=[1, 3], b=[5]), mask_of(b=[1, 2, 5])):
        assert mask.digest != other.digest and mask != other
    assert mask != WeightMask(dict(mask.removed), SHAPES, Source("other", "test"))


@pytest.mark.parametrize("name", ["GPT2", "Mixtral"])
def test_a_frame_names_the_place_and_the_value_of_every_removed_weight(open_model, name):
    """Rows and columns are those of the stored matrix; units as `Site.units` counts them."""
    sites = weight_sites(open_model(name))
    mask = random_mask(open_model(name), 0.01)
    table = mask.frame(sites)
    assert len(table) == len(mask)

    parts = table.groupby(["layer", "kind"], sort=False)
    for weight, index in mask.removed.items():
        site = sites[weight]
        part = parts.get_group((site.layer, site.kind))
        assert part["number"].tolist() == site.units(index).tolist()
        assert part["column"].tolist() == (index % mask.shapes[weight][-1]).tolist()
        values = site.parameter.detach().flatten()[index].tolist()
        assert part["weight"].tolist() == pytest.approx(values)


def test_file_round_trip_and_masks_of_version_0_1_0(tmp_path):
    path = tmp_path / "mask.safetensors"
    for mask in (mask_of(a=[0, 5, 11]), mask_of()):
        mask.save(path)
        assert WeightMask.load(path) == mask
        assert WeightMask.load(path).source == mask.source
    save_file({"a": torch.tensor([0])}, path)
    with pytest.raises(ValueError, match="no mask of harmcircuits"):
        WeightMask.load(path)
    assert WeightMask.load(FOLDER / "planted" / "circuit.safetensors").n_removed == 98_304


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda mask: pickle.loads(pickle.dumps(mask))]
)
def test_a_copy_of_a_mask_holds_all_of_it_and_stays_read_only(duplicate):
    trace = Rows([Measurement.exact("loss", {"step": 1}, 0.5)])
    mask = replace(mask_of(a=[0, 5, 11], b=[3]), trace=trace, file="mask.safetensors")
    other = duplicate(mask)
    assert other == mask and other.digest == mask.digest and list(other.removed) == ["a", "b"]
    assert (other.source, other.trace, other.file) == (mask.source, mask.trace, mask.file)
    for values in (other.removed, other.shapes):
        with pytest.raises(TypeError):
            values["a"] = torch.tensor([1])
    other.removed["b"].fill_(4)
    assert mask.removed["b"].tolist() == [3], "nothing is shared"


def test_a_mask_from_a_file_draws_the_same_random_masks(tmp_path):
    """A file sorts matrices by name: w10 before w2. Would make a resumed study's controls others."""
    shapes = {"w2": (20, 30), "w10": (30, 20)}
    weights = {name: torch.linspace(-1, 1, 600).view(shape) for name, shape in shapes.items()}
    mask = WeightMask({name: torch.arange(5) for name in shapes}, shapes, Source("m", "test"))
    mask.save(tmp_path / "mask")
    loaded = WeightMask.load(tmp_path / "mask")
    assert list(loaded.removed) == list(shapes)
    for options in ({}, {"weights": weights}):
        drawn = random_like(mask, seed=3, **options)
        assert drawn.counts == mask.counts
        assert drawn == random_like(loaded, seed=3, **options)
        assert drawn != random_like(mask, seed=4, **options)


def test_random_masks_of_like_magnitude_have_as_many_in_each_bin():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(100, 200, generator=generator)
    index = torch.randperm(weight.numel(), generator=generator)[:900].sort().values
    magnitude = weight.abs().flatten()
    index = torch.cat([index, magnitude.topk(200).indices]).unique()  # many of one bin
    mask = WeightMask({"w": index}, {"w": (100, 200)}, Source("m", "x"))
    random = random_like(mask, seed=1, weights={"w": weight})
    rank = magnitude.argsort(stable=True).argsort() * N_MAGNITUDE_BINS // magnitude.numel()

    def in_bins(mask):
        return rank[mask.removed["w"]].bincount(minlength=N_MAGNITUDE_BINS)

    assert torch.equal(in_bins(random), in_bins(mask))
    assert random != mask and random == random_like(mask, seed=1, weights={"w": weight})
    times = torch.zeros(weight.numel())
    for seed in range(60):
        times[random_like(mask, seed=seed, weights={"w": weight}).removed["w"]] += 1
    last_bin = times[rank == N_MAGNITUDE_BINS - 1]
    expected = 60 * int(in_bins(mask)[-1]) / len(last_bin)
    assert last_bin.mean() == pytest.approx(expected) and last_bin.std() < 2 * expected**0.5


def test_a_mask_of_another_model_is_refused(llama):
    scores = magnitude_scores(llama)
    mask = top_fraction(scores, 0.01)
    foreign = replace(mask, source=Source("another", "x"))
    for call in (
        lambda: top_fraction(scores, 0.01, exclude=foreign),
        lambda: scores.sum_over(foreign),
        lambda: mask & foreign,
    ):
        with pytest.raises(ValueError, match="another"):
            call()
