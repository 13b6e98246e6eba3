"""A model with all it can be asked: its answers, their rates and losses, and its circuits."""

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice
from typing import Any, overload

import torch

from harmcircuits.batches import Batch, Template, at_matches, target_ids, tokenize
from harmcircuits.behaviours.behaviour import Behaviour
from harmcircuits.behaviours.generation import GenerationCache, generate, request_ids
from harmcircuits.behaviours.judges import Judge, name_of, prepare
from harmcircuits.behaviours.outcomes import Calibration, NotShownError, Outcomes, few_answers
from harmcircuits.behaviours.repeats import repeats_text
from harmcircuits.circuits.masks import WeightMask
from harmcircuits.display import card, html_table, listed, nearest, note, plural
from harmcircuits.hooks.bridge import Bridge
from harmcircuits.hooks.checks import naming_data, refuse_batches
from harmcircuits.hooks.generation import Sampling
from harmcircuits.hooks.losses import answer_log_odds, completion_nll
from harmcircuits.hooks.masking import masked_if_given
from harmcircuits.measurements import Label, Labels, Measurement, Rows
from harmcircuits.prompts import SPLITS, Answer, Example, PromptSet
from harmcircuits.search.circuit import BUDGET, find_circuit
from harmcircuits.search.texts import Budget

# Requests answered at once for each example scored at once: answers keep no activations for a
# backward pass, and the next token of a large batch costs little more than of a small one.
ANSWERED_PER_SCORED = 4
OTHERS = "others"  # protected by default: every other behaviour that the model shows


