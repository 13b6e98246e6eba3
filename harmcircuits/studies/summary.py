"""A study in words: what its rows are called, and what they say, as lines and as sentences."""

from collections.abc import Iterable
from dataclasses import dataclass

from rich.table import Table

from harmcircuits.behaviours.behaviour import (
    CONTRAST,
    DISAGREEMENT,
    LEXICAL_OVERLAP,
    TARGET,
    Behaviour,
    standard_behaviours,
)
from harmcircuits.behaviours.judges import DEGENERATE, IN_WORDS
from harmcircuits.behaviours.model import Model
from harmcircuits.behaviours.outcomes import FEW_ANSWERS, few_answers
from harmcircuits.behaviours.probe import METRIC as VALIDATION
from harmcircuits.behaviours.repeats import IN_TWO_SPLITS, REPEATED, repeats_text
from harmcircuits.display import listed, share
from harmcircuits.measurements import Rows
from harmcircuits.views.tables import DASH, line_table, text_table

SEARCH, ONE_SHOT, PUBLISHED = "search", "one shot", "published"
WAYS = (SEARCH, ONE_SHOT, PUBLISHED)  # of choosing
CIRCUIT = "circuit"  # what a mask is called that one of them chose
SAME_SIZE = "same size"  # of a way that has no operating point of its own
TRADEOFF_LINES = (*WAYS, "random", "opposite sign")

CHANGES = {
    "plain_kl": "plain text KL",
    "perplexity": "perplexity",
    "predicted_loss_change": "predicted Δ",
    "measured_loss_change": "measured Δ",
}


@dataclass(frozen=True)
class Terms:
    """The behaviours of a study in their roles."""

    target: Behaviour
    contrast: Behaviour
    behaviours: tuple[Behaviour, ...]
    protected: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        model: Model,
        target: str = TARGET,
        contrast: str = CONTRAST,
        protected: Iterable[str] = (),
    ) -> "Terms":
        """Of a model's whole behaviours, and of the target and contrast, which may be parts."""
        # Each once, in the order in which tables show them.
        names = dict.fromkeys([target, *model.whole_behaviours, contrast])
        behaviours = tuple(model.behaviour(name) for name in names)
        # Rows are told apart by their metric alone, not by a behaviour.
        named: dict[str, str] = {}
        for behaviour in behaviours:
            for metric in (behaviour.metric, behaviour.nll_metric):
                other = named.setdefault(metric, behaviour.name)
                if other != behaviour.name:
                    raise ValueError(
                        f"{other!r} and {behaviour.name!r} share the metric {metric!r}; "
                        "give one of them a metric and nll_metric of its own (see Behaviour.only)"
                    )
        ends = (model.behaviour(target), model.behaviour(contrast))
        return cls(*ends, behaviours, tuple(protected))

    @classmethod
    def standard(cls, protected: Iterable[str] = ()) -> "Terms":
        """Of the package's own behaviours, for rows whose model is not at hand."""
        behaviours = standard_behaviours()
        ends = (behaviours[TARGET], behaviours[CONTRAST])
        return cls(*ends, tuple(behaviours.values()), tuple(protected))

    @property
    def kept(self) -> tuple[Behaviour, ...]:
        """What the removal of the target must leave alone: abilities, and all that is protected."""
        # Where the target is one type of harm, harm as a whole is lowered with it.
        removed = (self.target.name, self.target.part_of)
        named = (self.contrast.name, *self.protected)
        behaviours = []
        for behaviour in self.behaviours:
            is_kept = behaviour.is_kept or behaviour.name in named
            if is_kept and behaviour.name not in removed:
                behaviours.append(behaviour)
        return tuple(behaviours)

    @property
    def kept_rates(self) -> tuple[str, ...]:
        """The metrics of `kept`."""
        return tuple(behaviour.metric for behaviour in self.kept)

    @property
    def names(self) -> list[str]:
        """Names of the behaviours."""
        return [behaviour.name for behaviour in self.behaviours]

    @property
    def measured(self) -> list[str]:
        """Names of the behaviours that a mask is chosen by: the target and what is kept."""
        chosen_by = {behaviour.name for behaviour in self.kept}
        chosen_by.add(self.target.name)
        return [name for name in self.names if name in chosen_by]

    @property
    def rates(self) -> dict[str, str]:
        """Rate -> title of its column."""
        titles = {}
        for behaviour in self.behaviours:
            titles[behaviour.metric] = behaviour.title
            for counted in (DEGENERATE, LEXICAL_OVERLAP, DISAGREEMENT):
                if counted in behaviour.metrics:
                    titles[behaviour.metrics[counted]] = IN_WORDS.get(counted, counted)
        return titles

    @property
    def losses(self) -> dict[str, str]:
        """Loss or divergence -> title of its column."""
        roles = (self.target.name, self.contrast.name)
        titles = {}
        for behaviour in self.behaviours:
            if behaviour.is_loss_shown or behaviour.name in roles:
                titles[behaviour.nll_metric] = f"{behaviour.title} NLL"
        return {**titles, self.kl_metric: f"{self.contrast.title} KL", **CHANGES}

    @property
    def kl_metric(self) -> str:
        """Name of the divergence on the contrast's reference answers."""
        return f"{self.contrast.name}_kl"

    @property
    def twin(self) -> str:
        """What tables call the mask of the same search with the contrast as the target."""
        return f"{self.contrast.name} twin"


