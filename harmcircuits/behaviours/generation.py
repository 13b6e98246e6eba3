"""A model's answers to requests: greedy or sampled, also under a mask."""

import hashlib
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from harmcircuits.hooks.bridge import Bridge
from harmcircuits.hooks.capacity import refuse_requests
from harmcircuits.hooks.finite import about_requests, refuse_not_finite_answers
from harmcircuits.prompts import (
    Answer,
    PromptSet,
    Template,
    opening_ids,
    padding_id,
    prompt_ids,
)


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
        if self.samples < 1:
            raise ValueError(f"samples={self.samples}; expected at least 1")
        if not self.temperature > 0:
            raise ValueError(
                f"temperature={self.temperature}; expected more than 0 "
                "(at 0 all samples are the same)"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}; expected one in (0, 1]")


def generate(
    bridge: Bridge,
    prompts: PromptSet,
    *,
    sampling: Sampling | None = None,
    prefill: str = "",
    max_new_tokens: int = 32,
    batch_size: int = 256,
    template: Template = "chat",
) -> list[str]:
    """The model's answer to each request, `prefill` included, up to the end-of-text token."""
    answers = generate_answers(
        bridge,
        prompts,
        sampling=sampling,
        prefill=prefill,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        template=template,
    )
    return [answer.text for answer in answers]


@dataclass(frozen=True)
class Asked:
    """Requests whose answers begin alike."""

    prompts: PromptSet
    prefill: str = ""
    name: str = ""
    numbers: Sequence[int] = ()


def generate_answers(
    bridge: Bridge,
    prompts: PromptSet,
    *,
    sampling: Sampling | None = None,
    prefill: str = "",
    max_new_tokens: int = 32,
    batch_size: int = 256,
    template: Template = "chat",
) -> list[Answer]:
    """As `generate`, each answer with the tokens that were generated, those of `prefill` first."""
    (answers,) = generate_together(
        bridge,
        [Asked(prompts, prefill)],
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        template=template,
    )
    return answers


def generate_together(
    bridge: Bridge,
    asked: Sequence[Asked],
    *,
    sampling: Sampling | None = None,
    max_new_tokens: int = 32,
    batch_size: int = 256,
    template: Template = "chat",
) -> list[list[Answer]]:
    """`generate_answers` of several sets of requests, which share batches."""
    if batch_size < 1:
        raise ValueError(f"generate: batch_size={batch_size}; expected at least 1")
    rows = []
    for of, one_set in enumerate(asked):
        rows += _rows(bridge, one_set, of, sampling, max_new_tokens, template)

    answers: list[list[Answer]] = [[] for _ in asked]
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        generated = _answers_of_batch(bridge, batch, asked, sampling, max_new_tokens)
        for row, answer in zip(batch, generated, strict=True):
            answers[row.of].append(answer)
    return answers


@dataclass(frozen=True)
class _Row:
    """An answer to be."""

    of: int
    request: int
    context: list[int]
    n_opening: int
    noise: str


def _rows(
    bridge: Bridge,
    asked: Asked,
    of: int,
    sampling: Sampling | None,
    max_new_tokens: int,
    template: Template,
) -> list[_Row]:
    """The answers to be of a set; the samples of a request follow each other."""
    prompts, prefill = asked.prompts, asked.prefill
    if not len(prompts):
        raise ValueError("generate: the prompt set is empty; expected at least one example")
    contexts = request_ids(
        bridge, prompts, prefill=prefill, max_new_tokens=max_new_tokens, template=template
    )
    n_opening = len(opening_ids(prefill, bridge.tokenizer))
    sampling = sampling or Sampling()
    rows = []
    numbers = asked.numbers or range(len(prompts))
    for request, example, context in zip(numbers, prompts, contexts, strict=True):
        for sample in range(sampling.samples):
            noise = f"{sampling.seed} {sample} {example.prompt}"
            rows.append(_Row(of, request, context, n_opening, noise))
    return rows


def _answers_of_batch(
    bridge: Bridge,
    batch: Sequence[_Row],
    asked: Sequence[Asked],
    sampling: Sampling | None,
    max_new_tokens: int,
) -> list[Answer]:
    model, tokenizer = cast(Any, bridge.original_model), bridge.tokenizer
    config = _config(bridge, max_new_tokens)
    ends = _ends(config)
    tokens, attended = _left_padded([row.context for row in batch], padding_id(tokenizer))
    logits = _Finite()
    with torch.no_grad():
        full = model.generate(
            input_ids=tokens.to(bridge.cfg.device),
            attention_mask=attended.to(bridge.cfg.device),
            generation_config=config,
            logits_processor=_processors(logits, sampling, [row.noise for row in batch]),
        ).tolist()

    # A likeliest token of logits that are NaN is no answer, and looks like one.
    n_padding = (tokens.shape[1] - attended.sum(dim=1)).tolist()
    with about_requests([(asked[row.of].name, row.request) for row in batch]):
        refuse_not_finite_answers(
            "generate: request",
            bridge,
            [generated[skip:] for generated, skip in zip(full, n_padding, strict=True)],
            logits.is_finite,
        )

    # Decoded with the prefill, because the space between them may belong to a token.
    #
    #     generated    <pad> <pad> request | prefill  answer <eos> <pad>
    #                  '------ width - n_opening ----'
    width = tokens.shape[1]
    answers = []
    for row, generated in zip(batch, full, strict=True):
        answer_tokens = generated[width - row.n_opening :]
        answer_tokens = _before_end(answer_tokens, row.n_opening, ends)
        text = tokenizer.decode(answer_tokens, skip_special_tokens=True)
        answers.append(Answer(text.strip(), tuple(answer_tokens)))
    return answers


