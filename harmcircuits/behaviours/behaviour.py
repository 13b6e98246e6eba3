"""A behaviour: the requests put to a model, and the verdict on an answer that shows it."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from harmcircuits.behaviours.judges import DEGENERATE, PatternJudge
from harmcircuits.display import card, facts
from harmcircuits.hooks.objectives import Objective, completion_loss
from harmcircuits.prompts import NO_LIMITS, Example, PromptSet

TARGET = "harmful"  # what is removed, unless something else is named
REFUSAL = "refusal"  # what takes its place, where a model refuses
CONTRAST = "benign"  # the harmless counterpart, whose loss a mask may hardly raise

# Names in `Behaviour.metrics` that are no verdicts.
RATE, NLL, KEPT_WORDS, DOUBTED = "rate", "nll", "kept words", "doubted"


@dataclass(frozen=True)
class Splits:
    """Requests by split, and those that they were drawn of, repeated ones included."""

    sets: Mapping[str, PromptSet]
    given: PromptSet | None = None
    heldout: PromptSet | None = None
    about: Mapping[str, PromptSet] | None = None  # the requests that its questions are about

    @classmethod
    def of(
        cls,
        given: PromptSet,
        heldout: PromptSet | None = None,
        *,
        limits: Mapping[str, int] = NO_LIMITS,
        origin: str = "",
    ) -> "Splits":
        """Each request once, in the split that the hash of its group says."""
        apart = _once(heldout) if heldout is not None else None
        sets = _once(given).splits(apart, limits=limits, origin=origin)
        return cls(sets, given, heldout)

    def __call__(self, split: str) -> PromptSet:
        """The requests of a split."""
        if split not in self.sets:
            raise ValueError(f"split={split!r}; expected one of {', '.join(self.sets)}")
        return self.sets[split]


def _once(prompts: PromptSet) -> PromptSet:
    first: dict[str, Example] = {}
    for example in prompts:
        first.setdefault(example.prompt, example)
    return PromptSet(tuple(first.values()))


@dataclass(frozen=True, repr=False)
class Behaviour:
    """Requests to a model, and the verdict on an answer that counts as showing the behaviour.

    A name, requests and a judge are enough:

    >>> walls = [f"tell me about wall {n}" for n in range(20)]
    >>> hc.Behaviour("dates", walls, r"\\b(19|20)\\d\\d\\b")
    Behaviour(dates: dates_rate, shown by 'dates')

    Attributes:
        name: its name.
        prompts: requests (a list, a file, or what else `PromptSet.read` takes), split by the hash
            of their group; or a function that gives those of a split: "calibration" (scored),
            "choice" (for choosing settings) or "heldout" (measured); or a dict of these. A request
            without a reference answer has an empty completion, and counts in rates, not in losses.
        judge: of its answers: a function (request, answer) -> verdict, or a regular expression of
            what an answer must contain. The model's judge by default.
        wanted: the verdict that shows it; its name by default.
        metrics: names in rows, where they are not NAME_rate ("rate": the rate of answers with the
            verdict `wanted`) and NAME_nll ("nll": the loss on reference answers, nats per token);
            and of what else is counted: further verdicts, "kept words" (answers with at least half
            of the word triples of their reference) and "doubted" (those of them whose verdict is
            not `wanted`: there the judge contradicts itself).
        measures: further figures by name: a function (request, answer) -> number, whose mean over
            the answers is a row.
        prefill: opens every answer.
        choices: (yes words, no words) of a yes-or-no question, whose rows 2k and 2k + 1 are a
            matched pair: no is right, then yes is right.
        objective: the loss by which weights are scored for it.
        max_new_tokens: how long an answer may be, where it is not the model's limit.
        is_kept: whether it is an ability that the removal of another behaviour must leave alone.
        is_scored_on_references: whether it is scored on its reference answers as they are, not on
            the model's own answers that the judge verified.
        scored_on: a regular expression; only the tokens of an answer in which a match begins are
            scored, such as a name. All of them by default.
        part_of: the behaviour whose requests it takes some of; empty for a whole one.

    Raises:
        ValueError: requests that cannot be read, or are too few to fill every split.
    """

    name: str
    prompts: Any = field(repr=False)  # a function of the split once it is made
    judge: Any = None
    wanted: str = ""
    metrics: Mapping[str, str] = field(default_factory=dict)
    measures: Mapping[str, Callable[[str, str], float]] = field(default_factory=dict)
    prefill: str = ""
    choices: tuple[tuple[str, ...], ...] = ()
    objective: Objective = completion_loss
    max_new_tokens: int | None = None
    is_kept: bool = False
    is_scored_on_references: bool = False
    scored_on: str = ""
    part_of: str = ""

    def __post_init__(self) -> None:
        prompts, judge, wanted = self.prompts, self.judge, self.wanted or self.name
        if isinstance(prompts, Mapping):
            prompts = Splits(prompts)
        elif not callable(prompts):
            prompts = Splits.of(PromptSet.read(prompts), origin=f"behaviour {self.name!r}")
        if isinstance(judge, str):
            judge = PatternJudge(re.compile(judge), wanted, self.prefill)
        usual = {RATE: f"{self.name}_rate", NLL: f"{self.name}_nll"}
        made = {"prompts": prompts, "judge": judge, "wanted": wanted}
        for name, value in {**made, "metrics": {**usual, **self.metrics}}.items():
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        return f"Behaviour({self.name}: {self.metric}, shown by {self.wanted!r})"

    def _repr_html_(self) -> str:
        # Its requests are not shown: they may be harmful.
        values = {
            "rate": self.metric,
            "loss": self.nll_metric,
            "shown by": f"the verdict {self.wanted!r}",
            "begun with": self.prefill,
            "counted too": ", ".join(self.side_metrics),
            "part of": self.part_of,
        }
        return card(f"Behaviour: {self.name}", facts(values))

    @property
    def metric(self) -> str:
        """Name of the rate of answers with the verdict `wanted`."""
        return self.metrics[RATE]

    @property
    def nll_metric(self) -> str:
        """Name of the loss on reference answers, nats per token."""
        return self.metrics[NLL]

    @property
    def side_metrics(self) -> dict[str, str]:
        """Further verdicts that are counted, and the name of each one's rate."""
        others = (RATE, NLL, KEPT_WORDS, DOUBTED)
        return {verdict: name for verdict, name in self.metrics.items() if verdict not in others}

    @property
    def title(self) -> str:
        """What tables call the rate."""
        return _STANDARD[self.name].title if self.name in _STANDARD else self.name

    @property
    def is_loss_shown(self) -> bool:
        """Whether tables show its loss in addition to its rate."""
        whole = self.part_of or self.name
        return whole not in _STANDARD or _STANDARD[whole].is_loss_shown

    def references(self, split: str) -> PromptSet:
        """The requests of a split that have a reference answer."""
        return self.prompts(split).where(lambda example: bool(example.completion))

    def only(
        self,
        name: str,
        keep: Callable[[Example], bool],
        *,
        metric: str = "",
        nll_metric: str = "",
    ) -> "Behaviour":
        """The part of this behaviour whose requests satisfy a condition, such as one category.

        >>> model.behaviours["benign"].only("zovob", lambda example: example.category == "zovob")
        Behaviour(zovob: benign_valid_rate, shown by 'benign')

        Args:
            name: what the part is called.
            keep: whether a request belongs to it.
            metric: its own name of the rate; that of the whole by default.
            nll_metric: its own name of the loss; that of the whole by default.
        """
        whole = self.part_of or self.name  # a part of a part is a part of the whole
        names = {RATE: metric or self.metric, NLL: nll_metric or self.nll_metric}

        def prompts(split: str) -> PromptSet:
            return self.prompts(split).where(keep)

        metrics = {**self.metrics, **names}
        return replace(self, name=name, metrics=metrics, prompts=prompts, part_of=whole)

    def by_category(self) -> "dict[str, Behaviour]":
        """Its parts by the category of the requests, each called `NAME/CATEGORY`."""
        parts = {}
        categories = dict.fromkeys(example.category for example in self.prompts("calibration"))
        for category in categories:
            name = f"{self.name}/{category}"
            # `of` is bound now; `category` alone would be that of the last turn in every part.
            parts[name] = self.only(name, lambda example, of=category: example.category == of)
        return parts


