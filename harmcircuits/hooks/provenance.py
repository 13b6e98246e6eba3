"""What scores and masks say of the weights they were made on, and whether these are the same."""

import warnings
from collections.abc import Mapping
from typing import Any

from harmcircuits.circuits.masks import WeightMask
from harmcircuits.circuits.scores import Source
from harmcircuits.hooks.bridge import Bridge
from harmcircuits.hooks.weights import model_fingerprint, values_digest


def source_on(
    bridge: Bridge,
    method: str,
    settings: Mapping[str, Any] | None = None,
    parents: tuple[Source, ...] = (),
) -> Source:
    """The source of what is made on a model as it is now, with fingerprint and digest of it."""
    fingerprint, digest = model_fingerprint(bridge), values_digest(bridge)
    return Source(fingerprint, method, settings or {}, parents, digest)


def warn_of_other_weights(bridge: Bridge, mask: WeightMask) -> None:
    """A warning where a mask that was read from a file was made on other weights than these."""
    made_on = mask.source.all_weights
    if not mask.file or not made_on:
        return
    asked: set[Any] = vars(bridge).setdefault("_harmcircuits_masks", set())
    question = (mask.file, *sorted(made_on))
    if question in asked:
        return
    asked.add(question)
    digest = values_digest(bridge)
    if digest not in made_on:
        warnings.warn(
            f"{mask.file}: the mask was made on weights {', '.join(sorted(made_on))}, this model "
            f"has {digest}: another checkpoint, or one that was trained further; find the "
            "mask on these weights, or say that it is meant by same_model=False",
            stacklevel=5,  # masked, its context manager, and whoever enters it
        )
