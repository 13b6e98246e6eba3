"""A model's answers to requests: greedy or sampled, also under a mask, and kept on disk."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from harmcircuits.hooks.bridge import Bridge, unhooked
from harmcircuits.hooks.checks import refuse_not_finite_texts, refuse_requests
from harmcircuits.hooks.masking import is_edited
from harmcircuits.hooks.weights import weights_digest
from harmcircuits.prompts import (
    Answer,
    PromptSet,
    Template,
    opening_ids,
    padding_id,
    prompt_ids,
)
from harmcircuits.storage import append_lines, read_lines


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    >>> hc.Sampling(samples=3, temperature=0.7)
    Sampling(samples=3, temperature=0.7, top_p=1.0, seed=0)

    Attributes:
        samples: answers to each request.
        temperature: of the softmax, above 0.
        top_p: tokens are drawn from the likeliest ones that together have this share.
        seed: fixes the answers.

    Raises:
        ValueError: no samples, a temperature that is not positive, or a share outside (0, 1].
    """

    samples: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1 or not self.temperature > 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"{self}; expected samples of at least 1, a temperature above 0 "
                "(at 0 all samples are the same) and a top_p in (0, 1]"
            )


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
    if _end_of_text(bridge) is None:
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


def _end_of_text(bridge: Bridge) -> int | list[int] | None:
    """The token that ends an answer, or several: the model's own, else the tokenizer's."""
    own = getattr(bridge.original_model, "generation_config", None)
    of_model = getattr(own, "eos_token_id", None)
    return bridge.tokenizer.eos_token_id if of_model is None else of_model


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
        steps = _drawing(sampling, noises) if sampling else []
        names = [f"generate: request {request.number}" for request in requests]
        continued = _continued(bridge, contexts, names, steps, max_new_tokens)
        for request, tokens in zip(requests, continued, strict=True):
            # Decoded with the prefill, because the space between them may belong to a token.
            answer = (*opening_ids(request.prefill, bridge.tokenizer), *tokens)
            text = bridge.tokenizer.decode(answer, skip_special_tokens=True)
            answers[request].append(Answer(text.strip(), answer))
    return answers


def _continued(
    bridge: Bridge,
    contexts: Sequence[list[int]],
    names: Sequence[str],
    steps: Sequence[Any],
    max_new_tokens: int,
) -> list[list[int]]:
    """What the model goes on with, in token ids, up to the first that ends a text."""
    from transformers import GenerationConfig, LogitsProcessorList

    end, padding = _end_of_text(bridge), padding_id(bridge.tokenizer)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=padding,
        eos_token_id=end,
    )
    # Padded on the left, so that answers start alike.
    texts = [torch.tensor(context) for context in contexts]
    tokens = pad_sequence(texts, batch_first=True, padding_value=padding, padding_side="left")
    width = tokens.shape[1]
    n_padding = torch.tensor([width - len(context) for context in contexts])
    is_token = torch.arange(width) >= n_padding[:, None]  # [batch, pos]
    logits = _Finite()
    model: Any = bridge.original_model
    without_hooks = nullcontext() if _is_hooked(bridge) else unhooked(bridge)
    with torch.no_grad(), without_hooks, _own_settings_off(model):
        generated = model.generate(
            input_ids=tokens.to(bridge.cfg.device),
            attention_mask=is_token.long().to(bridge.cfg.device),
            generation_config=config,
            logits_processor=LogitsProcessorList([logits, *steps]),
        ).tolist()

    # A likeliest token of logits that are NaN is no answer, and looks like one.
    refuse_not_finite_texts(names, logits.is_finite.cpu())

    ends = {end} if isinstance(end, int) else set(end or ())
    new_tokens = [row[width:] for row in generated]
    return [list(takewhile(lambda token: token not in ends, row)) for row in new_tokens]


@contextmanager
def _own_settings_off(model: Any) -> Iterator[None]:
    """While open, a model has no generation settings of its own: they bend the likeliest answer."""
    from transformers import GenerationConfig

    # transformers takes from them whatever a call does not set.
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


class _Finite:
    """Notes of each row whether all its logits so far are finite, and leaves them as they are."""

    is_finite = torch.tensor(True)

    def __call__(
        self, _input_ids: Int[Tensor, "row pos"], scores: Float[Tensor, "row vocab"]
    ) -> Float[Tensor, "row vocab"]:
        self.is_finite = self.is_finite.to(scores.device) & scores.amax(dim=1).isfinite()
        return scores


def _drawing(sampling: Sampling, noises: Sequence[str]) -> list[Any]:
    """What turns the likeliest token into a draw."""
    from transformers import TemperatureLogitsWarper, TopPLogitsWarper

    # In this order: the noise falls on what temperature and top_p leave.
    steps: list[Any] = [TemperatureLogitsWarper(float(sampling.temperature))]
    if sampling.top_p < 1:
        steps.append(TopPLogitsWarper(float(sampling.top_p)))
    return [*steps, _Gumbel(noises)]


class _Gumbel:
    """Adds Gumbel noise to each row's logits, from a generator seeded per row."""

    # transformers draws all rows from one generator: an answer would depend on what else is asked.

    def __init__(self, names: Sequence[str]) -> None:
        self.streams = []
        for name in names:
            digest = hashlib.sha256(name.encode()).digest()[:8]
            seed = int.from_bytes(digest) >> 1  # 63 bits: torch takes signed seeds
            self.streams.append(torch.Generator().manual_seed(seed))

    def __call__(
        self, _input_ids: Int[Tensor, "row pos"], scores: Float[Tensor, "row vocab"]
    ) -> Float[Tensor, "row vocab"]:
        noise = []
        for stream in self.streams:
            exponential = torch.empty(scores.shape[1]).exponential_(generator=stream)
            noise.append(-exponential.log())  # minus the logarithm of an exponential is a Gumbel
        return scores.float() + torch.stack(noise).to(scores.device)


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
        if _is_hooked(bridge) or is_edited(bridge) or weights_digest(bridge) != self.weights:
            return None
        parts = [self.weights, settings, _end_of_text(bridge)]
        text = json.dumps(parts, sort_keys=True, default=asdict)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        return self.folder / f"{self.weights}-{digest}.jsonl"


def _is_hooked(bridge: Bridge) -> bool:
    """Whether someone looks at activations, or changes them: at hook points or at modules."""
    if any(point.fwd_hooks for point in bridge.hook_dict.values()):
        return True
    for module in bridge.original_model.modules():
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            # The libraries' own capture what passes, and change nothing.
            owner = getattr(hook, "__module__", "").split(".")[0]
            if owner not in ("transformers", "transformer_lens"):
                return True
    return False


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
