# %% [markdown]
# # What the rows of the benchmark say
# `python docs/_site/performance_page.py` writes what `benchmarks/benchmark.py --out` measured into
# `docs/performance.md`, between `<!-- NAME -->` and `<!-- /NAME -->`, and draws the history by commit.

# %%
from pathlib import Path

import pandas
from support.figures import profiles
from support.markdown import between, frame_markdown

from harmcircuits.measurements import Rows
from harmcircuits.views.figures import Picture
from harmcircuits.views.tables import DASH

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "performance.md"
FIGURE = ROOT / "docs" / "figures" / "performance.svg"
ROWS = ROOT / "analyses" / "rows" / "benchmark.jsonl"
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
DRAWN = {"removal effect": "removal_effect", "SNIP": "snip_scores"}
GIB = 2**30


def latest(rows: Rows, **labels: str | int) -> Rows:
    """The rows of the last commit that was measured so."""
    of_labels = rows.where(**labels)
    return of_labels.where(commit=of_labels[-1].labels["commit"]) if of_labels else of_labels


def table(rows: Rows) -> pandas.DataFrame:
    """A line a method, a column a model and dtype: multiples of a plain pass."""
    columns = {}
    for shape, title in SHAPES.items():
        for dtype in ("float32", "bfloat16"):
            of_model = rows.where(shape=shape, dtype=dtype, processes=1)
            if of_model:
                columns[f"{title}, {dtype}"] = {name: _ratio(of_model, name) for name in METHODS}
    lines = pandas.DataFrame(columns)
    lines.insert(0, "", [METHODS[name] for name in lines.index])
    return lines


def _ratio(rows: Rows, method: str) -> str:
    of_method = latest(rows, method=method)
    if not of_method:
        return DASH
    if method == "plain":
        return f"{of_method.one('seconds').mean:.3g} s"
    return f"{of_method.one('ratio_to_plain').mean:.3g} ×"


def table_of_memory(rows: Rows) -> pandas.DataFrame:
    """The peak of every method beside the model's weights, in GiB."""
    lines = []
    for name, title in METHODS.items():
        line = {"": title}
        for shape in ("gpt2-small", "qwen2.5-0.5b"):
            of_method = latest(rows, shape=shape, dtype="bfloat16", processes=1, method=name)
            peak = of_method.where("peak_bytes")
            line[SHAPES[shape]] = f"{peak.one().mean / GIB:.2f} GiB" if peak else DASH
        lines.append(line)
    return pandas.DataFrame(lines)


def table_of_processes(rows: Rows) -> pandas.DataFrame:
    """How many times as fast two processes are that share the examples."""
    lines = []
    for shape, title in SHAPES.items():
        for dtype in ("float32", "bfloat16"):
            of_two = latest(rows, shape=shape, dtype=dtype, processes=2)
            for name in DRAWN if of_two else ():
                ratio = of_two.where("ratio_to_plain", method=name)
                if ratio:
                    faster = f"{1 / ratio.one().mean:.2f} ×"
                    lines.append({"model": f"{title}, {dtype}", "": DRAWN[name], "faster": faster})
    return pandas.DataFrame(lines)


def with_results(page: str, rows: Rows) -> str:
    """The page with what the rows say."""
    page = between(page, "scores", frame_markdown(table(rows)))
    page = between(page, "memory", frame_markdown(table_of_memory(rows)))
    return between(page, "processes", frame_markdown(table_of_processes(rows)))


def history(rows: Rows) -> Picture:
    """What scores of the smallest model cost at some commits, as multiples of a plain pass."""
    ratios = rows.where("ratio_to_plain", shape="organism", dtype="float32", processes=1)
    curves = {title: ratios.where(method=name) for name, title in DRAWN.items()}
    return profiles({SHAPES["organism"]: curves}, x="commit", title="multiples of a plain pass")


if __name__ == "__main__":
    measured = Rows.read(ROWS)
    PAGE.write_text(with_results(PAGE.read_text(encoding="utf-8"), measured), encoding="utf-8")
    history(measured).save(FIGURE)
