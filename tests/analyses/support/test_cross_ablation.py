"""Circuits side by side on a few requests of a shipped organism, and the behaviours they are for.

Would catch: circuits of unequal size, protection that is ignored, resamples that differ between
behaviours, rows that contradict the masks, a twin about other things.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import small_model
from support.cross_ablation import (
    ablation_rows,
    change_rows,
    circuits_both_ways,
    content_rows,
    overlap_place_rows,
    overlap_rows,
    resampled_circuits,
    token_rows,
    topic_masks,
)
from support.curves import outcomes_of

from harmcircuits.behaviours.model import Model
from harmcircuits.circuits.location import location_rows
from harmcircuits.circuits.masks import WeightMask, top_fraction
from harmcircuits.circuits.overlap import overlap
from harmcircuits.circuits.scores import WeightScores
from harmcircuits.hooks.attribution import removal_effect
from harmcircuits.hooks.objectives import completion_loss
from harmcircuits.hooks.weights import weight_sites
from harmcircuits.organisms import organism_behaviours
from harmcircuits.organisms.world import world
from harmcircuits.studies.summary import Terms

SIZE = 0.01
NAMES = ("harmful", "benign", "recognition_margin")

find = partial(Model.find_circuit, steps=2, reach=1.0, renew=False)


@pytest.fixture(scope="module")
def model():
    return small_model("sft")


@pytest.fixture(scope="module")
def calibrations(model):
    return model.calibrations(NAMES)


@pytest.fixture(scope="module")
def circuits(model, calibrations) -> dict[str, WeightMask]:
    """Unprotected, in two steps."""
    masks = {}
    for name in NAMES:
        masks[name] = find(model, name, size=SIZE, protect=(), calibrations=calibrations)
    return masks


@pytest.fixture(scope="module")
def harm_scores(model, calibrations) -> WeightScores:
    return removal_effect(model.bridge, calibrations["harmful"].batches, completion_loss)


def top(scores: WeightScores) -> WeightMask:
    return top_fraction(scores, SIZE, within="model")


def same_weights(first: WeightMask, second: WeightMask) -> bool:
    return len(first - second) == len(second - first) == 0


# Behaviours


def test_parts_of_behaviours_are_what_they_say():
    behaviours = organism_behaviours()
    topics = world().topics
    assert len(behaviours) == 6 + 3 + 2 * len(topics)
    for topic in topics:
        harm = behaviours[f"harmful/{topic}"].prompts("heldout")
        twin = behaviours[f"benign/{topic}"].prompts("heldout")
        assert {example.category for example in (*harm, *twin)} == {topic}
        groups = [example.group for example in harm]
        assert groups == [example.group for example in twin], "a twin is about the same items"

    whole = set(behaviours["knowledge"].prompts("choice"))
    parts = set(behaviours["parts"].prompts("choice"))
    kind = set(behaviours["kind"].prompts("choice"))
    assert parts | kind == whole
    assert not parts & kind
    assert behaviours["recognition_margin"].objective is not completion_loss


def test_parts_have_their_own_names_and_know_their_whole():
    behaviours = organism_behaviours()
    topic = world().topics[0]
    wholes = {"parts": "knowledge", "kind": "knowledge", "recognition_margin": "recognition"}
    wholes |= {f"harmful/{topic}": "harmful", f"benign/{topic}": "benign"}
    for name, whole in wholes.items():
        part = behaviours[name]
        assert (part.name, part.title, part.part_of) == (name, name, whole)
    assert behaviours["parts"].metric == "parts_rate"
    assert not any(behaviours[whole].part_of for whole in set(wholes.values()))


# Circuits


def test_circuits_both_ways_protect_nothing_and_all_others(model, calibrations, circuits):
    both = circuits_both_ways(model, calibrations, ["harmful"], size=SIZE, find=find)
    assert list(both) == ["none", "others"]
    free, apart = both["none"]["harmful"], both["others"]["harmful"]
    assert same_weights(free, circuits["harmful"])
    expected = find(model, "harmful", size=SIZE, protect="benign", calibrations=calibrations)
    assert same_weights(apart, expected), "of the calibrated ones only benign is a whole other"
    benign = circuits["benign"]
    assert overlap(apart, benign).n_shared < overlap(free, benign).n_shared


def test_resampled_scores_are_those_of_all_examples(model, calibrations, harm_scores):
    options = {"size": SIZE, "n_resamples": 2, "seed": 0}
    scores, masks = resampled_circuits(model, calibrations, ["harmful"], **options)["harmful"]
    for name, value in harm_scores.values.items():
        torch.testing.assert_close(scores.values[name], value, rtol=1e-3, atol=1e-8)
    n_weights = sum(value.numel() for value in harm_scores.values.values())
    assert [len(mask) for mask in masks] == [round(SIZE * n_weights)] * 2

    again = resampled_circuits(model, calibrations, ["harmful"], **options)["harmful"][1]
    assert all(same_weights(*pair) for pair in zip(masks, again, strict=True))
    assert not same_weights(*masks), "resamples differ"


def test_a_behaviour_with_too_few_items_is_refused(model, calibrations):
    """A single verified item: a resample of the sixteen blocks can miss it."""
    data = calibrations["harmful"]
    few = replace(data, prompts=data.prompts[:1])
    options = {"size": SIZE, "n_resamples": 40, "seed": 0}
    with pytest.raises(ValueError, match=r"harmful: a resample holds none of its 1 .*give more"):
        resampled_circuits(model, {"harmful": few}, ["harmful"], **options)


# Rows


def test_overlap_rows_agree_with_the_masks(model, calibrations, circuits):
    resampled = resampled_circuits(model, calibrations, NAMES, size=SIZE, n_resamples=4, seed=0)
    rows = overlap_rows(resampled, circuits, {"model": "x"}, size=SIZE, n_samples=5)
    pair = {"first": "harmful", "second": "benign"}
    lift = rows.one("overlap_lift", **pair, selection="search")
    expected = overlap(circuits["harmful"], circuits["benign"])
    assert lift.mean == pytest.approx(expected.lift)

    harm, benign = (top(resampled[name][0]) for name in ("harmful", "benign"))
    jaccard = rows.one("overlap_jaccard", **pair, selection="one shot")
    assert jaccard.mean == pytest.approx(overlap(harm, benign).jaccard)
    few = overlap_rows(
        resampled, circuits, {}, size=SIZE, n_samples=5, pairs=[("harmful", "benign")]
    )
    assert few.one("rank_correlation").labels == pair

    ceiling = rows.one("overlap_jaccard", first="harmful", second="harmful")
    assert ceiling.low > jaccard.mean, "a circuit is nearer to itself on other data than to another"
    assert all(row.low <= row.mean <= row.high for row in rows)


def test_overlap_by_place_has_a_row_a_layer(model, circuits):
    rows = overlap_place_rows(model, circuits, "harmful", {})
    assert len(rows.where("overlap_lift", second="benign", by="layer")) == 4
    correlations = rows.where("place_correlation")
    assert {row.labels["by"] for row in correlations} == {"head", "neuron"}
    assert all(-1 <= row.mean <= 1 for row in correlations)
    assert {row.labels["second"] for row in rows} == set(NAMES) - {"harmful"}


def lifts(masks: dict[str, WeightMask], terms: Terms | None = None) -> dict[str, float]:
    rows = content_rows(masks, {}, terms=terms)
    return {row.labels["relation"]: row.mean for row in rows.where("content_lift")}


def test_content_rows_average_the_right_pairs(harm_scores):
    """Masks made so that all four are the same.

    Then harm's are, and benign ones are the opposite.
    """
    same = top(harm_scores)
    lift = overlap(same, same).lift
    masks = {f"{use}/{topic}": same for use in ("harmful", "benign") for topic in ("a", "b")}
    relations = (
        "twin",
        "harm, other topic",
        "benign, other topic",
        "harm and benign, other topic",
    )
    assert lifts(masks) == pytest.approx(dict.fromkeys(relations, lift))

    opposite = top(-harm_scores)
    assert overlap(opposite, opposite).lift > 1
    masks["benign/a"] = masks["benign/b"] = opposite
    expected = (0, lift, overlap(opposite, opposite).lift, 0)
    assert lifts(masks) == pytest.approx(dict(zip(relations, expected, strict=True)))


def test_content_rows_are_of_the_behaviours_that_are_named(model, harm_scores):
    same = top(harm_scores)
    masks = {f"{use}/{topic}": same for use in ("refusal", "knowledge") for topic in ("a", "b")}
    terms = Terms.of(model, "refusal", "knowledge")
    assert "knows, other topic" in lifts(masks, terms)


def test_tokens_and_places_add_up(model, calibrations, circuits, harm_scores):
    mask = circuits["harmful"]
    rows = token_rows(model, "harmful", calibrations["harmful"], mask, {})
    total = sum(row.mean for row in rows)
    assert total == pytest.approx(harm_scores.sum_over(mask), rel=1e-4)

    located = location_rows(mask, weight_sites(model.bridge), {})
    of_matrices = located.where("weights_removed", by="matrix")
    assert sum(row.mean for row in of_matrices) == len(mask)
    by_chance = located.where("gini", chance="yes")
    assert {row.n for row in by_chance} == {20}


def test_ablation_rows_name_the_removed_circuit(model, circuits):
    mask = circuits["harmful"]
    options = {"split": "choice", "only": ["benign"]}
    rows = ablation_rows(model, {"harmful": mask}, {"model": "x"}, **options)
    assert {row.labels["mask"] for row in rows} == {"harmful"}
    assert rows.one("weights_removed").mean == len(mask)
    assert rows.one("benign_valid_rate").labels["split"] == "choice"
    assert rows.one("benign_valid_rate").mean == (
        model.measure(mask=mask, **options).one("benign_valid_rate").mean
    )


def test_changes_are_those_from_the_unpruned_model(model, circuits):
    unpruned = outcomes_of(model, ["harmful", "benign"])
    masks = {"harmful": circuits["harmful"]}
    rows = change_rows(model, masks, unpruned, {"protected": "none"})
    of_mask = rows.where(mask="harmful", protected="none")
    assert of_mask.one("weights_removed").mean == circuits["harmful"].n_removed

    for name in unpruned:
        for metric in (model.behaviours[name].metric, model.behaviours[name].nll_metric):
            before = unpruned[name].rows({}).one(metric)
            change = of_mask.one(f"{metric}_change")
            assert change.mean == pytest.approx(of_mask.one(metric).mean - before.mean, abs=1e-6)
            assert change.low <= change.mean <= change.high
    assert of_mask.one("harm_nll_change").low > 0, "the circuit of harm was removed"

    with pytest.raises(ValueError, match=r"'harmful'.*same requests"):
        unpruned["harmful"].changes(unpruned["benign"], {})


def test_nothing_changes_without_a_change(model):
    """A rate moves in steps: no change among n items holds half an item either way."""
    outcomes = outcomes_of(model, ["benign"])["benign"]
    changes = outcomes.changes(outcomes, {})
    loss = changes.one("benign_nll_change")
    assert loss.low == loss.mean == loss.high == 0
    rate = changes.one("benign_valid_rate_change")
    half_item = 1 / (2 * len(set(outcomes.groups)))
    assert (rate.low, rate.mean, rate.high) == pytest.approx((-half_item, 0, half_item))


def test_topic_masks_are_of_topics_that_both_have(model):
    first, second, third = world().topics[:3]
    names = [f"{role}/{topic}" for role in ("harmful", "benign") for topic in (first, second)]
    answers = model.calibrations([*names, f"harmful/{third}"])
    masks = topic_masks(model, answers, size=SIZE)
    assert list(masks) == [
        f"{role}/{topic}" for role in ("harmful", "benign") for topic in sorted((first, second))
    ]
    batches = answers[names[0]].batches
    expected = top(removal_effect(model.bridge, batches, completion_loss))
    assert same_weights(masks[names[0]], expected)
    assert not topic_masks(model, {names[0]: answers[names[0]]}, size=SIZE), "one topic is too few"
