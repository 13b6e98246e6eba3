"""Would catch: a part that is lost, or one that lies in two places."""

import pytest
from support.parts import parts_of

from harmcircuits.circuits.location import counts_by
from harmcircuits.circuits.masks import top_fraction, union
from harmcircuits.hooks.attribution import random_scores
from harmcircuits.hooks.weights import weight_sites


@pytest.mark.parametrize("by", ["layer", "matrix", "unit"])
def test_the_parts_of_a_mask_are_disjoint_and_make_it_up(llama, by):
    sites = weight_sites(llama)
    mask = top_fraction(random_scores(llama), 0.02, within="model")
    parts = parts_of(mask, sites, by)
    assert sum(part.n_removed for part in parts.values()) == mask.n_removed
    assert union(list(parts.values())) == mask

    counts = {}
    for kind in ("head", "neuron") if by == "unit" else (by,):
        counts |= counts_by(mask, sites, kind)
    expected = {place: count.n_removed for place, count in counts.items() if count.n_removed}
    assert {place: part.n_removed for place, part in parts.items()} == expected
