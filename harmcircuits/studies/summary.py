"""A study's rows as lines (the unpruned model, every circuit and control), and as a sentence."""

from collections.abc import Mapping
from dataclasses import dataclass

from rich.table import Table

from harmcircuits.behaviours.behaviour import DEGENERATE
from harmcircuits.behaviours.calibration import FEW_ANSWERS, few_answers
from harmcircuits.behaviours.repeats import IN_TWO_SPLITS, REPEATED, repeats_text
from harmcircuits.behaviours.validation import METRIC as VALIDATION
from harmcircuits.display import listed, share
from harmcircuits.measurements import Rows
from harmcircuits.studies.diagnostics import SATURATED_NLL
from harmcircuits.studies.grid import PUBLISHED, SEARCH, WAYS
from harmcircuits.studies.heldout import SAME_SIZE
from harmcircuits.studies.terms import Terms
from harmcircuits.views.tables import DASH, line_table, text_table

TRADEOFF_LINES = (*WAYS, "random", "opposite sign")
JUDGE = ("judge", "told from", "requests", "AUROC", "on requests not trained on", "used")
DOUBTFUL = 0.1  # of the answers under a mask: beyond it the judge's verdicts are in doubt
DIAGNOSTICS = ("behaviour", "verified answers", "NLL", "gradient norm", "scores")


@dataclass(frozen=True, repr=False)
class StudyLines:
    """What a study's page shows, sorted into lines."""

    summary: str
    held_out: Mapping[str, Rows]
    tradeoff: Mapping[str, Mapping[float, Rows]]
    location: Rows
    diagnostics: list[list[str]]
    judge: list[list[str]]

    @classmethod
    def of(cls, rows: Rows, terms: Terms) -> "StudyLines":
        """The lines of a study."""
        return cls(
            summary=summary(rows, terms),
            held_out=held_out_lines(rows, terms),
            tradeoff=tradeoff_lines(rows),
            location=rows.where("weights_removed", by="matrix"),
            diagnostics=diagnostics_lines(rows),
            judge=judge_lines(rows),
        )


def held_out_lines(rows: Rows, terms: Terms) -> dict[str, Rows]:
    """Line name -> its held-out rows."""
    measured = Rows(
        row
        for row in rows
        if row.labels.get("split") == "heldout" or row.metric.endswith("loss_change")
    )
    # A study also measures a circuit that protects the contrast only. Those that are compared say
    # `at` which size they are, and it does not.
    circuits = measured.where(mask="circuit")
    alone = Rows(row for row in circuits if "at" not in row.labels)
    lines = {"unpruned": measured.where(mask="none")}
    for way in WAYS:
        of_way = Rows(row for row in circuits.where(selection=way) if "at" in row.labels)
        is_same_size = bool(of_way.where(at=SAME_SIZE))
        lines[f"{way}, {SAME_SIZE}" if is_same_size else way] = of_way
    twin = terms.twin.replace(" ", "_")
    lines |= {
        f"{SEARCH}, only {terms.contrast.name} protected": alone,
        "random": measured.where(mask="random").pool("seed"),
        "random, same magnitudes": measured.where(mask="random_magnitude").pool("seed"),
        "opposite sign": measured.where(mask="opposite_sign"),
        "second slice": measured.where(mask="second_slice"),
        terms.twin: measured.where(mask=twin),
    }
    return {name: of_line for name, of_line in lines.items() if of_line}


def result_tables(rows: Rows, terms: Terms) -> list[Table]:
    """The figures for a terminal: held-out rates and losses."""
    lines = held_out_lines(rows, terms)
    studied = _studied(lines) or SEARCH
    tables = [
        line_table("Held-out rates, %", lines, terms.rates, is_rate=True, bold=studied),
        line_table("Losses, nats per token", lines, terms.losses, is_rate=False, bold=studied),
    ]
    if rows.where(VALIDATION):
        tables.append(judge_table(rows))
    return tables


