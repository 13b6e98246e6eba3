"""Measurements against hand-computed values and closed forms; rows and manifests as files.

Would catch: an interval that takes answers about one item for independent, a bootstrap over rows
where one over groups is meant, ties miscounted in the AUROC, an interval of another figure, a scale
or a sign lost in its text; rows overwritten instead of added, a figure rounded on its way through a
file, labels that lose their type, a selection that ignores a label or hides that it is empty, a
foreign or truncated file read as measurements, a manifest without settings or versions.
"""

import json
import math
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, mannwhitneyu

from harmcircuits.measurements import (
    LIBRARIES,
    Manifest,
    Measurement,
    Rows,
    auroc,
    resumed,
    step_of_means,
    wilson,
)

LABELS = {"model": "x"}

# Rates


def test_rate_by_hand():
    rate = Measurement.rate("harm", LABELS, [True] * 8 + [False] * 2, range(10))
    assert (rate.metric, rate.labels, rate.mean, rate.n) == ("harm", LABELS, 0.8, 10)
    # z = 1.959964, and z^2 = 3.841459 over 10 is 0.384146. Half a step below 0.8 lies 0.75: centre
    # (0.75 + z^2/20) / 1.384146 = 0.680617, half-width z / 1.384146 sqrt(0.01875 + z^2/400) =
    # 0.238435. Above it 0.85: 0.752864 and 0.211710. These figures have six digits.
    assert (rate.low, rate.high) == pytest.approx((0.442181, 0.964573), abs=2e-6)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=80))
def test_rate_of_independent_examples_is_the_wilson_interval(hits):
    rate = Measurement.rate("harm", LABELS, hits, range(len(hits)))
    expected = binomtest(sum(hits), len(hits)).proportion_ci(method="wilsoncc")
    # The package's z has seven digits.
    assert (rate.low, rate.high) == pytest.approx((expected.low, expected.high), abs=1e-6)


@pytest.mark.parametrize("n", [2, 7, 100, 256])
def test_a_rate_stays_between_zero_and_one(n):
    """Rounding included: a figure that starts below zero is drawn outside its axes."""
    for hit in (False, True):
        rate = Measurement.rate("harm", LABELS, [hit] * n, range(n))
        assert 0 <= rate.low <= rate.mean <= rate.high <= 1


def test_groups_widen_the_interval():
    hits = [True] * 24 + [False] * 16
    fours = [number // 4 for number in range(40)]
    alone = Measurement.rate("harm", LABELS, hits, range(40))
    grouped = Measurement.rate("harm", LABELS, hits, fours)
    assert alone.mean == grouped.mean
    assert grouped.low < alone.low < alone.mean < alone.high < grouped.high
    assert (alone.n, grouped.n) == (40, 40)

    once = Measurement.rate("harm", LABELS, hits[::4], range(10))
    same = (grouped.low, grouped.high) == (once.low, once.high)
    assert same, "four copies of an answer are worth one"


def test_large_groups_decide_a_rate():
    """Sizes 1, 1 and 4 count as 6^2 / (1 + 1 + 16) = 2 examples; equal ones as their number."""
    hits = [1, 0, 1, 1, 1, 1]
    unequal = Measurement.rate("harm", LABELS, hits, ["a", "b", "c", "c", "c", "c"])
    assert (unequal.low, unequal.high) == pytest.approx(wilson(5 / 6, 2, half_step=1 / 4))
    equal = Measurement.rate("harm", LABELS, hits, ["a", "a", "b", "b", "c", "c"])
    assert (equal.low, equal.high) == pytest.approx(wilson(5 / 6, 3, half_step=1 / 6))


# Averages


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

    single = Measurement.average("nll", LABELS, torch.tensor([1.0, 2.0]), ["a", "a"])
    figures = (single.low, single.mean, single.high)
    assert figures == (1.5, 1.5, 1.5), "one group has nothing to resample"


def test_average_weighs_examples_not_groups():
    """Of 100 groups, 50 hold nine zeros and 50 a single one.

    k of the latter in a resample give k / (k + 9 (100 - k)).
    """
    values = torch.tensor([0.0] * 450 + [1.0] * 50)
    groups = [number // 9 for number in range(450)] + list(range(50, 100))
    average = Measurement.average("nll", LABELS, values, groups)
    assert average.mean == 0.1
    # k is binomial(100, 1/2), whose 2.5 % quantiles are 40 and 60; a k off by one shifts the
    # figures by at most 4 %.
    assert (average.low, average.high) == pytest.approx((40 / 580, 60 / 420), rel=0.05)


def test_average_depends_on_seed_only_in_its_interval():
    values = torch.randn(30, generator=torch.Generator().manual_seed(0))

    def average(seed: int) -> Measurement:
        return Measurement.average("nll", LABELS, values, range(30), seed=seed)

    first, other = average(0), average(1)
    assert first == average(0)
    assert first.mean == other.mean
    assert first.mean == pytest.approx(values.mean().item(), abs=1e-6)  # float32 mean of 30
    assert (first.low, first.high) != (other.low, other.high)


def test_average_of_independent_values_has_the_normal_interval():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)).double()
    average = Measurement.average("nll", LABELS, values, range(400))
    half = 1.959964 * values.std().item() / 20
    # Student's is 0.4 % wider. A quantile of 2,000 resamples at 2.5 % is off by a standard error of
    # 0.06 sd, that is 3 % of the half-width.
    assert average.high - average.mean == pytest.approx(half, rel=0.12)
    assert average.mean - average.low == pytest.approx(half, rel=0.12)


