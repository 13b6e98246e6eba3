"""Selection and set algebra against brute force; files round-trip.

Would catch: thresholds that take more or fewer weights where scores tie, a scope that mixes
matrices, a control that does not match its mask, a file that loses the source.
"""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harmcircuits.circuits.masks import (
    FORMAT,
    FRAME_COLUMNS,
    WeightMask,
    random_like,
    shared_by,
    top_fraction,
)
from harmcircuits.circuits.scores import Source, WeightScores
from harmcircuits.hooks.attribution import magnitude_scores
from harmcircuits.hooks.weights import weight_sites

SOURCE = Source("model", "test", {"seed": 1}, (Source("model", "parent"),))


def scores_of(*values) -> WeightScores:
    return WeightScores(
        {f"w{i}": torch.tensor(v, dtype=torch.float32) for i, v in enumerate(values)}, SOURCE
    )


def mask_of(**removed: list[int]) -> WeightMask:
    return WeightMask(
        {k: torch.tensor(v, dtype=torch.int64) for k, v in removed.items()},
        {"a": (3, 4), "b": (2, 5)},
        SOURCE,
    )


# Few distinct values, so that ties are everywhere.
matrices = st.lists(
    st.tuples(st.integers(1, 5), st.integers(1, 6)), min_size=1, max_size=4
).flatmap(
    lambda shapes: st.tuples(
        *(
            st.lists(st.lists(st.integers(-2, 2), min_size=c, max_size=c), min_size=r, max_size=r)
            for r, c in shapes
        )
    )
)


