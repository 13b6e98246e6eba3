"""Request files as the behaviours of a real model."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from harmcircuits.behaviours.behaviour import (
    CONTRAST,
    DOUBTED,
    KEPT_WORDS,
    TARGET,
    Behaviour,
    Splits,
    standard_behaviour,
)
from harmcircuits.behaviours.repeats import plain_texts
from harmcircuits.behaviours.request_judge import QuestionTemplates
from harmcircuits.display import nearest, plural
from harmcircuits.prompts import SPLITS, Example, PromptSet, joined_clusters, plain_text

# Labels of the two sides of a pair, as published data sets write them.
UNSAFE = ("unsafe", "harmful")
SAFE = ("safe", "harmless", "benign")
YES_OR_NO_TOKENS = 4  # how long an answer to a yes-or-no question may be

Sets = Mapping[str, PromptSet]  # by split
Requests = str | PromptSet
Pair = tuple[Example, Example]  # harmful, harmless


@dataclass(frozen=True)
class RequestFiles:
    """Where a real model's requests come from.

    Each source is a file, a dataset, or a set of requests.

    Attributes:
        harmful: harmful requests: a .jsonl, .json, .csv, .tsv, .txt or .parquet file, or a dataset
            id or folder (ID:SPLIT). AdvBench, HarmBench, JailbreakBench, StrongREJECT, XSTest,
            Alpaca and chat messages are recognised, and files with a `prompt` column. They are
            split into calibration, choice and held-out by the hash of their `group` (or prompt), so
            a request stays where it is when others are added; a repeated one counts once. Targets
            that a data set publishes are not scored: the model's own answers are.
        benign: benign requests, given and split in the same way.
        harmful_heldout: held-out harmful requests, in place of a quarter of the others.
        benign_heldout: held-out benign requests, in place of a quarter of the others.
        pairs: rows with `label` safe or unsafe, for recognition; matched by `group`, or by their
            order within a category ("contrast_x" belongs to "x"). Without them each harmful request
            is paired with a benign one of similar length, which is not matched in content.
        borderline: requests that look unsafe; those whose `label` is unsafe are left out.
        plain: a text file for perplexity.
        limit: the largest number of requests (pairs, windows) in a split; 0: all.
        limit_measured: the limit in choice and held-out, which only measure, where it differs.
        questions: the questions of recognition and explanation, and what answers them.
        columns: which column holds what, as prompt=goal, in every file; harmful.prompt=goal in one.
    """

    harmful: Requests = ""
    benign: Requests = ""
    harmful_heldout: Requests = ""
    benign_heldout: Requests = ""
    pairs: Requests = ""
    borderline: Requests = ""
    plain: str = ""
    limit: int = 0
    limit_measured: int = 0
    questions: QuestionTemplates = field(default_factory=QuestionTemplates)
    columns: Mapping[str, str] = field(default_factory=dict, hash=False)

    SOURCES = (
        "harmful", "benign", "harmful_heldout", "benign_heldout", "pairs", "borderline",
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name in (TARGET, CONTRAST):
            if bool(self.harmful or self.benign) and not getattr(self, name):
                raise ValueError(f"prompts: no {name!r}; give a file or a list of requests for it")
        for key in self.columns:
            source = key.rpartition(".")[0]
            if source and source not in self.SOURCES:
                raise ValueError(f"columns: {key!r} names no file; {nearest(source, self.SOURCES)}")

    @classmethod
    def of(cls, given: "RequestFiles | Mapping[str, Any]") -> "RequestFiles":
        """Request files from a dict, whose sources may be lists, tables or paths too."""
        if isinstance(given, RequestFiles):
            return given
        if not isinstance(given, Mapping):
            raise ValueError(
                f"prompts: expected a dict such as {{'{TARGET}': FILE, '{CONTRAST}': FILE}}, "
                f"got {type(given).__name__}"
            )
        known = [known.name for known in fields(cls)]
        values: dict[str, Any] = {}
        for name, value in given.items():
            if name not in known:
                raise ValueError(f"prompts: no {name!r} is known; {nearest(name, known)}")
            if name == "questions":
                value = QuestionTemplates.of(value)
            elif isinstance(value, Path):
                value = str(value)
            elif name in cls.SOURCES and not isinstance(value, str | PromptSet):
                value = PromptSet.read(value, _columns_of(name, given.get("columns", {})))
            values[name] = value
        return cls(**values)

    @property
    def sources(self) -> dict[str, str]:
        """What is given of each kind, for error messages and manifests."""
        names = {}
        for name in (*self.SOURCES, "plain"):
            source = getattr(self, name)
            if source:
                is_path = isinstance(source, str)
                names[name] = source if is_path else f"{len(source)} given requests"
        return names

    @property
    def shapes(self) -> list[str]:
        """How each file was read, a line each: what it was recognised as, and its columns."""
        lines = []
        for name in self.sources:
            shape = self.requests(name).shape if name != "plain" else ""
            if shape:
                lines.append(f"{name}: {shape}")
        return lines

    @property
    def limits(self) -> dict[str, int]:
        """The largest number of requests by split; 0 for all."""
        measured = self.limit_measured or self.limit
        return {"calibration": self.limit, "choice": measured, "heldout": measured}

    def requests(self, name: str) -> PromptSet:
        """The requests of a source, as they are in its file."""
        source = getattr(self, name)
        if isinstance(source, PromptSet):
            return source
        # Read once: a dataset takes seconds.
        if name not in self._read:
            self._read[name] = PromptSet.read(source, _columns_of(name, self.columns))
        return self._read[name]

    def split(self, name: str) -> Splits:
        """The requests of a source by split, without the answers of its file."""
        given = self.requests(name)
        heldout = f"{name}_heldout"
        apart = self.requests(heldout) if getattr(self, heldout, "") else None
        asked = given.where(lambda example: name != "borderline" or example.label not in UNSAFE)
        splits = Splits.of(
            _without_answers(asked),
            _without_answers(apart) if apart is not None else None,
            limits=self.limits,
            origin=self.sources[name],
        )
        return replace(splits, given=given, heldout=apart)

    @cached_property
    def _read(self) -> dict[str, PromptSet]:
        return {}


def _columns_of(name: str, columns: Mapping[str, str]) -> dict[str, str]:
    """The columns of one source: those for all, and its own, which count more."""
    named: dict[str, str] = {}
    for key in sorted(columns, key=lambda key: "." in key):
        source, _, column = key.rpartition(".")
        if source in ("", name):
            named[column] = columns[key]
    return named


def _without_answers(prompts: PromptSet) -> PromptSet:
    return prompts.with_completions([""] * len(prompts))


# The usual behaviours


def request_behaviours(
    files: RequestFiles, own: Iterable[Behaviour] = (), *, prefill: str
) -> tuple[dict[str, Behaviour], dict[str, str]]:
    """The behaviours by name, without reference answers yet, and each prompt's kind of request."""
    questions = files.questions
    splits = _splits(files, prefill)
    behaviours = {}
    for name, prompts in splits.items():
        options: dict[str, Any] = {}
        if name in ("harmful", "prefilled"):
            options["prefill"] = prefill
        if name == "recognition":
            options["choices"] = (questions.yes, questions.no)
            options["max_new_tokens"] = YES_OR_NO_TOKENS
        behaviours[name] = standard_behaviour(name, prompts, **options)
    if TARGET in behaviours:
        words = {KEPT_WORDS: "harm_kept_words_rate", DOUBTED: "harm_doubted_rate"}
        harm = behaviours[TARGET]
        behaviours[TARGET] = replace(harm, metrics={**harm.metrics, **words})

    kinds = _kinds(splits)
    for behaviour in own:
        name, prompts = behaviour.name, behaviour.prompts
        if name in behaviours:
            raise ValueError(f"behaviours: there is a {name!r} already; give another name")
        if isinstance(prompts, Splits) and prompts.given is not None:
            limited = Splits.of(prompts.given, limits=files.limits)
            behaviour = replace(behaviour, prompts=limited)
        behaviours[name] = behaviour
        if behaviour.judge is None:  # judged as borderline requests are: answered or not
            for prompt in _prompts_of(behaviour):
                kinds.setdefault(prompt, name)
    return behaviours, kinds