def test_average_covers_the_truth_when_groups_share_their_value():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(40), 5)
    covered, covered_alone = 0, 0
    for trial in range(600):
        values = torch.from_numpy(rng.normal(size=40)[groups] + 0.2 * rng.normal(size=200))
        grouped = Measurement.average("nll", LABELS, values, groups.tolist(), seed=trial)
        alone = Measurement.average("nll", LABELS, values, range(200), seed=trial)
        covered += grouped.low < 0 < grouped.high
        covered_alone += alone.low < 0 < alone.high
    # 95 % nominal; 600 trials have a standard error of 1 %.
    assert 0.92 < covered / 600 < 0.98
    assert covered_alone / 600 < 0.75, "the comparison must be able to fail: rows are dependent"


def test_exact_figures_have_no_interval():
    exact = Measurement.exact("weights_removed", LABELS, 7)
    assert (exact.low, exact.mean, exact.high, exact.n) == (7, 7, 7, 1)
    assert exact.is_exact
    assert not Measurement("x", {}, 7, 7, 8).is_exact
    assert not Measurement("x", {}, 7, 6, 7).is_exact


def test_draws_give_their_quantiles_and_hold_the_mean():
    """Of 0 to 40, the 2.5 % quantile is the second smallest, 1; of 97.5 %, 39."""
    draws = Measurement.of_draws("lift", LABELS, list(range(41)))
    assert (draws.mean, draws.low, draws.high, draws.n) == (20, 1, 39, 41)

    above = Measurement.of_draws("lift", LABELS, range(41), mean=50.0, n=3)
    assert (above.mean, above.low, above.high, above.n) == (50, 1, 50, 3)
    below = Measurement.of_draws("lift", LABELS, range(41), mean=-1.0)
    assert (below.mean, below.low, below.high) == (-1, -1, 39)

    # Of 0 to 3 the interpolated quantiles lie at 0.075 and 2.925; inverted ones are draws.
    interpolated = Measurement.of_draws("w50", LABELS, range(4))
    assert (interpolated.low, interpolated.high) == pytest.approx((0.075, 2.925))
    measured = Measurement.of_draws("w50", LABELS, range(4), method="inverted_cdf")
    assert (measured.low, measured.high) == (0, 3)


