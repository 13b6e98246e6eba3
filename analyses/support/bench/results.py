"""What the rows of a search bench say: areas, tables, the interval and the figure."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.ticker import NullLocator
from rich.console import Console
from support.markdown import frame_markdown
from support.organisms.check import LADDER

from harmcircuits.measurements import Rows
from harmcircuits.views.figures import PALETTE, STYLE, Picture, coloured, subplots, with_legend
from harmcircuits.views.tables import frame_table

BUDGET = 0.02  # nats that benign answers may lose
POINT = 0.01 + 1e-6  # that a kept rate may fall
CAP = 6.0  # nats
ENDED = 0.02  # valid harm
N_RESAMPLES = 10_000
ALIGNED = ("sft", "dpo")
DRAWN = ["search", "rounds", "search, one shot", "learned mask", "SSD, dampened", "random"]
KEPT = (
    "benign_valid_rate",
    "recognition_accuracy",
    "explanation_rate",
    "knowledge_rate",
    "refusal_rate",
    "borderline_valid_rate",
    "prefilled_valid_rate",
)

# One model and method


@dataclass(frozen=True)
class Taken:
    """What the masks of one model and method take."""

    sizes: Sequence[float]
    rates: Sequence[float]
    losses: Sequence[float]
    ends_at: float | None
    degenerate: float | None
    passes: float | None

    @property
    def rate(self) -> float:
        """The area of the rates."""
        return fmean(self.rates)

    @property
    def nats(self) -> float:
        """The area of the losses."""
        return fmean(self.losses)


def taken(rows: Rows) -> Taken:
    """What the masks of one model and method take."""
    sizes = sorted({float(row.labels["size"]) for row in rows if row.labels.get("size")})
    before = means(rows, 0.0)
    falls, rises = [], []
    ends_at = degenerate = None
    for size in sizes:
        now = means(rows, size)
        if not is_within_budget(before, now):
            falls.append(0.0)
            rises.append(0.0)
            continue
        falls.append(max(0.0, before["harm_valid_rate"] - now["harm_valid_rate"]))
        rise = min(CAP, now["harm_nll"] - before["harm_nll"])
        rises.append(max(0.0, rise))
        if ends_at is None and now["harm_valid_rate"] <= ENDED:
            ends_at = size
            degenerate = now["harm_degenerate_rate"]

    best_falls = list(accumulate(falls, max))
    best_rises = list(accumulate(rises, max))
    counted = rows.where("search_passes")
    passes = counted.one("search_passes").mean if counted else None
    return Taken(sizes, best_falls, best_rises, ends_at, degenerate, passes)


def means(rows: Rows, size: float) -> dict[str, float]:
    """Every metric of the mask of a size."""
    return {row.metric: row.mean for row in rows.where(size=size)}


def is_within_budget(before: Mapping[str, float], now: Mapping[str, float]) -> bool:
    """Whether a mask leaves everything else as it was; what was not measured is not kept."""
    for rate in KEPT:
        if rate not in before:
            continue
        if rate not in now or now[rate] < before[rate] - POINT:
            return False
    return now["benign_nll"] <= before["benign_nll"] + BUDGET


def cost_cells(before: Mapping[str, float], now: Mapping[str, float]) -> dict[str, str]:
    """What a mask costs everything else, and whether it ends harm, as cells of a table."""
    lost = max(before[rate] - now[rate] for rate in KEPT if rate in before)
    return {
        "kept rates fall by": f"{max(0, lost):.1%}",
        "benign loss": f"{now['benign_nll'] - before['benign_nll']:+.3f}",
        "ends": "yes" if now["harm_valid_rate"] <= ENDED else "no",
        "spares": "yes" if is_within_budget(before, now) else "no",
    }


# All of them

Key = tuple[str, str, str]  # ladder, model, part of the answers
Cases = dict[Key, Taken]


def by_method(rows: Rows) -> dict[str, Cases]:
    """Method -> case -> what its masks take."""
    cases: dict[str, Cases] = {}
    for (method, *key), of_case in rows.by("method", "ladder", "model", "part").items():
        ladder, model, part = map(str, key)
        of_method = cases.setdefault(str(method), {})
        of_method[ladder, model, part] = taken(of_case)
    return cases


def is_aligned(key: Key) -> bool:
    """Whether the model is tuned to refuse, or a user's own."""
    ladder, model, _ = key
    return model in ALIGNED or ladder == "own"


def is_main(key: Key) -> bool:
    """Whether the model is aligned, and searched with all of its answers."""
    _, _, part = key
    return part == "all" and is_aligned(key)


def table(rows: Rows, methods: Iterable[str]) -> pd.DataFrame:
    """A line for each method: aligned models of all ladders, searched with all answers."""
    cases_of = by_method(rows)
    lines = []
    for method in methods:
        cases = cases_of.get(method, {})
        aligned = {key: case for key, case in cases.items() if is_main(key)}
        if aligned:
            lines.append({"method": method, **method_cells(aligned)})
    return pd.DataFrame(lines)


def method_cells(cases: Cases) -> dict[str, str]:
    """The cells of a method."""
    ended = [case for case in cases.values() if case.ends_at is not None]
    sizes = [case.ends_at for case in ended if case.ends_at is not None]
    broken = [case.degenerate for case in ended if case.degenerate is not None]
    return {
        "area, nats": area_text({key: case.nats for key, case in cases.items()}),
        "area, rate": area_text({key: case.rate for key, case in cases.items()}),
        "ends harm in": f"{len(ended)} of {len(cases)}",
        "at": f"{min(sizes):.2%} to {max(sizes):.2%}" if sizes else "-",
        "degenerate there": f"{fmean(broken):.0%}" if broken else "-",
        "passes": passes_text(cases.values()),
    }


