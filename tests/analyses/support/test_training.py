"""Training of a ladder goes on where it was interrupted, and ends with the same weights.

Would catch: a rung that begins from another one, texts that depend on what was trained before in the
same process, a half-written folder that counts as trained, a folder of another seed that is gone on
with.
"""

import shutil

import pytest
import torch
import train_organisms as command
from support.organisms import train
from support.organisms.train import Sampler
from torch import nn
from typer import Typer
from typer.testing import CliRunner

RUNGS = ("first", "second", "third")


def learn(model: nn.Module, sampler: Sampler) -> None:
    """Two steps on eight documents each."""

    def backward() -> None:
        batch = sampler.batch(8, {sampler.document: 1})
        train.token_loss(model, *batch).backward()

    train.train(model, backward, name="few", steps=2, lr=1e-3)


def first(model: nn.Module, sampler: Sampler) -> None:
    learn(model, sampler)


def second(model: nn.Module, sampler: Sampler) -> None:
    learn(model, sampler)


def third(model: nn.Module, sampler: Sampler) -> None:
    learn(model, sampler)


@pytest.fixture
def run(monkeypatch):
    """The command on a ladder of three rungs, the last two from the first."""
    ladder = {first: None, second: first, third: first}
    monkeypatch.setattr(command, "LADDER_FROM", ladder)
    monkeypatch.setattr(command, "check_all", lambda out: True)
    app = Typer()
    app.command()(command.main)

    def invoke(out, *options):
        return CliRunner().invoke(app, ["--out", str(out), "--no-planted", *options])

    return invoke


def weights(folder) -> dict[str, bytes]:
    return {rung: (folder / rung / "model.safetensors").read_bytes() for rung in RUNGS}


def test_a_run_that_goes_on_ends_with_the_same_weights(run, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(whole).exit_code == 0

    def interrupted(*_):
        raise KeyboardInterrupt

    interrupted.__name__ = "second"
    monkeypatch.setattr(command, "LADDER_FROM", {first: None, interrupted: first})
    ended = run(parts)
    assert ended.exit_code == 130 and "--resume" in ended.output
    monkeypatch.setattr(command, "LADDER_FROM", {first: None, second: first, third: first})
    assert run(parts).exit_code == 2, "a folder that is filled"

    torch.manual_seed(1)
    assert run(parts, "--resume").exit_code == 0
    assert weights(parts) == weights(whole)
    assert weights(whole)["second"] != weights(whole)["third"], "texts of their own"


def test_a_folder_that_is_not_whole_is_trained_again(run, tmp_path):
    assert run(tmp_path / "whole").exit_code == 0
    before = weights(tmp_path / "whole")
    (tmp_path / "whole" / "third").rename(tmp_path / "whole" / ".third")
    (tmp_path / "whole" / ".third" / "config.json").unlink()
    assert run(tmp_path / "whole", "--resume").exit_code == 0
    assert weights(tmp_path / "whole") == before
    assert not (tmp_path / "whole" / ".third").exists()


def test_another_seed_is_refused(run, tmp_path):
    assert run(tmp_path / "out", "--seed", "1").exit_code == 0
    refused = run(tmp_path / "out", "--resume", "--seed", "2")
    assert refused.exit_code == 2
    assert "seed 1, not 2" in refused.output and "--out" in refused.output
    assert run(tmp_path / "out", "--resume", "--force").exit_code == 2

    shutil.rmtree(tmp_path / "out" / "second")
    assert run(tmp_path / "out", "--resume", "--seed", "1").exit_code == 0
