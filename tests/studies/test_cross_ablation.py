"""Circuits side by side on a few requests of a shipped organism, and the behaviours they are found for.

Would catch: circuits of unequal size, protection that is ignored, resamples that differ between behaviours, rows that
contradict the masks, a twin about other things.
"""

from dataclasses import replace

import pytest
import torch
from helpers import small_model

from harmcircuits.circuits.location import location_rows
from harmcircuits.circuits.masks import top_fraction
from harmcircuits.circuits.overlap import overlap
from harmcircuits.hooks.attribution import removal_effect
from harmcircuits.hooks.objectives import completion_loss
from harmcircuits.organisms import detailed_behaviours
from harmcircuits.organisms.world import world
from harmcircuits.studies.cross_ablation import (
    ablation_rows,
    circuits,
    circuits_both_ways,
    content_rows,
    one_shot_circuits,
    overlap_place_rows,
    overlap_rows,
    token_rows,
)

Q = 0.01
NAMES = ("harmful", "benign", "recognition_margin")


@pytest.fixture(scope="module")
def model():
    small = small_model("sft")
    margin = detailed_behaviours()["recognition_margin"]
    margin = replace(margin, prompts=small.behaviours["recognition"].prompts)
    return replace(small, behaviours={**small.behaviours, "recognition_margin": margin})


@pytest.fixture(scope="module")
def calibrations(model):
    return {name: model.calibration(name) for name in NAMES}


@pytest.fixture(scope="module")
def found(model, calibrations):
    return circuits(model, calibrations, dict.fromkeys(NAMES, ()), q=Q, rounds=2)


def test_parts_of_behaviours_are_what_they_say():
    behaviours = detailed_behaviours()
    topics = world().topics
    assert len(behaviours) == 6 + 3 + 2 * len(topics)
    for topic in topics:
        harm, twin = (
            behaviours[f"{name}/{topic}"].prompts("heldout") for name in ("harmful", "benign")
        )
        assert {example.category for example in (*harm, *twin)} == {topic}
        assert [example.group for example in harm] == [example.group for example in twin], (
            "a twin is about the same items"
        )
    parts, kind = behaviours["parts"], behaviours["kind"]
    whole = set(behaviours["knowledge"].prompts("choice").examples)
    assert set(parts.prompts("choice").examples) | set(kind.prompts("choice").examples) == whole
    assert not set(parts.prompts("choice").examples) & set(kind.prompts("choice").examples)
    assert behaviours["recognition_margin"].objective is not completion_loss


def test_circuits_are_of_one_size_and_protection_is_kept(model, calibrations, found):
    assert {mask.n_removed for mask in found.values()} == {round(Q * found["harmful"].n_weights)}
    apart = circuits(model, calibrations, {"harmful": ("benign",)}, q=Q, p=0.1, rounds=1)["harmful"]
    free = circuits(model, calibrations, {"harmful": ()}, q=Q, rounds=1)["harmful"]
    assert overlap(apart, found["benign"]).n_shared < overlap(free, found["benign"]).n_shared


def test_circuits_both_ways_protect_nothing_and_all_others(model, calibrations, found):
    both = circuits_both_ways(model, calibrations, ["harmful"], q=Q, p=0.1, rounds=2)
    assert both["none"]["harmful"].removed.keys() == found["harmful"].removed.keys()
    expected = circuits(model, calibrations, {"harmful": ["benign"]}, q=Q, p=0.1, rounds=2)[
        "harmful"
    ]
    apart = both["others"]["harmful"]
    assert (apart & expected).n_removed == apart.n_removed, (
        "of the calibrated behaviours only benign answers are others"
    )


def test_one_shot_scores_are_those_of_all_examples(model, calibrations):
    found = one_shot_circuits(model, calibrations, ["harmful"], q=Q, n_resamples=2, seed=0)
    scores, masks = found["harmful"]
    whole = removal_effect(model.bridge, calibrations["harmful"].batches, completion_loss)
    for name, value in whole.values.items():
        torch.testing.assert_close(scores.values[name], value, rtol=1e-3, atol=1e-8)
    assert [mask.n_removed for mask in masks] == [round(Q * whole_size(whole))] * 2


