"""The bench reads its areas off rows, and every method gives masks of the sizes wanted.

Would catch: a mask beyond the budget that counts, an area without its cap, a size that ends harm by
breaking something else, a method that looks at other data or gives masks in another order.
"""

from importlib import import_module
from pathlib import Path

import pytest
from helpers import small_model

from harmcircuits.measurements import Measurement, Rows

bench = import_module("search_bench")


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
    rows = [Measurement.exact("search_seconds", {"method": "m"}, 12.0)]
    for number, size in enumerate([0.0, *bench.SIZES]):
        place = min(number, len(harm) - 1)
        for metric, values in columns.items():
            rows.append(Measurement.exact(metric, {"method": "m", "size": size}, values[place]))
    return Rows(rows)


def test_the_area_is_the_mean_over_sizes_of_what_the_best_mask_so_far_takes():
    n = len(bench.SIZES)
    found = bench.taken(rows_of([1.0, 0.5, 0.8, 0.0], [0.3, 1.3, 0.8, 20.3]))
    assert found["area, rate"] == round((0.5 + 0.5 + (n - 2) * 1.0) / n, 2)
    assert found["area, nats"] == round((1 + 1 + (n - 2) * bench.CAP) / n, 2)
    assert found["ends at"] == f"{bench.SIZES[2]:.2%}"
    assert found["degenerate"] == "25%"


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
    whole = bench.taken(rows_of(harm, nll))
    found = bench.taken(rows_of(harm, nll, **broken))
    assert whole["ends at"] == f"{bench.SIZES[1]:.2%}"
    assert found["ends at"] == "-"
    assert found["area, rate"] == 0.5
    assert found["area, nats"] == 1.0


@pytest.fixture(scope="module")
def small():
    """A model that is asked few requests, and two of its abilities."""
    model = small_model("sft")
    return model, model.calibrations(["harmful", "benign"])


@pytest.mark.parametrize("method", [name for name in bench.METHODS if "search" not in name])
def test_a_method_gives_a_mask_of_every_size(small, method):
    model, data = small
    masks = bench.METHODS[method](model, data)
    assert len(masks) == len(bench.SIZES)
    counts = [mask.n_removed for mask in masks]
    # The differences remove less than their size, and not always more at a larger one.
    if method not in ("published", "unsigned", "Wanda"):
        assert counts == sorted(counts)
        assert counts[-1] == pytest.approx(bench.SIZES[-1] * masks[0].n_weights, rel=0.01)
    for mask, size in zip(masks, bench.SIZES, strict=True):
        assert mask.n_removed <= size * mask.n_weights * 1.01 + len(mask.shapes)


def test_the_readmes_quote_the_committed_rows():
    folder = Path(bench.__file__).parent
    rows = Rows.read(folder / "rows" / "search_bench.jsonl")
    text = bench.table(rows).to_string(index=False)
    assert text in (folder / "README.md").read_text(encoding="utf-8")
    assert bench.summary(rows) in (folder.parent / "README.md").read_text(encoding="utf-8")
