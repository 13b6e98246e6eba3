"""Find, mask and measure the weights behind harmful generation, on TransformerLens.

Names are imported when they are first used: `import harmcircuits` alone loads torch, and no model
library.
"""

import re
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Bound now: a later import of the module of the same name would hide the function.
from harmcircuits.export import export as export

if TYPE_CHECKING:
    from harmcircuits.batches import Batch as Batch
    from harmcircuits.batches import tokenize as tokenize
    from harmcircuits.behaviours.behaviour import Behaviour as Behaviour
    from harmcircuits.behaviours.model import Model as Model
    from harmcircuits.circuits.location import concentration as concentration
    from harmcircuits.circuits.masks import WeightMask as WeightMask
    from harmcircuits.circuits.masks import random_like as random_like
    from harmcircuits.circuits.masks import top_fraction as top_fraction
    from harmcircuits.circuits.overlap import overlap as overlap
    from harmcircuits.circuits.overlap import overlap_by as overlap_by
    from harmcircuits.circuits.scores import WeightScores as WeightScores
    from harmcircuits.export import push_mask as push_mask
    from harmcircuits.hooks.finetuning import Lora as Lora
    from harmcircuits.hooks.finetuning import fine_tuning as fine_tuning
    from harmcircuits.hooks.generation import Sampling as Sampling
    from harmcircuits.hooks.loading import load_model as load_model
    from harmcircuits.hooks.losses import completion_nll as completion_nll
    from harmcircuits.hooks.losses import kl_under as kl_under
    from harmcircuits.hooks.masking import masked as masked
    from harmcircuits.hooks.objectives import choice_margin as choice_margin
    from harmcircuits.hooks.objectives import completion_loss as completion_loss
    from harmcircuits.hooks.patching import activation_patching as activation_patching
    from harmcircuits.hooks.weights import changed_weights as changed_weights
    from harmcircuits.hooks.weights import named_weights as named_weights
    from harmcircuits.hooks.weights import weight_sites as weight_sites
    from harmcircuits.measurements import Measurement as Measurement
    from harmcircuits.measurements import Rows as Rows
    from harmcircuits.opening import open_model as open_model
    from harmcircuits.prompts import Example as Example
    from harmcircuits.prompts import PromptSet as PromptSet
    from harmcircuits.search.attribution import magnitude_scores as magnitude_scores
    from harmcircuits.search.attribution import random_scores as random_scores
    from harmcircuits.search.attribution import removal_effect as removal_effect
    from harmcircuits.search.attribution import snip_scores as snip_scores
    from harmcircuits.search.attribution import token_contributions as token_contributions
    from harmcircuits.search.attribution import token_price as token_price
    from harmcircuits.search.attribution import wanda_scores as wanda_scores
    from harmcircuits.search.circuit import find_circuit as find_circuit
    from harmcircuits.search.circuit import set_difference as set_difference
    from harmcircuits.search.memory import estimate_memory as estimate_memory
    from harmcircuits.search.memory import free_for_scores as free_for_scores
    from harmcircuits.studies.controls import controls as controls
    from harmcircuits.studies.settings import StudySettings as StudySettings
    from harmcircuits.studies.study import study as study
    from harmcircuits.studies.tasks import evaluate_tasks as evaluate_tasks

__version__ = version("harmcircuits")

# Name -> its module, as the imports above say: the only list.
_IMPORTS = re.findall(
    r"^    from harmcircuits\.(\S+) import (\w+) as", Path(__file__).read_text("utf-8"), flags=re.M
)
_MODULES = {name: module for module, name in _IMPORTS}

__all__ = sorted([*_MODULES, "export"])  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value = getattr(import_module(f"harmcircuits.{_MODULES[name]}"), name)
        globals()[name] = value
        return value
    from harmcircuits.display import nearest

    raise AttributeError(f"harmcircuits has no {name!r}; {nearest(name, _MODULES)}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
