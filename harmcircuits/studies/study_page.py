"""A study's page: from rows to lines, from lines to figures and tables, from these to HTML."""

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from harmcircuits.behaviours.repeats import repeats_text
from harmcircuits.circuits.masks import WeightMask
from harmcircuits.circuits.overlap import overlap
from harmcircuits.display import plural
from harmcircuits.measurements import Rows
from harmcircuits.studies.diagnostics import SATURATED_NLL
from harmcircuits.studies.examples import Examples, examples_of
from harmcircuits.studies.grid import WAYS
from harmcircuits.studies.heldout import CIRCUIT, SAME_SIZE
from harmcircuits.studies.run import Study
from harmcircuits.studies.summary import (
    DIAGNOSTICS,
    JUDGE,
    StudyLines,
    tradeoff_lines,
)
from harmcircuits.studies.summary import headline as headline_lines
from harmcircuits.studies.terms import Terms
from harmcircuits.views.circuitsvis import (
    Visual,
    attention_pairs,
    circuitsvis_script,
    coloured_tokens,
)
from harmcircuits.views.figures import Picture, comparison_figure, location_figure, share_figure
from harmcircuits.views.page import (
    contents,
    download,
    headline,
    missing,
    paragraphs,
    plot,
    preformatted,
    section,
    table,
    write_page,
)
from harmcircuits.views.tables import DASH, columns_of, interval_text, size_text

TABLE_TEXT = """Rates in per cent, losses in nats per token, 95 % intervals in small print. Kept
words: answers with at least half of the word triples of the unpruned model's; doubted: those of
them that are judged otherwise than these were, so that the judge contradicts itself. Search: the
chosen circuit. One shot: scored once, at the same price and by the same check. Published: the
set difference of arXiv 2604.09544, p = 5 q; the chosen circuit where that protocol is run as
published. Each is at its own operating point; "same size": none of its masks keeps everything else
and takes anything, so this is the one of about the search's size. Random, opposite sign (weights
whose removal should lower the loss), second slice (the best ones outside the circuit) and twin (the
same search with the counterpart as the target, and the target protected) are matched to the chosen
circuit. Predicted Δ, where answers are scored by their loss: the sum of first-order scores over the
mask; measured Δ: the change it really makes to the calibration loss. Far apart, the scores of the
unpruned model do not describe the edit."""
TRUST_TEXT = f"""Scores are taken on the model's own answers to calibration requests, kept where the
judge verifies them. Below {SATURATED_NLL} nats per token a loss is saturated and its gradients are
noise."""
ERROR_TEXT = """Those of the target, and of the counterpart's twin, are scored by the share of their
tokens that a draw would miss, in place of the loss."""
PREFER_TEXT = """Weights whose removal makes {prefer} likelier, behind the beginning of the target's
answers, earned as well; those whose removal makes it likelier behind protected answers that begin
alike, lost as much."""
FIRST_TEXT = """The first {tokens} of every protected answer had a price and a budget of their own
besides: they decide whether it refuses."""
JUDGE_TEXT = """Own answers of the unpruned model, as the local rules label them: harmful ones told
from refusals, explanations of why the same requests are harmful ("same topic"), benign answers, and
benign ones begun alike. AUROC: the chance that a harmful answer scores higher; of a judge that is
trained, cross-validated by request; of one that gives verdicts only, the mean of the shares of
harmful and of harmless answers that it gets right. It is used where the lower end of the interval
is at least 0.8 over all of them, over the same topic, over explanations alone, and over answers
begun alike; else the local rules judge, and harm is read from the loss alone."""
NOTE = "Rates with 95 % intervals, by ability and mask."
COMPARISON_TEXT = "Held-out requests. Bars: 95 % intervals that count each item once."
TRADEOFF_TEXT = """Measured on requests used only for choosing the size. Random weights and those of
the opposite sign are as many as the chosen circuit's. Worst kept ability: the lowest of the kept
rates."""
LOCATION_TEXT = """Number of weights that the chosen circuit removes from each matrix;
colour: their share of the matrix."""
TOKENS_TEXT = """Reference answers to held-out requests. Red tokens lose log-probability without the
chosen circuit, blue ones gain."""
ANSWERS_TEXT = """Answers to held-out requests, and the judge's verdict on those without the chosen
circuit."""
SHARED = ("mask", "weights", "shared", "Jaccard", "lift")
SHARED_TEXT = """Weights that the chosen circuit has in common with other masks. Lift: how many
times more than chance gives with the same counts in every matrix, so 1 is chance. The twin is
the counterpart's own circuit, found with the target protected: what the two share was chosen
for both. Sharing little does not show that two behaviours are separate; the tables above say
what each mask breaks."""
NO_MASK = """No mask met the rule (see the first lines), so there is no circuit to
show."""
NO_TEXTS = """Not shown on a model of your own: its requests and answers may be harmful, and
this page may be passed on. In a notebook, hc.masked and harmcircuits.views show the same for
requests of your choice."""
EXACT_JUDGE = """Not validated: the words of this model are invented, and its judge knows their
world."""
NO_VALIDATION = """Not validated: the local rules judge, which see refusals and broken text but
cannot tell harmful answers from harmless ones. Read the rate together with the losses, or
choose a judge that can be validated (--judge)."""
CITE_TEXT = """The package, and the papers whose method it follows. Say which model, which seed,
what was protected, and what the answers became: manifest.json and rows.jsonl beside this page
hold all of it."""
CITATION = """@software{harmcircuits,
  title   = {harmcircuits: find, mask and measure the weights behind harmful generation},
  author  = {The harmcircuits authors},
  version = {VERSION},
  year    = {2026},
}
@article{orgad2026,
  title  = {Large Language Models Generate Harmful Content Using a Distinct, Unified Mechanism},
  author = {Orgad and Wei and Zheng and Wattenberg and Henderson and Goldfarb-Tarrant and Belinkov},
  year   = {2026},
  eprint = {2604.09544},
}
@article{wei2024,
  title  = {Assessing the Brittleness of Safety Alignment via Pruning and Low-Rank Modifications},
  author = {Wei and others},
  year   = {2024},
  eprint = {2402.05162},
}"""
HEADS_TEXT = """The heads that lose most query and output weights to the chosen circuit, on
one request of the target with its reference answer."""

