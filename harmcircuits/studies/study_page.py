"""A study's page: from rows to lines, from lines to figures and tables, from these to HTML."""

from pathlib import Path

from plotly.graph_objects import Figure

from harmcircuits.behaviours.behaviour import Behaviour
from harmcircuits.circuits.masks import WeightMask
from harmcircuits.hooks.inspection import attention_patterns, token_changes, token_texts
from harmcircuits.hooks.masking import masked
from harmcircuits.measurements import Rows
from harmcircuits.prompts import PromptSet
from harmcircuits.studies.diagnostics import SATURATED_NLL
from harmcircuits.studies.study import Point, Study
from harmcircuits.studies.summary import (
    GROUND_TRUTH,
    IN_ROUNDS,
    ONE_SHOT,
    ground_truth_lines,
    held_out_lines,
    n_scored,
    summary,
)
from harmcircuits.studies.terms import Terms
from harmcircuits.views.circuitsvis import attention_heads, circuitsvis_script, coloured_tokens
from harmcircuits.views.figures import comparison_figure, location_figure, share_figure
from harmcircuits.views.page import paragraphs, plot, section, table, write_page
from harmcircuits.views.tables import DASH, columns_of, interval_text, size_text

N_EXAMPLES, N_HEADS = 4, 4

TABLE_TEXT = """Rates in per cent, losses in nats per token, 95 % intervals in small print.
Predicted Δ: the sum of first-order scores over the mask; measured Δ: the change it really makes to the
calibration loss. Far apart, the scores of the unpruned model do not describe the edit. Twin: the
same procedure with the counterpart as the target, and the target protected. Second slice: the next
in the ranking. Opposite sign: weights whose removal should lower the loss."""
TRUST_TEXT = f"""Scores are taken on the model's own answers to calibration requests, kept where the
judge verifies them. Below {SATURATED_NLL} nats per token a loss is saturated and its gradients are
noise."""
COMPARISON_TEXT = """Held-out requests. Bars: 95 % intervals that count each item once."""
TRADEOFF_TEXT = """Measured on requests used only for choosing the size. Worst kept ability: the
lowest of the kept rates. Protected for each kept behaviour: the top"""


def write_study_page(study: Study, path: str | Path) -> None:
    """Write the page of a finished study.

    Summary, comparison, every figure, trade-off, location, tokens, answers, attention, diagnostics.
    Texts of examples are shown only where the model's words are invented.

    Args:
        study: what to show.
        path: the file to write.
    """
    rows, terms = study.rows, study.terms
    lines = held_out_lines(rows, terms)
    sections = [paragraphs(summary(rows, terms))]
    if study.chosen is not None:
        share = float(study.chosen.labels["p"])
        sections += _figures(rows, lines, terms, share)
        if study.model.is_invented:
            sections += _looking_inside(study, study.chosen)
    if rows.where("recovery_auroc"):
        content = table(
            ["score", *GROUND_TRUTH.values()], ground_truth_lines(rows), style="figures"
        )
        text = "Chance is 0.5 for both areas."
        sections.append(section("Against the planted circuit", text, content))
    sections.append(section("Can the scores be trusted?", TRUST_TEXT, diagnostics_table(rows)))
    title = f"The weights behind {terms.target.name} answers in {study.model.name}"
    write_page(path, title, sections, script=circuitsvis_script())


def tradeoff_figure(rows: Rows, terms: Terms, *, protect_share: float) -> Figure:
    """The target and the worst kept ability against the share of weights removed (choice split).

    Curves: chosen in rounds and in one shot, random weights, the opposite sign. Bars are 95 %
    intervals.

    Args:
        rows: of a study.
        terms: what they are called.
        protect_share: of the curves.
    """
    selections = {
        IN_ROUNDS: "rounds",
        ONE_SHOT: "one shot",
        "random": "random",
        "opposite sign": "opposite sign",
    }
    lines = {}
    for title, selection in selections.items():
        sizes = rows.where("weights_removed", selection=selection, split="choice")
        points = {}
        for row in sorted(sizes, key=lambda row: row.mean):
            # Random masks are measured under the first share only: nothing protects them.
            if selection == "random" or row.labels["p"] == protect_share:
                points[row.mean / n_scored(rows)] = rows.where("", **row.labels)
        lines[title] = points
    panels = {
        terms.target.metric: f"valid {terms.target.name} answers",
        terms.target.nll_metric: f"{terms.target.title} NLL, nats per token",
    }
    return share_figure(lines, panels, kept=terms.kept_rates)


def diagnostics_table(rows: Rows) -> str:
    """Yield, loss and gradient norm of every behaviour's calibration answers, as HTML."""
    body = []
    for row in rows.where("calibration_yield"):
        name = str(row.labels["behaviour"])
        nll = rows.where("calibration_nll", behaviour=name)
        if not nll:
            body.append([name, f"{row.mean:.0%}", DASH, DASH, "not shown by this model"])
            continue
        norm = rows.where("gradient_norm", behaviour=name)[0].mean
        state = "saturated" if nll[0].mean < SATURATED_NLL else "usable"
        body.append([name, f"{row.mean:.0%}", f"{nll[0].mean:.3f}", f"{norm:.3f}", state])
    return table(("behaviour", "verified answers", "NLL", "gradient norm", "scores"), body)