@dataclass(frozen=True, repr=False)
class Model:
    """A model under study with everything it can be asked; `open_model` makes one.

    >>> model
    Model(sft: harmful, benign, recognition, explanation, knowledge, refusal and 19 parts)
    >>> mask = model.find_circuit("harmful", protect="benign", size=0.001, steps=4)
    >>> print(model.measure(mask=mask, only="benign"))
    benign_valid_rate 1 [0.517, 1]
    benign_nll ...

    Attributes:
        name: its name in rows.
        bridge: the TransformerBridge, live.
        behaviours: the behaviours that it can be asked for, by name.
        judge: of its answers, for behaviours without a judge of their own.
        template: how requests are written.
        max_new_tokens: the longest answer.
        batch_size: examples scored at once.
        n_answered_at_once: requests answered at once.
        sampling: how answers are drawn; greedily by default.
        cache: keeps the unpruned model's answers on disk, for models that are slow to sample.
        ground_truth: the true circuit of its target, where it is known.
        is_invented: whether its texts are invented words, so that pages may show them.
        judge_name: the label of every rate.
        validation: how well a judge of harm tells the model's own answers apart, with the label
            `used`; empty where no judge was validated, as for the local rules.
        repeats: the number of repeated requests, for a user's own files
            (see `harmcircuits.behaviours.repeats.repeat_rows`).
        details: files and settings, for the manifest of a run.
        plain_text: text for perplexity.
    """

    name: str
    bridge: Bridge
    behaviours: Mapping[str, Behaviour]
    judge: Judge
    template: Template = "chat"
    max_new_tokens: int = 32
    batch_size: int = 64
    n_answered_at_once: int = ANSWERED_PER_SCORED * 64
    sampling: Sampling | None = None
    cache: GenerationCache | None = None
    ground_truth: WeightMask | None = None
    is_invented: bool = False
    judge_name: str = ""
    validation: Rows = field(default_factory=Rows)
    repeats: Rows = field(default_factory=Rows)
    details: Mapping[str, Label] = field(default_factory=dict)
    plain_text: Sequence[Batch] = ()

    def __repr__(self) -> str:
        whole = self.whole_behaviours
        n_parts = len(self.behaviours) - len(whole)
        parts = f" and {plural(n_parts, 'part')}" if n_parts else ""
        return f"Model({self.name}: {listed(whole)}{parts})"

    def _repr_html_(self) -> str:
        # Requests are not shown: they may be harmful.
        parts = Counter(behaviour.part_of for behaviour in self.behaviours.values())
        body = []
        for name in self.whole_behaviours:
            behaviour = self.behaviours[name]
            verdict = f"the verdict {behaviour.wanted!r}"
            n_parts = str(parts[name] or "")
            body.append([name, behaviour.metric, verdict, behaviour.prefill, n_parts])
        table = html_table(["behaviour", "rate", "shown by", "prefill", "parts"], body)

        cfg = self.bridge.cfg
        size = f"{cfg.n_layers} layers of {cfg.n_heads} heads, width {cfg.d_model}"
        text = f"{size}; template {self.template}; judge {self.judge_name or 'unnamed'}"
        return card(f"Model {self.name}", note(text), table, note(repeats_text(self.repeats)))

    @property
    def whole_behaviours(self) -> list[str]:
        """The names of its behaviours that are not parts of another."""
        return [name for name, behaviour in self.behaviours.items() if not behaviour.part_of]

    def behaviour(self, name: str) -> Behaviour:
        """A behaviour by name.

        Args:
            name: one of `behaviours`.

        Raises:
            ValueError: the model has no such behaviour.
        """
        if not self.behaviours:
            raise ValueError(
                f"{self.name} has no behaviour {name!r}, nor any other; give open_model its "
                "prompts={'harmful': FILE, 'benign': FILE} or behaviours=[...]"
            )
        if name not in self.behaviours:
            hint = nearest(name, self.behaviours)
            raise ValueError(f"{self.name} has no behaviour {name!r}; {hint}")
        return self.behaviours[name]

    def with_behaviours(self, *behaviours: Behaviour) -> "Model":
        """The same model with further behaviours, which replace those of the same names.

        Args:
            behaviours: the behaviours to add.
        """
        by_name = {behaviour.name: behaviour for behaviour in behaviours}
        return replace(self, behaviours={**self.behaviours, **by_name})

    def sampled(self, share: float, *, seed: int) -> "Model":
        """The same model with a random share of the items of every category and split.

        Args:
            share: of the items, in (0, 1], each with all its requests.
            seed: of the draw.
        """
        behaviours = []
        for behaviour in self.behaviours.values():
            prompts = partial(_sample, behaviour, share, seed)
            behaviours.append(replace(behaviour, prompts=prompts))
        return self.with_behaviours(*behaviours)

    @overload
    def generate(
        self, prompts: str, *, prefill: str = "", mask: WeightMask | None = None
    ) -> str | list[str]: ...

    @overload
    def generate(
        self,
        prompts: "list[str] | tuple[str, ...] | PromptSet",
        *,
        prefill: str = "",
        mask: WeightMask | None = None,
    ) -> list[str]: ...

    def generate(
        self,
        prompts: "str | list[str] | tuple[str, ...] | PromptSet",
        *,
        prefill: str = "",
        mask: WeightMask | None = None,
    ) -> str | list[str]:
        """The model's answers, `prefill` included.

        One answer to one request is a string; several answers, or answers to a list, are a list.

        Args:
            prompts: a request or several.
            prefill: the beginning of every answer.
            mask: weights removed while the model answers.

        Raises:
            ValueError: as `masked`.
        """
        requests = PromptSet.of(prompts)
        with masked_if_given(self.bridge, mask):
            generated = _generated(self, requests, prefill, self.max_new_tokens, self.sampling)
        answers = [answer.text for answer in generated]
        return answers[0] if isinstance(prompts, str) and len(answers) == 1 else answers

    def batches(self, behaviour: Behaviour, prompts: PromptSet) -> list[Batch]:
        """Token batches of a behaviour's requests with answers; its prefill is no target.

        Args:
            behaviour: the behaviour, whose prefill is used.
            prompts: the requests with their answers.
        """
        return tokenize(
            prompts,
            self.bridge.tokenizer,
            template=self.template,
            prefill=behaviour.prefill,
            batch_size=self.batch_size,
        )

    def answers(self, behaviour: Behaviour, prompts: PromptSet) -> PromptSet:
        """The same requests with the model's own answers, each as often as it is sampled.

        Yes-or-no questions are answered greedily: the log-odds measure how sure the answer is.

        Args:
            behaviour: the behaviour, whose prefill and length of answers are used.
            prompts: the requests.
        """
        (answers,) = answers_together(self, [(behaviour, prompts)])
        return answers

    def verdicts(self, behaviour: Behaviour, answers: PromptSet) -> list[str]:
        """The judge's verdict on each completion.

        Args:
            behaviour: the behaviour, whose judge is used, or the model's judge where it has none.
            answers: requests with completions.
        """
        judge = behaviour.judge or self.judge
        prepare(judge, answers.examples)
        return [judge(example.prompt, example.completion) for example in answers]

    def verified(self, behaviour: Behaviour, prompts: PromptSet, *, wanted: str = "") -> PromptSet:
        """The same requests with the first of the model's own answers that shows the behaviour.

        The completion is empty where no answer shows it. An answer without a word after the prefill
        has nothing to score, and shows nothing.

        Args:
            behaviour: the behaviour.
            prompts: the requests.
            wanted: the verdict that counts, in place of the behaviour's.
        """
        (verified,) = verified_together(self, [(behaviour, prompts)], wanted=wanted)
        return verified

    def calibration(self, name: str, *, share: float = 1.0, seed: int = 0) -> Calibration:
        """The model's own answers to a behaviour's calibration requests that the judge verified.

        A behaviour that is scored on its references has these instead. Scores on unverified answers
        can give another circuit: a refusal is no harmful completion.

        Args:
            name: of the behaviour.
            share: of the items of every category: a sample of the data.
            seed: of the sample.

        Raises:
            ValueError: an unknown behaviour or share.
            NotShownError: no answer is verified (a ValueError).
        """
        behaviour = self.behaviour(name)
        requests = behaviour.prompts("calibration").sampled(share, seed=seed)
        answers = requests
        if not behaviour.is_scored_on_references:
            answers = self.verified(behaviour, requests)
        verified = answers.where(_has_completion)
        if not len(verified):
            raise NotShownError(
                f"{self.name} does not show {name!r}: none of its answers to {len(requests)} "
                f"calibration requests was judged {behaviour.wanted!r}, "
                "so there is nothing to score on"
            )
        batches = scored_batches(self, behaviour, verified)
        if behaviour.scored_on and not batches:
            raise NotShownError(
                f"{self.name}: none of {len(verified)} answers that show {name!r} contains "
                f"scored_on={behaviour.scored_on!r}"
            )
        return Calibration(verified, batches, len(requests), name)

    def calibrations(
        self, names: Iterable[str] | None = None, *, share: float = 1.0, seed: int = 0
    ) -> dict[str, Calibration]:
        """`calibration` of every behaviour that the model shows.

        An unaligned model, for example, has no refusals to score on.

        Args:
            names: the behaviours; all whole ones by default.
            share: as in `calibration`.
            seed: as in `calibration`.

        Raises:
            ValueError: as `calibration`, but a behaviour that is not shown is left out.
        """
        if names is None:
            names = self.whole_behaviours
        calibrations = {}
        for name in names:
            with suppress(NotShownError):
                calibrations[name] = self.calibration(name, share=share, seed=seed)
        return calibrations

    @overload
    def find_circuit(self, target: str, *, size: float, **options: Any) -> WeightMask: ...

    @overload
    def find_circuit(
        self, target: str, *, size: Sequence[float], **options: Any
    ) -> list[WeightMask]: ...

    def find_circuit(
        self,
        target: str,
        *,
        size: float | Sequence[float],
        protect: str | Iterable[str] = OTHERS,
        budget: Budget = BUDGET,
        prefer: str = "",
        calibrations: Mapping[str, Calibration] | None = None,
        **options: Any,
    ) -> WeightMask | list[WeightMask]:
        """A mask that breaks a behaviour and keeps the protected ones within a budget.

        `hc.find_circuit` does the search, and the mask's trace names the behaviours. Without
        `prefer`, answers under the current mask that still show the target are scored too:
        otherwise the model may give the same answers in other words. A warning names behaviours
        with fewer than 20 verified answers: another sample of so few may give another circuit.

        Args:
            target: the behaviour.
            size: the largest share of the block weights; a list gives a list of masks.
            protect: behaviours to spare: "others", one, several, or none: ().
            budget: how far the loss of each of them may rise, nats per token; a dict sets it for
                some of them by name, and the others keep the default.
            prefer: the behaviour that should replace the target: "refusal", or the harmless
                counterpart, "benign". Its answers should become likelier to the target's requests,
                after the target's prefill, but not for protected answers with the same prefill. The
                mask then steers to another answer; without `prefer` it only breaks the target.
            calibrations: data to score on; the model's answers by default.
            options: of `hc.find_circuit`: `steps`, `sites`, `exclude`, `folder`, `max_memory` and
                `progress`; and `fresh_answers=None` to score the unpruned model's answers alone.

        Raises:
            ValueError: an unknown behaviour, one that is not shown, a budget for one that is not
                protected, and as `hc.find_circuit`.
        """
        behaviour = self.behaviour(target)
        protected = protected_data(self, target, protect, calibrations)
        data = (calibrations or {}).get(target) or self.calibration(target)

        counts = {target: data.n_verified}
        for name, calibration in protected.items():
            counts[name] = calibration.n_verified
        warning = few_answers(counts)
        if warning:
            warnings.warn(f"find_circuit: {warning}", stacklevel=2)

        if isinstance(budget, Mapping):
            budget = {**dict.fromkeys(protected, BUDGET), **budget}
        if prefer:
            options["prefer"] = preferred_batches(self, data, target, prefer, protected)
        elif not behaviour.is_scored_on_references:
            fresh = partial(fresh_batches, self, behaviour, data.prompts)
            options.setdefault("fresh_answers", fresh)
        return find_circuit(
            self.bridge,
            data.batches,
            {name: calibration.batches for name, calibration in protected.items()},
            size=size,
            budget=budget,
            objective=behaviour.objective,
            **options,
        )

    def outcomes(self, names: Iterable[str], split: str = "heldout") -> dict[str, Outcomes]:
        """The model's answers to every request of some behaviours, with verdicts and losses.

        Args:
            names: of the behaviours, which are answered together.
            split: "heldout", "choice" or "calibration".

        Raises:
            ValueError: an unknown behaviour or split.
        """
        behaviours = [self.behaviour(name) for name in names]
        questions = [(behaviour, behaviour.prompts(split)) for behaviour in behaviours]
        sets = answers_together(self, questions)
        outcomes = {}
        for (behaviour, prompts), answers in zip(questions, sets, strict=True):
            outcomes[behaviour.name] = self._outcomes(behaviour, prompts, answers)
        return outcomes

    def _outcomes(self, behaviour: Behaviour, prompts: PromptSet, answers: PromptSet) -> Outcomes:
        nll = torch.full((len(prompts),), torch.nan)
        has_reference = torch.tensor([bool(example.completion) for example in prompts])
        if has_reference.any():
            with naming_data(f"{behaviour.name}, reference answers"):
                batches = self.batches(behaviour, prompts.where(_has_completion))
                nll[has_reference] = completion_nll(self.bridge, batches)
        verdicts = tuple(self.verdicts(behaviour, answers))
        judge_name = name_of(behaviour.judge) if behaviour.judge else self.judge_name
        texts = tuple(example.completion for example in prompts)
        return Outcomes(behaviour, answers, verdicts, nll, judge_name, texts)

    def measure(
        self,
        *,
        mask: WeightMask | None = None,
        split: str = "heldout",
        only: str | Iterable[str] = (),
        labels: Labels | None = None,
    ) -> Rows:
        """The rates of the model's behaviours, and the losses on their references.

        Side metrics are next to each rate, so that less harm can be told from broken language.
        Yes-or-no questions add the accuracy over matched pairs, and the AUROC of the answer's
        log-odds.

        Args:
            mask: weights removed while it is measured; no further weights by default.
            split: "heldout", "choice" or "calibration".
            only: these behaviours; all whole ones by default.
            labels: labels of the rows besides the split.

        Raises:
            ValueError: an unknown behaviour or split, and as `masked`.
        """
        names = [only] if isinstance(only, str) else list(only)
        where = {**(labels or {}), "split": split}
        rows = Rows()
        with masked_if_given(self.bridge, mask):
            for outcomes in self.outcomes(names or self.whole_behaviours, split).values():
                rows += outcomes.rows(where)
                if outcomes.behaviour.choices:
                    rows += self._choice_rows(outcomes, where)
        return rows

    def _choice_rows(self, outcomes: Outcomes, labels: Labels) -> Rows:
        """The accuracy and the AUROC of the log-odds of yes over the pairs of a question."""
        name, groups = outcomes.behaviour.name, outcomes.groups
        yes, no = outcomes.behaviour.choices
        odds = answer_log_odds(
            self.bridge,
            outcomes.answers,
            yes,
            no,
            template=self.template,
            prefill=outcomes.behaviour.prefill,
        )
        # Rows 2k and 2k + 1 are a pair: no is right, then yes.
        is_yes = torch.arange(len(odds)) % 2 == 1
        is_correct = (odds[1::2] > odds[::2]).tolist()
        accuracy = Measurement.rate(f"{name}_pair_accuracy", labels, is_correct, groups[::2])
        return Rows([accuracy, Measurement.auroc(f"{name}_auroc", labels, odds, is_yes, groups)])


