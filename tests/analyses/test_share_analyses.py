"""F1 and F4 judge by their stated rule on made-up rows, and run end to end on a small part of the world.

Would catch: a size that is not reached taken for reached, a verdict without its controls, rungs of different ability
compared, words that need more than the kept rows, refusal protected on aligned rungs alone.
"""

import dataclasses
from importlib import import_module
from pathlib import Path

import pytest

from harmcircuits.measurements import Measurement, Rows
from harmcircuits.studies.claims import Analysis, Plan, conclude
from harmcircuits.studies.models import ModelSpec

compact: Analysis = import_module("compact")
compressed: Analysis = import_module("compressed")


def an_f1_run(model="m", seed=0, *, size=0.004, high=0.006, reached=1.0, gap=0.4, controls=None) -> Rows:
    """One model and seed: `w50` with its interval, and the lower end of what every control leaves beyond the circuit."""
    labels = {"model": model, "ladder": "shipped", "seed": seed, "part": "curves"}
    rows = []
    for where in (compact.ROUNDS, compact.ONE_SHOT):
        here = {**labels, **where}
        rows.append(Measurement("w50", {**here, "censored": "no" if reached else "yes"}, size, size, high, 32))
        rows.append(Measurement.exact("w50_reached", here, reached))
        for at, harm in {"none": 1.0, "w50": 0.4, "largest": 0.1}.items():
            rows += [Measurement.exact(metric, {**here, "at": at}, 0.9) for metric in ("benign_valid_rate", "recognition_accuracy")]
            rows.append(Measurement("harm_valid_rate", {**here, "at": at}, harm, harm, harm, 32))
            rows += [Measurement.exact(f"{kind}_loss_change", {**here, "at": at}, 0.5) for kind in ("predicted", "measured")]
    for name in compact.CONTROLS if controls is None else controls:
        rows.append(Measurement("harm_gap", {**labels, "mask": name}, gap + 0.1, gap, gap + 0.2, 32))
    return [*rows, Measurement.exact("calibration_nll", {**labels, "behaviour": "harmful"}, 0.3)]


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
    found = compact.finding(rows)
    assert found.verdict == ("holds" if expected else "does not hold here")
    both = [*an_f1_run(seed=1), *rows]
    assert compact.finding(both).verdict == ("holds" if expected else "holds in part")
    assert compact.finding(compact.needed(both)) == compact.finding(both)


def test_f1_s_words_say_what_is_unreached_and_saturated():
    rows = an_f1_run(reached=0.0)
    found = compact.finding(rows)
    assert "over 0.40%" in found.words and "in 0 of 1 seeds" in found.words
    assert "Warning" not in found.words
    saturated = [dataclasses.replace(r, mean=0.01) if r.metric == "calibration_nll" else r for r in rows]
    assert "Warning: the loss of harmful" in compact.finding(saturated).words


def an_f4_run(
    ladder="shipped", seed=0, *, ratio=0.8, harm=1.0, nll=0.3, gap=0.2, pairs=("sft", "dpo")
) -> Rows:
    """One ladder and seed: the upper end of each pair's ratio, `base`'s ability and loss, the lower end of random's gap."""
    labels, rows = {"ladder": ladder, "seed": seed, "part": "curves"}, []
    for model in ("base", "sft", "dpo"):
        here = {**labels, "model": model}
        rows.append(Measurement("w50", {**here, "censored": "no"}, 0.004, 0.003, 0.006, 32))
        rows += [
            Measurement("area", here, 0.5, 0.4, 0.6, 32),
            Measurement("random_gap", here, gap + 0.1, gap, gap + 0.2, 32),
        ]
        for at in ("none", "w50"):
            rows.append(Measurement.exact("harm_valid_rate", {**here, "at": at}, harm if model == "base" else 1.0))
            rows += [Measurement.exact(f"harm_{name}", {**here, "at": at}, 0.3) for name in ("refusal_rate", "degenerate_rate", "nll")]
        for metric in ("calibration_nll", "gradient_norm"):
            rows.append(Measurement.exact(metric, {**here, "behaviour": "harmful"}, nll if model == "base" else 0.3))
    for first in pairs:
        rows.append(Measurement("w50_ratio", {**labels, "first": first, "second": "base"}, ratio - 0.1, 0.1, ratio, 32))
    return rows


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
    found = compressed.finding(rows)
    assert found.verdict == ("holds" if expected else "does not hold here")
    assert ("not comparable" in found.words) == bool({"nll"} & set(change) or change.get("harm") == 0.94)
    both = [*an_f4_run("another"), *rows]
    assert compressed.finding(both).verdict == ("holds" if expected else "holds in part")
    assert compressed.finding(compressed.needed(both)) == compressed.finding(both)


