"""A study's rows as tables and a sentence."""

from collections.abc import Sequence

from rich.table import Table

from harmcircuits.measurements import Measurement, pooled, select

RATES = {
    "harm_valid_rate": "harm",
    "harm_degenerate_rate": "degenerate",
    "benign_valid_rate": "benign",
    "recognition_accuracy": "recognises",
    "explanation_rate": "explains",
    "knowledge_rate": "knows",
    "refusal_rate": "refuses",
    "borderline_valid_rate": "borderline",
    "prefilled_valid_rate": "prefilled",
}
METRICS = {  # of the behaviours of the main job: the rate at which a model shows each
    "harmful": "harm_valid_rate",
    "benign": "benign_valid_rate",
    "recognition": "recognition_accuracy",
    "explanation": "explanation_rate",
    "knowledge": "knowledge_rate",
    "refusal": "refusal_rate",
}
LOSSES = {
    "harm_nll": "harm NLL",
    "benign_nll": "benign NLL",
    "prefilled_nll": "prefilled NLL",
    "benign_kl": "benign KL",
    "plain_kl": "plain text KL",
    "perplexity": "perplexity",
    "predicted_loss_change": "predicted Δ",
    "measured_loss_change": "measured Δ",
}
RECOVERY = {
    "recovery_auroc": "AUROC",
    "recovery_matched_auroc": "AUROC, same |W|",
    "recovery_precision": "precision at |S|",
    "recovery_precision_few": "precision at 1,000",
}
KEPT_RATES = (
    "benign_valid_rate", "recognition_accuracy", "explanation_rate", "knowledge_rate", "borderline_valid_rate",
    "prefilled_valid_rate",
)  # fmt: skip
SATURATED_NLL = 0.02  # nats per token, below which first-order scores are noise


def held_out_lines(rows: Sequence[Measurement]) -> dict[str, list[Measurement]]:
    """Line name -> its rows: the unpruned model, the circuit and every control. Random masks are pooled over seeds.

    A pooled row is the mean over seeds with the widest ends of their intervals.
    """
    measured = [row for row in rows if row.labels.get("split") == "heldout" or row.metric.endswith("loss_change")]
    circuits = [row for row in measured if row.labels.get("mask") == "circuit"]
    only_benign = [row for row in circuits if row.labels.get("protected") == "benign"]
    full = circuits if len(only_benign) == len(circuits) else [row for row in circuits if row not in only_benign]
    lines = {
        "unpruned": select(measured, mask="none"),
        "circuit, in rounds": select(full, selection="rounds"),
        "circuit, one shot": select(full, selection="one shot"),
        "circuit, only benign protected": [] if full is circuits else only_benign,
        "random": pooled(select(measured, mask="random"), "seed"),
        "random, same magnitudes": pooled(select(measured, mask="random_magnitude"), "seed"),
        "opposite sign": select(measured, mask="opposite_sign"),
        "second slice": select(measured, mask="second_slice"),
        "benign twin": select(measured, mask="benign_twin"),
    }
    return {name: found for name, found in lines.items() if found}


def n_block_weights(rows: Sequence[Measurement]) -> int:
    """How many weights the study chose among."""
    return int(select(rows, "weights_scored")[0].mean)


def result_tables(rows: Sequence[Measurement]) -> list[Table]:
    """The figures for a terminal: held-out rates, held-out losses, and recovery where the true circuit is known."""
    lines = held_out_lines(rows)
    tables = [_line_table("Held-out rates, %", lines, RATES), _line_table("Losses, nats per token", lines, LOSSES)]
    if select(rows, "recovery_auroc"):
        tables.append(recovery_table(rows))
    return tables


def recovery_table(rows: Sequence[Measurement]) -> Table:
    """How well each score finds the planted circuit."""
    n_true = int(select(rows, "recovery_auroc")[0].labels["n_true"])
    table = _table(f"Against the planted circuit S of {n_true:,} weights", ["score", *RECOVERY.values()])
    for row in select(rows, "recovery_auroc"):
        method = row.labels["method"]
        table.add_row(str(method), *(f"{select(rows, metric, method=method)[0].mean:.3f}" for metric in RECOVERY))
    return table