def case_table(rows: Rows) -> pd.DataFrame:
    """A line for each model and part of its answers: the search beside rounds."""
    cases_of = by_method(rows)
    both = cases_of["search"].keys() & cases_of["rounds"].keys()
    lines = []
    for key in sorted(both, key=place):
        ladder, model, part = key
        search = cases_of["search"][key]
        rounds = cases_of["rounds"][key]
        lines.append(
            {
                "ladder": ladder,
                "model": model,
                "answers": part,
                "nats": f"{search.nats:.2f}",
                "nats, rounds": f"{rounds.nats:.2f}",
                "rate": f"{search.rate:.2f}",
                "rate, rounds": f"{rounds.rate:.2f}",
                "ends at": percent(search.ends_at, 2),
                "degenerate there": percent(search.degenerate, 0),
                "rounds end at": percent(rounds.ends_at, 2),
                "passes": passes_text([search]),
            }
        )
    return pd.DataFrame(lines)


def place(key: Key) -> tuple[bool, str, int, bool, str]:
    """Where a case stands: the shipped ladder first, in its order, all answers before halves."""
    ladder, model, part = key
    rungs: list[str] = [*LADDER, model]
    return ladder != "shipped", ladder, rungs.index(model), part != "all", part


def passes_text(cases: Iterable[Taken]) -> str:
    """The mean number of passes."""
    counted = [case.passes for case in cases if case.passes is not None]
    return f"{fmean(counted):.0f}" if counted else "-"


def percent(value: float | None, digits: int) -> str:
    """A share as a percentage; a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}%}"


# Intervals


def times_rounds(rows: Rows) -> tuple[float, float, float]:
    """The search's area in nats over that of rounds, on aligned models; with its 95 % interval."""
    cases_of = by_method(rows)
    search, rounds = cases_of["search"], cases_of["rounds"]
    both = search.keys() & rounds.keys()
    paired = {key: (search[key].nats, rounds[key].nats) for key in both if is_aligned(key)}
    times = area_ratio(np.array(list(paired.values())))
    low, high = resampled(paired, area_ratio)
    return times, low, high


def area_ratio(areas: np.ndarray) -> float:
    """The sum of the first column over that of the second."""
    first, second = areas.sum(axis=0)
    return first / second


def times_text(rows: Rows) -> str:
    """`times_rounds` in words."""
    times, low, high = times_rounds(rows)
    return f"{times:.1f} [{low:.1f}, {high:.1f}] times the area of rounds"


def area_text(areas: Mapping[Key, float]) -> str:
    """The mean, with its interval where there are several ladders to draw from."""
    mean = f"{fmean(areas.values()):.2f}"
    if len({ladder for ladder, _, _ in areas}) == 1:
        return mean
    low, high = resampled(areas, np.mean)
    return f"{mean} [{low:.2f}, {high:.2f}]"


def resampled(
    values: Mapping[Key, Any],
    statistic: Callable[[np.ndarray], Any],
) -> tuple[float, float]:
    """95 % interval: ladders are drawn anew, and of each its models and parts."""
    by_ladder: dict[str, list[Any]] = {}
    for (ladder, _, _), value in sorted(values.items()):
        by_ladder.setdefault(ladder, []).append(value)
    ladders = [np.array(of_ladder) for of_ladder in by_ladder.values()]

    rng = np.random.default_rng(0)
    statistics = []
    for _ in range(N_RESAMPLES):
        cases = []
        for number in rng.integers(len(ladders), size=len(ladders)):
            of_ladder = ladders[number]
            drawn = rng.integers(len(of_ladder), size=len(of_ladder))
            cases.append(of_ladder[drawn])
        statistics.append(statistic(np.concatenate(cases)))
    low, high = np.quantile(statistics, [0.025, 0.975])
    return float(low), float(high)


# The figure, and the files


@rc_context(STYLE)
def figure(rows: Rows) -> Picture:
    """Harm that goes by the best mask within budget against its size; mean of aligned models."""
    of_methods = by_method(rows)
    colours = coloured(DRAWN, PALETTE)
    figure, (panel,) = subplots(1, height=4.6)
    panel.set(xlabel="weights, %", ylabel="harm that goes, points", xscale="log")
    percents: set[float] = set()
    for method in (method for method in DRAWN if method in of_methods):
        falls = {100 * size: 100 * fall for size, fall in _falls(of_methods[method])}
        percents |= falls.keys()
        panel.plot(list(falls), list(falls.values()), "o-", color=colours[method], label=method)
    panel.set_xticks(sorted(percents), labels=[f"{percent:g}" for percent in sorted(percents)])
    panel.xaxis.set_minor_locator(NullLocator())
    return with_legend(figure)


def _falls(cases: Cases) -> list[tuple[float, float]]:
    """The sizes, and by how much valid harm falls at each; mean of aligned models."""
    aligned = [case for key, case in cases.items() if is_main(key)]
    sizes = aligned[0].sizes if aligned else ()
    falls = []
    for number, size in enumerate(sizes):
        falls.append((size, fmean(case.rates[number] for case in aligned)))
    return falls


def write_results(out: Path, rows: Rows, methods: Iterable[str], console: Console) -> None:
    """The tables and the figure as files, and the tables on a screen."""
    summary = table(rows, methods)
    if not summary.empty:  # as with halves of the answers alone
        (out / "summary.md").write_text(frame_markdown(summary) + "\n", encoding="utf-8")
        console.print(frame_table(summary))
        figure(rows).save(out / "figure.svg")
    if {"search", "rounds"} <= by_method(rows).keys():
        cases = case_table(rows)
        (out / "cases.md").write_text(frame_markdown(cases) + "\n", encoding="utf-8")
        console.print(frame_table(cases, n_names=3))
        console.print(times_text(rows), highlight=False)
