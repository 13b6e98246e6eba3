"""Measurements against hand-computed values and closed forms; rows as a sequence and as files.

Would catch: answers about one item taken for independent, ties miscounted in the AUROC, a selection
that ignores a label, a figure rounded on its way through a file.
"""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score

from harmcircuits.measurements import (
    Measurement,
    Rows,
    auroc,
    interval_of_draws,
    step_of_means,
    wilson,
)

LABELS = {"model": "x"}
NONE = {"model": "dpo", "mask": "none", "split": "heldout"}
CIRCUIT = {"model": "dpo", "mask": "circuit", "seed": 3, "fraction": 1e-5}
ROWS = Rows(
    [
        Measurement("harm_valid_rate", NONE, 0.1 + 0.2, 0.25, 1 / 3, 256),
        Measurement("harm_valid_rate", CIRCUIT, 0.0, 0.0, 0.01, 256),
        Measurement.exact("weights_removed", {**CIRCUIT, "model": "sft"}, 42_000),
    ]
)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=80))
def test_rate_of_independent_examples_is_the_wilson_interval(hits):
    rate = Measurement.rate("harm", LABELS, hits, range(len(hits)))
    expected = binomtest(sum(hits), len(hits)).proportion_ci(method="wilsoncc")
    # The package's z has seven digits.
    assert (rate.low, rate.high) == pytest.approx((expected.low, expected.high), abs=1e-6)
    assert 0 <= rate.low <= rate.mean <= rate.high <= 1
    assert (rate.mean, rate.n) == (sum(hits) / len(hits), len(hits))


def test_a_rate_counts_groups_and_large_ones_decide_it():
    """Sizes 1, 1 and 4 count as 6^2 / (1 + 1 + 16) = 2 examples; equal ones as their number."""
    hits = [True] * 24 + [False] * 16
    grouped = Measurement.rate("harm", LABELS, hits, [number // 4 for number in range(40)])
    once = Measurement.rate("harm", LABELS, hits[::4], range(10))
    same = (grouped.low, grouped.high) == (once.low, once.high)
    assert same, "four copies of an answer are worth one"

    hits = [1, 0, 1, 1, 1, 1]
    unequal = Measurement.rate("harm", LABELS, hits, ["a", "b", "c", "c", "c", "c"])
    assert (unequal.low, unequal.high) == pytest.approx(wilson(5 / 6, 2, half_step=1 / 4))
    equal = Measurement.rate("harm", LABELS, hits, ["a", "a", "b", "b", "c", "c"])
    assert (equal.low, equal.high) == pytest.approx(wilson(5 / 6, 3, half_step=1 / 6))


def test_average_by_hand():
    """Two groups have four resamples, with means 1 (aa), 2 (ab, ba) and 5 (bb).

    Each tail of 2.5 % lies in aa or bb. Two groups widen the interval by Student's quantile for one
    degree of freedom over the normal's, 12.706205 / Z, and by sqrt(2).
    """
    values = torch.tensor([1.0, 1.0, 5.0, 1.0])
    two = Measurement.average("nll", LABELS, values, ["a", "a", "b", "a"])
    widening = 12.706205 / 1.959964 * 2**0.5
    expected = (2.0, 2 - 1 * widening, 2 + 3 * widening)
    assert (two.mean, two.low, two.high) == pytest.approx(expected)
    assert two.n == 4


def test_counts_end_half_a_step_further_out():
    """One answer of twelve where answers about an item differ, one item of three where they agree."""
    groups = ["a"] * 4 + ["b"] * 4 + ["c"] * 4
    for n_missed, step in ((7, 1 / 12), (4, 1 / 3)):
        values = torch.tensor([0.0] * n_missed + [1.0] * (12 - n_missed))
        plain = Measurement.average("x", LABELS, values, groups)
        counted = Measurement.average("x", LABELS, values, groups, are_counts=True)
        assert counted.low == pytest.approx(plain.low - step / 2)
        assert counted.high == pytest.approx(plain.high + step / 2)
    # Thirds of an item's samples, summed in another order.
    sums = np.array([0.1 + 0.2 + 0.3, 0.3 + 0.2 + 0.1, 0.9])
    assert step_of_means(sums, np.array([3, 3, 3])) == pytest.approx(0.3 / 9)


def test_draws_give_their_quantiles_and_hold_the_mean():
    """Of 0 to 40, the 2.5 % quantile is the second smallest, 1; of 97.5 %, 39."""
    draws = Measurement.from_draws("lift", LABELS, list(range(41)))
    assert (draws.mean, draws.low, draws.high, draws.n) == (20, 1, 39, 41)
    above = Measurement.from_draws("lift", LABELS, range(41), mean=50.0, n=3)
    assert (above.mean, above.low, above.high, above.n) == (50, 1, 50, 3)
    # Of 0 to 3 the interpolated quantiles lie at 0.075 and 2.925; inverted ones are draws.
    assert interval_of_draws(range(4), 1.5, method="inverted_cdf") == (0, 3)
    # Four groups widen by sqrt(4 / 3) and by Student's quantile over the normal's, 3.182446 / Z.
    few = Measurement.from_draws("nll", LABELS, range(41), n_groups=4)
    half = 19 * 3.182446 / 1.959964 * (4 / 3) ** 0.5
    assert (few.mean, few.low, few.high) == pytest.approx((20, 20 - half, 20 + half))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(-2, 2), min_size=1, max_size=12),
    st.lists(st.integers(-2, 2), min_size=1, max_size=12),
)
def test_auroc_equals_that_of_sklearn(positives, negatives):
    values = torch.tensor([*positives, *negatives]).float()
    is_positive = torch.tensor([True] * len(positives) + [False] * len(negatives))
    expected = roc_auc_score(is_positive, values)
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(len(values)))
    assert auroc(values[order], is_positive[order]) == pytest.approx(expected, abs=1e-12)