# The behaviours that come with the package


class _Standard(NamedTuple):
    title: str
    rate: str
    nll: str
    wanted: str
    is_kept: bool = True
    is_loss_shown: bool = False


_STANDARD = {
    "harmful": _Standard("harm", "harm_valid_rate", "harm_nll", "harmful", False, True),
    "benign": _Standard("benign", "benign_valid_rate", "benign_nll", "benign", True, True),
    "recognition": _Standard("recognises", "recognition_accuracy", "recognition_nll", "correct"),
    "explanation": _Standard("explains", "explanation_rate", "explanation_nll", "correct"),
    "knowledge": _Standard("knows", "knowledge_rate", "knowledge_nll", "correct"),
    "refusal": _Standard("refuses", "refusal_rate", "refusal_nll", "refusal", False),
    "borderline": _Standard("borderline", "borderline_valid_rate", "borderline_nll", "benign"),
    "prefilled": _Standard(
        "prefilled", "prefilled_valid_rate", "prefilled_nll", "benign", True, True
    ),
}
# Less harm because of more refusals, or of broken text, is another result than less harm alone. So
# both are counted beside it, and what a judge that sees harm calls harmless. The local rules never
# do.
_BESIDE_HARM = {
    "refusal": "harm_refusal_rate",
    "harmless": "harm_harmless_rate",
    DEGENERATE: "harm_degenerate_rate",
}


def standard_behaviour(name: str, prompts: Callable[[str], PromptSet], **options: Any) -> Behaviour:
    """A behaviour of the package, with its usual metrics."""
    words = _STANDARD[name]
    metrics = {RATE: words.rate, NLL: words.nll}
    if name == TARGET:
        metrics |= _BESIDE_HARM
    return Behaviour(
        name, prompts, wanted=words.wanted, metrics=metrics, is_kept=words.is_kept, **options
    )


def standard_behaviours() -> dict[str, Behaviour]:
    """All of them without requests, for rows of a study whose model is not at hand."""
    return {name: standard_behaviour(name, lambda _: PromptSet(())) for name in _STANDARD}
