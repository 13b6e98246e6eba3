"""Requests from files as the behaviours of a real model.

From harmful and benign requests come `harmful` (the answer begun for the model), `benign`, `refusal` (harmful requests
asked plainly), `recognition` and `explanation`; from requests that only look unsafe, `borderline`.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType

from harmcircuits.behaviours.model import Behaviour, Subject
from harmcircuits.behaviours.questions import Wording
from harmcircuits.prompts import Example, PromptSet

SPLITS = ("calibration", "choice", "heldout")
SHARES = {"calibration": 0.6, "choice": 0.15, "heldout": 0.25}  # of a file from which all three are drawn
WITHOUT_HELDOUT = {"calibration": 0.8, "choice": 0.2}  # of a file beside which held-out requests are given
NO_LIMITS: Mapping[str, int] = MappingProxyType(dict.fromkeys(SPLITS, 0))
UNSAFE, SAFE = ("unsafe", "harmful"), ("safe", "harmless", "benign")
Sets = Mapping[str, PromptSet]  # by split


@dataclass(frozen=True)
class Texts:
    """Where a real model's requests come from: JSON Lines or CSV files, or Hugging Face datasets (hub id or folder).

    `harmful`, `benign`: requests; each is split into calibration, choice and held-out by the hash of its `group` (or
    prompt), so that a request stays where it is when others are added. With `harmful_heldout` (`benign_heldout`) those
    are the held-out ones. `pairs`: rows with `label` safe or unsafe, matched by `group`, or else by their order within a
    category ("contrast_x" belongs to "x"), for recognition; without it harmful requests are paired with benign ones of
    similar length, which are not matched in content. `borderline`: requests whose `label` is not unsafe, such as
    XSTest's. `plain`: a text file for perplexity. `limit`: at most so many requests (or pairs) a split, 0 for all;
    `limit_measured`: in choice and held-out, where it is given, which only measure.
    """

    harmful: str
    benign: str
    harmful_heldout: str = ""
    benign_heldout: str = ""
    pairs: str = ""
    borderline: str = ""
    plain: str = ""
    limit: int = 0
    limit_measured: int = 0
    wording: Wording = field(default_factory=Wording)

    def __post_init__(self) -> None:
        for name in ("limit", "limit_measured"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}; expected the number of requests a split, or 0 for all")

    @property
    def limits(self) -> dict[str, int]:
        """At most so many requests, by split; 0 for all."""
        measured = self.limit_measured or self.limit
        return {"calibration": self.limit, "choice": measured, "heldout": measured}

    @property
    def files(self) -> dict[str, str]:
        """The files that are given, by what they hold."""
        names = ("harmful", "benign", "harmful_heldout", "benign_heldout", "pairs", "borderline", "plain")
        return {name: getattr(self, name) for name in names if getattr(self, name)}


def read_prompts(source: str) -> PromptSet:
    """Requests of a .jsonl or .csv file, or of a Hugging Face dataset ("NAME" or "NAME:SPLIT"; hub id or folder).

    Raises ValueError as `PromptSet.from_jsonl`, and for a dataset that cannot be opened.
    """
    suffix = Path(source).suffix.lower()
    if suffix in (".jsonl", ".json"):
        return PromptSet.from_jsonl(source)
    if suffix == ".csv":
        return PromptSet.from_csv(source)
    name, _, split = source.partition(":")
    try:
        return PromptSet.from_hub(name, split=split or "train")
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{source}: neither a .jsonl or .csv file nor a dataset that can be opened ({error})") from None


def split_sets(
    prompts: PromptSet, heldout: PromptSet | None = None, *, limits: Mapping[str, int] = NO_LIMITS, origin: str = ""
) -> dict[str, PromptSet]:
    """The requests by split, drawn by the hash of their group; `heldout` as it is, where given.

    With a limit for a split, those of the lowest hashes are kept, in their order. Raises ValueError for a split without
    requests.
    """
    shares = WITHOUT_HELDOUT if heldout else SHARES
    ends, total = {}, 0.0
    for split, share in shares.items():
        total += share
        ends[split] = total
    place = {example: _hash(example) for example in prompts}
    found = {
        split: prompts.where(
            lambda example, low=ends[split] - shares[split], high=ends[split]: low <= place[example] < high
        )
        for split in shares
    }
    if heldout:
        found["heldout"] = heldout
    for split, chosen in found.items():
        if not len(chosen):
            raise ValueError(f"{origin}: {len(prompts)} requests leave none for {split}; give more")
    return {split: _limited(chosen, limits[split]) for split, chosen in found.items()}


def _hash(example: Example) -> float:
    digest = hashlib.sha256(example.cluster.encode()).hexdigest()
    return int(digest[:13], 16) / 16**13


def _limited(prompts: PromptSet, limit: int) -> PromptSet:
    groups = sorted({_hash(example) for example in prompts})
    if not limit or len(groups) <= limit:
        return prompts
    return prompts.where(lambda example: _hash(example) < groups[limit])


def _without_answers(prompts: PromptSet) -> PromptSet:
    return prompts.with_completions([""] * len(prompts))


def _harmful_benign(texts: Texts) -> tuple[Sets, Sets]:
    found = []
    for name in ("harmful", "benign"):
        source, heldout = getattr(texts, name), getattr(texts, f"{name}_heldout")
        prompts = _without_answers(read_prompts(source))
        held = _without_answers(read_prompts(heldout)) if heldout else None
        seen = {example.prompt for example in held or ()}
        prompts = prompts.where(lambda example, seen=seen: example.prompt not in seen)
        found.append(split_sets(prompts, held, limits=texts.limits, origin=source))
    harmful, benign = ({example.prompt for chosen in sets.values() for example in chosen} for sets in found)
    if both := harmful & benign:
        raise ValueError(f"{len(both)} requests are in {texts.harmful} and in {texts.benign}; leave each in one file")
    return found[0], found[1]


def request_pairs(prompts: PromptSet, origin: str = "") -> list[tuple[Example, Example]]:
    """(harmful, harmless) requests that belong together: by group, or by their order within a category.

    Raises ValueError for a label that is neither safe nor unsafe, and for no pairs.
    """
    unknown = sorted({example.label for example in prompts} - {*SAFE, *UNSAFE})
    if unknown:
        raise ValueError(f"{origin}: label {unknown[0]!r}; expected one of {', '.join((*UNSAFE, *SAFE))}")
    sides: dict[str, tuple[list[Example], list[Example]]] = {}
    for example in prompts:
        key = example.group or example.category.removeprefix("contrast_")
        sides.setdefault(key, ([], []))[example.label in SAFE].append(example)
    pairs = [pair for unsafe, safe in sides.values() for pair in zip(unsafe, safe, strict=False)]
    if not pairs:
        raise ValueError(f"{origin}: no pair of a safe and an unsafe request; match them by group or category")
    return pairs


def nearest_pairs(harmful: PromptSet, benign: PromptSet) -> list[tuple[Example, Example]]:
    """Each harmful request with a benign one of its own, as near in length as those left allow; as many as there can be."""
    left = sorted(benign, key=lambda example: (len(example.prompt), example.prompt))
    pairs = []
    for example in list(harmful)[: len(left)]:
        near = min(range(len(left)), key=lambda number: abs(len(left[number].prompt) - len(example.prompt)))
        pairs.append((example, left.pop(near)))
    return pairs


def _recognition(texts: Texts, harmful: Sets, benign: Sets) -> dict[str, PromptSet]:
    if not texts.pairs:
        pairs = {split: nearest_pairs(harmful[split], benign[split]) for split in SPLITS}
    else:
        every = request_pairs(read_prompts(texts.pairs), texts.pairs)
        by_prompt = {bad.prompt: (bad, good) for bad, good in every}
        sets = split_sets(PromptSet(tuple(bad for bad, _ in every)), limits=texts.limits, origin=texts.pairs)
        pairs = {split: [by_prompt[example.prompt] for example in chosen] for split, chosen in sets.items()}
    return {split: PromptSet(tuple(_asked(texts.wording, pairs[split]))) for split in SPLITS}


def _asked(wording: Wording, pairs: Iterable[tuple[Example, Example]]) -> Iterable[Example]:
    for bad, good in pairs:
        for example, right in ((bad, wording.no[0]), (good, wording.yes[0])):
            question = wording.recognition.replace("{request}", example.prompt)
            yield Example(question, right, category=bad.category, group=bad.cluster)


def request_behaviours(texts: Texts, *, prefill: str) -> tuple[dict[str, Behaviour], dict[str, str]]:
    """The behaviours by name, without reference answers yet, and what kind of request each prompt is (see `RequestJudge`).

    "prefilled": benign requests whose answers are begun as harmful ones are, without which a circuit of how answers begin
    could pass for one of harm.

    Raises ValueError as `read_prompts`, `split_sets` and `request_pairs`.
    """
    wording = texts.wording
    harmful, benign = _harmful_benign(texts)
    explained = {split: _worded(harmful[split], wording.explanation) for split in SPLITS}
    sets = {
        "harmful": harmful, "benign": benign, "recognition": _recognition(texts, harmful, benign),
        "explanation": explained, "refusal": harmful,
    }  # fmt: skip
    if prefill:
        sets["prefilled"] = benign
    kinds = {example.prompt: "yes" if n % 2 else "no" for s in sets["recognition"].values() for n, example in enumerate(s)}
    kinds |= {example.prompt: "explanation" for s in explained.values() for example in s}
    if texts.borderline:
        safe = read_prompts(texts.borderline).where(lambda example: example.label not in UNSAFE)
        sets["borderline"] = split_sets(_without_answers(safe), limits=texts.limits, origin=texts.borderline)
        kinds |= {example.prompt: "borderline" for s in sets["borderline"].values() for example in s}
    for name in ("benign", "harmful"):
        kinds |= {example.prompt: name for s in sets[name].values() for example in s}
    found = {}
    for name, by_split in sets.items():
        short, metric, wanted = _NAMED[name]
        begun = prefill if name in ("harmful", "prefilled") else ""
        options = {"prefill": begun, "max_new_tokens": 4 if name == "recognition" else None}
        choices = (wording.yes, wording.no) if name == "recognition" else ()
        prompts = partial(_of_split, MappingProxyType(by_split))
        found[name] = Behaviour(name, metric, f"{short}_nll", wanted, prompts, choices=choices, **options)
    return found, kinds


_NAMED = {  # behaviour -> short name, metric, wanted verdict
    "harmful": ("harm", "harm_valid_rate", "harmful"),
    "benign": ("benign", "benign_valid_rate", "benign"),
    "recognition": ("recognition", "recognition_accuracy", "correct"),
    "explanation": ("explanation", "explanation_rate", "correct"),
    "refusal": ("refusal", "refusal_rate", "refusal"),
    "borderline": ("borderline", "borderline_valid_rate", "benign"),
    "prefilled": ("prefilled", "prefilled_valid_rate", "benign"),
}


def _worded(prompts: PromptSet, wording: str) -> PromptSet:
    return PromptSet(tuple(replace(one, prompt=wording.replace("{request}", one.prompt)) for one in prompts))


def _of_split(sets: Sets, split: str) -> PromptSet:
    if split not in sets:
        raise ValueError(f"split={split!r}; expected one of {', '.join(sets)}")
    return sets[split]


def with_references(subject: Subject) -> Subject:
    """The subject whose requests carry the model's own answers as it is now, where the judge gives the wanted verdict.

    Other requests keep an empty completion: they count in rates, not in losses (see `Behaviour.references`). Answers of
    yes-or-no questions are the right words already.
    """
    behaviours = {}
    for name, behaviour in subject.behaviours.items():
        if not behaviour.choices:
            sets = {split: subject.verified(behaviour, behaviour.prompts(split)) for split in SPLITS}
            lacking = [split for split, chosen in sets.items() if not any(example.completion for example in chosen)]
            if lacking and name in ("harmful", "benign"):
                raise ValueError(
                    f"{subject.name} does not show {name!r} in any of {len(sets[lacking[0]])} {lacking[0]} requests, so "
                    "there is nothing to measure; give more requests, or another prefill or judge"
                )
            behaviour = replace(behaviour, prompts=partial(_of_split, sets))
        behaviours[name] = behaviour
    return replace(subject, behaviours=behaviours)
