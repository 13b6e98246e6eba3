"""Activation patching on top of a mask.

Would catch: a patch of the residual between attention and MLP that misses the skip connection, a
share with the wrong end as 1, positions that do not line up, a division by a gap that is not there,
edits or flags left in the model.
"""

import activation_patching as analysis
import pytest
import torch
from conftest import random_batch

import harmcircuits as hc
from harmcircuits.measurements import Rows

NAMES = [f"p{number}" for number in range(9)]


def random_mask(bridge, share: float = 0.3, *, kinds: tuple[str, ...] = ()) -> hc.WeightMask:
    mask = hc.top_fraction(hc.random_scores(bridge), share)
    removed = {
        name: index for name, index in mask.removed.items() if not kinds or name.startswith(kinds)
    }
    return hc.WeightMask(removed, mask.shapes, mask.source)


def rows_of(bridge, mask, batch, parts=("residual",), **options):
    groups = [str(number) for number in range(len(batch))]
    return analysis.patched_rows(bridge, mask, batch, NAMES, groups, {}, parts, **options)


@pytest.fixture
def big_gap():
    return random_batch(6, seed=1)


def residual(rows, metric="patch_share", **labels):
    whole = rows.where(metric, component="residual", position="all", **labels)
    return {row.labels["layer"]: row for row in whole}


@pytest.mark.parametrize("direction", ["restore", "destroy"])
def test_the_last_residual_moves_all_and_the_first_nothing(llama, big_gap, direction):
    shares = residual(rows_of(llama, random_mask(llama), big_gap), direction=direction)
    assert list(shares) == ["0 pre", "0 mid", "1 pre", "1 mid", "1 post"], "in order of depth"
    assert shares["1 post"].mean == pytest.approx(1, abs=1e-4)
    assert shares["0 pre"].mean == 0, "no mask touches the embedding"
    assert abs(shares["1 mid"].mean - 1) > 0.01, "the last MLP is edited too"


@pytest.mark.parametrize(
    ("kinds", "depth"), [(("blocks.1.attn",), "1 mid"), (("blocks.0",), "1 pre")]
)
def test_all_is_restored_once_every_edit_is_passed(llama, big_gap, kinds, depth):
    # With edits only before this depth, everything after it is the unpruned model: shares of 0
    # before and 1 from here.
    mask = random_mask(llama, 0.9, kinds=kinds)
    shares = residual(rows_of(llama, mask, big_gap, least_gap=1e-3), direction="restore")
    order = list(shares)
    for before in order[: order.index(depth) - 1]:
        assert shares[before].mean == pytest.approx(0, abs=1e-3)
    for after in order[order.index(depth) :]:
        assert shares[after].mean == pytest.approx(1, abs=1e-3)


def test_one_position_of_the_middle_residual_reaches_the_skip_connection(llama):
    # At the last layer positions no longer mix, so single patches of a position that predicts
    # nothing change nothing, and with one target the position before it moves everything.
    tokens = random_batch(4, seed=2).tokens
    is_target = torch.zeros_like(tokens, dtype=torch.bool)
    is_target[:, 5] = True
    rows = rows_of(
        llama,
        random_mask(llama, 0.6, kinds=("blocks.0", "blocks.1.attn")),
        hc.Batch(tokens, is_target),
    )
    cells = rows.where("patch_share", component="residual", layer="1 mid", direction="restore")
    assert {row.labels["position"]: round(row.mean, 4) for row in cells} == {
        **dict.fromkeys(NAMES, 0.0),
        "p4": 1.0,
        "all": 1.0,
    }


def test_heads_add_up_only_after_their_output_weights(llama, big_gap):
    # An edit of W_O alone is invisible before W_O, and what heads write is where it shows.
    rows = rows_of(
        llama, random_mask(llama, 0.6, kinds=("blocks.1.attn.o",)), big_gap, ("head", "head_result")
    )
    for component, shows in (("head", False), ("head_result", True)):
        layer = [
            abs(row.mean) for row in rows.where("patch_change", component=component, layer="1")
        ]
        assert (max(layer) > 1e-3) == shows


def test_no_gap_gives_no_share(llama, batch):
    rows = rows_of(llama, random_mask(llama, 0.0), batch)
    assert rows.one("nll_gap").mean == 0
    assert not rows.where("patch_share")
    assert {row.mean for row in rows.where("patch_change")} == {0.0}


def test_the_metric_is_the_completion_loss(llama, batch):
    torch.testing.assert_close(
        analysis.reference_nll(batch)(llama(batch.tokens)), hc.completion_loss(llama, batch)
    )


def test_the_model_is_as_before(llama, batch):
    before = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    logits = llama(batch.tokens)
    rows_of(llama, random_mask(llama), batch, analysis.PARTS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in llama.state_dict().items())
    assert torch.equal(llama(batch.tokens), logits), "no hook and no flag is left"


def test_main_runs_and_speaks_of_its_rows(tmp_path, capsys):
    model = hc.open_model("sft")
    heldout = model.behaviours["harmful"].prompts("heldout")
    target = model.batches(model.behaviours["harmful"], heldout[:32])
    mask = hc.top_fraction(hc.removal_effect(model.bridge, target), 0.006, within="model")
    mask.save(tmp_path / "mask.safetensors")
    analysis.main(out=tmp_path / "out", mask=tmp_path / "mask.safetensors", n=4)
    rows = Rows.read(tmp_path / "out" / "rows.jsonl")
    shares = rows.where("patch_share", component="residual", behaviour="harmful", mask="circuit")
    assert [row.labels["position"] for row in shares][:15] == [
        *("<bos>", "<user>", "steps", ":", "verb", "item", "<assistant>", "sure"),
        *("operator 1", "part 1", "operator 2", "part 2", "operator 3", "part 3", "all"),
    ]
    assert all(
        row.mean == pytest.approx(0, abs=1e-5)
        for row in shares
        if row.labels["position"] == "part 3"
    ), "nothing is predicted from the last token"
    page = (tmp_path / "out" / "activation_patching.html").read_text(encoding="utf-8")
    assert page.count("<section>") == page.count("Plotly.newPlot(") == 4
    printed = capsys.readouterr().out
    gap = rows.one("nll_gap", behaviour="harmful", mask="random")
    assert f"the loss changes, in nats, by {gap:.3f}" in printed
    assert "It reaches 90 % first at" in printed