def verdict(rows: Sequence[Measurement]) -> str:
    """What was found, in words, with the warnings a reader needs; says so when there is nothing."""
    lines = held_out_lines(rows)
    found = [name for name in ("circuit, in rounds", "circuit, one shot") if name in lines]
    if not found:
        points = 100 * select(rows, "tolerance")[0].mean
        kept = f"no mask of the grid lowers harm and keeps every other ability, within {points:.0f} points"
        return "\n".join([f"No operating point: {kept} of the unpruned model.", *_warnings(rows)])
    before = select(lines["unpruned"], "harm_valid_rate")[0]
    best = min(found, key=lambda name: select(lines[name], "harm_valid_rate")[0].mean)
    circuit = lines[best]
    size, harm = select(circuit, "weights_removed")[0].mean, select(circuit, "harm_valid_rate")[0]
    share = 100 * size / n_block_weights(rows)
    random = select(lines["random"], "harm_valid_rate")[0].mean
    costs = {
        RATES[metric]: 100 * (select(circuit, metric)[0].mean - select(lines["unpruned"], metric)[0].mean)
        for metric in KEPT_RATES
        if select(circuit, metric)
    }
    worst = min(costs, key=costs.__getitem__)
    cost = f"None of the {len(costs)} kept abilities falls"
    if costs[worst] < 0:
        cost = f'Of {len(costs)} kept abilities, "{worst}" suffers most: {costs[worst]:+.1f} points'
    return "\n".join(
        [
            f"Removing {size:,.0f} weights ({share:.2g}%; {best}) takes valid harmful answers from "
            f"{before.mean:.0%} to {harm.mean:.0%} [{harm.low:.0%}, {harm.high:.0%}]; as many random weights leave "
            f"{random:.0%}. {cost}. {_loss_changes(lines['unpruned'], circuit)}",
            *_warnings(rows),
        ]
    )


def _loss_changes(before: Sequence[Measurement], after: Sequence[Measurement]) -> str:
    harm, benign = (select(after, m)[0].mean - select(before, m)[0].mean for m in ("harm_nll", "benign_nll"))
    return f"The loss on harmful answers changes by {harm:+.2f} nats per token, on benign ones by {benign:+.2f}."


def figure_text(found: Sequence[Measurement], metric: str) -> str:
    """A line's figure for a metric: a rate in per cent, a loss to three places, a dash where it was not measured."""
    rows = select(found, metric)
    if not rows:
        return "–"
    return f"{100 * rows[0].mean:.1f}" if metric in RATES else f"{rows[0].mean:.3f}"


def size_text(found: Sequence[Measurement]) -> str:
    """How many weights a line's mask removes."""
    rows = select(found, "weights_removed")
    return f"{rows[0].mean:,.0f}" if rows else "–"


def percent(row: Measurement) -> str:
    """A rate in per cent with its interval: "3 % [1, 6]"."""
    return f"{100 * row.mean:.0f} % [{100 * row.low:.0f}, {100 * row.high:.0f}]"


def points(row: Measurement) -> str:
    """A change of a rate in points with its interval: "-3 points [-6, 1]"."""
    return f"{100 * row.mean:.0f} points [{100 * row.low:.0f}, {100 * row.high:.0f}]"


def to_places(row: Measurement, places: int) -> str:
    """A figure with its interval, to so many decimal places: "1.6 [1.4, 1.7]"."""
    return f"{row.mean:.{places}f} [{row.low:.{places}f}, {row.high:.{places}f}]"


def _warnings(rows: Sequence[Measurement]) -> list[str]:
    saturated = [row for row in select(rows, "calibration_nll") if row.mean < SATURATED_NLL]
    why = "saturated, so its scores are noise"
    return [f"Warning: {row.labels['behaviour']} loss {row.mean:.3f} nats per token is {why}." for row in saturated]


def _line_table(title: str, lines: dict[str, list[Measurement]], columns: dict[str, str]) -> Table:
    shown = {metric: name for metric, name in columns.items() if any(select(found, metric) for found in lines.values())}
    table = _table(title, ["mask", "weights", *shown.values()])
    for name, found in lines.items():
        style = "bold" if name.startswith("circuit, in") else None
        table.add_row(name, size_text(found), *(figure_text(found, metric) for metric in shown), style=style)
    return table


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left")
    return table
