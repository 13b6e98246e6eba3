"""The time and memory of scores, on one model with random weights and the same examples.

- plain: forward and backward with `param.grad` on the scored matrices, nothing per example.
- removal effect, token price, SNIP: the library's scores; bounded: with a quarter of the
  accumulators at a time.
- search: one step, which scores all examples once, half of them protected.
- one by one: a pass for each example, absolute values of `param.grad` added in float32.
- layer by layer: the scheme of the published code, written from its description: for each layer, a
  pass for each example, added in bfloat16. Timed on a few examples and multiplied.

Methods take turns and a ratio compares times of one turn, so that a busy machine disturbs all alike;
figures are medians over turns with the whole range. Under `torchrun` each process runs the baselines
on all examples, and the library's scores on its share.
"""

import ctypes
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import psutil
import torch
import transformers
import tyro
from torch import distributed

import harmcircuits as hc
from harmcircuits.batches import Batch
from harmcircuits.hooks.gradients import frozen
from harmcircuits.hooks.loading import wrap_model
from harmcircuits.measurements import Labels, Measurement, Rows
from harmcircuits.organisms.shipped import FOLDER

Gradients = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """A model's configuration, and its data: examples of so many tokens, in batches."""

    config: transformers.PretrainedConfig
    examples: int
    length: int
    batch_size: int


ORGANISM = transformers.AutoConfig.from_pretrained(FOLDER / "base")
QWEN = transformers.Qwen2Config(
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)
SHAPES = {
    "organism": Shape(ORGANISM, examples=128, length=16, batch_size=64),
    "gpt2-small": Shape(transformers.GPT2Config(), examples=32, length=64, batch_size=8),
    "gpt2-small, 4 times": Shape(transformers.GPT2Config(), examples=128, length=64, batch_size=8),
    "qwen2.5-0.5b": Shape(QWEN, examples=32, length=64, batch_size=16),
}


