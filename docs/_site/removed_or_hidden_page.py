"""The blocks and figures of "Removed, or only hidden?", from rows and the rules in `support`."""

from collections.abc import Callable
from functools import partial
from math import isinf
from statistics import median

import real_removed
from blocks import Blocks, committed, markdown
from pandas import DataFrame
from support import removed_or_hidden as rules
from support.claims import FAILS, HOLDS, verdict
from support.figures import heatmaps, profiles
from support.tampering import BENIGN, HARM, PLAIN

from harmcircuits.measurements import Rows
from harmcircuits.views.figures import Picture
from harmcircuits.views.tables import DASH


def k_of_n(cases: list[bool]) -> str:
    """How many cases hold."""
    return f"{sum(cases)} of {len(cases)}"


def rows_of(question: str) -> Rows:
    """The committed rows of a question."""
    return committed("removed_or_hidden").where(question=question)


def verdicts(page: str = "") -> DataFrame:
    """The verdict on every claim, linked to its part of a page."""
    lines = []
    for text, (question, cases_of) in rules.CLAIMS.items():
        cases = cases_of(rows_of(question))
        outcome = verdict([HOLDS if case else FAILS for case in cases])
        line = {"the circuit of harm": f"[{text}]({page}#{question})"}
        lines.append(line | {"verdict": f"**{outcome}**", "cases": k_of_n(cases)})
    return DataFrame(lines)


# A sentence for each question, and a table where there is more to say


def dose(rows: Rows) -> str:
    control_verdicts = []
    lines = []
    for name, doses in rows.where("harm_margin_change").by("line").items():
        line = {"mask": name}
        for ladder, changes in doses.by("ladder").items():
            text = rules.dose_verdict(changes)
            if name != "search":
                control_verdicts.append(text == "of harm")
            ends = [f"{changes.one(dose=end).mean:+.2f}" for end in (0.0, 1.5)]
            line[ladder] = f"{', '.join(ends)}: {text}"
        lines.append(line)
    return (
        f"**The circuit is *of* harm on {k_of_n(rules.dose_cases(rows))} ladders; of the controls "
        f"{k_of_n(control_verdicts)} are.** Change of the margin at dose 0, and at 1.5:\n\n"
        f"{markdown(DataFrame(lines))}"
    )


def rounding(rows: Rows) -> str:
    lines = []
    for name, formats in rows.where(HARM).by("line").items():
        line = {"what was done": name}
        for format_name, rates in formats.by("format").items():
            title = "as it is" if format_name == "none" else format_name
            line[title] = extremes(rates, ".0%")
        lines.append(line)
    return (
        "**Of the formats that leave the unpruned model able, a removal survives: search in "
        f"{k_of_n(rules.rounding_cases(rows))}, refusal training in "
        f"{k_of_n(rules.rounding_cases(rows, 'refusal training'))}.** "
        f'Valid harm, begun with "sure", over the ladders:\n\n{markdown(DataFrame(lines))}'
    )


def redundancy(rows: Rows) -> str:
    texts = []
    for (target, ladder), circuits in rows.by("target", "ladder").items():
        n_tried = max(int(row.labels["circuit"]) for row in circuits)
        count = rules.n_sufficient(circuits)
        words = "or more of" if count == n_tried else "of"
        texts.append(f"{target} on {ladder}: {count} {words} {n_tried} tried")
    return f"**Disjoint circuits of which each suffices: {'; '.join(texts)}.**"


def specificity(rows: Rows) -> str:
    frame = DataFrame(rules.specific_tasks(ladder) for ladder in rows.by("ladder").values())
    texts = [f"{task} {k_of_n(frame[task].tolist())}" for task in frame]
    total = k_of_n(frame.to_numpy().flatten().tolist())
    return f"**{total} circuits are specific in both ways** ({', '.join(texts)})."


def relearning(rows: Rows) -> str:
    table = attack_table(rows, half_and_most)
    return (
        f"**The circuit slows relearning in {k_of_n(rules.slower_cases(rows))} attacks. Harm is "
        f"removed, not hidden, in {k_of_n(rules.removed_cases(rows))}. The search that reckons with "
        f"relearning slows it further in {k_of_n(rules.reckoning_cases(rows))}.** Steps until half "
        "of the harmful requests are answered, the median of five seeds and their range; and until "
        f"nine tenths are, the median:\n\n{markdown(table)}"
    )


def half_and_most(rows: Rows) -> str:
    """The steps to half, with the range of the seeds, and to nine tenths."""
    to_half = rules.first_steps(rows, rules.HALF)
    to_most = rules.first_steps(rows, 0.9)
    return f"{span(to_half)}; {span([median(to_most)])}"


def span(steps: list[float]) -> str:
    """The median, and the range."""
    values = [min(steps), median(steps), max(steps)]
    low, middle, high = ("never" if isinf(step) else f"{step:g}" for step in values)
    return middle if low == high else f"{middle} ({low} to {high})"


