"""Attacks that elicit what a model holds back, with its weights as they are."""

from contextlib import suppress
from dataclasses import replace

from harmcircuits.behaviours.behaviour import CONTRAST, TARGET
from harmcircuits.behaviours.model import Model
from harmcircuits.behaviours.outcomes import NotShownError
from harmcircuits.circuits.masks import WeightMask
from harmcircuits.hooks.masking import masked_if_given
from harmcircuits.measurements import Rows
from harmcircuits.search.circuit import set_difference

PLAIN = "plain"
REFUSAL_SHARE = 0.01  # of the weights: the share that refusals need, and the share that is spared


def refusals_removed(model: Model, *, mask: WeightMask | None = None) -> WeightMask | None:
    """The refusal ablation of a model; None where it refuses nothing or answers nothing benign."""
    if not {"refusal", CONTRAST} <= set(model.behaviours):
        return None
    with masked_if_given(model.bridge, mask), suppress(NotShownError):
        refusals, benign = model.calibration("refusal"), model.calibration(CONTRAST)
        return set_difference(
            model.bridge,
            refusals.batches,
            [benign.batches],
            q=REFUSAL_SHARE,
            p=REFUSAL_SHARE,
            signed=False,
        )
    return None


def plain_harm(model: Model) -> Rows:
    """The answers of a model as it stands to plain harmful requests, held out."""
    return _under_attack(_without_prefill(model), None, PLAIN)


def elicited(model: Model, ablation: WeightMask | None) -> Rows:
    """The answers of a model as it stands to held-out harmful requests under every attack."""
    plain = _without_prefill(model)
    rows = plain_harm(model) + _under_attack(model, None, "prefill")
    if ablation is not None:
        rows += _under_attack(plain, ablation, "refusal ablation")
        rows += _under_attack(model, ablation, "prefill + refusal ablation")
    return rows


def _without_prefill(model: Model) -> Model:
    return model.with_behaviours(replace(model.behaviour(TARGET), prefill=""))


def _under_attack(model: Model, ablation: WeightMask | None, attack: str) -> Rows:
    # Fine-tuning and pruning change the model for which the attacker's mask was made.
    with masked_if_given(model.bridge, ablation, same_model=False):
        return Rows(row.labelled(attack=attack) for row in model.measure(only=TARGET))