JUDGE = ("judge", "told from", "requests", "AUROC", "on requests not trained on", "used")
DIAGNOSTICS = ("behaviour", "verified answers", "NLL", "gradient norm", "scores")
DOUBTFUL = 0.1  # of the answers under a mask: beyond it the judge's verdicts are in doubt
SATURATED_NLL = 0.02  # nats per token, below which first-order scores are noise


def held_out_lines(rows: Rows, terms: Terms) -> dict[str, Rows]:
    """Line name -> its held-out rows."""
    measured = Rows(
        row
        for row in rows
        if row.labels.get("split") == "heldout" or row.metric.endswith("loss_change")
    )
    # A study also measures a circuit that protects the contrast only. Those that are compared say
    # `at` which size they are, and it does not.
    circuits = measured.where(mask=CIRCUIT)
    compared = Rows(row for row in circuits if "at" in row.labels)
    alone = Rows(row for row in circuits if "at" not in row.labels)
    lines = {"unpruned": measured.where(mask="none")}
    for way in WAYS:
        of_way = compared.where(selection=way)
        is_same_size = bool(of_way.where(at=SAME_SIZE))
        lines[f"{way}, {SAME_SIZE}" if is_same_size else way] = of_way
    lines |= {
        f"{SEARCH}, only {terms.contrast.name} protected": alone,
        "random": measured.where(mask="random").pool("seed"),
        "random, same magnitudes": measured.where(mask="random_magnitude").pool("seed"),
        "opposite sign": measured.where(mask="opposite_sign"),
        "second slice": measured.where(mask="second_slice"),
        terms.twin: measured.where(mask=terms.twin.replace(" ", "_")),
    }
    return {name: of_line for name, of_line in lines.items() if of_line}


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


def diagnostics_lines(rows: Rows) -> list[list[str]]:
    """Yield, loss and gradient norm of every behaviour's calibration answers, as texts."""
    lines = []
    for row in rows.where("calibration_yield"):
        name = str(row.labels["behaviour"])
        of_behaviour = rows.where("", behaviour=name)
        if not of_behaviour.where("calibration_nll"):  # no verified answer to take a loss of
            lines.append([name, f"{row.mean:.0%}", DASH, DASH, "not shown by this model"])
            continue
        loss = of_behaviour.one("calibration_nll").mean
        norm = of_behaviour.one("gradient_norm").mean
        n_examples = of_behaviour.one("calibration_examples").mean
        state = "usable"
        if loss < SATURATED_NLL:
            state = "saturated"
        elif n_examples < FEW_ANSWERS:
            state = f"few answers ({n_examples:.0f})"
        lines.append([name, f"{row.mean:.0%}", f"{loss:.3f}", f"{norm:.3f}", state])
    return lines