def test_f4_s_jobs_hold_a_ladder_each():
    specs = [ModelSpec(name, folder) for folder in (Path("one"), Path("two")) for name in ("base", "sft")]
    jobs = compressed.jobs(Plan(tuple(specs), seeds=(0, 1)))
    assert [(job.labels["ladder"], job.labels["seed"], job.labels["part"]) for job in jobs] == [
        (ladder, *rest) for ladder in ("one", "two") for rest in ((0, "curves"), (0, "twin"), (1, "curves"))
    ]


@pytest.fixture
def sparse_world(monkeypatch):
    """Every 32nd request: one item of every topic, one request each."""
    whole = ModelSpec.open

    def sparse(spec: ModelSpec, *, seed: int = 0):
        model = whole(spec, seed=seed)
        behaviours = {
            name: dataclasses.replace(found, prompts=lambda split, found=found: found.prompts(split)[::32])
            for name, found in model.behaviours.items()
        }
        return dataclasses.replace(model, behaviours=behaviours)

    monkeypatch.setattr(ModelSpec, "open", sparse)


def test_f1_runs(sparse_world, tmp_path):
    plan = Plan((ModelSpec("sft"),), seeds=(0,), rounds=1)
    [found] = conclude([(compact, plan)], tmp_path)
    rows = Rows.read(tmp_path / "rows.jsonl")
    assert found == compact.finding(compact.needed(rows))
    for where in compact.LINES.values():
        shares = {
            row.labels["share"]
            for row in rows.where("harm_valid_rate", part="curves", seed=0, **where)
            if "share" in row.labels
        }
        assert len(shares) > 1
    assert {row.labels["p"] for row in rows.where("w50", part="grid")} == {0.0, 4 * plan.p}
    assert "sft: the curves" in (tmp_path / "F1.html").read_text()
    assert conclude([(compact, plan)], tmp_path) == [found] and Rows.read(tmp_path / "rows.jsonl") == rows


def test_circuits_of_all_pairs_of_seeds_are_compared(sparse_world):
    rows = compact.overlap_rows(ModelSpec("sft"), Plan((), seeds=(0, 1, 2), rounds=1))
    lifts = rows.where("overlap_lift")
    assert [(row.labels["first"], row.labels["second"]) for row in lifts] == [(0, 1), (0, 2), (1, 2)]
    assert all(row.mean > 1 for row in lifts)


@pytest.mark.slow
def test_f4_runs_and_protects_the_same_on_every_rung(sparse_world, tmp_path, monkeypatch):
    protected = []
    whole_path = compressed.hc.circuit_path

    def path(bridge, target, preserve, **options):
        protected.append(len(preserve))
        return whole_path(bridge, target, preserve, **options)

    monkeypatch.setattr(compressed.hc, "circuit_path", path)
    plan = Plan((ModelSpec("helpful"), ModelSpec("sft")), seeds=(0,), rounds=1)
    [found] = conclude([(compressed, plan)], tmp_path)
    assert protected == [4] * 4  # two rungs, harm and its twin
    rows = Rows.read(tmp_path / "rows.jsonl")
    assert found == compressed.finding(compressed.needed(rows))
    assert [(r.labels["first"], r.labels["second"]) for r in rows.where("w50_ratio", part="curves")] == [
        ("sft", "helpful")
    ]
    assert "Ladder shipped. helpful: w50" in found.words and "sft / helpful" in found.words
    assert "shipped: the benign contrast" in (tmp_path / "F4.html").read_text()
