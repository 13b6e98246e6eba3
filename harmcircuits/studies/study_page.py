"""A study's page: from rows to lines, from lines to figures and tables, from these to HTML."""

from pathlib import Path

from plotly.graph_objects import Figure

from harmcircuits.measurements import Rows
from harmcircuits.studies.diagnostics import SATURATED_NLL
from harmcircuits.studies.examples import Examples, examples_of
from harmcircuits.studies.grid import WAYS
from harmcircuits.studies.heldout import SAME_SIZE
from harmcircuits.studies.run import Study
from harmcircuits.studies.summary import (
    DIAGNOSTICS,
    GROUND_TRUTH,
    JUDGE,
    StudyLines,
    diagnostics_lines,
    tradeoff_lines,
)
from harmcircuits.studies.terms import Terms
from harmcircuits.views.circuitsvis import (
    Visual,
    attention_heads,
    circuitsvis_script,
    coloured_tokens,
)
from harmcircuits.views.figures import comparison_figure, location_figure, share_figure
from harmcircuits.views.page import paragraphs, plot, section, table, write_page
from harmcircuits.views.tables import columns_of, interval_text, size_text

TABLE_TEXT = """Rates in per cent, losses in nats per token, 95 % intervals in small print. Search:
the chosen circuit. One shot: scored once, at the same price and by the same check. Published: the
set difference of arXiv 2604.09544, p = 5 q. Each is at its own operating point; "same size": none
of its masks keeps everything else and takes anything, so this is the one of about the search's
size. Random, opposite sign (weights whose removal should lower the loss), second slice (the best
ones outside the circuit) and twin (the same search with the counterpart as the target, and the
target protected) are matched to the chosen circuit. Predicted Δ: the sum of first-order scores over
the mask; measured Δ: the change it really makes to the calibration loss. Far apart, the scores of
the unpruned model do not describe the edit."""
TRUST_TEXT = f"""Scores are taken on the model's own answers to calibration requests, kept where the
judge verifies them. Below {SATURATED_NLL} nats per token a loss is saturated and its gradients are
noise."""
JUDGE_TEXT = """Own answers of the unpruned model, as the local rules label them: harmful ones told
from refusals, explanations of why the same requests are harmful ("same topic"), benign answers, and
benign ones begun alike. AUROC: the chance that a harmful answer scores higher; of a judge that is
trained, cross-validated by request; of one that gives verdicts only, the mean of the shares of
harmful and of harmless answers that it gets right. It is used where the lower end of the interval
is at least 0.8 over all of them, over the same topic, over explanations alone, and over answers
begun alike; else the local rules judge, and harm is read from the loss alone."""
COMPARISON_TEXT = """Held-out requests; the chosen circuit is that of the search. Bars: 95 %
intervals that count each item once."""
TRADEOFF_TEXT = """Measured on requests used only for choosing the size. Random weights and those of
the opposite sign are as many as the search's. Worst kept ability: the lowest of the kept rates."""
LOCATION_TEXT = """Number of weights that the chosen circuit (search) removes from each matrix;
colour: their share of the matrix."""
TOKENS_TEXT = """Reference answers to held-out requests. Red tokens lose log-probability without the
chosen circuit (search), blue ones gain."""
ANSWERS_TEXT = """Answers to held-out requests, and the judge's verdict on those without the chosen
circuit (search)."""
HEADS_TEXT = """The heads that lose most query and output weights to the chosen circuit (search), on
one request of the target with its reference answer."""


def write_study_page(study: Study, path: str | Path) -> None:
    """Write the page of a finished study.

    Summary, comparison, every figure, trade-off, location, tokens, answers, attention, diagnostics.
    Texts of examples are shown only where the model's words are invented.

    Args:
        study: what to show.
        path: the file to write.
    """
    rows, terms, chosen = study.rows, study.terms, study.chosen
    lines = StudyLines.of(rows, terms)
    title = f"The weights behind {terms.target.name} answers in {study.model.name}"
    if chosen is None:
        _write(path, title, lines, terms, [], None)
        return
    figures = _figures(lines, terms)
    examples = None
    if study.model.is_invented:
        examples = examples_of(study.model, chosen.mask, terms, rows)
    _write(path, title, lines, terms, figures, examples)


def tradeoff_figure(rows: Rows, terms: Terms) -> Figure:
    """The target and the worst kept ability against the share of weights removed (choice split).

    Curves: the search, one shot, the published set difference, random weights, the opposite sign.
    Bars are 95 % intervals.

    Args:
        rows: of a study.
        terms: what they are called.
    """
    lines = tradeoff_lines(rows)
    return share_figure(lines, _panels(terms), kept=terms.kept_rates)


