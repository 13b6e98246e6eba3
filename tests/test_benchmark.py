"""The baselines compute what they are said to, and a run gives every figure.

Would catch: a contender that skips work, a baseline of another quantity, gradients left behind, a
figure without rows.
"""

from dataclasses import replace

import benchmark
import pytest
import torch

import harmcircuits as hc
from harmcircuits.measurements import Rows

TINY = replace(benchmark.SHAPES["organism"], width=32, layers=2, examples=6, length=8, batch_size=4)


@pytest.fixture(scope="module")
def bridge():
    return benchmark.random_bridge(TINY, "cpu", torch.float32)


def test_the_baselines_are_the_library_s_scores(bridge):
    batches, weights = benchmark.random_batches(TINY), hc.named_weights(bridge)
    plain = benchmark.plain(bridge, batches)
    signed = hc.removal_effect(bridge, batches, hc.completion_loss)
    absolute = hc.snip_scores(bridge, batches, hc.completion_loss)
    for scheme, precision in (
        (benchmark.one_by_one, 1e-4),
        (benchmark.layer_by_layer, 0.05),
    ):  # bfloat16: 8 bits
        for name, total in scheme(bridge, batches).items():
            score = (weights[name].abs() * total.float() / 6).detach()
            error = (score - absolute.values[name]).norm() / absolute.values[name].norm()
            assert error < precision, name
    for name, gradient in plain.items():
        torch.testing.assert_close(
            -weights[name].detach() * gradient / 6, signed.values[name], rtol=1e-3, atol=1e-7
        )
    assert plain.keys() == weights.keys()
    assert all(parameter.grad is None for parameter in bridge.parameters())


def test_a_run_gives_every_figure(bridge, tmp_path):
    labels = {"shape": "tiny", "machine": "CPU", "grown": "none"}
    rows = benchmark.compared(bridge, TINY, labels, "cpu", turns=2, few=1)
    rows += benchmark.mask_rows(bridge, labels, "cpu", 2, n_weights=100)
    assert rows.one(method="mask").labels["weights"] == 100
    sizes = {"n_sets": 2, "n_requests": 3, "max_new_tokens": 2}
    rows += benchmark.answer_rows(bridge, labels, "cpu", turns=2, **sizes)
    assert rows.one("ratio_to_together", method="answers, together").mean == 1
    assert {row.labels["answers"] for row in rows.where("ratio_to_together")} == {6}
    rows += benchmark.peak_rows(rows, labels, 1e12, is_given=True)
    methods = ["plain", "removal effect", "SNIP", "bounded", "one by one", "layer by layer"]
    for metric in ("seconds", "ratio_to_plain", "tokens_per_second", "peak_bytes"):
        assert [row.labels["method"] for row in rows.where(metric)][:6] == methods
    assert all(row.low <= row.mean <= row.high for row in rows)
    assert rows.one("ratio_to_plain", method="plain").mean == 1
    shares = {row.labels["method"]: row.mean for row in rows.where("share_of_peak")}
    speeds = {row.labels["method"]: row.mean for row in rows.where("flop_per_second")}
    assert shares == {name: speed / 1e12 for name, speed in speeds.items()}
    assert shares.keys() == {"plain", "removal effect"}
    benchmark.show(rows, tmp_path / "page.html")
    assert "layer by layer" in (tmp_path / "page.html").read_text()


def test_growth_is_the_time_in_units_of_before():
    labels = {
        "shape": "tiny",
        "device": "cpu",
        "machine": "CPU",
        "dtype": "float32",
        "method": "plain",
    }
    before = benchmark.middle("seconds", {**labels, "grown": "none"}, [1.0, 2.0, 4.0])
    after = benchmark.middle("seconds", {**labels, "grown": "layers"}, [3.0, 5.0, 8.0])
    (row,) = benchmark.growth_rows(Rows([before, after]))
    assert (row.mean, row.low, row.high) == (2.5, 0.75, 8.0)
    assert row.labels == {**labels, "grown": "layers"}
    (panel,) = benchmark.growth_figure(Rows([row])).figure.axes
    assert [bar.get_height() for bar in panel.patches] == [2.5]


def test_matrix_products_have_a_speed():
    assert 1e5 < benchmark.matmul_flops("cpu", torch.float32, size=64) < 1e15


def test_growth_doubles_one_thing():
    before = TINY.configuration()
    for what, shape in benchmark.grown(TINY).items():
        after = shape.configuration()
        assert after.hidden_size == before.hidden_size * (2 if what == "width" else 1)
        assert after.num_hidden_layers == before.num_hidden_layers * (2 if what == "layers" else 1)
        assert shape.examples * shape.length == TINY.examples * TINY.length * (
            2 if what in ("examples", "length") else 1
        )
