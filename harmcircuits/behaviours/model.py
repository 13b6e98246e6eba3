"""A model with all it can be asked: its own answers to score on, what it does, and its circuits."""

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any

import torch

from harmcircuits.batches import Batch, Template, at_matches, target_ids, tokenize
from harmcircuits.behaviours.behaviour import Behaviour
from harmcircuits.behaviours.generation import GenerationCache, generate, request_ids
from harmcircuits.behaviours.judges import Judge, prepare
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

# Requests answered at once for each example that is scored at once: an answer keeps no activations
# for a way back, and its next token costs a large batch little more than a small one.
ANSWERED_PER_SCORED = 4
OTHERS = "others"  # what is protected by default: every other behaviour that the model shows


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
        name: what rows call it.
        bridge: the TransformerBridge, live.
        behaviours: what it can be asked, by name.
        judge: of its answers, where a behaviour has none of its own.
        template: how requests are written.
        max_new_tokens: how long answers may be.
        batch_size: examples scored at once.
        n_answered_at_once: requests answered at once.
        sampling: how answers are drawn; greedily by default.
        cache: keeps the unpruned model's answers on disk, for models that are expensive to sample.
        ground_truth: the true circuit of its target, where it is known.
        is_invented: whether its texts are invented words, so that pages may show them.
        judge_name: goes with every rate.
        validation: how well a judge of harm tells the model's own answers apart, with the label
            `used`; empty where no judge was validated, as for the local rules.
        repeats: of requests of one's own, how many ask the same as others, and what became of them
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
        cfg = self.bridge.cfg
        # Requests are not shown: they may be harmful.
        parts = Counter(behaviour.part_of for behaviour in self.behaviours.values())
        body = []
        for name in self.whole_behaviours:
            behaviour = self.behaviours[name]
            shown_by = f"the verdict {behaviour.wanted!r}"
            n_parts = str(parts[name]) if parts[name] else ""
            body.append([name, behaviour.metric, shown_by, behaviour.prefill, n_parts])
        table = html_table(["behaviour", "rate", "shown by", "begun with", "parts"], body)
        size = f"{cfg.n_layers} layers of {cfg.n_heads} heads, width {cfg.d_model}"
        about = f"{size}; template {self.template}; judge {self.judge_name or 'unnamed'}"
        repeated = repeats_text(self.repeats)
        return card(
            f"Model {self.name}", note(about), table, *([note(repeated)] if repeated else [])
        )

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
        if name not in self.behaviours:
            known = nearest(name, self.behaviours)
            raise ValueError(f"{self.name} has no behaviour {name!r}; {known}")
        return self.behaviours[name]

    def with_behaviours(self, *behaviours: Behaviour) -> "Model":
        """The same model with further behaviours, or others of the same names.

        Args:
            behaviours: to add.
        """
        added = {behaviour.name: behaviour for behaviour in behaviours}
        return replace(self, behaviours={**self.behaviours, **added})

    def sampled(self, share: float, *, seed: int) -> "Model":
        """The same model, asked about a random share of the items of every category and split.

        Args:
            share: of the items, in (0, 1], each with all its requests.
            seed: draws them.

        Raises:
            ValueError: as `PromptSet.sampled`, when requests are asked for.
        """
        fewer = []
        for behaviour in self.behaviours.values():
            fewer.append(replace(behaviour, prompts=partial(_sampled, behaviour, share, seed)))
        return self.with_behaviours(*fewer)

    def generate(
        self,
        prompts: "str | Sequence[str] | PromptSet",
        *,
        prefill: str = "",
        mask: WeightMask | None = None,
    ) -> Any:
        """The model's answers, `prefill` included; to one request a string, to several a list.

        Args:
            prompts: a request or several.
            prefill: opens every answer.
            mask: weights removed while it answers.

        Raises:
            ValueError: as `masked`.
        """
        requests = PromptSet.of(prompts)
        with masked_if_given(self.bridge, mask):
            generated = _generated(self, requests, prefill, self.max_new_tokens, self.sampling)
        answers = [answer.text for answer in generated]
        return answers[0] if isinstance(prompts, str) and len(answers) == 1 else answers

    def batches(self, behaviour: Behaviour, prompts: PromptSet) -> list[Batch]:
        """Token batches of these answers to the behaviour's requests; its prefill is no target.

        Args:
            behaviour: says how answers begin.
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
        """The same requests with the model's own answers, each as many times as it is sampled.

        Yes-or-no questions are answered greedily: the log-odds say how sure the answer is.

        Args:
            behaviour: says how answers begin and how long they are.
            prompts: the requests.
        """
        (answers,) = answers_together(self, [(behaviour, prompts)])
        return answers

    def verdicts(self, behaviour: Behaviour, answers: PromptSet) -> list[str]:
        """The judge's verdict on each completion.

        Args:
            behaviour: whose judge is asked, or the model's where it has none.
            answers: requests with completions.
        """
        judge = behaviour.judge or self.judge
        prepare(judge, answers.examples)
        return [judge(example.prompt, example.completion) for example in answers]

    def verified(self, behaviour: Behaviour, prompts: PromptSet, *, wanted: str = "") -> PromptSet:
        """The same requests with the first of the model's own answers that shows the behaviour.

        An empty completion where none does. An answer that says nothing beyond the prefill has
        nothing to score, and shows none.

        Args:
            behaviour: what is asked.
            prompts: the requests.
            wanted: the verdict that counts, in place of the behaviour's.
        """
        (verified,) = verified_together(self, [(behaviour, prompts)], wanted=wanted)
        return verified

    def calibration(self, name: str, *, share: float = 1.0, seed: int = 0) -> Calibration:
        """The model's own answers to a behaviour's calibration requests that the judge verified.

        Its reference answers as they are, where it is scored on these. Scoring on other unverified
        answers can find another circuit: a refusal is no harmful completion.

        Args:
            name: of the behaviour.
            share: of the items of every category that is asked about: a resample of the data.
            seed: draws these items.

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
        batches = scored(self, behaviour, verified)
        if behaviour.scored_on and not batches:
            raise NotShownError(
                f"{self.name}: none of {len(verified)} answers that show {name!r} has what is "
                f"scored on, {behaviour.scored_on!r}"
            )
        return Calibration(verified, batches, len(requests), name)

    def calibrations(
        self, names: Iterable[str] | None = None, *, share: float = 1.0, seed: int = 0
    ) -> dict[str, Calibration]:
        """`calibration` of every behaviour that the model shows.

        An unaligned model, say, has no refusals to score on.

        Args:
            names: the behaviours; all whole ones by default.
            share: as in `calibration`.
            seed: as in `calibration`.

        Raises:
            ValueError: as `calibration`, but for behaviours that are not shown.
        """
        shown = {}
        for name in self.whole_behaviours if names is None else names:
            with suppress(NotShownError):
                shown[name] = self.calibration(name, share=share, seed=seed)
        return shown

    def find_circuit(
        self,
        target: str,
        *,
        protect: str | Iterable[str] = OTHERS,
        budget: Budget = BUDGET,
        prefer: str = "",
        calibrations: Mapping[str, Calibration] | None = None,
        **options: Any,
    ) -> Any:
        """A mask whose removal breaks a behaviour and keeps the protected ones within a budget.

        `hc.find_circuit` does the search, with the behaviours' names in the mask's trace. Where no
        end is preferred, what the model still says under the mask so far is scored as well, as far
        as it shows the target: else it says the same thing in other words. A warning says where
        fewer than 20 answers of a behaviour were verified: another sample of so few may give
        another circuit.

        Args:
            target: the behaviour.
            protect: behaviours to spare: "others", one, several, or none: ().
            budget: how far the loss of each of them may rise, nats per token; or that of some of
                them by name, the others keeping the default.
            prefer: the behaviour that should take the target's place: "refusal", or the harmless
                counterpart, "benign". Its answers should become likelier to the target's requests,
                behind the target's own beginning, and not where protected answers begin alike. The
                mask is then an edit with an end; without it, what breaks the target.
            calibrations: data to score on, where it is there already.
            options: of `hc.find_circuit`: `size`, which must be given, `steps`, `sites`, `exclude`,
                `unit`, `folder`, `max_memory` and `progress`; and `fresh_answers=None` to score the
                unpruned model's answers alone.

        Raises:
            ValueError: an unknown behaviour, one that is not shown, a budget for one that is not
                protected, and as `hc.find_circuit`.
        """
        objective = self.behaviour(target).objective
        protected = protected_data(self, target, protect, calibrations)
        data = (calibrations or {}).get(target) or self.calibration(target)
        scored = {target: data, **protected}
        few = few_answers({name: of_name.n_verified for name, of_name in scored.items()})
        if few:
            warnings.warn(f"find_circuit: {few}", stacklevel=2)
        if isinstance(budget, Mapping):
            budget = {**dict.fromkeys(protected, BUDGET), **budget}
        if prefer:
            options["prefer"] = preferred_batches(self, data, target, prefer, protected)
        elif not self.behaviour(target).is_scored_on_references:
            still = partial(still_said, self, self.behaviour(target), data.prompts)
            options.setdefault("fresh_answers", still)

        return find_circuit(
            self.bridge,
            data.batches,
            {name: calibration.batches for name, calibration in protected.items()},
            budget=budget,
            objective=objective,
            **options,
        )

    def outcomes(self, names: Iterable[str], split: str = "heldout") -> dict[str, Outcomes]:
        """What the model as it stands does with every request of some behaviours, by name.

        Args:
            names: of the behaviours, which are answered together.
            split: "heldout", "choice" or "calibration".

        Raises:
            ValueError: an unknown behaviour or split.
        """
        behaviours = {name: self.behaviour(name) for name in names}
        asked = [(behaviour, behaviour.prompts(split)) for behaviour in behaviours.values()]
        answers = answers_together(self, asked)
        outcomes = {}
        for name, (behaviour, prompts), of_prompts in zip(behaviours, asked, answers, strict=True):
            outcomes[name] = self._outcomes(behaviour, prompts, of_prompts)
        return outcomes

    def _outcomes(self, behaviour: Behaviour, prompts: PromptSet, answers: PromptSet) -> Outcomes:
        nll = torch.full((len(prompts),), torch.nan)
        has_reference = torch.tensor([bool(example.completion) for example in prompts])
        if has_reference.any():
            with naming_data(f"{behaviour.name}, reference answers"):
                batches = self.batches(behaviour, prompts.where(_has_completion))
                nll[has_reference] = completion_nll(self.bridge, batches)
        verdicts = tuple(self.verdicts(behaviour, answers))
        judge_name = getattr(behaviour.judge, "name", self.judge_name)
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
        """The model on its behaviours: rates of the wanted verdict, NLL of references.

        A behaviour's side metrics come with it, so that a fall of harm can be told from a loss of
        language. Yes-or-no questions add the accuracy over matched pairs, and the AUROC of the
        answer's log-odds.

        Args:
            mask: weights removed while it is measured; without one, the model as it stands.
            split: "heldout", "choice" or "calibration".
            only: these behaviours; all whole ones by default.
            labels: what the rows carry besides the split.

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
        """How well the log-odds of yes tell the pairs of a yes-or-no question apart."""
        name, groups = outcomes.behaviour.name, outcomes.groups
        yes, no = outcomes.behaviour.choices
        odds = answer_log_odds(self.bridge, outcomes.answers, yes, no, template=self.template)
        # Rows 2k and 2k + 1 are a pair: no is right, then yes.
        is_yes = torch.arange(len(odds)) % 2 == 1
        is_ordered = (odds[1::2] > odds[::2]).tolist()
        accuracy = Measurement.rate(f"{name}_pair_accuracy", labels, is_ordered, groups[::2])
        return Rows([accuracy, Measurement.auroc(f"{name}_auroc", labels, odds, is_yes, groups)])


# What is asked


def _sampled(behaviour: Behaviour, share: float, seed: int, split: str) -> PromptSet:
    # By name and not inside the method, since behaviours go to other processes.
    return behaviour.prompts(split).sampled(share, seed=seed)


def refuse_unreadable(model: Model, behaviour: Behaviour) -> None:
    """Check that a model can read a behaviour's requests and has room for its answers."""
    longest, _ = answer_kind(model, behaviour)
    for split in SPLITS:
        prompts = behaviour.prompts(split)
        place = f"{behaviour.name}, {split}"
        request_ids(
            model.bridge,
            prompts,
            prefill=behaviour.prefill,
            max_new_tokens=longest,
            template=model.template,
            place=f"{place}: request",
        )
        if behaviour.is_scored_on_references and len(prompts):
            refuse_batches(place, model.bridge, model.batches(behaviour, prompts))


