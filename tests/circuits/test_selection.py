"""Selection by histogram against sorting, and what it reads and holds.

Would catch: keys that order negative numbers backwards, zeros of two signs that do not tie, a tie
that crosses a chunk or a tensor and is counted twice, an excluded weight that is chosen, a
selection that holds the dense scores.
"""

import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harmcircuits.circuits.masks import top_fraction
from harmcircuits.circuits.scores import Source, WeightScores
from harmcircuits.circuits.selection import _Best, largest, largest_of_rows

SOURCE = Source("model", "test", {"seed": 1}, (Source("model", "parent"),))
# Special values often, so that ties are everywhere; subnormals, both zeros and the ends of the
# range among them.
numbers = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 3.4028235e38, -3.4028235e38]),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
)


@pytest.fixture
def scores() -> WeightScores:
    generator = torch.Generator().manual_seed(0)
    shapes = {"w2": (4, 6), "w10": (3, 5), "w1": (2, 3, 4)}
    values = {}
    for name, shape in shapes.items():
        values[name] = torch.randint(-2, 3, shape, generator=generator).float()
    return WeightScores(values, SOURCE)


def by_sorting(
    scores: dict[str, torch.Tensor], k: int, excluded: dict[str, torch.Tensor]
) -> dict[str, list[int]]:
    """The definition: a stable sort of all that may be chosen."""
    entries = [
        (name, i, v)
        for name, value in scores.items()
        for i, v in enumerate(value.flatten().tolist())
    ]
    free = [e for e in entries if e[1] not in excluded.get(e[0], torch.empty(0)).tolist()]
    chosen = sorted(free, key=lambda entry: -entry[2])[:k]
    return {name: sorted(i for n, i, _ in chosen if n == name) for name in scores}


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(numbers, min_size=1, max_size=12), min_size=1, max_size=4), st.data())
def test_largest_equals_sorting(values, data):
    scores = {f"w{i}": torch.tensor(v, dtype=torch.float32) for i, v in enumerate(values)}
    excluded = {
        name: torch.tensor(
            sorted(data.draw(st.sets(st.integers(0, len(value) - 1)))), dtype=torch.int64
        )
        for name, value in scores.items()
    }
    n_left = sum(len(value) - len(excluded[name]) for name, value in scores.items())
    k, chunk = data.draw(st.integers(0, n_left)), data.draw(st.sampled_from([1, 2, 5, 100]))
    chosen = largest(scores, k, excluded, chunk=chunk)
    assert {name: index.tolist() for name, index in chosen.items()} == by_sorting(
        scores, k, excluded
    )
    with pytest.raises(ValueError, match=rf"leaves fewer \({n_left}\)"):
        largest(scores, n_left + 1, excluded, chunk=chunk)


def test_ties_do_not_fill_the_memory():
    """A million equal scores: what is held is a chunk and what is chosen."""
    held, add = [], _Best.add

    def watched(best, *arguments):
        add(best, *arguments)
        held.append(best.n_held)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Best, "add", watched)
        chosen = largest(
            {"a": torch.zeros(1000, 500), "b": torch.zeros(1000, 500)}, 500_007, {}, chunk=1000
        )
        assert [chosen["a"].tolist(), chosen["b"].tolist()] == [
            list(range(500_000)),
            list(range(7)),
        ]
        assert max(held) <= 2 * 500_007
        held.clear()
        assert largest({"a": torch.zeros(1000, 500)}, 3, {}, chunk=1000)["a"].tolist() == [0, 1, 2]
        assert max(held) <= 6
        held.clear()
        growing = torch.linspace(
            1, 1.005, 100_000
        )  # one bin, and every number better than all before
        assert (
            largest({"a": growing}, 5, {}, chunk=100)["a"].tolist()
            == growing.sort(stable=True, descending=True).indices[:5].sort().values.tolist()
        )
        assert max(held) <= 110


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_several_fractions_at_once_are_the_same_masks(data):
    shapes = {"a": (3, 5), "b": (2, 2, 4), "c": (1, 7)}
    values = {}
    for name, shape in shapes.items():
        size = math.prod(shape)
        drawn = data.draw(st.lists(numbers, min_size=size, max_size=size))
        values[name] = torch.tensor(drawn).view(shape)
    scores = WeightScores(values, SOURCE)
    within = data.draw(st.sampled_from(["weight", "model", "row"]))
    fractions = data.draw(
        st.lists(st.sampled_from([0, 0.01, 0.1, 0.25, 0.5, 0.7]), min_size=1, max_size=4)
    )
    exclude = top_fraction(scores, data.draw(st.sampled_from([0, 0.1])), within="row")
    for mask, fraction in zip(
        top_fraction(scores, fractions, within=within, exclude=exclude), fractions, strict=True
    ):
        expected = top_fraction(scores, fraction, within=within, exclude=exclude)
        assert (mask.source, mask.shapes) == (expected.source, expected.shapes)
        assert {n: i.tolist() for n, i in mask.removed.items()} == {
            n: i.tolist() for n, i in expected.removed.items()
        }


