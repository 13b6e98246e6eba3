"""Masks on the hub: what is uploaded, what the card says, and what comes back.

Would catch: a card whose code does not run or whose figures are another mask's, a repository that
is public unasked, an error without the repository's name and the remedy, a mask that changes on the
way, a download where the file is on this machine.
"""

import json
import re
from pathlib import Path

import pytest
from helpers import small_model
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from harmcircuits.circuits.masks import WeightMask, top_fraction
from harmcircuits.hooks.attribution import random_scores
from harmcircuits.hub import mask_card, push_mask
from harmcircuits.measurements import Measurement, Rows
from harmcircuits.organisms import FOLDER


@pytest.fixture(scope="module")
def model():
    return small_model("sft")


@pytest.fixture(scope="module")
def searched(model):
    return model.find_circuit("harmful", protect="benign", size=0.002, steps=2)


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
        names = {path.name for path in folder_path.iterdir()}
        calls.append(
            (repo_id, commit_message, names, WeightMask.load(folder_path / "mask.safetensors"))
        )

    monkeypatch.setattr(HfApi, "create_repo", create)
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    return calls


def cached(folder: Path, mask: WeightMask, repo: str = "someone/mask") -> None:
    """A hub's cache that holds one revision of a repository."""
    root = folder / f"models--{repo.replace('/', '--')}"
    snapshot = root / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    mask.save(snapshot / "mask.safetensors")
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("a" * 40)


# Up


def test_a_mask_goes_up_with_its_card_and_privately(hub, mask):
    assert push_mask(mask, "someone/mask") == "https://huggingface.co/someone/mask"
    (repo, options), (same_repo, message, names, uploaded) = hub
    assert repo == same_repo == "someone/mask"
    assert options == {"private": True, "exist_ok": True}
    assert message == f"Mask of {mask.n_removed:,} weights"
    assert names == {"README.md", "mask.safetensors"}
    assert uploaded.digest == mask.digest


def test_what_is_said_otherwise_is_done_otherwise(hub, mask):
    rows = Rows([Measurement.exact("harm_nll", {"mask": "given"}, 3.0)])
    push_mask(mask, "someone/mask", private=False, message="Second try", rows=rows)
    (_, options), (_, message, names, _) = hub
    assert options["private"] is False
    assert message == "Second try"
    assert names == {"README.md", "mask.safetensors", "rows.jsonl"}


def test_a_folder_is_written_and_nothing_uploaded(hub, mask, tmp_path):
    folder = tmp_path / "new" / "card"
    assert push_mask(mask, "someone/mask", folder=folder) == str(folder)
    assert not hub
    assert WeightMask.from_hub(folder).digest == mask.digest
    with pytest.raises(ValueError, match="card exists and is not empty"):
        push_mask(mask, "someone/mask", folder=folder)


@pytest.mark.parametrize("repo", ["mask", "", "a/b/c", "/mask", "someone/"])
def test_a_name_that_is_no_hub_id_is_refused_before_anything_is_written(hub, mask, repo):
    with pytest.raises(ValueError, match="expected a hub id, user/name"):
        push_mask(mask, repo)
    assert not hub


def test_no_permission_names_the_repository_and_the_remedy(mask, monkeypatch):
    def create(self, repo_id, **options):
        raise OSError("403 Forbidden\nYou don't have the rights")

    monkeypatch.setattr(HfApi, "create_repo", create)
    with pytest.raises(ValueError) as error:
        push_mask(mask, "someone/mask")
    assert str(error.value).startswith("someone/mask cannot be written (403 Forbidden); ")
    assert "hf auth login" in str(error.value) and "HF_TOKEN" in str(error.value)


# The card


def test_the_card_of_a_search_says_how_it_went(searched):
    card = mask_card(searched, "someone/mask", model="someone/model")
    assert "base_model: someone/model" in card.split("---")[1]
    assert searched.source.model in card and searched.digest in card
    assert f"| weights | {searched.n_removed:,} of {searched.n_weights:,}, " in card
    assert "protected, with the nats per token that each may lose: benign (0.05)" in card
    steps = re.findall(r"^\| (\d) \| ([\d,]+) \| .* \| ([\d.]+) \| ([+-][\d.]+) \|$", card, re.M)
    assert [step for step, *_ in steps] == ["1", "2"]
    for step, n_removed, loss, rise in steps:
        where = {"aim": "walk", "step": int(step)}
        assert float(loss) == pytest.approx(
            searched.trace.one("target_loss", **where).mean, abs=1e-3
        )
        sizes = searched.trace.where("weights_removed", **where, outcome="accepted")
        cheapest = min(sizes, key=lambda row: row.labels["factor"])
        assert n_removed == f"{cheapest.mean:,.0f}"
        assert float(rise) <= 0.05
    record = re.search(r"```json\n(.*?)```", card, flags=re.S)
    assert record and json.loads(record[1]) == json.loads(searched.source.to_json())


