"""A study's rows as lines (the unpruned model, the circuit, every control), and as a sentence."""

from collections.abc import Mapping
from dataclasses import dataclass

from rich.table import Table

from harmcircuits.display import share
from harmcircuits.measurements import Rows
from harmcircuits.studies.diagnostics import SATURATED_NLL
from harmcircuits.studies.terms import Terms
from harmcircuits.views.tables import DASH, line_table, text_table

BY_SEARCH = "circuit, by search"
IN_ROUNDS = "circuit, in rounds"
ONE_SHOT = "circuit, one shot"
CIRCUITS = (BY_SEARCH, IN_ROUNDS, ONE_SHOT)
GROUND_TRUTH = {
    "recovery_auroc": "AUROC",
    "recovery_matched_auroc": "AUROC, same |W|",
    "recovery_precision": "precision at |S|",
    "recovery_precision_few": "precision at 1,000",
}
DIAGNOSTICS = ("behaviour", "verified answers", "NLL", "gradient norm", "scores")


@dataclass(frozen=True, repr=False)
class StudyLines:
    """What a study's page shows, sorted into lines.

    Attributes:
        summary: in words.
        held_out: mask -> its held-out rows.
        tradeoff: way of choosing -> share removed -> rows on the choice split.
        location: where the removed weights sit.
        diagnostics: texts of a line for each behaviour (columns: `DIAGNOSTICS`).
        ground_truth: texts of a line for each score; empty where no circuit is known.
    """

    summary: str
    held_out: Mapping[str, Rows]
    tradeoff: Mapping[str, Mapping[float, Rows]]
    location: Rows
    diagnostics: list[list[str]]
    ground_truth: list[list[str]]

    @classmethod
    def of(cls, rows: Rows, terms: Terms, protect_share: float | None = None) -> "StudyLines":
        """The lines of a study.

        Args:
            rows: of the study.
            terms: what they are called.
            protect_share: of the trade-off; None where no mask was chosen.
        """
        tradeoff = {} if protect_share is None else tradeoff_lines(rows, protect_share)
        return cls(
            summary=summary(rows, terms),
            held_out=held_out_lines(rows, terms),
            tradeoff=tradeoff,
            location=rows.where("weights_removed", by="matrix"),
            diagnostics=diagnostics_lines(rows),
            ground_truth=ground_truth_lines(rows),
        )


def held_out_lines(rows: Rows, terms: Terms) -> dict[str, Rows]:
    """Line name -> its held-out rows. Random masks are pooled over seeds.

    A pooled row is the mean over seeds with the widest ends of their intervals.

    Args:
        rows: of a study.
        terms: what they are called.
    """
    measured = Rows(
        row
        for row in rows
        if row.labels.get("split") == "heldout" or row.metric.endswith("loss_change")
    )
    # A study also measures a circuit that protects the contrast only, which has a line of its own.
    # Where nothing but the contrast is protected anyway, that circuit is the main one.
    circuits = measured.where(mask="circuit")
    contrast = terms.contrast.name
    contrast_only = circuits.where(protected=contrast)
    is_all = len(contrast_only) == len(circuits)
    full = circuits
    if not is_all:
        full = Rows(row for row in circuits if row.labels.get("protected") != contrast)
    twin = terms.twin.replace(" ", "_")
    lines = {
        "unpruned": measured.where(mask="none"),
        BY_SEARCH: full.where(selection="search"),
        IN_ROUNDS: full.where(selection="rounds"),
        ONE_SHOT: full.where(selection="one shot"),
        f"circuit, only {contrast} protected": Rows() if is_all else contrast_only,
        "random": measured.where(mask="random").pool("seed"),
        "random, same magnitudes": measured.where(mask="random_magnitude").pool("seed"),
        "opposite sign": measured.where(mask="opposite_sign"),
        "second slice": measured.where(mask="second_slice"),
        terms.twin: measured.where(mask=twin),
    }
    return {name: of_line for name, of_line in lines.items() if of_line}


def result_tables(rows: Rows, terms: Terms) -> list[Table]:
    """The figures for a terminal: held-out rates and losses, and recovery of a known circuit.

    Args:
        rows: of a study.
        terms: what they are called.
    """
    lines = held_out_lines(rows, terms)
    bold = next((name for name in CIRCUITS if name in lines), IN_ROUNDS)
    tables = [
        line_table("Held-out rates, %", lines, terms.rates, is_rate=True, bold=bold),
        line_table("Losses, nats per token", lines, terms.losses, is_rate=False, bold=bold),
    ]
    if rows.where("recovery_auroc"):
        tables.append(ground_truth_table(rows))
    return tables