# Requests and answers


def _sample(behaviour: Behaviour, share: float, seed: int, split: str) -> PromptSet:
    # A function of the module, since behaviours are sent to other processes.
    return behaviour.prompts(split).sampled(share, seed=seed)


def refuse_unreadable(model: Model, behaviour: Behaviour) -> None:
    """Check that a model can read a behaviour's requests and has room for its answers."""
    max_new_tokens, _ = answer_settings(model, behaviour)
    for split in SPLITS:
        prompts = behaviour.prompts(split)
        place = f"{behaviour.name}, {split}"
        request_ids(
            model.bridge,
            prompts,
            prefill=behaviour.prefill,
            max_new_tokens=max_new_tokens,
            template=model.template,
            place=f"{place}: request",
        )
        if behaviour.is_scored_on_references and len(prompts):
            refuse_batches(place, model.bridge, model.batches(behaviour, prompts))


Questions = Sequence[tuple[Behaviour, PromptSet]]


def answers_together(model: Model, questions: Questions) -> list[PromptSet]:
    """`Model.answers` to several sets of requests, which is faster than one after the other."""
    numbers: dict[tuple[int, Sampling | None], list[int]] = {}
    for number, (behaviour, _) in enumerate(questions):
        settings = answer_settings(model, behaviour)
        numbers.setdefault(settings, []).append(number)

    answers: dict[int, PromptSet] = {}
    for settings, members in numbers.items():
        sets = _answers(model, [questions[number] for number in members], *settings)
        answers |= zip(members, sets, strict=True)
    return [answers[number] for number in range(len(questions))]