# Answers


def answers_together(model: Model, asked: Sequence[tuple[Behaviour, PromptSet]]) -> list[PromptSet]:
    """`Model.answers` to several sets of requests, which is faster than one after the other."""
    kinds = [answer_kind(model, behaviour) for behaviour, _ in asked]
    answers: dict[int, PromptSet] = {}
    for kind in dict.fromkeys(kinds):
        places = [place for place, other in enumerate(kinds) if other == kind]
        prompts: list[Example] = []
        prefills: list[str] = []
        for place in places:
            behaviour, of_behaviour = asked[place]
            prompts += of_behaviour.examples
            prefills += [behaviour.prefill] * len(of_behaviour)
        generated = iter(_generated(model, PromptSet(tuple(prompts)), prefills, *kind))

        _, sampling = kind
        n_samples = sampling.samples if sampling else 1
        for place in places:
            repeated = []
            for example in asked[place][1]:
                repeated += [example] * n_samples
            some = list(islice(generated, len(repeated)))
            answers[place] = PromptSet(tuple(repeated)).with_completions(some)
    return [answers[place] for place in range(len(asked))]


def verified_together(
    model: Model, asked: Sequence[tuple[Behaviour, PromptSet]], *, wanted: str = ""
) -> list[PromptSet]:
    """`Model.verified` of several sets of requests, which are answered together."""
    verified = []
    for (behaviour, prompts), answers in zip(asked, answers_together(model, asked), strict=True):
        verdicts = model.verdicts(behaviour, answers)
        n_samples = len(answers) // max(1, len(prompts))
        first: list[Answer | str] = [""] * len(prompts)
        for place, (sample, verdict) in enumerate(zip(answers, verdicts, strict=True)):
            number = place // n_samples
            is_shown = verdict == (wanted or behaviour.wanted)
            if not first[number] and is_shown and _says_something(model, behaviour, sample):
                first[number] = Answer(sample.completion, sample.tokens)
        verified.append(prompts.with_completions(first))
    return verified