def test_few_groups_widen_the_interval_of_draws():
    """Of four groups by sqrt(4 / 3) and by Student's quantile over the normal's, 3.182446 / Z."""
    draws = Measurement.of_draws("nll", LABELS, range(41), n_groups=4)
    half = 19 * 3.182446 / 1.959964 * (4 / 3) ** 0.5
    assert (draws.mean, draws.low, draws.high) == pytest.approx((20, 20 - half, 20 + half))
    assert draws.n == 41

    within = Measurement.of_draws("x_rate", LABELS, range(41), n_groups=4, bounds=(0, 40))
    assert (within.low, within.high) == (0, 40)
    alone = Measurement.of_draws("nll", LABELS, [3.0], n_groups=1)
    assert (alone.low, alone.mean, alone.high) == (3, 3, 3)


def test_newcombe_s_own_example():
    """56/70 - 48/80 by method 11: 0.0428 to 0.3422 (Newcombe 1998, table II)."""
    first = Measurement.rate("x", {}, [1] * 56 + [0] * 14, range(70))
    second = Measurement.rate("x", {}, [1] * 48 + [0] * 32, range(80))
    difference = Measurement.difference("d", LABELS, first, second)
    figures = (difference.mean, difference.low, difference.high)
    assert figures == pytest.approx((0.2, 0.0428, 0.3422), abs=1e-4)
    assert (difference.metric, difference.labels, difference.n) == ("d", LABELS, 70)

    reverse = Measurement.difference("d", LABELS, second, first)
    assert (reverse.low, reverse.high) == pytest.approx((-difference.high, -difference.low))


# Steps


def test_counts_end_half_a_step_further_out():
    """One answer of twelve where answers about an item differ, one item of three where they agree."""
    groups = ["a"] * 4 + ["b"] * 4 + ["c"] * 4
    differ = torch.tensor([0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1]).double()
    agree = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1]).double()
    for values, step in ((differ, 1 / 12), (agree, 1 / 3), (0 * agree, 1 / 3)):
        plain = Measurement.average("x", LABELS, values, groups)
        counted = Measurement.average("x", LABELS, values, groups, are_counts=True)
        assert counted.low == pytest.approx(plain.low - step / 2)
        assert counted.high == pytest.approx(plain.high + step / 2)


def test_a_step_is_none_of_the_last_bit():
    """Thirds of an item's samples, summed in another order."""
    sums = np.array([0.1 + 0.2 + 0.3, 0.3 + 0.2 + 0.1, 0.9])
    assert sums[0] != sums[1]
    assert step_of_means(sums, np.array([3, 3, 3])) == pytest.approx(0.3 / 9)


# Ranking


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(-2, 2), min_size=1, max_size=12),
    st.lists(st.integers(-2, 2), min_size=1, max_size=12),
)
def test_auroc_equals_brute_force(positives, negatives):
    values = torch.tensor([*positives, *negatives]).float()
    is_positive = torch.tensor([True] * len(positives) + [False] * len(negatives))
    wins = sum((p > n) + (p == n) / 2 for p in positives for n in negatives)
    expected = wins / len(positives) / len(negatives)
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(len(values)))
    # Sums of halves are exact; only the last division rounds.
    assert auroc(values[order], is_positive[order]) == pytest.approx(expected, abs=1e-12)


def test_auroc_needs_both_kinds():
    for kind in (True, False):
        with pytest.raises(ValueError, match="at least one of each"):
            auroc(torch.arange(3.0), torch.tensor([kind] * 3))
    with pytest.raises(ValueError, match="0 positives among 0"):
        auroc(torch.empty(0), torch.empty(0, dtype=torch.bool))


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
    assert 0 < mixed.low < mixed.mean < mixed.high <= 1
    assert mixed == Measurement.auroc("auroc", LABELS, values, is_positive, groups)


