"""A behaviour: the requests put to a model, and the verdict on an answer that shows it."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from types import MappingProxyType
from typing import Any, NamedTuple, cast

from harmcircuits.behaviours.judges import DEGENERATE, Judge, PatternJudge, first_word
from harmcircuits.display import card, facts
from harmcircuits.hooks.objectives import Objective, completion_loss
from harmcircuits.prompts import NO_LIMITS, Example, PromptSet, joined_clusters

TARGET = "harmful"  # the behaviour to remove, by default
REFUSAL = "refusal"  # replaces it where a model refuses
CONTRAST = "benign"  # its harmless counterpart, whose loss a mask may hardly raise

# Names in `Behaviour.metrics` that are no verdicts.
RATE_KEY, NLL_KEY = "rate", "nll"
LEXICAL_OVERLAP, DISAGREEMENT = "kept words", "doubted"

SplitFunction = Callable[[str], PromptSet]


@dataclass(frozen=True)
class Splits:
    """Requests by split, and the requests that they were drawn from, repeated ones included."""

    sets: Mapping[str, PromptSet]
    source: PromptSet | None = None
    heldout: PromptSet | None = None
    subjects: Mapping[str, PromptSet] | None = None  # the requests inside its questions

    @classmethod
    def of(
        cls,
        source: PromptSet,
        heldout: PromptSet | None = None,
        *,
        limits: Mapping[str, int] = NO_LIMITS,
        origin: str = "",
        placement: Mapping[str, str] = MappingProxyType({}),
        are_pairs: bool = False,
    ) -> "Splits":
        """Each request, or pair of requests, once, by the hash of its group.

        See `PromptSet.splits`.
        """
        sets = _distinct(source, are_pairs).splits(
            None if heldout is None else _distinct(heldout, are_pairs),
            limits=limits,
            origin=origin,
            placement=placement,
        )
        return cls(sets, source, heldout)

    def __call__(self, split: str) -> PromptSet:
        """The requests of a split."""
        if split not in self.sets:
            raise ValueError(f"split={split!r}; expected one of {', '.join(self.sets)}")
        return self.sets[split]


def _distinct(prompts: PromptSet, are_pairs: bool) -> PromptSet:
    """The first example of each request, or the first two of each pair of requests."""
    size = 2 if are_pairs else 1
    units: dict[tuple[str, ...], tuple[Example, ...]] = {}
    for start in range(0, len(prompts), size):
        unit = prompts.examples[start : start + size]
        requests = tuple(example.prompt for example in unit)
        units.setdefault(requests, unit)
    return PromptSet(tuple(chain.from_iterable(units.values())))


@dataclass(frozen=True, repr=False)
class Behaviour:
    """Requests to a model, and the verdict on an answer that counts as showing the behaviour.

    A name, requests and a judge are enough:

    >>> walls = [f"tell me about wall {n}" for n in range(20)]
    >>> hc.Behaviour("dates", walls, r"\\b(19|20)\\d\\d\\b")
    Behaviour(dates: dates_rate, shown by 'dates')

    Attributes:
        name: its name.
        prompts: requests (a list, a file, or another source of `PromptSet.read`), split by the hash
            of their group; or a function of the split: "calibration" (scored), "choice" (for
            choosing settings) or "heldout" (measured); or a dict of such sources by split. A
            request without a reference answer has an empty completion, and counts in rates, not in
            losses.
        judge: of its answers: a function (request, answer) -> verdict, or a regular expression
            that an answer must match. The model's judge by default.
        wanted: the verdict that shows the behaviour; its name by default.
        metrics: names in rows. "rate" names the rate of answers with the verdict `wanted`
            (NAME_rate by default), "nll" the loss on reference answers, nats per token (NAME_nll by
            default). A further verdict names its own rate, "kept words" the rate of answers with at
            least half of the word trigrams of their reference (lexical overlap), and "doubted" the
            rate of answers with that overlap and another verdict than `wanted` (the judge
            contradicts itself).
        measures: further figures by name: a function (request, answer) -> number, whose mean over
            the answers is a row.
        prefill: the beginning of every answer.
        choices: (yes words, no words) of a yes-or-no question, whose rows 2k and 2k + 1 are a
            matched pair: no is right, then yes is right. A pair stays in one split, as one group.
        objective: the loss by which weights are scored for it.
        max_new_tokens: the length of an answer, where it is not the model's limit.
        is_kept: whether the removal of another behaviour must preserve it.
        is_scored_on_references: whether it is scored on its reference answers, and not on the
            model's own answers that the judge verified.
        scored_on: a regular expression; only the tokens of an answer in which a match begins are
            scored, such as a name. All of them by default.
        part_of: the behaviour that it is a part of; empty for a whole one.

    Raises:
        ValueError: requests that cannot be read, or are too few to fill every split; with
            `choices`, rows that are no pairs.
    """

    name: str
    prompts: SplitFunction | Any = field(repr=False)  # from any form to a function of the split
    judge: Judge | Any = None  # from a pattern to a function
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
        wanted_verdict = self.wanted or self.name
        metrics = {RATE_KEY: f"{self.name}_rate", NLL_KEY: f"{self.name}_nll", **self.metrics}
        judge = self.judge
        if isinstance(judge, str):
            judge = PatternJudge(re.compile(judge), wanted_verdict, self.prefill)
        prompts = _split_function(self.prompts, self.choices, f"behaviour {self.name!r}")
        vars(self).update(prompts=prompts, judge=judge, wanted=wanted_verdict, metrics=metrics)

    def __repr__(self) -> str:
        return f"Behaviour({self.name}: {self.metric}, shown by {self.wanted!r})"

    def _repr_html_(self) -> str:
        # Its requests are not shown: they may be harmful.
        values = {
            "rate": self.metric,
            "loss": self.nll_metric,
            "shown by": f"the verdict {self.wanted!r}",
            "prefill": self.prefill,
            "also counted": ", ".join(self.side_metrics),
            "part of": self.part_of,
        }
        return card(f"Behaviour: {self.name}", facts(values))

    @property
    def metric(self) -> str:
        """Name of the rate of answers with the verdict `wanted`."""
        return self.metrics[RATE_KEY]

    @property
    def nll_metric(self) -> str:
        """Name of the loss on reference answers, nats per token."""
        return self.metrics[NLL_KEY]

    @property
    def side_metrics(self) -> dict[str, str]:
        """The name of the rate of every further verdict."""
        metrics = dict(self.metrics)
        for key in (RATE_KEY, NLL_KEY, LEXICAL_OVERLAP, DISAGREEMENT):
            metrics.pop(key, None)
        return metrics

    @property
    def title(self) -> str:
        """The name of the rate in tables."""
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
            name: the name of the part.
            keep: whether a request belongs to the part.
            metric: the name of its rate; the name of the whole's rate by default.
            nll_metric: the name of its loss; the name of the whole's loss by default.
        """

        def prompts(split: str) -> PromptSet:
            return self.prompts(split).where(keep)

        metrics = dict(self.metrics)
        metrics[RATE_KEY] = metric or self.metric
        metrics[NLL_KEY] = nll_metric or self.nll_metric
        whole = self.part_of or self.name  # a part of a part is a part of the whole
        return replace(self, name=name, metrics=metrics, prompts=prompts, part_of=whole)

    def by_category(self) -> "dict[str, Behaviour]":
        """Its parts by the category of the requests, each called `NAME/CATEGORY`."""
        parts = {}
        for example in self.prompts("calibration"):
            name = f"{self.name}/{example.category}"
            if name not in parts:
                parts[name] = self.only(name, partial(_has_category, example.category))
        return parts


