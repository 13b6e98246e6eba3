"""Controls of a circuit: as many weights, chosen otherwise.

Would catch: a control that is larger or smaller, that shares the circuit's weights or takes
protected ones, a twin that is searched for with other data, a search that is not named as one.
"""

import pytest
from helpers import small_model

from harmcircuits.circuits.location import counts_by
from harmcircuits.circuits.masks import WeightMask, top_fraction
from harmcircuits.hooks.attribution import removal_effect
from harmcircuits.hooks.weights import named_weights, weight_sites
from harmcircuits.studies.controls import Controls, controls
from harmcircuits.studies.rounds import circuit_in_rounds, protected_weights, prune_in_rounds

SHARE = {"protect_share": 0.02}
OPTIONS = {"size": 0.01, "rounds": 2, **SHARE}


@pytest.fixture(scope="module")
def model():
    return small_model("sft")


@pytest.fixture(scope="module")
def data(model):
    return model.calibrations(["harmful", "benign", "recognition"])


@pytest.fixture(scope="module")
def circuit(model, data) -> WeightMask:
    return circuit_in_rounds(model, "harmful", calibrations=data, **OPTIONS)


@pytest.fixture(scope="module")
def matched(model, data, circuit) -> Controls:
    return controls(model, "harmful", circuit, calibrations=data, seed=4)


def same_weights(first: WeightMask, second: WeightMask) -> bool:
    return len(first - second) == len(second - first) == 0


def mean_magnitude(model, mask: WeightMask) -> float:
    total = 0.0
    for name, index in mask.removed.items():
        total += named_weights(model.bridge)[name].detach().flatten()[index].abs().sum().item()
    return total / len(mask)


def test_there_are_five_kinds_and_the_twin_is_a_search(matched):
    sizes = {name: len(masks) for name, masks in matched.items()}
    assert sizes == {
        "random": 3,
        "random magnitude": 3,
        "opposite sign": 1,
        "second slice": 1,
        "benign twin": 1,
    }
    assert matched.searched == ("benign twin",)
    assert "benign twin (1 mask, a search of its own)" in repr(matched)
    assert "random (3 masks)" in repr(matched)


def test_each_has_as_many_weights_as_the_circuit(matched, circuit):
    for name, masks in matched.items():
        for mask in masks:
            # The twin grows in two rounds, each rounded to a weight.
            assert abs(len(mask) - len(circuit)) <= (1 if name in matched.searched else 0)
            if name.startswith("random"):
                assert mask.counts == circuit.counts, "in every matrix"
            assert not same_weights(mask, circuit)


def test_random_ones_follow_the_seed_and_the_magnitude(model, data, circuit, matched):
    for name in ("random", "random magnitude"):
        first, second, third = matched[name]
        assert not same_weights(first, second)
        assert not same_weights(second, third)
    later = controls(model, "harmful", circuit, calibrations=data, seed=5, n_random=1)
    assert same_weights(later["random"][0], matched["random"][1])
    assert len(later["random"]) == 1

    circuit_mean = mean_magnitude(model, circuit)
    random, like = (matched[name][0] for name in ("random", "random magnitude"))
    off = abs(mean_magnitude(model, random) - circuit_mean)
    assert abs(mean_magnitude(model, like) - circuit_mean) < 0.2 * off


def test_ranked_ones_are_of_the_same_scores(model, data, circuit, matched):
    """The opposite end of the ranking and its next slice, with the same weights out of reach."""
    bridge = model.bridge
    scores = removal_effect(bridge, data["harmful"].batches)
    spared = [data[name].batches for name in ("benign", "recognition")]
    first, second = (protected_weights(bridge, batches, 0.02) for batches in spared)
    taken = first | second
    size = circuit.fraction
    opposite = top_fraction(-scores, size, within="model", exclude=taken)
    assert same_weights(matched["opposite sign"][0], opposite)
    following = top_fraction(scores, size, within="model", exclude=taken | circuit)
    assert same_weights(matched["second slice"][0], following)
    assert scores.sum_over(opposite) < 0 < scores.sum_over(following)

    known = controls(
        model, "harmful", circuit, calibrations=data, first=(scores, [first, second]), n_random=1
    )
    assert same_weights(known["opposite sign"][0], opposite)
    assert same_weights(known["second slice"][0], following)


