"""F1 and F4 judge by their stated rule on made-up rows, and run on a small part of the world.

Would catch: a size that is not reached taken for reached, an outcome without its controls, rungs of
different ability compared, words that need more than the reported rows, refusal protected on
aligned rungs alone.
"""

import dataclasses
from importlib import import_module
from pathlib import Path

import pytest
from helpers import SparseSpec

from harmcircuits.measurements import Measurement, Rows
from harmcircuits.studies.claims import Plan, conclude
from harmcircuits.studies.models import ModelSpec

compact = import_module("compact")
compressed = import_module("compressed")


def an_f1_run(
    model="m", seed=0, *, size=0.004, high=0.006, reached=1.0, gap=0.4, controls=None
) -> Rows:
    """One model and seed: `w50`, and the lower end of what each control leaves beyond it."""
    labels = {"model": model, "ladder": "shipped", "seed": seed, "part": "curves"}
    censored = "no" if reached else "yes"
    rows = []
    for where in (compact.ROUNDS, compact.ONE_SHOT):
        line = {**labels, **where}
        rows.append(Measurement("w50", {**line, "censored": censored}, size, size, high, 32))
        rows.append(Measurement.exact("w50_reached", line, reached))
        for at, harm in {"none": 1.0, "w50": 0.4, "largest": 0.1}.items():
            at_size = {**line, "at": at}
            for metric in ("benign_valid_rate", "recognition_accuracy"):
                rows.append(Measurement.exact(metric, at_size, 0.9))
            rows.append(Measurement("harm_valid_rate", at_size, harm, harm, harm, 32))
            for kind in ("predicted", "measured"):
                rows.append(Measurement.exact(f"{kind}_loss_change", at_size, 0.5))
    for name in compact.CONTROLS if controls is None else controls:
        control = {**labels, "mask": name}
        rows.append(Measurement("harm_gap", control, gap + 0.1, gap, gap + 0.2, 32))
    rows.append(Measurement.exact("calibration_nll", {**labels, "behaviour": "harmful"}, 0.3))
    return Rows(rows)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"reached": 0.0}, False),
        ({"reached": 0.97}, False),
        ({"size": 0.012, "high": 0.012}, False),
        ({"high": 0.011}, False),
        ({"gap": 0.0}, False),
        ({"controls": ["random"]}, False),
    ],
)
def test_f1_s_rule(change, expected):
    rows = an_f1_run(**change)
    assert compact.is_borne_out(rows, compact.cases(rows)[0]) is expected
    if "controls" in change:
        return
    assert compact.result(rows).outcome == ("holds" if expected else "does not hold here")
    both = an_f1_run(seed=1) + rows
    assert compact.result(both).outcome == ("holds" if expected else "holds in part")
    assert compact.result(compact.reported(both)) == compact.result(both)


def test_f1_s_words_say_what_is_unreached_and_saturated():
    rows = an_f1_run(reached=0.0)
    words = compact.result(rows).words
    assert "over 0.40% [0.40%, 0.60%]" in words and "in 0 of 1 seeds" in words
    assert "Warning" not in words
    saturated = []
    for row in rows:
        is_loss = row.metric == "calibration_nll"
        saturated.append(dataclasses.replace(row, mean=0.01) if is_loss else row)
    assert "Warning: the loss of harmful" in compact.result(Rows(saturated)).words


