"""A model's answers to requests: greedy or sampled, also under a mask, with a cache on disk."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, product
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
    prompt: str
    prefill: str
    context: tuple[int, ...]  # the token ids of both: a template may print the date
    number: int = field(default=0, compare=False)  # for errors


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

    Each answer begins with `prefill`: one for all requests, or one for each. A cache gives the
    answers that it has.
    """
    prefills = _for_each(prompts, prefill)
    settings = {"max_new_tokens": max_new_tokens, "template": template}
    # All requests are checked before the first answer.
    contexts = request_ids(bridge, prompts, prefill=prefills, **settings)
    requests = []
    for number, (example, opening) in enumerate(zip(prompts, prefills, strict=True)):
        requests.append(_Request(example.prompt, opening, tuple(contexts[number]), number))

    path = cache.file(bridge, {**settings, "sampling": sampling}) if cache else None
    answers = _read_answers(path) if path else {}
    missing = [request for request in dict.fromkeys(requests) if request not in answers]
    if path:
        # Sorted by length, so that batches have little padding.
        missing.sort(key=lambda request: (len(request.prompt), request))
    bar = tqdm(
        total=len(missing),
        desc="own answers",
        disable=not (cache and cache.progress),
        leave=False,
    )
    with bar:
        for start in range(0, len(missing), batch_size):
            batch = missing[start : start + batch_size]
            new = _answers(bridge, batch, sampling, max_new_tokens, batch_size)
            if path:
                _write_answers(path, new)  # an interruption loses one batch at most
            answers |= new
            bar.update(len(batch))
    return list(chain.from_iterable(answers[request] for request in requests))


def _for_each(prompts: PromptSet, prefill: str | Sequence[str]) -> Sequence[str]:
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
    """The token ids of each request with its prefill, which the model continues."""
    tokenizer = bridge.tokenizer
    if end_of_text(bridge) is None:
        raise ValueError(
            "neither the tokenizer (eos_token) nor the model (generation_config.eos_token_id) has "
            "an end-of-text token, so no answer would end; name one of the tokenizer's tokens by "
            "tokenizer.eos_token = ..."
        )
    contexts = []
    for example, opening in zip(prompts, _for_each(prompts, prefill), strict=True):
        request = prompt_ids(example.prompt, tokenizer, template)
        contexts.append(request + opening_ids(opening, tokenizer))
    refuse_requests(place, bridge, contexts, max_new_tokens)
    return contexts


def _answers(
    bridge: Bridge,
    requests: Sequence[_Request],
    sampling: Sampling | None,
    max_new_tokens: int,
    batch_size: int,
) -> dict[_Request, list[Answer]]:
    """The answer to each of these requests, or its samples."""
    draws = sampling or Sampling()
    rows = []
    for request, number in product(requests, range(draws.samples)):
        rows.append((request, f"{draws.seed} {number} {request.prompt}"))

    answers: dict[_Request, list[Answer]] = {request: [] for request in requests}
    for start in range(0, len(rows), batch_size):
        batch, noises = zip(*rows[start : start + batch_size], strict=True)
        contexts = [list(request.context) for request in batch]
        steps = sampling_processors(sampling, noises) if sampling else []
        names = [f"generate: request {request.number}" for request in batch]
        continued = continuations(bridge, contexts, names, steps, max_new_tokens)
        for request, tokens in zip(batch, continued, strict=True):
            answers[request].append(_answer(bridge.tokenizer, request.prefill, tokens))
    return answers


def _answer(tokenizer: Any, prefill: str, tokens: Sequence[int]) -> Answer:
    # Decoded with the prefill, because the space between them may belong to a token.
    ids = (*opening_ids(prefill, tokenizer), *tokens)
    return Answer(tokenizer.decode(ids, skip_special_tokens=True).strip(), ids)


# Answers on disk


class GenerationCache:
    """A folder with the answers of a model with these weights: each is generated only once."""

    def __init__(self, folder: str | Path, bridge: Bridge, progress: bool = False) -> None:
        self.folder = Path(folder)
        self.weights = weights_digest(bridge)
        self.progress = progress

    def __repr__(self) -> str:
        return f"GenerationCache({str(self.folder)!r}, weights {self.weights})"

    def file(self, bridge: Bridge, settings: Mapping[str, Any]) -> Path | None:
        """The file of answers with these settings; None for a masked, hooked or trained model."""
        if has_hooks(bridge) or is_edited(bridge) or weights_digest(bridge) != self.weights:
            return None
        parts = [self.weights, settings, end_of_text(bridge)]
        text = json.dumps(parts, sort_keys=True, default=asdict)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        return self.folder / f"{self.weights}-{digest}.jsonl"


def _read_answers(path: Path) -> dict[_Request, list[Answer]]:
    if not path.is_file():
        return {}
    answers = {}
    for row in read_lines(path, "the answers of a model; remove it, and they are made again"):
        context = tuple(row.get("context", ()))  # absent in files of earlier versions
        request = _Request(row["prompt"], row["prefill"], context)
        answers[request] = [Answer(text, tuple(tokens)) for text, tokens in row["answers"]]
    return answers


def _write_answers(path: Path, answers: Mapping[_Request, list[Answer]]) -> None:
    rows = []
    for request, samples in answers.items():
        row = {
            "prompt": request.prompt,
            "prefill": request.prefill,
            "context": request.context,
            "answers": samples,
        }
        rows.append(row)
    append_lines(path, rows)
