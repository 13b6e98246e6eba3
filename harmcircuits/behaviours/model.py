"""What a model is asked to do, whether it does it, and its own right answers to score on."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from harmcircuits.behaviours.generation import Judge, Sampling, greedy_answers, sampled_answers
from harmcircuits.circuits.masks import WeightMask
from harmcircuits.hooks.losses import Labels, answer_log_odds, auroc_over, average, completion_nll, rate
from harmcircuits.hooks.objectives import Objective, completion_loss
from harmcircuits.measurements import Measurement
from harmcircuits.prompts import Batch, Example, PromptSet, Template, tokenize


@dataclass(frozen=True)
class Behaviour:
    """A behaviour is its requests and the verdict that counts as showing it.

    `prompts(split)`: requests with reference answers for `"calibration"`, `"choice"` (choosing settings) and `"heldout"`;
    a request without one has an empty completion, and counts in rates but not in losses (see `references`).
    `metric`: the name of the rate of answers with verdict `wanted`; `nll_metric`: that of the reference answers' NLL.
    `prefill` opens every answer. `choices`: (yes words, no words) of a yes-or-no question, whose rows 2k and 2k + 1 are a
    matched pair: no is right, then yes is right. `objective`: what its weights are scored by. `max_new_tokens`: how long an
    answer may be, where it is not the subject's limit.
    """

    name: str
    metric: str
    nll_metric: str
    wanted: str
    prompts: Callable[[str], PromptSet]
    prefill: str = ""
    choices: tuple[tuple[str, ...], ...] = ()
    objective: Objective = completion_loss
    max_new_tokens: int | None = None

    def references(self, split: str) -> PromptSet:
        """The requests that have a reference answer."""
        return self.prompts(split).where(lambda example: bool(example.completion))

    def only(self, name: str, keep: Callable[[Example], bool]) -> "Behaviour":
        """The part of this behaviour whose requests satisfy `keep`, such as one category, as a behaviour called `name`."""
        return replace(self, name=name, prompts=lambda split: self.prompts(split).where(keep))


def by_category(behaviour: Behaviour) -> dict[str, Behaviour]:
    """The behaviour's parts by the category of its requests (types of harm, topics), each called `NAME/CATEGORY`."""
    found = {}
    for category in dict.fromkeys(example.category for example in behaviour.prompts("calibration")):
        name = f"{behaviour.name}/{category}"
        found[name] = behaviour.only(name, lambda example, category=category: example.category == category)
    return found


