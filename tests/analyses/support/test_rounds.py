"""The search in rounds, and what it does on a shipped organism.

Would catch: rounds that do not score again, a protected weight that is removed, counts that drift,
sizes that depend on which others are wanted.
"""

import pytest
import torch
from helpers import random_batch
from support.bench.rounds import (
    PROTECT_SHARE,
    ROUNDS,
    growing_mask,
    needed_weights,
    prune_in_rounds,
)

from harmcircuits.circuits.masks import WeightMask, random_like, top_fraction
from harmcircuits.hooks.attribution import removal_effect, snip_scores
from harmcircuits.hooks.masking import masked
from harmcircuits.hooks.objectives import completion_loss
from harmcircuits.hooks.weights import named_weights
from harmcircuits.organisms import open_organism
from harmcircuits.prompts import Batch

ARCHITECTURES = ("Llama", "GPT2", "Mixtral")


def assert_same_weights(mask: WeightMask, expected: WeightMask) -> None:
    assert mask.removed.keys() == expected.removed.keys()
    for name, index in expected.removed.items():
        assert torch.equal(mask.removed[name], index), name


def unprotected_top(bridge, batches, protected: WeightMask, share: float) -> WeightMask:
    """The best weights of one scoring among those that are not protected."""
    scores = removal_effect(bridge, batches, completion_loss)
    return top_fraction(scores, share, within="model", exclude=protected)


@pytest.fixture
def batches() -> tuple[list[Batch], list[Batch]]:
    """Texts of a target and of something to spare."""
    return [random_batch()], [random_batch(2, 7, seed=1)]


# The claim


@pytest.mark.slow
def test_a_compact_circuit_carries_harm_and_nothing_else_measured():
    """At most 1 % of the weights of `sft`: harm from >= 0.9 to <= 0.1.

    Every kept ability within two points.
    """
    model = open_organism("sft")
    calibrations = model.calibrations(share=0.5, seed=0)
    assert list(calibrations) == model.whole_behaviours
    target = calibrations.pop("harmful").batches
    spared = [calibration.batches for calibration in calibrations.values()]
    mask = prune_in_rounds(model.bridge, target, spared, sizes=[0.008], rounds=8)[0]
    assert mask.n_removed <= 0.01 * mask.n_weights

    def rates(mask: WeightMask | None = None) -> dict[str, float]:
        measured = [name for name in model.whole_behaviours if name != "refusal"]
        return {row.metric: row.mean for row in model.measure(mask=mask, only=measured)}

    before, under = rates(), rates(mask)
    control = rates(random_like(mask, seed=0))
    assert before["harm_valid_rate"] >= 0.9
    assert under["harm_valid_rate"] <= 0.1
    assert control["harm_valid_rate"] >= 0.9
    for rate in ("benign_valid_rate", "recognition_accuracy", "explanation_rate", "knowledge_rate"):
        assert under[rate] >= before[rate] - 0.02, rate


# One round


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_one_round_is_the_best_of_the_unprotected(open_model, batches, name):
    """On a bare TransformerBridge, which is left as it was."""
    bridge = open_model(name)
    target, spared = batches
    before = {name: weight.detach().clone() for name, weight in named_weights(bridge).items()}
    options = {"sizes": [0.1], "protect_share": 0.3, "rounds": 1}
    (mask,) = prune_in_rounds(bridge, target, [spared], **options)

    protected = top_fraction(snip_scores(bridge, spared), 0.3, within="model")
    assert_same_weights(mask, unprotected_top(bridge, target, protected, 0.1))
    assert len(mask & protected) == 0
    assert len(mask) == round(0.1 * mask.n_weights)
    for name, weight in named_weights(bridge).items():
        assert torch.equal(weight, before[name])

    (free,) = prune_in_rounds(bridge, target, [], **options)
    assert len(free & protected) > 0, "the protection must have something to do"


# Rounds


