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
from harmcircuits.measurements import Measurement, Rows

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


@pytest.mark.slow
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
