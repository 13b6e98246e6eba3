"""The claim of the main job on a shipped organism, and the mechanics of rounds.

Would catch: rounds that do not score again, a protected weight that is removed, counts that drift, a claim in the README
that the shipped weights do not support.
"""

import pytest
import torch

from harmcircuits.circuits.masks import random_like, top_fraction
from harmcircuits.hooks.attribution import removal_effect, snip_scores
from harmcircuits.hooks.masking import masked
from harmcircuits.hooks.objectives import completion_loss
from harmcircuits.hooks.search import find_circuit, iterative_pruning
from harmcircuits.organisms import open_organism
from harmcircuits.studies.controls import union


def test_a_compact_circuit_carries_harm_and_nothing_else_measured():
    """At most 1 % of the weights of `sft`: harm from >= 0.9 to <= 0.1, every kept ability within two points."""
    model = open_organism("sft")
    calibrations = {name: model.calibration(name) for name in model.behaviours}
    target = calibrations.pop("harmful").batches
    mask = find_circuit(
        model.bridge,
        target,
        [c.batches for c in calibrations.values()],
        rounds=8,
        size=0.008,
        protect_share=0.005,
    )
    assert mask.n_removed <= 0.01 * mask.n_weights

    def rates() -> dict[str, float]:
        asked = [name for name in model.behaviours if name != "refusal"]
        return {row.metric: row.mean for row in model.measure(only=asked)}

    before = rates()
    with masked(model.bridge, mask):
        under = rates()
    with masked(model.bridge, random_like(mask, seed=0)):
        control = rates()
    assert before["harm_valid_rate"] >= 0.9
    assert under["harm_valid_rate"] <= 0.1
    assert control["harm_valid_rate"] >= 0.9
    for kept in ("benign_valid_rate", "recognition_accuracy", "explanation_rate", "knowledge_rate"):
        assert under[kept] >= before[kept] - 0.02, kept


def test_rounds_score_again_under_the_mask_so_far(llama, batch):
    steps = list(
        iterative_pruning(llama, [batch], [[batch]], rounds=2, sizes=[0.2], protect_share=0.1)
    )
    n = steps[0].n_weights
    assert [mask.n_removed for mask in steps] == [round(0.1 * n), 2 * round(0.1 * n)]
    assert (steps[0] - steps[1]).n_removed == 0, "the mask only grows"
    with masked(llama, steps[0]):
        harm = removal_effect(llama, [batch], completion_loss)
        protected = top_fraction(snip_scores(llama, [batch], completion_loss), 0.1, within="model")
    again = top_fraction(harm, 0.1, within="model", exclude=union([protected, steps[0]]))
    second = steps[1] - steps[0]
    assert all(torch.equal(again.removed[name], second.removed[name]) for name in again.removed)
    stale = top_fraction(
        removal_effect(llama, [batch], completion_loss),
        0.1,
        within="model",
        exclude=union([protected, steps[0]]),
    )
    assert (stale - second).n_removed > 0, "scores of the unpruned model choose other weights"


def test_known_scores_save_the_first_round(llama, batch):
    harm = removal_effect(llama, [batch], completion_loss)
    protected = [top_fraction(snip_scores(llama, [batch], completion_loss), 0.1, within="model")]
    options = {"q": 0.2, "p": 0.1, "rounds": 2}
    known = list(iterative_pruning(llama, [batch], [[batch]], first=(harm, protected), **options))
    for one, two in zip(
        known, iterative_pruning(llama, [batch], [[batch]], **options), strict=True
    ):
        assert all(torch.equal(one.removed[name], two.removed[name]) for name in two.removed)
    other = next(iterative_pruning(llama, [batch], [[batch]], first=(-harm, protected), **options))
    assert (other - known[0]).n_removed > 0, "the first round reads the scores it is given"


def test_one_round_is_the_best_of_the_unprotected(llama, batch):
    mask = find_circuit(llama, [batch], [[batch]], size=0.1, protect_share=0.3, rounds=1)
    protected = top_fraction(snip_scores(llama, [batch], completion_loss), 0.3, within="model")
    expected = top_fraction(
        removal_effect(llama, [batch], completion_loss), 0.1, within="model", exclude=protected
    )
    assert (mask & protected).n_removed == 0
    assert mask.removed.keys() == expected.removed.keys()
    assert all(torch.equal(mask.removed[name], expected.removed[name]) for name in mask.removed)


def test_bad_settings_are_refused(llama, batch):
    with pytest.raises(ValueError, match="rounds=0"):
        find_circuit(llama, [batch], [], rounds=0, size=0.1, protect_share=0.1)
    with pytest.raises(ValueError, match=r"fraction=1\.5"):
        find_circuit(llama, [batch], [[batch]], size=0.1, protect_share=1.5, rounds=1)
    with pytest.raises(ValueError, match="leaves fewer"):
        find_circuit(llama, [batch], [[batch]], size=0.5, protect_share=0.9, rounds=1)