def answer_settings(model: Model, behaviour: Behaviour) -> tuple[int, Sampling | None]:
    """The longest answer, and how answers are drawn; equal settings share batches."""
    limit = behaviour.max_new_tokens or model.max_new_tokens
    return limit, None if behaviour.choices else model.sampling


def _answers(
    model: Model, questions: Questions, max_new_tokens: int, sampling: Sampling | None
) -> list[PromptSet]:
    """The answers to sets of requests with the same settings."""
    examples: list[Example] = []
    prefills: list[str] = []
    for behaviour, prompts in questions:
        examples += prompts.examples
        prefills += [behaviour.prefill] * len(prompts)
    requests = PromptSet(tuple(examples))
    answers = iter(_generated(model, requests, prefills, max_new_tokens, sampling))

    n_samples = sampling.samples if sampling else 1
    sets = []
    for _, prompts in questions:
        samples = []
        for example in prompts:
            samples += [example] * n_samples
        completions = list(islice(answers, len(samples)))
        sets.append(PromptSet(tuple(samples)).with_completions(completions))
    return sets


def verified_together(model: Model, questions: Questions, *, wanted: str = "") -> list[PromptSet]:
    """`Model.verified` of several sets of requests, which are answered together."""
    sets = []
    together = answers_together(model, questions)
    for (behaviour, prompts), answers in zip(questions, together, strict=True):
        verdicts = model.verdicts(behaviour, answers)
        n_samples = len(answers) // max(1, len(prompts))
        completions: list[Answer | str] = [""] * len(prompts)
        for place, (sample, verdict) in enumerate(zip(answers, verdicts, strict=True)):
            number = place // n_samples
            is_shown = verdict == (wanted or behaviour.wanted)
            if not completions[number] and is_shown and _has_content(model, behaviour, sample):
                completions[number] = Answer(sample.completion, sample.tokens)
        sets.append(prompts.with_completions(completions))
    return sets


