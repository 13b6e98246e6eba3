# %% [markdown]
# # What do scores cost?
# Every figure side by side in one run on one model with random weights. The contenders, over the
# same examples:
#
# - **plain**: forward and backward with `param.grad` on the scored matrices, nothing per example;
#   the unit of all ratios.
# - **removal effect**, **SNIP**: the library's scores; **bounded**: the removal effect with a
#   quarter of the accumulators at a time.
# - **one by one**: a pass for each example, absolute values of `param.grad` added in float32.
# - **layer by layer**: the scheme of the published code, written from its description: for each
#   layer, a pass for each example with gradients for that layer only, added in bfloat16. Timed on a
#   few examples and multiplied, its cost being linear in them.
#
# Beside them stand selection, a mask put on and taken off, and the answers to six sets of requests,
# set by set and together.
#
# Contenders take turns and a ratio is that of one turn, so that a busy machine disturbs all alike;
# figures are medians over turns, bars the whole range. `--grow` repeats the scores with twice the
# layers, width, examples and length, and masks of as many weights on the larger models. The share
# of the peak is that of `--peak-flops`, or else of the fastest of ten large matrix products in the
# same run.

# %%
import ctypes
import gc
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated, Any

import torch
import transformers
import typer
from matplotlib import rc_context
from rich.console import Console
from support.organisms.train import new_tokenizer
from transformer_lens.model_bridge import TransformerBridge

import harmcircuits as hc
from harmcircuits.behaviours.generation import generate
from harmcircuits.behaviours.model import ANSWERED_PER_SCORED
from harmcircuits.hooks.gradients import frozen
from harmcircuits.hooks.memory import estimate_memory
from harmcircuits.measurements import Measurement, Rows
from harmcircuits.prompts import Batch
from harmcircuits.views.figures import (
    BLUE,
    CHANCE_LINE,
    PALETTE,
    STYLE,
    Picture,
    coloured,
    draw_bars,
    subplots,
    with_legend,
)
from harmcircuits.views.page import plot, section, table, write_page
from harmcircuits.views.tables import text_table

TOKENS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)


@dataclass(frozen=True)
class Shape:
    """A model's architecture and size, and its data.

    `examples` of `length` tokens in batches of `batch_size`.
    """

    config: str
    layers: int
    width: int
    heads: int
    settings: tuple[tuple[str, int], ...]
    examples: int
    length: int
    batch_size: int

    def configuration(self) -> Any:
        sizes = {
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
        }
        return getattr(transformers, self.config)(**sizes, **dict(self.settings), **TOKENS)


SHAPES = {
    "organism": Shape(
        "LlamaConfig",
        layers=4,
        width=128,
        heads=4,
        settings=(("num_key_value_heads", 2), ("intermediate_size", 512), ("vocab_size", 320)),
        examples=128,
        length=16,
        batch_size=64,
    ),
    "gpt2-small": Shape(
        "GPT2Config",
        layers=12,
        width=768,
        heads=12,
        settings=(("vocab_size", 50257),),
        examples=16,
        length=64,
        batch_size=8,
    ),
    "8b": Shape(
        "LlamaConfig",
        layers=32,
        width=4096,
        heads=32,
        settings=(
            ("num_key_value_heads", 8),
            ("intermediate_size", 14336),
            ("vocab_size", 128256),
        ),
        examples=64,
        length=256,
        batch_size=8,
    ),
}


