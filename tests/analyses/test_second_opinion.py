"""Tools that read activations, beside the masks.

Would catch: node scores that are not the derivative on shared keys and values, weights counted
twice or under the wrong head, a probe that is scored on what it was fitted on, writers that do not
add up to the logits, edits left in the model.
"""

import numpy as np
import pytest
import second_opinion as analysis
import torch
from transformer_lens import patching

import harmcircuits as hc
from harmcircuits.measurements import Rows
from harmcircuits.organisms import load_organism


@pytest.fixture(scope="module")
def model():
    return hc.open_model("sft")


def test_pairs_differ_in_one_thing(model):
    words = model.bridge.tokenizer.convert_ids_to_tokens
    pairs = analysis.contrasts(model, 5)
    harmful, recognition, parts = pairs["harmful"], pairs["recognition"], pairs["parts"]
    for contrast in pairs.values():
        assert (
            len(contrast.clean)
            == len(contrast.corrupt)
            == len(contrast.wanted)
            == len(contrast.other)
            == 5
        )
    assert all(words(row)[harmful.positions[0]] == "sure" for row in harmful.clean.tolist())
    differing = (harmful.clean != harmful.corrupt).any(0).nonzero().flatten().tolist()
    assert differing == [4, *(place + 1 for place in harmful.positions)], (
        "the verb and the operators"
    )
    assert (recognition.clean != recognition.corrupt).sum(1).tolist() == [1] * 5, "the verb"
    assert words(recognition.clean[0, -1].item()) == "<assistant>"
    for row in range(5):
        said = [parts.clean[row, place + 1].item() for place in parts.positions]
        assert said == parts.wanted[row].flatten().tolist()
        for place in harmful.positions:
            assert harmful.clean[row, place + 1] in harmful.wanted[row].flatten()
            assert harmful.corrupt[row, place + 1] in harmful.other[row].flatten()


def test_node_effects_are_derivatives_with_shared_keys_and_values(llama):
    # (metric with the head moved a step of its difference - metric) / step, at the corrupt run.
    generator = torch.Generator().manual_seed(0)
    clean, corrupt = torch.randint(3, 61, (2, 1, 7), generator=generator)
    contrast = analysis.Contrast(
        clean, corrupt, (4, 6), torch.tensor([[[5], [6]]]), torch.tensor([[[7], [8]]])
    )
    effects = analysis.node_effects(llama, contrast)
    assert llama.cfg.n_key_value_heads < llama.cfg.n_heads == effects.shape[2] - 1
    with torch.no_grad():
        _, source = llama.run_with_cache(clean)

        def metric(logits):
            return contrast.metric(0, logits.double())

        def a_step(corrupted, index, cache, step=0.01):
            _, position, head = index
            corrupted[:, position, head] += step * (
                cache[:, position, head] - corrupted[:, position, head]
            )
            return corrupted

        options = {"activation_name": "z", "index_axis_names": ("layer", "pos", "head")}
        moved = patching.generic_activation_patch(llama, corrupt, source, metric, a_step, **options)
        slope = (moved - metric(llama(corrupt))) / 0.01
    # float32 logits of order 10 over a step of 0.01, and the curvature over that step.
    torch.testing.assert_close(
        effects[0, :, :-1].permute(0, 2, 1), slope.float(), atol=5e-3, rtol=0.05
    )
    assert effects[0, :, :-1].abs().max() > 0.1


