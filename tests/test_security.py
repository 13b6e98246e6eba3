"""Nothing in a prompt, a name or a file runs code or leaves the folder it was meant for.

Would catch: a pickle that is loaded, code of a model's folder that is run without being asked for, a
name with `..` in it that becomes a path, text that a page, a card or a terminal takes for markup.
"""

import json
import pickle
from pathlib import Path

import pytest
from helpers import command, write_byte_model

from harmcircuits.behaviours.files import _put_into
from harmcircuits.behaviours.own import OwnBehaviour
from harmcircuits.circuits.masks import WeightMask
from harmcircuits.hooks.loading import load_model
from harmcircuits.hooks.walk_files import forget_sums
from harmcircuits.measurements import Measurement, Rows
from harmcircuits.prompts import PromptSet
from harmcircuits.storage import write_json
from harmcircuits.views.figures import comparison_figure
from harmcircuits.views.page import plot, section, table, write_page

ROOT = Path(__file__).parents[1]
SCRIPT = "<script>alert(1)</script>"


class Touch:
    """Unpickled, it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def test_a_model_s_own_code_is_not_run(tmp_path):
    folder, proof = tmp_path / "model", tmp_path / "was-run"
    write_byte_model(folder)
    code = f"open({str(proof)!r}, 'w')\n"
    (folder / "modeling_own.py").write_text(code + "class Own: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "own"
    config["auto_map"] = {
        "AutoConfig": "modeling_own.Own",
        "AutoModelForCausalLM": "modeling_own.Own",
    }
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_model(str(folder))
    assert not proof.exists()


# torch's own word on the pickle that is refused.
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_pickled_weights_are_not_unpickled(tmp_path):
    folder, proof = tmp_path / "model", tmp_path / "was-run"
    write_byte_model(folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(proof)))
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_model(str(folder))
    assert not proof.exists()
    mask = tmp_path / "mask.safetensors"
    mask.write_bytes(pickle.dumps(Touch(proof)))
    with pytest.raises(ValueError, match=r"mask\.safetensors: not a safetensors file"):
        WeightMask.load(mask)
    assert not proof.exists()


def test_no_source_file_unpickles_evaluates_or_trusts_remote_code():
    """By reading them: what would run what a file holds."""
    words = (
        "import pickle",
        "torch.load(",
        "trust_remote_code=True",
        " eval(",
        " exec(",
        "shell=True",
    )
    for path in (ROOT / "harmcircuits").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for word in words:
            assert word not in text, f"{path}: {word}"


@pytest.mark.parametrize("name", ["../up", "a/b", "/etc/x", "..", "a\nb", ""])
def test_a_behaviour_s_name_is_no_path(name, unchecked):
    with pytest.raises(ValueError, match="behaviour"):
        OwnBehaviour.of({"name": name, "prompts": ["a", "b"]})


def test_an_organism_s_name_is_no_path(tmp_path):
    result = command("study", "--out", str(tmp_path / "o"), "--organism", "../base")
    assert result.exit_code == 2
    assert "'../base'" in result.stderr


def test_a_walk_removes_nothing_outside_its_folder(tmp_path):
    victim = tmp_path / "victim.safetensors"
    victim.write_text("x")
    step = tmp_path / "walk" / "step-001"
    step.mkdir(parents=True)
    state = {"key": "k", "state": {}, "masks": {}, "sums": ["../../victim"], "trace": []}
    write_json(step / "walk.json", state)
    with pytest.raises(ValueError, match="victim"):
        forget_sums(tmp_path / "walk")
    assert victim.exists()


def test_text_in_a_page_is_text(tmp_path):
    parts = [section(SCRIPT, SCRIPT, table([SCRIPT], [[SCRIPT, "{{ 7 * 7 }}"]]))]
    write_page(tmp_path / "page.html", SCRIPT, parts)
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert SCRIPT not in html
    assert "&lt;script&gt;alert(1)" in html
    assert "{{ 7 * 7 }}" in html and "49" not in html


def test_a_figure_s_labels_are_text():
    rates = Rows([Measurement("harm_valid_rate", {}, 0.5, 0.4, 0.7)])
    html = plot(comparison_figure({SCRIPT: rates}, {"harm_valid_rate": f"</text>{SCRIPT}"}))
    assert SCRIPT not in html and "&lt;script&gt;" in html


def test_a_request_is_put_into_a_question_as_it_is():
    request = "{request.__class__} {0} %s"
    (example,) = _put_into("ok to {request} ?", PromptSet.of([request]))
    assert example.prompt == f"ok to {request} ?"
