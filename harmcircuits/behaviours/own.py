"""A behaviour of one's own, from a file: requests, reference answers, how an answer is judged."""

import hashlib
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from harmcircuits.behaviours.behaviour import DEGENERATE, Behaviour
from harmcircuits.behaviours.judges import RuleJudge
from harmcircuits.behaviours.model import OTHERS
from harmcircuits.display import nearest
from harmcircuits.prompts import NO_LIMITS, PromptSet
from harmcircuits.storage import read_text

# How an answer is judged -> the verdict on one that shows the behaviour.
WANTED = {
    "answered": "answered",
    "refused": "refusal",
    "reference": "correct",
    "pattern": "match",
}
REFERENCES = ("own", "file")


@dataclass(frozen=True)
class AnswerJudge:
    """The judge of a behaviour of one's own: the local rules, or what an answer must contain."""

    by: str
    pattern: str = ""
    references: Mapping[str, str] = field(default_factory=dict, repr=False)
    prefill: str = ""

    @property
    def name(self) -> str:
        """The identity that rows carry."""
        return self.by if self.by in ("reference", "pattern") else "local rules"

    def __call__(self, prompt: str, completion: str) -> str:
        """The verdict that `WANTED` has for this way of judging, or why it is not that."""
        answer = completion.removeprefix(self.prefill)
        # Before the rules: an answer in symbols, such as code, is no prose, and may be right.
        if self.by == "pattern" and re.search(self.pattern, answer):
            return WANTED["pattern"]
        if self.by == "reference" and _plain(self.references[prompt]) in _plain(answer):
            return WANTED["reference"]
        verdict = RuleJudge(self.prefill, min_words=1)(prompt, completion)
        if verdict != "harmful":  # the rules' verdict on every answer that is no refusal
            return verdict
        return "answered" if self.by in ("answered", "refused") else "other"


@dataclass(frozen=True)
class OwnBehaviour:
    """A behaviour of one's own, as a JSON or TOML file with these keys says it."""

    name: str
    prompts: str | PromptSet
    heldout: str | PromptSet = ""
    columns: Mapping[str, str] = field(default_factory=dict)
    references: str = "own"
    judge: str = "answered"
    pattern: str = ""
    prefill: str = ""
    is_kept: bool = True
    title: str = ""
    metric: str = ""
    max_new_tokens: int = 0

    def __post_init__(self) -> None:
        self._check_name()
        for name, allowed in (("judge", tuple(WANTED)), ("references", REFERENCES)):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{self._place}: {name}={value!r}; {nearest(str(value), allowed)}")
        self._check_pattern()
        if self.max_new_tokens < 0:
            raise ValueError(f"{self._place}: max_new_tokens={self.max_new_tokens}; expected more")
        for name, usual in (("title", self.name), ("metric", f"{self.name}_rate")):
            object.__setattr__(self, name, getattr(self, name) or usual)

    @classmethod
    def of(cls, given: Any) -> "OwnBehaviour":
        """A behaviour from a file, a dict with the keys of one, or as it is."""
        if isinstance(given, OwnBehaviour):
            return given
        if isinstance(given, str | Path):
            return cls._from(_stored(Path(given)), f"{given}", Path(given).parent)
        if isinstance(given, Mapping):
            return cls._from(given, "behaviours", None)
        hint = "; add it by model.with_behaviours" if isinstance(given, Behaviour) else ""
        raise ValueError(f"behaviours: expected a file or a dict, got {type(given).__name__}{hint}")

    @classmethod
    def _from(cls, stored: Any, place: str, folder: Path | None) -> "OwnBehaviour":
        """From the keys of a file or dict; paths are relative to a folder."""
        known = {key.name: key for key in fields(cls)}
        if not isinstance(stored, Mapping):
            raise ValueError(f"{place}: expected one object with some of {', '.join(known)}")
        values: dict[str, Any] = dict(stored)
        for key in values:
            if key not in known:
                raise ValueError(
                    f"{place}: {key!r} is no key of a behaviour; {nearest(key, known)}"
                )
        for key in ("name", "prompts"):
            if not values.get(key):
                raise ValueError(f"{place}: no {key!r}; a behaviour needs a name and its prompts")
        for key in ("prompts", "heldout"):
            if key in values:
                values[key] = _source(values[key], folder)
        for key, value in values.items():
            _check_type(place, key, value)
        return cls(**values)

    @property
    def sources(self) -> tuple[PromptSet, PromptSet | None]:
        """Its requests as they are in the files, and those held out, if any."""
        return self._requests, self._heldout

    @property
    def shapes(self) -> list[str]:
        """How its files were read, a line each."""
        sets = (self._requests, self._heldout)
        return [requests.shape for requests in sets if requests is not None and requests.shape]

    @property
    def digest(self) -> str:
        """First 16 hex digits of the SHA-256 of its settings and of all its requests."""
        settings: list[Any] = []
        for key in fields(self):
            if key.name not in ("prompts", "heldout", "columns"):
                settings.append(getattr(self, key.name))
        for requests in (self._requests, self._heldout):
            settings.append(requests.digest if requests is not None else "")
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]

    def behaviour(self, limits: Mapping[str, int] = NO_LIMITS) -> Behaviour:
        """The behaviour itself, its requests split, without the model's own answers."""
        requests, heldout = self._requests, self._heldout
        answers = _completions(requests) | _completions(heldout or PromptSet(()))
        is_from_file = self.references == "file"
        if is_from_file or self.judge == "reference":
            self._refuse_without_completion(answers)
        sets = split_requests(requests, heldout, limits=limits, origin=self._place)
        if not is_from_file:
            sets = {split: without_answers(members) for split, members in sets.items()}

        wanted = WANTED[self.judge]
        # Of what is removed the tables say what comes in its place.
        beside = {} if self.is_kept else {"refusal": "refusal", DEGENERATE: "degenerate"}
        beside = {key: f"{self.name}_{rate}_rate" for key, rate in beside.items() if key != wanted}
        return Behaviour(
            self.name,
            metric=self.metric,
            nll_metric=f"{self.name}_nll",
            wanted=wanted,
            # A partial of a function of this module: behaviours go to other processes.
            prompts=partial(of_split, sets),
            prefill=self.prefill,
            judge=AnswerJudge(self.judge, self.pattern, answers, self.prefill),
            max_new_tokens=self.max_new_tokens or None,
            title=self.title,
            is_kept=self.is_kept,
            is_loss_shown=True,
            is_scored_on_references=is_from_file,
            side_metrics=beside,
        )

    @property
    def _place(self) -> str:
        return f"behaviour {self.name!r}"

    @cached_property
    def _requests(self) -> PromptSet:
        return PromptSet.read(self.prompts, self.columns)

    @cached_property
    def _heldout(self) -> PromptSet | None:
        return PromptSet.read(self.heldout, self.columns) if self.heldout else None

    def _check_name(self) -> None:
        # It goes into the names of files.
        is_plain = re.fullmatch(r"\w[\w -]*", self.name)
        if not is_plain or self.name == OTHERS:
            raise ValueError(
                f"behaviours: name={self.name!r}; expected letters, digits, spaces, - and _, "
                f"and not {OTHERS!r}, which means all of them"
            )

    def _check_pattern(self) -> None:
        is_judge = self.judge == "pattern"
        if is_judge != bool(self.pattern):
            raise ValueError(
                f"{self._place}: judge={self.judge!r} with pattern={self.pattern!r}; "
                "the judge 'pattern' needs one, and no other takes one"
            )
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(
                f"{self._place}: pattern={self.pattern!r} is no regular expression ({error})"
            ) from None

    def _refuse_without_completion(self, answers: Mapping[str, str]) -> None:
        empty = [prompt for prompt, answer in answers.items() if not answer]
        if empty:
            raise ValueError(
                f"{self._place}: {len(empty)} of {len(answers)} requests have no completion; "
                f"judge={self.judge!r} and references={self.references!r} need one for each"
            )