def test_the_card_s_code_runs(searched, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    push_mask(searched, "someone/mask", model=str(FOLDER / "sft"), folder="someone/mask")
    card = Path("someone/mask/README.md").read_text()
    assert str(FOLDER) not in card, "no path of this machine"
    assert "base_model" not in card, "a local folder is no model of the hub"
    code = re.search(r"```python\n(.*?)```", card, flags=re.S)
    assert code
    lines = (
        code[1]
        .replace('"sft"', repr(str(FOLDER / "sft")))
        .replace("...", "left = bridge.W_in[:].clone()")
    )
    space: dict = {}
    exec(lines, space)
    n_in = sum(count for name, count in searched.counts.items() if ".mlp.in." in name)
    changed = space["left"] != space["bridge"].W_in
    assert int(changed.sum()) == n_in > 0


def test_the_card_counts_by_layer_and_kind(mask):
    card = mask_card(mask, "someone/mask")
    table = [line.strip("| ").split(" | ") for line in card.splitlines() if line.startswith("| ")]
    header = next(row for row in table if row[0] == "layer")
    first = next(row for row in table if row[0] == "0")
    for kind, count in zip(header[1:], first[1:], strict=True):
        assert count == f"{mask.counts[f'blocks.0.{kind}.weight']:,}"
    assert "By `top_fraction`, without a search." in card
    assert "a model that this card does not name" in card


def test_the_card_has_the_rows_of_the_mask_alone(mask):
    figures = [
        Measurement("harm_nll", {"mask": "none", "split": "heldout"}, 0.5, 0.4, 0.6, 9),
        Measurement.exact("weights_removed", {"mask": "circuit", "selection": "one shot", "split": "heldout"}, 7),
        Measurement("harm_nll", {"mask": "circuit", "selection": "one shot", "split": "heldout"}, 8.0, 7.0, 9.0, 9),
        Measurement.exact("weights_removed", {"mask": "circuit", "selection": "search", "split": "heldout"}, len(mask)),
        Measurement("harm_nll", {"mask": "circuit", "selection": "search", "split": "heldout"}, 3.0, 2.0, 4.0, 9),
        Measurement("harm_nll", {"mask": "circuit", "selection": "search", "split": "choice"}, 6.0, 5.0, 7.0, 9),
    ]  # fmt: skip
    card = mask_card(mask, "someone/mask", rows=Rows(figures))
    assert "| harm_nll | 0.5 [0.4, 0.6] | 3 [2, 4] |" in card
    assert card.count("harm_nll") == 1
    with pytest.raises(ValueError, match=f"no held-out figures of a mask of {len(mask)} weight"):
        mask_card(mask, "someone/mask", rows=Rows(figures[:3]))


def test_the_rows_of_a_measurement_are_the_mask_s(model, searched):
    rows = model.measure(mask=searched, only="benign")
    card = mask_card(searched, "someone/mask", rows=rows)
    assert f"| benign_nll |  | {rows.one('benign_nll'):.3g} |" in card


# Down


def test_what_the_cache_holds_needs_no_network(mask, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cached(tmp_path, mask)
    assert WeightMask.from_hub("someone/mask").digest == mask.digest
    assert WeightMask.from_hub("someone/mask", revision="a" * 40).digest == mask.digest
    with pytest.raises(ValueError, match=r"^someone/other: .* is not in the cache and the hub"):
        WeightMask.from_hub("someone/other")


def test_files_and_folders_are_read_as_they_are(mask, tmp_path):
    (tmp_path / "masks").mkdir()
    mask.save(tmp_path / "masks" / "circuit.safetensors")
    file = tmp_path / "masks" / "circuit.safetensors"
    assert WeightMask.from_hub(file).digest == mask.digest
    assert WeightMask.from_hub(tmp_path, filename="masks/circuit.safetensors").digest == mask.digest
    with pytest.raises(
        ValueError, match=r"no mask\.safetensors in it; .*masks/circuit\.safetensors"
    ):
        WeightMask.from_hub(tmp_path)
    with pytest.raises(ValueError, match="nowhere: no such file; give the path of a saved mask"):
        WeightMask.from_hub("nowhere")
    with pytest.raises(ValueError, match=r"masks/other\.safetensors: no such file"):
        WeightMask.from_hub("masks/other.safetensors")


def an_error(kind: type[Exception]) -> Exception:
    """An error of the hub, which would need a whole response to be made."""
    error = kind.__new__(kind)
    error.args = ("404 Client Error\nRequest ID: 1",)
    return error


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (GatedRepoError, ["ask for access at https://huggingface.co/someone/mask"]),
        (RepositoryNotFoundError, ["no repository of this name", "hf auth login", "HF_TOKEN"]),
        (RevisionNotFoundError, ["at v2", "no such branch, tag or commit"]),
        (EntryNotFoundError, ["it holds no mask.safetensors", "filename="]),
        (ConnectionError, ["404 Client Error;", "check the name and the network"]),
    ],
)
def test_what_the_hub_refuses_is_said_with_the_remedy(monkeypatch, kind, words):
    def download(*_, **__):
        raise an_error(kind)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(ValueError) as error:
        WeightMask.from_hub("someone/mask", revision="v2")
    assert str(error.value).startswith("someone/mask at v2: ")
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)