def test_auroc_resamples_groups():
    """Ten equal groups: whatever is drawn, the AUROC is the same. Unequal ones have a width."""
    is_positive = torch.tensor([False, True] * 20)
    groups = [number // 4 for number in range(40)]
    values = torch.tensor([1.0, 2.0, 3.0, 2.0] * 10)
    equal = Measurement.auroc("auroc", LABELS, values, is_positive, groups)
    assert (equal.low, equal.mean, equal.high, equal.n) == (0.5, 0.5, 0.5, 40)

    values = torch.randn(40, generator=torch.Generator().manual_seed(0)) + is_positive
    mixed = Measurement.auroc("auroc", LABELS, values, is_positive, groups)
    assert mixed.mean == auroc(values, is_positive)
    with pytest.raises(ZeroDivisionError):  # and no NaN
        auroc(values, torch.ones(40).bool())
    assert 0 < mixed.low < mixed.mean < mixed.high <= 1


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: Measurement.rate("harm", {}, [], []), "harm: 0 groups for 0 values"),
        (lambda: Measurement.average("harm", {}, torch.ones(3), ["a"]), "1 groups for 3 values"),
        (lambda: Measurement.average("loss", {}, torch.tensor([1, math.nan]), "ab"), "examples 1"),
        (lambda: ROWS.one("harm_valid_rate"), "2 rows"),
        (lambda: ROWS.one("harm_valid_rate"), "mask (none, circuit)"),
        (lambda: ROWS.one("harm_rate", mask="none"), "0 rows"),
        (lambda: ROWS.one("harm_rate", mask="none"), "harm_valid_rate, weights_removed"),
    ],
)
def test_what_cannot_be_measured_or_chosen_is_refused(call, word):
    with pytest.raises(ValueError) as error:
        call()
    assert word in str(error.value)


def test_a_figure_carries_its_interval():
    row = Measurement("nll", LABELS, -0.034, -0.061, 0.012)
    assert f"{row:.0%}" == "-3% [-6%, 1%]"
    assert f"{row:+.0%}" == "-3% [-6%, +1%]"
    exact = Measurement.exact("weights_removed", {}, 42_000)
    assert f"{exact:,.0f}" == "42,000", "an exact figure stands alone"
    assert f"{row}" == str(row) == "nll -0.034 [-0.061, 0.012]"
    assert repr(row) == "Measurement(nll -0.034 [-0.061, 0.012], model='x')"


def test_rows_are_a_sequence_that_is_never_changed():
    first, *rest = ROWS
    assert isinstance(ROWS[1:], Rows) and ROWS[1:] == rest
    rows = before = Rows([first])
    rows += rest
    assert rows == ROWS
    assert before == [first], "another name for the rows keeps what it held"


