"""Fixtures of all tests: small random models and a batch.

Everything runs offline, on one thread.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
import transformers
from helpers import opener, random_batch
from helpers import small_model as small_model
from transformer_lens.model_bridge import TransformerBridge

from harmcircuits.prompts import Batch

# The models are tiny: a second thread costs more than it gives.
torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def open_model(tmp_path_factory):
    return opener(tmp_path_factory.mktemp)


@pytest.fixture
def llama(open_model) -> TransformerBridge:
    return open_model("Llama")


@pytest.fixture
def batch() -> Batch:
    return random_batch()