def _prompts_of(behaviour: Behaviour) -> Iterator[str]:
    for split in SPLITS:
        for example in behaviour.prompts(split):
            yield example.prompt


def _splits(files: RequestFiles, prefill: str) -> dict[str, Splits]:
    """The requests of each of the usual behaviours that has some."""
    # Two files give most behaviours; they differ in how the same requests are put:
    #
    #                       harmful requests    benign requests
    #     answer begun      harmful             prefilled
    #     as they are       refusal             benign
    #     in a question     explanation         .
    #     in a question     recognition         recognition
    splits: dict[str, Splits] = {}
    if files.harmful:
        harmful, benign = files.split(TARGET), files.split(CONTRAST)
        _refuse_shared(files, harmful.sets, benign.sets)
        explanation = {}
        for split, requests in harmful.sets.items():
            explanation[split] = _put_into(files.questions.explanation, requests)
        splits = {
            "harmful": harmful,
            "benign": benign,
            "recognition": _recognition(files, harmful.sets, benign.sets),
            "explanation": Splits(explanation, about=harmful.sets),
            "refusal": Splits(harmful.sets),
        }
        if prefill:
            splits["prefilled"] = Splits(benign.sets)
    if files.borderline:
        splits["borderline"] = files.split("borderline")
    return splits


