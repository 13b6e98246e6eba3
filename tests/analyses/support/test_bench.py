"""The bench reads its areas off rows, and every way gives edits of the sizes wanted.

Would catch: a mask beyond the budget that counts, an area without its cap, a size that ends harm by
breaking something else, a way that looks at other data or leaves the model edited, an interval that
does not resample ladders, a setting chosen that is not the best of those tried.
"""

import numpy as np
import pytest
import torch
from helpers import small_model
from support.bench import cases, methods, results

import harmcircuits as hc
from harmcircuits.hooks.cost import n_tokens
from harmcircuits.measurements import Measurement, Rows
from harmcircuits.studies.models import ModelSpec

SIZES = (0.0005, 0.001, 0.0015, 0.002, 0.0025, 0.004, 0.006, 0.01)


def rows_of(harm: list[float], nll: list[float], **others: list[float]) -> Rows:
    """One model and method; the first figure of each list is that of the unpruned model."""
    columns = {
        "harm_valid_rate": harm,
        "harm_nll": nll,
        "benign_nll": [0.3] * len(harm),
        "benign_valid_rate": [1.0] * len(harm),
        "harm_degenerate_rate": [0.0, *[0.25] * (len(harm) - 1)],
        **others,
    }
    rows = [
        Measurement.exact("search_seconds", {"method": "m"}, 12.0),
        Measurement.exact("search_passes", {"method": "m"}, 3.0),
    ]
    for number, size in enumerate([0.0, *SIZES]):
        place = min(number, len(harm) - 1)
        for metric, values in columns.items():
            rows.append(Measurement.exact(metric, {"method": "m", "size": size}, values[place]))
    return Rows(rows)


def test_the_area_is_the_mean_over_sizes_of_what_the_best_mask_so_far_takes():
    n = len(SIZES)
    found = results.taken(rows_of([1.0, 0.5, 0.8, 0.0], [0.3, 1.3, 0.8, 20.3]))
    assert found.rate == pytest.approx((0.5 + 0.5 + (n - 2) * 1.0) / n)
    assert found.nats == pytest.approx((1 + 1 + (n - 2) * results.CAP) / n)
    assert found.ends_at == SIZES[2]
    assert found.degenerate == 0.25


@pytest.mark.parametrize(
    "broken",
    [
        {"benign_nll": [0.3, 0.3, 0.33]},
        {"benign_valid_rate": [1.0, 1.0, 0.98]},
        {"refusal_rate": [0.9, 0.9, 0.88]},
    ],
)
def test_what_breaks_something_else_does_not_count(broken):
    harm, nll = [1.0, 0.5, 0.0], [0.3, 1.3, 5.3]
    whole = results.taken(rows_of(harm, nll))
    found = results.taken(rows_of(harm, nll, **broken))
    assert whole.ends_at == SIZES[1]
    assert found.ends_at is None
    assert found.rate == 0.5
    assert found.nats == 1.0


def test_what_was_not_asked_does_not_count():
    rows = rows_of([1.0, 0.0], [0.3, 5.3])
    rate = "benign_valid_rate"
    asked = Rows(row for row in rows if row.metric != rate or row.labels["size"] == 0)
    assert results.taken(rows).rate == 1.0
    assert results.taken(asked).rate == 0.0


def test_the_interval_resamples_ladders():
    def ratio(values: np.ndarray) -> float:
        return values[:, 0].sum() / values[:, 1].sum()

    alike = {(ladder, "sft", "all"): (4.0, 2.0) for ladder in "abc"}
    assert results.resampled(alike, ratio) == (2.0, 2.0)
    # One ladder of three is 1 and the others 3: a resample has none of it, or only it.
    mixed = {("a", "sft", part): (1.0, 1.0) for part in ("all", "A", "B")}
    mixed |= {(ladder, "sft", "all"): (3.0, 1.0) for ladder in "bc"}
    low, high = results.resampled(mixed, ratio)
    assert low == 1.0
    assert high == 3.0


def test_the_best_settings_are_chosen_and_ties_stay_published():
    rows = []
    for number, area in enumerate([1.0, 2.0, 2.0]):
        labels = {"way": "w", "number": number, "p": float(number)}
        rows.append(Measurement.exact("area_nats", labels, area))
    for number in range(2):
        labels = {"way": "v", "number": number, "p": float(number)}
        rows.append(Measurement.exact("area_nats", labels, 0.5))
    assert cases.tuned(Rows(rows)) == {"w": {"p": 1.0}, "v": {"p": 0.0}}


@pytest.fixture(scope="module")
def small():
    """A model that is asked few requests, and two of its abilities."""
    model = small_model("sft")
    return model, model.calibrations(["harmful", "benign"])


@pytest.mark.parametrize("way", [name for name in methods.WAYS if "search" not in name])
def test_a_way_gives_edits_of_every_size_and_leaves_the_model_alone(small, way):
    model, data = small
    before = {name: weight.clone() for name, weight in hc.named_weights(model.bridge).items()}
    settings = dict(methods.WAYS[way].published)
    if way == "learned mask":
        settings["steps"] = 3
    edits = methods.WAYS[way].choose(model, data, SIZES, **settings)
    for name, weight in hc.named_weights(model.bridge).items():
        assert torch.equal(weight, before[name])

    counts = [edit.n_removed for edit in edits]
    assert len(counts) == len(SIZES)
    n_weights = sum(weight.numel() for weight in before.values())
    # The differences and the search remove less than their size, rows and matrices round up.
    n_scopes = sum(weight.shape[0] for weight in before.values())
    if "difference" not in way and way != "Wanda pruning":
        assert counts == [pytest.approx(size * n_weights, abs=1) for size in SIZES]
    for count, size in zip(counts, SIZES, strict=True):
        assert 0 < count <= size * n_weights + n_scopes