def test_selection_is_by_metric_and_all_labels():
    assert ROWS.where() == ROWS
    assert ROWS.where("harm_valid_rate", mask="circuit") == ROWS[1:2]
    assert ROWS.where(mask="circuit", seed=3) == ROWS[1:]
    assert ROWS.where(mask="circuit", seed="3") == [], "a label keeps its type"
    assert ROWS.where(absent="x") == []
    assert ROWS.one("harm_valid_rate", mask="circuit") == ROWS[1]
    assert (ROWS.largest(), ROWS.smallest()) == (ROWS[2], ROWS[1])


def test_pooling_averages_over_one_label_only():
    a, b = {"model": "a"}, {"model": "b", "seed": 0}
    rows = Rows(
        [
            Measurement("x", {**a, "seed": 0}, 0.25, 0.1, 0.3, 10),
            Measurement("x", {"seed": 1, **a}, 0.5, 0.35, 0.9, 10),
            Measurement("x", b, 0.75, 0.6, 0.8, 5),
            Measurement("y", a, 1.0, 1.0, 1.0),
        ]
    )
    assert rows.pool("seed") == [
        Measurement("x", a, 0.375, 0.1, 0.9, 20),
        Measurement("x", {"model": "b"}, 0.75, 0.6, 0.8, 5),
        Measurement("y", a, 1.0, 1.0, 1.0),
    ]


def test_rows_are_grouped_and_a_frame_has_a_line_a_row_and_is_pivoted():
    frame = ROWS.frame()
    assert list(frame["metric"]) == [row.metric for row in ROWS]
    assert frame["seed"].isna().tolist() == [True, False, False], "a label that a row lacks"

    rows = Rows()
    for step, seed in itertools.product((0, 1), (1, 0)):
        rows += [Measurement.exact("m", {"seed": seed, "step": step}, 10 * seed + step)]
    assert list(rows.by("seed", "step")) == [(1, 0), (0, 0), (1, 1), (0, 1)], "as they come"
    assert rows.by("seed") == {1: rows.where(seed=1), 0: rows.where(seed=0)}
    frame = rows.frame(index="seed", columns="step")
    assert (list(frame.index), list(frame.columns)) == ([1, 0], [0, 1]), "in the order of the rows"
    assert frame.to_numpy().tolist() == [[10, 11], [0, 1]]
    rows += [Measurement("other", {"seed": 1, "step": 0}, 0.5, 0.25, 0.75, 8)]
    frame = rows.frame(index=["seed", "step"], columns="metric", values="high")
    assert (frame.loc[(1, 1), "m"], frame.loc[(1, 0), "other"]) == (11, 0.75)


def test_rows_round_trip(tmp_path):
    path = tmp_path / "rows.jsonl"
    ROWS.append_to(path)
    assert Rows.read(path) == ROWS
    figures = {"mean": 0.1 + 0.2, "low": 0.25, "high": 1 / 3, "n": 256}
    first = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
    assert first == {"metric": "harm_valid_rate", "labels": NONE, **figures}

    Rows([Measurement("x", {}, math.nan, -math.inf, math.inf)]).save(path)
    (row,) = Rows.read(path)
    assert math.isnan(row.mean)
    assert (row.low, row.high) == (-math.inf, math.inf)

    for line in ('{"metric": "x"}', '{"color": "red"}', "[1, 2]"):
        path.write_text(line + "\n")
        with pytest.raises(ValueError, match=r"rows\.jsonl"):
            Rows.read(path)


def test_committed_rows_still_load():
    paths = list((Path(__file__).parents[1] / "analyses/rows").glob("*.jsonl"))
    assert paths
    for path in paths:
        rows = Rows.read(path)
        assert len(rows) > 40
        assert all(row.low <= row.mean <= row.high for row in rows)


def test_a_table_takes_no_silent_mean():
    rows = Rows(Measurement.exact("a", {"m": "x", "seed": seed}, 1.0) for seed in (0, 1))
    with pytest.raises(ValueError, match="pool"):
        rows.frame(index="m", columns="metric")
    assert rows.pool("seed").frame(index="m", columns="metric").loc["x", "a"] == 1.0


def test_one_group_of_several_has_no_interval():
    row = Measurement.average("x", {}, torch.tensor([1.0, 2.0]), ["a", "a"])
    assert (row.mean, row.low, row.high) == (1.5, -math.inf, math.inf)
    row = Measurement.average("x", {}, torch.tensor([1.0]), ["a"])
    assert (row.low, row.high) == (1.0, 1.0)