def judge_table(rows: Rows) -> Table:
    """How well the judge tells harmful answers of the unpruned model from harmless ones."""
    grid = text_table("The judge of harm", JUDGE, n_names=2)
    for line in judge_lines(rows):
        grid.add_row(*line)
    return grid


def judge_lines(rows: Rows) -> list[list[str]]:
    """A line for each contrast, as texts (columns: `JUDGE`); none where no judge was validated."""
    lines = []
    for row in rows.where(VALIDATION, split="calibration"):
        labels = row.labels
        contrast = str(labels["contrast"])
        apart = rows.where(VALIDATION, split="choice", contrast=contrast)
        lines.append(
            [
                str(labels["judge"]),
                contrast,
                f"{labels['requests']}",
                f"{row:.2f}",
                f"{apart[0]:.2f}" if apart else DASH,
                str(labels.get("used", DASH)),
            ]
        )
    return lines


def tradeoff_lines(rows: Rows) -> dict[str, dict[float, Rows]]:
    """Way of choosing -> share of the weights removed -> rows on the choice split."""
    lines = {}
    for selection in TRADEOFF_LINES:
        sizes = rows.where("weights_removed", selection=selection, split="choice")
        points = {}
        for row in sorted(sizes, key=lambda row: row.mean):
            if row.mean:  # a search may find no mask within the budget
                # Everything measured under a mask carries the same labels.
                points[row.mean / n_scored(rows)] = rows.where("", **row.labels)
        lines[selection] = points
    return {name: points for name, points in lines.items() if points}


def diagnostics_lines(rows: Rows) -> list[list[str]]:
    """Yield, loss and gradient norm of every behaviour's calibration answers, as texts."""
    lines = []
    for row in rows.where("calibration_yield"):
        name = str(row.labels["behaviour"])
        nll = rows.where("calibration_nll", behaviour=name)
        if not nll:  # no verified answer, so nothing to take a loss of
            lines.append([name, f"{row.mean:.0%}", DASH, DASH, "not shown by this model"])
            continue
        loss = nll[0].mean
        norm = rows.where("gradient_norm", behaviour=name)[0].mean
        examples = rows.where("calibration_examples", behaviour=name)
        state = "usable"
        if loss < SATURATED_NLL:
            state = "saturated"
        elif examples and examples[0].mean < FEW_ANSWERS:
            state = f"few answers ({examples[0].mean:.0f})"
        lines.append([name, f"{row.mean:.0%}", f"{loss:.3f}", f"{norm:.3f}", state])
    return lines


def n_scored(rows: Rows) -> int:
    """How many weights the study chose among."""
    return int(rows.where("weights_scored")[0].mean)


def summary(rows: Rows, terms: Terms) -> str:
    """The result in words, with the warnings a reader needs."""
    lines = held_out_lines(rows, terms)
    studied = _studied(lines)
    if not studied:
        points = 100 * rows.one("tolerance").mean
        text = (
            f"No operating point: no mask lowers {terms.target.title} and keeps the rate of every "
            f"other ability within {points:.0f} points of the unpruned model's, and its loss "
            "within its budget."
        )
        return "\n".join([text, *_tried(rows, terms), *_warnings(rows, terms)])

    rate = terms.target.metric
    before, after = lines["unpruned"], lines[studied]
    size = after.one("weights_removed").mean
    others = []
    for name, of_line in lines.items():
        if name == "random" or (name.split(",")[0] in WAYS[1:] and name != studied):
            n_removed = of_line.one("weights_removed").mean
            others.append(f"{of_line.one(rate).mean:.0%} ({name}; {n_removed:,.0f} weights)")
    text = (
        f"Removing {size:,.0f} weights ({share(size / n_scored(rows))}; {studied}) takes "
        f"{_answers(terms)} from {before.one(rate).mean:.0%} to {after.one(rate):.0%}; "
        f"chosen otherwise they leave {listed(others)}. {_became(before, after, terms)}"
        f"{_cost(before, after, terms)} "
        f"{_loss_changes(before, after, terms)}"
    )
    return "\n".join([text, _protected(rows, terms), *_warnings(rows, terms)])