def _figures(
    rows: Rows,
    lines: dict[str, Rows],
    terms: Terms,
    protect_share: float,
) -> list[str]:
    drawn = ("unpruned", IN_ROUNDS, ONE_SHOT, "random", terms.twin)
    compared = {name: lines[name] for name in drawn if name in lines}
    comparison = plot(comparison_figure(compared, terms.rates), first=True)
    tradeoff = plot(tradeoff_figure(rows, terms, protect_share=protect_share))
    return [
        section("What goes and what stays", COMPARISON_TEXT, comparison),
        section("Every figure", TABLE_TEXT, _line_table(lines, terms)),
        section("The trade-off", f"{TRADEOFF_TEXT} {protect_share:.2%} of the weights.", tradeoff),
        section(
            "Where the removed weights sit",
            "Number of removed weights in each matrix; colour: their share of the matrix.",
            plot(location_figure(rows)),
        ),
    ]


def _line_table(lines: dict[str, Rows], terms: Terms) -> str:
    rates = columns_of(lines, terms.rates)
    losses = columns_of(lines, terms.losses)
    body = []
    for name, rows in lines.items():
        cells = [interval_text(rows, metric, is_rate=True) for metric in rates]
        cells += [interval_text(rows, metric, is_rate=False) for metric in losses]
        body.append([name, size_text(rows), *cells])
    head = ("mask", "weights", *rates.values(), *losses.values())
    return table(head, body, style="figures")


def _looking_inside(study: Study, chosen: Point) -> list[str]:
    target, contrast = study.terms.target, study.terms.contrast
    mask = chosen.mask
    tokens, answers = "", []
    for behaviour in (target, contrast):
        prompts = _some(behaviour.prompts("heldout"))
        tokens += f"<h3>{behaviour.name} answers</h3>"
        tokens += _token_views(study, behaviour, prompts, mask)
        answers += _answers(study, behaviour, prompts, mask)
    return [
        section(
            "Which tokens lose probability",
            "Reference answers to held-out requests. "
            "Red tokens lose log-probability under the mask, blue ones gain.",
            tokens,
        ),
        section(
            "What the model says",
            "Greedy answers to held-out requests, and the judge's verdict on the masked ones.",
            table(("request", "unpruned", "masked", "verdict"), answers),
        ),
        section(
            "Attention of the most pruned heads",
            "The heads that lose most query and output weights, on one request of the target with "
            "its reference answer.",
            _attention_views(study, target, mask),
        ),
    ]


def _token_views(
    study: Study,
    behaviour: Behaviour,
    prompts: PromptSet,
    mask: WeightMask,
) -> str:
    bridge = study.model.bridge
    batch = study.model.batches(behaviour, prompts)[0]
    changes = token_changes(bridge, mask, batch)
    largest = max(changes[batch.is_token].abs().max().item(), 1e-6)
    views = []
    for number in range(len(batch)):
        texts = token_texts(bridge, batch, number)
        values = changes[number][batch.is_token[number]]
        views.append(coloured_tokens(texts, values, largest=largest).html())
    return "".join(views)


def _answers(
    study: Study,
    behaviour: Behaviour,
    prompts: PromptSet,
    mask: WeightMask,
) -> list[list[str]]:
    """Request, answer without and with the mask, and the verdict on the latter."""
    before = study.model.answers(behaviour, prompts)
    with masked(study.model.bridge, mask):
        after = study.model.answers(behaviour, prompts)
    verdicts = study.model.verdicts(behaviour, after)
    lines = []
    for unpruned, pruned, verdict in zip(before, after, verdicts, strict=True):
        lines.append([pruned.prompt, unpruned.completion, pruned.completion, verdict])
    return lines


def _attention_views(study: Study, behaviour: Behaviour, mask: WeightMask) -> str:
    bridge = study.model.bridge
    heads = _most_pruned_heads(study.rows)
    batch = study.model.batches(behaviour, _some(behaviour.prompts("heldout")))[0]
    texts = token_texts(bridge, batch)
    unpruned = attention_patterns(bridge, batch, heads)
    with masked(bridge, mask):
        pruned = attention_patterns(bridge, batch, heads)
    panels = []
    for title, patterns in (("unpruned", unpruned), ("masked", pruned)):
        view = attention_heads(texts, patterns, heads).html()
        panels.append(f"<div><h3>{title}</h3>{view}</div>")
    return f'<div class="pair">{"".join(panels)}</div>'


def _some(prompts: PromptSet) -> PromptSet:
    """A few requests, evenly over the set."""
    step = max(1, len(prompts) // N_EXAMPLES)
    return prompts[::step][:N_EXAMPLES]


def _most_pruned_heads(rows: Rows) -> list[tuple[int, int]]:
    removed: dict[tuple[int, int], float] = {}
    for row in rows.where("weights_removed", by="head", kind="head"):
        head = (int(row.labels["layer"]), int(row.labels["index"]))
        removed[head] = removed.get(head, 0) + row.mean
    return sorted(removed, key=lambda head: -removed[head])[:N_HEADS]
