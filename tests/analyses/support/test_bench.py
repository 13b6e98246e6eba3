"""The bench reads its areas off rows, and every way gives edits of the sizes wanted.

Would catch: a mask beyond the budget that counts, an area without its cap, a way that leaves the
model edited, an interval that does not resample ladders, a setting chosen that is not the best.
"""

import numpy as np
import pytest
import torch
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
        Measurement.exact(f"search_{name}", {"method": "m"}, 3) for name in ("seconds", "passes")
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
    assert (found.ends_at, found.degenerate) == (SIZES[2], 0.25)


@pytest.mark.parametrize(
    "broken",
    [{"benign_nll": [0.3, 0.3, 0.33]}, {"refusal_rate": [0.9, 0.9, 0.88]}],
)
def test_what_breaks_something_else_does_not_count(broken):
    found = results.taken(rows_of([1.0, 0.5, 0.0], [0.3, 1.3, 5.3], **broken))
    assert (found.ends_at, found.rate, found.nats) == (None, 0.5, 1.0)


def test_the_interval_resamples_ladders():
    def ratio(values: np.ndarray) -> float:
        return values[:, 0].sum() / values[:, 1].sum()

    # One ladder of three is 1 and the others 3: a resample has none of it, or only it.
    mixed = {("a", "sft", part): (1.0, 1.0) for part in ("all", "A", "B")}
    mixed |= {(ladder, "sft", "all"): (3.0, 1.0) for ladder in "bc"}
    assert results.resampled(mixed, ratio) == (1.0, 3.0)


def test_the_best_settings_are_chosen_and_ties_stay_published():
    rows = []
    for number, area in enumerate([1.0, 2.0, 2.0]):
        labels = {"way": "w", "number": number, "p": float(number)}
        rows.append(Measurement.exact("area_nats", labels, area))
    assert cases.tuned(Rows(rows)) == {"w": {"p": 1.0}}


@pytest.mark.slow
@pytest.mark.parametrize("way", [name for name in methods.WAYS if "search" not in name])
def test_a_way_gives_edits_of_every_size_and_leaves_the_model_alone(sft, way):
    data = sft.calibrations(["harmful", "benign"])
    before = {name: weight.clone() for name, weight in hc.named_weights(sft.bridge).items()}
    settings = dict(methods.WAYS[way].published)
    if way == "learned mask":
        settings["steps"] = 3
    edits = methods.WAYS[way].choose(sft, data, SIZES, **settings)
    for name, weight in hc.named_weights(sft.bridge).items():
        assert torch.equal(weight, before[name])

    n_weights = sum(weight.numel() for weight in before.values())
    # The differences and the search remove less than their size, rows and matrices round up.
    n_scopes = sum(weight.shape[0] for weight in before.values())
    for edit, size in zip(edits, SIZES, strict=True):
        assert 0 < edit.n_removed <= size * n_weights + n_scopes
        if "difference" not in way and way != "Wanda pruning":
            assert edit.n_removed == pytest.approx(size * n_weights, abs=1)