def test_auroc_covers_the_truth_when_groups_share_a_shift():
    """Positives are N(1, 4 + 1) with the N(1, 4) shared by their group, negatives N(0, 1)."""
    truth = 0.5 * (1 + math.erf(1 / math.sqrt(6) / math.sqrt(2)))  # P(N(1, 5 + 1) > 0)
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(40), 8)
    pairs = [number // 2 for number in range(320)]
    is_positive = torch.tensor([False, True] * 160)
    covered, covered_alone = 0, 0
    for _ in range(60):
        shift = rng.normal(1, 2, size=40)[groups] * is_positive.numpy()
        values = torch.from_numpy(rng.normal(size=320) + shift)
        grouped = Measurement.auroc("auroc", LABELS, values, is_positive, groups.tolist())
        alone = Measurement.auroc("auroc", LABELS, values, is_positive, pairs)
        covered += grouped.low < truth < grouped.high
        covered_alone += alone.low < truth < alone.high
    # 95 % nominal, about 2 % less for 200 resamples of 40 groups; 60 trials have a standard error
    # of 3 %.
    assert covered / 60 > 0.84
    assert covered_alone / 60 < 0.8, "the comparison must be able to fail: pairs are dependent"


VALUES = torch.tensor([0.0, 1.0, 2.0])
IS_POSITIVE = torch.tensor([True, False, True])
MAKERS = {
    "rate": lambda n, groups: Measurement.rate("harm", LABELS, IS_POSITIVE[:n].tolist(), groups),
    "average": lambda n, groups: Measurement.average("harm", LABELS, VALUES[:n], groups),
    "auroc": lambda n, groups: Measurement.auroc(
        "harm", LABELS, VALUES[:n], IS_POSITIVE[:n], groups
    ),
}


@pytest.mark.parametrize("name", MAKERS)
def test_nothing_to_measure_is_refused(name):
    with pytest.raises(ValueError, match=r"harm.*expected at least one"):
        MAKERS[name](0, [])


@pytest.mark.parametrize("n_groups", [2, 4])
@pytest.mark.parametrize("name", MAKERS)
def test_every_value_needs_its_group(name, n_groups):
    with pytest.raises(ValueError, match=f"harm: {n_groups} groups for 3 values"):
        MAKERS[name](3, ["one"] * n_groups)


# Texts


def test_a_figure_carries_its_interval():
    row = Measurement("x", {}, -0.034, -0.061, 0.012)
    assert f"{row:.0%}" == "-3% [-6%, 1%]"
    assert f"{row:+.0%}" == "-3% [-6%, +1%]"
    assert f"{row:.2f}" == "-0.03 [-0.06, 0.01]"
    assert f"{Measurement('x', {}, 0.768, 0.634, 0.88):.0%}" == "77% [63%, 88%]"


def test_a_figure_without_an_interval_stands_alone():
    exact = Measurement.exact("weights_removed", {}, 42_000)
    assert f"{exact:,.0f}" == "42,000"
    assert f"{Measurement('x', {}, 1.0, 0.5, 1.0):.0%}" == "100% [50%, 100%]"


def test_without_a_format_the_metric_is_named():
    row = Measurement("nll", LABELS, 0.1 + 0.2, 0.25, 1 / 3)
    assert f"{row}" == str(row) == "nll 0.3 [0.25, 0.333]"
    assert repr(row) == "Measurement(nll 0.3 [0.25, 0.333], model='x')"
    assert repr(Measurement.exact("n", {}, 2)) == "Measurement(n 2)"


# Rows

NONE = {"model": "dpo", "mask": "none", "split": "heldout"}
CIRCUIT = {"model": "dpo", "mask": "circuit", "seed": 3, "fraction": 1e-5}
ROWS = Rows(
    [
        Measurement("harm_valid_rate", NONE, 0.1 + 0.2, 0.25, 1 / 3, 256),
        Measurement("harm_valid_rate", CIRCUIT, 0.0, 0.0, 0.01, 256),
        Measurement(
            "weights_removed",
            {"model": "sft", "mask": "circuit", "seed": 3},
            42_000,
            42_000,
            42_000,
        ),
    ]
)


def test_rows_are_a_sequence():
    first, second, third = ROWS
    assert len(ROWS) == 3
    assert ROWS[0] is first
    assert ROWS[-1] is third
    assert second in ROWS
    assert isinstance(ROWS[1:], Rows)
    assert ROWS[1:] == [second, third]
    assert ROWS[::2] == Rows([first, third])
    assert ROWS.metrics == ["harm_valid_rate", "weights_removed"]


def test_rows_equal_sequences_of_the_same_rows():
    assert list(ROWS) == ROWS
    assert tuple(ROWS) == ROWS
    assert ROWS[:2] != ROWS
    assert ROWS[:2] != ROWS[1:]
    assert Rows() == []
    assert ROWS != "rows"
    assert not Rows()
    with pytest.raises(TypeError, match="unhashable"):
        hash(ROWS)


def test_rows_are_added_and_never_changed():
    first, *rest = ROWS
    rows = Rows([first])
    before = rows
    rows += rest
    assert rows == ROWS
    assert before == [first], "another name for the rows keeps what it held"
    for more in (rest, Rows(rest), iter(rest)):
        together = before + more
        assert isinstance(together, Rows)
        assert together == ROWS
    in_front = rest + before
    assert isinstance(in_front, Rows)
    assert in_front == [*rest, first]
    with pytest.raises(TypeError, match="assignment"):
        rows[0] = first


def test_selection_is_by_metric_and_all_labels():
    assert ROWS.where() == ROWS
    assert ROWS.where("harm_valid_rate") == ROWS[:2]
    assert ROWS.where("harm_valid_rate", mask="circuit") == ROWS[1:2]
    assert ROWS.where(mask="circuit", seed=3) == ROWS[1:]
    assert Rows(iter(ROWS)).where(fraction=1e-5) == ROWS[1:2]
    assert isinstance(ROWS.where(mask="circuit"), Rows)
    assert ROWS.where(mask="circuit", seed="3") == [], "a label keeps its type"
    assert ROWS.where("harm_valid", mask="none") == []
    assert ROWS.where(absent="x") == []


def test_one_row_is_the_only_one():
    assert ROWS.one("weights_removed") == ROWS[2]
    assert ROWS.one("harm_valid_rate", mask="circuit") == ROWS[1]
    assert ROWS.one(mask="none") == ROWS[0]


@pytest.mark.parametrize(
    ("metric", "labels", "named"),
    [
        ("harm_valid_rate", {}, ["2 rows", "mask (none, circuit)"]),
        ("", {"seed": 3}, ["2 rows", "seed=3", "model (dpo, sft)"]),
        (
            "harm_rate",
            {"mask": "none"},
            ["no row", "harm_rate", "harm_valid_rate, weights_removed"],
        ),
        ("harm_valid_rate", {"mask": "twin"}, ["no row", "mask='twin'", "mask (none, circuit)"]),
        ("", {"seed": 4}, ["no row", "seed=4", "every metric", "model (dpo, sft)"]),
    ],
)
def test_other_than_one_row_says_what_there_is(metric, labels, named):
    with pytest.raises(ValueError) as error:
        ROWS.one(metric, **labels)
    for text in named:
        assert text in str(error.value)


def test_one_row_of_none_says_that_there_are_none():
    with pytest.raises(ValueError, match=r"no row has x; the metrics are none"):
        Rows().one("x")
    alone = Rows([Measurement.exact("x", {"mask": "none"}, 1)])
    with pytest.raises(ValueError, match=r"no row has x, mask='a'.*differ in nothing"):
        alone.one("x", mask="a")


def test_the_largest_and_the_smallest_are_by_mean_and_the_first_of_several():
    rows = Rows(
        Measurement.exact("m", {"of": name}, mean)
        for name, mean in zip("abcd", (1, 3, 3, 1), strict=True)
    )
    assert (rows.largest().labels["of"], rows.smallest().labels["of"]) == ("b", "a")
    for choose in (Rows().largest, Rows().smallest):
        with pytest.raises(ValueError, match="no rows"):
            choose()


def test_pooling_averages_over_one_label_only():
    rows = Rows(
        [
            Measurement("x", {"model": "a", "seed": 0}, 0.2, 0.1, 0.3, 10),
            Measurement("x", {"model": "a", "seed": 1}, 0.4, 0.35, 0.9, 10),
            Measurement("x", {"model": "b", "seed": 0}, 0.7, 0.6, 0.8, 5),
            Measurement("y", {"model": "a"}, 1.0, 1.0, 1.0),
        ]
    )
    pooled = rows.pool("seed")
    figures = [(row.metric, dict(row.labels), row.low, row.high, row.n) for row in pooled]
    assert figures == [
        ("x", {"model": "a"}, 0.1, 0.9, 20),
        ("x", {"model": "b"}, 0.6, 0.8, 5),
        ("y", {"model": "a"}, 1.0, 1.0, 1),
    ]
    assert [row.mean for row in pooled] == pytest.approx([0.3, 0.7, 1.0])
    assert isinstance(pooled, Rows)


def in_steps() -> Rows:
    rows = Rows()
    for step in (0, 1):
        for seed in (1, 0):
            for model in "ba":
                labels = {"model": model, "seed": seed, "step": step}
                rows += [Measurement.exact("m", labels, 10 * seed + step)]
    return rows


def test_rows_are_grouped_by_labels():
    groups = in_steps().by("model", "seed")
    assert list(groups) == [("b", 1), ("a", 1), ("b", 0), ("a", 0)], "as they come"
    for (model, seed), rows in groups.items():
        assert isinstance(rows, Rows)
        assert [row.labels["step"] for row in rows] == [0, 1]
        assert rows.where(model=model, seed=seed) == rows
    assert list(in_steps().by("seed")) == [1, 0], "values of one label stand alone"
    assert Rows().by("model") == {}


def test_rows_without_the_label_cannot_be_grouped():
    with pytest.raises(ValueError, match=r"weights_removed.*no label 'fraction'.*select"):
        ROWS[1:].by("model", "fraction")


def test_a_frame_has_a_line_a_row():
    frame = ROWS.frame()
    assert list(frame["metric"]) == [row.metric for row in ROWS]
    assert list(frame["mask"]) == ["none", "circuit", "circuit"]
    for name in ("mean", "low", "high", "n"):
        assert list(frame[name]) == [getattr(row, name) for row in ROWS]
    assert frame["seed"].isna().tolist() == [True, False, False], "a label that a row lacks"


def test_a_frame_is_pivoted():
    """Means are 10 * seed + step, whatever the model."""
    rows = in_steps().where(model="a")
    frame = rows.frame(index="seed", columns="step")
    assert (list(frame.index), list(frame.columns)) == ([1, 0], [0, 1]), "in the order of the rows"
    assert frame.to_numpy().tolist() == [[10, 11], [0, 1]]

    rows += [Measurement("other", {"seed": 1, "step": 0}, 0.5, 0.25, 0.75, 8)]
    frame = rows.frame(index=["seed", "step"], columns="metric", values="high")
    assert frame.loc[(1, 1), "m"] == 11
    assert frame.loc[(1, 0), "other"] == 0.75
    assert math.isnan(frame.loc[(0, 1), "other"])


def test_rows_show_themselves_in_one_line():
    assert repr(ROWS) == "Rows(3: harm_valid_rate, weights_removed)"
    assert repr(Rows()).startswith("Rows(0")
    many = Rows(Measurement.exact(f"metric_{number}", {}, 1) for number in range(40))
    assert len(repr(many)) <= 200
    assert "and 32 more" in repr(many)
    assert str(ROWS).splitlines() == [str(row) for row in ROWS]


# Files


def test_rows_round_trip(tmp_path):
    path = tmp_path / "rows.jsonl"
    ROWS[:1].append_to(path)
    Rows().append_to(path)
    ROWS[1:].append_to(path)
    assert Rows.read(path) == ROWS
    lines = path.read_text(encoding="utf-8").splitlines()
    first = json.loads(lines[0])
    assert first == {
        "metric": "harm_valid_rate",
        "labels": {"model": "dpo", "mask": "none", "split": "heldout"},
        "mean": 0.1 + 0.2,
        "low": 0.25,
        "high": 1 / 3,
        "n": 256,
    }
    assert len(lines) == 3


def test_what_is_not_a_number_survives(tmp_path):
    path = tmp_path / "rows.jsonl"
    Rows([Measurement("x", {}, math.nan, -math.inf, math.inf)]).append_to(path)
    (row,) = Rows.read(path)
    assert math.isnan(row.mean)
    assert (row.low, row.high, row.n) == (-math.inf, math.inf, 1)


@pytest.mark.parametrize(
    "text",
    [
        '{"metric": "x", "labels": {}, "mean": 1.0}\n',
        '{"metric": "x", "labels": {}, "mean": 1, "low": 1, "high": 1, "n": 1, "color": "red"}\n',
        "[1, 2]\n",
        "3\n",
        "hello\n",
    ],
    ids=["key missing", "key too many", "list", "number", "text"],
)
def test_foreign_files_are_refused(tmp_path, text):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"rows\.jsonl"):
        Rows.read(path)