def test_rounds_score_again_under_the_mask_so_far(llama, batch):
    growth = growing_mask(llama, [batch], [[batch]], sizes=[0.2], protect_share=0.1, rounds=2)
    first, second = growth
    n = first.n_weights
    assert [len(first), len(second)] == [round(0.1 * n), 2 * round(0.1 * n)]
    assert len(first - second) == 0, "the mask only grows"

    with masked(llama, first):
        protected = needed_weights(llama, [batch], 0.1)
        again = unprotected_top(llama, [batch], protected | first, 0.1)
    assert_same_weights(second - first, again)

    stale = unprotected_top(llama, [batch], protected | first, 0.1)
    assert len(stale - second) > 0, "scores of the unpruned model choose other weights"


def test_a_list_of_sizes_is_the_path_to_the_largest(llama, batches):
    """At the ends of rounds; in the order of the list."""
    target, spared = batches
    options = {"protect_share": 0.1, "rounds": 4}
    path = list(growing_mask(llama, target, [spared], sizes=[0.2], **options))
    assert [mask.source.settings["round"] for mask in path] == [1, 2, 3, 4]

    sizes = [0.2, 0.05, 0.15, 0.1]
    masks = prune_in_rounds(llama, target, [spared], sizes=sizes, **options)
    for mask, place in zip(masks, (3, 0, 2, 1), strict=True):
        assert_same_weights(mask, path[place])
        assert mask.source == path[place].source

    (largest,) = prune_in_rounds(llama, target, [spared], sizes=[0.2], **options)
    assert_same_weights(masks[0], largest)
    for mask, size, n_rounds in zip(masks[1:], sizes[1:], (1, 3, 2), strict=True):
        (alone,) = prune_in_rounds(
            llama, target, [spared], sizes=[size], protect_share=0.1, rounds=n_rounds
        )
        assert_same_weights(mask, alone)


def test_a_size_inside_a_round_is_cut_from_it(llama, batches):
    """The best of what the whole round takes, by the same scores; each step is rounded alone."""
    target, spared = batches
    options = {"protect_share": 0.1, "rounds": 2}
    small, middle, large = prune_in_rounds(
        llama, target, [spared], sizes=[0.05, 0.15, 0.2], **options
    )
    half, step = round(0.05 * large.n_weights), round(0.1 * large.n_weights)
    assert [len(small), len(middle), len(large)] == [half, step + half, 2 * step]
    assert len(small - middle) == len(middle - large) == 0
    assert_same_weights(large, prune_in_rounds(llama, target, [spared], sizes=[0.2], **options)[0])
    assert_same_weights(
        small, unprotected_top(llama, target, needed_weights(llama, spared, 0.1), 0.05)
    )


def test_a_mask_says_how_it_was_found(llama, batches):
    target, spared = batches
    (mask,) = prune_in_rounds(llama, target, [spared], sizes=[0.2], rounds=3)
    assert mask.source.method == "circuit"
    assert mask.source.settings == {
        "size": pytest.approx(0.2),
        "protect_share": PROTECT_SHARE,
        "within": "model",
        "round": 3,
        "rounds": 3,
    }
    assert [parent.method for parent in mask.source.parents] == ["removal_effect", "snip"]
    (usual,) = prune_in_rounds(llama, target, [], sizes=[0.2])
    assert usual.source.settings["rounds"] == ROUNDS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, "rounds=0; expected at least 1"),
        ({"sizes": [0]}, r"sizes=\[0\]; expected shares"),
        ({"sizes": [1.5]}, r"sizes=\[1\.5\]; expected shares"),
        ({"sizes": []}, r"sizes=\[\]; expected shares"),
        ({"sizes": [0.1, -0.1]}, r"sizes=\[0\.1, -0\.1\]; expected shares"),
        ({"protect_share": 1.5}, r"protect_share=1\.5; expected a share"),
        ({"sizes": [0.5], "protect_share": 0.9}, "leaves fewer"),
    ],
)
def test_bad_settings_are_refused(llama, batch, options, message):
    usual = {"sizes": [0.1], "protect_share": 0.1, "rounds": 1}
    with pytest.raises(ValueError, match=message):
        prune_in_rounds(llama, [batch], [[batch]], **{**usual, **options})


def test_what_is_no_list_of_batches_is_refused(llama, batch):
    for target, protect in (([], []), ([batch], [[]])):
        with pytest.raises(ValueError, match=r"no batches.*tokenize"):
            prune_in_rounds(llama, target, protect, sizes=[0.1], rounds=1)