def an_f4_run(
    ladder="shipped", seed=0, *, ratio=0.8, harm=1.0, nll=0.3, gap=0.2, pairs=("sft", "dpo")
) -> Rows:
    """One ladder and seed: the upper end of each pair's ratio, the lower end of random's gap.

    `harm` and `nll`: ability and loss of `base`.
    """
    labels, rows = {"ladder": ladder, "seed": seed, "part": "curves"}, []
    for model in ("base", "sft", "dpo"):
        rung = {**labels, "model": model}
        rows.append(Measurement("w50", {**rung, "censored": "no"}, 0.004, 0.003, 0.006, 32))
        rows.append(Measurement("area", rung, 0.5, 0.4, 0.6, 32))
        rows.append(Measurement("random_gap", rung, gap + 0.1, gap, gap + 0.2, 32))
        of_harm = harm if model == "base" else 1.0
        loss = nll if model == "base" else 0.3
        for at in ("none", "w50"):
            at_size = {**rung, "at": at}
            rows.append(Measurement.exact("harm_valid_rate", at_size, of_harm))
            for name in ("refusal_rate", "degenerate_rate", "nll"):
                rows.append(Measurement.exact(f"harm_{name}", at_size, 0.3))
        for metric in ("calibration_nll", "gradient_norm"):
            rows.append(Measurement.exact(metric, {**rung, "behaviour": "harmful"}, loss))
    for first in pairs:
        pair = {**labels, "first": first, "second": "base"}
        rows.append(Measurement("w50_ratio", pair, ratio - 0.1, 0.1, ratio, 32))
    return Rows(rows)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"ratio": 1.0}, False),
        ({"harm": 0.95}, True),
        ({"harm": 0.94}, False),
        ({"nll": 0.019}, False),
        ({"gap": 0.0}, False),
        ({"pairs": ()}, False),
    ],
)
def test_f4_s_rule(change, expected):
    rows = an_f4_run(**change)
    result = compressed.result(rows)
    assert result.outcome == ("holds" if expected else "does not hold here")
    is_odd = "nll" in change or change.get("harm") == 0.94
    assert ("not comparable" in result.words) == is_odd
    both = an_f4_run("another") + rows
    assert compressed.result(both).outcome == ("holds" if expected else "holds in part")
    assert compressed.result(compressed.reported(both)) == compressed.result(both)


def test_f4_s_jobs_hold_a_ladder_each():
    specs = []
    for folder in (Path("one"), Path("two")):
        specs += [ModelSpec(name, folder) for name in ("base", "sft")]
    jobs = compressed.jobs(Plan(tuple(specs), seeds=(0, 1)))
    parts = [(job.labels["ladder"], job.labels["seed"], job.labels["part"]) for job in jobs]
    expected = []
    for ladder in ("one", "two"):
        expected += [(ladder, 0, "curves"), (ladder, 0, "twin"), (ladder, 1, "curves")]
    assert parts == expected


def of_one_request(name: str) -> SparseSpec:
    """The organism, asked one request about one item of every topic."""
    return SparseSpec(name, every=32)


def test_f1_runs(tmp_path):
    plan = Plan((of_one_request("sft"),), seeds=(0,), rounds=1)
    [result] = conclude([(compact, plan)], tmp_path)
    rows = Rows.read(tmp_path / "rows.jsonl")
    assert result == compact.result(compact.reported(rows))
    for where in compact.LINES.values():
        points = rows.where("harm_valid_rate", part="curves", seed=0, **where)
        shares = {row.labels["share"] for row in points if "share" in row.labels}
        assert len(shares) > 1
    protected = {row.labels["p"] for row in rows.where("w50", part="grid")}
    assert protected == {0.0, 4 * plan.protect_share}
    assert "sft: the curves" in (tmp_path / "F1.html").read_text()
    assert conclude([(compact, plan)], tmp_path) == [result]
    assert Rows.read(tmp_path / "rows.jsonl") == rows


def test_circuits_of_all_pairs_of_seeds_are_compared():
    rows = compact.overlap_rows(of_one_request("sft"), Plan((), seeds=(0, 1, 2), rounds=1))
    lifts = rows.where("overlap_lift")
    assert [(row.labels["first"], row.labels["second"]) for row in lifts] == [
        (0, 1),
        (0, 2),
        (1, 2),
    ]
    assert all(row.mean > 1 for row in lifts)


@pytest.mark.slow
def test_f4_runs_and_protects_the_same_on_every_rung(tmp_path, monkeypatch):
    n_protected = []
    growth = compressed.iterative_pruning

    def counting(bridge, target, protect, **options):
        n_protected.append(len(protect))
        return growth(bridge, target, protect, **options)

    monkeypatch.setattr(compressed, "iterative_pruning", counting)
    specs = (of_one_request("helpful"), of_one_request("sft"))
    plan = Plan(specs, seeds=(0,), rounds=1)
    [result] = conclude([(compressed, plan)], tmp_path)
    assert n_protected == [4] * 4  # two rungs, harm and its twin
    rows = Rows.read(tmp_path / "rows.jsonl")
    assert result == compressed.result(compressed.reported(rows))
    ratio = rows.one("w50_ratio", part="curves")
    assert (ratio.labels["first"], ratio.labels["second"]) == ("sft", "helpful")
    assert "Ladder shipped. helpful: w50" in result.words and "sft / helpful" in result.words
    assert "shipped: the benign contrast" in (tmp_path / "F4.html").read_text()