def random_bridge(shape: Shape, device: str, dtype: torch.dtype) -> Any:
    """A model of this shape with random weights; only its configuration is written to disk."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder, torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(
            shape.config, dtype=dtype, attn_implementation="eager"
        )
        model.config.save_pretrained(folder)
        model.config._name_or_path = folder
        return wrap_model(model, transformers.AutoTokenizer.from_pretrained(FOLDER / "base"))


def random_batches(shape: Shape) -> list[Batch]:
    """Random tokens, the second half of every example to be predicted."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 300, (shape.examples, shape.length), generator=generator)
    is_target = (torch.arange(shape.length) >= shape.length // 2).expand_as(tokens)
    pairs = zip(tokens.split(shape.batch_size), is_target.split(shape.batch_size), strict=True)
    return [Batch(*pair) for pair in pairs]


def plain(bridge: Any, batches: Sequence[Batch], names: Sequence[str] = ()) -> Gradients:
    """Gradients of the summed loss in `param.grad`, of the named matrices or all."""
    weights = hc.named_weights(bridge)
    weights = {name: weights[name] for name in names or weights}
    with frozen(bridge):
        for weight in weights.values():
            weight.requires_grad_(True)
        for batch in batches:
            hc.completion_loss(bridge, batch).sum().backward()
    gradients = {name: weight.grad for name, weight in weights.items() if weight.grad is not None}
    for weight in weights.values():
        weight.grad = None
    return gradients


def one_by_one(
    bridge: Any,
    batches: Sequence[Batch],
    names: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
) -> Gradients:
    """Sums of absolute gradients, by a pass for each example."""
    total: Gradients = {}
    for batch in batches:
        for tokens, is_target in zip(batch.tokens.split(1), batch.is_target.split(1), strict=True):
            for name, gradient in plain(bridge, [Batch(tokens, is_target)], names).items():
                if name not in total:
                    total[name] = torch.zeros_like(gradient, dtype=dtype)
                total[name].add_(gradient.abs_())
    return total


def layer_by_layer(bridge: Any, batches: Sequence[Batch]) -> Gradients:
    """`one_by_one` again for every layer, in bfloat16."""
    layers: dict[int, list[str]] = {}
    for name, site in hc.weight_sites(bridge).items():
        layers.setdefault(site.layer, []).append(name)
    total = {}
    for names in layers.values():
        total |= one_by_one(bridge, batches, names, torch.bfloat16)
    return total


def timings(
    runs: dict[str, tuple[Callable[[], Any], float]], unit: str, labels: Labels, turns: int
) -> Rows:
    """The seconds of every method, times a factor, their ratio to one method's, and its memory."""
    memory = {name: peak(run) for name, (run, _) in runs.items()}  # warms up caches and kernels
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(turns):
        for name, (run, factor) in runs.items():
            if distributed.is_initialized():
                distributed.barrier()
            start = perf_counter()
            run()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            times[name].append(factor * (perf_counter() - start))
    rows = Rows()
    for name, seconds in times.items():
        where = {**labels, "method": name}
        ratios = [time / base for time, base in zip(seconds, times[unit], strict=True)]
        for metric, values in (("seconds", seconds), (f"ratio_to_{unit}", ratios)):
            figures = (median(values), min(values), max(values))
            rows += [Measurement(metric, where, *figures, turns)]
        rows += [Measurement.exact("peak_bytes", where, memory[name])]
    return rows


def peak(run: Callable[[], Any]) -> int:
    """The largest number of bytes that a call takes, on top of the bytes in use before it."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - start
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # gives back the memory that earlier methods freed
    process, is_done = psutil.Process(), threading.Event()

    def resident_bytes() -> int:
        memory = process.memory_info()
        return memory.rss - getattr(memory, "shared", 0)  # without mapped files

    samples = [resident_bytes()]

    def sample() -> None:
        while not is_done.wait(0.005):
            samples.append(resident_bytes())

    sampler = threading.Thread(target=sample)
    sampler.start()
    run()
    is_done.set()
    sampler.join()
    return max(samples) - samples[0]


def benchmark(
    bridge: Any, size: Shape, labels: Labels, *, turns: int, few: int, methods: Sequence[str] = ()
) -> Rows:
    """Scores, selection and masks of one model."""
    batches = random_batches(size)
    weights = hc.named_weights(bridge)
    n_scored = sum(weight.numel() for weight in weights.values())
    # In bytes: a quarter of the 4 a weight, or what one matrix takes.
    bound = max(n_scored, 4 * max(weight.numel() for weight in weights.values()))
    first_examples = [Batch(batches[0].tokens[:few], batches[0].is_target[:few])]
    times = size.examples / few
    target, retain = batches[::2], batches[1::2]
    scores = {
        "plain": (partial(plain, bridge, batches), 1.0),
        "removal effect": (partial(hc.removal_effect, bridge, batches), 1.0),
        "token price": (partial(hc.token_price, bridge, batches), 1.0),
        "SNIP": (partial(hc.snip_scores, bridge, batches), 1.0),
        "bounded": (partial(hc.removal_effect, bridge, batches, max_memory=bound), 1.0),
        "search": (partial(hc.find_circuit, bridge, target, [retain], size=1e-3, steps=1), 1.0),
        "one by one": (partial(one_by_one, bridge, first_examples), times),
        "layer by layer": (partial(layer_by_layer, bridge, first_examples), times),
    }
    scores = {name: run for name, run in scores.items() if name in (methods or scores)}
    rows = timings(scores, "plain", labels, turns)

    random = hc.random_scores(bridge)
    choose = partial(hc.top_fraction, random, min(0.1, 42_000 / n_scored), within="model")
    mask = choose()

    def apply_and_restore() -> None:
        with hc.masked(bridge, mask):
            pass

    edits = {"selection": (choose, 1.0), "mask": (apply_and_restore, 1.0)}
    return rows + timings(edits, "mask", {**labels, "weights": mask.n_removed}, turns)


def main(
    shape: str = "organism",
    device: str = "cpu",
    dtype: str = "float32",
    turns: int = 5,
    few: int = 2,
    only: tuple[str, ...] = (),
    out: Path | None = None,
) -> None:
    """Times of scores, selection and masks, as a table, and as rows in a file.

    Args:
        shape: of the model.
        device: a torch device.
        dtype: of the model.
        turns: of all methods.
        few: number of examples on which the slow methods are timed.
        only: methods, plain among them; all by default.
        out: a file to which the rows are appended.
    """
    if "RANK" in os.environ:  # started by torchrun
        distributed.init_process_group("gloo")
    n_processes = distributed.get_world_size() if distributed.is_initialized() else 1
    bridge = random_bridge(SHAPES[shape], device, getattr(torch, dtype))
    labels: Labels = {"shape": shape, "device": device, "dtype": dtype, "processes": n_processes}
    labels = {**labels, "threads": torch.get_num_threads(), "commit": commit()}
    rows = benchmark(bridge, SHAPES[shape], labels, turns=turns, few=few, methods=only)
    if n_processes > 1 and distributed.get_rank():
        return
    print(rows.frame(index="method", columns="metric").to_string())
    if out:
        rows.append_to(out)


def commit() -> str:
    """The commit of the measured package, for a history."""
    command = ["git", "-C", str(Path(hc.__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


if __name__ == "__main__":
    tyro.cli(main)
