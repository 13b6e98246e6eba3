"""Scores as files, their sums over masks, and their means over parts of the data.

Would catch: an order of matrices that a file changes, parts that weigh by their number.
"""

import copy
import pickle

import pytest
import torch
from helpers import random_batch

from harmcircuits.circuits import scores as scores_module
from harmcircuits.circuits.masks import WeightMask
from harmcircuits.circuits.scores import Source, WeightScores, mean_scores
from harmcircuits.search.attribution import removal_effect, snip_scores

SOURCE = Source("model", "test", {"seed": 1}, (Source("model", "parent"),))
# An order that sorting by name would change.
SHAPES = {"w2": (4, 6), "w10": (3, 5), "w1": (2, 3, 4)}


@pytest.fixture
def scores() -> WeightScores:
    torch.manual_seed(0)
    values = {name: torch.randint(-2, 3, shape).float() for name, shape in SHAPES.items()}
    return WeightScores(values, SOURCE)


def test_the_sum_over_a_mask_by_hand():
    values = {"a": torch.tensor([[1.0, 2.0], [-4.0, 8.0]]), "b": torch.tensor([[0.5, 100.0]])}
    scores = WeightScores(values, SOURCE)
    removed = {"a": torch.tensor([0, 2, 3]), "b": torch.tensor([0])}
    assert scores.sum_over(WeightMask(removed, scores.shapes, SOURCE)) == 1 - 4 + 8 + 0.5


def test_the_mean_of_parts_is_the_score_of_the_whole(llama):
    """Signed and absolute scores over all examples, from two parts of three and two examples."""
    batches = [random_batch(), random_batch(2, 7, seed=1)]
    for method in (removal_effect, snip_scores):
        whole = method(llama, batches)
        parts = [method(llama, [batch]) for batch in batches]
        mean = mean_scores(parts, [3, 2])
        for name, value in whole.values.items():
            torch.testing.assert_close(mean.values[name], value, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(("shard_bytes", "n_shards"), [(160, 2), (2**31, 1)])
def test_saved_scores_are_read_from_their_files(
    tmp_path, monkeypatch, scores, shard_bytes, n_shards
):
    monkeypatch.setattr(scores_module, "SHARD_BYTES", shard_bytes)
    scores.save(tmp_path)
    assert len(list(tmp_path.iterdir())) == n_shards
    loaded = WeightScores.load(tmp_path)
    assert list(loaded.values) == list(scores.values), "ties go to the earlier matrix"
    assert loaded.source == scores.source
    for name, value in scores.values.items():
        assert torch.equal(loaded.values[name], value)
        assert torch.equal((-loaded).values[name], -value)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))]
)
def test_a_copy_of_scores_holds_all_of_them_and_stays_read_only(scores, duplicate):
    other = duplicate(scores)
    assert other.source == scores.source and list(other.values) == list(scores.values)
    for name, value in scores.values.items():
        assert torch.equal(other.values[name], value)
        other.values[name].zero_()
        assert value.any(), "nothing is shared"
    with pytest.raises(TypeError):
        other.values["w1"] = torch.zeros(2)


def test_folders_that_hold_no_scores_are_refused(tmp_path, monkeypatch, scores):
    with pytest.raises(ValueError, match="no scores there"):
        WeightScores.load(tmp_path / "missing")
    monkeypatch.setattr(scores_module, "SHARD_BYTES", 1)
    scores.save(tmp_path / "scores")
    with pytest.raises(ValueError, match="not empty"):
        scores.save(tmp_path / "scores")
    next((tmp_path / "scores").iterdir()).unlink()
    with pytest.raises(ValueError, match="a shard is missing"):
        WeightScores.load(tmp_path / "scores")
    WeightMask({}, SHAPES, SOURCE).save(tmp_path / "mask" / "m.safetensors")
    with pytest.raises(ValueError, match="no scores of harmcircuits"):
        WeightScores.load(tmp_path / "mask")


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_is_refused(scores):
    zeros = torch.zeros(2)
    refusals = [
        (lambda: WeightScores({"w1": torch.tensor([1.0, torch.inf])}, SOURCE), "not finite"),
        # The selection reads their bits as those of float32: it would choose other weights.
        (lambda: WeightScores({"w0": zeros, "w1": zeros.double()}, SOURCE), "w1 is torch.float64"),
        (lambda: mean_scores([scores, WeightScores({}, SOURCE)], [1, 1]), "different"),
    ]
    for call, word in refusals:
        with pytest.raises(ValueError, match=word):
            call()
