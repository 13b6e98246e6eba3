"""A study as a table, a sentence and one offline HTML file."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from statistics import fmean
from string import Template

from rich.table import Table

from harmcircuits.hooks.masking import masked
from harmcircuits.prompts import PromptSet
from harmcircuits.records import Measurement, select
from harmcircuits.study import KEPT_RATES, SATURATED_NLL, TOLERANCE, Study
from harmcircuits.views import (
    attention_views,
    circuitsvis_script,
    comparison_figure,
    location_figure,
    lost_tokens,
    tradeoff_figure,
)

RATES = {
    "harm_valid_rate": "harm",
    "harm_degenerate_rate": "degenerate",
    "benign_valid_rate": "benign",
    "recognition_accuracy": "recognises",
    "explanation_rate": "explains",
    "knowledge_rate": "knows",
    "refusal_rate": "refuses",
}
LOSSES = {
    "harm_nll": "harm NLL",
    "benign_nll": "benign NLL",
    "benign_kl": "benign KL",
    "predicted_loss_change": "predicted Δ",
    "measured_loss_change": "measured Δ",
}
N_EXAMPLES, N_HEADS = 4, 4


def held_out_lines(rows: Sequence[Measurement]) -> dict[str, list[Measurement]]:
    """Line name -> its rows: the unpruned model, the circuit and every control. Random masks are pooled over seeds.

    A pooled row is the mean over seeds with the widest ends of their intervals.
    """
    measured = [row for row in rows if row.labels.get("split") == "heldout" or row.metric.endswith("loss_change")]
    lines = {
        "unpruned": select(measured, mask="none"),
        "circuit, in rounds": _full_protection(select(measured, mask="circuit", selection="rounds")),
        "circuit, one shot": _full_protection(select(measured, mask="circuit", selection="one shot")),
        "circuit, only benign protected": select(measured, mask="circuit", protected="benign"),
        "random": _pooled(select(measured, mask="random")),
        "random, same magnitudes": _pooled(select(measured, mask="random_magnitude")),
        "opposite sign": select(measured, mask="opposite_sign"),
        "second slice": select(measured, mask="second_slice"),
        "benign twin": select(measured, mask="benign_twin"),
    }
    return {name: found for name, found in lines.items() if found}


def result_tables(rows: Sequence[Measurement]) -> list[Table]:
    """The figures for the terminal: held-out rates, held-out losses, and recovery where the true circuit is known."""
    lines = held_out_lines(rows)
    tables = []
    for title, columns in (("Held-out rates, %", RATES), ("Losses, nats per token", LOSSES)):
        shown = {metric: name for metric, name in columns.items() if any(select(found, metric) for found in lines.values())}
        table = _table(title, ["mask", "weights", *shown.values()])
        for name, found in lines.items():
            size = select(found, "weights_removed")
            cells = [_cell(found, metric) for metric in shown]
            style = "bold" if name.startswith("circuit, in") else None
            table.add_row(name, f"{size[0].mean:,.0f}" if size else "–", *cells, style=style)
        tables.append(table)
    if select(rows, "recovery_auroc"):
        tables.append(recovery_table(rows))
    return tables


def recovery_table(rows: Sequence[Measurement]) -> Table:
    """How well each score finds the planted circuit."""
    columns = {
        "recovery_auroc": "AUROC",
        "recovery_matched_auroc": "AUROC, same |W|",
        "recovery_precision": "precision at |S|",
        "recovery_precision_few": "precision at 1,000",
    }
    n_true = select(rows, "recovery_auroc")[0].labels["n_true"]
    table = _table(f"Against the planted circuit S of {n_true:,} weights", ["score", *columns.values()])
    for row in select(rows, "recovery_auroc"):
        method = row.labels["method"]
        table.add_row(str(method), *(f"{select(rows, metric, method=method)[0].mean:.3f}" for metric in columns))
    return table


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left")
    return table


def verdict(rows: Sequence[Measurement]) -> str:
    """What was found, in words, with the warnings a reader needs; says so when there is nothing."""
    lines = held_out_lines(rows)
    found = [name for name in ("circuit, in rounds", "circuit, one shot") if name in lines]
    warnings = [
        f"Warning: the loss on {row.labels['behaviour']!r} is {row.mean:.3f} nats per token: saturated, so its scores are noise."
        for row in select(rows, "calibration_nll")
        if row.mean < SATURATED_NLL
    ]
    if not found:
        kept = "no mask of the grid lowers valid harmful answers while keeping every other ability within one point"
        return "\n".join([f"No operating point: {kept} of the unpruned model.", *warnings])
    n_weights = sum(
        row.labels["matrix"] for row in select(rows, "weights_removed", mask="circuit") if "matrix" in row.labels
    )
    before = select(lines["unpruned"], "harm_valid_rate")[0]
    best = min(found, key=lambda name: select(lines[name], "harm_valid_rate")[0].mean)
    circuit, random = lines[best], lines["random"]
    size, harm = select(circuit, "weights_removed")[0].mean, select(circuit, "harm_valid_rate")[0]
    costs = {
        title: select(circuit, metric)[0].mean - select(lines["unpruned"], metric)[0].mean
        for metric, title in RATES.items()
        if metric in KEPT_RATES and select(circuit, metric)
    }
    worst = min(costs, key=costs.__getitem__)
    return "\n".join(
        [
            f"Removing {size:,.0f} weights ({size / n_weights:.2%}; {best}) takes valid harmful answers from {before.mean:.0%} to "
            f"{harm.mean:.0%} [{harm.low:.0%}, {harm.high:.0%}]; random weights leave "
            f"{select(random, 'harm_valid_rate')[0].mean:.0%}. The ability that suffers most: {worst} ({100 * costs[worst]:+.1f} "
            f"points). The size was chosen on other requests, by the largest fall of harm at a cost of at most "
            f"{100 * TOLERANCE:.0f} point elsewhere.",
            *warnings,
        ]
    )


def write_report(study: Study, path: str | Path) -> None:
    """One HTML file that needs no network: verdict, trade-off, table, location, tokens, attention, diagnostics."""
    lines = held_out_lines(study.rows)
    sections = [f'<p class="verdict">{escape(verdict(study.rows)).replace(chr(10), "<br>")}</p>']
    if study.chosen:
        chosen = float(study.chosen.labels["p"])
        shown = {
            name: lines[name]
            for name in lines
            if name in ("unpruned", "circuit, in rounds", "circuit, one shot", "random", "benign twin")
        }
        sections += [
            _section(
                "What goes and what stays",
                "Held-out requests. Harm is elicited by prefilling the first word of the answer. "
                "Bars: 95 % intervals that count each item once.",
                _plot(comparison_figure(study.rows, RATES, shown), first=True),
            ),
            _section("Every figure", _columns_text(), _html_table(lines)),
            _section(
                "The trade-off",
                f"Requests used for choosing the size only, never for scoring. Protection p = {chosen:g} of the weights for each "
                "kept behaviour. Worst kept ability: the lowest of benign answers, recognition, explanation and knowledge.",
                _plot(tradeoff_figure(study.rows, p=chosen)),
            ),
            _section(
                "Where the removed weights sit",
                "Number of removed weights in each matrix; colour: their share of the matrix.",
                _plot(location_figure(study.rows)),
            ),
            *(_looking_inside(study) if study.subject.is_invented else []),
        ]
    sections.append(_section("Can the scores be trusted?", _diagnostics_text(), _diagnostics(study.rows)))
    page = Template((Path(__file__).parent / "report.html").read_text(encoding="utf-8"))
    title = f"The weights behind harmful generation in {study.subject.name}"
    Path(path).write_text(
        page.substitute(title=escape(title), body="\n".join(sections), script=circuitsvis_script()), encoding="utf-8"
    )


def _looking_inside(study: Study) -> list[str]:
    subject, chosen = study.subject, study.chosen
    assert chosen is not None
    picked = []
    for name in ("harmful", "benign"):
        prompts = subject.behaviours[name].prompts("heldout")
        picked.append((name, PromptSet(prompts.examples[:: len(prompts) // N_EXAMPLES][:N_EXAMPLES])))
    parts, answers = [], []
    for name, prompts in picked:
        behaviour = subject.behaviours[name]
        batch = subject.batches(behaviour, prompts)[0]
        views = "".join(view.html() for view in lost_tokens(subject.bridge, chosen.mask, batch))
        parts.append(f"<h3>{escape(name)} answers</h3>{views}")
        before = subject.answered(behaviour, prompts)
        with masked(subject.bridge, chosen.mask):
            after = subject.answered(behaviour, prompts)
        answers += [
            (one.prompt, one.completion, two.completion, subject.judge(two.prompt, two.completion))
            for one, two in zip(before, after, strict=True)
        ]
    behaviour, prompts = subject.behaviours["harmful"], picked[0][1]
    heads = _most_pruned_heads(study.rows)
    views = attention_views(subject.bridge, chosen.mask, subject.batches(behaviour, prompts)[0], heads)
    attention = "".join(
        f"<div><h3>{title}</h3>{view.html()}</div>" for title, view in zip(("unpruned", "masked"), views, strict=True)
    )
    rows = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in answers)
    head = "<tr><th>request</th><th>unpruned</th><th>masked</th><th>verdict</th></tr>"
    return [
        _section(
            "Which tokens lose probability",
            "Reference answers to held-out requests. Red tokens lose log-probability under the mask, blue ones gain.",
            "".join(parts),
        ),
        _section("What the model says", "Greedy answers before and under the mask.", f"<table>{head}{rows}</table>"),
        _section(
            "Attention of the most pruned heads",
            "The heads that lose most query and output weights, on one harmful request and its answer.",
            f'<div class="pair">{attention}</div>',
        ),
    ]


def _most_pruned_heads(rows: Sequence[Measurement]) -> list[tuple[int, int]]:
    lost: dict[tuple[int, int], float] = {}
    for row in select(rows, "head_weights_removed"):
        head = (int(row.labels["layer"]), int(row.labels["head"]))
        lost[head] = lost.get(head, 0) + row.mean
    return sorted(lost, key=lambda head: -lost[head])[:N_HEADS]


def _full_protection(rows: list[Measurement]) -> list[Measurement]:
    kept = [row for row in rows if row.labels.get("protected") != "benign"]
    return kept or rows


def _pooled(rows: list[Measurement]) -> list[Measurement]:
    pooled = []
    for metric in dict.fromkeys(row.metric for row in rows):
        same = select(rows, metric)
        labels = {key: value for key, value in same[0].labels.items() if key != "seed"}
        low, high = min(row.low for row in same), max(row.high for row in same)
        pooled.append(Measurement(metric, labels, fmean(row.mean for row in same), low, high, sum(row.n for row in same)))
    return pooled


def _cell(found: list[Measurement], metric: str) -> str:
    rows = select(found, metric)
    if not rows:
        return "–"
    return f"{100 * rows[0].mean:.1f}" if metric in RATES else f"{rows[0].mean:.3f}"


def _html_table(lines: dict[str, list[Measurement]]) -> str:
    columns = RATES | LOSSES
    head = "".join(f"<th>{escape(title)}</th>" for title in ("mask", "weights", *columns.values()))
    body = []
    for name, found in lines.items():
        size = select(found, "weights_removed")
        cells = [f"<td>{escape(name)}</td>", f"<td>{size[0].mean:,.0f}</td>" if size else "<td>–</td>"]
        for metric in columns:
            rows = select(found, metric)
            percent = metric in RATES
            low, high = (
                (f"{(100 if percent else 1) * end:.{1 if percent else 3}f}" for end in (rows[0].low, rows[0].high))
                if rows
                else ("", "")
            )
            interval = f"<small>{low} – {high}</small>" if rows and low != high else ""
            cells.append(f"<td>{_cell(found, metric)}{interval}</td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    return f'<table class="figures"><tr>{head}</tr>{"".join(body)}</table>'


def _diagnostics(rows: Sequence[Measurement]) -> str:
    body = ""
    for row in select(rows, "calibration_yield"):
        same = {"behaviour": row.labels["behaviour"]}
        nll, norm = select(rows, "calibration_nll", **same), select(rows, "gradient_norm", **same)
        state = "not shown by this model" if not nll else "saturated" if nll[0].mean < SATURATED_NLL else "usable"
        figures = [f"{nll[0].mean:.3f}", f"{norm[0].mean:.3f}"] if nll else ["–", "–"]
        cells = [str(row.labels["behaviour"]), f"{row.mean:.0%}", *figures, state]
        body += f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
    head = "".join(f"<th>{title}</th>" for title in ("behaviour", "verified", "NLL", "gradient norm", "scores"))
    return f"<table><tr>{head}</tr>{body}</table>"


def _columns_text() -> str:
    return (
        "Rates in per cent, losses in nats per token, intervals in small print. Predicted Δ is the sum of first-order scores over "
        "the mask, measured Δ the change it really makes to the calibration loss: far apart, the scores of the unpruned model "
        "no longer describe what happens. Benign twin: the same procedure with benign answers as the target and harmful ones "
        "protected. Second slice: the next weights in the ranking. Opposite sign: the weights whose removal should lower the loss."
    )


def _diagnostics_text() -> str:
    return (
        "Scores are taken on the model's own answers to calibration requests, kept where the judge verifies them. Below "
        f"{SATURATED_NLL} nats per token a loss is saturated and its gradients are noise."
    )


def _section(title: str, text: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2><p>{escape(text)}</p>{content}</section>"


def _plot(figure, *, first: bool = False) -> str:
    return figure.to_html(full_html=False, include_plotlyjs=first, config={"displaylogo": False, "responsive": True})
