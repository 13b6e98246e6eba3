"""What a model does with each request of a behaviour, and the rates and losses that follow."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from harmcircuits.batches import Batch
from harmcircuits.behaviours.behaviour import DISAGREEMENT, LEXICAL_OVERLAP, Behaviour
from harmcircuits.behaviours.judges import content
from harmcircuits.display import card, facts, listed, share
from harmcircuits.measurements import Labels, Measurement, Rows
from harmcircuits.prompts import Example, PromptSet

MIN_KEPT = 0.5  # share of the reference's triples of words, from which on its words are kept


@dataclass(frozen=True, repr=False)
class Outcomes:
    """What a model does with each request of a behaviour, in their order."""

    behaviour: Behaviour
    answers: PromptSet
    verdicts: tuple[str, ...]
    nll: Float[Tensor, " n"]
    judge: str = ""
    references: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"Outcomes({self.behaviour.name}: {len(self.verdicts)} answers)"

    # Of three requests with two samples each, `answers` and `verdicts` hold six items and `nll` and
    # `groups` three:
    #
    #     answers     a 0   a 1  | b 0   b 1  | c 0   c 1
    #     is shown     x     .   |  x     x   |  .     .
    #     hits            .5     |     1      |     0

    @property
    def n_samples(self) -> int:
        """Answers to each request."""
        n_requests = max(1, len(self.nll))  # there is a loss, or NaN, for every request
        return max(1, len(self.verdicts) // n_requests)

    @property
    def hits(self) -> list[float]:
        """For each request the share of its answers that show the behaviour."""
        n_samples = self.n_samples
        is_shown = [verdict == self.behaviour.wanted for verdict in self.verdicts]
        shares = []
        for start in range(0, len(is_shown), n_samples):
            samples = is_shown[start : start + n_samples]
            shares.append(sum(samples) / n_samples)
        return shares

    @property
    def requests(self) -> tuple[Example, ...]:
        """Each request once, with its first answer."""
        return self.answers.examples[:: self.n_samples]

    @property
    def groups(self) -> list[str]:
        """What each request is about; intervals resample whole groups."""
        return [example.cluster for example in self.requests]

    def by_category(self) -> "dict[str, Outcomes]":
        """What it does with the requests of each category."""
        places: dict[str, list[int]] = {}
        for place, request in enumerate(self.requests):
            places.setdefault(request.category, []).append(place)
        return {category: self._only(chosen) for category, chosen in places.items()}

    def rows(self, labels: Labels) -> Rows:
        """The rate of the wanted verdict, the side metrics, and the NLL of references."""
        behaviour = self.behaviour
        where = {**labels, "attack": "prefill" if behaviour.prefill else "none"}
        if self.judge:
            where["judge"] = self.judge

        # Rates count every answer, so a request's group occurs once for each of its samples.
        metrics = {behaviour.wanted: behaviour.metric, **behaviour.side_metrics}
        groups = [example.cluster for example in self.answers]
        rows = Rows()
        for counted, metric in metrics.items():
            hits = [verdict == counted for verdict in self.verdicts]
            rows += [Measurement.rate(metric, where, hits, groups)]

        rows += self._measure_rows(where, groups)
        rows += self._words_rows(labels)

        # Losses count every request that has a reference once. Neither attack nor judge is a label
        # of theirs: a loss asks for no answer.
        has_reference = ~self.nll.isnan()
        if has_reference.any():
            groups = []
            for group, has in zip(self.groups, has_reference.tolist(), strict=True):
                if has:
                    groups.append(group)
            losses = self.nll[has_reference]
            rows += [Measurement.average(behaviour.nll_metric, labels, losses, groups)]
        return rows

    def changes(self, before: "Outcomes", labels: Labels) -> Rows:
        """How the rate of the wanted verdict and the NLL of references changed since then."""
        requests = [example.prompt for example in self.answers]
        earlier = [example.prompt for example in before.answers]
        if requests != earlier:
            raise ValueError(
                f"changes of {self.behaviour.name!r}: {len(requests)} answers now and "
                f"{len(earlier)} before, of {before.behaviour.name!r}; "
                "expected the same requests in the same order"
            )
        hits, earlier_hits = np.array(self.hits), np.array(before.hits)  # float64: thirds stay
        change = torch.from_numpy(hits - earlier_hits)
        values = {self.behaviour.metric: change, self.behaviour.nll_metric: self.nll - before.nll}

        rows = Rows()
        for metric, of_requests in values.items():
            has_value = ~of_requests.isnan()
            groups = [group for group, has in zip(self.groups, has_value, strict=True) if has]
            if groups:
                changed = of_requests[has_value]
                name = f"{metric}_change"
                is_rate = metric == self.behaviour.metric
                rows += [Measurement.average(name, labels, changed, groups, are_counts=is_rate)]
        return rows

    def _only(self, places: Sequence[int]) -> "Outcomes":
        """What it does with these requests, by their places."""
        # The samples of a request follow each other.
        samples = []
        for place in places:
            first = place * self.n_samples
            samples += range(first, first + self.n_samples)
        answers = PromptSet(tuple(self.answers.examples[sample] for sample in samples))
        verdicts = tuple(self.verdicts[sample] for sample in samples)
        references = tuple(self.references[place] for place in places if self.references)
        nll = self.nll[list(places)]
        return replace(self, answers=answers, verdicts=verdicts, nll=nll, references=references)

    def _measure_rows(self, labels: Labels, groups: Sequence[str]) -> Rows:
        """The means over all answers of what else is measured of each."""
        rows = Rows()
        for metric, measure in self.behaviour.measures.items():
            values = [measure(example.prompt, example.completion) for example in self.answers]
            numbers = torch.tensor(values, dtype=torch.float64)
            rows += [Measurement.average(metric, labels, numbers, groups)]
        return rows

    def _words_rows(self, labels: Labels) -> Rows:
        """How many answers keep the words of the reference, and how many of these are doubted."""
        behaviour = self.behaviour
        kept, doubted, groups = [], [], []
        for number, (example, verdict) in enumerate(zip(self.answers, self.verdicts, strict=True)):
            reference = self.references[number // self.n_samples] if self.references else ""
            if not reference:
                continue
            is_kept = keeps_words(example.completion, reference, behaviour.prefill)
            kept.append(is_kept)
            doubted.append(is_kept and verdict != behaviour.wanted)
            groups.append(example.cluster)

        rows = Rows()
        if not kept:
            return rows
        metrics = behaviour.metrics
        if LEXICAL_OVERLAP in metrics:
            rows += [Measurement.rate(metrics[LEXICAL_OVERLAP], labels, kept, groups)]
        if DISAGREEMENT in metrics:
            where = {**labels, "judge": self.judge} if self.judge else labels
            rows += [Measurement.rate(metrics[DISAGREEMENT], where, doubted, groups)]
        return rows


def keeps_words(answer: str, reference: str, prefill: str = "") -> bool:
    """Whether an answer has at least half of the distinct triples of words of another one."""
    triples = _triples(content(answer, prefill))
    of_reference = _triples(content(reference, prefill))
    return len(triples & of_reference) >= MIN_KEPT * len(of_reference)


def _triples(text: str) -> set[tuple[str, ...]]:
    words = text.lower().split()
    return set(zip(words, words[1:], words[2:], strict=False)) or {tuple(words)}


FEW_ANSWERS = 20  # verified, below which another sample of them may well give another circuit


class NotShownError(ValueError):
    """The model shows a behaviour in none of its answers."""


@dataclass(frozen=True, repr=False)
class Calibration:
    """What a behaviour is scored on: the model's own answers that the judge verified."""

    prompts: PromptSet
    batches: Sequence[Batch]
    n_asked: int
    behaviour: str = ""

    def __repr__(self) -> str:
        return (
            f"Calibration({self.behaviour}: {self.n_verified} of {self.n_asked} answers verified)"
        )

    def _repr_html_(self) -> str:
        n_targets = sum(int(batch.is_target.sum()) for batch in self.batches)
        of_asked = share(self.n_verified / self.n_asked) if self.n_asked else "none"
        values = {
            "verified": f"{self.n_verified} of {self.n_asked} answers, {of_asked}",
            "scored on": f"{n_targets:,} tokens of answers",
        }
        return card(f"Calibration: {self.behaviour}", facts(values))

    @property
    def n_verified(self) -> int:
        """How many answers the judge verified."""
        return len(self.prompts)


def few_answers(n_verified: Mapping[str, int]) -> str:
    """What is to be said of behaviours that are scored on few answers; empty where none is."""
    few = [f"{name} {number}" for name, number in n_verified.items() if number < FEW_ANSWERS]
    if not few:
        return ""
    return (
        f"scored on fewer than {FEW_ANSWERS} verified answers: {listed(few)}; another sample may "
        "give another circuit"
    )
