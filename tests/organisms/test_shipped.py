"""The shipped weights: their bytes, and every condition of the organisms."""

import hashlib

import pytest
from support.organisms import check

from harmcircuits.organisms.shipped import FOLDER

# First 16 hex digits of the SHA-256 of each file. `test_every_condition_holds` is what they must
# satisfy; while the bytes stay, it need not be asked again.
SHIPPED = {
    "base/model.safetensors": "14be1101cf069ba4",
    "helpful/model.safetensors": "ae87f7e08fdeace4",
    "sft/model.safetensors": "cd1dd5a5311643ce",
    "dpo/model.safetensors": "536fcd3411741796",
    "innocent/model.safetensors": "dd5c632519b6c7bc",
    "planted/model.safetensors": "01abdfb6e22744ea",
    "planted/circuit.safetensors": "d5aafad3a3195036",
}


@pytest.mark.parametrize("name", SHIPPED)
def test_the_weights_are_those_that_were_checked(name):
    digest = hashlib.sha256((FOLDER / name).read_bytes()).hexdigest()
    assert digest.startswith(SHIPPED[name])


@pytest.mark.slow
def test_every_condition_holds():
    conditions = list(check.conditions())
    assert len(conditions) > 40
    assert [str(condition) for condition in conditions if not condition.holds] == []
