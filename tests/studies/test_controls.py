"""Controls of a circuit: as many weights, chosen otherwise.

Would catch: a control that is larger or smaller, that shares the circuit's weights or ignores the
price, a twin that is searched for with other data or settings, a search that is not named as one,
single weights where the circuit is of whole units.
"""

from dataclasses import replace

import pytest

from harmcircuits.circuits.masks import WeightMask, top_fraction
from harmcircuits.circuits.scores import WeightScores
from harmcircuits.hooks.weights import named_weights
from harmcircuits.search.attribution import removal_effect, token_price
from harmcircuits.studies.controls import Controls, UnprunedScores, controls

OPTIONS = {"size": 0.01, "steps": 6}
SITE = "blocks.1.mlp.out.weight"


@pytest.fixture(scope="module")
def model(sft):
    return sft


@pytest.fixture(scope="module")
def data(model):
    return model.calibrations(["harmful", "benign", "recognition"])


@pytest.fixture(scope="module")
def circuit(model, data) -> WeightMask:
    return model.find_circuit("harmful", calibrations=data, **OPTIONS)


@pytest.fixture(scope="module")
def matched(model, data, circuit) -> Controls:
    return controls(model, "harmful", circuit, calibrations=data, seed=4)


def mean_magnitude(model, mask: WeightMask) -> float:
    total = 0.0
    for name, index in mask.removed.items():
        total += named_weights(model.bridge)[name].detach().flatten()[index].abs().sum().item()
    return total / len(mask)


def test_each_has_as_many_weights_as_the_circuit_and_the_twin_is_a_search(matched, circuit):
    assert {name: len(masks) for name, masks in matched.items()} == {
        "random": 3,
        "random magnitude": 3,
        "opposite sign": 1,
        "second slice": 1,
        "benign twin": 1,
    }
    assert matched.searched == ("benign twin",)
    assert "benign twin (1 mask, a search of its own)" in repr(matched)
    for name, masks in matched.items():
        for mask in masks:
            is_full = len(mask) == len(circuit)
            assert is_full or (name in matched.searched and 0 < len(mask) < len(circuit))
            assert mask.digest != circuit.digest
            if name.startswith("random"):
                assert mask.counts == circuit.counts, "in every matrix"


def test_random_ones_follow_the_seed_and_the_magnitude(model, data, circuit, matched):
    for name in ("random", "random magnitude"):
        assert len({mask.digest for mask in matched[name]}) == 3
    later = controls(model, "harmful", circuit, calibrations=data, seed=5, n_random=1)
    assert [mask.digest for mask in later["random"]] == [matched["random"][1].digest]

    circuit_mean = mean_magnitude(model, circuit)
    random, like = (matched[name][0] for name in ("random", "random magnitude"))
    off = abs(mean_magnitude(model, random) - circuit_mean)
    assert abs(mean_magnitude(model, like) - circuit_mean) < 0.2 * off


def ranked(model, data, names, *, factor: float, sign: int) -> WeightScores:
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
    down = ranked(model, data, sign=-1, **options)
    up = ranked(model, data, sign=1, **options)
    size = circuit.fraction
    opposite = top_fraction(down, size, within="model")
    following = top_fraction(up, size, within="model", exclude=circuit)
    for kind, expected in (("opposite sign", opposite), ("second slice", following)):
        (mask,) = matched[kind]
        # The sums are taken in another order here, so a weight at the edge may differ.
        assert len(mask & expected) >= 0.999 * len(mask)
    effect = removal_effect(model.bridge, data["harmful"].batches)
    assert effect.sum_over(opposite) < 0 < effect.sum_over(following)


def test_known_scores_are_read_and_what_is_protected_may_be_left_out(model, data, circuit):
    effect = removal_effect(model.bridge, data["harmful"].batches)
    options = {"calibrations": data, "n_random": 1}
    known = UnprunedScores(-effect, None)
    others = controls(model, "harmful", circuit, unpruned=known, contrast="none", **options)
    (mask,) = others["opposite sign"]
    assert mask.digest == top_fraction(effect, circuit.fraction, within="model").digest

    free = controls(model, "harmful", circuit, protect=(), **options)
    following = top_fraction(effect, circuit.fraction, within="model", exclude=circuit)
    assert free["second slice"][0].digest == following.digest
    assert free.searched == ("benign twin",)


@pytest.mark.parametrize(
    ("recorded", "options"),
    [
        ({}, {}),
        ({"sites": [SITE]}, {"sites": [SITE]}),
    ],
)
def test_the_twin_is_the_same_search_the_other_way_round(
    model, data, circuit, tmp_path, recorded, options
):
    """With its settings, the target protected, and the budget of what both spare."""
    budget = {"benign": 0.5, "recognition": 0.2}
    settings = {**circuit.source.settings, "budget": budget, **recorded}
    mask = replace(circuit, source=replace(circuit.source, settings=settings))
    matched = controls(model, "harmful", mask, calibrations=data, n_random=1, folder=tmp_path)
    (twin,) = matched["benign twin"]
    assert list(tmp_path.iterdir()), "kept as it goes"

    others = {"protect": ["recognition", "harmful"], "budget": {"recognition": 0.2}}
    options = {**OPTIONS, "size": mask.fraction, **others, **options}
    expected = model.find_circuit("benign", calibrations=data, **options)
    assert len(twin) > 0
    assert twin.digest == expected.digest
    assert twin.source == expected.source


def test_what_cannot_be_controlled_is_refused(model, data, circuit):
    with pytest.raises(ValueError, match="removes nothing"):
        controls(model, "harmful", circuit - circuit, calibrations=data)
    with pytest.raises(ValueError, match="'harmful'"):
        controls(model, "harmful", circuit, protect=["harmful"])
