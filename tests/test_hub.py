"""Masks and models on the hub: what is uploaded, what the card says, and what comes back.

Would catch: a card whose code does not run or whose counts are another mask's, a repository that is
public unasked, a path of this machine in a card, a download where the file is on this machine.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi

import harmcircuits as hc
from harmcircuits.circuits.masks import WeightMask, top_fraction
from harmcircuits.circuits.scores import Source
from harmcircuits.export import export, push_mask
from harmcircuits.search.attribution import random_scores


@pytest.fixture
def mask(llama) -> WeightMask:
    return top_fraction(random_scores(llama), 0.01)


@pytest.fixture
def hub(monkeypatch):
    """What is asked of the hub, in place of a network."""
    calls = []

    def create(self, repo_id, **options):
        calls.append((repo_id, options))

    def upload(self, *, repo_id, folder_path, commit_message):
        calls.append((repo_id, commit_message, {path.name for path in folder_path.iterdir()}))

    monkeypatch.setattr(HfApi, "create_repo", create)
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    return calls


def test_masks_and_exports_go_up_with_their_cards_and_privately(hub, llama, mask, tmp_path):
    options = {"private": True, "exist_ok": True}
    assert hc.push_mask(mask, "someone/mask") == "https://huggingface.co/someone/mask"
    files = {"README.md", "mask.safetensors"}
    message = f"Mask of {mask.n_removed:,} weights"
    assert hub == [("someone/mask", options), ("someone/mask", message, files)]

    (tmp_path / "out").mkdir()  # an empty folder may be there
    hc.export(llama, mask, tmp_path / "out", push_to="someone/edited")
    created, (repo, message, names) = hub[2:]
    assert created == ("someone/edited", options)
    assert repo == "someone/edited" and message.startswith("The model without ")
    assert names >= {*files, "config.json", "model.safetensors"}


def test_a_folder_is_written_and_nothing_uploaded(hub, mask, tmp_path):
    folder = tmp_path / "new" / "card"
    assert push_mask(mask, "someone/mask", model="some/model", folder=folder) == str(folder)
    assert not hub
    assert WeightMask.from_hub(folder) == mask
    card = (folder / "README.md").read_text()
    assert "base_model: some/model" in card.split("---")[1]
    assert 'hc.load_model("some/model")' in card


@pytest.mark.parametrize("kind", ["mask", "model"])
def test_a_card_counts_records_and_runs(llama, tmp_path, monkeypatch, kind):
    removed = {
        "blocks.0.mlp.in.weight": torch.tensor([1, 5, 7]),
        "blocks.1.attn.q.weight": torch.tensor([0]),
    }
    source = Source(random_scores(llama).source.model, "{method.__class__}", {"note": "{name}"})
    mask = WeightMask(removed, random_scores(llama).shapes, source)
    model = Path(llama.cfg.model_name)
    monkeypatch.chdir(tmp_path)
    if kind == "mask":
        push_mask(mask, "someone/mask", model=str(model), folder="someone/mask")
        card = Path("someone/mask/README.md").read_text()
    else:
        card = (export(llama, mask, "out") / "README.md").read_text()
        monkeypatch.chdir(tmp_path / "out")
    assert "base_model" not in card.split("---")[1], "a local folder is no model of the hub"
    assert str(model.parent) not in card, "no path of this machine"
    assert "{method.__class__}" in card, "no template is read out of a mask"
    record = re.search(r"```json\n(.*?)```", card, flags=re.S)
    assert record and json.loads(record[1]) == json.loads(mask.source.to_json())

    code = re.search(r"```python\n(.*?)```", card, flags=re.S)
    assert code
    lines = code[1].replace(f'load_model("{model.name}")', f'load_model("{model}")')
    space: dict = {}
    exec(lines.replace("...", "left = bridge.W_in[0].clone()"), space)
    assert space["left"].mT.flatten()[[1, 5, 7]].eq(0).all()


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda mask, _: WeightMask.from_hub("someone/other"), "someone/other: no such file"),
        (lambda mask, _: WeightMask.from_hub("a/b/c.safetensors"), "hf auth login"),
        (lambda mask, _: push_mask(mask, "mask"), "expected a hub id"),
        (lambda mask, _: push_mask(mask, "a/b/c"), "expected a hub id"),
        (lambda mask, path: push_mask(mask, "a/b", folder=path.parent), "is not empty"),
    ],
)
def test_what_is_not_there_or_no_hub_id_is_refused(mask, tmp_path, call, word):
    with pytest.raises(ValueError) as error:
        call(mask, tmp_path)
    assert word in str(error.value) and "\n" not in str(error.value)