def _has_content(model: Model, behaviour: Behaviour, answer: Example) -> bool:
    """Whether an answer has a token after the prefill."""
    if not behaviour.prefill:
        return bool(answer.completion)
    return bool(target_ids(answer, model.bridge.tokenizer, behaviour.prefill))


def _generated(
    model: Model,
    prompts: PromptSet,
    prefill: str | Sequence[str],
    max_new_tokens: int,
    sampling: Sampling | None,
) -> list[Answer]:
    return generate(
        model.bridge,
        prompts,
        prefill=prefill,
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        batch_size=model.n_answered_at_once,
        template=model.template,
        cache=model.cache,
    )


def _has_completion(example: Example) -> bool:
    return bool(example.completion)


# The data of a search


def scored_batches(model: Model, behaviour: Behaviour, answers: PromptSet) -> list[Batch]:
    """Token batches of answers; the tokens that the behaviour is scored on are the targets."""
    batches = model.batches(behaviour, answers)
    if behaviour.scored_on:
        batches = at_matches(batches, model.bridge.tokenizer, behaviour.scored_on)
    return batches


def fresh_batches(model: Model, behaviour: Behaviour, requests: PromptSet) -> list[Batch]:
    """The model's present answers that show the behaviour."""
    answers = model.verified(behaviour, requests)
    return scored_batches(model, behaviour, answers.where(_has_completion))


