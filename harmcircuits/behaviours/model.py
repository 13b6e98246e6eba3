"""A model with all it can be asked: its own answers to score on, what it does, and its circuits."""

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any, overload

import torch
from rich.progress import Progress

from harmcircuits.behaviours.behaviour import Behaviour
from harmcircuits.behaviours.calibration import Calibration, NotShownError, few_answers
from harmcircuits.behaviours.files import repeats_text
from harmcircuits.behaviours.generation import (
    GenerationCache,
    Sampling,
    generate,
    request_ids,
)
from harmcircuits.behaviours.judges import Judge, prepare
from harmcircuits.behaviours.outcomes import Outcomes
from harmcircuits.circuits.masks import WeightMask
from harmcircuits.circuits.units import Unit
from harmcircuits.display import card, html_table, listed, nearest, note, plural
from harmcircuits.hooks.bridge import Bridge
from harmcircuits.hooks.checks import of_data, refuse_batches
from harmcircuits.hooks.losses import answer_log_odds, completion_nll
from harmcircuits.hooks.masking import masked_if_given
from harmcircuits.hooks.search import (
    BUDGET,
    PREFERENCE,
    REACH,
    STEPS,
    find_circuit,
    refuse_settings,
)
from harmcircuits.measurements import Label, Labels, Measurement, Rows
from harmcircuits.prompts import (
    SPLITS,
    Answer,
    Batch,
    Example,
    PromptSet,
    Template,
    target_ids,
    tokenize,
)

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
            (see `harmcircuits.behaviours.files.repeat_rows`).
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
        """The same model with further behaviours, or others of the same names."""
        added = {behaviour.name: behaviour for behaviour in behaviours}
        return replace(self, behaviours={**self.behaviours, **added})

    def asked_every(self, every: int) -> "Model":
        """The same model, asked only every so-many-th request of each behaviour and split.

        Of yes-or-no questions every so-many-th pair.

        Args:
            every: of an organism 16 leaves two items of each topic, with one request each.
        """
        return self._asked(partial(_every, every=every))

    def sampled(self, share: float, *, seed: int) -> "Model":
        """The same model, asked about a random share of the items of every category and split.

        Args:
            share: of the items, in (0, 1], each with all its requests.
            seed: draws them.

        Raises:
            ValueError: as `PromptSet.sampled`, when requests are asked for.
        """
        return self._asked(partial(_sampled, share=share, seed=seed))

    def _asked(self, some: Callable[[Behaviour, PromptSet], PromptSet]) -> "Model":
        """The same model, asked some of each behaviour's requests of every split."""
        fewer = []
        for behaviour in self.behaviours.values():
            prompts = partial(_some_requests, behaviour, some)
            fewer.append(replace(behaviour, prompts=prompts))
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
            ValueError: no requests, and as `masked`.
        """
        requests = PromptSet.of(prompts)
        with masked_if_given(self.bridge, mask):
            generated = self._generate(requests, prefill, self.max_new_tokens, self.sampling)
        answers = [answer.text for answer in generated]
        return answers[0] if isinstance(prompts, str) and len(answers) == 1 else answers

    def batches(self, behaviour: Behaviour, prompts: PromptSet) -> list[Batch]:
        """Token batches of these answers to the behaviour's requests; its prefill is no target."""
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
        (answers,) = self.answers_together([(behaviour, prompts)])
        return answers

    def answers_together(self, asked: Sequence[tuple[Behaviour, PromptSet]]) -> list[PromptSet]:
        """`answers` to several sets of requests, which is faster than one after the other.

        Args:
            asked: each behaviour with requests of it.
        """
        kinds = [self.answer_kind(behaviour) for behaviour, _ in asked]
        answers: dict[int, PromptSet] = {}
        for kind in dict.fromkeys(kinds):
            places = [place for place, other in enumerate(kinds) if other == kind]
            prompts: list[Example] = []
            prefills: list[str] = []
            for place in places:
                behaviour, of_behaviour = asked[place]
                prompts += of_behaviour.examples
                prefills += [behaviour.prefill] * len(of_behaviour)
            generated = iter(self._generate(PromptSet(tuple(prompts)), prefills, *kind))
            for place in places:
                behaviour, of_behaviour = asked[place]
                n_answers = self.n_samples(behaviour) * len(of_behaviour)
                some = list(islice(generated, n_answers))
                answers[place] = self._with_samples(behaviour, of_behaviour, some)
        return [answers[place] for place in range(len(asked))]

    def _with_samples(
        self, behaviour: Behaviour, prompts: PromptSet, answers: Sequence[Answer]
    ) -> PromptSet:
        """Each request with its answers, as many times as it has some."""
        repeated = []
        for example in prompts:
            repeated += [example] * self.n_samples(behaviour)
        return PromptSet(tuple(repeated)).with_completions(answers)

    def refuse_unreadable(self, behaviour: Behaviour) -> None:
        """Check that the model can read a behaviour's requests and has room for its answers.

        Args:
            behaviour: what is asked.

        Raises:
            ValueError: a request, or a reference answer that is scored as it is, that is too long
                for the model's context or has a token that its embedding lacks.
        """
        longest, _ = self.answer_kind(behaviour)
        for split in SPLITS:
            prompts = behaviour.prompts(split)
            place = f"{behaviour.name}, {split}"
            request_ids(
                self.bridge,
                prompts,
                prefill=behaviour.prefill,
                max_new_tokens=longest,
                template=self.template,
                place=f"{place}: request",
            )
            if behaviour.is_scored_on_references and len(prompts):
                refuse_batches(place, self.bridge, self.batches(behaviour, prompts))

    def answer_kind(self, behaviour: Behaviour) -> tuple[int, Sampling | None]:
        """How long the answers to a behaviour's requests may be, and how they are drawn.

        Those of behaviours that have both in common share batches.
        """
        limit = behaviour.max_new_tokens or self.max_new_tokens
        return limit, None if behaviour.choices else self.sampling

    def n_samples(self, behaviour: Behaviour) -> int:
        """How many answers to each of the behaviour's requests there are."""
        _, sampling = self.answer_kind(behaviour)
        return sampling.samples if sampling else 1

    def verdicts(self, behaviour: Behaviour, answers: PromptSet) -> list[str]:
        """The judge's verdict on each completion."""
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
        (verified,) = self.verified_together([(behaviour, prompts)], wanted=wanted)
        return verified

    def verified_together(
        self, asked: Sequence[tuple[Behaviour, PromptSet]], *, wanted: str = ""
    ) -> list[PromptSet]:
        """`verified` of several sets of requests, which are answered together.

        Args:
            asked: each behaviour with requests of it.
            wanted: as in `verified`.
        """
        verified = []
        for (behaviour, prompts), answers in zip(asked, self.answers_together(asked), strict=True):
            verified.append(self._first_shown(behaviour, prompts, answers, wanted))
        return verified

    def _first_shown(
        self, behaviour: Behaviour, prompts: PromptSet, answers: PromptSet, wanted: str
    ) -> PromptSet:
        """Each request with the first of its answers that shows the behaviour."""
        wanted = wanted or behaviour.wanted
        judge = behaviour.judge or self.judge
        prepare(judge, answers.examples)
        n_samples = self.n_samples(behaviour)
        first = []
        for start in range(0, len(answers), n_samples):
            shown = (
                sample
                for sample in answers.examples[start : start + n_samples]
                if judge(sample.prompt, sample.completion) == wanted
                and self._says_something(behaviour, sample)
            )
            example = next(shown, None)
            first.append(Answer(example.completion, example.tokens) if example else "")
        return prompts.with_completions(first)

    def _says_something(self, behaviour: Behaviour, answer: Example) -> bool:
        """Whether an answer has a token beyond what was put into the model's mouth."""
        if not behaviour.prefill:
            return bool(answer.completion)
        return bool(target_ids(answer, self.bridge.tokenizer, behaviour.prefill))

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
        if not len(requests):
            raise ValueError(f"{name!r} has no calibration requests; give it some, or leave it out")
        answers = requests
        if not behaviour.is_scored_on_references:
            answers = self.verified(behaviour, requests)
        verified = answers.where(lambda example: bool(example.completion))
        if not len(verified):
            raise NotShownError(
                f"{self.name} does not show {name!r}: none of its answers to {len(requests)} "
                f"calibration requests was judged {behaviour.wanted!r}, "
                "so there is nothing to score on"
            )
        return Calibration(verified, self.batches(behaviour, verified), len(requests), name)

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

    def others(self, target: str) -> list[str]:
        """The whole behaviours but the target, and but the one that it is a part of."""
        whole = self.behaviour(target).part_of
        return [name for name in self.whole_behaviours if name not in (target, whole)]

    def protected(
        self,
        target: str,
        protect: str | Iterable[str] = OTHERS,
        calibrations: Mapping[str, Calibration] | None = None,
    ) -> dict[str, Calibration]:
        """The calibration data of what is protected from the search for a target's circuit.

        Args:
            target: what is searched for.
            protect: "others" (`others` that the model shows), a behaviour, or several.
            calibrations: data that is there already.

        Raises:
            ValueError: an unknown behaviour, the target itself, or one named that is not shown.
        """
        names = [protect] if isinstance(protect, str) else list(protect)
        if names == [OTHERS]:
            others = self.others(target)
            if calibrations is None:
                return self.calibrations(others)
            return {name: calibrations[name] for name in others if name in calibrations}
        if target in names:
            raise ValueError(f"protect={names}: {target!r} is what is searched for; leave it out")
        known = calibrations or {}
        return {name: known.get(name) or self.calibration(name) for name in names}

    def preferred(
        self, target: str, prefer: str, calibrations: Mapping[str, Calibration] | None = None
    ) -> list[Batch]:
        """Verified answers of another behaviour, behind the beginning of the target's answers.

        What `find_circuit` makes likelier with `prefer`: of refusals, say, what follows "sure" in
        "sure sorry i will not use it".

        Args:
            target: the behaviour that is searched for, whose prefill opens these answers.
            prefer: the behaviour that should take its place.
            calibrations: data that is there already.

        Raises:
            ValueError: an unknown behaviour, the target itself, or one that is not shown.
        """
        self.refuse_preferred(target, prefer)
        data = (calibrations or {}).get(prefer) or self.calibration(prefer)
        opened = self.behaviour(target)
        if not opened.prefill:
            return list(data.batches)
        return self._behind(opened, data.prompts, data.prompts)

    def avoided(
        self,
        target: str,
        prefer: str,
        protected: Mapping[str, Calibration],
        calibrations: Mapping[str, Calibration] | None = None,
    ) -> list[Batch]:
        """The answers of `preferred` to requests that they do not belong to.

        To those of protected behaviours whose answers begin as the target's do, such as refusals
        of benign requests behind "sure": each request with the next of the answers in turn. Empty
        where no answers begin so.

        Args:
            target: the behaviour that is searched for.
            prefer: the behaviour that should take its place.
            protected: calibration data of what is protected.
            calibrations: data that is there already, for `prefer` where it is not protected.

        Raises:
            ValueError: as `preferred`.
        """
        self.refuse_preferred(target, prefer)
        opened = self.behaviour(target)
        known = {**(calibrations or {}), **protected}
        data = known.get(prefer) or self.calibration(prefer)
        batches = []
        for name, calibration in protected.items():
            begins_alike = self.behaviour(name).prefill == opened.prefill
            if opened.prefill and begins_alike and name not in (target, prefer):
                batches += self._behind(opened, calibration.prompts, data.prompts)
        return batches

    def _behind(self, opened: Behaviour, requests: PromptSet, answers: PromptSet) -> list[Batch]:
        """Requests with others' answers, in turn, behind the beginning of a behaviour."""
        # As text: how an answer's first word is tokenized depends on what stands before it.
        begun = [f"{opened.prefill} {example.completion}" for example in answers]
        in_turn = list(islice(cycle(begun), len(requests)))
        return self.batches(opened, requests.with_completions(in_turn))

    def refuse_preferred(self, target: str, prefer: str) -> None:
        """Check that a behaviour can take the place of another.

        Args:
            target: the behaviour that is searched for.
            prefer: the one that should take its place.

        Raises:
            ValueError: an unknown behaviour, or the target itself.
        """
        self.behaviour(prefer)
        if prefer == target:
            raise ValueError(
                f"prefer={prefer!r} is what is searched for; name what should take its place"
            )

    @overload
    def find_circuit(
        self,
        target: str,
        *,
        size: float,
        protect: str | Iterable[str] = OTHERS,
        budget: float | Mapping[str, float] = BUDGET,
        steps: int = STEPS,
        reach: float = REACH,
        unit: Unit = "weight",
        layers: Sequence[int] | None = None,
        kinds: Sequence[str] | None = None,
        exclude: WeightMask | None = None,
        prefer: str = "",
        preference: float = PREFERENCE,
        protect_first: int = 0,
        calibrations: Mapping[str, Calibration] | None = None,
        renew: bool = True,
        stop: Callable[[Bridge], bool] | None = None,
        progress: bool | Progress = False,
        folder: str | Path | None = None,
        max_memory: int | None = None,
    ) -> WeightMask: ...

    @overload
    def find_circuit(
        self,
        target: str,
        *,
        size: Sequence[float],
        protect: str | Iterable[str] = OTHERS,
        budget: float | Mapping[str, float] = BUDGET,
        steps: int = STEPS,
        reach: float = REACH,
        unit: Unit = "weight",
        layers: Sequence[int] | None = None,
        kinds: Sequence[str] | None = None,
        exclude: WeightMask | None = None,
        prefer: str = "",
        preference: float = PREFERENCE,
        protect_first: int = 0,
        calibrations: Mapping[str, Calibration] | None = None,
        renew: bool = True,
        stop: Callable[[Bridge], bool] | None = None,
        progress: bool | Progress = False,
        folder: str | Path | None = None,
        max_memory: int | None = None,
    ) -> list[WeightMask]: ...

    def find_circuit(
        self,
        target: str,
        *,
        size: float | Sequence[float],
        protect: str | Iterable[str] = OTHERS,
        budget: float | Mapping[str, float] = BUDGET,
        steps: int = STEPS,
        reach: float = REACH,
        unit: Unit = "weight",
        layers: Sequence[int] | None = None,
        kinds: Sequence[str] | None = None,
        exclude: WeightMask | None = None,
        prefer: str = "",
        preference: float = PREFERENCE,
        protect_first: int = 0,
        calibrations: Mapping[str, Calibration] | None = None,
        renew: bool = True,
        stop: Callable[[Bridge], bool] | None = None,
        progress: bool | Progress = False,
        folder: str | Path | None = None,
        max_memory: int | None = None,
    ) -> WeightMask | list[WeightMask]:
        """The weights that carry a behaviour, found on its own verified answers.

        `hc.find_circuit` does the search, with the behaviours' names in the mask's trace. A warning
        says where fewer than 20 answers of a behaviour were verified: another sample of so few may
        give another circuit.

        Args:
            target: the behaviour.
            size: share of the block weights to remove, at most; a list gives a list of masks.
            protect: behaviours to spare: "others", one, several, or none: ().
            budget: how far the loss of each of them may rise, nats per token; or that of some of
                them by name, the others keeping the default.
            steps: in how many steps the mask grows.
            reach: how far it grows, as in `hc.find_circuit`.
            unit: what is chosen whole, as in `hc.find_circuit`: "weight", "neuron", "head", "row".
            layers: numbers of the blocks to choose from; all by default.
            kinds: kinds of matrices to choose from, such as "mlp.out"; all by default.
            exclude: weights that cannot be chosen, such as those of a first circuit.
            prefer: the behaviour that should take the target's place, such as "refusal": weights
                whose removal makes its answers likelier, behind the target's own beginning, earn
                as well; those that make them likelier where protected answers begin alike, lose.
            preference: what a nat of their loss counts beside one of the target's.
            protect_first: protect the first so many tokens of every protected answer by themselves
                as well, as in `hc.find_circuit`; a budget for them is named "benign, first 8
                tokens".
            calibrations: data to score on, where it is there already.
            renew: answer the target's requests again under each step's mask, and score the answers
                that still show it as well: what was said in some words may come back in others.
            stop: asked after every step, with the model under its mask; True ends the search.
            progress: whether to show a bar; or the bars to add one to.
            folder: keeps the search after every step; the same search goes on from there.
            max_memory: bytes for accumulated scores.

        Raises:
            ValueError: an unknown behaviour, one that is not shown, a budget for one that is not
                protected, and as `hc.find_circuit`.
        """
        sizes = list(size) if isinstance(size, Sequence) else [size]
        refuse_settings(sizes, steps, reach, unit, preference, protect_first)
        behaviour = self.behaviour(target)
        protected = self.protected(target, protect, calibrations)
        data = (calibrations or {}).get(target) or self.calibration(target)
        if isinstance(budget, Mapping):
            budget = {**dict.fromkeys(protected, BUDGET), **budget}
        _warn_of_few({target: data, **protected})

        def still_shown(_: Bridge) -> list[Batch]:
            answers = self.verified(behaviour, data.prompts)
            shown = answers.where(lambda example: bool(example.completion))
            return self.batches(behaviour, shown) if len(shown) else []

        return find_circuit(
            self.bridge,
            data.batches,
            {name: calibration.batches for name, calibration in protected.items()},
            size=size,
            budget=budget,
            steps=steps,
            reach=reach,
            unit=unit,
            objective=behaviour.objective,
            layers=layers,
            kinds=kinds,
            exclude=exclude,
            renew=still_shown if renew else None,
            prefer=self.preferred(target, prefer, calibrations) if prefer else (),
            avoid=self.avoided(target, prefer, protected, calibrations) if prefer else (),
            preference=preference,
            protect_first=protect_first,
            stop=stop,
            progress=progress,
            folder=folder,
            max_memory=max_memory,
        )

    def outcomes(self, name: str, split: str = "heldout") -> Outcomes:
        """What the model as it stands does with every request of a behaviour in a split."""
        return self.outcomes_of([name], split)[name]

    def outcomes_of(self, names: Iterable[str], split: str = "heldout") -> dict[str, Outcomes]:
        """`outcomes` of several behaviours, by name, which are answered together.

        Args:
            names: of the behaviours.
            split: "heldout", "choice" or "calibration".

        Raises:
            ValueError: an unknown behaviour or split.
        """
        behaviours = {name: self.behaviour(name) for name in names}
        asked = [(behaviour, behaviour.prompts(split)) for behaviour in behaviours.values()]
        answers = self.answers_together(asked)
        outcomes = {}
        for name, (behaviour, prompts), of_prompts in zip(behaviours, asked, answers, strict=True):
            outcomes[name] = self._outcomes(behaviour, prompts, of_prompts)
        return outcomes

    def _outcomes(self, behaviour: Behaviour, prompts: PromptSet, answers: PromptSet) -> Outcomes:
        nll = torch.full((len(prompts),), torch.nan)
        has_reference = torch.tensor([bool(example.completion) for example in prompts])
        if has_reference.any():
            references = prompts.where(lambda example: bool(example.completion))
            with of_data(f"{behaviour.name}, reference answers"):
                batches = self.batches(behaviour, references)
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
            measured = self.outcomes_of(names or self.whole_behaviours, split)
            for outcomes in measured.values():
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
        return Rows(
            [
                Measurement.rate(f"{name}_pair_accuracy", labels, is_ordered, groups[::2]),
                Measurement.auroc(f"{name}_auroc", labels, odds, is_yes, groups),
            ]
        )

    def _generate(
        self,
        prompts: PromptSet,
        prefill: str | Sequence[str],
        max_new_tokens: int,
        sampling: Sampling | None,
    ) -> list[Answer]:
        return generate(
            self.bridge,
            prompts,
            prefill=prefill,
            sampling=sampling,
            max_new_tokens=max_new_tokens,
            batch_size=self.n_answered_at_once,
            template=self.template,
            cache=self.cache,
        )


# By name and not inside the methods, since behaviours go to other processes.


def _warn_of_few(data: Mapping[str, Calibration]) -> None:
    few = few_answers({name: of_behaviour.n_verified for name, of_behaviour in data.items()})
    if few:
        warnings.warn(f"find_circuit: {few}", stacklevel=3)


def _some_requests(
    behaviour: Behaviour, some: Callable[[Behaviour, PromptSet], PromptSet], split: str
) -> PromptSet:
    return some(behaviour, behaviour.prompts(split))


def _sampled(_: Behaviour, requests: PromptSet, *, share: float, seed: int) -> PromptSet:
    return requests.sampled(share, seed=seed)


def _every(behaviour: Behaviour, requests: PromptSet, *, every: int) -> PromptSet:
    step = 2 if behaviour.choices else 1  # rows 2k and 2k + 1 are a pair
    subset = [r for number, r in enumerate(requests) if number // step % every == 0]
    return PromptSet(tuple(subset))