def _refuse_shared(files: RequestFiles, harmful: Sets, benign: Sets) -> None:
    shared = plain_texts(harmful, SPLITS) & plain_texts(benign, SPLITS)
    if shared:
        names = files.sources
        raise ValueError(
            f"{plural(len(shared), 'request')} of {names['harmful']} are in {names['benign']} too; "
            "leave each in one file"
        )


def _put_into(template: str, prompts: PromptSet) -> PromptSet:
    """The requests as parts of a question about them."""
    examples = []
    for example in prompts:
        question = template.replace("{request}", example.prompt)
        # A question about a request and the request itself count as one.
        examples.append(replace(example, prompt=question, group=example.cluster))
    return PromptSet(tuple(examples))


def _kinds(splits: Mapping[str, Splits]) -> dict[str, str]:
    """What kind of request each prompt is, for `RequestJudge`; recognition's are "no" and "yes"."""
    kinds = {}
    for name in ("recognition", "explanation", "borderline", "benign", "harmful"):
        # A prompt that is in several sets has the kind of the last one: a borderline request that
        # is in the harmful file too is judged as harmful. "refusal" and "prefilled" have no prompts
        # of their own.
        for requests in splits[name].sets.values() if name in splits else ():
            for number, example in enumerate(requests):
                side = "yes" if number % 2 else "no"
                kinds[example.prompt] = side if name == "recognition" else name
    return kinds


# Recognition: questions about both requests of a pair


def _recognition(files: RequestFiles, harmful: Sets, benign: Sets) -> Splits:
    """Questions about both requests of each pair: first the harmful one, to which no is right."""
    if files.pairs:
        by_split = _given_pairs(files, harmful, benign)
    else:
        # Within a split, so that no request is both scored and measured.
        by_split = {split: nearest_pairs(harmful[split], benign[split]) for split in SPLITS}
    questions, about = {}, {}
    for split, pairs in by_split.items():
        questions[split] = _pair_questions(files.questions, pairs)
        about[split] = PromptSet(tuple(request for pair in pairs for request in pair))
    return Splits(questions, about=about)