def test_several_fractions_are_refused(scores):
    for fractions, reason in (
        ([], "no fractions"),
        ([0.1, -0.1], "fraction=-0.1"),
        ([0.1, 1.5], "fraction=1.5"),
    ):
        with pytest.raises(ValueError, match=reason):
            top_fraction(scores, fractions)


@pytest.mark.parametrize("chunk", [1, 7, 14, 1000])
def test_rows_do_not_depend_on_the_chunk(chunk):
    generator = torch.Generator().manual_seed(0)
    value = torch.randint(-2, 3, (9, 7), generator=generator).float()
    excluded = torch.tensor([0, 8, 9, 62])
    chosen = largest_of_rows(value, 3, excluded, chunk=chunk)
    for row in range(9):
        inside = torch.arange(7 * row, 7 * row + 7)
        expected = by_sorting(
            {"w": value[row]}, 3, {"w": excluded[torch.isin(excluded, inside)] - 7 * row}
        )["w"]
        assert (chosen[torch.isin(chosen, inside)] - 7 * row).tolist() == expected


def test_large_random_scores_against_numpy():
    """A million normal numbers of three scales, chosen across tensors.

    The threshold lies inside a bin of the histogram.
    """
    generator = torch.Generator().manual_seed(0)
    scores = {
        name: scale * torch.randn(1000, 333, generator=generator)
        for name, scale in zip("abc", (1, 0.5, 2), strict=True)
    }
    chosen = largest(scores, 12345, {})
    everything = np.concatenate([value.flatten().numpy() for value in scores.values()])
    expected = np.sort(np.argsort(-everything, kind="stable")[:12345])
    starts = dict(zip("abc", (0, 333_000, 666_000), strict=True))
    assert np.array_equal(
        np.concatenate([index.numpy() + starts[name] for name, index in chosen.items()]), expected
    )


class Watched(Mapping):
    """Scores in a file: how often each was read."""

    def __init__(self, saved: Mapping) -> None:
        self.saved, self.reads = saved, dict.fromkeys(saved, 0)

    def __getitem__(self, name):
        self.reads[name] += 1
        return self.saved[name]

    def __iter__(self):
        return iter(self.saved)

    def __len__(self):
        return len(self.saved)


@pytest.mark.parametrize(("within", "n_reads"), [("model", 2), ("weight", 1), ("row", 1)])
@pytest.mark.usefixtures("unchecked")  # a check of types would read the file itself
def test_a_selection_reads_a_file_twice_at_most(tmp_path, monkeypatch, scores, within, n_reads):
    scores.save(tmp_path, shard_bytes=1)
    loaded = WeightScores.load(tmp_path)
    watched = Watched(loaded.values)
    object.__setattr__(loaded, "values", watched)
    monkeypatch.setattr(WeightScores, "shapes", scores.shapes)
    top_fraction(loaded, 0.3, within=within)
    assert watched.reads == dict.fromkeys(scores.shapes, n_reads)