def result_tables(rows: Rows, terms: Terms) -> list[Table]:
    """The figures for a terminal: held-out rates and losses, and how well the judge sees harm."""
    lines = held_out_lines(rows, terms)
    tables = [
        line_table("Held-out rates, %", lines, terms.rates, is_rate=True, bold=SEARCH),
        line_table("Losses, nats per token", lines, terms.losses, is_rate=False, bold=SEARCH),
    ]
    judged = judge_lines(rows)
    if judged:
        grid = text_table("The judge of harm", JUDGE, n_names=2)
        for line in judged:
            grid.add_row(*line)
        tables.append(grid)
    return tables


def n_scored(rows: Rows) -> int:
    """How many weights the study chose among."""
    return int(rows.where("weights_scored")[0].mean)


def summary(rows: Rows, terms: Terms) -> str:
    """The result in words, with the warnings a reader needs."""
    lines = held_out_lines(rows, terms)
    if SEARCH not in lines:
        points = 100 * rows.one("tolerance").mean
        text = (
            f"No operating point: no mask lowers {terms.target.title} and keeps the rate of every "
            f"other ability within {points:.0f} points of the unpruned model's, and its loss "
            "within its budget."
        )
        return "\n".join([text, *_tried(rows, terms), *_warnings(rows, terms)])

    before, after = lines["unpruned"], lines[SEARCH]
    rate = terms.target.metric
    n_removed = after.one("weights_removed").mean
    others = []
    for name, of_line in lines.items():
        if name == "random" or name.split(",")[0] in (ONE_SHOT, PUBLISHED):
            size = of_line.one("weights_removed").mean
            others.append(f"{of_line.one(rate).mean:.0%} ({name}; {size:,.0f} weights)")
    text = (
        f"Removing {n_removed:,.0f} weights ({share(n_removed / n_scored(rows))}; {SEARCH}) takes "
        f"{_answers(terms)} from {before.one(rate).mean:.0%} to {after.one(rate):.0%}; "
        f"chosen otherwise they leave {listed(others)}. {_became(before, after, terms)}"
        f"{_cost(before, after, terms)} {_loss_changes(before, after, terms)}"
    )
    return "\n".join([text, _protected(rows, terms), *_warnings(rows, terms)])


def headline(rows: Rows, terms: Terms) -> list[tuple[str, str, str]]:
    """What a reader takes away: name, figure, and interval or explanation of each."""
    lines = held_out_lines(rows, terms)
    before, after = lines["unpruned"], lines.get(SEARCH, Rows())
    figures = []
    for metric, name in _titles(before, after, terms).items():
        start = before.one(metric)
        if after.where(metric):
            end = after.one(metric)
            figures.append((name, f"{start.mean:.0%} → {end.mean:.0%}", f"{end:.0%}"))
        else:
            figures.append((name, f"{start.mean:.0%}", f"{start:.0%}, unpruned"))
    if not after:
        return [*figures, ("weights removed", DASH, "no mask was chosen")]

    changes = _changes(before, after, terms)
    if changes:
        worst = min(changes, key=changes.__getitem__)
        figures.append(("worst kept ability", f"{changes[worst]:+.1f} points", worst))
    size = after.one("weights_removed").mean
    figures.append(("weights removed", share(size / n_scored(rows)), f"{size:,.0f} weights"))
    return figures


