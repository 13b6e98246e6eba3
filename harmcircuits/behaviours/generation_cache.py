"""A model's own answers, kept on disk: each is generated only once."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.progress import Progress

from harmcircuits.behaviours.generation import Sampling, generate_answers, request_ids
from harmcircuits.hooks.bridge import Bridge
from harmcircuits.hooks.finite import NotFiniteError
from harmcircuits.hooks.weights import weights_checksum, weights_digest
from harmcircuits.prompts import Answer, Chat, Example, PromptSet, Template
from harmcircuits.storage.lines import append_lines, read_lines

EXPECTED = "the answers of a model; remove it, and they are made again"


class GenerationCache:
    """`generate_answers` for one model as it is now, with its answers kept on disk.

    Files are named by the digest of all weights, the settings and the chat template, and hold one
    request with its answer (or the list of its samples) a line, as text and in token ids; an
    interrupted file is continued, a damaged one refused. Answers of which a file holds the text
    alone are made anew.
    Under a mask, while fine-tuning, or with hooks on the bridge answers are made anew, and nothing
    is read or written. Requests of similar length are answered together.

    Args:
        folder: where the files are.
        bridge: the model.
        progress: shows how many answers are made.
    """

    def __init__(
        self,
        folder: str | Path,
        bridge: Bridge,
        progress: Progress | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.weights = weights_digest(bridge)
        self._checksum = weights_checksum(bridge)
        self.progress = progress

    def __repr__(self) -> str:
        return f"GenerationCache({str(self.folder)!r}, weights {self.weights})"

    def __call__(
        self,
        bridge: Bridge,
        prompts: PromptSet,
        *,
        sampling: Sampling | None = None,
        prefill: str = "",
        max_new_tokens: int = 32,
        batch_size: int = 256,
        template: Template = "chat",
    ) -> list[Answer]:
        """As `generate_answers`."""
        # What an answer depends on, besides the weights: it names the file. The batch size does
        # not belong to it.
        settings: dict[str, Any] = {
            "prefill": prefill,
            "max_new_tokens": max_new_tokens,
            "template": asdict(template) if isinstance(template, Chat) else template,
        }
        options = {
            **settings,
            "template": template,
            "batch_size": batch_size,
            "sampling": sampling,
        }

        # The answers on disk are those of the model as it was opened, not of an edited one.
        is_hooked = any(point.fwd_hooks for point in bridge.hook_dict.values())
        if is_hooked or weights_checksum(bridge) != self._checksum:
            return generate_answers(bridge, prompts, **options)

        if sampling:
            settings["sampling"] = asdict(sampling)  # greedy answers are named without it
        chat_template = bridge.tokenizer.chat_template if template != "raw" else ""
        path = self._path(settings, chat_template)
        stored = _stored(path)

        missing = {example.prompt for example in prompts} - stored.keys()
        if missing:
            # Refused before the first is answered: the longest come last.
            request_ids(
                bridge,
                prompts,
                prefill=prefill,
                max_new_tokens=max_new_tokens,
                template=template,
            )

        # Each request once, in an order that does not depend on who asks; and those of similar
        # length together, so that little is padded.
        by_length = sorted(missing, key=lambda prompt: (len(prompt), prompt))
        advance = self._bar(len(by_length))
        for start in range(0, len(by_length), batch_size):
            some = by_length[start : start + batch_size]
            requests = PromptSet(tuple(map(Example, some)))
            with _numbered_as(prompts, requests):
                answers = generate_answers(bridge, requests, **options)
            per_request = _per_request(answers, sampling)
            _append(path, some, per_request)  # batch by batch, so an interruption loses only one
            stored |= dict(zip(some, per_request, strict=True))
            advance(len(some))

        # Back into the order of the prompts, in which a request may occur more than once.
        ordered = [stored[example.prompt] for example in prompts]
        if not sampling:
            return ordered
        flat: list[Answer] = []
        for samples in ordered:
            flat += samples
        return flat

    def _path(self, settings: dict[str, Any], chat_template: str) -> Path:
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


@contextmanager
def _numbered_as(prompts: PromptSet, requests: PromptSet) -> Iterator[None]:
    """While open, an error about one of the requests has its number among the prompts."""
    try:
        yield
    except NotFiniteError as error:
        if error.index is None:
            raise
        asked = [example.prompt for example in prompts]
        number = asked.index(requests.examples[error.index].prompt)
        text = str(error).replace(f"request {error.index}:", f"request {number}:", 1)
        raise NotFiniteError(text, number) from None


def _per_request(answers: list[Answer], sampling: Sampling | None) -> list[Any]:
    """An answer for each request, or the list of its samples."""
    if not sampling:
        return answers
    size = sampling.samples
    starts = range(0, len(answers), size)
    return [answers[start : start + size] for start in starts]


def _stored(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    stored = {}
    for line in read_lines(path, "answers", EXPECTED, is_resumed=True):
        row = line.row
        if row.keys() == {"prompt", "completion"}:  # of a version that kept no tokens
            continue
        answer = _answers_of(row) if row.keys() == {"prompt", "completion", "tokens"} else None
        if answer is None or not isinstance(row["prompt"], str):
            raise ValueError(
                f"{path}: not a file of answers (line {line.number} holds no answer in text and "
                "tokens); remove it, and they are made again"
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


def _append(path: Path, prompts: Sequence[str], answers: Sequence[Answer | list[Answer]]) -> None:
    rows = []
    for prompt, answer in zip(prompts, answers, strict=True):
        if isinstance(answer, Answer):
            row = {"prompt": prompt, "completion": answer.text, "tokens": answer.tokens}
        else:
            texts = [sample.text for sample in answer]
            tokens = [sample.tokens for sample in answer]
            row = {"prompt": prompt, "completion": texts, "tokens": tokens}
        rows.append(row)
    # Each by itself, so that an interruption costs no more than one answer.
    append_lines(path, rows, together=False)
