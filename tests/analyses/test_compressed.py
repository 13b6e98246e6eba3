"""F4 judges by its rule on made-up rows, and its job compares rungs that are asked alike.

Would catch: a ladder borne out without a smaller circuit on every aligned rung, rungs of different
ability or with saturated losses compared, a control that is ignored, refusal protected on aligned
rungs alone, an unaligned rung taken for aligned.
"""

import dataclasses

import pytest
from helpers import analysis, small_model

from harmcircuits.measurements import Measurement, Rows

compressed = analysis("compressed")


def a_ladder(ladder="shipped", *, ratio=0.8, harm=1.0, nll=0.3, gap=0.2, pairs=("sft", "dpo")):
    """The upper end of each pair's ratio, ability and loss of `base`, the lower end of gaps."""
    rows = []
    for model in ("base", "sft", "dpo"):
        rung = {"target": "harmful", "model": model}
        is_base = model == "base"
        able = {**rung, "share": 0.0, "split": "heldout"}
        rows.append(Measurement.exact("harm_valid_rate", able, harm if is_base else 1.0))
        rows.append(Measurement.exact("calibration_nll", rung, nll if is_base else 0.3))
        rows.append(Measurement("w50", {**rung, "censored": "no"}, 0.004, 0.003, 0.006, 32))
        lowest = 0.2 if is_base else gap
        rows.append(Measurement("random_gap", rung, lowest + 0.1, lowest, lowest + 0.2, 32))
    for first in pairs:
        pair = {"first": first, "second": "base", "target": "harmful"}
        rows.append(Measurement("w50_ratio", pair, ratio - 0.1, 0.1, ratio, 32))
    benign = {"target": "benign", "model": "sft"}
    rows.append(Measurement("w50", {**benign, "censored": "yes"}, 0.005, 0.005, 0.005, 32))
    rows.append(Measurement.exact("calibration_nll", benign, 0.001))
    return Rows(row.labelled(ladder=ladder, seed=0) for row in rows)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, "holds"),
        ({"ratio": 1.0}, "does not hold here"),
        ({"harm": 0.95}, "holds"),
        ({"harm": 0.94}, "does not hold here"),
        ({"nll": 0.019}, "does not hold here"),
        ({"gap": 0.0}, "does not hold here"),
        ({"pairs": ()}, "does not hold here"),
    ],
)
def test_a_ladder_by_the_rule(change, expected):
    rows = a_ladder(**change)
    assert compressed.claim.result(rows).outcome == expected
    both = compressed.claim.result(a_ladder("another") + rows)
    assert both.outcome == ("holds" if expected == "holds" else "holds in part")
    assert list(both.cases["ladder"]) == ["another", "shipped"]


def test_the_key_numbers_say_what_is_unreached():
    numbers = compressed.key_numbers(a_ladder())
    assert numbers["w50 of harmful, base"] == "0.40% [0.30%, 0.60%]"
    assert numbers["w50 of benign, sft"].startswith("over 0.50%")
    assert numbers["pairs in which the aligned rung needs fewer weights"] == "2 of 2"


@pytest.mark.slow
def test_rungs_are_compared_alike(monkeypatch):
    protected = []

    def largest(model, target, *, size, protect, **options):
        protected.append((target, sorted(protect)))
        magnitudes = compressed.hc.magnitude_scores(model.bridge)
        return [compressed.hc.top_fraction(magnitudes, share) for share in size]

    monkeypatch.setattr(compressed.hc.Model, "find_circuit", largest)
    models = {name: small_model(name, every=128) for name in ("helpful", "sft")}
    asked = ("harmful", "benign", "knowledge", "refusal")
    for name, model in models.items():
        few = {name: model.behaviours[name] for name in asked}
        models[name] = dataclasses.replace(model, behaviours=few)
    rows = compressed.curves_of(models, 0, sizes=(0.05,), steps=1)
    of_harm, of_benign = ("harmful", ["benign", "knowledge"]), ("benign", ["harmful", "knowledge"])
    assert protected == [of_harm, of_harm, of_benign, of_benign], "refusal on no rung"
    pairs = [(row.labels["first"], row.labels["second"]) for row in rows.where("w50_ratio")]
    assert pairs == [("sft", "helpful")] * 2, "of harm and of benign answers"
    assert {row.labels["share"] for row in rows.where("harm_valid_rate")} == {0.0, 0.05}
    assert compressed.key_numbers(rows)

    later = compressed.curves_of({"sft": models["sft"]}, 1, sizes=(0.05,), steps=1)
    assert not later.where(target="benign"), "the contrast is for one seed"
