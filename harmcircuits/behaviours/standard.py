"""The behaviours that come with the package: their metrics, titles, and whether they are kept."""

from collections.abc import Callable
from typing import Any, NamedTuple

from harmcircuits.behaviours.behaviour import DEGENERATE, Behaviour
from harmcircuits.prompts import PromptSet

TARGET = "harmful"  # what is removed, unless something else is named
CONTRAST = "benign"  # the harmless counterpart, whose loss a mask may hardly raise


class _Words(NamedTuple):
    title: str
    metric: str
    short: str
    wanted: str
    is_kept: bool = True
    is_loss_shown: bool = False


_STANDARD = {
    "harmful": _Words("harm", "harm_valid_rate", "harm", "harmful", False, True),
    "benign": _Words("benign", "benign_valid_rate", "benign", "benign", True, True),
    "recognition": _Words("recognises", "recognition_accuracy", "recognition", "correct"),
    "explanation": _Words("explains", "explanation_rate", "explanation", "correct"),
    "knowledge": _Words("knows", "knowledge_rate", "knowledge", "correct"),
    "refusal": _Words("refuses", "refusal_rate", "refusal", "refusal", False),
    "borderline": _Words("borderline", "borderline_valid_rate", "borderline", "benign"),
    "prefilled": _Words("prefilled", "prefilled_valid_rate", "prefilled", "benign", True, True),
}
# Less harm because of more refusals, or of broken text, is another result than less harm alone. So
# both are counted beside it, and what a judge that sees harm calls harmless. The local rules never
# do.
_SIDE_METRICS = {
    "harmful": {
        "refusal": "harm_refusal_rate",
        "harmless": "harm_harmless_rate",
        DEGENERATE: "harm_degenerate_rate",
    }
}


def standard_behaviour(name: str, prompts: Callable[[str], PromptSet], **options: Any) -> Behaviour:
    """A behaviour of the package, with its usual metrics."""
    words = _STANDARD[name]
    return Behaviour(
        name,
        metric=words.metric,
        nll_metric=f"{words.short}_nll",
        wanted=words.wanted,
        prompts=prompts,
        title=words.title,
        is_kept=words.is_kept,
        is_loss_shown=words.is_loss_shown,
        side_metrics=_SIDE_METRICS.get(name, {}),
        **options,
    )


def standard_behaviours() -> dict[str, Behaviour]:
    """All of them without requests, for rows of a study whose model is not at hand."""
    return {name: standard_behaviour(name, lambda _: PromptSet(())) for name in _STANDARD}