def whole_size(scores) -> int:
    return sum(value.numel() for value in scores.values.values())


def test_overlap_rows_agree_with_the_masks(model, calibrations, found):
    one_shot = one_shot_circuits(model, calibrations, NAMES, q=Q, n_resamples=4, seed=0)
    rows = overlap_rows(one_shot, found, {"model": "x"}, q=Q, n_samples=5)
    expected = overlap(found["harmful"], found["benign"])
    row = rows.where("overlap_lift", first="harmful", second="benign", selection="rounds")[0]
    assert row.mean == pytest.approx(expected.lift)
    masks = {
        name: top_fraction(scores, Q, within="model") for name, (scores, _) in one_shot.items()
    }
    row = rows.where("overlap_jaccard", first="harmful", second="benign", selection="one shot")[0]
    assert row.mean == pytest.approx(overlap(masks["harmful"], masks["benign"]).jaccard)
    ceiling = rows.where("overlap_jaccard", first="harmful", second="harmful")[0]
    assert ceiling.low > row.mean, (
        "a circuit is nearer to itself on other data than to another circuit"
    )
    assert all(row.low <= row.mean <= row.high for row in rows)
    places = overlap_place_rows(model, found, "harmful", {})
    layers = places.where("overlap_lift", second="benign", by="layer")
    assert len(layers) == 4
    assert all(-1 <= row.mean <= 1 for row in places.where("place_correlation"))


def test_content_rows_average_the_right_pairs(model):
    """Masks made so that a twin shares all, two topics' harm half, everything else nothing."""
    topics = ("one", "two")
    scores = removal_effect(model.bridge, model.calibration("harmful").batches, completion_loss)
    top = {
        name: scores
        for name in (f"{use}/{topic}" for use in ("harmful", "benign") for topic in topics)
    }
    rows = content_rows(
        {name: top_fraction(value, Q, within="model") for name, value in top.items()}, {}
    )
    same = overlap(*[top_fraction(scores, Q, within="model")] * 2).lift
    assert {
        row.labels["relation"]: row.mean for row in rows.where("content_lift")
    } == pytest.approx(
        dict.fromkeys(
            ("twin", "harm, other topic", "benign, other topic", "harm and benign, other topic"),
            same,
        )
    )
    top["benign/one"] = top["benign/two"] = -scores
    rows = content_rows(
        {name: top_fraction(value, Q, within="model") for name, value in top.items()}, {}
    )
    found = {row.labels["relation"]: row.mean for row in rows.where("content_lift")}
    assert found == pytest.approx(
        {"twin": 0, "harm, other topic": same, "benign, other topic": found["benign, other topic"],
         "harm and benign, other topic": 0}
    )  # fmt: skip
    assert found["benign, other topic"] > 1


def test_tokens_and_places_add_up(model, calibrations, found):
    mask = found["harmful"]
    rows = token_rows(model, "harmful", calibrations["harmful"], mask, {})
    scores = removal_effect(model.bridge, calibrations["harmful"].batches, completion_loss)
    assert sum(row.mean for row in rows) == pytest.approx(scores.sum_over(mask), rel=1e-4)
    located = location_rows(model, mask, {})
    for by in ("matrix",):
        assert sum(row.mean for row in located.where("weights_removed", by=by)) == mask.n_removed
    for row in located.where("gini", chance="yes"):
        assert row.n == 20


def test_ablation_rows_name_the_removed_circuit(model, found):
    rows = ablation_rows(
        model, {"harmful": found["harmful"]}, {"model": "x"}, split="choice", only=["benign"]
    )
    assert {row.labels["mask"] for row in rows} == {"harmful"}
    assert rows.where("weights_removed")[0].mean == found["harmful"].n_removed
    assert rows.where("benign_valid_rate")[0].labels["split"] == "choice"
