"""A model's own answers, kept on disk: each is generated only once."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress

from harmcircuits.behaviours.generation import Asked, Sampling, generate_together, request_ids
from harmcircuits.hooks.bridge import Bridge
from harmcircuits.hooks.masking import is_edited
from harmcircuits.hooks.weights import weights_digest
from harmcircuits.prompts import Answer, Chat, Example, PromptSet, Template
from harmcircuits.storage import append_lines, read_lines

EXPECTED = "the answers of a model; remove it, and they are made again"


class GenerationCache:
    """`generate_answers` for one model as it is now, with its answers kept on disk."""

    def __init__(
        self,
        folder: str | Path,
        bridge: Bridge,
        progress: Progress | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.weights = weights_digest(bridge)
        self.progress = progress

    def __repr__(self) -> str:
        return f"GenerationCache({str(self.folder)!r}, weights {self.weights})"

    def __call__(
        self, bridge: Bridge, prompts: PromptSet, *, prefill: str = "", **options: Any
    ) -> list[Answer]:
        """As `generate_answers`: `together` of one set."""
        (answers,) = self.together(bridge, [Asked(prompts, prefill)], **options)
        return answers

    def together(
        self,
        bridge: Bridge,
        asked: Sequence[Asked],
        *,
        sampling: Sampling | None = None,
        max_new_tokens: int = 32,
        batch_size: int = 256,
        template: Template = "chat",
    ) -> list[list[Answer]]:
        """As `generate_together`."""
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "template": template}
        how = {**options, "sampling": sampling, "batch_size": batch_size}

        # The answers on disk are those of the model as it was opened, not of an edited one.
        is_hooked = any(point.fwd_hooks for point in bridge.hook_dict.values())
        if is_hooked or is_edited(bridge) or weights_digest(bridge) != self.weights:
            return generate_together(bridge, asked, **how)

        paths = [self._path(bridge, one_set.prefill, sampling, **options) for one_set in asked]
        stored = {path: _stored(path) for path in paths}
        missing: list[_Missing] = []
        for path, one_set in zip(paths, asked, strict=True):
            of_set = _missing(one_set, path, stored[path])
            if of_set:
                # Refused before the first is answered: the longest come last.
                request_ids(bridge, one_set.prompts, prefill=one_set.prefill, **options)
            missing += of_set

        by_length = _once_by_length(missing)
        advance = self._bar(len(by_length))
        for start in range(0, len(by_length), batch_size):
            some = by_length[start : start + batch_size]
            for path, made in _answered(bridge, some, how).items():
                _append(path, made)  # batch by batch, so an interruption loses only one
                stored[path] |= made
            advance(len(some))

        # Back into the order of the prompts, in which a request may occur more than once.
        ordered = []
        for path, one_set in zip(paths, asked, strict=True):
            ordered.append(_in_order(one_set.prompts, stored[path]))
        return ordered

    def _path(
        self,
        bridge: Bridge,
        prefill: str,
        sampling: Sampling | None,
        *,
        max_new_tokens: int,
        template: Template,
    ) -> Path:
        """The file of the answers that begin like this."""
        settings: dict[str, Any] = {
            "prefill": prefill,
            "max_new_tokens": max_new_tokens,
            "template": asdict(template) if isinstance(template, Chat) else template,
        }
        if sampling:
            settings["sampling"] = asdict(sampling)  # greedy answers are named without it
        chat_template = bridge.tokenizer.chat_template if template != "raw" else ""
        named = json.dumps([self.weights, settings, chat_template], sort_keys=True)
        digest = hashlib.sha256(named.encode()).hexdigest()[:16]
        return self.folder / f"{self.weights}-{digest}.jsonl"

    def _bar(self, total: int) -> Any:
        """A function that moves the progress bar on by a number of answers."""
        progress = self.progress
        if progress is None or not total:
            return lambda _: None
        task = progress.add_task("own answers", total=total)
        return lambda count: progress.advance(task, count)


@dataclass(frozen=True)
class _Missing:
    """A request without a stored answer."""

    prompt: str
    prefill: str
    path: Path
    name: str
    number: int

    def order(self) -> tuple[int, str, str]:
        return len(self.prompt), self.prompt, self.prefill


def _missing(asked: Asked, path: Path, stored: dict[str, Any]) -> list[_Missing]:
    missing = []
    for number, example in enumerate(asked.prompts):
        if example.prompt not in stored:
            missing.append(_Missing(example.prompt, asked.prefill, path, asked.name, number))
    return missing


def _once_by_length(missing: Sequence[_Missing]) -> list[_Missing]:
    """Each request of a file once, those of similar length together, so that little is padded."""
    once = {(request.path, request.prompt): request for request in reversed(missing)}
    return sorted(once.values(), key=_Missing.order)


def _in_order(prompts: PromptSet, stored: Mapping[str, Any]) -> list[Answer]:
    """The answer of each request, or all of its samples."""
    answers: list[Answer] = []
    for example in prompts:
        answer = stored[example.prompt]
        answers += answer if isinstance(answer, list) else [answer]
    return answers


def _answered(
    bridge: Bridge, requests: Sequence[_Missing], how: dict[str, Any]
) -> dict[Path, dict[str, Any]]:
    """By file and request an answer, or the list of its samples."""
    asked = []
    for request in requests:
        prompts = PromptSet((Example(request.prompt),))
        asked.append(Asked(prompts, request.prefill, request.name, (request.number,)))
    generated = generate_together(bridge, asked, **how)

    answers: dict[Path, dict[str, Any]] = {request.path: {} for request in requests}
    for request, samples in zip(requests, generated, strict=True):
        answers[request.path][request.prompt] = samples if how["sampling"] else samples[0]
    return answers


def _stored(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    stored = {}
    for row in read_lines(path, EXPECTED):
        if row.keys() == {"prompt", "completion"}:  # of a version that kept no tokens
            continue
        answer = _answers_of(row) if row.keys() == {"prompt", "completion", "tokens"} else None
        if answer is None or not isinstance(row["prompt"], str):
            raise ValueError(
                f"{path}: a line holds no answer in text and tokens; remove the file, and they "
                "are made again"
            )
        stored[row["prompt"]] = answer
    return stored


def _answers_of(row: dict[str, Any]) -> Any:
    """The answer of a stored row, or the list of its samples; None where there is none."""
    completion, tokens = row["completion"], row["tokens"]
    if isinstance(completion, str):
        return _answer(completion, tokens)
    is_list = isinstance(completion, list) and isinstance(tokens, list)
    if not is_list or len(completion) != len(tokens):
        return None
    samples = [_answer(text, ids) for text, ids in zip(completion, tokens, strict=True)]
    return None if None in samples else samples


def _answer(text: Any, tokens: Any) -> Answer | None:
    is_tokens = isinstance(tokens, list) and all(type(token) is int for token in tokens)
    return Answer(text, tuple(tokens)) if isinstance(text, str) and is_tokens else None


def _append(path: Path, answers: dict[str, Any]) -> None:
    rows = []
    for prompt, answer in answers.items():
        if isinstance(answer, Answer):
            row = {"prompt": prompt, "completion": answer.text, "tokens": answer.tokens}
        else:
            texts = [sample.text for sample in answer]
            tokens = [sample.tokens for sample in answer]
            row = {"prompt": prompt, "completion": texts, "tokens": tokens}
        rows.append(row)
    append_lines(path, rows)