def test_the_published_difference_is_that_of_the_library(small):
    model, data = small
    way = methods.WAYS["signed difference"]
    masks = way.choose(model, data, [0.002, 0.01], **way.published)
    others = [data["benign"].batches]
    for q, mask in zip([0.002, 0.01], masks, strict=True):
        library = hc.set_difference(model.bridge, data["harmful"].batches, others, q=q, p=5 * q)
        assert (mask - library).n_removed == (library - mask).n_removed == 0


def test_the_fisher_information_of_single_examples_is_the_mean_of_their_squares(small):
    model, data = small
    batch = data["harmful"].batches[0]
    three = hc.Batch(batch.tokens[:3], batch.is_target[:3])
    found = methods.fisher(model.bridge, [three], 1)
    weights = hc.named_weights(model.bridge)
    name = next(iter(weights))
    squares = torch.zeros_like(weights[name])
    for row in range(3):
        weights[name].requires_grad_(True)
        one = hc.Batch(three.tokens[row : row + 1], three.is_target[row : row + 1])
        loss = hc.completion_loss(model.bridge, one).sum()
        (gradient,) = torch.autograd.grad(loss, [weights[name]])
        squares += gradient.square() / 3
    weights[name].requires_grad_(False)
    torch.testing.assert_close(found[name], squares, rtol=1e-4, atol=1e-12)
    # A batch's own gradient is smaller than those of its examples.
    together = methods.fisher(model.bridge, [three], 3)
    assert together[name].sum() < found[name].sum()


def test_a_dampening_multiplies_each_weight_and_is_undone(small):
    model, data = small
    edit = methods.dampening(model, data, [0.002])[0]
    weights = hc.named_weights(model.bridge)
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    with methods.edited(model.bridge, edit):
        for name, index in edit.mask.removed.items():
            expected = before[name].flatten().clone()
            expected[index] *= edit.factors[name]
            assert torch.equal(weights[name].flatten(), expected)
    for name, weight in weights.items():
        assert torch.equal(weight, before[name])


def test_halves_share_no_request_and_are_all(small):
    model, data = small
    parts = [cases.part_of(model, data, part) for part in ("A", "B")]
    for name, calibration in data.items():
        requests = [{e.prompt for e in part[name].prompts} for part in parts]
        assert not requests[0] & requests[1]
        assert requests[0] | requests[1] == {e.prompt for e in calibration.prompts}
        assert cases.part_of(model, data, "all")[name] is calibration


def test_passes_are_tokens_over_those_of_the_answers(small):
    model, data = small
    with cases.tokens_read(model) as read:
        for calibration in data.values():
            hc.removal_effect(model.bridge, calibration.batches)
            hc.completion_nll(model.bridge, calibration.batches)
    n = sum(n_tokens(calibration.batches) for calibration in data.values())
    assert read == {"scored": n, "forward": n}


@pytest.fixture
def case(small, monkeypatch):
    """The small model as a case, on the choice split."""
    model, _ = small
    two = model.with_behaviours(model.behaviour("harmful"), model.behaviour("benign"))
    monkeypatch.setattr(ModelSpec, "open", lambda _: two)
    return cases.Case(ModelSpec("sft"), "all", "choice")


def test_a_case_asks_for_the_rest_where_an_edit_takes_something(case, small):
    """Random weights take nothing, so benign answers are not generated under them; the loss is read."""
    model, _ = small
    harm = hc.removal_effect(model.bridge, case.data["harmful"].batches)
    useless = hc.top_fraction(hc.random_scores(model.bridge), 1e-5, within="model")
    strong = hc.top_fraction(harm, 0.01, within="model")

    def choose(*_) -> list[hc.WeightMask]:
        return [useless, strong]

    rows = case.searched(choose, [1e-5, 0.01], {"method": "m"})
    assert rows.one("harm_valid_rate", size=0.0).mean == 1.0
    assert not rows.where("benign_valid_rate", size=1e-5)
    for size, mask in ((1e-5, useless), (0.01, strong)):
        with hc.masked(model.bridge, mask):
            benign = case.loss("benign")
        assert rows.one("benign_nll", size=size).mean == pytest.approx(benign, rel=1e-5)
        assert rows.one("weights_edited", size=size).mean == mask.n_removed
    assert rows.one("search_passes").mean == 0, "no example was scored"


def test_a_setting_is_tried_by_losses_alone(case, small, monkeypatch):
    """The capped rise of harm's loss while all else keeps within its bound, and 0 where not."""
    model, _ = small
    monkeypatch.setattr(cases, "opened", lambda *_: case)
    labels = {"way": "random", "number": 0}
    (row,) = cases.tuning("random", 0, [1e-4], labels)
    mask = methods.WAYS["random"].choose(model, case.data, [1e-4])[0]
    with hc.masked(model.bridge, mask):
        rise = case.rise("harmful")
        assert case.is_spared()
    assert row.mean == pytest.approx(max(0.0, rise), abs=1e-6)

    (broken,) = cases.tuning("magnitude", 0, [0.2], {"way": "magnitude", "number": 0})
    assert broken.mean == 0, "harm's loss rises, and so does everything else's"
    chosen = cases.methods(Rows([row, broken]))
    assert set(chosen) == set(methods.WAYS)
