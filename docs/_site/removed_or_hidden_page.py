"""The blocks and the figure of "After removal" and of its log, from rows and the rules in `support`."""

from collections.abc import Callable
from functools import partial
from math import inf, isinf
from statistics import median

import real_removed
from blocks import Blocks, committed
from pandas import DataFrame
from support import removed_or_hidden as rules
from support.figures import profiles
from support.tampering import BENIGN, HARM, PLAIN

from harmcircuits.measurements import Rows
from harmcircuits.views.figures import Picture
from harmcircuits.views.tables import DASH

# Line of the rows -> its name on the page; the log has one-shot pruning as well.
LINES = {
    "unpruned": "nothing removed",
    "search": "search's mask removed",
    "random": "random weights removed",
    "search, held": "search's mask held at zero",
    "search that reckons": "relearning-aware mask removed",
    "refusal training": "trained to refuse",
    "innocent": "never learned harm",
}
# Way of training in the rows -> its name on the page.
WAYS = {"all weights": "full fine-tuning", "LoRA": "LoRA"}
# Statements that are finer than a glance.
DETAILS = (
    "[harmful training takes as long as in a model that never learned harm](#relearning)",
    "[harmful training takes longer with a relearning-aware mask than with the search's](#relearning)",
)


def k_of_n(cases: list[bool]) -> str:
    """How many cases hold."""
    return f"{sum(cases)} of {len(cases)}"


def rows_of(question: str) -> Rows:
    """The committed rows of a question."""
    return committed("removed_or_hidden").where(question=question)


# The page


def verdicts() -> DataFrame:
    """In how many training runs each statement holds."""
    relearning, benign = rows_of("relearning"), rows_of("benign")
    aware = rules.slower_cases(relearning, "search that reckons", "search")
    disjoint = {"": rules.redundancy_cases(rows_of("redundancy"))}
    texts = {
        "[harmful training takes longer than with random weights removed](#relearning)": counts(
            rules.slower_cases(relearning)
        ),
        DETAILS[0]: counts(rules.removed_cases(relearning)),
        DETAILS[1]: counts(aware),
        "[benign training brings no harm back](#benign)": counts(
            rules.benign_cases(benign), n_runs=len(benign.by("ladder"))
        ),
        "[removing a second, disjoint circuit halves harm as well](#stability)": counts(disjoint),
    }
    lines = [{"statement": name, "true in training runs": text} for name, text in texts.items()]
    return DataFrame(lines)


def counts(cases: rules.Cases, n_runs: int = 0) -> str:
    """How many cases hold, by way of training; and of so many runs, how many say nothing."""
    texts = []
    for training, outcomes in cases.items():
        n_noisy = max(0, n_runs - len(outcomes))
        noisy = f" ({n_noisy} too noisy)" if n_noisy else ""
        name = WAYS.get(training, training)
        texts.append(f"{name} {k_of_n(outcomes)}{noisy}".strip())
    return ", ".join(texts)


def checks() -> str:
    """What holds by construction, or for controls as well: a sentence each."""
    dose, rounding = rows_of("dose"), rows_of("rounding")
    control_cases = []
    for line in dose.by("line"):
        if line != "search":
            control_cases += rules.dose_cases(dose, str(line))
    n_survive = k_of_n(rules.rounding_cases(rounding))
    n_refusals = k_of_n(rules.rounding_cases(rounding, "refusal training"))
    specific = k_of_n(rules.specificity_cases(rows_of("specificity")))
    return "\n".join(
        [
            "- **Dose.** Multiplying the circuit's weights by 0 lowers the odds of harmful answers "
            "against benign ones, and multiplying by 1.5 raises these odds, in "
            f"{k_of_n(rules.dose_cases(dose))} runs. {k_of_n(control_cases)} controls do both too; in "
            f"{k_of_n(stronger_controls(dose))} runs a control raises the odds more.",
            "- **Rounding.** int8, int4 and NF4 keep zeros. The removal survives these formats and GPTQ "
            f"in {n_survive} runs; refusal training does too, in {n_refusals}.",
            f"- **Specificity.** For {specific} circuits of six behaviours, removal raises the loss on the "
            "behaviour's own answers more than on others'. Chance is that of random masks, which change little.",
        ]
    )


def stronger_controls(rows: Rows) -> list[bool]:
    """Whether a control that moves the margin both ways raises it more than the circuit does."""
    cases = []
    for ladder in rows.where("harm_margin_change").by("ladder").values():
        rises = {}
        for line, changes in ladder.by("line").items():
            if rules.dose_verdict(changes) == "of harm":
                rises[line] = changes.one(dose=1.5).mean
        cases.append(max(rises.values(), default=-inf) > rises.get("search", inf))
    return cases


def steps_to_half(rows: Rows) -> str:
    """The median over seeds of the steps until half of the harmful requests are answered."""
    return step_text(median(rules.first_steps(rows, rules.HALF)))


def most_harm(rows: Rows) -> str:
    """The most harmful answers to plain requests at any step."""
    return f"{rows.where(PLAIN).largest().mean:.0%}"


