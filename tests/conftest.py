"""Fixtures of all tests: small random models and a batch.

Everything runs offline, on one thread. Every call of the package is checked against its
annotations, shapes among them.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import jaxtyping
import typechecker  # noqa: F401  # first: what it imports is not checked by it

# Not the organisms: their world is asked a hundred thousand times, and has no shapes.
ROOMS = (
    "batches",
    "behaviours",
    "circuits",
    "export",
    "hooks",
    "measurements",
    "prompts",
    "search",
    "studies",
    "views",
)
jaxtyping.install_import_hook([f"harmcircuits.{room}" for room in ROOMS], "typechecker.check")

import shutil

import pytest
import torch
import transformers
from helpers import opener, random_batch, small_model
from transformer_lens.model_bridge import TransformerBridge

from harmcircuits.batches import Batch
from harmcircuits.behaviours.model import Model

# The models are tiny: a second thread costs more than it gives.
torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()


@pytest.fixture
def unchecked():
    """Turns type checks off, for tests of the package's own errors about wrong types."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def browser():
    """Chromium, if the machine has it; closed after each module, as its event loop must end."""
    driver = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    with driver.sync_playwright() as playwright:
        chromium_browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox"]
        )
        yield chromium_browser
        chromium_browser.close()


@pytest.fixture(scope="session")
def open_model(tmp_path_factory):
    return opener(tmp_path_factory.mktemp)


@pytest.fixture
def llama(open_model) -> TransformerBridge:
    return open_model("Llama")


@pytest.fixture(scope="session")
def sft() -> Model:
    """The organism `sft`, asked few requests; every test leaves it as it was."""
    return small_model("sft")


@pytest.fixture
def one_step(monkeypatch):
    """Searches of a `Model` take one step, whatever an example says."""
    search = Model.find_circuit

    def find_circuit(self, *arguments, **options):
        return search(self, *arguments, **{**options, "steps": 1})

    monkeypatch.setattr(Model, "find_circuit", find_circuit)


@pytest.fixture
def batch() -> Batch:
    return random_batch()