@dataclass(frozen=True)
class Subject:
    """A model under study with all it can be asked: `behaviours` by name, and the judge of its answers.

    `truth`: the true circuit of its harmful answers, where it is known. `is_invented`: its texts are invented words, so
    reports may show them. `answers`: how answers are made; one that keeps them on disk, for models whose answers are dear.
    `sampling`: how answers are drawn; None for greedy ones. `judge_name` goes with every rate, `details` (files, settings)
    into the manifest, `plain_text` is read for perplexity.
    """

    name: str
    bridge: TransformerBridge
    behaviours: Mapping[str, Behaviour]
    judge: Judge
    template: Template = "chat"
    max_new_tokens: int = 32
    batch_size: int = 64
    truth: WeightMask | None = None
    is_invented: bool = False
    answers: Callable[..., list[str]] = greedy_answers
    sampling: Sampling | None = None
    n_answered_at_once: int = 256
    judge_name: str = ""
    details: Mapping[str, str | int] = field(default_factory=dict)
    plain_text: Sequence[Batch] = field(default=(), repr=False)

    def batches(self, behaviour: Behaviour, prompts: PromptSet) -> list[Batch]:
        """Token batches of these answers to the behaviour's requests; its prefill is context, not target."""
        options = {"template": self.template, "prefill": behaviour.prefill, "batch_size": self.batch_size}
        return tokenize(prompts, self.bridge.tokenizer, **options)

    def answered(self, behaviour: Behaviour, prompts: PromptSet) -> PromptSet:
        """The same requests with the model's own answers, each as many times in a row as it is sampled.

        Yes-or-no questions are answered greedily: the log-odds say how sure the answer is.
        """
        options: dict[str, Any] = {"template": self.template, "prefill": behaviour.prefill}
        options |= {
            "batch_size": self.n_answered_at_once,
            "max_new_tokens": behaviour.max_new_tokens or self.max_new_tokens,
        }
        answers = self.answers
        if self.sampling and not behaviour.choices:
            answers = sampled_answers if answers is greedy_answers else answers
            options["sampling"] = self.sampling
        repeated = PromptSet(tuple(example for example in prompts for _ in range(self.n_samples(behaviour))))
        return repeated.with_completions(answers(self.bridge, prompts, **options))

    def n_samples(self, behaviour: Behaviour) -> int:
        """How many answers to each request there are."""
        return self.sampling.samples if self.sampling and not behaviour.choices else 1

    def verified(self, behaviour: Behaviour, prompts: PromptSet, *, wanted: str = "") -> PromptSet:
        """The same requests with the first of the model's own answers that has the behaviour's verdict (or `wanted`).

        An empty completion where none has it.
        """
        answered = self.answered(behaviour, prompts).examples
        wanted, each = wanted or behaviour.wanted, self.n_samples(behaviour)
        first = []
        for start in range(0, len(answered), each):
            samples = (one.completion for one in answered[start : start + each])
            prompt = answered[start].prompt
            first.append(next((text for text in samples if self.judge(prompt, text) == wanted), ""))
        return prompts.with_completions(first)

    def verdicts(self, prompts: PromptSet) -> list[str]:
        """The judge's verdict on each completion."""
        return [self.judge(example.prompt, example.completion) for example in prompts]


@dataclass(frozen=True)
class Calibration:
    """What a behaviour is scored on: the model's own answers that the judge verified, of `n_asked` requests."""

    prompts: PromptSet
    batches: Sequence[Batch]
    n_asked: int

    @property
    def n_kept(self) -> int:
        """How many answers the judge verified."""
        return len(self.prompts)


class NotShownError(ValueError):
    """The model shows a behaviour in none of its answers."""


def calibrate(subject: Subject, name: str, *, share: float = 1.0, seed: int = 0) -> Calibration:
    """The model's own answers to a behaviour's calibration requests, kept where the judge gives the wanted verdict.

    Where answers are sampled, the first such of each request. Scoring on unverified answers can find another circuit: a
    refusal is no harmful completion. `share` < 1 asks only about a random share of the items of every category, drawn with
    `seed` (see `PromptSet.sampled`): a resample of the calibration data. Raises NotShownError (a ValueError) when no answer
    is kept, and as `PromptSet.sampled`.
    """
    behaviour = subject.behaviours[name]
    asked = subject.verified(behaviour, behaviour.prompts("calibration").sampled(share, seed=seed))
    kept = asked.where(lambda example: bool(example.completion))
    if not len(kept):
        raise NotShownError(
            f"{subject.name} does not show {name!r}: none of its answers to {len(asked)} calibration requests was judged "
            f"{behaviour.wanted!r}, so there is nothing to score on"
        )
    return Calibration(kept, subject.batches(behaviour, kept), len(asked))


def calibrate_shown(subject: Subject, *, share: float = 1.0, seed: int = 0) -> dict[str, Calibration]:
    """`calibrate` for every behaviour that the subject shows; an unaligned model, say, has no refusals to score on."""
    found = {}
    for name in subject.behaviours:
        with suppress(NotShownError):
            found[name] = calibrate(subject, name, share=share, seed=seed)
    return found


