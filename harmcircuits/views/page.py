"""A study as one HTML file that needs no network."""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template

from plotly.graph_objects import Figure

from harmcircuits.hooks.masking import masked
from harmcircuits.measurements import Measurement, select
from harmcircuits.prompts import PromptSet
from harmcircuits.studies.study import Point, Study
from harmcircuits.views.figures import (
    attention_views,
    circuitsvis_script,
    comparison_figure,
    location_figure,
    lost_tokens,
    tradeoff_figure,
)
from harmcircuits.views.tables import (
    LOSSES,
    RATES,
    RECOVERY,
    SATURATED_NLL,
    figure_text,
    held_out_lines,
    size_text,
    verdict,
)

N_EXAMPLES, N_HEADS = 4, 4
DRAWN = ("unpruned", "circuit, in rounds", "circuit, one shot", "random", "benign twin")

TABLE_TEXT = """Rates in per cent, losses in nats per token, 95 % intervals in small print. Predicted Δ: the sum of
first-order scores over the mask; measured Δ: the change it really makes to the calibration loss. Far apart, the scores of
the unpruned model do not describe the edit. Benign twin: the same procedure with benign answers as the target and harmful
ones protected. Second slice: the next in the ranking. Opposite sign: weights whose removal should lower the loss."""
TRUST_TEXT = f"""Scores are taken on the model's own answers to calibration requests, kept where the judge verifies them.
Below {SATURATED_NLL} nats per token a loss is saturated and its gradients are noise."""
COMPARISON_TEXT = """Held-out requests. Harm is elicited by prefilling the beginning of the answer. Bars: 95 % intervals
that count each item once."""
TRADEOFF_TEXT = """Measured on requests used only for choosing the size. Worst kept ability: the lowest of benign answers,
recognition, explanation and knowledge. Protected for each kept behaviour: the top"""


def write_report(study: Study, path: str | Path) -> None:
    """Write verdict, comparison, trade-off, location, tokens, attention and diagnostics of a finished study.

    Texts and attention of examples are shown only where the subject's words are invented.
    """
    sections = [paragraphs(verdict(study.rows))]
    if study.chosen:
        sections += _figures(study, study.chosen)
        if study.subject.is_invented:
            sections += _looking_inside(study, study.chosen)
    if select(study.rows, "recovery_auroc"):
        sections.append(section("Against the planted circuit", "Chance is 0.5 for both areas.", _recovery(study.rows)))
    sections.append(section("Can the scores be trusted?", TRUST_TEXT, diagnostics_table(study.rows)))
    title = f"The weights behind harmful generation in {study.subject.name}"
    write_page(path, title, sections, script=circuitsvis_script())


def write_page(path: str | Path, title: str, sections: Sequence[str], *, script: str = "") -> None:
    """Write sections (see `section`) as one HTML file that needs no network; `script`: inline script tags they use."""
    page = Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))
    html = page.substitute(title=escape(title), body="\n".join(sections), script=script)
    Path(path).write_text(html, encoding="utf-8")


def _figures(study: Study, chosen: Point) -> list[str]:
    lines, p = held_out_lines(study.rows), float(chosen.labels["p"])
    comparison = comparison_figure({name: lines[name] for name in DRAWN if name in lines}, RATES)
    return [
        section("What goes and what stays", COMPARISON_TEXT, plot(comparison, first=True)),
        section("Every figure", TABLE_TEXT, _line_table(lines)),
        section("The trade-off", f"{TRADEOFF_TEXT} {p:.2%} of the weights.", plot(tradeoff_figure(study.rows, p=p))),
        section(
            "Where the removed weights sit",
            "Number of removed weights in each matrix; colour: their share of the matrix.",
            plot(location_figure(study.rows)),
        ),
    ]


def _looking_inside(study: Study, chosen: Point) -> list[str]:
    subject, mask = study.subject, chosen.mask
    tokens, answers = "", []
    for name in ("harmful", "benign"):
        behaviour = subject.behaviours[name]
        prompts = _spread(behaviour.prompts("heldout"))
        views = lost_tokens(subject.bridge, mask, subject.batches(behaviour, prompts)[0])
        tokens += f"<h3>{name} answers</h3>" + "".join(view.html() for view in views)
        before = subject.answered(behaviour, prompts)
        with masked(subject.bridge, mask):
            after = subject.answered(behaviour, prompts)
        for one, two in zip(before, after, strict=True):
            answers.append((one.prompt, one.completion, two.completion, subject.judge(two.prompt, two.completion)))
    harmful = subject.behaviours["harmful"]
    batch = subject.batches(harmful, _spread(harmful.prompts("heldout")))[0]
    attention = attention_views(subject.bridge, mask, batch, _most_pruned_heads(study.rows))
    pair = "".join(
        f"<div><h3>{title}</h3>{view.html()}</div>" for title, view in zip(("unpruned", "masked"), attention, strict=True)
    )
    return [
        section(
            "Which tokens lose probability",
            "Reference answers to held-out requests. Red tokens lose log-probability under the mask, blue ones gain.",
            tokens,
        ),
        section(
            "What the model says",
            "Greedy answers to held-out requests, and the judge's verdict on the masked ones.",
            table(("request", "unpruned", "masked", "verdict"), answers),
        ),
        section(
            "Attention of the most pruned heads",
            "The heads that lose most query and output weights, on one harmful request with its reference answer.",
            f'<div class="pair">{pair}</div>',
        ),
    ]