def _says_something(model: Model, behaviour: Behaviour, answer: Example) -> bool:
    """Whether an answer has a token beyond what was put into the model's mouth."""
    if not behaviour.prefill:
        return bool(answer.completion)
    return bool(target_ids(answer, model.bridge.tokenizer, behaviour.prefill))


def answer_kind(model: Model, behaviour: Behaviour) -> tuple[int, Sampling | None]:
    """How long answers may be, and how they are drawn; those that share both share batches."""
    limit = behaviour.max_new_tokens or model.max_new_tokens
    return limit, None if behaviour.choices else model.sampling


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


# What a search is scored on besides, what it spares, and what it prefers


def still_said(model: Model, behaviour: Behaviour, requests: PromptSet) -> list[Batch]:
    """The answers that the model gives now, as far as they show the behaviour."""
    return scored(model, behaviour, model.verified(behaviour, requests).where(_has_completion))


def scored(model: Model, behaviour: Behaviour, answers: PromptSet) -> list[Batch]:
    """Token batches of answers; the tokens that the behaviour is scored on are the targets."""
    batches = model.batches(behaviour, answers)
    if behaviour.scored_on:
        batches = at_matches(batches, model.bridge.tokenizer, behaviour.scored_on)
    return batches


def other_behaviours(model: Model, target: str) -> list[str]:
    """The whole behaviours but the target, and but the one that it is a part of."""
    whole = model.behaviour(target).part_of
    return [name for name in model.whole_behaviours if name not in (target, whole)]