def _titles(before: Rows, after: Rows, terms: Terms) -> dict[str, str]:
    """Metric -> its title in the headline: the target, and what its answers became."""
    target = terms.target
    titles = {target.metric: _answers(terms)}
    for verdict, metric in target.side_metrics.items():
        measured = [*before.where(metric), *after.where(metric)]
        # Broken text always, since it may pass for success; the others where there are any.
        if verdict == DEGENERATE or any(row.mean for row in measured):
            titles[metric] = f"{IN_WORDS.get(verdict, verdict)} instead"
    return {metric: title for metric, title in titles.items() if before.where(metric)}


def _tried(rows: Rows, terms: Terms) -> list[str]:
    """A line for each mask of a search without an operating point: what it does not keep."""
    before = rows.where(mask="none", split="choice")
    rate, loss = terms.target.metric, terms.target.nll_metric
    tried = []
    for of_mask in tradeoff_lines(rows).get(SEARCH, {}).values():
        lost = []
        for row in of_mask.where("not_kept"):
            behaviour = row.labels["behaviour"]
            if row.labels["figure"] == "rate":
                lost.append(f"{behaviour} {100 * row.mean:+.1f} points")
            else:
                lost.append(f"{behaviour} loss {row.mean:+.3f} nats")
        size = of_mask.one("weights_removed")
        change = of_mask.one(loss).mean - before.one(loss).mean
        tried.append(
            f"Tried {size.mean:,.0f} weights (masks/tried-{size.labels['q']:g}): "
            f"{_answers(terms)} {before.one(rate).mean:.0%} → {of_mask.one(rate).mean:.0%}, their "
            f"loss {change:+.3f} nats; not kept: {listed(lost) or 'nothing'}."
        )
    return tried or ["The search removes no weight within the budgets."]


def _answers(terms: Terms) -> str:
    """The target's answers that count."""
    return f"valid {terms.target.name} answers"


def _became(before: Rows, after: Rows, terms: Terms) -> str:
    """What the target's answers turned into, as a sentence; empty where nothing rises."""
    risen = []
    for verdict, metric in terms.target.side_metrics.items():
        if not before.where(metric) or not after.where(metric):
            continue
        end = after.one(metric)
        if end.mean > before.one(metric).mean:
            risen.append(f"{IN_WORDS.get(verdict, verdict)} {end:.0%}")
    return f"In their place: {listed(risen)}. " if risen else ""


def _changes(before: Rows, after: Rows, terms: Terms) -> dict[str, float]:
    """Title of each kept ability -> how far its rate changes, in points."""
    changes = {}
    for behaviour in terms.kept:
        # What the unpruned model never does cannot fall.
        if after.where(behaviour.metric) and before.one(behaviour.metric).mean > 0:
            change = after.one(behaviour.metric).mean - before.one(behaviour.metric).mean
            changes[behaviour.title] = 100 * change
    return changes


def _cost(before: Rows, after: Rows, terms: Terms) -> str:
    """The kept ability that falls most, as a sentence."""
    changes = _changes(before, after, terms)
    falls = {change: title for title, change in changes.items() if change < 0}
    if not falls:
        return f"None of the {len(changes)} kept abilities falls."
    worst = min(falls)
    return f'Of {len(changes)} kept abilities, "{falls[worst]}" suffers most: {worst:+.1f} points.'


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


def _protected(rows: Rows, terms: Terms) -> str:
    """What was to be spared, with the budget of each, and what was not."""
    spared = []
    for name in terms.protected:
        budget = rows.one("budget", behaviour=name).mean
        spared.append(f"{name} ({budget:g})")
    text = f"Protected, each with the nats per token that it may lose: {listed(spared)}."
    removed = (terms.target.name, terms.target.part_of)
    open_to_it = [name for name in terms.names if name not in (*removed, *terms.protected)]
    return f"{text} Not protected: {listed(open_to_it)}." if open_to_it else text


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
    metric = terms.target.metrics.get(DISAGREEMENT)
    doubted = Rows()
    if metric:
        doubted = held_out_lines(rows, terms).get(SEARCH, Rows()).where(metric)
    for row in doubted:
        if row.mean < DOUBTFUL:
            continue
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