def _spread(prompts: PromptSet) -> PromptSet:
    return prompts[:: max(1, len(prompts) // N_EXAMPLES)][:N_EXAMPLES]


def _most_pruned_heads(rows: Sequence[Measurement]) -> list[tuple[int, int]]:
    lost: dict[tuple[int, int], float] = {}
    for row in select(rows, "weights_removed", by="head", kind="head"):
        head = (int(row.labels["layer"]), int(row.labels["index"]))
        lost[head] = lost.get(head, 0) + row.mean
    return sorted(lost, key=lambda head: -lost[head])[:N_HEADS]


def _line_table(lines: dict[str, list[Measurement]]) -> str:
    every = RATES | LOSSES
    columns = {m: name for m, name in every.items() if any(select(found, m) for found in lines.values())}
    body = [
        [name, size_text(found), *(_with_interval(found, metric) for metric in columns)] for name, found in lines.items()
    ]
    return table(("mask", "weights", *columns.values()), body, style="figures")


def _with_interval(found: list[Measurement], metric: str) -> str:
    rows = select(found, metric)
    if not rows or rows[0].low == rows[0].high:
        return figure_text(found, metric)
    scale, places = (100, 1) if metric in RATES else (1, 3)
    return f"{figure_text(found, metric)}\n{scale * rows[0].low:.{places}f} – {scale * rows[0].high:.{places}f}"


def _recovery(rows: Sequence[Measurement]) -> str:
    methods = [str(row.labels["method"]) for row in select(rows, "recovery_auroc")]
    body = [[m, *(f"{select(rows, metric, method=m)[0].mean:.3f}" for metric in RECOVERY)] for m in methods]
    return table(("score", *RECOVERY.values()), body, style="figures")


def diagnostics_table(rows: Sequence[Measurement]) -> str:
    """Yield, loss and gradient norm of every behaviour's calibration answers, and whether its scores can be used."""
    body = []
    for row in select(rows, "calibration_yield"):
        name = str(row.labels["behaviour"])
        nll, norm = (select(rows, metric, behaviour=name) for metric in ("calibration_nll", "gradient_norm"))
        if nll:
            state = "saturated" if nll[0].mean < SATURATED_NLL else "usable"
            body.append([name, f"{row.mean:.0%}", f"{nll[0].mean:.3f}", f"{norm[0].mean:.3f}", state])
        else:
            body.append([name, f"{row.mean:.0%}", "–", "–", "not shown by this model"])
    return table(("behaviour", "verified answers", "NLL", "gradient norm", "scores"), body)


def paragraphs(text: str) -> str:
    """Plain text as the result that opens a page: one paragraph a line."""
    return "".join(f'<p class="verdict">{escape(line)}</p>' for line in text.splitlines())


def table(head: Sequence[str], body: Iterable[Sequence[str]], *, style: str = "") -> str:
    """An HTML table of escaped texts; what follows a line break in a cell is set small below it."""

    def cell(text: str) -> str:
        figure, _, interval = text.partition("\n")
        return f"<td>{escape(figure)}{f'<small>{escape(interval)}</small>' if interval else ''}</td>"

    top = "".join(f"<th>{escape(text)}</th>" for text in head)
    rows = "".join(f"<tr>{''.join(cell(text) for text in row)}</tr>" for row in body)
    return f'<table class="{style}"><tr>{top}</tr>{rows}</table>'


def section(title: str, text: str, content: str) -> str:
    """A titled part of a page: a sentence or two, then HTML."""
    return f"<section><h2>{escape(title)}</h2><p>{escape(text)}</p>{content}</section>"


def plot(figure: Figure, *, first: bool = False) -> str:
    """A figure as HTML; the page's first one brings the plotting script."""
    config = {"displayModeBar": False, "responsive": True}
    return figure.to_html(full_html=False, include_plotlyjs=first, config=config)