# %%
def random_bridge(shape: Shape, device: str, dtype: torch.dtype) -> TransformerBridge:
    """A model of this shape with random weights; only its configuration reaches the disk."""
    torch.manual_seed(0)
    configuration = shape.configuration()
    with tempfile.TemporaryDirectory() as folder, torch.device(device):
        configuration.save_pretrained(folder)
        new_tokenizer().save_pretrained(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_config(
            configuration, dtype=dtype, attn_implementation="eager"
        )
        options = {"hf_model": model, "tokenizer": tokenizer, "device": device, "dtype": dtype}
        return TransformerBridge.boot_transformers(folder, **options)


def random_batches(shape: Shape) -> list[Batch]:
    """Random tokens, the second half of every example to be predicted."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 300, (shape.examples, shape.length), generator=generator)
    is_target = (torch.arange(shape.length) >= shape.length // 2).expand_as(tokens)
    pairs = zip(tokens.split(shape.batch_size), is_target.split(shape.batch_size), strict=True)
    return [Batch(*pair) for pair in pairs]


# %% The contenders
def plain(
    bridge: TransformerBridge, batches: Sequence[Batch], names: Sequence[str] = ()
) -> dict[str, torch.Tensor]:
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
    bridge: TransformerBridge,
    batches: Sequence[Batch],
    names: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
) -> dict[str, torch.Tensor]:
    """Sums of absolute gradients, by a pass for each example."""
    total: dict[str, torch.Tensor] = {}
    for batch in batches:
        for tokens, is_target in zip(batch.tokens.split(1), batch.is_target.split(1), strict=True):
            for name, gradient in plain(bridge, [Batch(tokens, is_target)], names).items():
                if name not in total:
                    total[name] = torch.zeros_like(gradient, dtype=dtype)
                total[name].add_(gradient.abs_())
    return total


def layer_by_layer(bridge: TransformerBridge, batches: Sequence[Batch]) -> dict[str, torch.Tensor]:
    """`one_by_one` anew for every layer, in bfloat16."""
    layers: dict[int, list[str]] = {}
    for name, site in hc.weight_sites(bridge).items():
        layers.setdefault(site.layer, []).append(name)
    parts = [one_by_one(bridge, batches, names, torch.bfloat16) for names in layers.values()]
    return {name: value for part in parts for name, value in part.items()}


def contenders(
    bridge: TransformerBridge, batches: Sequence[Batch], n_few: int
) -> dict[str, tuple[Callable[[], Any], float]]:
    """What to run under every name, and by how much its time is multiplied."""
    few = [Batch(batches[0].tokens[:n_few], batches[0].is_target[:n_few])]
    n_examples = sum(map(len, batches))
    n_scored = sum(weight.numel() for weight in hc.named_weights(bridge).values())
    largest = max(weight.numel() for weight in hc.named_weights(bridge).values())
    bound = max(n_scored, 4 * largest)  # bytes: a quarter of the 4 a weight
    scored = (bridge, batches, hc.completion_loss)
    return {
        "plain": (partial(plain, bridge, batches), 1),
        "removal effect": (partial(hc.removal_effect, *scored), 1),
        "SNIP": (partial(hc.snip_scores, *scored), 1),
        "bounded": (partial(hc.removal_effect, *scored, max_memory=bound), 1),
        "one by one": (partial(one_by_one, bridge, few), n_examples / len(few[0])),
        "layer by layer": (partial(layer_by_layer, bridge, few), n_examples / len(few[0])),
    }


# %% Time and memory
class Peak:
    """The most memory that was taken, above what was taken before.

    By CUDA's count, or as Linux counts resident pages.
    """

    def __init__(self, device: str) -> None:
        self.device, self.is_cuda = device, device.startswith("cuda")
        gc.collect()
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats(device)
        else:
            # What an allocator held back would hide what is taken again.
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        if self.is_cuda:
            self.before = torch.cuda.memory_allocated(device)
        else:
            self.before = self._resident("VmRSS")

    def _resident(self, which: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(which)).split()[1])

    def taken(self) -> int:
        if self.is_cuda:
            return torch.cuda.max_memory_allocated(self.device) - self.before
        return self._resident("VmHWM") - self.before


def seconds(run: Callable[[], Any], device: str) -> float:
    """Wall time of one call, with whatever it started on the device."""
    start = perf_counter()
    run()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return perf_counter() - start


def middle(
    metric: str, labels: dict[str, str | int | float], values: Sequence[float]
) -> Measurement:
    """The median over turns with the whole range."""
    return Measurement(metric, labels, median(values), min(values), max(values), len(values))


def compared(
    bridge: TransformerBridge,
    shape: Shape,
    labels: dict,
    device: str,
    turns: int,
    few: int,
    only: Sequence[str] = (),
) -> Rows:
    """Seconds, ratio to plain and memory of every contender, and what the estimate says of it."""
    batches = random_batches(shape)
    runs = {
        name: run
        for name, run in contenders(bridge, batches, few).items()
        if not only or name in only
    }
    peaks = {}
    for name, (run, _) in runs.items():  # also warms caches and kernels up
        peak = Peak(device)
        run()
        peaks[name] = peak.taken()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(turns):
        for name, (run, factor) in runs.items():
            times[name].append(factor * seconds(run, device))

    rows, n_tokens = Rows(), shape.examples * shape.length
    for name, of_turns in times.items():
        where = {**labels, "method": name}
        ratios = [time / unit for time, unit in zip(of_turns, times["plain"], strict=True)]
        rows += [
            middle("seconds", where, of_turns),
            middle("ratio_to_plain", where, ratios),
            middle("tokens_per_second", where, [n_tokens / time for time in of_turns]),
            Measurement.exact("peak_bytes", where, peaks[name]),
        ]
    for name in ("plain", "removal effect"):
        speeds = [_flop(bridge, n_tokens) / time for time in times[name]]
        rows += [middle("flop_per_second", {**labels, "method": name}, speeds)]
    for name, absolute in (("removal effect", False), ("SNIP", True)):
        estimate = estimate_memory(bridge, batches, absolute=absolute)
        extra = estimate.accumulators + estimate.activations
        rows += [Measurement.exact("estimated_bytes", {**labels, "method": name}, extra)]
    return rows


def _flop(bridge: TransformerBridge, n_tokens: int) -> float:
    """6 for every scored weight and token, 4 for the unembedding's frozen ones: two a product."""
    scored = sum(weight.numel() for weight in hc.named_weights(bridge).values())
    return n_tokens * (6.0 * scored + 4.0 * bridge.cfg.d_model * bridge.cfg.d_vocab)


def matmul_flops(device: str, dtype: torch.dtype, size: int = 0) -> float:
    """FLOP/s of the fastest of ten products of square matrices: what the machine gives now."""
    size = size or (8192 if device.startswith("cuda") else 1024)
    square = torch.randn(size, size, device=device).to(dtype)
    product = partial(torch.mm, square, square)
    return 2.0 * size**3 / min(seconds(product, device) for _ in range(10))


def peak_rows(rows: Rows, labels: dict, peak: float, is_given: bool) -> Rows:
    """The machine's peak, and every speed as a share of it."""
    source = "as given" if is_given else "matrix products in this run"
    shares = Rows([Measurement.exact("peak_flop_per_second", {**labels, "peak": source}, peak)])
    for row in rows.where("flop_per_second"):
        figures = (row.mean / peak, row.low / peak, row.high / peak)
        shares += [Measurement("share_of_peak", row.labels, *figures, row.n)]
    return shares


def mask_rows(
    bridge: TransformerBridge, labels: dict, device: str, turns: int, n_weights: int
) -> Rows:
    """Selection over all scores, and applying and restoring a mask of so many weights.

    A tenth of all at most.
    """
    scores = hc.random_scores(bridge)
    n_scored = sum(value.numel() for value in scores.values.values())
    fraction, rows = min(0.1, n_weights / n_scored), Rows()
    choose = partial(hc.top_fraction, scores, fraction, within="model")
    mask = choose()

    def apply_and_restore() -> None:
        with hc.masked(bridge, mask):
            pass

    for name, run in (("selection", choose), ("mask", apply_and_restore)):
        run()
        where = {**labels, "method": name, "weights": mask.n_removed, "of": n_scored}
        rows += [middle("seconds", where, [seconds(run, device) for _ in range(turns)])]
    return rows


def answer_rows(
    bridge: TransformerBridge,
    labels: dict,
    device: str,
    turns: int,
    *,
    n_sets: int = 6,
    n_requests: int = 20,
    batch_size: int = 16,
    max_new_tokens: int = 8,
) -> Rows:
    """Answers to sets of requests, set by set in batches as scores take, and as `Model` makes them.

    That is together, in batches of `ANSWERED_PER_SCORED` times as many.
    """
    texts = [f"how to use {number}" for number in range(n_sets * n_requests)]
    requests = hc.PromptSet.of(texts)
    answered = partial(generate, bridge, max_new_tokens=max_new_tokens, template="raw")

    def set_by_set() -> None:
        for start in range(0, len(requests), n_requests):
            answered(requests[start : start + n_requests], batch_size=batch_size)

    runs = {
        "answers, set by set": set_by_set,
        "answers, together": partial(
            answered, requests, batch_size=ANSWERED_PER_SCORED * batch_size
        ),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():  # warms up
        run()
    for _ in range(turns):
        for name, run in runs.items():
            times[name].append(seconds(run, device))

    rows = Rows()
    for name, of_turns in times.items():
        where = {**labels, "method": name, "answers": n_sets * n_requests}
        ratios = [a / b for a, b in zip(of_turns, times["answers, together"], strict=True)]
        rows += [middle("seconds", where, of_turns), middle("ratio_to_together", where, ratios)]
    return rows


# %% Growth
def grown(shape: Shape) -> dict[str, Shape]:
    """Twice as much of one thing at a time."""
    return {
        "layers": replace(shape, layers=2 * shape.layers),
        "width": replace(
            shape, width=2 * shape.width, heads=2 * shape.heads, settings=_wider(shape.settings)
        ),
        "examples": replace(shape, examples=2 * shape.examples),
        "length": replace(shape, length=2 * shape.length),
    }


def growth_rows(rows: Rows) -> Rows:
    """The time of every contender after one thing is doubled, in units of before; linear: 2."""
    names = ("shape", "device", "machine", "dtype", "grown", "method")
    growths = Rows()
    for row in rows.where("seconds"):
        before = rows.where("seconds", grown="none", method=row.labels["method"])
        if row.labels["grown"] != "none" and before:
            (unit,) = before
            figures = (row.mean / unit.mean, row.low / unit.high, row.high / unit.low)
            labels = {name: row.labels[name] for name in names}
            growths += [Measurement("growth", labels, *figures, row.n)]
    return growths


def _wider(settings: tuple[tuple[str, int], ...]) -> tuple[tuple[str, int], ...]:
    return tuple((name, value if name == "vocab_size" else 2 * value) for name, value in settings)


# %% What is shown
@rc_context(STYLE)
def figure(rows: Rows) -> Picture:
    """Time of every contender in units of plain forward and backward, on a logarithmic axis."""
    every_ratio = rows.where("ratio_to_plain", grown="none")
    ratios = {str(row.labels["method"]): row for row in every_ratio}
    del ratios["plain"]
    drawn, (panel,) = subplots(1, height=3.75)
    draw_bars(panel, list(ratios), {"": ratios}, {"": BLUE})
    panel.axhline(1, color=CHANCE_LINE, linestyle=":")
    panel.set(yscale="log", ylabel="time, in units of one plain forward and backward")
    return Picture(drawn)


@rc_context(STYLE)
def growth_figure(rows: Rows) -> Picture:
    """Time of each contender after one thing is doubled, in units of before; the line is linear."""
    bars = {}
    for method, growths in rows.where("growth").by("method").items():
        bars[str(method)] = {str(row.labels["grown"]): row for row in growths}
    every_thing = dict.fromkeys(thing for things in bars.values() for thing in things)
    drawn, (panel,) = subplots(1, height=3.75)
    draw_bars(panel, list(every_thing), bars, coloured(bars, PALETTE))
    panel.axhline(2, color=CHANCE_LINE, linestyle=":")
    panel.set(xlabel="twice the", ylabel="time, in units of before")
    return with_legend(drawn)


def lines(rows: Rows) -> list[list[str]]:
    """A line for every contender, and what is timed alone."""
    body = []
    for row in rows.where("seconds"):
        at = row.labels
        name = str(at["method"])
        if at["grown"] != "none":
            name += f", twice the {at['grown']}"
        body.append(
            [
                name,
                f"{row:.4g}",
                _cell(rows.where("ratio_to_plain", **at), ".2f"),
                _cell(rows.where("tokens_per_second", **at), ",.0f"),
                _cell(rows.where("peak_bytes", **at), ",.0f", 2**20),
                _cell(rows.where("estimated_bytes", **at), ",.0f", 2**20),
            ]
        )
    return body


def _cell(rows: Rows, form: str, unit: float = 1) -> str:
    """The figure in these units; empty where it was not measured."""
    return format(rows[0].mean / unit, form) if rows else ""


HEAD = ["", "seconds [range]", "× plain", "tokens/s", "peak MiB", "estimated MiB"]


def show(rows: Rows, page: Path | None) -> None:
    shown = text_table("", HEAD)
    for line in lines(rows):
        shown.add_row(*line)
    speed = rows.one("flop_per_second", grown="none", method="plain")
    peak = rows.one("peak_flop_per_second")
    shares = [
        f"{row.labels['method']} {row.mean:.1%}"
        for row in rows.where("share_of_peak", grown="none")
    ]
    of = f"{peak.mean / 1e12:.3g} TFLOP/s ({peak.labels['peak']})"
    note = f"Share of {of}: {', '.join(shares)}; {json.dumps(dict(speed.labels))}"
    console = Console()
    console.print(shown)
    console.print(note, highlight=False)
    if page:
        title = f"What scores cost: {speed.labels['shape']}, {speed.labels['machine']}"
        sections = [section(title, note, plot(figure(rows)) + table(HEAD, lines(rows)))]
        if rows.where("growth"):
            note = "Bars: the whole range of the one over that of the other."
            sections.append(
                section("Growth when one thing is doubled", note, plot(growth_figure(rows)))
            )
        write_page(page, title, sections)


# %%
def main(
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "organism",
    device: Annotated[str, typer.Option(help="Where to run.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Of the weights: float32, bfloat16.")] = "float32",
    machine: Annotated[
        str, typer.Option(help="The card's or processor's name, as it is to stand in the rows.")
    ] = "",
    turns: Annotated[int, typer.Option(help="How often every contender runs.")] = 5,
    few: Annotated[
        int, typer.Option(help="Examples on which the per-example schemes are timed.")
    ] = 2,
    examples: Annotated[int, typer.Option(help="Number of examples (0: as the shape says).")] = 0,
    grow: Annotated[
        bool, typer.Option(help="Also twice the layers, width, examples and length.")
    ] = False,
    weights: Annotated[
        int, typer.Option(help="Weights of the mask that is applied and restored.")
    ] = 42_000,
    peak_flops: Annotated[
        float, typer.Option(help="The machine's peak FLOP/s at this dtype (0: measured).")
    ] = 0,
    out: Annotated[Path | None, typer.Option(help="Rows file to append to.")] = None,
    page: Annotated[Path | None, typer.Option(help="HTML page to write.")] = None,
) -> None:
    size = replace(SHAPES[shape], examples=examples or SHAPES[shape].examples)
    name = machine or (torch.cuda.get_device_name(device) if device.startswith("cuda") else "CPU")
    threads = torch.get_num_threads()
    labels = {"shape": shape, "device": device, "machine": name, "threads": threads, "dtype": dtype}
    rows = Rows()
    sizes = {"none": size, **(grown(size) if grow else {})}
    for what, grown_shape in sizes.items():
        bridge = random_bridge(grown_shape, device, getattr(torch, dtype))
        where = {
            **labels,
            "grown": what,
            "layers": grown_shape.layers,
            "width": grown_shape.width,
            "examples": grown_shape.examples,
            "length": grown_shape.length,
        }
        only = () if what == "none" else ("plain", "removal effect", "SNIP")
        if what == "layers":
            only += ("layer by layer",)  # the scheme whose cost grows with their square
        rows += compared(bridge, grown_shape, where, device, turns, few, only)
        if what in ("none", "layers", "width"):
            rows += mask_rows(bridge, where, device, turns, weights)
        if what == "none":
            rows += answer_rows(bridge, where, device, turns)
        del bridge
    rows += growth_rows(rows)
    peak = peak_flops or matmul_flops(device, getattr(torch, dtype))
    rows += peak_rows(rows, labels, peak, peak_flops > 0)
    if out:
        rows.append_to(out)
    show(rows, page)


if __name__ == "__main__":
    typer.run(main)
