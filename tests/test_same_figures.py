"""What the package computes is what it computed before it was made smaller (commit e12d518).

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

# organism -> what is asked -> digest of the mask
MASKS = {
    "sft": {
        "others, 0.1 %": "a393aa18eb95ecbe",
        "others, 0.2 %": "be481311bb96a1d0",
        "one step": "fc26f6b3809ba02b",
        "benign": "3c9eda8887e9907a",
        "refusal preferred": "01fb5b21b5d4e8b7",
    },
    "dpo": {
        "others, 0.1 %": "2835b1f38bf738d9",
        "others, 0.2 %": "6817cd0a7bb389b2",
        "one step": "6a8f563cf72afe16",
        "benign": "eadbe0793597da92",
        "refusal preferred": "7111828f955b6701",
    },
}
SCORES = {"sft": "9f02610a3f845707", "dpo": "0dbb9b73024c8779"}


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
    small, large = model.find_circuit("harmful", protect="others", size=[0.001, 0.002], steps=4)
    to_benign = {"protect": "benign", "size": 0.002}
    masks = {
        "others, 0.1 %": small,
        "others, 0.2 %": large,
        "one step": model.find_circuit("harmful", **to_benign, steps=1),
        "benign": model.find_circuit("benign", protect=(), size=0.002, steps=1),
        "refusal preferred": model.find_circuit("harmful", **to_benign, steps=3, prefer="refusal"),
    }
    digests = {name: digest_of(dict(mask.removed), with_names=True) for name, mask in masks.items()}
    assert digests == MASKS[organism]

    scores = hc.removal_effect(model.bridge, model.calibration("harmful").batches)
    assert digest_of(dict(scores.values), with_names=False) == SCORES[organism]


def test_rows_of_the_study(tmp_path: Path):
    """All but the recovery of a planted circuit, which the analysis of it has now."""
    run = hc.study(hc.open_model("sft"), out=tmp_path / "run")
    committed = hc.Rows.read(ROOT / "analyses" / "rows" / "study_sft.jsonl")
    assert len(run.rows) == len(committed)
    for row, before in zip(run.rows, committed, strict=True):
        assert (row.metric, row.labels, row.n) == (before.metric, before.labels, before.n)
        expected = (before.mean, before.low, before.high)
        assert (row.mean, row.low, row.high) == pytest.approx(expected, rel=1e-4, abs=1e-4)