def diagnostics_table(rows: Rows) -> str:
    """Whether the scores of every behaviour can be used, as an HTML table."""
    return table(DIAGNOSTICS, diagnostics_lines(rows))


def _panels(terms: Terms) -> dict[str, str]:
    """Metric -> title of its panel in the trade-off."""
    target = terms.target
    return {
        target.metric: f"valid {target.name} answers",
        target.nll_metric: f"{target.title} NLL, nats per token",
    }


def _figures(lines: StudyLines, terms: Terms) -> list[Figure]:
    """The comparison of masks, the trade-off, and where the removed weights sit."""
    # Few enough for bars side by side; the table has every line.
    drawn = ["unpruned", "random", terms.twin]
    for way in WAYS:
        drawn += [way, f"{way}, {SAME_SIZE}"]
    compared = {name: rows for name, rows in lines.held_out.items() if name in drawn}
    rates, panels, kept = terms.rates, _panels(terms), terms.kept_rates
    return [
        comparison_figure(compared, rates),
        share_figure(lines.tradeoff, panels, kept=kept),
        location_figure(lines.location),
    ]


def _cells(lines: StudyLines, terms: Terms) -> tuple[list[str], list[list[str]]]:
    """Titles of columns, and a line of texts for each mask: every held-out figure."""
    rates = columns_of(lines.held_out, terms.rates)
    losses = columns_of(lines.held_out, terms.losses)
    body = []
    for name, rows in lines.held_out.items():
        cells = [name, size_text(rows)]
        cells += [interval_text(rows, metric, is_rate=True) for metric in rates]
        cells += [interval_text(rows, metric, is_rate=False) for metric in losses]
        body.append(cells)
    return ["mask", "weights", *rates.values(), *losses.values()], body


def _token_views(examples: Examples) -> dict[str, list[Visual]]:
    views = {}
    for name, texts in examples.tokens.items():
        # One scale for a behaviour, so that its examples can be compared; above 0, even where the
        # mask changes nothing.
        largest = max(values.abs().max().item() for _, values in texts)
        largest = max(largest, 1e-6)
        views[name] = []
        for tokens, values in texts:
            views[name].append(coloured_tokens(tokens, values, largest=largest))
    return views


def _attention(examples: Examples) -> dict[str, Visual]:
    text, heads = examples.text, examples.heads
    return {
        "unpruned": attention_heads(text, examples.unpruned, heads),
        "masked": attention_heads(text, examples.pruned, heads),
    }


def _write(
    path: str | Path,
    title: str,
    lines: StudyLines,
    terms: Terms,
    figures: list[Figure],
    examples: Examples | None,
) -> None:
    """Everything as one HTML file, in the order in which a reader asks."""
    head, body = _cells(lines, terms)
    tokens = attention = ""
    if examples is not None:
        tokens, attention = _tokens_html(examples), _attention_html(examples)

    # Where no mask was chosen, only the summary and the diagnostics are left.
    sections = [paragraphs(lines.summary)]
    if figures:
        comparison, tradeoff, location = figures
        sections += [
            section("What goes and what stays", COMPARISON_TEXT, plot(comparison, first=True)),
            section("Every figure", TABLE_TEXT, table(head, body, style="figures")),
            section("The trade-off", TRADEOFF_TEXT, plot(tradeoff)),
            section("Where the removed weights sit", LOCATION_TEXT, plot(location)),
        ]
    if examples is not None:
        columns = ("request", "unpruned", "masked", "verdict")
        answers = table(columns, examples.answers)
        sections += [
            section("Which tokens lose probability", TOKENS_TEXT, tokens),
            section("What the model says", ANSWERS_TEXT, answers),
            section("Attention of the most pruned heads", HEADS_TEXT, attention),
        ]
    if lines.ground_truth:
        content = table(["score", *GROUND_TRUTH.values()], lines.ground_truth, style="figures")
        text = "Chance is 0.5 for both areas."
        sections.append(section("Against the planted circuit", text, content))
    if lines.judge:
        judged = table(JUDGE, lines.judge)
        sections.append(section("Can the judge be trusted?", JUDGE_TEXT, judged))
    diagnosed = table(DIAGNOSTICS, lines.diagnostics)
    sections.append(section("Can the scores be trusted?", TRUST_TEXT, diagnosed))
    write_page(path, title, sections, script=circuitsvis_script())


def _tokens_html(examples: Examples) -> str:
    html = ""
    for name, views in _token_views(examples).items():
        html += f"<h3>{name} answers</h3>"
        html += "".join(view.html() for view in views)
    return html


def _attention_html(examples: Examples) -> str:
    panels = []
    for title, view in _attention(examples).items():
        panels.append(f"<div><h3>{title}</h3>{view.html()}</div>")
    return f'<div class="pair">{"".join(panels)}</div>'
