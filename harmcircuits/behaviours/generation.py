"""What a model says when asked, and what a judge makes of it."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from harmcircuits.prompts import PromptSet, Template, padding_id, prompt_ids

Judge = Callable[[str, str], str]
"""(prompt, completion) -> verdict, a word such as "harmful", "refusal" or "degenerate"."""


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn: `samples` a request, at `temperature`, from the likeliest tokens that have a share `top_p`.

    `seed` fixes them. Raises ValueError for no samples, a temperature that is not positive, and a share outside (0, 1].
    """

    samples: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples={self.samples}; expected at least 1")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature}; expected more than 0 (at 0 all samples are the same)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}; expected one in (0, 1]")


def greedy_answers(
    bridge: TransformerBridge,
    prompts: PromptSet,
    *,
    prefill: str = "",
    max_new_tokens: int = 32,
    batch_size: int = 256,
    template: Template = "chat",
) -> list[str]:
    """The most likely continuation of each request, `prefill` included; it ends at the end-of-text token.

    A `prefill` puts the beginning of the answer into the model's mouth: the prefilling attack. Works under a mask. Raises
    ValueError for an empty prompt set or batch size.
    """
    options = {"prefill": prefill, "max_new_tokens": max_new_tokens, "batch_size": batch_size, "template": template}
    return _answers(bridge, [example.prompt for example in prompts], None, **options)


def sampled_answers(
    bridge: TransformerBridge,
    prompts: PromptSet,
    *,
    sampling: Sampling,
    prefill: str = "",
    max_new_tokens: int = 32,
    batch_size: int = 256,
    template: Template = "chat",
) -> list[str]:
    """The samples of the first request, then those of the second, and so on; else as `greedy_answers`.

    A token is the argmax of log p / temperature + Gumbel noise, which is a draw from p^(1 / temperature). The noise of a
    sample depends on the seed, the request and the sample's number only: not on what else is asked, and under a mask the
    same noise falls on other probabilities. Raises ValueError as `greedy_answers`.
    """
    options = {"prefill": prefill, "max_new_tokens": max_new_tokens, "batch_size": batch_size, "template": template}
    return _answers(bridge, [example.prompt for example in prompts for _ in range(sampling.samples)], sampling, **options)


def _answers(
    bridge: TransformerBridge,
    asked: Sequence[str],
    sampling: Sampling | None,
    *,
    prefill: str,
    max_new_tokens: int,
    batch_size: int,
    template: Template,
) -> list[str]:
    """One answer to each of `asked`, of which one request's samples follow each other."""
    name = "sampled_answers" if sampling else "greedy_answers"
    if not asked:
        raise ValueError(f"{name}: the prompt set is empty; expected at least one example")
    if batch_size < 1:
        raise ValueError(f"{name}: batch_size={batch_size}; expected at least 1")
    tokenizer = bridge.tokenizer
    opening = tokenizer.encode(prefill, add_special_tokens=False) if prefill else []
    contexts = [prompt_ids(prompt, tokenizer, template) + opening for prompt in asked]
    answers = []
    for start in range(0, len(contexts), batch_size):
        rows = contexts[start : start + batch_size]
        width = max(map(len, rows))
        # Left-padded, so that every answer starts at the same position.
        tokens = torch.tensor([[padding_id(tokenizer)] * (width - len(row)) + row for row in rows])
        attended = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        numbers = range(start, start + len(rows))
        drawn = (
            {"logits_processor": _drawing(sampling, [(asked[i], i % sampling.samples) for i in numbers])}
            if sampling
            else {}
        )
        with torch.no_grad():
            full = cast(Any, bridge.original_model).generate(
                input_ids=tokens.to(bridge.cfg.device),
                attention_mask=attended.to(bridge.cfg.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                repetition_penalty=1.0,  # a model's own settings may ask for another
                pad_token_id=padding_id(tokenizer),
                **drawn,
            )
        # Decoded with the prefill, because the space between them may belong to a token.
        answers += tokenizer.batch_decode(full[:, width - len(opening) :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


def _drawing(sampling: Sampling, rows: Sequence[tuple[str, int]]) -> LogitsProcessorList:
    """What makes the most likely token of each row, a (request, number of the sample), a draw."""
    steps: list[LogitsProcessor] = [TemperatureLogitsWarper(float(sampling.temperature))]
    if sampling.top_p < 1:
        steps.append(TopPLogitsWarper(float(sampling.top_p)))
    return LogitsProcessorList([*steps, _Gumbel([f"{sampling.seed} {number} {prompt}" for prompt, number in rows])])


class _Gumbel(LogitsProcessor):
    """Adds to the logits of every row noise of its own stream, drawn on the CPU, so that every device draws the same."""

    def __init__(self, names: Sequence[str]) -> None:
        digests = [hashlib.sha256(name.encode()).digest()[:8] for name in names]
        self.streams = [torch.Generator().manual_seed(int.from_bytes(digest) >> 1) for digest in digests]

    def __call__(self, input_ids: Int[Tensor, "row pos"], scores: Float[Tensor, "row vocab"]) -> Float[Tensor, "row vocab"]:
        noise = [-torch.empty(scores.shape[1]).exponential_(generator=stream).log() for stream in self.streams]
        return scores.float() + torch.stack(noise).to(scores.device)
