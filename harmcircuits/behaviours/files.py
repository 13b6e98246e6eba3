"""Request files as the behaviours of a real model."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from harmcircuits.behaviours.behaviour import Behaviour
from harmcircuits.behaviours.model import Model
from harmcircuits.behaviours.own import OwnBehaviour, of_split, split_requests, without_answers
from harmcircuits.behaviours.questions import QuestionTemplates
from harmcircuits.behaviours.repeats import plain_texts, repeat_rows, shared_rows
from harmcircuits.behaviours.standard import CONTRAST, TARGET, standard_behaviour
from harmcircuits.display import nearest
from harmcircuits.measurements import Rows
from harmcircuits.prompt_files import COLUMNS
from harmcircuits.prompts import SPLITS, Example, PromptSet, joined_clusters, plain_text

# Labels of the two sides of a pair, as published data sets write them.
UNSAFE = ("unsafe", "harmful")
SAFE = ("safe", "harmless", "benign")
YES_OR_NO_TOKENS = 4  # how long an answer to a yes-or-no question may be

Sets = Mapping[str, PromptSet]  # by split
Requests = str | PromptSet
Pair = tuple[Example, Example]  # harmful, harmless


@dataclass(frozen=True, repr=False)
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
        questions: the questions of recognition and explanation; on the command line a JSON file.
        columns: which column holds what, as prompt=goal, in every file; harmful.prompt=goal in one.
        behaviours: further behaviours, each a JSON or TOML file (see `OwnBehaviour`). With them
            harmful and benign requests may be left out, both.
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
    behaviours: Sequence[Any] = ()  # made `OwnBehaviour`s of

    SOURCES = (
        "harmful", "benign", "harmful_heldout", "benign_heldout", "pairs", "borderline", "plain",
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name in ("limit", "limit_measured"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"{name}={getattr(self, name)}; "
                    "expected the number of requests a split, or 0 for all"
                )
        for name, other in ((TARGET, CONTRAST), (CONTRAST, TARGET)):
            is_needed = bool(getattr(self, other)) or not self.behaviours
            if is_needed and not getattr(self, name):
                raise ValueError(f"prompts: no {name!r}; give a file or a list of requests for it")
        _check_columns(self.columns)
        given = [OwnBehaviour.of(behaviour) for behaviour in self.behaviours]
        object.__setattr__(self, "behaviours", tuple(given))

    def __repr__(self) -> str:
        # Analyses are resumed by this text, those too that began before there were these fields.
        shown = []
        for known in fields(self):
            value = getattr(self, known.name)
            if value or known.name not in ("columns", "behaviours"):
                shown.append(f"{known.name}={value!r}")
        return f"RequestFiles({', '.join(shown)})"

    @classmethod
    def of(cls, given: "RequestFiles | Mapping[str, Any]") -> "RequestFiles":
        """Request files from a dict."""
        if isinstance(given, RequestFiles):
            return given
        if not isinstance(given, Mapping):
            raise ValueError(
                f"prompts: expected a dict such as {{'{TARGET}': FILE, '{CONTRAST}': FILE}}, "
                f"got {type(given).__name__}"
            )
        known = [known.name for known in fields(cls)]
        for name in given:
            if name not in known:
                raise ValueError(
                    f"prompts: {name!r} is no kind of requests; {nearest(name, known)}"
                )
        columns = given.get("columns", {})
        return cls(**{name: _source(name, value, columns) for name, value in given.items()})

    def requests(self, name: str) -> PromptSet:
        """The requests of a source, as they are in its file."""
        # Read once: a dataset takes seconds.
        if name not in self._read:
            source = getattr(self, name)
            columns = _columns_of(name, self.columns) if isinstance(source, str) else None
            self._read[name] = PromptSet.read(source, columns)
        return self._read[name]

    @cached_property
    def _read(self) -> dict[str, PromptSet]:
        return {}

    @property
    def shapes(self) -> list[str]:
        """How each file was read, a line each: what it was recognised as, and its columns."""
        lines = []
        for name in self.files:
            requests = self.requests(name) if name != "plain" else PromptSet(())
            has_answers = any(example.completion for example in requests)
            unused = "; its answers are not used" if has_answers else ""
            if requests.shape:
                lines.append(f"{name}: {requests.shape}{unused}")
        for behaviour in self.behaviours:
            lines += [f"{behaviour.name}: {shape}" for shape in behaviour.shapes]
        return lines

    @property
    def limits(self) -> dict[str, int]:
        """The largest number of requests by split; 0 for all."""
        measured = self.limit_measured or self.limit
        return {"calibration": self.limit, "choice": measured, "heldout": measured}

    @property
    def files(self) -> dict[str, str]:
        """The name of each source that is given, for error messages and manifests."""
        names = {}
        for name in self.SOURCES:
            source = getattr(self, name)
            if not source:
                continue
            is_path = isinstance(source, str)
            names[name] = source if is_path else f"{len(source)} given requests"
        return names


def _source(name: str, given: Any, columns: Mapping[str, str]) -> Any:
    """A path as text, given requests as a set; anything else as it is."""
    if isinstance(given, Path):
        return str(given)
    if name not in RequestFiles.SOURCES or isinstance(given, str):
        return given
    if isinstance(given, Sequence) and not given:
        return ""
    is_table = not isinstance(given, PromptSet)
    return PromptSet.read(given, _columns_of(name, columns) if is_table else None)


def _check_columns(columns: Mapping[str, str]) -> None:
    """Raises ValueError for another key than prompt, or harmful.prompt."""
    sources = [name for name in RequestFiles.SOURCES if name != "plain"]
    for key in columns:
        source, _, column = key.rpartition(".")
        if source and source not in sources:
            raise ValueError(f"columns: {key!r} names no file; {nearest(source, sources)}")
        if column not in COLUMNS:
            raise ValueError(f"columns: {column!r} is no column; {nearest(column, COLUMNS)}")


def _columns_of(name: str, columns: Mapping[str, str]) -> dict[str, str]:
    """The columns of one source: those for all, and its own."""
    of_all = {key: value for key, value in columns.items() if "." not in key}
    own = {}
    for key, value in columns.items():
        source, _, column = key.rpartition(".")
        if source == name:
            own[column] = value
    return of_all | own


def request_pairs(prompts: PromptSet, origin: str = "") -> list[Pair]:
    """(harmful, harmless) requests that belong together."""
    unknown = sorted({example.label for example in prompts} - {*SAFE, *UNSAFE})
    if unknown:
        expected = ", ".join((*UNSAFE, *SAFE))
        raise ValueError(f"{origin}: label {unknown[0]!r}; expected one of {expected}")

    # Two lists for each group or category; XSTest has "homonyms" and "contrast_homonyms".
    sides: dict[str, tuple[list[Example], list[Example]]] = {}
    for example in prompts:
        key = example.group or example.category.removeprefix("contrast_")
        unsafe, safe = sides.setdefault(key, ([], []))
        if example.label in SAFE:
            safe.append(example)
        else:
            unsafe.append(example)

    # The first with the first, and so on; what is left over on the longer side has no partner.
    pairs: list[Pair] = []
    for unsafe, safe in sides.values():
        pairs += zip(unsafe, safe, strict=False)
    if not pairs:
        raise ValueError(
            f"{origin}: no pair of a safe and an unsafe request; match them by group or category"
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


def request_behaviours(
    files: RequestFiles,
    *,
    prefill: str,
) -> tuple[dict[str, Behaviour], dict[str, str]]:
    """The behaviours by name, without reference answers yet, and each prompt's kind of request."""
    questions = files.questions
    sets = _sets(files, prefill)
    behaviours = {}
    for name, by_split in sets.items():
        options: dict[str, Any] = {}
        if name in ("harmful", "prefilled"):
            options["prefill"] = prefill
        if name == TARGET:
            options["words_metric"] = "harm_kept_words_rate"
            options["doubt_metric"] = "harm_doubted_rate"
        if name == "recognition":
            options["choices"] = (questions.yes, questions.no)
            options["max_new_tokens"] = YES_OR_NO_TOKENS
        # A partial of a function of this module, not a closure: behaviours go to other processes.
        prompts = partial(of_split, MappingProxyType(dict(by_split)))
        behaviours[name] = standard_behaviour(name, prompts, **options)
    for own in files.behaviours:
        if own.name in behaviours:
            raise ValueError(f"behaviours: there is a {own.name!r} already; give another name")
        behaviours[own.name] = own.behaviour(files.limits)
    return behaviours, _kinds(sets)


