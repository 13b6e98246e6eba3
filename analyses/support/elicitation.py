"""Getting out of a model what it holds back, with its weights as they are."""

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
REFUSAL_SHARE = 0.01  # of the weights: of those that refusals need, and that are spared


def refusals_removed(
    model: Model,
    *,
    mask: WeightMask | None = None,
    refusal: str = "refusal",
    spared: str = CONTRAST,
) -> WeightMask | None:
    """The refusal ablation of a model; None where it refuses nothing or answers nothing benign."""
    if not {refusal, spared} <= set(model.behaviours):
        return None
    with masked_if_given(model.bridge, mask), suppress(NotShownError):
        refusals, others = model.calibration(refusal), model.calibration(spared)
        return set_difference(
            model.bridge,
            refusals.batches,
            [others.batches],
            q=REFUSAL_SHARE,
            p=REFUSAL_SHARE,
            signed=False,
        )
    return None


def elicited(
    model: Model,
    *,
    target: str = TARGET,
    unrefusing: WeightMask | None = None,
    only_plain: bool = False,
) -> Rows:
    """What a model as it stands answers to held-out requests under every attack."""
    plain = model.with_behaviours(replace(model.behaviour(target), prefill=""))
    attacks: dict[str, tuple[Model, WeightMask | None]] = {PLAIN: (plain, None)}
    if not only_plain:
        attacks["prefill"] = (model, None)
        if unrefusing is not None:
            attacks["refusal ablation"] = (plain, unrefusing)
            attacks["prefill + refusal ablation"] = (model, unrefusing)

    rows = Rows()
    for attack, (asked, removed) in attacks.items():
        # What is fine-tuned or pruned is no longer the model on which the attacker's mask was made.
        with masked_if_given(model.bridge, removed, same_model=False):
            rows += [row.labelled(attack=attack) for row in asked.measure(only=target)]
    return rows
