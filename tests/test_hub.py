"""Masks and models on the hub: what is uploaded, what the card says, and what comes back.

Would catch: a card whose code does not run or whose counts are another mask's, a repository that is
public unasked, a path of this machine in a card, an error without its remedy, a mask that changes on
the way, a download where the file is on this machine.
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
from harmcircuits.hooks.attribution import random_scores


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


def test_a_mask_goes_up_with_its_card_and_privately(hub, mask):
    assert push_mask(mask, "someone/mask") == "https://huggingface.co/someone/mask"
    created = ("someone/mask", {"private": True, "exist_ok": True})
    files = {"README.md", "mask.safetensors"}
    assert hub == [created, ("someone/mask", f"Mask of {mask.n_removed:,} weights", files)]


def test_an_export_goes_up_when_it_is_finished(hub, llama, mask, tmp_path):
    (tmp_path / "out").mkdir()  # an empty folder may be there
    export(llama, mask, tmp_path / "out", push_to="someone/edited")
    created, (repo, message, names) = hub
    assert created == ("someone/edited", {"private": True, "exist_ok": True})
    assert repo == "someone/edited" and message.startswith("The model without ")
    assert names >= {"README.md", "config.json", "mask.safetensors", "model.safetensors"}
    export(llama, mask, tmp_path / "other")
    assert len(hub) == 2, "nothing is uploaded unasked"


def test_a_folder_is_written_and_nothing_uploaded(hub, mask, tmp_path):
    folder = tmp_path / "new" / "card"
    assert push_mask(mask, "someone/mask", folder=folder) == str(folder)
    assert not hub
    assert WeightMask.from_hub(folder) == mask
    with pytest.raises(ValueError, match="card exists and is not empty"):
        push_mask(mask, "someone/mask", folder=folder)


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


def test_the_card_of_a_hub_model_names_it_as_base(mask, tmp_path):
    push_mask(mask, "someone/mask", model="someone/model", folder=tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "base_model: someone/model" in card.split("---")[1]
    assert 'hc.load_model("someone/model")' in card


def test_what_the_cache_holds_needs_no_network(mask, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    root = tmp_path / "models--someone--mask"
    snapshot = root / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    mask.save(snapshot / "mask.safetensors")
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("a" * 40)
    assert WeightMask.from_hub("someone/mask") == mask
    assert WeightMask.from_hub("someone/mask", revision="a" * 40) == mask


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda mask: WeightMask.from_hub("someone/other"), "someone/other: no mask.safetensors"),
        (lambda mask: WeightMask.from_hub("nowhere"), "nowhere: no such file"),
        (lambda mask: WeightMask.from_hub("a/b.safetensors"), "a/b.safetensors: no such file"),
        (lambda mask: push_mask(mask, "mask"), "expected a hub id"),
        (lambda mask: push_mask(mask, "a/b/c"), "expected a hub id"),
        (lambda mask: push_mask(mask, "someone/"), "expected a hub id"),
        (lambda mask: push_mask(mask, "someone/mask"), "someone/mask cannot be written (403"),
    ],
)
def test_what_the_hub_refuses_is_said_with_the_remedy(mask, monkeypatch, call, word):
    def create(self, repo_id, **options):
        raise OSError("403 Forbidden\nYou don't have the rights")

    monkeypatch.setattr(HfApi, "create_repo", create)
    with pytest.raises(ValueError) as error:
        call(mask)
    assert str(error.value).startswith(word) or word in str(error.value)
    assert "\n" not in str(error.value)
    if "cannot" in word:
        assert "hf auth login" in str(error.value)


def test_the_public_name_is_the_function():
    assert hc.push_mask is push_mask
    assert hc.export is export