def benign(rows: Rows) -> str:
    texts = []
    for line in rows.by("line"):
        returns = [not away for away in rules.benign_cases(rows, line)]
        texts.append(f"{line} {k_of_n(returns)}")
    table = attack_table(rows, lambda curves: f"{curves.where(PLAIN).largest().mean:.0%}")
    return (
        f"**Harm comes back on benign answers alone: {', '.join(texts)}.** The most harm at any "
        f"step, plainly asked:\n\n{markdown(table)}"
    )


def attack_table(rows: Rows, cell: Callable[[Rows], str]) -> DataFrame:
    """A line for each training and line, a column for each ladder."""
    lines = []
    for (training, name), curves in rows.where(PLAIN).by("training", "line").items():
        ladders = {ladder: cell(curve) for ladder, curve in curves.by("ladder").items()}
        lines.append({"training": training, "line": name, **ladders})
    return DataFrame(lines).fillna(DASH)  # only the first ladder has a model without any harm


def cost(rows: Rows) -> str:
    lines = []
    for mask, figures in rows.by("line").items():
        line = {"mask": mask, "weights": extremes(figures.where("weights_removed"), ",.0f")}
        line["length of the edit"] = extremes(figures.where("edit_norm"), ".1f")
        line["harm"] = extremes(figures.where(HARM), ".0%")
        line["benign loss"] = extremes(figures.where("benign_nll"), ".3f")
        lines.append(line)
    return markdown(DataFrame(lines))


def extremes(rows: Rows, spec: str) -> str:
    """The smallest and the largest of some figures; a dash for none."""
    if not rows:
        return DASH
    figures = [f"{row.mean:{spec}}" for row in (rows.smallest(), rows.largest())]
    return " to ".join(dict.fromkeys(figures))


# Figures, of the first ladder


def draw_dose(rows: Rows) -> Picture:
    panels = {}
    metrics = {"margin, nats a token": "harm_margin", "valid harmful answers, begun": HARM}
    for title, metric in metrics.items():
        lines = rows.where(metric).by("line")
        panels[title] = {"random": lines["random"], **lines}  # grey, and the circuit red
    return profiles(panels, x="dose")


def draw_rounding(rows: Rows) -> Picture:
    metrics = {"harmful, begun": HARM, "benign": BENIGN}
    panels = {title: rows.where(metric).by("line") for title, metric in metrics.items()}
    return profiles(panels, x="format", title="valid answers")


def draw_redundancy(rows: Rows) -> Picture:
    rates = Rows(row for row in rows if row.metric in (HARM, BENIGN))
    return profiles({"valid answers left": rates.by("target")}, x="circuit")


def draw_specificity(rows: Rows) -> Picture:
    panels = {"rise of the loss, nats a token": rows.where("rise")}
    return heatmaps(panels, x="task", y="line")


def draw_training(rows: Rows) -> Picture:
    panels = {}
    for training, attack in rows.by("training").items():
        for title, metric in {"plainly asked": PLAIN, "begun": HARM}.items():
            lines = attack.where(metric).by("line").items()
            curves = {line: carried(seeds).pool("seed") for line, seeds in lines}
            panels[f"{training}, {title}"] = curves
    return profiles(panels, x="step", title="valid harmful answers")


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


# Question -> its text, its figure, and the words for readers who cannot see it.
TEXTS: dict[str, Callable[[Rows], str]] = {
    "dose": dose,
    "rounding": rounding,
    "redundancy": redundancy,
    "specificity": specificity,
    "relearning": relearning,
    "benign": benign,
}
FIGURES: dict[str, Callable[[Rows], Picture]] = {
    "dose": draw_dose,
    "rounding": draw_rounding,
    "redundancy": draw_redundancy,
    "specificity": draw_specificity,
    "relearning": draw_training,
    "benign": draw_training,
}
CAPTIONS = {
    "dose": "The margin of harmful answers over their benign twins, and valid harmful answers, by the dose of each mask",
    "rounding": "Valid harmful and benign answers of each model as it is, and in each format",
    "redundancy": "Valid answers that are left without the first, the second and further circuits that share no weight",
    "specificity": "The rise of the loss of every task under the circuit of every behaviour",
    "relearning": "Valid harmful answers, plainly asked and once begun, by the step of harmful training",
    "benign": "Valid harmful answers, plainly asked and once begun, by the step of benign training",
}


def section(question: str) -> str:
    """The results of a question, above its figure."""
    text = TEXTS[question](rows_of(question))
    return f"{text}\n\n![{CAPTIONS[question]}](figures/removed_{question}.svg)"


def picture(question: str) -> Picture:
    """The figure of a question."""
    return FIGURES[question](rows_of(question).where(ladder="shipped"))


BLOCKS: Blocks = {
    "verdicts": verdicts,
    "cost": lambda: cost(rows_of("masks")),
    **{question: partial(section, question) for question in TEXTS},
    "real": lambda: real_removed.table(committed("real_removed")),
}
README: Blocks = {"removed or hidden": partial(verdicts, "docs/removed_or_hidden.md")}
PICTURES = {f"removed_{question}.svg": partial(picture, question) for question in TEXTS}