@settings(max_examples=60, deadline=None)
@given(matrices, st.floats(0, 1), st.sampled_from(["weight", "model", "row"]))
def test_selection_equals_brute_force(values, fraction, within):
    scores = scores_of(*values)
    mask = top_fraction(scores, fraction, within=within)
    entries = [
        (n, i, v) for n, t in scores.values.items() for i, v in enumerate(t.flatten().tolist())
    ]
    columns = {name: shape[1] for name, shape in scores.shapes.items()}
    scope = {
        "weight": lambda n, i: n,
        "model": lambda n, i: "",
        "row": lambda n, i: (n, i // columns[n]),
    }[within]
    expected: dict[str, list[int]] = {name: [] for name in scores.shapes}
    for key in {scope(n, i) for n, i, _ in entries}:
        inside = [(n, i, v) for n, i, v in entries if scope(n, i) == key]
        count = max(1, int(np.floor(fraction * len(inside) + 0.5))) if fraction else 0
        for n, i, _ in sorted(inside, key=lambda entry: -entry[2])[
            :count
        ]:  # sorted is stable: ties by position
            expected[n].append(i)
    assert {n: mask.removed[n].tolist() if n in mask.removed else [] for n in expected} == {
        n: sorted(indices) for n, indices in expected.items()
    }


def test_stacked_experts_are_ranked_by_rows_of_their_last_axis(tmp_path):
    generator = torch.Generator().manual_seed(0)
    flat = scores_of(torch.randint(5, (6, 5), generator=generator).tolist())  # ties included
    stacked = WeightScores({"w0": flat.values["w0"].view(2, 3, 5)}, SOURCE)
    for within in ("weight", "model", "row"):
        mask = top_fraction(
            stacked, 0.4, within=within, exclude=top_fraction(stacked, 0.2, within=within)
        )
        expected = top_fraction(
            flat, 0.4, within=within, exclude=top_fraction(flat, 0.2, within=within)
        )
        assert torch.equal(mask.removed["w0"], expected.removed["w0"])
    assert mask.dense("w0").sum(dim=2).tolist() == [[2, 2, 2], [2, 2, 2]]
    for weights in (None, stacked.values):
        assert random_like(mask, weights=weights).n_removed == mask.n_removed
    mask.save(tmp_path / "mask")
    loaded = WeightMask.load(tmp_path / "mask")
    assert loaded.shapes == {"w0": (2, 3, 5)}
    assert (mask & loaded).n_removed == (mask | loaded).n_removed == mask.n_removed


def test_excluded_weights_are_never_chosen_and_the_count_stays():
    scores = scores_of([[5.0, 4, 3, 2, 1, 0, 0, 0, 0, 0]])
    first = top_fraction(scores, 0.2)
    assert top_fraction(scores, 0.2, exclude=first).removed["w0"].tolist() == [2, 3]
    assert top_fraction(scores, 0.2, within="row", exclude=first).removed["w0"].tolist() == [2, 3]
    with pytest.raises(ValueError, match="leaves fewer"):
        top_fraction(scores, 0.9, exclude=first)
    with pytest.raises(ValueError, match="leaves fewer"):
        top_fraction(scores, 0.9, within="row", exclude=first)
    with pytest.raises(ValueError, match="other weights"):
        top_fraction(scores, 0.2, exclude=mask_of(a=[0]))


def test_published_difference_is_a_smaller_choice_among_the_unprotected():
    """Top q minus top p is a choice of as many weights with the protected ones excluded."""
    generator = torch.Generator().manual_seed(0)
    harm = WeightScores({"a": torch.randn(20, 30, generator=generator)}, SOURCE)
    keep = WeightScores({"a": torch.rand(20, 30, generator=generator)}, SOURCE)
    protected = top_fraction(keep, 0.3, within="model")
    published = top_fraction(harm, 0.1, within="model") - protected
    ours = top_fraction(harm, published.n_removed / 600, within="model", exclude=protected)
    assert 0 < published.n_removed < 60
    assert torch.equal(ours.removed["a"], published.removed["a"])


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_fractions_outside_zero_to_one_are_refused(fraction):
    with pytest.raises(ValueError, match=r"expected a share in \[0, 1\]"):
        top_fraction(scores_of([[1.0]]), fraction)


@pytest.mark.usefixtures("unchecked")
def test_other_bad_input_is_refused():
    with pytest.raises(ValueError, match="within='layer'"):
        top_fraction(scores_of([[1.0]]), 0.5, within="layer")
    with pytest.raises(ValueError, match="not finite"):
        scores_of([[1.0, float("nan")]])
    with pytest.raises(ValueError, match="increase strictly"):
        mask_of(a=[3, 2])
    with pytest.raises(ValueError, match="increase strictly"):
        mask_of(a=[12])
    with pytest.raises(ValueError, match="not among the shapes"):
        mask_of(c=[0])


indices = st.fixed_dictionaries(
    {"a": st.sets(st.integers(0, 11)).map(sorted), "b": st.sets(st.integers(0, 9)).map(sorted)}
)


@settings(max_examples=60, deadline=None)
@given(indices, indices)
def test_algebra_is_that_of_sets(first_indices, second_indices):
    first, second = mask_of(**first_indices), mask_of(**second_indices)
    for combined, operation in (
        (first & second, set.__and__),
        (first | second, set.__or__),
        (first - second, set.__sub__),
    ):
        for name in ("a", "b"):
            expected = sorted(operation(set(first_indices[name]), set(second_indices[name])))
            assert (combined.removed[name].tolist() if name in combined.removed else []) == expected
    assert first.n_weights == 22
    assert first.n_removed == len(first_indices["a"]) + len(first_indices["b"])


def everything() -> WeightMask:
    return mask_of(a=list(range(12)), b=list(range(10)))


@settings(max_examples=60, deadline=None)
@given(indices)
def test_the_complement_removes_exactly_the_others(chosen):
    mask = mask_of(**chosen)
    others = ~mask
    assert len(others) == 22 - len(mask)
    for name in ("a", "b"):
        assert torch.equal(others.dense(name), ~mask.dense(name))
    assert len(mask & others) == 0
    assert (mask | others).counts == everything().counts
    assert others.source.parents == (mask.source,)

    back = ~others
    assert back.counts == mask.counts
    assert len(back - mask) == 0


def test_a_mask_counts_itself():
    mask = mask_of(a=[0, 5], b=[3])
    assert len(mask) == mask.n_removed == 3
    assert mask.n_weights == 22
    assert mask.fraction == 3 / 22
    assert mask.counts == {"a": 2, "b": 1}
    assert repr(mask) == "WeightMask(test, 3 of 22 weights, 14%)"

    empty = mask_of()
    assert len(empty) == empty.fraction == 0
    assert empty.counts == {"a": 0, "b": 0}, "zeros included"
    assert not empty.removed
    assert everything().fraction == 1


def test_a_digest_tells_sets_of_weights_apart_whatever_made_them():
    shapes = {"a": (3, 4), "b": (12,)}

    def mask(removed: dict[str, list[int]], method: str = "test") -> WeightMask:
        indices = {name: torch.tensor(index) for name, index in removed.items()}
        return WeightMask(indices, shapes, Source("model", method))

    digest = mask({"a": [1, 2], "b": [5]}).digest
    assert mask({"b": [5], "a": [1, 2]}, "other").digest == digest
    for other in ({"a": [1, 2, 5]}, {"a": [1, 2]}, {"a": [1, 3], "b": [5]}, {"b": [1, 2, 5]}):
        assert mask(other).digest != digest


def test_masks_are_equal_when_they_are_the_same_weights_of_the_same_model():
    mask = mask_of(a=[0, 5], b=[3])
    assert mask == (mask | mask), "however it was made"
    assert mask != mask_of(a=[0, 5])
    assert len({mask, mask | mask, mask_of(a=[0, 5])}) == 2, "sets hold each once"
    assert mask != mask.removed, "not a mask"

    removed, shapes = dict(mask.removed), dict(mask.shapes)
    assert mask != WeightMask(removed, shapes, Source("other", "test"))
    assert mask != WeightMask(removed, {**shapes, "c": (1, 1)}, SOURCE)


def test_masks_of_different_models_do_not_combine():
    other = WeightMask({}, {"a": (3, 4), "b": (2, 5)}, Source("other", "test"))
    with pytest.raises(ValueError, match="two models"):
        mask_of(a=[1]) | other
    with pytest.raises(ValueError, match="differ in"):
        mask_of(a=[1]) & WeightMask({}, {"a": (3, 4)}, SOURCE)


def test_random_like_matches_counts_and_magnitudes():
    generator = torch.Generator().manual_seed(0)
    weights = {
        "a": torch.randn(100, 100, generator=generator),
        "b": torch.randn(50, 100, generator=generator),
    }
    scores = WeightScores({name: value.abs() for name, value in weights.items()}, SOURCE)
    mask = top_fraction(scores, 0.1, within="model")  # the largest weights of both
    plain, again = random_like(mask, seed=3), random_like(mask, seed=3)
    matched = random_like(mask, seed=3, weights=weights)
    assert plain.counts == matched.counts == mask.counts
    assert torch.equal(plain.removed["a"], again.removed["a"])
    assert not torch.equal(plain.removed["a"], random_like(mask, seed=4).removed["a"])
    size = weights["a"].abs().flatten()
    mean = {
        name: size[m.removed["a"]].mean().item()
        for name, m in (("circuit", mask), ("plain", plain), ("matched", matched))
    }
    # A bin is 2 % of the matrix; the matched mean is off by at most what varies within the few
    # top bins.
    assert mean["matched"] == pytest.approx(mean["circuit"], rel=0.03)
    assert mean["plain"] < 0.6 * mean["circuit"]
    with pytest.raises(ValueError, match="weights lack"):
        random_like(mask, weights={"b": weights["b"]})


def test_file_round_trip(tmp_path):
    mask = mask_of(a=[0, 5, 11])
    mask.save(tmp_path / "mask.safetensors")
    loaded = WeightMask.load(tmp_path / "mask.safetensors")
    assert loaded.shapes == mask.shapes
    assert loaded.source == mask.source
    assert loaded.removed["a"].tolist() == [0, 5, 11]
    assert mask.dense("a").sum() == 3
    mask_of().save(tmp_path / "empty.safetensors")
    assert WeightMask.load(tmp_path / "empty.safetensors").n_removed == 0


def test_a_mask_from_a_file_draws_the_same_random_masks(tmp_path):
    """A file sorts matrices by name: w10 before w2. Would make a resumed study's controls others."""
    shapes = {"w2": (20, 30), "w10": (30, 20)}
    weights = {name: torch.linspace(-1, 1, 600).view(shape) for name, shape in shapes.items()}
    mask = WeightMask({name: torch.arange(5) for name in shapes}, shapes, Source("m", "test"))
    mask.save(tmp_path / "mask")
    loaded = WeightMask.load(tmp_path / "mask")
    assert list(loaded.removed) == list(shapes)
    for options in ({}, {"weights": weights}):
        expected = random_like(mask, seed=3, **options)
        assert random_like(loaded, seed=3, **options).digest == expected.digest
        assert random_like(loaded, seed=4, **options).digest != expected.digest


def test_files_that_are_no_mask_are_refused(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(ValueError, match="no such file"):
        WeightMask.load(tmp_path / "missing.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(ValueError, match="not a safetensors file"):
        WeightMask.load(tmp_path / "text.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no mask of harmcircuits"):
        WeightMask.load(tmp_path / "other.safetensors")


def test_shared_weights_are_counted_over_masks():
    masks = [mask_of(a=[0, 1, 2]), mask_of(a=[1, 2, 5], b=[3]), mask_of(a=[2], b=[3, 4])]
    removed = {
        k: {name: index.tolist() for name, index in shared_by(masks, k).removed.items()}
        for k in (1, 2, 3)
    }
    assert removed == {
        1: {"a": [0, 1, 2, 5], "b": [3, 4]},
        2: {"a": [1, 2], "b": [3]},
        3: {"a": [2]},
    }
    for k in (0, 4):
        with pytest.raises(ValueError, match=f"at_least={k} of 3 masks"):
            shared_by(masks, k)


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Mixtral"])
def test_a_frame_names_the_place_and_the_value_of_every_removed_weight(open_model, name):
    """Rows and columns are those of the stored matrix; units as `Site.units` counts them."""
    sites = weight_sites(open_model(name))
    mask = top_fraction(magnitude_scores(open_model(name)), 0.01, within="weight")
    table = mask.frame(sites)
    assert tuple(table.columns) == FRAME_COLUMNS
    assert len(table) == len(mask)

    start = 0
    for weight, index in mask.removed.items():
        site, part = sites[weight], table.iloc[start : start + len(index)]
        start += len(index)
        assert set(part["layer"]) == {site.layer}
        assert set(part["kind"]) == {site.kind}
        assert set(part["unit"]) == {site.unit}
        assert part["number"].tolist() == site.units(index).tolist()
        values = site.parameter.detach().flatten()[index].tolist()
        assert part["weight"].tolist() == pytest.approx(values)
        width = mask.shapes[weight][-1]
        assert part["column"].tolist() == (index % width).tolist()

    assert tuple((mask - mask).frame(sites).columns) == FRAME_COLUMNS
    with pytest.raises(ValueError, match="weight_sites"):
        mask.frame({})


@pytest.mark.parametrize(
    ("tensors", "shapes", "fault"),
    [
        ({"a": torch.tensor([0, 12])}, {"a": [3, 4]}, r"indices of a must increase.*\[0, 12\)"),
        ({"a": torch.tensor([-1, 3])}, {"a": [3, 4]}, "indices of a must increase"),
        ({"a": torch.tensor([5, 3])}, {"a": [3, 4]}, "indices of a must increase"),
        ({"a": torch.tensor([3, 3])}, {"a": [3, 4]}, "indices of a must increase"),
        ({"a": torch.tensor([[1, 3]])}, {"a": [3, 4]}, r"shape \(1, 2\); expected flat indices"),
        ({"a": torch.tensor([1.5, 3.0])}, {"a": [3, 4]}, "a are torch.float32.*expected flat"),
        ({"b": torch.tensor([1])}, {"a": [3, 4]}, "b is not among the shapes"),
    ],
    ids=str,
)
def test_a_mask_that_none_can_be_is_refused_by_the_file_and_the_fault(
    tmp_path, tensors, shapes, fault, unchecked
):
    """Files of another's making, well formed and without checksums."""
    from safetensors.torch import save_file

    metadata = {"format": FORMAT, "shapes": json.dumps(shapes), "source": SOURCE.to_json()}
    save_file(tensors, tmp_path / "m.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match=rf"m\.safetensors: .*{fault}"):
        WeightMask.load(tmp_path / "m.safetensors")


def test_a_failed_save_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    """A full disk: the old mask is still there, whole, and nothing beside it."""
    path = tmp_path / "m.safetensors"
    mask_of(a=[0, 5]).save(path)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("harmcircuits.storage.save_file", full)
        with pytest.raises(OSError, match=r"No space left on device: .*m\.safetensors"):
            mask_of(a=[1]).save(path)
    assert WeightMask.load(path).removed["a"].tolist() == [0, 5]
    assert [file.name for file in tmp_path.iterdir()] == ["m.safetensors"]
