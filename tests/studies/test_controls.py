"""Controls of a circuit: as many weights, chosen otherwise.

Would catch: a control that is larger or smaller, that shares the circuit's weights or ignores the
price, a twin that is searched for with other data or settings, a search that is not named as one,
single weights where the circuit is of whole units.
"""

import pytest
from helpers import small_model

from harmcircuits.circuits.location import counts_by
from harmcircuits.circuits.masks import WeightMask, top_fraction
from harmcircuits.circuits.scores import WeightScores
from harmcircuits.circuits.units import Units
from harmcircuits.hooks.attribution import removal_effect, token_price
from harmcircuits.hooks.weights import named_weights, weight_sites
from harmcircuits.studies.controls import Controls, Unpruned, controls

OPTIONS = {"size": 0.01, "steps": 2, "reach": 2.0}


@pytest.fixture(scope="module")
def model():
    return small_model("sft")


@pytest.fixture(scope="module")
def data(model):
    return model.calibrations(["harmful", "benign", "recognition"])


@pytest.fixture(scope="module")
def circuit(model, data) -> WeightMask:
    return model.find_circuit("harmful", calibrations=data, **OPTIONS)


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
            if name in matched.searched:
                assert 0 < len(mask) <= len(circuit)
            else:
                assert len(mask) == len(circuit)
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


def priced(model, data, names, *, factor: float, sign: int) -> WeightScores:
    """sign * removal effect - factor * price, by hand."""
    effect = removal_effect(model.bridge, data["harmful"].batches)
    values = {name: sign * value for name, value in effect.values.items()}
    for name in names:
        price = token_price(model.bridge, data[name].batches)
        values = {weight: value - factor * price.values[weight] for weight, value in values.items()}
    return WeightScores(values, effect.source)


def test_ranked_ones_pay_the_circuit_s_own_price(model, data, circuit, matched):
    """The opposite end of the ranking and its next slice, at the factor that chose the circuit."""
    factor = circuit.source.settings["factor"]
    options = {"names": ("benign", "recognition"), "factor": factor}
    down = priced(model, data, sign=-1, **options)
    up = priced(model, data, sign=1, **options)
    size = circuit.fraction
    opposite = top_fraction(down, size, within="model")
    following = top_fraction(up, size, within="model", exclude=circuit)
    for kind, expected in (("opposite sign", opposite), ("second slice", following)):
        (mask,) = matched[kind]
        # The sums are taken in another order here, so a weight at the edge may differ.
        assert len(mask & expected) >= 0.999 * len(mask)
    effect = removal_effect(model.bridge, data["harmful"].batches)
    assert effect.sum_over(opposite) < 0 < effect.sum_over(following)


def test_known_scores_are_read(model, data, circuit):
    effect = removal_effect(model.bridge, data["harmful"].batches)
    known = Unpruned(-effect, None)
    (mask,) = controls(
        model, "harmful", circuit, calibrations=data, unpruned=known, contrast="none", n_random=1
    )["opposite sign"]
    assert same_weights(mask, top_fraction(effect, circuit.fraction, within="model"))


def test_a_mask_that_no_walk_found_has_a_twin_by_the_usual_one(model, data, circuit, monkeypatch):
    """And pays the price once."""
    seen = []

    def find_circuit(self, name, **options):
        seen.append((name, options))
        return circuit

    monkeypatch.setattr(type(model), "find_circuit", find_circuit)
    plain = top_fraction(removal_effect(model.bridge, data["harmful"].batches), 0.01)
    matched = controls(model, "harmful", plain, calibrations=data, n_random=1)
    ((name, options),) = seen
    assert name == "benign"
    assert not {"steps", "reach", "budget", "renew"} & options.keys()
    scores = priced(model, data, ("benign", "recognition"), factor=1.0, sign=-1)
    expected = top_fraction(scores, plain.fraction, within="model")
    (opposite,) = matched["opposite sign"]
    assert len(opposite & expected) >= 0.999 * len(opposite)


def test_an_empty_mask_has_no_controls(model, data, circuit):
    with pytest.raises(ValueError, match="removes nothing"):
        controls(model, "harmful", circuit - circuit, calibrations=data)


def test_another_contrast_has_a_twin_of_its_name(model, data, circuit):
    others = controls(
        model, "harmful", circuit, calibrations=data, contrast="recognition", n_random=1
    )
    assert others.searched == ("recognition twin",)
    assert "benign twin" not in others


@pytest.mark.parametrize("unit", ["neuron", "head", "row"])
def test_those_of_whole_units_are_whole_units(model, data, unit):
    """As many in every layer, and no head or neuron in part."""
    mask = model.find_circuit("harmful", calibrations=data, **OPTIONS, unit=unit, budget=1.0)
    others = controls(model, "harmful", mask, calibrations=data, n_random=2)
    assert list(others) == ["random", "opposite sign", "second slice", "benign twin"]
    random, second_random = others["random"]
    assert random.counts == second_random.counts == mask.counts
    if unit != "head":  # of four heads both may be the same
        assert not same_weights(random, second_random)
    assert not len(others["second slice"][0] & mask)

    sites = weight_sites(model.bridge)
    units = Units.of(sites, unit, sites)
    for name, masks in others.items():
        for other in masks:
            assert 0 < len(other) <= len(mask), name
            # The best by a score that is 1 on these weights and 0 elsewhere are the same weights.
            ones = {weight: other.dense(weight).float() for weight in sites}
            assert same_weights(other, as_mask(units.largest(ones, len(other), {}), other))


def as_mask(removed, like: WeightMask) -> WeightMask:
    return WeightMask(removed, like.shapes, like.source)


def test_where_the_contrast_is_the_target_there_is_no_twin(model, data):
    mask = model.find_circuit("benign", calibrations=data, **OPTIONS)
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


def test_the_twin_is_the_same_search_the_other_way_round(model, data, tmp_path):
    """With its settings, the target protected, and the budget of what both spare."""
    budget = {"benign": 0.5, "recognition": 0.2}
    options = {**OPTIONS, "calibrations": data}
    mask = model.find_circuit("harmful", budget=budget, **options)
    (twin,) = controls(
        model, "harmful", mask, calibrations=data, n_random=1, folder=tmp_path / "twin"
    )["benign twin"]
    assert (tmp_path / "twin" / "step-002").is_dir(), "kept as it goes"
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