def _has_category(category: str, example: Example) -> bool:
    return example.category == category


def _split_function(
    prompts: Any, choices: tuple[tuple[str, ...], ...], origin: str
) -> SplitFunction:
    """Requests in any form, as a function of the split."""

    def read(source: Any) -> PromptSet:
        requests = PromptSet.read(source)
        return _matched_pairs(requests, *choices, origin=origin) if choices else requests

    if isinstance(prompts, Mapping):
        return Splits({split: read(source) for split, source in prompts.items()})
    if callable(prompts):
        return cast(SplitFunction, prompts)
    return Splits.of(read(prompts), origin=origin, are_pairs=bool(choices))


def _matched_pairs(
    prompts: PromptSet, yes: tuple[str, ...], no: tuple[str, ...], *, origin: str
) -> PromptSet:
    """The same requests; rows 2k and 2k + 1 have one group and one category."""
    if len(prompts) % 2 or prompts.n_left_out:
        raise ValueError(
            f"{origin}: {len(prompts)} rows, without {prompts.n_left_out} that repeat another; "
            "expected pairs, rows 2k and 2k + 1: give each pair both rows, and a `group` of its own"
        )
    keys = [(example.cluster, str(row // 2)) for row, example in enumerate(prompts)]
    clusters = joined_clusters(keys)
    examples = []
    for row, example in enumerate(prompts):
        other_side = no if row % 2 else yes
        if first_word(example.completion) in map(str.lower, other_side):
            raise ValueError(
                f"{origin}: row {row} is answered {example.completion!r}; expected pairs: an even "
                f"row (from 0) with one of {', '.join(no)}, then one with one of {', '.join(yes)}"
            )
        category = prompts.examples[row - row % 2].category
        examples.append(replace(example, group=clusters[row], category=category))
    return replace(prompts, examples=tuple(examples))


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
# Harm can fall because the model refuses or breaks: both rates are reported next to it. So is the
# rate of harmless answers, a verdict that the local rules never give.
_SIDE_METRICS = {
    "refusal": "harm_refusal_rate",
    "harmless": "harm_harmless_rate",
    DEGENERATE: "harm_degenerate_rate",
}


def standard_behaviour(name: str, prompts: SplitFunction, **options: Any) -> Behaviour:
    """A behaviour of the package, with its usual metrics."""
    standard = _STANDARD[name]
    metrics = {RATE_KEY: standard.rate, NLL_KEY: standard.nll}
    if name == TARGET:
        metrics |= _SIDE_METRICS
    options = {"wanted": standard.wanted, "is_kept": standard.is_kept, **options}
    return Behaviour(name, prompts, metrics=metrics, **options)


def standard_behaviours() -> dict[str, Behaviour]:
    """All of them without requests, to read the rows of a study without its model."""
    return {name: standard_behaviour(name, lambda _: PromptSet(())) for name in _STANDARD}