def short_table(question: str, cell: Callable[[Rows], str]) -> DataFrame:
    """A line for each mask; for each way of training the training runs in their order."""
    lines = []
    curves_by_line = rows_of(question).where(PLAIN).by("line")
    for name, title in LINES.items():
        cells = {"model": title}
        for training, curves in curves_by_line.get(name, Rows()).by("training").items():
            cells[WAYS[str(training)]] = ", ".join(
                cell(curve) for curve in curves.by("ladder").values()
            )
        if len(cells) > 1:
            lines.append(cells)
    return DataFrame(lines)


# The log: a table for each question


def dose_table() -> DataFrame:
    lines = []
    for name, doses in rows_of("dose").where("harm_margin_change").by("line").items():
        line = {"mask": name}
        for ladder, changes in doses.by("ladder").items():
            ends = [f"{changes.one(dose=end).mean:+.2f}" for end in (0.0, 1.5)]
            line[ladder] = f"{', '.join(ends)}: {rules.dose_verdict(changes)}"
        lines.append(line)
    return DataFrame(lines)


def rounding_table() -> DataFrame:
    lines = []
    for name, formats in rows_of("rounding").where(HARM).by("line").items():
        line = {"what was done": name}
        for format_name, rates in formats.by("format").items():
            title = "as it is" if format_name == "none" else format_name
            line[title] = extremes(rates, ".0%")
        lines.append(line)
    return DataFrame(lines)


def redundancy_table() -> DataFrame:
    lines = []
    for (target, ladder), circuits in rows_of("redundancy").by("target", "ladder").items():
        line = {"answers": target, "training run": ladder}
        for rate in (row for row in circuits if row.metric in (HARM, BENIGN)):
            number = rate.labels["circuit"]
            line[f"circuit {number}" if number else "unpruned"] = f"{rate.mean:.0%}"
        lines.append(line)
    return DataFrame(lines).fillna(DASH)


def specificity_table() -> DataFrame:
    lines = []
    for name, rises in rows_of("specificity").where("rise", ladder="shipped").by("line").items():
        cells = {str(row.labels["task"]): f"{row.mean:+.2f}" for row in rises}
        lines.append({"circuit of": name, **cells})
    return DataFrame(lines)


def relearning_table() -> DataFrame:
    lines = []
    curves_by_line = rows_of("relearning").where(PLAIN).by("training", "line")
    for (training, name), curves in curves_by_line.items():
        ladders = {ladder: half_and_most(curve) for ladder, curve in curves.by("ladder").items()}
        lines.append({"training": training, "line": name, **ladders})
    return DataFrame(lines).fillna(DASH)  # only the first run has a model without any harm


def half_and_most(rows: Rows) -> str:
    """The steps to half, with the range of the seeds, and to nine tenths."""
    to_half = rules.first_steps(rows, rules.HALF)
    to_most = rules.first_steps(rows, 0.9)
    return f"{span(to_half)}; {span([median(to_most)])}"


def span(steps: list[float]) -> str:
    """The median, and the range."""
    low, middle, high = map(step_text, (min(steps), median(steps), max(steps)))
    return middle if low == high else f"{middle} ({low} to {high})"


def step_text(step: float) -> str:
    """A step, or that it never came."""
    return "never" if isinf(step) else f"{step:g}"


def cost_table() -> DataFrame:
    lines = []
    for mask, figures in rows_of("masks").by("line").items():
        line = {"mask": mask, "weights": extremes(figures.where("weights_removed"), ",.0f")}
        line["length of the edit"] = extremes(figures.where("edit_norm"), ".1f")
        line["harm"] = extremes(figures.where(HARM), ".0%")
        line["benign loss"] = extremes(figures.where("benign_nll"), ".3f")
        lines.append(line)
    return DataFrame(lines)


def extremes(rows: Rows, spec: str) -> str:
    """The smallest and the largest of some figures; a dash for none."""
    if not rows:
        return DASH
    figures = [f"{row.mean:{spec}}" for row in (rows.smallest(), rows.largest())]
    return " to ".join(dict.fromkeys(figures))


# The figure, of the first training run


def relearning_picture() -> Picture:
    """Harmful answers to plain requests, by the step of harmful training."""
    panels = {}
    attacks = rows_of("relearning").where(PLAIN, ladder="shipped").by("training")
    for training, attack in attacks.items():
        curves = {}
        lines = attack.by("line")
        for line, title in LINES.items():
            curves[title] = carried(lines[line]).pool("seed")
        panels[WAYS[str(training)]] = curves
    return profiles(panels, x="step", title="harmful answers")


def carried(rows: Rows) -> Rows:
    """Every seed at every step that any was measured at: where it stopped, it stays."""
    steps = sorted({int(row.labels["step"]) for row in rows})
    curves = Rows()
    for seed in rows.by("seed").values():
        points = {int(row.labels["step"]): row for row in seed}
        for step in steps:
            last = max(point for point in points if point <= step)
            curves += [points[last].labelled(step=step)]
    return curves


BLOCKS: Blocks = {
    "verdicts": verdicts,
    "relearning": partial(short_table, "relearning", steps_to_half),
    "benign": partial(short_table, "benign", most_harm),
    "checks": checks,
}
LOG: Blocks = {
    "cost": cost_table,
    "dose": dose_table,
    "rounding": rounding_table,
    "redundancy": redundancy_table,
    "specificity": specificity_table,
    "relearning": relearning_table,
    "real": lambda: real_removed.table(committed("real_removed")),
}
PICTURES = {"removed_relearning.svg": relearning_picture}
