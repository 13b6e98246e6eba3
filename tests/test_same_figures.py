"""The package computes what it did: scores since e12d518, masks since the dead zone of a search.

Would catch: a rewrite that changes a score, a mask or a row of the same command with the same seed.
Digests are of one kind of machine: elsewhere last bits may exchange a few weights.
"""

import hashlib
from pathlib import Path

import pytest
import torch
from pages import ROOT

import harmcircuits as hc

pytestmark = pytest.mark.slow

# organism -> search -> digest of the mask
MASKS = {
    "sft": {
        "others, 0.1 %": "00820cb197229c91",
        "others, 0.2 %": "6e2ede6bd5fb3045",
        "benign": "32214c631f003705",
        "refusal preferred": "40485d070a6872e3",
    },
    "dpo": {
        "others, 0.1 %": "0af3b865ef3dd175",
        "others, 0.2 %": "2529df0f666721f5",
        "benign": "f9ec3b92cee6f26e",
        "refusal preferred": "c46bcd3a9c8088fa",
    },
}
SCORES = {"sft": "7e57b85f98d67e00", "dpo": "6102319d8525201f"}


def digest_of(tensors: dict[str, torch.Tensor], *, with_names: bool) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        if with_names:
            digest.update(name.encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()[:16]


@pytest.mark.parametrize("organism", MASKS)
def test_masks_and_scores(organism):
    model = hc.open_model(organism)
    small, large = model.find_circuit("harmful", protect="others", size=[0.001, 0.002], steps=10)
    to_benign = {"protect": "benign", "size": 0.002}
    masks = {
        "others, 0.1 %": small,
        "others, 0.2 %": large,
        "benign": model.find_circuit("benign", protect=(), size=0.002, steps=5),
        "refusal preferred": model.find_circuit("harmful", **to_benign, steps=5, prefer="refusal"),
    }
    digests = {name: digest_of(dict(mask.removed), with_names=True) for name, mask in masks.items()}
    assert digests == MASKS[organism]

    scores = hc.removal_effect(model.bridge, model.calibration("harmful").batches)
    assert digest_of(dict(scores.values), with_names=False) == SCORES[organism]


def test_rows_of_the_study(tmp_path: Path):
    """All rows but the recovery of a planted circuit, which now has an analysis of its own."""
    run = hc.study(hc.open_model("sft"), out=tmp_path / "run")
    committed = hc.Rows.read(ROOT / "analyses" / "rows" / "study_sft.jsonl")
    assert len(run.rows) == len(committed)
    for row, record in zip(run.rows, committed, strict=True):
        assert (row.metric, row.labels, row.n) == (record.metric, record.labels, record.n)
        expected = (record.mean, record.low, record.high)
        assert (row.mean, row.low, row.high) == pytest.approx(expected, rel=1e-4, abs=1e-4)