def split_requests(
    requests: PromptSet,
    heldout: PromptSet | None,
    *,
    limits: Mapping[str, int],
    origin: str,
) -> dict[str, PromptSet]:
    """Each request once, by split."""
    if heldout is not None:
        heldout = _first_of_each(heldout)
    return _first_of_each(requests).splits(heldout, limits=limits, origin=origin)


def without_answers(prompts: PromptSet) -> PromptSet:
    """The requests alone."""
    return prompts.with_completions([""] * len(prompts))


def of_split(sets: Mapping[str, PromptSet], split: str) -> PromptSet:
    """The set of a split."""
    if split not in sets:
        raise ValueError(f"split={split!r}; expected one of {', '.join(sets)}")
    return sets[split]


def _first_of_each(prompts: PromptSet) -> PromptSet:
    first = {}
    for example in prompts:
        first.setdefault(example.prompt, example)
    return PromptSet(tuple(first.values()))


def _completions(prompts: PromptSet) -> dict[str, str]:
    first: dict[str, str] = {}
    for example in prompts:
        first.setdefault(example.prompt, example.completion)
    return first


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _stored(path: Path) -> Any:
    """What a JSON or TOML file holds."""
    text = read_text(path, "a behaviour in JSON or TOML")
    try:
        return tomllib.loads(text) if path.suffix.lower() == ".toml" else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: no behaviour in JSON, or TOML in a file that ends in .toml ({error})"
        ) from None


def _source(given: Any, folder: Path | None) -> Any:
    """A file by its path from here, a hub id as it is, a list of requests as a set."""
    if isinstance(given, list):
        return PromptSet.read(given)
    if not isinstance(given, str) or folder is None:
        return str(given) if isinstance(given, Path) else given
    name = given.partition(":")[0]  # a dataset may name its split
    is_file = Path(name).suffix or (folder / name).exists()
    return str(folder / given) if is_file else given


def _check_type(place: str, key: str, value: Any) -> None:
    expected: tuple[type, ...] = (str,)
    if key in ("prompts", "heldout"):
        expected = (str, PromptSet)
    elif key == "columns":
        expected = (Mapping,)
    elif key == "is_kept":
        expected = (bool,)
    elif key == "max_new_tokens":
        expected = (int,)
    is_flag = isinstance(value, bool) and bool not in expected
    if is_flag or not isinstance(value, expected):
        kinds = " or ".join(kind.__name__ for kind in expected)
        raise ValueError(f"{place}: {key} is {type(value).__name__}; expected {kinds}")
