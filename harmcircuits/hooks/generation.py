"""A model continues token ids, greedily or by sampling, whatever else is in the batch."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils.rnn import pad_sequence

from harmcircuits.batches import padding_id
from harmcircuits.hooks.bridge import Bridge, evaluating, unhooked
from harmcircuits.hooks.checks import refuse_not_finite_texts

LIBRARIES = ("transformers.", "transformer_lens.")  # modules whose hooks only record activations

Tokens = Int[Tensor, "row pos"]
Logits = Float[Tensor, "row vocab"]


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled.

    >>> hc.Sampling(samples=3, temperature=0.7)
    Sampling(samples=3, temperature=0.7, top_p=1.0, seed=0)

    Attributes:
        samples: number of answers to each request.
        temperature: temperature of the softmax, above 0.
        top_p: only the likeliest tokens that together have this probability are sampled.
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


def end_of_text(bridge: Bridge) -> int | list[int] | None:
    """The token or tokens that end an answer: the model's own, else the tokenizer's."""
    config = bridge.original_model.generation_config  # None in a compiled organism
    end = config.eos_token_id if config else None
    return bridge.tokenizer.eos_token_id if end is None else end


def continuations(
    bridge: Bridge,
    contexts: Sequence[list[int]],
    names: Sequence[str],
    processors: Sequence[Any],
    max_new_tokens: int,
) -> list[list[int]]:
    """The token ids that the model adds to each context, up to the end of the text.

    Each step takes the likeliest token after the logits processors. `names` are those of the
    contexts in errors.
    """
    from transformers import GenerationConfig, LogitsProcessorList

    end, padding = end_of_text(bridge), padding_id(bridge.tokenizer)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=padding,
        eos_token_id=end,
    )

    # Padding is on the left, so that all answers begin at the same position.
    texts = [torch.tensor(context) for context in contexts]
    pad = partial(pad_sequence, batch_first=True, padding_side="left")
    tokens = pad(texts, padding_value=padding)
    is_token = pad([torch.ones_like(text) for text in texts])  # 1, and 0 at padding

    check = FiniteCheck()
    without_hooks = nullcontext() if has_hooks(bridge) else unhooked(bridge)
    quiet = default_generation(bridge.original_model)
    with torch.no_grad(), evaluating(bridge), without_hooks, quiet:
        rows = bridge.original_model.generate(
            input_ids=tokens.to(bridge.cfg.device),
            attention_mask=is_token.to(bridge.cfg.device),
            generation_config=config,
            logits_processor=LogitsProcessorList([check, *processors]),
        ).tolist()

    # NaN logits also have a likeliest token, which looks like an answer.
    refuse_not_finite_texts(names, check.is_finite.cpu())

    ends = {end} if isinstance(end, int) else set(end or ())
    answers = [row[tokens.shape[1] :] for row in rows]
    return [list(takewhile(lambda token: token not in ends, answer)) for answer in answers]


@contextmanager
def default_generation(model: Any) -> Iterator[None]:
    """While open, the model's generation settings are the defaults of transformers."""
    from transformers import GenerationConfig

    # transformers would take its own settings, such as a repetition penalty, for all that a call
    # does not set. They change the likeliest token.
    config = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = config


def sampling_processors(sampling: Sampling, stream_names: Sequence[str]) -> list[Any]:
    """Logits processors that turn the likeliest token into a sample, with a stream for each row."""
    from transformers import TemperatureLogitsWarper, TopPLogitsWarper

    # The noise comes last: it acts on the logits after temperature and top_p.
    processors: list[Any] = [TemperatureLogitsWarper(float(sampling.temperature))]
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(float(sampling.top_p)))
    return [*processors, GumbelNoise(stream_names)]


class FiniteCheck:
    """A logits processor that changes nothing and records which rows had finite logits only."""

    is_finite = torch.tensor(True)

    def __call__(self, _tokens: Tokens, logits: Logits) -> Logits:
        self.is_finite = self.is_finite.to(logits.device) & logits.amax(dim=1).isfinite()
        return logits


class GumbelNoise:
    """A logits processor that adds Gumbel noise, so that the likeliest token is a sample."""

    # A generator for each row, seeded by a name. transformers has one for all rows, so that an
    # answer would depend on the other requests of its batch.

    def __init__(self, stream_names: Sequence[str]) -> None:
        self.streams = []
        for name in stream_names:
            digest = hashlib.sha256(name.encode()).digest()[:8]
            seed = int.from_bytes(digest) >> 1  # 63 bits: torch takes signed seeds
            self.streams.append(torch.Generator().manual_seed(seed))

    def __call__(self, _tokens: Tokens, logits: Logits) -> Logits:
        noise = []
        for stream in self.streams:
            exponential = torch.empty(logits.shape[1]).exponential_(generator=stream)
            noise.append(-exponential.log())  # minus the logarithm of an exponential is a Gumbel
        return logits.float() + torch.stack(noise).to(logits.device)


def has_hooks(bridge: Bridge) -> bool:
    """Whether a user's hook or `forward` may change activations, at hook points or at modules."""
    if any(point.fwd_hooks for point in bridge.hook_dict.values()):
        return True
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return True
    return any(map(_is_changed, bridge.original_model.modules()))


def _is_changed(module: nn.Module) -> bool:
    # accelerate replaces `forward` too, to move weights and activations between devices.
    if "forward" in vars(module) and not hasattr(module, "_hf_hook"):
        return True
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return not all(getattr(hook, "__module__", "").startswith(LIBRARIES) for hook in hooks)
