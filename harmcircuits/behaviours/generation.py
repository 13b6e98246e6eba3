"""A model's answers to requests: greedy or sampled, also under a mask, and kept on disk."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from harmcircuits.batches import Template, opening_ids, prompt_ids
from harmcircuits.hooks.bridge import Bridge
from harmcircuits.hooks.checks import refuse_requests
from harmcircuits.hooks.generation import (
    Sampling,
    continuations,
    end_of_text,
    has_hooks,
    sampling_processors,
)
from harmcircuits.hooks.masking import is_edited
from harmcircuits.hooks.weights import weights_digest
from harmcircuits.prompts import Answer, PromptSet
from harmcircuits.storage import append_lines, read_lines


@dataclass(frozen=True, order=True)
class _Request:
    """What is asked, how the answer begins, and the place among the requests, for errors."""

    prompt: str
    prefill: str
    context: tuple[int, ...]  # its token ids: a template may print the date
    number: int = field(default=0, compare=False)


def generate(
    bridge: Bridge,
    prompts: PromptSet,
    *,
    prefill: str | Sequence[str] = "",
    sampling: Sampling | None = None,
    max_new_tokens: int = 32,
    batch_size: int = 256,
    template: Template = "chat",
    cache: "GenerationCache | None" = None,
) -> list[Answer]:
    """The model's answer to each request, or all its samples, up to the end-of-text token.

    Each answer begins with `prefill`: one for all requests, or one for each. With a cache, what was
    answered before is read from there.
    """
    prefills = _each(prefill, prompts)
    settings = {"max_new_tokens": max_new_tokens, "template": template}
    # Refused before the first is answered.
    ids = request_ids(bridge, prompts, prefill=prefills, **settings)
    requests = []
    for number, context in enumerate(ids):
        prompt = prompts.examples[number].prompt
        requests.append(_Request(prompt, prefills[number], tuple(context), number))

    path = cache.file(bridge, {**settings, "sampling": sampling}) if cache else None
    answers = _stored(path) if path else {}
    missing = [request for request in dict.fromkeys(requests) if request not in answers]
    if path:
        missing.sort(key=lambda request: (len(request.prompt), request))  # so little is padded
    bar = tqdm(
        total=len(missing),
        desc="own answers",
        disable=not (cache and cache.progress),
        leave=False,
    )
    with bar:
        for start in range(0, len(missing), batch_size):
            asked = missing[start : start + batch_size]
            made = _answers(bridge, asked, sampling, max_new_tokens, batch_size)
            if path:
                _store(path, made)  # batch by batch, so that an interruption loses only one
            answers |= made
            bar.update(len(asked))

    ordered = []
    for request in requests:
        ordered += answers[request]
    return ordered


def _each(prefill: str | Sequence[str], prompts: PromptSet) -> Sequence[str]:
    return [prefill] * len(prompts) if isinstance(prefill, str) else prefill


def request_ids(
    bridge: Bridge,
    prompts: PromptSet,
    *,
    prefill: str | Sequence[str] = "",
    max_new_tokens: int = 32,
    template: Template = "chat",
    place: str = "generate: request",
) -> list[list[int]]:
    """The token ids of each request and the prefill: what the model goes on from."""
    tokenizer = bridge.tokenizer
    if end_of_text(bridge) is None:
        raise ValueError(
            "neither the tokenizer (eos_token) nor the model (generation_config.eos_token_id) has "
            "an end-of-text token, so no answer would end; name one of the tokenizer's tokens by "
            "tokenizer.eos_token = ..."
        )
    contexts = []
    for example, opening in zip(prompts, _each(prefill, prompts), strict=True):
        request = prompt_ids(example.prompt, tokenizer, template)
        contexts.append(request + opening_ids(opening, tokenizer))
    refuse_requests(place, bridge, contexts, max_new_tokens)
    return contexts


def _answers(
    bridge: Bridge,
    asked: Sequence[_Request],
    sampling: Sampling | None,
    max_new_tokens: int,
    batch_size: int,
) -> dict[_Request, list[Answer]]:
    """The answer to each of these requests, or its samples."""
    drawn = sampling or Sampling()
    rows = []
    for request in asked:
        rows += [(request, f"{drawn.seed} {n} {request.prompt}") for n in range(drawn.samples)]

    answers: dict[_Request, list[Answer]] = {request: [] for request in asked}
    for start in range(0, len(rows), batch_size):
        requests, noises = zip(*rows[start : start + batch_size], strict=True)
        contexts = [list(request.context) for request in requests]
        steps = sampling_processors(sampling, noises) if sampling else []
        names = [f"generate: request {request.number}" for request in requests]
        continued = continuations(bridge, contexts, names, steps, max_new_tokens)
        for request, tokens in zip(requests, continued, strict=True):
            # Decoded with the prefill, because the space between them may belong to a token.
            answer = (*opening_ids(request.prefill, bridge.tokenizer), *tokens)
            text = bridge.tokenizer.decode(answer, skip_special_tokens=True)
            answers[request].append(Answer(text.strip(), answer))
    return answers


# Answers on disk


class GenerationCache:
    """A folder that keeps the answers of a model as it is now: each is generated only once."""

    def __init__(self, folder: str | Path, bridge: Bridge, progress: bool = False) -> None:
        self.folder = Path(folder)
        self.weights = weights_digest(bridge)
        self.progress = progress

    def __repr__(self) -> str:
        return f"GenerationCache({str(self.folder)!r}, weights {self.weights})"

    def file(self, bridge: Bridge, settings: Mapping[str, Any]) -> Path | None:
        """Where its answers with these settings are; None while it is masked, hooked or trained."""
        if has_hooks(bridge) or is_edited(bridge) or weights_digest(bridge) != self.weights:
            return None
        parts = [self.weights, settings, end_of_text(bridge)]
        text = json.dumps(parts, sort_keys=True, default=asdict)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        return self.folder / f"{self.weights}-{digest}.jsonl"


def _stored(path: Path) -> dict[_Request, list[Answer]]:
    if not path.is_file():
        return {}
    stored = {}
    for row in read_lines(path, "the answers of a model; remove it, and they are made again"):
        answers = [Answer(text, tuple(tokens)) for text, tokens in row["answers"]]
        context = tuple(row.get("context", ()))  # earlier versions wrote none
        stored[_Request(row["prompt"], row["prefill"], context)] = answers
    return stored


def _store(path: Path, answers: Mapping[_Request, list[Answer]]) -> None:
    rows = []
    for request, made in answers.items():
        row = {"prompt": request.prompt, "prefill": request.prefill, "context": request.context}
        rows.append({**row, "answers": made})
    append_lines(path, rows)