def _sets(files: RequestFiles, prefill: str) -> dict[str, Sets]:
    """The requests of each of the usual behaviours that has some."""
    # Two files give most behaviours; they differ in how the same requests are put:
    #
    #                       harmful requests    benign requests
    #     answer begun      harmful             prefilled
    #     as they are       refusal             benign
    #     in a question     explanation         .
    #     in a question     recognition         recognition
    questions = files.questions
    sets: dict[str, Sets] = {}
    if files.harmful:
        harmful, benign = _harmful_and_benign(files)
        explanation = {}
        for split, requests in harmful.items():
            explanation[split] = _put_into(questions.explanation, requests)
        sets = {
            "harmful": harmful,
            "benign": benign,
            "recognition": _recognition(files, harmful, benign),
            "explanation": explanation,
            "refusal": harmful,
        }
        if prefill:
            sets["prefilled"] = benign
    if files.borderline:
        sets["borderline"] = _borderline(files)
    return sets


def _borderline(files: RequestFiles) -> Sets:
    requests = files.requests("borderline")
    safe = requests.where(lambda example: example.label not in UNSAFE)
    origin = files.files["borderline"]
    return split_requests(without_answers(safe), None, limits=files.limits, origin=origin)


def repeats_of(files: RequestFiles, behaviours: Mapping[str, Behaviour]) -> Rows:
    """How many requests ask the same as others (see `harmcircuits.behaviours.repeats`)."""
    rows = Rows()
    for name in (TARGET, CONTRAST, "borderline"):
        if getattr(files, name):
            heldout = f"{name}_heldout"
            has_heldout = bool(getattr(files, heldout, ""))
            measured = files.requests(heldout) if has_heldout else None
            rows += repeat_rows(name, files.requests(name), measured)
    for own in files.behaviours:
        rows += repeat_rows(own.name, *own.sources)
    return rows + shared_rows(behaviours)