def headline(rows: Rows, terms: Terms) -> list[tuple[str, str, str]]:
    """What a reader takes away: name, figure, and interval or explanation of each."""
    lines = held_out_lines(rows, terms)
    before, target = lines["unpruned"], terms.target
    after = lines.get(_studied(lines))
    figures = []
    for metric, name in _titles(before, after or Rows(), terms).items():
        start = before.one(metric)
        if after is None or not after.where(metric):
            figures.append((name, f"{start.mean:.0%}", f"{start:.0%}, unpruned"))
            continue
        end = after.one(metric)
        figures.append((name, f"{start.mean:.0%} → {end.mean:.0%}", f"{end:.0%}"))
    if not target.side_metrics:
        note = "this behaviour counts no other verdicts"
        figures.append(("what answers become", DASH, note))
    if after is None:
        return [*figures, ("weights removed", DASH, "no mask was chosen")]

    changes = _changes(before, after, terms)
    worst = min(changes, key=changes.__getitem__, default=None)
    if worst is not None:
        figures.append(("worst kept ability", f"{changes[worst]:+.1f} points", worst))
    size = after.one("weights_removed").mean
    figures.append(("weights removed", share(size / n_scored(rows)), f"{size:,.0f} weights"))
    return figures


def _tried(rows: Rows, terms: Terms) -> list[str]:
    """A line for each mask of a search without an operating point: what it does not keep."""
    before = rows.where(mask="none", split="choice")
    rate, loss = terms.target.metric, terms.target.nll_metric
    tried = []
    for of_mask in tradeoff_lines(rows).get(SEARCH, {}).values():
        size = of_mask.one("weights_removed")
        change = of_mask.one(loss).mean - before.one(loss).mean
        tried.append(
            f"Tried {size.mean:,.0f} weights (masks/tried-{size.labels['q']:g}): "
            f"{_answers(terms)} {before.one(rate).mean:.0%} → {of_mask.one(rate).mean:.0%}, their "
            f"loss {change:+.3f} nats; not kept: {_not_kept(of_mask)}."
        )
    return tried or ["The search removes no weight within the budgets."]


def _not_kept(of_mask: Rows) -> str:
    """Each figure that a mask does not keep, with its change."""
    lost = []
    for row in of_mask.where("not_kept"):
        behaviour, is_rate = row.labels["behaviour"], row.labels["figure"] == "rate"
        if is_rate:
            lost.append(f"{behaviour} {100 * row.mean:+.1f} points")
        else:
            lost.append(f"{behaviour} loss {row.mean:+.3f} nats")
    return listed(lost) or "nothing"


def _studied(lines: Mapping[str, Rows]) -> str:
    """The way of choosing whose circuit is studied; empty where no mask was chosen."""
    return next((way for way in (SEARCH, PUBLISHED) if way in lines), "")


def _doubts(rows: Rows, terms: Terms) -> Rows:
    """How many answers the judge doubts under the chosen mask, where they are many."""
    metric = terms.target.doubt_metric
    if not metric:
        return Rows()
    lines = held_out_lines(rows, terms)
    studied = lines.get(_studied(lines), Rows())
    return Rows(row for row in studied.where(metric) if row.mean >= DOUBTFUL)


def _titles(before: Rows, after: Rows, terms: Terms) -> dict[str, str]:
    """Metric -> its title in the headline: the target, and what its answers became."""
    target = terms.target
    titles = {target.metric: _answers(terms)}
    for verdict, metric in target.side_metrics.items():
        measured = [*before.where(metric), *after.where(metric)]
        # Broken text always, since it may pass for success; the others where there are any.
        if verdict == DEGENERATE or any(row.mean for row in measured):
            titles[metric] = f"{verdict} instead"
    return {metric: title for metric, title in titles.items() if before.where(metric)}


def _became(before: Rows, after: Rows, terms: Terms) -> str:
    """What the target's answers turned into, as a sentence; empty where nothing rises."""
    risen = []
    for verdict, metric in terms.target.side_metrics.items():
        if not before.where(metric) or not after.where(metric):
            continue
        end = after.one(metric)
        if end.mean > before.one(metric).mean:
            risen.append(f"{verdict} {end:.0%}")
    return f"In their place: {listed(risen)}. " if risen else ""


