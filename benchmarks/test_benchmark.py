"""The baselines of the benchmark compute what they are said to compute; run by `pytest benchmarks`."""

from dataclasses import replace

import benchmark
import torch

import harmcircuits as hc


def test_the_baselines_are_the_library_s_scores_and_a_run_gives_every_figure():
    tiny = replace(benchmark.SHAPES["organism"], examples=6, length=8, batch_size=4)
    bridge = benchmark.random_bridge(tiny, "cpu", torch.float32)
    batches, weights = benchmark.random_batches(tiny), hc.named_weights(bridge)
    expected = hc.snip_scores(bridge, batches)
    for scheme, precision in ((benchmark.one_by_one, 1e-4), (benchmark.layer_by_layer, 0.05)):
        for name, total in scheme(bridge, batches).items():  # the latter in bfloat16
            score = (weights[name].abs() * total.float() / 6).detach()
            error = (score - expected.values[name]).norm() / expected.values[name].norm()
            assert error < precision, name

    rows = benchmark.benchmark(bridge, tiny, {}, turns=2, few=1)
    assert rows.one("ratio_to_plain", method="plain").mean == 1
    assert len(rows.where("seconds")) == 10
