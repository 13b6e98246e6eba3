"""Scores as files, their sums over masks, and their means over parts of the data.

Would catch: a shard that is lost, an order of matrices that a file changes, a file of something
else read as scores, a predicted change over the wrong weights, parts that weigh by their number and
not by their examples.
"""

import pytest
import torch
from helpers import random_batch

from harmcircuits.circuits.masks import FORMAT as mask_format
from harmcircuits.circuits.masks import WeightMask, top_fraction
from harmcircuits.circuits.scores import FORMAT as scores_format
from harmcircuits.circuits.scores import Source, WeightScores, mean_scores
from harmcircuits.hooks.attribution import random_scores, removal_effect, snip_scores
from harmcircuits.hooks.objectives import completion_loss
from harmcircuits.organisms import FOLDER

SOURCE = Source("model", "test", {"seed": 1}, (Source("model", "parent"),))
SHAPES = {
    "w2": (4, 6),
    "w10": (3, 5),
    "w1": (2, 3, 4),
}  # an order that sorting by name would change


@pytest.fixture
def scores() -> WeightScores:
    generator = torch.Generator().manual_seed(0)
    values = {}
    for name, shape in SHAPES.items():
        values[name] = torch.randint(-2, 3, shape, generator=generator).float()
    return WeightScores(values, SOURCE)


def test_scores_that_are_not_finite_are_refused_by_name():
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="w1 holds a score that is not finite"):
            WeightScores({"w0": torch.zeros(2), "w1": torch.tensor([1.0, value])}, SOURCE)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
@pytest.mark.usefixtures("unchecked")
def test_scores_of_another_dtype_are_refused_by_name(dtype):
    """The selection reads their bits as those of float32: it would choose other weights."""
    with pytest.raises(ValueError, match=r"w1 is torch\.\w+; expected torch\.float32"):
        WeightScores({"w0": torch.zeros(2), "w1": torch.zeros(2, dtype=dtype)}, SOURCE)


def test_the_sum_over_a_mask_by_hand():
    values = {"a": torch.tensor([[1.0, 2.0], [-4.0, 8.0]]), "b": torch.tensor([[0.5, 100.0]])}
    scores = WeightScores(values, SOURCE)
    removed = {"a": torch.tensor([0, 2, 3]), "b": torch.tensor([0])}
    assert scores.sum_over(WeightMask(removed, scores.shapes, SOURCE)) == 1 - 4 + 8 + 0.5
    assert scores.sum_over(WeightMask({}, scores.shapes, SOURCE)) == 0


def test_the_mean_of_parts_is_the_score_of_the_whole(llama):
    """Signed and absolute scores over all examples, from two parts of three and two examples."""
    batches = [random_batch(), random_batch(2, 7, seed=1)]
    for method in (removal_effect, snip_scores):
        whole = method(llama, batches, completion_loss)
        parts = [method(llama, [batch], completion_loss) for batch in batches]
        mean = mean_scores(parts, [3, 2])
        for name, value in whole.values.items():
            torch.testing.assert_close(mean.values[name], value, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(
    ("n_parts", "weights"), [(0, []), (1, [1, 2]), (1, [0]), (2, [-1, 2])], ids=str
)
def test_parts_and_weights_that_do_not_fit_are_refused(llama, n_parts, weights):
    with pytest.raises(ValueError, match=r"mean_scores: .*(give|expected)"):
        mean_scores([random_scores(llama)] * n_parts, weights)


# Files


@pytest.mark.parametrize(("shard_bytes", "n_shards"), [(1, 3), (160, 2), (2**31, 1)])
def test_saved_scores_are_read_from_their_shards(tmp_path, scores, shard_bytes, n_shards):
    scores.save(tmp_path, shard_bytes=shard_bytes)
    assert len(list(tmp_path.iterdir())) == n_shards
    loaded = WeightScores.load(tmp_path)
    assert list(loaded.values) == list(scores.values), "ties go to the earlier matrix"
    assert loaded.source == scores.source
    assert loaded.shapes == scores.shapes
    assert repr(loaded) == repr(scores)
    for name, value in scores.values.items():
        assert torch.equal(loaded.values[name], value)
        assert torch.equal((-loaded).values[name], -value)

    exclude = top_fraction(scores, 0.2, within="row")
    for within in ("weight", "model", "row"):
        mask = top_fraction(loaded, 0.3, within=within, exclude=exclude)
        expected = top_fraction(scores, 0.3, within=within, exclude=exclude)
        assert mask.removed.keys() == expected.removed.keys()
        for name, index in expected.removed.items():
            assert torch.equal(mask.removed[name], index)


def test_folders_that_hold_no_scores_are_refused(tmp_path, scores):
    with pytest.raises(ValueError, match="missing: no scores there; expected"):
        WeightScores.load(tmp_path / "missing")
    scores.save(tmp_path / "scores", shard_bytes=1)
    with pytest.raises(ValueError, match="scores exists and is not empty; give a new folder"):
        scores.save(tmp_path / "scores")
    next((tmp_path / "scores").iterdir()).unlink()
    with pytest.raises(ValueError, match=r"a shard is missing.*save them again"):
        WeightScores.load(tmp_path / "scores")

    folder = tmp_path / "mask"
    folder.mkdir()
    WeightMask({}, scores.shapes, SOURCE).save(folder / "m.safetensors")
    with pytest.raises(ValueError, match=r"m\.safetensors: .*no scores of harmcircuits"):
        WeightScores.load(folder)
    (folder / "a.safetensors").write_text("hello")
    with pytest.raises(ValueError, match=r"a\.safetensors: not a safetensors file"):
        WeightScores.load(folder)


def test_the_names_of_file_formats_stay():
    """Files of version 0.1.0 open: their format is known by these names."""
    assert scores_format == "harmcircuits.scores.1"
    assert mask_format == "harmcircuits.mask.1"
    assert WeightMask.load(FOLDER / "planted" / "circuit.safetensors").n_removed == 98_304