def with_references(model: Model) -> Model:
    """The model with its own answers as reference answers, where the judge verified them."""
    for behaviour in model.behaviours.values():
        model.refuse_unreadable(behaviour)
    own = [behaviour for behaviour in model.behaviours.values() if _is_scored_on_own(behaviour)]
    asked = []
    for behaviour in own:
        asked += [(behaviour, behaviour.prompts(split)) for split in SPLITS]
    verified = iter(model.verified_together(asked))

    behaviours = []
    for behaviour in own:
        sets = {split: next(verified) for split in SPLITS}
        if behaviour.name in (TARGET, CONTRAST):
            _refuse_unanswered(model.name, behaviour.name, sets)
        behaviours.append(replace(behaviour, prompts=partial(of_split, sets)))
    return model.with_behaviours(*behaviours)


def _is_scored_on_own(behaviour: Behaviour) -> bool:
    return not behaviour.choices and not behaviour.is_scored_on_references


def _refuse_unanswered(model: str, name: str, sets: Sets) -> None:
    for split, answers in sets.items():
        if not any(example.completion for example in answers):
            raise ValueError(
                f"{model} does not show {name!r} in any of {len(answers)} {split} requests, "
                "so there is nothing to measure; "
                "give more requests, or another prefill or judge"
            )