def ground_truth_table(rows: Rows) -> Table:
    """How well each score finds the planted circuit."""
    of_scores = rows.where("recovery_auroc")
    n_true = int(of_scores[0].labels["n_true"])
    title = f"Against the planted circuit S of {n_true:,} weights"
    grid = text_table(title, ["score", *GROUND_TRUTH.values()])
    for line in ground_truth_lines(rows):
        grid.add_row(*line)
    return grid


def ground_truth_lines(rows: Rows) -> list[list[str]]:
    """A line for each score: its name and its figures."""
    lines = []
    for method in rows.where("recovery_auroc").by("method"):
        figures = []
        for metric in GROUND_TRUTH:
            of_metric = rows.where(metric, method=method)
            figures.append(f"{of_metric[0].mean:.3f}")
        lines.append([str(method), *figures])
    return lines


def tradeoff_lines(rows: Rows, protect_share: float) -> dict[str, dict[float, Rows]]:
    """Way of choosing -> share of the weights removed -> rows on the choice split.

    Args:
        rows: of a study.
        protect_share: under which the circuits were chosen.
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
                # Everything measured under a mask carries the same labels.
                points[row.mean / n_scored(rows)] = rows.where("", **row.labels)
        lines[title] = points
    return lines


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
        state = "saturated" if loss < SATURATED_NLL else "usable"
        lines.append([name, f"{row.mean:.0%}", f"{loss:.3f}", f"{norm:.3f}", state])
    return lines


def n_scored(rows: Rows) -> int:
    """How many weights the study chose among."""
    return int(rows.where("weights_scored")[0].mean)


def summary(rows: Rows, terms: Terms) -> str:
    """The result in words, with the warnings a reader needs.

    Says so where no mask was chosen.

    Args:
        rows: of a study.
        terms: what they are called.
    """
    lines = held_out_lines(rows, terms)
    circuits = [name for name in CIRCUITS if name in lines]
    if not circuits:
        points = 100 * rows.one("tolerance").mean
        kept = (
            f"no mask of the grid lowers {terms.target.title} and keeps every other ability, "
            f"within {points:.0f} % of answers"
        )
        text = f"No operating point: {kept} of the unpruned model."
        return "\n".join([text, *_warnings(rows)])

    rate = terms.target.metric
    before = lines["unpruned"].one(rate)
    best = min(circuits, key=lambda name: lines[name].one(rate).mean)
    after = lines[best]
    size = after.one("weights_removed").mean
    random = lines["random"].one(rate).mean
    n_random = lines["random"].one("weights_removed").mean
    cost = _cost(lines["unpruned"], after, terms)
    text = (
        f"Removing {size:,.0f} weights ({share(size / n_scored(rows))}; {best}) takes "
        f"{_answers(terms)} from {before.mean:.0%} to {after.one(rate):.0%}; "
        f"{n_random:,.0f} random weights leave {random:.0%}. {cost} "
        f"{_loss_changes(lines['unpruned'], after, terms)}"
    )
    return "\n".join([text, *_warnings(rows)])


def _answers(terms: Terms) -> str:
    """The target's answers that count."""
    return f"valid {terms.target.name} answers"


def _cost(before: Rows, after: Rows, terms: Terms) -> str:
    """The kept ability that falls most, as a sentence."""
    changes = {}  # in points
    for behaviour in terms.kept:
        if after.where(behaviour.metric):
            rate_after = after.one(behaviour.metric).mean
            rate_before = before.one(behaviour.metric).mean
            changes[behaviour.title] = 100 * (rate_after - rate_before)
    worst = min(changes, key=changes.__getitem__)
    if changes[worst] >= 0:
        return f"None of the {len(changes)} kept abilities falls."
    return (
        f'Of {len(changes)} kept abilities, "{worst}" suffers most: {changes[worst]:+.1f} points.'
    )


def _loss_changes(before: Rows, after: Rows, terms: Terms) -> str:
    changes = []
    for behaviour in (terms.target, terms.contrast):
        loss = behaviour.nll_metric
        changes.append(after.one(loss).mean - before.one(loss).mean)
    return (
        f"The loss on {terms.target.name} answers changes by {changes[0]:+.2f} nats per token, on "
        f"{terms.contrast.name} ones by {changes[1]:+.2f}."
    )


def _warnings(rows: Rows) -> list[str]:
    warnings = []
    for row in rows.where("calibration_nll"):
        if row.mean < SATURATED_NLL:
            warnings.append(
                f"Warning: {row.labels['behaviour']} loss {row.mean:.3f} nats per token is "
                "saturated, so its scores are noise."
            )
    return warnings
