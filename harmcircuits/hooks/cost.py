"""What a search costs: memory and time, before it starts, and of a model that is not loaded."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from math import ceil
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from harmcircuits.circuits.selection import largest
from harmcircuits.display import duration, plural
from harmcircuits.hooks.accumulation import accumulate, memory_groups
from harmcircuits.hooks.bridge import AnyModel, Bridge, as_bridge
from harmcircuits.hooks.losses import completion_nll
from harmcircuits.hooks.memory import GIB, MemoryEstimate, estimate_memory, shared_totals
from harmcircuits.hooks.objectives import Objective, completion_loss
from harmcircuits.hooks.protection import (
    Protect,
    checked_batches,
    priced_batches,
    with_first_tokens,
)
from harmcircuits.hooks.search import STEPS
from harmcircuits.hooks.weights import weight_sites
from harmcircuits.prompts import Batch, refuse_no_batches

# Masks that are checked for a size in a step: one or two that pass and one that does not.
TRIES = 3
N_DECODED = 8  # tokens of an answer that is timed
N_TIMED = 3  # products that are timed, of which the fastest counts


@dataclass(frozen=True)
class Work:
    """What is computed, in units that do not depend on the machine."""

    scored: float = 0
    read: float = 0
    decoded: float = 0
    chosen: float = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.scored + other.scored,
            self.read + other.read,
            self.decoded + other.decoded,
            self.chosen + other.chosen,
        )

    def __mul__(self, times: float) -> "Work":
        return Work(
            self.scored * times,
            self.read * times,
            self.decoded * times,
            self.chosen * times,
        )


@dataclass(frozen=True)
class Speed:
    """Seconds that a model takes on a machine for one of everything in `Work`."""

    score: float
    read: float
    decode: float
    choose: float

    @classmethod
    def measured(cls, bridge: AnyModel, batch: Batch, *, at_once: int = 0) -> "Speed":
        """The speed of a model where it is, timed on one batch."""
        bridge = as_bridge(bridge)
        sites = weight_sites(bridge)
        totals = shared_totals(sites)
        n_read = n_tokens([batch])
        read = _fastest(lambda: completion_nll(bridge, [batch]), 2, bridge.cfg.device)
        score = _fastest(
            lambda: accumulate(bridge, [batch], completion_loss, sites, totals, "per token"),
            1,
            bridge.cfg.device,
        )
        decode = _fastest(lambda: _decode(bridge, at_once or len(batch)), 1, bridge.cfg.device)
        widest = max((site.parameter for site in sites.values()), key=Tensor.numel)
        return cls(
            score / n_read,
            read / n_read,
            decode / N_DECODED,
            _seconds_to_choose(widest.shape, widest.device, _n_weights(bridge)),
        )

    @classmethod
    def of_machine(
        cls,
        bridge: AnyModel,
        batch: Batch,
        *,
        at_once: int = 0,
        device: str = "cpu",
        tflops: float | None = None,
        bandwidth: float | None = None,
    ) -> "Speed":
        """The speed that a model's shapes and a machine's products give; the model does not run."""
        bridge = as_bridge(bridge)
        sites = weight_sites(bridge)
        widest = max((site.parameter for site in sites.values()), key=Tensor.numel)
        n_block = _n_weights(bridge)
        n_output = _n_output(bridge)
        n_answers = at_once or len(batch)
        n_answer = batch.is_target.any(dim=0).sum().item()
        share = n_answer / batch.n_read

        product = _seconds_a_product(widest, n_tokens([batch]), device, tflops)
        product_of_step = _seconds_a_product(widest, n_answers, device, tflops)
        step = (n_block + n_output) * n_answers * product_of_step
        if bandwidth is not None:
            n_bytes = (n_block + n_output) * widest.element_size()
            step = max(step, n_bytes / (1e9 * bandwidth))
        return cls(
            (3 * n_block + 2 * share * n_output) * product,
            (n_block + share * n_output) * product,
            step,
            _seconds_to_choose(widest.shape, torch.device(device), n_block),
        )

    def seconds(self, work: Work) -> float:
        """How long some work takes."""
        return (
            self.score * work.scored
            + self.read * work.read
            + self.decode * work.decoded
            + self.choose * work.chosen
        )


@dataclass(frozen=True)
class SearchEstimate:
    """What a search takes, before it starts."""

    memory: MemoryEstimate
    work: Work
    speed: Speed
    steps: int

    @property
    def seconds(self) -> float:
        """From its start to its end."""
        return self.speed.seconds(self.work)

    def __str__(self) -> str:
        beside = self.memory.total - self.memory.weights
        parts = {
            "scores": Work(scored=self.work.scored),
            "checks": Work(read=self.work.read, chosen=self.work.chosen),
            "answers": Work(decoded=self.work.decoded),
        }
        shown = []
        for name, work in parts.items():
            seconds = self.speed.seconds(work)
            if seconds:
                shown.append(f"{name} {duration(seconds)}")
        on_disk = f" and {_gib(self.memory.on_disk)} on disk" if self.memory.on_disk else ""
        return (
            f"search: about {_gib(beside)} beside the model's {_gib(self.memory.weights)}"
            f"{on_disk}, about {duration(self.seconds)} ({plural(self.steps, 'step')} of "
            f"{duration(self.seconds / self.steps)}; in all {', '.join(shown)})"
        )


def estimate_search(
    bridge: AnyModel,
    target: Sequence[Batch],
    protect: Protect = (),
    *,
    size: float | Sequence[float],
    steps: int = STEPS,
    objective: Objective = completion_loss,
    renew: int = 0,
    prefer: Sequence[Batch] = (),
    avoid: Sequence[Batch] = (),
    protect_first: int = 0,
    at_once: int = 0,
    max_memory: int | None = None,
    speed: Speed | None = None,
) -> SearchEstimate:
    """The memory and the time that `find_circuit` needs, from one batch that is timed.

    How both are counted stands above, in `harmcircuits.hooks.cost`. Time is that of a machine with
    nothing else to do.

    >>> print(hc.estimate_search(bridge, harm, protect=[benign], size=0.001, renew=8))
    search: about 0.0... GiB beside the model's 0.0... GiB, about ... (10 steps of ...)

    Args:
        bridge: the model.
        target: batches of the behaviour to remove.
        protect: as in `find_circuit`.
        size: as in `find_circuit`.
        steps: as in `find_circuit`.
        objective: as in `find_circuit`; for the memory.
        renew: how many tokens an answer may have where the target is answered again (as
            `Model.find_circuit` does); 0 where it is not.
        prefer: as in `find_circuit`.
        avoid: as in `find_circuit`.
        protect_first: as in `find_circuit`.
        at_once: how many answers are made at once; as many as a batch holds by default.
        max_memory: as in `find_circuit`.
        speed: of the model, where it is known.

    Raises:
        ValueError: no batches, and as `estimate_memory`.
    """
    refuse_no_batches("estimate_search", target)
    bridge = as_bridge(bridge)
    if speed is None:
        speed = Speed.measured(bridge, middle_batch(target), at_once=at_once)
    n_sizes = len(size) if isinstance(size, Sequence) else 1
    return SearchEstimate(
        estimate_memory(bridge, target, objective, protect=protect, max_memory=max_memory),
        search_work(
            target,
            protect,
            n_sizes=n_sizes,
            steps=steps,
            renew=renew,
            prefer=prefer,
            avoid=avoid,
            protect_first=protect_first,
            at_once=at_once,
            n_passes=n_passes(bridge, max_memory),
        ),
        speed,
        steps,
    )


def n_passes(bridge: AnyModel, max_memory: int | None) -> int:
    """How many passes one score takes under a bound on what is accumulated."""
    return len(list(memory_groups(weight_sites(bridge), max_memory)))


def search_work(
    target: Sequence[Batch],
    protect: Protect,
    *,
    n_sizes: int,
    steps: int,
    renew: int,
    n_passes: int,
    prefer: Sequence[Batch] = (),
    avoid: Sequence[Batch] = (),
    protect_first: int = 0,
    at_once: int = 0,
) -> Work:
    """What a search computes (see the head of this file)."""
    protect = with_first_tokens(protect, protect_first)
    n_target = n_tokens(target)
    n_priced = n_tokens(chain.from_iterable(priced_batches(protect)))
    n_checked = n_tokens(checked_batches(protect))
    n_tries = TRIES if protect else 1  # without a price all factors give the same mask
    n_aims = 1 + n_sizes  # the walk, and each size

    n_preferred = n_tokens(prefer) + n_tokens(avoid)
    scored = (n_target + n_priced + n_preferred) * steps
    answered = Work()
    if renew:
        scored += n_target * (steps - 1)  # nothing is renewed before a mask is accepted
        n_renewed = steps - 1 + n_sizes * steps
        requests = sum(batch.is_token.sum().item() for batch in target)
        requests -= sum(batch.is_target.sum().item() for batch in target)
        n_batches = ceil(sum(map(len, target)) / at_once) if at_once else len(target)
        answered = Work(read=requests, decoded=renew * n_batches) * n_renewed

    unpruned = Work(read=n_checked + n_target)
    checks = Work(read=n_tries * n_checked + n_target, chosen=n_tries) * (n_aims * steps)
    preferred = Work(read=n_preferred * steps)
    return Work(scored=scored * n_passes) + unpruned + checks + preferred + answered


def n_tokens(batches: Any) -> int:
    """The tokens that a pass over some batches reads, padding included."""
    return sum(len(batch) * batch.n_read for batch in batches)


def middle_batch(batches: Sequence[Batch]) -> Batch:
    """The batch with the median number of tokens."""
    by_size = sorted(batches, key=lambda batch: batch.tokens.numel())
    return by_size[len(by_size) // 2]


def _n_weights(bridge: Bridge) -> int:
    return sum(site.parameter.numel() for site in weight_sites(bridge).values())


def _n_output(bridge: Bridge) -> int:
    return bridge.original_model.get_output_embeddings().weight.numel()


def _decode(bridge: Bridge, n_answers: int) -> None:
    """The first tokens of some answers to nothing."""
    from transformers import GenerationConfig

    # Both bounds, so that no answer ends before the time is up.
    config = GenerationConfig(
        max_new_tokens=N_DECODED, min_new_tokens=N_DECODED, do_sample=False, pad_token_id=0
    )
    tokens = torch.ones(n_answers, 1, dtype=torch.int64, device=bridge.cfg.device)
    with torch.no_grad():
        bridge.original_model.generate(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), generation_config=config
        )


def _seconds_a_product(weight: Tensor, n_rows: int, device: str, tflops: float | None) -> float:
    """For one number times another in a product of a matrix with so many rows."""
    if tflops is not None:
        return 2 / (1e12 * tflops)
    matrix = torch.ones(weight.shape[-2:], dtype=weight.dtype, device=device)
    rows = torch.ones(n_rows, matrix.shape[1], dtype=weight.dtype, device=device)
    seconds = _fastest(lambda: rows @ matrix.T, N_TIMED, device)
    return seconds / (n_rows * matrix.numel())


def _seconds_to_choose(shape: torch.Size, device: torch.device, n_weights: int) -> float:
    values = torch.rand(shape[-2:], device=device)
    few = max(1, values.numel() // 1000)
    seconds = _fastest(lambda: largest({"w": values - 0.5 * values}, few, {}), 2, device)
    return seconds * n_weights / values.numel()


def _fastest(work: Callable[[], Any], times: int, device: Any) -> float:
    seconds = []
    for _ in range(times):
        start = perf_counter()
        work()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)  # work on a GPU is only queued by then
        seconds.append(perf_counter() - start)
    return min(seconds)


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / GIB:.2f} GiB" if n_bytes < GIB else f"{n_bytes / GIB:.1f} GiB"