def protected_data(
    model: Model,
    target: str,
    protect: str | Iterable[str] = OTHERS,
    calibrations: Mapping[str, Calibration] | None = None,
) -> dict[str, Calibration]:
    """What is protected from the search for a target's circuit: as far as shown, for "others"."""
    names = [protect] if isinstance(protect, str) else list(protect)
    if names == [OTHERS]:
        others = other_behaviours(model, target)
        if calibrations is None:
            return model.calibrations(others)
        return {name: calibrations[name] for name in others if name in calibrations}
    if target in names:
        raise ValueError(f"protect={names}: {target!r} is what is searched for; leave it out")
    known = calibrations or {}
    return {name: known.get(name) or model.calibration(name) for name in names}


def preferred_batches(
    model: Model,
    target_data: Calibration,
    target: str,
    prefer: str,
    protected: Mapping[str, Calibration],
) -> dict[str, list[Batch]]:
    """Answers of another behaviour where they should stand, and where they should not.

    "preferred": to the target's requests, behind the beginning of its answers; of refusals, say,
    what follows "sure" in "sure sorry i will not use it". To a request its answer to the same item
    where there is one, else the next in turn. "avoided": the same for protected requests whose
    answers begin as the target's do.
    """
    data = protected.get(prefer) or model.calibration(prefer)
    opened = model.behaviour(target)
    answers: dict[str, list[str]] = {}
    for example in data.prompts:
        text = example.completion
        if not text.startswith(opened.prefill):
            # As text: how an answer's first word is tokenized depends on what stands before it.
            text = f"{opened.prefill} {text}"
        answers.setdefault(example.group, []).append(text)
    every = [text for of_item in answers.values() for text in of_item]

    def answered(requests: PromptSet) -> list[Batch]:
        completions = []
        for number, example in enumerate(requests):
            of_item = answers.get(example.group, every)
            completions.append(of_item[number % len(of_item)])
        return model.batches(opened, requests.with_completions(completions))

    batches = {"preferred": answered(target_data.prompts)}
    for name, calibration in protected.items():
        begins_alike = model.behaviour(calibration.behaviour).prefill == opened.prefill
        if opened.prefill and begins_alike and name not in (target, prefer):
            batches.setdefault("avoided", []).extend(answered(calibration.prompts))
    return batches