Part = tuple[str, str, str]  # title, text, HTML


def write_study_page(study: Study, path: str | Path) -> None:
    """Write the page of a finished study."""
    rows, terms, chosen = study.rows, study.terms, study.chosen
    lines = StudyLines.of(rows, terms)
    examples = None
    if chosen is not None and study.model.is_invented:
        examples = examples_of(study.model, chosen.mask, terms, rows)

    # In the order in which a reader asks.
    parts = [
        *_measured(study, lines),
        *_of_circuit(study, lines),
        *_of_examples(study, examples),
        *_trust(study, lines),
        ("How to cite", CITE_TEXT, preformatted(_citation())),
    ]
    sections = [headline(headline_lines(rows, terms)), paragraphs(lines.summary)]
    sections.append(contents([title for title, _, _ in parts]))
    sections += [section(*part) for part in parts]
    title = f"The weights behind {terms.target.name} answers in {study.model.name}"
    write_page(path, title, sections, script=circuitsvis_script())


def tradeoff_figure(rows: Rows, terms: Terms) -> Picture:
    """The target and the worst kept ability against the share of weights removed (choice split)."""
    lines = tradeoff_lines(rows)
    return share_figure(lines, _panels(terms), kept=terms.kept_rates)


def _panels(terms: Terms) -> dict[str, str]:
    """Metric -> title of its panel in the trade-off."""
    target = terms.target
    return {
        target.metric: f"valid {target.name} answers",
        target.nll_metric: f"{target.title} NLL, nats per token",
    }


def _measured(study: Study, lines: StudyLines) -> list[Part]:
    """The comparison of masks, as a figure and as tables, and the trade-off."""
    terms = study.terms
    # Few enough for bars side by side; the tables have every line.
    drawn = ["unpruned", "random", terms.twin]
    for way in WAYS:
        drawn += [way, f"{way}, {SAME_SIZE}"]
    compared = {name: rows for name, rows in lines.held_out.items() if name in drawn}
    comparison = comparison_figure(compared, terms.rates)

    # Two tables, as in a terminal: one would be wider than a page.
    tables = ""
    for titles, is_rate in ((terms.rates, True), (terms.losses, False)):
        head, body = _cells(lines, titles, is_rate=is_rate)
        label = "Held-out rates, per cent" if is_rate else "Losses, nats per token"
        tables += table(head, body, style="figures", label=label)

    if lines.tradeoff:
        figure = share_figure(lines.tradeoff, _panels(terms), kept=terms.kept_rates)
        tradeoff = plot(figure, label=f"Curves against size. {TRADEOFF_TEXT}")
    else:
        tradeoff = missing("No mask removes anything within the budget, so there is no curve.")
    bars = plot(comparison, first=True, label=f"Bars; every figure is in the table below. {NOTE}")
    return [
        ("What goes and what stays", COMPARISON_TEXT, bars),
        ("Every figure", TABLE_TEXT, tables),
        ("The trade-off", TRADEOFF_TEXT, tradeoff),
    ]