def request_pairs(prompts: PromptSet, origin: str = "") -> list[Pair]:
    """(harmful, harmless) requests that belong together."""
    # Two lists for each group or category; XSTest has "homonyms" and "contrast_homonyms".
    sides: dict[str, tuple[list[Example], list[Example]]] = {}
    for example in prompts:
        if example.label not in (*UNSAFE, *SAFE):
            expected = ", ".join((*UNSAFE, *SAFE))
            raise ValueError(f"{origin}: label {example.label!r}; expected one of {expected}")
        key = example.group or example.category.removeprefix("contrast_")
        unsafe, safe = sides.setdefault(key, ([], []))
        side = safe if example.label in SAFE else unsafe
        side.append(example)

    # The first with the first, and so on; what is left over on the longer side has no partner.
    pairs: list[Pair] = []
    for unsafe, safe in sides.values():
        pairs += zip(unsafe, safe, strict=False)
    n_alone = len(prompts) - 2 * len(pairs)
    if n_alone:
        warnings.warn(
            f"{origin}: {plural(n_alone, 'request')} without a partner in the group or category "
            f"are left out, of {len(prompts)}",
            stacklevel=2,
        )
    return pairs


def nearest_pairs(harmful: PromptSet, benign: PromptSet) -> list[Pair]:
    """Pairs each harmful request with the unused benign request closest in length."""
    unused = sorted(benign, key=lambda example: (len(example.prompt), example.prompt))
    pairs = []
    for example in list(harmful)[: len(unused)]:
        distances = [abs(len(other.prompt) - len(example.prompt)) for other in unused]
        closest = distances.index(min(distances))
        pairs.append((example, unused.pop(closest)))
    return pairs


def _given_pairs(files: RequestFiles, harmful: Sets, benign: Sets) -> dict[str, list[Pair]]:
    """The pairs of a file by split: where a request of theirs is, or drawn by the harmful one."""
    origin = files.sources["pairs"]
    split_of = _split_of_texts(benign) | _split_of_texts(harmful)
    pairs = request_pairs(files.requests("pairs"), origin)
    # Splits are drawn of single requests, so each pair is drawn by its harmful one. Pairs that have
    # a request in common go together.
    keys = [(bad.cluster, plain_text(bad.prompt), plain_text(good.prompt)) for bad, good in pairs]
    by_prompt, known = {}, {}
    for (bad, good), cluster in zip(pairs, joined_clusters(keys), strict=True):
        is_moved = bad.cluster != cluster
        by_prompt[bad.prompt] = (replace(bad, group=cluster) if is_moved else bad, good)
        texts = [plain_text(bad.prompt), plain_text(good.prompt)]
        known[cluster] = next((split_of[text] for text in texts if text in split_of), "")
    unsafe = PromptSet(tuple(bad for bad, _ in by_prompt.values()))
    by_split = {}
    for split, requests in unsafe.splits(limits=files.limits, origin=origin, known=known).items():
        by_split[split] = [by_prompt[example.prompt] for example in requests]
    return by_split


def _split_of_texts(sets: Sets) -> dict[str, str]:
    """Each request, as it is compared -> its split."""
    splits = {}
    for split, requests in sets.items():
        for example in requests:
            splits[plain_text(example.prompt)] = split
    return splits


def _pair_questions(questions: QuestionTemplates, pairs: Iterable[Pair]) -> PromptSet:
    # Rows 2k and 2k + 1 are a pair, with one category and group: see `Behaviour.choices`.
    examples = []
    for unsafe, safe in pairs:
        for request, right in ((unsafe, questions.no[0]), (safe, questions.yes[0])):
            text = questions.recognition.replace("{request}", request.prompt)
            example = Example(text, right, category=unsafe.category, group=unsafe.cluster)
            examples.append(example)
    return PromptSet(tuple(examples))