def test_weights_taken_add_up_and_belong_to_their_head(llama):
    mask = hc.top_fraction(hc.random_scores(llama), 0.2)
    rows = analysis.mask_rows(llama, mask, {})
    assert sum(row.mean for row in rows.where("mask_weights")) == pytest.approx(mask.n_removed)
    # Two key heads of 6 rows, each shared by two query heads.
    shape = mask.shapes["blocks.1.attn.k.weight"]
    one_row = {"blocks.1.attn.k.weight": torch.arange(6 * shape[1], 7 * shape[1])}
    second = hc.WeightMask(one_row, mask.shapes, mask.source)
    taken = {}
    for row in analysis.mask_rows(llama, second, {}).where("mask_weights"):
        if row.mean:
            taken[row.labels["layer"], row.labels["node"]] = row.mean
    assert taken == {(1, "head 2"): 12.0, (1, "head 3"): 12.0}
    whole = hc.top_fraction(hc.random_scores(llama), 1.0)
    assert {row.mean for row in analysis.mask_rows(llama, whole, {}).where("mask_share")} == {1.0}


def test_rank_correlation_has_its_closed_form():
    (same,) = analysis.correlation({}, [1, 2, 3, 4, 5, 6], [10, 20, 30, 40, 50, 60])
    assert (same.mean, same.low, same.high) == pytest.approx((1, 1, 1))
    # 1 - 6 sum d^2 / (n (n^2 - 1)) with d^2 = 1, 1, 0, 0.
    (swapped,) = analysis.correlation({}, [1, 2, 3, 4], [2, 1, 3, 4])
    assert swapped.mean == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert not analysis.correlation({}, [1, 2, 3], [5, 5, 5])


def test_writers_add_up_to_the_logits(model):
    pairs = analysis.contrasts(model, 3)
    harmful = pairs["harmful"]
    before = []
    for row in range(3):
        logits = model.bridge(harmful.clean[row : row + 1])
        before.append(harmful.metric(row, logits).item())
    bridge = load_organism("sft")
    bridge.enable_compatibility_mode()
    rows = analysis.writer_rows(bridge, harmful, {})
    whole = rows.one("logit_difference").mean
    assert whole == pytest.approx(np.mean(before), abs=1e-3), "folding changes no logit difference"
    assert sum(row.mean for row in rows.where("writes")) == pytest.approx(whole, abs=1e-3)


def test_probes_are_scored_on_what_was_left_out(model):
    rows = analysis.probe_rows(model, {}, {}, 32)
    for asked in ("question", "request"):
        start = rows.where("probe_accuracy", asked=asked, depth="0 pre")
        assert {row.mean for row in start} == {0.5}, (
            "the token before the answer is always the same"
        )
        end = rows.one("probe_accuracy", asked=asked, depth="3 post", unseen="items")
        assert end.mean == 1
        assert 0 < end.n < 64
    accuracy, transfer = (rows.where(metric) for metric in ("probe_accuracy", "probe_transfer"))
    assert [row.mean for row in accuracy] == [row.mean for row in transfer], (
        "no mask: the same probe"
    )


def test_main_runs_and_speaks_of_its_rows(tmp_path, monkeypatch, capsys, model):
    weights = {
        name: weight.detach().clone() for name, weight in hc.named_weights(model.bridge).items()
    }
    scores = hc.random_scores(model.bridge)
    masks = {name: hc.top_fraction(scores, 0.006) for name in ("harmful", "benign", "recognition")}
    monkeypatch.setattr(analysis, "find_circuits", lambda *_: masks)
    monkeypatch.setattr(hc, "open_model", lambda _: model)
    analysis.main(out=tmp_path / "out", n=3, n_probed=16)
    rows = Rows.read(tmp_path / "out" / "rows.jsonl")
    assert all(row.low <= row.mean <= row.high for row in rows)
    assert len(rows.where("node_importance")) == 4 * 4 * 5
    page = (tmp_path / "out" / "second_opinion.html").read_text(encoding="utf-8")
    assert page.count("<section>") == page.count("Plotly.newPlot(") == 5
    with_recognition = {"ranking": "importance of harmful", "against": "importance of recognition"}
    rho = rows.one("rank_correlation", among="all nodes", **with_recognition)
    assert f"harmful answers with recognition {rho:.2f}" in capsys.readouterr().out
    assert all(
        torch.equal(weight, weights[name])
        for name, weight in hc.named_weights(model.bridge).items()
    )