def test_the_twin_is_the_same_search_the_other_way_round(model, data, circuit, matched):
    spared = [data[name].batches for name in ("recognition", "harmful")]
    options = {**OPTIONS, "size": circuit.fraction}
    expected = prune_in_rounds(model.bridge, data["benign"].batches, spared, **options)
    (twin,) = matched["benign twin"]
    assert same_weights(twin, expected), "with the circuit's own rounds and protection"
    once = controls(
        model, "harmful", circuit, calibrations=data, rounds=1, protect_share=0.0, n_random=1
    )
    options = {"size": circuit.fraction, "rounds": 1, "protect_share": 0.0}
    expected = prune_in_rounds(model.bridge, data["benign"].batches, spared, **options)
    assert same_weights(once["benign twin"][0], expected)


def test_another_contrast_has_a_twin_of_its_name(model, data, circuit):
    others = controls(
        model, "harmful", circuit, calibrations=data, contrast="recognition", n_random=1
    )
    assert others.searched == ("recognition twin",)
    assert "benign twin" not in others


def test_where_the_contrast_is_the_target_there_is_no_twin(model, data):
    mask = circuit_in_rounds(model, "benign", calibrations=data, **OPTIONS)
    same = controls(model, "benign", mask, calibrations=data, n_random=1)
    assert list(same) == ["random", "random magnitude", "opposite sign", "second slice"]
    assert same.searched == ()
    missing = controls(model, "benign", mask, calibrations=data, contrast="refusal", n_random=1)
    assert missing.searched == (), "of refusal there is no calibration data"


def test_what_is_protected_may_be_left_out(model, data, circuit):
    free = controls(model, "harmful", circuit, calibrations=data, protect=(), n_random=1)
    scores = removal_effect(model.bridge, data["harmful"].batches)
    following = top_fraction(scores, circuit.fraction, within="model", exclude=circuit)
    assert same_weights(free["second slice"][0], following)
    assert free.searched == ("benign twin",)
    with pytest.raises(ValueError, match=r"'harmful'.*leave it out"):
        controls(model, "harmful", circuit, protect=["harmful"])


def test_the_twin_of_a_circuit_that_a_walk_found_is_found_by_one(model, data):
    """With its settings, the target protected, and the budget of what both spare."""
    budget = {"benign": 0.5, "recognition": 0.2}
    options = {"size": 0.01, "steps": 2, "reach": 2.0, "calibrations": data}
    mask = model.find_circuit("harmful", budget=budget, **options)
    (twin,) = controls(model, "harmful", mask, calibrations=data, n_random=1)["benign twin"]
    options["size"] = mask.fraction
    protect = ["recognition", "harmful"]
    expected = model.find_circuit("benign", protect=protect, budget={"recognition": 0.2}, **options)
    assert len(twin) > 0
    assert same_weights(twin, expected)
    assert twin.source.settings["steps"] == 2


def test_the_twin_of_a_circuit_of_neurons_is_one_of_neurons(model, data):
    options = {"size": 0.01, "steps": 2, "calibrations": data}
    mask = model.find_circuit("harmful", unit="neuron", **options)
    (twin,) = controls(model, "harmful", mask, calibrations=data, n_random=1)["benign twin"]
    assert twin.source.settings["unit"] == "neuron"
    assert len(twin) > 0
    counts = counts_by(twin, weight_sites(model.bridge), "neuron").values()
    assert sum(count.n_removed for count in counts) == len(twin)
    assert all(count.n_removed in (0, count.n_weights) for count in counts)
