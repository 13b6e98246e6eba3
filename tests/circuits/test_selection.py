"""Selection by histogram against sorting.

Would catch: zeros of two signs that do not tie, a tie across a chunk that is counted twice.
"""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harmcircuits.circuits.selection import CHUNK_SIZES, largest, largest_of_rows, positive

Tensors = dict[str, torch.Tensor]
# Special values often, so that ties are everywhere; subnormals, both zeros and the ends of the
# range among them.
numbers = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 3.4028235e38, -3.4028235e38]),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
)
tensors = st.lists(numbers, min_size=1, max_size=12)


def by_sorting(scores: Tensors, k: int, excluded: Tensors) -> dict[str, list[int]]:
    """The definition: a stable sort of all that may be chosen."""
    entries = []
    for name, value in scores.items():
        barred = excluded[name].tolist()
        for place, score in enumerate(value.flatten().tolist()):
            if place not in barred:
                entries.append((name, place, score))
    chosen: dict[str, list[int]] = {name: [] for name in scores}
    for name, place, _ in sorted(entries, key=lambda entry: -entry[2])[:k]:
        chosen[name].append(place)
    return {name: sorted(places) for name, places in chosen.items()}


@settings(max_examples=150, deadline=None)
@given(st.lists(tensors, min_size=1, max_size=4), st.data())
def test_largest_equals_sorting(values, data):
    scores, excluded = {}, {}
    n_left = 0
    for number, value in enumerate(values):
        name = f"w{number}"
        barred = data.draw(st.sets(st.integers(0, len(value) - 1)))
        scores[name] = torch.tensor(value, dtype=torch.float32)
        excluded[name] = torch.tensor(sorted(barred), dtype=torch.int64)
        n_left += len(value) - len(barred)
    k, chunk = data.draw(st.integers(0, n_left)), data.draw(st.sampled_from([1, 2, 5, 100]))
    with patch.dict(CHUNK_SIZES, cpu=chunk):
        chosen = largest(scores, k, excluded)
        with pytest.raises(ValueError, match=rf"leaves fewer \({n_left}\)"):
            largest(scores, n_left + 1, excluded)
    expected = by_sorting(scores, k, excluded)
    assert {name: index.tolist() for name, index in chosen.items()} == expected

    above = positive(scores, chosen)
    for name, index in chosen.items():
        assert above[name].tolist() == index[scores[name][index] > 0].tolist()


@pytest.mark.parametrize("chunk", [1, 7, 14, 1000])
def test_rows_do_not_depend_on_the_chunk(chunk):
    generator = torch.Generator().manual_seed(0)
    value = torch.randint(-2, 3, (9, 7), generator=generator).float()
    excluded = torch.tensor([0, 8, 9, 62])
    with patch.dict(CHUNK_SIZES, cpu=chunk):
        chosen = largest_of_rows(value, 3, excluded)
    for row in range(9):
        inside = torch.arange(7 * row, 7 * row + 7)
        barred = excluded[torch.isin(excluded, inside)] - 7 * row
        expected = by_sorting({"w": value[row]}, 3, {"w": barred})["w"]
        assert (chosen[torch.isin(chosen, inside)] - 7 * row).tolist() == expected


def test_the_first_of_a_million_ties_are_chosen():
    zeros = {"a": torch.zeros(1000, 500), "b": torch.zeros(1000, 500)}
    with patch.dict(CHUNK_SIZES, cpu=1000):
        chosen = largest(zeros, 500_007, {})
    assert torch.equal(chosen["a"], torch.arange(500_000))
    assert torch.equal(chosen["b"], torch.arange(7))
