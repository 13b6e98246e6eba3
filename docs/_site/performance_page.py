"""The tables of `benchmarks/benchmark.py --out`: the cost, and in the log all methods and commits."""

from itertools import product

from blocks import Blocks, committed
from pandas import DataFrame
from support.figures import profiles

from harmcircuits.measurements import Rows
from harmcircuits.views.figures import Picture
from harmcircuits.views.tables import DASH

SHAPES = {
    "organism": "organism, 128 × 16 tokens",
    "gpt2-small": "GPT-2 small, 32 × 64",
    "gpt2-small, 4 times": "GPT-2 small, 128 × 64",
    "qwen2.5-0.5b": "Qwen2.5-0.5B, 32 × 64",
}
METHODS = {
    "plain": "one forward and backward, `param.grad`",
    "removal effect": "`removal_effect` (signed)",
    "token price": "`token_price` (of what is protected)",
    "search": "`find_circuit` of one step, half of them protected",
    "SNIP": "`snip_scores` (absolute values of every example)",
    "bounded": "`removal_effect` with a quarter of the memory (`max_memory`)",
    "one by one": "a pass for each example",
    "layer by layer": "layer by layer, a pass for each example: the published scheme",
}
# A column of the page of costs -> its shape and dtype.
COSTS = {
    "toy model, float32": ("organism", "float32"),
    "GPT-2 small, bfloat16": ("gpt2-small", "bfloat16"),
    "Qwen2.5-0.5B, bfloat16": ("qwen2.5-0.5b", "bfloat16"),
}
COST_OF = {
    "plain": "forward and backward",
    "removal effect": "`removal_effect`",
    "search": "`find_circuit`, one step",
}
HISTORY = {"removal effect": "removal_effect", "SNIP": "snip_scores"}
GIB = 2**30


def latest(**labels: str | int) -> Rows:
    """The rows of the last commit that was measured in this way."""
    rows = committed("benchmark").where(**labels)
    return rows.where(commit=rows[-1].labels["commit"]) if rows else rows


def settings(processes: int) -> dict[str, dict]:
    """The title of each shape and dtype -> its labels."""
    labels = {}
    for shape, dtype in product(SHAPES, ("float32", "bfloat16")):
        where = {"shape": shape, "dtype": dtype, "processes": processes}
        labels[f"{SHAPES[shape]}, {dtype}"] = where
    return labels


def score_table() -> DataFrame:
    """A line a method, a column a shape and dtype: multiples of a plain pass."""
    columns = {"": list(METHODS.values())}
    for title, where in settings(processes=1).items():
        if committed("benchmark").where(**where):
            columns[title] = [ratio_text(latest(**where, method=name)) for name in METHODS]
    return DataFrame(columns)


def ratio_text(rows: Rows) -> str:
    """A multiple of a plain pass; for the plain pass itself its seconds."""
    if not rows:
        return DASH
    if rows[0].labels["method"] == "plain":
        return f"{rows.one('seconds').mean:.3g} s"
    return f"{rows.one('ratio_to_plain').mean:.3g} ×"


def memory_table() -> DataFrame:
    """The peak of every method beside the model's weights, in GiB."""
    columns = {"": list(METHODS.values())}
    for shape in ("gpt2-small", "qwen2.5-0.5b"):
        where = {"shape": shape, "dtype": "bfloat16", "processes": 1}
        peaks = [latest(**where, method=name).where("peak_bytes") for name in METHODS]
        texts = [f"{peak.one().mean / GIB:.2f} GiB" if peak else DASH for peak in peaks]
        columns[SHAPES[shape]] = texts
    return DataFrame(columns)


def cost_table() -> DataFrame:
    """A line a method of a search, a column a model; last, the memory of the largest."""
    columns = {"": list(COST_OF.values())}
    memory: list[str] = []
    for title, (shape, dtype) in COSTS.items():
        where = {"shape": shape, "dtype": dtype, "processes": 1}
        rows = [latest(**where, method=name) for name in COST_OF]
        columns[title] = [ratio_text(method) for method in rows]
        memory = [f"{method.one('peak_bytes').mean / GIB:.2f} GiB" for method in rows]
    return DataFrame({**columns, "its memory": memory})


def process_table() -> DataFrame:
    """How many times as fast two processes are that share the examples."""
    lines = []
    for title, where in settings(processes=2).items():
        for method, name in HISTORY.items():
            ratio = latest(**where).where("ratio_to_plain", method=method)
            if ratio:
                faster = f"{1 / ratio.one().mean:.2f} ×"
                lines.append({"model": title, "": name, "faster": faster})
    return DataFrame(lines)


def history() -> Picture:
    """The cost of scores of the smallest model by commit, as multiples of a plain pass."""
    where = {"shape": "organism", "dtype": "float32", "processes": 1}
    ratios = committed("benchmark").where("ratio_to_plain", **where)
    curves = {title: ratios.where(method=name) for name, title in HISTORY.items()}
    return profiles({SHAPES["organism"]: curves}, x="commit", title="multiples of a plain pass")


COST: Blocks = {"cost": cost_table}
LOG: Blocks = {"scores": score_table, "memory": memory_table, "processes": process_table}
PICTURES = {"performance.svg": history}
