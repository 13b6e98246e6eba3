"""A behaviour: the requests put to a model, and the verdict on an answer that shows it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from harmcircuits.display import card, facts
from harmcircuits.hooks.objectives import Objective, completion_loss
from harmcircuits.prompts import Example, PromptSet

Judge = Callable[[str, str], str]
"""(prompt, completion) -> verdict, a word such as "harmful", "refusal" or "degenerate"."""

DEGENERATE = "degenerate"  # every judge's verdict on broken text


def prepare(judge: Judge | None, answers: Sequence[Example]) -> None:
    """Show a judge all answers at once, where it has a method `prepare` that can use them."""
    see = getattr(judge, "prepare", None)
    if see is not None:
        see(answers)


@dataclass(frozen=True, repr=False)
class Behaviour:
    """Requests to a model, and the verdict on an answer that counts as showing the behaviour.

    >>> model.behaviours["benign"].only("first topic", lambda example: example.category == "zovob")
    Behaviour(first topic: benign_valid_rate, shown by 'benign')

    Attributes:
        name: its name.
        metric: name of the rate of answers with the verdict `wanted`.
        nll_metric: name of the loss on reference answers, nats per token.
        wanted: the verdict that shows it.
        prompts: requests with reference answers for a split: "calibration" (scored), "choice" (for
            choosing settings) or "heldout" (measured). A request without a reference has an empty
            completion, and counts in rates but not in losses.
        prefill: opens every answer.
        choices: (yes words, no words) of a yes-or-no question, whose rows 2k and 2k + 1 are a
            matched pair: no is right, then yes is right.
        objective: the loss by which weights are scored for it.
        judge: the judge of its answers, where it is not the model's.
        max_new_tokens: how long an answer may be, where it is not the model's limit.
        title: what tables call the rate; the name by default.
        is_kept: whether it is an ability that the removal of another behaviour must leave alone.
        is_loss_shown: whether tables show its loss in addition to its rate.
        is_scored_on_references: whether it is scored on its reference answers as they are, not on
            the model's own answers that the judge verified.
        part_of: the behaviour whose requests it takes some of; empty for a whole one.
        side_metrics: further verdicts that are counted, and the name of each one's rate.
        words_metric: name of the share of answers that keep at least half of the word triples of
            the reference answer (see `outcomes.keeps_words`), for behaviours whose references are
            the unpruned model's own answers; empty where it is not measured.
        doubt_metric: name of the share of answers that keep these words and yet do not have the
            verdict `wanted`, as the reference has: there the judge contradicts itself.
    """

    name: str
    metric: str
    nll_metric: str
    wanted: str
    prompts: Callable[[str], PromptSet] = field(repr=False)
    prefill: str = ""
    choices: tuple[tuple[str, ...], ...] = ()
    objective: Objective = completion_loss
    judge: Judge | None = None
    max_new_tokens: int | None = None
    title: str = ""
    is_kept: bool = False
    is_loss_shown: bool = False
    is_scored_on_references: bool = False
    part_of: str = ""
    side_metrics: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    words_metric: str = ""
    doubt_metric: str = ""

    def __post_init__(self) -> None:
        if not self.title:
            object.__setattr__(self, "title", self.name)

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

        Args:
            name: what the part is called.
            keep: whether a request belongs to it.
            metric: its own name of the rate; that of the whole by default.
            nll_metric: its own name of the loss; that of the whole by default.
        """
        whole = self.part_of or self.name  # a part of a part is a part of the whole

        def prompts(split: str) -> PromptSet:
            return self.prompts(split).where(keep)

        return replace(
            self,
            name=name,
            metric=metric or self.metric,
            nll_metric=nll_metric or self.nll_metric,
            prompts=prompts,
            part_of=whole,
            title=name,
        )

    def by_category(self) -> "dict[str, Behaviour]":
        """Its parts by the category of the requests, each called `NAME/CATEGORY`."""
        parts = {}
        categories = dict.fromkeys(example.category for example in self.prompts("calibration"))
        for category in categories:
            name = f"{self.name}/{category}"
            # `of` is bound now; `category` alone would be that of the last turn in every part.
            parts[name] = self.only(name, lambda example, of=category: example.category == of)
        return parts