def request_ids(
    bridge: Bridge,
    prompts: PromptSet,
    *,
    prefill: str = "",
    max_new_tokens: int = 32,
    template: Template = "chat",
    place: str = "generate: request",
) -> list[list[int]]:
    """The token ids of each request and the prefill: what the model goes on from."""
    tokenizer = bridge.tokenizer
    if tokenizer is None:
        raise ValueError(f"{place}: the model has no tokenizer; open it with one (tokenizer=...)")
    _refuse_endless(bridge)
    opening = opening_ids(prefill, tokenizer)
    requests = []
    for example in prompts:
        request = prompt_ids(example.prompt, tokenizer, template)
        requests.append(request + opening)
    refuse_requests(place, bridge, requests, max_new_tokens)
    return requests


def _before_end(tokens: list[int], start: int, ends: Container[int]) -> list[int]:
    """The tokens before the first of those that end a text, which is looked for from `start` on."""
    for place in range(start, len(tokens)):
        if tokens[place] in ends:
            return tokens[:place]
    return tokens


def _config(bridge: Bridge, max_new_tokens: int) -> Any:
    """The likeliest continuation, whatever the model's own settings say."""
    from transformers import GenerationConfig

    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        repetition_penalty=1.0,
        pad_token_id=padding_id(bridge.tokenizer),
        eos_token_id=_end_of_text(bridge),
    )


def _end_of_text(bridge: Bridge) -> Any:
    """The token that ends an answer, or several: the model's own, else the tokenizer's."""
    own = getattr(bridge.original_model, "generation_config", None)
    of_model = getattr(own, "eos_token_id", None)
    return bridge.tokenizer.eos_token_id if of_model is None else of_model


def _refuse_endless(bridge: Bridge) -> None:
    """Raises ValueError where nothing ends an answer: each would run on to its largest length."""
    if _end_of_text(bridge) is None:
        raise ValueError(
            "neither the tokenizer (eos_token) nor the model (generation_config.eos_token_id) has "
            "an end-of-text token, so no answer would end; name one of the tokenizer's tokens by "
            "tokenizer.eos_token = ..."
        )


def _ends(config: Any) -> set[int]:
    """The tokens that end a text: none, one or several."""
    ends = config.eos_token_id
    if ends is None:
        return set()
    return {ends} if isinstance(ends, int) else set(ends)


def _left_padded(rows: Sequence[Sequence[int]], padding: int) -> tuple[Tensor, Tensor]:
    """Token ids, left-padded so that answers start alike, and 1 where there is no padding."""
    width = max(map(len, rows))
    tokens = []
    attended = []
    for row in rows:
        n_padding = width - len(row)
        tokens.append([padding] * n_padding + list(row))
        attended.append([0] * n_padding + [1] * len(row))
    return torch.tensor(tokens), torch.tensor(attended)


def _processors(
    logits: "_Finite",
    sampling: Sampling | None,
    noises: Sequence[str],
) -> list[Any]:
    """What looks at the logits of each token and, in sampling, turns the likeliest into a draw."""
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

    steps: list[Any] = [logits]
    if sampling is None:
        return LogitsProcessorList(steps)
    # In this order: the noise falls on what temperature and top_p leave.
    steps.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_p < 1:
        steps.append(TopPLogitsWarper(float(sampling.top_p)))
    steps.append(_Gumbel(noises))
    return LogitsProcessorList(steps)


class _Finite:
    """Notes of each row whether all its logits so far are finite, and leaves them as they are."""

    def __init__(self) -> None:
        self._is_finite: Tensor | None = None

    def __call__(
        self, _input_ids: Int[Tensor, "row pos"], scores: Float[Tensor, "row vocab"]
    ) -> Float[Tensor, "row vocab"]:
        is_finite = scores.amax(dim=1).isfinite()
        self._is_finite = is_finite if self._is_finite is None else self._is_finite & is_finite
        return scores

    @property
    def is_finite(self) -> Bool[Tensor, " row"]:
        """Whether all logits of each row were finite."""
        assert self._is_finite is not None
        return self._is_finite.cpu()


class _Gumbel:
    """Adds Gumbel noise to each row's logits, from a generator seeded per row."""

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