def _protected(rows: Rows, terms: Terms) -> str:
    """What was to be spared, in a search with the budget of each, and what was not."""
    spared = []
    for name in terms.protected:
        for budget in rows.where("budget", behaviour=name):
            spared.append(f"{name} ({budget.mean:g})")
    removed = (terms.target.name, terms.target.part_of)
    open_to_it = [name for name in terms.names if name not in (*removed, *terms.protected)]
    text = f"Protected, each with the nats per token that it may lose: {listed(spared)}."
    if terms.protected and not spared:  # the published protocol, which knows no budget
        text = f"Spared, by the weights that it needs most: {listed(terms.protected)}."
    return f"{text} Not protected: {listed(open_to_it)}." if open_to_it else text


def _answers(terms: Terms) -> str:
    """The target's answers that count."""
    return f"valid {terms.target.name} answers"


def _cost(before: Rows, after: Rows, terms: Terms) -> str:
    """The kept ability that falls most, as a sentence."""
    changes = _changes(before, after, terms)
    worst = min(changes, key=changes.__getitem__, default=None)
    if worst is None or changes[worst] >= 0:
        return f"None of the {len(changes)} kept abilities falls."
    return (
        f'Of {len(changes)} kept abilities, "{worst}" suffers most: {changes[worst]:+.1f} points.'
    )


def _changes(before: Rows, after: Rows, terms: Terms) -> dict[str, float]:
    """Title of each kept ability -> how far its rate changes, in points."""
    changes = {}
    for behaviour in terms.kept:
        # What the unpruned model never does cannot fall.
        if after.where(behaviour.metric) and before.one(behaviour.metric).mean > 0:
            rate_after = after.one(behaviour.metric).mean
            rate_before = before.one(behaviour.metric).mean
            changes[behaviour.title] = 100 * (rate_after - rate_before)
    return changes


def _loss_changes(before: Rows, after: Rows, terms: Terms) -> str:
    changes = []
    for behaviour in (terms.target, terms.contrast):
        loss = behaviour.nll_metric
        change = after.one(loss).mean - before.one(loss).mean
        changes.append(round(change, 2) + 0.0)  # a small fall is no "-0.00"
    return (
        f"The loss on {terms.target.name} answers changes by {changes[0]:+.2f} nats per token, on "
        f"{terms.contrast.name} ones by {changes[1]:+.2f}."
    )


def _warnings(rows: Rows, terms: Terms) -> list[str]:
    warnings = []
    n_verified = {}
    for row in rows.where("calibration_examples"):
        name = str(row.labels["behaviour"])
        if name in (terms.target.name, *terms.protected):
            n_verified[name] = int(row.mean)
    few = few_answers(n_verified)
    if few:
        warnings.append(f"Warning: {few}.")
    if any(row.mean for row in (*rows.where(REPEATED), *rows.where(IN_TWO_SPLITS))):
        warnings.append(repeats_text(rows))
    if rows.where(VALIDATION, used="no"):
        warnings.append(
            "Warning: the judge does not tell harmful answers from harmless ones, so the local "
            "rules judge, and harm is read from the loss alone."
        )
    if rows.where(VALIDATION, used="untested"):
        warnings.append(
            "Warning: there are too few requests to say whether the judge tells harmful answers "
            "from harmless ones."
        )
    for row in _doubts(rows, terms):
        warnings.append(
            f"Warning: {row:.0%} of the {terms.target.title} answers without the circuit keep half "
            "of their words or more and are judged otherwise than before. There the judge "
            "contradicts itself: read some answers before you believe its rates."
        )
    for row in rows.where("calibration_nll"):
        if row.mean < SATURATED_NLL:
            warnings.append(
                f"Warning: {row.labels['behaviour']} loss {row.mean:.3f} nats per token is "
                "saturated, so its scores are noise."
            )
    return warnings