def _of_circuit(study: Study, lines: StudyLines) -> list[Part]:
    """What the chosen circuit shares with other masks, and where it sits."""
    if study.chosen is None:
        shared = located = missing(NO_MASK)
    else:
        shared = table(SHARED, _shared_lines(study), style="figures", label="Shared weights")
        label = f"{LOCATION_TEXT} The numbers are in rows.jsonl, metric weights_removed."
        located = plot(location_figure(lines.location), label=label)
        located += _mask_file(study.chosen.mask)
    return [
        ("What the circuit shares", SHARED_TEXT, shared),
        ("Where the removed weights sit", LOCATION_TEXT, located),
    ]


def _of_examples(study: Study, examples: Examples | None) -> list[Part]:
    """Tokens, answers and attention, or why there are none."""
    if examples is not None:
        columns = ("request", "unpruned", "masked", "verdict")
        tokens, attention = _tokens_html(examples), _attention_html(examples)
        answers = table(columns, examples.answers, label="Answers")
    else:
        tokens = answers = attention = missing(NO_MASK if study.chosen is None else NO_TEXTS)
    return [
        ("Which tokens lose probability", TOKENS_TEXT, tokens),
        ("What the model says", ANSWERS_TEXT, answers),
        ("Attention of the most pruned heads", HEADS_TEXT, attention),
    ]


def _trust(study: Study, lines: StudyLines) -> list[Part]:
    """Whether the judge and the scores can be trusted."""
    judged = missing(EXACT_JUDGE if study.model.is_invented else NO_VALIDATION)
    if lines.judge:
        judged = table(JUDGE, lines.judge, label="Judge")
    diagnosed = table(DIAGNOSTICS, lines.diagnostics, label="Diagnostics of the scores")
    return [
        ("Can the judge be trusted?", JUDGE_TEXT, judged),
        ("Can the scores be trusted?", _trust_text(study), diagnosed),
    ]


def _trust_text(study: Study) -> str:
    """How scores are made, and which requests repeat others where they are a user's own."""
    texts = [TRUST_TEXT, repeats_text(study.rows)]
    if study.settings.scored_by == "error":
        texts.insert(1, ERROR_TEXT)
    if study.settings.prefer:
        texts.insert(1, PREFER_TEXT.format(prefer=study.settings.prefer))
    if study.settings.protect_first:
        texts.insert(1, FIRST_TEXT.format(tokens=plural(study.settings.protect_first, "token")))
    return " ".join(filter(None, texts))


def _shared_lines(study: Study) -> list[list[str]]:
    """Name, size, shared weights, Jaccard and lift of each mask beside the chosen one."""
    circuit = study.masks[CIRCUIT]
    lines = []
    for name, mask in study.masks.items():
        # The other controls are disjoint from the circuit, or like random ones.
        if name == CIRCUIT or name.startswith(("opposite", "second", "random_magnitude")):
            continue
        title = name.removeprefix("circuit-").replace("_only", " only protected").replace("_", " ")
        title = title.replace("random-", "random, seed ")
        size = f"{mask.n_removed:,}"
        if not mask.n_removed:
            lines.append([title, size, DASH, DASH, "the mask is empty"])
            continue
        both = overlap(circuit, mask)
        low, high = both.interval
        lift = f"{both.lift:.1f}\n{low:.1f} – {high:.1f}"
        lines.append([title, size, f"{both.n_shared:,}", f"{both.jaccard:.3f}", lift])
    return lines


def _mask_file(mask: WeightMask) -> str:
    """The mask as a file within the page."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "circuit.safetensors"
        mask.save(path)
        content = path.read_bytes()
    text = "Download the mask (hc.WeightMask.load reads it)"
    return download("circuit.safetensors", content, text)


def _citation() -> str:
    """The package, and the papers whose method it follows, as BibTeX."""
    return CITATION.replace("VERSION", version("harmcircuits"))


def _cells(
    lines: StudyLines,
    titles: Mapping[str, str],
    *,
    is_rate: bool,
) -> tuple[list[str], list[list[str]]]:
    """Titles of columns, and a line of texts for each mask, of these metrics."""
    columns = columns_of(lines.held_out, titles)
    body = []
    for name, rows in lines.held_out.items():
        figures = [interval_text(rows, metric, is_rate=is_rate) for metric in columns]
        body.append([name, size_text(rows), *figures])
    return ["mask", "weights", *columns.values()], body


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


def _tokens_html(examples: Examples) -> str:
    html = ""
    for name, views in _token_views(examples).items():
        html += f"<h3>{name} answers</h3>"
        html += "".join(view.html() for view in views)
    return f'<div class="drawn">{html}</div>'


def _attention_html(examples: Examples) -> str:
    view = attention_pairs(examples.text, examples.unpruned, examples.pruned, examples.heads)
    return f'<div class="drawn">{view.html()}</div>'