def test_missing_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"rows\.jsonl: no such file"):
        Rows.read(tmp_path / "rows.jsonl")


def test_a_manifest_says_what_made_the_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/harmcircuits", "study", "--out", "x"])
    Manifest({"fraction": 1e-5, "seeds": [0, 1]}).save(tmp_path / "manifest.json")
    content = json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8"))
    assert content.keys() == {
        "settings",
        "command",
        "python",
        "machine",
        "versions",
    }
    assert content["settings"] == {"fraction": 1e-5, "seeds": [0, 1]}
    assert content["command"] == ["harmcircuits", "study", "--out", "x"]
    assert content["versions"] == {name: version(name) for name in LIBRARIES}
    assert content["python"].startswith("3.")
    assert content["machine"]


def test_a_run_is_resumed_under_the_same_settings_only(tmp_path):
    folder = tmp_path / "run"
    assert resumed(folder, {"size": 0.1}) == []
    ROWS.append_to(folder / "rows.jsonl")
    assert resumed(folder, {"size": 0.1}) == ROWS
    with pytest.raises(ValueError, match=r"run holds a run with.*0\.1.*0\.2.*another folder"):
        resumed(folder, {"size": 0.2})


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[1] / "analyses/rows").glob("*.jsonl"))
)
def test_committed_rows_still_load(path):
    rows = Rows.read(path)
    assert len(rows) > 40
    assert all(row.low <= row.mean <= row.high for row in rows)


def test_areas_are_those_of_the_mann_whitney_test():
    values = torch.randint(0, 9, (200,), generator=torch.Generator().manual_seed(0)).double()
    is_positive = torch.arange(200) % 3 == 0
    u = mannwhitneyu(values[is_positive], values[~is_positive]).statistic
    n_pairs = int(is_positive.sum()) * int((~is_positive).sum())
    assert auroc(values, is_positive) == pytest.approx(u / n_pairs, rel=1e-12)


@pytest.mark.parametrize("n", [1, 7, 60, 1966])
def test_a_wilson_interval_holds_its_share(n):
    """Of 0 and 1 too, where rounding would leave it outside by the last bit."""
    for hits in (0, n // 3, n):
        low, high = wilson(hits / n, n)
        assert low <= hits / n <= high


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_no_figure(value):
    values = torch.tensor([1.0, value, 2.0, value])
    message = (
        "loss: the values of examples 1, 3 are NaN or infinite, of 4; leave these examples out"
    )
    with pytest.raises(ValueError, match=message):
        Measurement.average("loss", {}, values, range(4))
    with pytest.raises(ValueError, match=message):
        Measurement.auroc("loss", {}, values, torch.tensor([True, False] * 2), range(4))
