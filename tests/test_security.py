"""No model folder and no file runs code. (Pages escape text: tests/views.)

Would catch: a pickle that is loaded, code of a model's folder that runs although nobody allowed it.
"""

import json
import pickle
from pathlib import Path

import pytest
from helpers import write_byte_model

from harmcircuits.circuits.masks import WeightMask
from harmcircuits.hooks.loading import load_model

ROOT = Path(__file__).parents[1]
RUNS_WHAT_A_FILE_HOLDS = (
    "import pickle", "torch.load(", "trust_remote_code=True", " eval(", " exec(", "shell=True"
)  # fmt: skip


class Touch:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def with_own_code(folder: Path, proof: Path) -> None:
    (folder / "modeling_own.py").write_text(f"open({str(proof)!r}, 'w')\nclass Own: pass\n")
    config = json.loads((folder / "config.json").read_text())
    classes = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "modeling_own.Own")
    config |= {"model_type": "own", "auto_map": classes}
    (folder / "config.json").write_text(json.dumps(config))


def with_a_pickle(folder: Path, proof: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(proof)))


# torch's own warning about the pickle that is refused.
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("spoil", [with_own_code, with_a_pickle])
def test_nothing_in_a_model_s_folder_is_run(tmp_path, spoil):
    folder, proof = tmp_path / "model", tmp_path / "was-run"
    write_byte_model(folder)
    spoil(folder, proof)
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_model(str(folder))
    assert not proof.exists()


def test_a_pickle_is_no_mask(tmp_path):
    mask, proof = tmp_path / "mask.safetensors", tmp_path / "was-run"
    mask.write_bytes(pickle.dumps(Touch(proof)))
    with pytest.raises(ValueError, match="not a safetensors file"):
        WeightMask.load(mask)
    assert not proof.exists()


def test_no_source_file_unpickles_evaluates_or_trusts_remote_code():
    for path in (ROOT / "harmcircuits").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not [word for word in RUNS_WHAT_A_FILE_HOLDS if word in text], path
