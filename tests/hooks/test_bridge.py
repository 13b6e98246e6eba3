"""What counts as a bridge, and what anything else is told.

Would catch: a Model whose bridge is not taken, a Hugging Face model that fails later with an
AttributeError, a protocol that a real bridge or a stub does not satisfy.
"""

from types import SimpleNamespace

import pytest
import torch
from helpers import random_batch

from harmcircuits.hooks.bridge import Bridge, as_bridge
from harmcircuits.hooks.finetuning import fine_tuning
from harmcircuits.hooks.memory import estimate_memory
from harmcircuits.hooks.weights import named_weights, weight_sites


def test_a_bridge_and_a_model_with_one_are_taken(llama):
    model = SimpleNamespace(bridge=llama, name="a Model is anything with a bridge")
    assert as_bridge(llama) is llama
    assert as_bridge(model) is llama

    assert list(weight_sites(model)) == list(weight_sites(llama))
    for name, parameter in named_weights(model).items():
        assert parameter is named_weights(llama)[name]

    batches = [random_batch()]
    assert estimate_memory(model, batches) == estimate_memory(llama, batches)
    with fine_tuning(model, batches, lr=1e-3) as run:
        run.until(1)
    assert len(run.losses) == 1


def test_a_hugging_face_model_is_refused_with_the_remedy(llama):
    given = r"Hugging Face model transformers\..*LlamaForCausalLM"
    with pytest.raises(ValueError, match=given + r".*open_model\(.*boot_transformers\(folder\)"):
        as_bridge(llama.original_model)


@pytest.mark.parametrize(
    ("thing", "given"),
    [
        (torch.nn.Linear(2, 2), r"torch\.nn\.modules\.linear\.Linear"),
        ("meta-llama/Llama", r"builtins\.str"),
        (SimpleNamespace(bridge=None), r"builtins\.NoneType"),
    ],
)
def test_other_things_are_refused_by_their_type(thing, given):
    with pytest.raises(ValueError, match=given + r".*open_model\(.*boot_transformers\(folder\)"):
        as_bridge(thing)


def test_the_protocol_is_that_of_a_real_bridge_and_of_stubs(llama):
    class Stub(Bridge):
        cfg = SimpleNamespace(device="cpu")

    assert isinstance(llama, Bridge)
    assert isinstance(Stub(), Bridge)
    assert not isinstance(llama.original_model, Bridge)
    with pytest.raises(AttributeError, match="blocks"):
        _ = Stub().blocks
