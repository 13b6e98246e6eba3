"""A model continues token ids: greedy or sampled, independent of what else is in its batch."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from harmcircuits.batches import padding_id
from harmcircuits.hooks.bridge import Bridge, unhooked
from harmcircuits.hooks.checks import refuse_not_finite_texts


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


def end_of_text(bridge: Bridge) -> int | list[int] | None:
    """The token that ends an answer, or several: the model's own, else the tokenizer's."""
    own = getattr(bridge.original_model, "generation_config", None)
    of_model = getattr(own, "eos_token_id", None)
    return bridge.tokenizer.eos_token_id if of_model is None else of_model


def continuations(
    bridge: Bridge,
    contexts: Sequence[list[int]],
    names: Sequence[str],
    steps: Sequence[Any],
    max_new_tokens: int,
) -> list[list[int]]:
    """What the model goes on with, in token ids, up to the first that ends a text."""
    from transformers import GenerationConfig, LogitsProcessorList

    end, padding = end_of_text(bridge), padding_id(bridge.tokenizer)
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
    without_hooks = nullcontext() if is_hooked(bridge) else unhooked(bridge)
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


def drawing_steps(sampling: Sampling, noises: Sequence[str]) -> list[Any]:
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


def is_hooked(bridge: Bridge) -> bool:
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