def other_behaviours(model: Model, target: str) -> list[str]:
    """The whole behaviours without the target, and without the one that it is a part of."""
    whole = model.behaviour(target).part_of
    return [name for name in model.whole_behaviours if name not in (target, whole)]


def protected_data(
    model: Model,
    target: str,
    protect: str | Iterable[str] = OTHERS,
    calibrations: Mapping[str, Calibration] | None = None,
) -> dict[str, Calibration]:
    """The data of the protected behaviours; of "others", those that the model shows."""
    names = [protect] if isinstance(protect, str) else list(protect)
    if names == [OTHERS]:
        names = other_behaviours(model, target)
        if calibrations is None:
            return model.calibrations(names)
        return {name: calibrations[name] for name in names if name in calibrations}
    if target in names:
        raise ValueError(f"protect={names}: {target!r} is the target of the search; leave it out")
    data = calibrations or {}
    return {name: data.get(name) or model.calibration(name) for name in names}


def preferred_batches(
    model: Model,
    target_data: Calibration,
    target: str,
    prefer: str,
    protected: Mapping[str, Calibration],
) -> dict[str, list[Batch]]:
    """Answers of another behaviour that should become likelier, and that should not.

    "preferred": answers to the target's requests, after its prefill; of refusals, for example, the
    words after "sure" in "sure sorry i will not use it". A request gets the preferred answer about
    the same item, or else the next one in turn. "avoided": such answers to protected requests with
    the same prefill.
    """
    data = protected.get(prefer) or model.calibration(prefer)
    behaviour = model.behaviour(target)
    prefill = behaviour.prefill
    texts: dict[str, list[str]] = {}
    for example in data.prompts:
        text = example.completion
        if not text.startswith(prefill):
            # Joined as text: the tokens of an answer's first word depend on the text before it.
            text = f"{prefill} {text}"
        texts.setdefault(example.group, []).append(text)
    all_texts = list(chain.from_iterable(texts.values()))

    def batches_of(requests: PromptSet) -> list[Batch]:
        completions = []
        for number, example in enumerate(requests):
            choices = texts.get(example.group, all_texts)
            completions.append(choices[number % len(choices)])
        return model.batches(behaviour, requests.with_completions(completions))

    batches = {"preferred": batches_of(target_data.prompts)}
    for name, calibration in protected.items():
        has_prefill = prefill and model.behaviour(calibration.behaviour).prefill == prefill
        if has_prefill and name not in (target, prefer):
            batches.setdefault("avoided", []).extend(batches_of(calibration.prompts))
    return batches