@dataclass(frozen=True)
class Outcomes:
    """What a model does with each request of a behaviour, in their order.

    `answered`: the requests with the model's own answers, each as many times in a row as it is sampled. `verdicts`: those
    of the judge called `judge` (if it has a name) on each answer. `nll`: Float[n], nats per token of the reference answer
    to each request; NaN for a request without one.
    """

    behaviour: Behaviour
    answered: PromptSet
    verdicts: tuple[str, ...]
    nll: Float[Tensor, " n"]
    judge: str = ""

    @property
    def n_samples(self) -> int:
        """Answers to each request."""
        return len(self.verdicts) // max(1, len(self.nll)) or 1

    @property
    def hits(self) -> list[float]:
        """For each request the share of its answers that show the behaviour: 0 or 1 where there is one."""
        each, shown = self.n_samples, [verdict == self.behaviour.wanted for verdict in self.verdicts]
        return [sum(shown[start : start + each]) / each for start in range(0, len(shown), each)]

    @property
    def groups(self) -> list[str]:
        """What each request is about; intervals resample whole groups."""
        return [example.cluster for example in self.answered.examples[:: self.n_samples]]

    def rows(self, labels: Labels) -> list[Measurement]:
        """Rate of the wanted verdict and NLL of references; of harmful requests also refusals and degenerate text.

        Rates are over all answers, with intervals that count each group once. The NLL is left out where no request has a
        reference.
        """
        attack = {"attack": "prefill" if self.behaviour.prefill else "none"}
        if self.judge:
            attack["judge"] = self.judge
        counted = {self.behaviour.metric: self.behaviour.wanted}
        if self.behaviour.wanted == "harmful":
            counted |= {"harm_refusal_rate": "refusal", "harm_degenerate_rate": "degenerate"}
        groups = [group for group in self.groups for _ in range(self.n_samples)]
        rows = [
            rate(metric, {**labels, **attack}, [verdict == wanted for verdict in self.verdicts], groups)
            for metric, wanted in counted.items()
        ]
        has_reference = ~self.nll.isnan()
        if has_reference.any():
            groups = [group for group, kept in zip(self.groups, has_reference.tolist(), strict=True) if kept]
            rows.append(average(self.behaviour.nll_metric, labels, self.nll[has_reference], groups))
        return rows


def outcomes(subject: Subject, name: str, split: str) -> Outcomes:
    """What the model as it stands does with every request of a behaviour in a split."""
    behaviour = subject.behaviours[name]
    prompts = behaviour.prompts(split)
    answered = subject.answered(behaviour, prompts)
    nll = torch.full((len(prompts),), torch.nan)
    if len(references := behaviour.references(split)):
        has_reference = torch.tensor([bool(example.completion) for example in prompts])
        nll[has_reference] = completion_nll(subject.bridge, subject.batches(behaviour, references))
    return Outcomes(behaviour, answered, tuple(subject.verdicts(answered)), nll, subject.judge_name)


def measure(subject: Subject, split: str, labels: Labels, *, only: Iterable[str] = ()) -> list[Measurement]:
    """The model as it stands on every behaviour (or `only` these): rate of the wanted verdict, NLL of references.

    Harmful requests add the rates of refusals and of degenerate text, so that a fall of harm can be told from a loss of
    language. Yes-or-no questions add the accuracy over matched pairs and the AUROC of the answer's log-odds.
    """
    rows, where = [], {**labels, "split": split}
    for name in only or subject.behaviours:
        found = outcomes(subject, name, split)
        rows += found.rows(where)
        if found.behaviour.choices:
            yes, no = found.behaviour.choices
            odds = answer_log_odds(subject.bridge, found.answered, yes, no, template=subject.template)
            is_yes = torch.arange(len(odds)) % 2 == 1
            rows.append(rate(f"{name}_pair_accuracy", where, (odds[1::2] > odds[::2]).tolist(), found.groups[::2]))
            rows.append(auroc_over(f"{name}_auroc", where, odds, is_yes, found.groups))
    return rows
