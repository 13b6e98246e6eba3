"""Nodes by importance and by what a mask takes.

Would catch: weights counted twice or under the wrong head, an importance in which opposite effects
of one position do not cancel or those of two do, a rank correlation of other nodes than the same.
"""

import pytest
import torch
from support.nodes import importance_rows, node_share_rows, rank_correlations

import harmcircuits as hc
from harmcircuits.measurements import Measurement, Rows, student_widening

PLACES = [
    {"layer": layer, "node": node} for layer in (0, 1) for node in ("head 0", "head 1", "mlp")
]


def ranking(values: list[float]) -> Rows:
    pairs = zip(PLACES, values, strict=True)
    return Rows(Measurement.exact("node_importance", place, value) for place, value in pairs)


def test_weights_taken_add_up_and_belong_to_their_head(llama):
    sites = hc.weight_sites(llama)
    mask = hc.top_fraction(hc.random_scores(llama), 0.2)
    rows = node_share_rows(mask, sites, 4, {})
    assert sum(row.mean for row in rows.where("mask_weights")) == pytest.approx(mask.n_removed)
    # Two key heads of 6 rows, each shared by two query heads.
    shape = mask.shapes["blocks.1.attn.k.weight"]
    one_row = {"blocks.1.attn.k.weight": torch.arange(6 * shape[1], 7 * shape[1])}
    second = hc.WeightMask(one_row, mask.shapes, mask.source)
    taken = {}
    for row in node_share_rows(second, sites, 4, {}).where("mask_weights"):
        if row.mean:
            taken[row.labels["layer"], row.labels["node"]] = row.mean
    assert taken == {(1, "head 2"): 12.0, (1, "head 3"): 12.0}
    whole = hc.top_fraction(hc.random_scores(llama), 1.0)
    assert {row.mean for row in node_share_rows(whole, sites, 4, {}).where("mask_percent")} == {
        100.0
    }


def test_importance_sums_positions_and_averages_pairs():
    effects = torch.zeros(2, 1, 2, 3)
    effects[:, 0, 0, 0] = torch.tensor([1.0, -1.0])  # cancels: one position, two pairs
    effects[:, 0, 1, 1], effects[:, 0, 1, 2] = 2.0, -3.0  # does not: two positions
    head, mlp = importance_rows(effects, {})
    assert (head.labels["node"], head.mean) == ("head 0", 0)
    assert (mlp.labels["node"], mlp.mean, mlp.low, mlp.high) == ("mlp", 5, 5, 5)
    assert head.low == 0, "a sum of magnitudes"
    assert head.high == student_widening(2), "a resample of one pair twice"


def test_rank_correlation_has_its_closed_form_and_matches_nodes_by_name():
    first = ranking([1, 2, 3, 4, 5, 6])
    tens = ranking([10, 20, 30, 40, 50, 60])
    # 1 - 6 sum d^2 / (n (n^2 - 1)): the first two swapped; among the four heads as well.
    swapped = ranking([2, 1, 3, 4, 5, 6])
    shuffled = Rows(reversed(list(tens)))
    rankings = {"first": first, "shuffled": shuffled, "swapped": swapped}
    rows = rank_correlations(rankings, {})
    same = rows.one(ranking="first", against="shuffled", among="all nodes")
    assert (same.mean, same.low, same.high) == pytest.approx((1, 1, 1))
    other = rows.where(ranking="first", against="swapped")
    assert other.one(among="all nodes").mean == pytest.approx(1 - 6 * 2 / (6 * 35))
    assert other.one(among="heads").mean == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert not rank_correlations({"first": first, "constant": ranking([5] * 6)}, {})