def _harmful_and_benign(files: RequestFiles) -> tuple[Sets, Sets]:
    sets = []
    for name in ("harmful", "benign"):
        requests = without_answers(files.requests(name))
        heldout = None
        if getattr(files, f"{name}_heldout"):
            heldout = without_answers(files.requests(f"{name}_heldout"))
        origin = files.files[name]
        sets.append(split_requests(requests, heldout, limits=files.limits, origin=origin))
    harmful, benign = sets
    shared = plain_texts(harmful, SPLITS) & plain_texts(benign, SPLITS)
    if shared:
        names = files.files
        raise ValueError(
            f"{len(shared)} requests are in {names['harmful']} and in {names['benign']}; "
            "leave each in one file"
        )
    return harmful, benign


def _recognition(files: RequestFiles, harmful: Sets, benign: Sets) -> Sets:
    """Questions about both requests of each pair: first the harmful one, to which no is right."""
    if files.pairs:
        by_split = _given_pairs(files)
    else:
        # Within a split, so that no request is both scored and measured.
        by_split = {split: nearest_pairs(harmful[split], benign[split]) for split in SPLITS}
    return {split: _pair_questions(files.questions, by_split[split]) for split in SPLITS}


def _given_pairs(files: RequestFiles) -> dict[str, list[Pair]]:
    """The pairs of a file by split, drawn by the hash of the harmful request."""
    origin = files.files["pairs"]
    pairs = request_pairs(files.requests("pairs"), origin)
    # Splits are drawn of single requests, so each pair is drawn by its harmful one. Pairs that have
    # a request in common go together.
    keys = [(bad.cluster, plain_text(bad.prompt), plain_text(good.prompt)) for bad, good in pairs]
    by_prompt = {}
    for (bad, good), cluster in zip(pairs, joined_clusters(keys), strict=True):
        is_moved = bad.cluster != cluster
        by_prompt[bad.prompt] = (replace(bad, group=cluster) if is_moved else bad, good)
    unsafe = PromptSet(tuple(bad for bad, _ in by_prompt.values()))
    by_split = {}
    for split, requests in unsafe.splits(limits=files.limits, origin=origin).items():
        by_split[split] = [by_prompt[example.prompt] for example in requests]
    return by_split


def _pair_questions(questions: QuestionTemplates, pairs: Iterable[Pair]) -> PromptSet:
    # Rows 2k and 2k + 1 are a pair, with one category and group: see `Behaviour.choices`.
    examples = []
    for unsafe, safe in pairs:
        with_right_word = [(unsafe, questions.no[0]), (safe, questions.yes[0])]
        for request, right in with_right_word:
            text = questions.recognition.replace("{request}", request.prompt)
            example = Example(text, right, category=unsafe.category, group=unsafe.cluster)
            examples.append(example)
    return PromptSet(tuple(examples))


def _put_into(template: str, prompts: PromptSet) -> PromptSet:
    """The requests as parts of a question about them."""
    examples = []
    for example in prompts:
        question = template.replace("{request}", example.prompt)
        # A question about a request and the request itself count as one.
        examples.append(replace(example, prompt=question, group=example.cluster))
    return PromptSet(tuple(examples))


def _kinds(sets: Mapping[str, Sets]) -> dict[str, str]:
    """What kind of request each prompt is, for `RequestJudge`; recognition's are "no" and "yes"."""
    kinds = {}
    for requests in sets.get("recognition", {}).values():
        for number, example in enumerate(requests):
            kinds[example.prompt] = "yes" if number % 2 else "no"
    # A prompt that is in several sets has the kind of the last one: a borderline request that is in
    # the harmful file too is judged as harmful. "refusal" and "prefilled" have no prompts of their
    # own.
    for name in ("explanation", "borderline", "benign", "harmful"):
        if name in sets:
            kinds |= dict.fromkeys(_prompts_of(sets[name]), name)
    return kinds


def _prompts_of(sets: Sets) -> set[str]:
    prompts = set()
    for requests in sets.values():
        prompts |= {example.prompt for example in requests}
    return prompts
