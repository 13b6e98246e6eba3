"""Pairs of searches get the answers that they say, and their masks are compared as they say.

Would catch: halves that share an item, a shuffle that loses answers, a Jaccard of neurons that
counts weights, votes that a lone walk wins, a disjoint search that is offered what was taken, a
series that goes on after harm has outlived a mask.
"""

import pytest
import torch
from helpers import small_model
from support.bench import stability, tables

import harmcircuits as hc
from harmcircuits.behaviours.model import Model
from harmcircuits.organisms import FOLDER

NAMES = ("harmful", "benign")


@pytest.fixture(scope="module")
def model() -> Model:
    """Asked about two items of each topic."""
    model = small_model("sft", every=16)
    return model.with_behaviours(*(model.behaviour(name) for name in NAMES))


@pytest.fixture(autouse=True)
def opened(model, monkeypatch):
    monkeypatch.setattr(stability, "open_model", lambda *_, **__: model)
    whole = {name: model.calibration(name) for name in NAMES}
    monkeypatch.setattr(Model, "calibrations", lambda *_, **__: whole)
    return whole


def items(data) -> set[str]:
    return {example.group for calibration in data.values() for example in calibration.prompts}


def examples(data) -> list:
    return [example for calibration in data.values() for example in calibration.prompts]


def mask_of(model, *flat: int) -> hc.WeightMask:
    """Weights of the first MLP output matrix, by flat index."""
    none = hc.top_fraction(hc.magnitude_scores(model.bridge), 0.0)
    removed = {"blocks.0.mlp.out.weight": torch.tensor(flat)}
    return hc.WeightMask(removed, none.shapes, none.source)


@pytest.mark.parametrize("kind", ["halves", "wholes"])
def test_pairs_share_no_item(model, opened, kind):
    first, second = stability.pair_of(model, kind, 1)
    assert items(first) and items(second)
    assert not items(first) & items(second)
    if kind == "halves":
        assert set(examples(first)) | set(examples(second)) == set(examples(opened))
    assert items(first) == {example.group for example in first["benign"].prompts}


def test_the_same_answers_come_in_another_order(model):
    first, second = stability.pair_of(model, "same half", 1)
    assert set(examples(first)) == set(examples(second))
    assert examples(first) != examples(second)
    n_tokens = [
        sum(batch.tokens.shape[0] for batch in data["harmful"].batches) for data in (first, second)
    ]
    assert n_tokens == [len(first["harmful"].prompts)] * 2


def test_jaccard_by_hand(model):
    sites = hc.weight_sites(model.bridge)
    # A column of the matrix is what one neuron writes: 0 and 512 are of neuron 0, 1 of neuron 1.
    first, second = mask_of(model, 0, 1), mask_of(model, 1, 512)
    assert stability.jaccard(first, second, sites, "weight") == pytest.approx(1 / 3)
    assert stability.jaccard(first, second, sites, "neuron") == 1
    assert stability.jaccard(first, mask_of(model, 0, 512), sites, "neuron") == pytest.approx(1 / 3)
    assert stability.jaccard(first, first, sites, "head") == 0, "no weight of a head"


def test_votes_beat_a_lone_walk(model, monkeypatch, opened):
    common = hc.random_like(hc.top_fraction(hc.random_scores(model.bridge), 0.0005))
    lone = hc.top_fraction(
        hc.removal_effect(model.bridge, opened["harmful"].batches), 0.001, within="model"
    )
    walks = iter([[common, common], [common, lone], [lone - common, lone]])
    monkeypatch.setattr(stability, "SIZES", (0.0005, 0.0015))
    monkeypatch.setattr(stability, "search", lambda *_: next(walks))
    few, more = stability.three_walks(model, opened)
    assert (few & common).n_removed == pytest.approx(0.0005 * few.n_weights, rel=0.01)
    assert (more & lone).n_removed == lone.n_removed


def test_what_is_measured_of_a_pair(model, monkeypatch):
    monkeypatch.setattr(stability, "N_RANDOM", 1)
    labels = {
        "ladder": "shipped",
        "model": "sft",
        "method": "one shot",
        "pair": "halves",
        "draw": 0,
    }
    rows = stability.compared(FOLDER, "sft", "one shot", "halves", 0, labels)
    for size in stability.SIZES:
        found = rows.one("jaccard", size=size, level="weight", masks="searched").mean
        chance = rows.one("jaccard", size=size, level="weight", masks="random").mean
        assert 1 > found > 10 * chance > 0
    assert {row.labels["mask"] for row in rows.where("harm_valid_rate")} == {"first", "second"}
    table = tables.overlap_table(rows)
    assert list(table["size"]) == ["0.1%", "0.2%", "0.4%"]


def test_disjoint_searches_stop_when_harm_outlives_one(model, monkeypatch):
    everything = hc.top_fraction(hc.magnitude_scores(model.bridge), 1.0)
    none = hc.top_fraction(hc.random_scores(model.bridge), 1e-6, within="model")
    masks = [everything - mask_of(model, 0, 1), mask_of(model, 0), none]
    excluded = []

    def find_circuit(*_, exclude=None, **__):
        excluded.append(exclude)
        return masks[len(excluded) - 1]

    monkeypatch.setattr(Model, "find_circuit", find_circuit)
    labels = {"ladder": "shipped", "model": "sft", "method": "search", "pair": "disjoint"}
    labels |= {"draw": 0, "size": 0.002}
    rows = stability.disjoint(FOLDER, "sft", 0.002, labels)
    assert excluded == [None, masks[0]], "one weight alone leaves harm"
    table = tables.effect_table(rows)
    assert list(table["mask"]) == ["1", "2"]
    assert list(table["ends"]) == ["yes", "no"]
    assert list(table["spares"]) == ["no", "yes"], "everything removed spares nothing"
