"""Request files as the behaviours of a real model: read, split, and put into questions."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import cycle
from pathlib import Path
from typing import Any

from harmcircuits.behaviours.behaviour import (
    CONTRAST,
    DISAGREEMENT,
    LEXICAL_OVERLAP,
    TARGET,
    Behaviour,
    Splits,
    standard_behaviour,
)
from harmcircuits.behaviours.request_judge import QuestionTemplates
from harmcircuits.display import nearest, plural
from harmcircuits.prompts import (
    SPLITS,
    Example,
    PromptSet,
    joined_clusters,
    plain_text,
    plain_texts,
)

# Labels of the two sides of a pair in published data sets.
UNSAFE = ("unsafe", "harmful")
SAFE = ("safe", "harmless", "benign")
YES_OR_NO_TOKENS = 4  # the longest answer to a yes-or-no question

RequestSource = str | PromptSet
Pair = tuple[Example, Example]  # harmful, harmless


@dataclass(frozen=True)
class RequestFiles:
    """The sources of a real model's requests: files, datasets, or sets of requests.

    Attributes:
        harmful: harmful requests: a .jsonl, .json, .csv, .tsv, .txt or .parquet file, or a dataset
            id or folder (ID:SPLIT). AdvBench, HarmBench, JailbreakBench, StrongREJECT, XSTest,
            Alpaca and chat messages are recognised, and files with a `prompt` column. They are
            split into calibration, choice and held-out by the hash of their `group` (or prompt), so
            a request keeps its split when a file grows; a repeated request counts once. The
            completions of a data set are not scored: the model's own answers are.
        benign: benign requests, read and split in the same way.
        harmful_heldout: held-out harmful requests, in place of a quarter of the others.
        benign_heldout: held-out benign requests, in place of a quarter of the others.
        pairs: rows with `label` safe or unsafe, for recognition; matched by `group`, or by their
            order within a category ("contrast_x" belongs to "x"). Without them each harmful request
            is paired with a benign one of similar length, which is not matched in content.
        borderline: requests that look unsafe; those whose `label` is unsafe are left out.
        plain: a text file for perplexity.
        limit: the largest number of requests (pairs, windows) in a split; 0: all.
        limit_measured: the limit in choice and held-out, which only measure, where it differs.
        questions: the questions of recognition and explanation, and the words of right answers.
        columns: the column of a field, as prompt=goal, in every file; harmful.prompt=goal in one.
    """

    harmful: RequestSource = ""
    benign: RequestSource = ""
    harmful_heldout: RequestSource = ""
    benign_heldout: RequestSource = ""
    pairs: RequestSource = ""
    borderline: RequestSource = ""
    plain: str = ""
    limit: int = 0
    limit_measured: int = 0
    questions: QuestionTemplates = field(default_factory=QuestionTemplates)
    columns: Mapping[str, str] = field(default_factory=dict, hash=False)

    SOURCES = (
        "harmful", "benign", "harmful_heldout", "benign_heldout", "pairs", "borderline",
    )  # fmt: skip

    def __post_init__(self) -> None:
        has_requests = bool(self.harmful or self.benign)
        for name in (TARGET, CONTRAST):
            if has_requests and not getattr(self, name):
                raise ValueError(f"prompts: no {name!r}; give a file or a list of requests for it")
        for key in self.columns:
            source = key.rpartition(".")[0]
            if source and source not in self.SOURCES:
                raise ValueError(f"columns: {key!r} names no file; {nearest(source, self.SOURCES)}")

    @classmethod
    def of(cls, sources: "RequestFiles | Mapping[str, Any]") -> "RequestFiles":
        """Request files from a dict, whose sources may also be lists, tables or paths."""
        if isinstance(sources, RequestFiles):
            return sources
        if not isinstance(sources, Mapping):
            raise ValueError(
                f"prompts: expected a dict such as {{'{TARGET}': FILE, '{CONTRAST}': FILE}}, "
                f"got {type(sources).__name__}"
            )
        names = [item.name for item in fields(cls)]
        values: dict[str, Any] = {}
        for name, value in sources.items():
            if name not in names:
                raise ValueError(f"prompts: {name!r} is unknown; {nearest(name, names)}")
            if name == "questions":
                value = QuestionTemplates.of(value)
            elif isinstance(value, Path):
                value = str(value)
            elif name in cls.SOURCES and not isinstance(value, str):
                value = PromptSet.read(value, _columns_of(name, sources.get("columns", {})))
            values[name] = value
        return cls(**values)

    @property
    def sources(self) -> dict[str, str]:
        """The name of every source, for error messages and manifests."""
        names = {}
        for name in (*self.SOURCES, "plain"):
            source = getattr(self, name)
            if source:
                is_path = isinstance(source, str)
                names[name] = source if is_path else f"{len(source)} given requests"
        return names

    @property
    def limits(self) -> dict[str, int]:
        """The largest number of requests by split; 0 for all."""
        limit = self.limit_measured or self.limit
        return {"calibration": self.limit, "choice": limit, "heldout": limit}

    @cached_property
    def requests(self) -> dict[str, PromptSet]:
        """The requests of every source, as they are in its file, which is read once."""
        requests = {}
        for name in self.SOURCES:
            source = getattr(self, name)
            if source:
                requests[name] = PromptSet.read(source, _columns_of(name, self.columns))
        return requests

    def split(self, name: str) -> Splits:
        """The requests of a source by split, without the answers of its file."""
        source = self.requests[name]
        heldout = self.requests.get(f"{name}_heldout")
        safe = source
        if name == "borderline":
            safe = source.where(lambda example: example.label not in UNSAFE)
        splits = Splits.of(
            _without_answers(safe),
            _without_answers(heldout) if heldout else None,
            limits=self.limits,
            origin=self.sources[name],
        )
        return replace(splits, source=source, heldout=heldout)


def _columns_of(name: str, columns: Mapping[str, str]) -> dict[str, str]:
    """Column names for one source; its own override the general ones."""
    by_field: dict[str, str] = {}
    for key in sorted(columns, key=lambda key: "." in key):
        source, _, field_name = key.rpartition(".")
        if source in ("", name):
            by_field[field_name] = columns[key]
    return by_field


def _without_answers(prompts: PromptSet) -> PromptSet:
    return prompts.with_completions([""] * len(prompts))


def request_behaviours(
    files: RequestFiles, own: Iterable[Behaviour] = (), *, prefill: str
) -> tuple[dict[str, Behaviour], dict[str, str]]:
    """The behaviours by name, without reference answers yet, and the kind of each prompt."""
    behaviours = {}
    for behaviour in _file_behaviours(files, prefill):
        behaviours[behaviour.name] = behaviour
    for behaviour in own:
        name, prompts = behaviour.name, behaviour.prompts
        if name in behaviours:
            raise ValueError(f"behaviours: there is a {name!r} already; give another name")
        if isinstance(prompts, Splits) and prompts.source is not None:
            are_pairs = bool(behaviour.choices)
            prompts = Splits.of(prompts.source, limits=files.limits, are_pairs=are_pairs)
        behaviours[name] = replace(behaviour, prompts=prompts)

    kinds: dict[str, str] = {}
    for behaviour in behaviours.values():
        if behaviour.judge is None:
            # The first behaviour with a prompt gives its kind: a borderline request that is in the
            # harmful file too is judged as harmful.
            kinds = _kinds(behaviour) | kinds
    return behaviours, kinds


def _kinds(behaviour: Behaviour) -> dict[str, str]:
    """The kind of each prompt, for `RequestJudge`."""
    prompts = []
    for split in SPLITS:
        prompts += [example.prompt for example in behaviour.prompts(split)]
    if behaviour.name == "recognition":
        return dict(zip(prompts, cycle(("no", "yes")), strict=False))
    return dict.fromkeys(prompts, behaviour.name)


def _file_behaviours(files: RequestFiles, prefill: str) -> list[Behaviour]:
    """The behaviours of the package for which there are requests."""
    # Two files give most behaviours, which put the same requests in different ways:
    #
    #                       harmful requests    benign requests
    #     with a prefill    harmful             prefilled
    #     alone             refusal             benign
    #     in a question     explanation         .
    #     in a question     recognition         recognition
    behaviours = []
    if files.harmful:
        harmful, benign = files.split(TARGET), files.split(CONTRAST)
        _refuse_shared(files.sources, harmful, benign)
        questions = files.questions
        explanation = {}
        for split, requests in harmful.sets.items():
            explanation[split] = _in_question(questions.explanation, requests)

        harm = standard_behaviour(TARGET, harmful, prefill=prefill)
        words = {LEXICAL_OVERLAP: "harm_kept_words_rate", DISAGREEMENT: "harm_doubted_rate"}
        behaviours = [
            replace(harm, metrics={**harm.metrics, **words}),
            standard_behaviour(CONTRAST, benign),
            standard_behaviour(
                "recognition",
                _recognition(files, harmful, benign),
                choices=(questions.yes, questions.no),
                max_new_tokens=YES_OR_NO_TOKENS,
            ),
            standard_behaviour("explanation", Splits(explanation, subjects=harmful.sets)),
            standard_behaviour("refusal", Splits(harmful.sets)),
        ]
        if prefill:
            prefilled = standard_behaviour("prefilled", Splits(benign.sets), prefill=prefill)
            behaviours.append(prefilled)
    if files.borderline:
        behaviours.append(standard_behaviour("borderline", files.split("borderline")))
    return behaviours


def _refuse_shared(sources: Mapping[str, str], harmful: Splits, benign: Splits) -> None:
    texts = plain_texts(harmful.sets.values()) & plain_texts(benign.sets.values())
    if texts:
        raise ValueError(
            f"{plural(len(texts), 'request')} of {sources['harmful']} are in {sources['benign']} "
            "too; leave each in one file"
        )


def _in_question(template: str, prompts: PromptSet) -> PromptSet:
    """A question about each request."""
    examples = []
    for example in prompts:
        question = template.replace("{request}", example.prompt)
        # A question and its request are one unit.
        examples.append(replace(example, prompt=question, group=example.cluster))
    return PromptSet(tuple(examples))


# Recognition: questions about both requests of a pair


def _recognition(files: RequestFiles, harmful: Splits, benign: Splits) -> Splits:
    """Questions about both requests of each pair: first the harmful one, whose answer is no."""
    if "pairs" in files.requests:
        pairs = _pairs_of_file(files, harmful, benign)
    else:
        # Within a split, so that no request is both scored and measured.
        pairs = {split: nearest_pairs(harmful(split), benign(split)) for split in SPLITS}

    template = files.questions.recognition
    answers = [files.questions.no[0], files.questions.yes[0]]
    questions, subjects = {}, {}
    for split, members in pairs.items():
        # Rows 2k and 2k + 1 are a pair, with one category and group: see `Behaviour.choices`.
        examples, requests = [], []
        for pair in members:
            unsafe, _ = pair
            for request, answer in zip(pair, answers, strict=True):
                text = template.replace("{request}", request.prompt)
                example = Example(text, answer, category=unsafe.category, group=unsafe.cluster)
                examples.append(example)
            requests += pair
        questions[split] = PromptSet(tuple(examples))
        subjects[split] = PromptSet(tuple(requests))
    return Splits(questions, subjects=subjects)


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

    # The first with the first, and so on; the longer side may have requests without a partner.
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
    """Each harmful request with the unused benign request closest in length."""
    unused = sorted(benign, key=lambda example: (len(example.prompt), example.prompt))
    pairs = []
    for example in harmful.examples[: len(unused)]:
        distances = [abs(len(partner.prompt) - len(example.prompt)) for partner in unused]
        closest = distances.index(min(distances))
        pairs.append((example, unused.pop(closest)))
    return pairs


def _pairs_of_file(
    files: RequestFiles, harmful: Splits, benign: Splits
) -> dict[str, Sequence[Pair]]:
    """The pairs of a file, in the split of a request that they share with the other files.

    Other pairs are drawn by their harmful request. Pairs with a request in common stay together,
    and a pair whose requests are in two splits is left out.
    """
    split_of = {}
    for splits in (benign, harmful):
        for split, requests in splits.sets.items():
            split_of |= dict.fromkeys(plain_texts([requests]), split)

    origin = files.sources["pairs"]
    pairs = request_pairs(files.requests["pairs"], origin)
    pairs, placement = _pairs_in_one_split(pairs, split_of)
    by_prompt = {unsafe.prompt: (unsafe, safe) for unsafe, safe in pairs}
    requests = PromptSet(tuple(unsafe for unsafe, _ in by_prompt.values()))
    splits = Splits.of(requests, limits=files.limits, origin=origin, placement=placement)
    by_split = {}
    for split, requests in splits.sets.items():
        by_split[split] = [by_prompt[example.prompt] for example in requests]
    return by_split


def _pairs_in_one_split(
    pairs: Sequence[Pair], split_of: Mapping[str, str]
) -> tuple[list[Pair], dict[str, str]]:
    """The pairs by cluster, without those in two splits, and the split of each cluster."""
    keys = [(bad.cluster, plain_text(bad.prompt), plain_text(good.prompt)) for bad, good in pairs]
    clusters = joined_clusters(keys)
    placement: dict[str, str] = {}
    for cluster, (_, *texts) in zip(clusters, keys, strict=True):
        for text in filter(split_of.get, texts):
            placement.setdefault(cluster, split_of[text])

    members = []
    for (unsafe, safe), cluster, (_, *texts) in zip(pairs, clusters, keys, strict=True):
        splits = {split_of[text] for text in filter(split_of.get, texts)}
        if splits <= {placement.get(cluster)}:
            group = unsafe.group if unsafe.cluster == cluster else cluster
            members.append((replace(unsafe, group=group), safe))
    return members, placement
