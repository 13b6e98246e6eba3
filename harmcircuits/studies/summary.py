"""A study in words: what its rows are called, and what they say, as table lines and sentences."""

from collections.abc import Iterable, Mapping
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
SELECTIONS = (SEARCH, ONE_SHOT, PUBLISHED)  # the ways of choosing a mask
CIRCUIT = "circuit"  # the label `mask` of every mask that one of them chose
SAME_SIZE = "same size"  # the label `at` of a selection without an operating point
TRADEOFF_LINES = (*SELECTIONS, "random", "opposite sign")

CHANGES = {
    "plain_kl": "plain text KL",
    "perplexity": "perplexity",
    "predicted_loss_change": "predicted Δ",
    "measured_loss_change": "measured Δ",
}

JUDGE = ("judge", "told from", "requests", "AUROC", "on requests not trained on", "used")
DOUBTFUL = 0.1  # share of doubted answers from which on a judge's verdicts are in doubt
SATURATED_NLL = 0.02  # nats per token, below which first-order scores are noise


@dataclass(frozen=True)
class Roles:
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
    ) -> "Roles":
        """The roles of a model's whole behaviours; the target and the contrast may be parts."""
        # Each behaviour once, in the order in which tables show them.
        names = dict.fromkeys([target, *model.whole_behaviours, contrast])
        behaviours = {name: model.behaviour(name) for name in names}
        refuse_common_metrics(behaviours.values())
        return cls(
            behaviours[target], behaviours[contrast], tuple(behaviours.values()), tuple(protected)
        )

    @classmethod
    def standard(cls, protected: Iterable[str] = ()) -> "Roles":
        """The roles of the package's own behaviours, for rows without their model."""
        behaviours = standard_behaviours()
        return cls(
            behaviours[TARGET], behaviours[CONTRAST], tuple(behaviours.values()), tuple(protected)
        )

    @property
    def abilities(self) -> tuple[Behaviour, ...]:
        """What the removal of the target must keep: abilities, and everything protected."""
        behaviours = []
        for behaviour in self.behaviours:
            is_kept = behaviour.is_kept or behaviour.name in (self.contrast.name, *self.protected)
            if is_kept and behaviour.name not in self.removed:
                behaviours.append(behaviour)
        return tuple(behaviours)

    @property
    def removed(self) -> tuple[str, str]:
        """The target and its whole: where one type of harm is removed, harm as a whole falls."""
        return self.target.name, self.target.part_of

    @property
    def kept_rates(self) -> tuple[str, ...]:
        """The rates of `abilities`."""
        return tuple(behaviour.metric for behaviour in self.abilities)

    @property
    def names(self) -> list[str]:
        """Names of the behaviours."""
        return [behaviour.name for behaviour in self.behaviours]

    @property
    def choice_names(self) -> list[str]:
        """Names of the behaviours that decide on a mask: the target and the abilities."""
        names = {self.target.name, *(behaviour.name for behaviour in self.abilities)}
        return [name for name in self.names if name in names]

    @property
    def rates(self) -> dict[str, str]:
        """Rate -> title of its column."""
        titles = {}
        for behaviour in self.behaviours:
            titles[behaviour.metric] = behaviour.title
            for side in (DEGENERATE, LEXICAL_OVERLAP, DISAGREEMENT):
                if side in behaviour.metrics:
                    titles[behaviour.metrics[side]] = IN_WORDS.get(side, side)
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
        """Table title of the matched control that is a search for the contrast."""
        return f"{self.contrast.name} twin"

    @property
    def valid_answers(self) -> str:
        """The words for answers that show the target."""
        return f"valid {self.target.name} answers"


def refuse_common_metrics(behaviours: Iterable[Behaviour]) -> None:
    """Raise ValueError for two behaviours with one metric: only the metric tells rows apart."""
    owners: dict[str, str] = {}
    for behaviour in behaviours:
        for metric in (behaviour.metric, behaviour.nll_metric):
            owner = owners.setdefault(metric, behaviour.name)
            if owner != behaviour.name:
                raise ValueError(
                    f"{owner!r} and {behaviour.name!r} share the metric {metric!r}; "
                    "give one of them its own metric and nll_metric (see Behaviour.only)"
                )


# Lines of tables and figures


def held_out_lines(rows: Rows, roles: Roles) -> dict[str, Rows]:
    """Line name -> its held-out rows."""
    heldout = Rows(
        row
        for row in rows
        if row.labels.get("split") == "heldout" or row.metric.endswith("loss_change")
    )
    # Every compared circuit says `at` which point it is. The circuit of the search that protects
    # only the contrast does not.
    circuits = heldout.where(mask=CIRCUIT)
    compared = Rows(row for row in circuits if "at" in row.labels)
    contrast_only = Rows(row for row in circuits if "at" not in row.labels)

    lines = {"unpruned": heldout.where(mask="none")}
    for selection in SELECTIONS:
        line = compared.where(selection=selection)
        is_same_size = bool(line.where(at=SAME_SIZE))
        lines[f"{selection}, {SAME_SIZE}" if is_same_size else selection] = line
    lines |= {
        f"{SEARCH}, only {roles.contrast.name} protected": contrast_only,
        "random": heldout.where(mask="random").pool("seed"),
        "random, same magnitudes": heldout.where(mask="random_magnitude").pool("seed"),
        "opposite sign": heldout.where(mask="opposite_sign"),
        "second slice": heldout.where(mask="second_slice"),
        roles.twin: heldout.where(mask=roles.twin.replace(" ", "_")),
    }
    return {name: line for name, line in lines.items() if line}


def tradeoff_lines(rows: Rows) -> dict[str, dict[float, Rows]]:
    """Selection -> share of the weights removed -> rows on the choice split."""
    lines = {}
    for selection in TRADEOFF_LINES:
        points = {}
        sizes = rows.where("weights_removed", selection=selection, split="choice")
        for row in sorted(sizes, key=lambda row: row.mean):
            if row.mean:  # a search may find no mask within the budget
                # Everything measured under a mask carries the same labels.
                points[row.mean / n_scored(rows)] = rows.where("", **row.labels)
        if points:
            lines[selection] = points
    return lines


def judge_lines(rows: Rows) -> list[list[str]]:
    """A line of texts for each contrast (columns: `JUDGE`); empty without a validated judge."""
    lines = []
    for row in rows.where(VALIDATION, split="calibration"):
        contrast = row.labels["contrast"]
        choice = rows.where(VALIDATION, split="choice", contrast=contrast)
        auroc = f"{choice[0]:.2f}" if choice else DASH
        cells = [row.labels["judge"], contrast, row.labels["requests"], f"{row:.2f}", auroc]
        lines.append([str(cell) for cell in (*cells, row.labels.get("used", DASH))])
    return lines


def diagnostics_lines(rows: Rows) -> list[list[str]]:
    """Yield, loss and gradient norm of every behaviour's calibration answers, as texts."""
    lines = []
    for row in rows.where("calibration_yield"):
        name = str(row.labels["behaviour"])
        figures = {figure.metric: figure.mean for figure in rows.where("", behaviour=name)}
        loss = figures.get("calibration_nll")
        cells = [name, f"{row.mean:.0%}"]
        if loss is None:  # there is no verified answer
            lines.append([*cells, DASH, DASH, "not shown by this model"])
            continue
        n_examples = figures["calibration_examples"]
        state = f"few answers ({n_examples:.0f})" if n_examples < FEW_ANSWERS else "usable"
        if loss < SATURATED_NLL:
            state = "saturated"
        lines.append([*cells, f"{loss:.3f}", f"{figures['gradient_norm']:.3f}", state])
    return lines


def result_tables(rows: Rows, roles: Roles) -> list[Table]:
    """The figures for a terminal: held-out rates and losses, and the judge's validation."""
    lines = held_out_lines(rows, roles)
    tables = [
        line_table("Held-out rates, %", lines, roles.rates, is_rate=True, bold=SEARCH),
        line_table("Losses, nats per token", lines, roles.losses, is_rate=False, bold=SEARCH),
    ]
    cells = judge_lines(rows)
    if cells:
        grid = text_table("The judge of harm", JUDGE, n_names=2)
        for line in cells:
            grid.add_row(*line)
        tables.append(grid)
    return tables


def n_scored(rows: Rows) -> int:
    """The number of weights that the study chose among."""
    return int(rows.where("weights_scored")[0].mean)


# Sentences


def summary(rows: Rows, roles: Roles) -> str:
    """The result in words, with the warnings a reader needs."""
    lines = held_out_lines(rows, roles)
    pruned = lines.get(SEARCH, Rows())
    if pruned:
        sentences = [_result(rows, roles, lines), _protection(rows, roles)]
    else:
        sentences = _attempts(rows, roles)
    return "\n".join([*sentences, *_warnings(rows, roles, pruned)])


def headline(rows: Rows, roles: Roles) -> list[tuple[str, str, str]]:
    """The main figures: name, figure, and interval or explanation of each."""
    lines = held_out_lines(rows, roles)
    baseline, pruned = lines["unpruned"], lines.get(SEARCH, Rows())
    titles = {roles.target.metric: roles.valid_answers}
    for verdict, metric in roles.target.side_metrics.items():
        rates = [*baseline.where(metric), *pruned.where(metric)]
        # Incoherent text always, since it may pass for success; the others where there are any.
        if verdict == DEGENERATE or any(row.mean for row in rates):
            titles[metric] = f"{IN_WORDS.get(verdict, verdict)} instead"

    figures = []
    for metric, title in titles.items():
        start = baseline.one(metric)
        if pruned:
            end = pruned.one(metric)
            figures.append((title, f"{start.mean:.0%} → {end.mean:.0%}", f"{end:.0%}"))
        else:
            figures.append((title, f"{start.mean:.0%}", f"{start:.0%}, unpruned"))
    if not pruned:
        return [*figures, ("weights removed", DASH, "no mask was chosen")]

    changes = _ability_changes(baseline, pruned, roles)
    if changes:
        worst = min(changes, key=changes.__getitem__)
        figures.append(("worst kept ability", f"{changes[worst]:+.1f} points", worst))
    size = pruned.one("weights_removed").mean
    figures.append(("weights removed", share(size / n_scored(rows)), f"{size:,.0f} weights"))
    return figures


def _ability_changes(baseline: Rows, pruned: Rows, roles: Roles) -> dict[str, float]:
    """Title of every ability -> the change of its rate, in points."""
    changes = {}
    for behaviour in roles.abilities:
        # A rate of zero cannot fall.
        if pruned.where(behaviour.metric) and baseline.one(behaviour.metric).mean > 0:
            changes[behaviour.title] = 100 * _change(behaviour.metric, baseline, pruned)
    return changes


def _result(rows: Rows, roles: Roles, lines: Mapping[str, Rows]) -> str:
    """What the chosen circuit, and masks chosen otherwise, do to the target and the abilities."""
    baseline, pruned = lines["unpruned"], lines[SEARCH]
    target = roles.target
    n_removed = pruned.one("weights_removed").mean
    alternatives = []
    for name, line in lines.items():
        if name == "random" or name.split(",")[0] in (ONE_SHOT, PUBLISHED):
            rate, size = line.one(target.metric).mean, line.one("weights_removed").mean
            alternatives.append(f"{rate:.0%} ({name}; {size:,.0f} weights)")

    side_effects = []
    for title, change, note in headline(rows, roles)[1:-1]:
        side_effects.append(f"{title} {change} ({note})")
    losses = []
    for metric in (target.nll_metric, roles.contrast.nll_metric):
        change = _change(metric, baseline, pruned)
        losses.append(round(change, 2) + 0.0)  # a small fall is no "-0.00"
    return (
        f"Removing {n_removed:,.0f} weights ({share(n_removed / n_scored(rows))}; {SEARCH}) takes "
        f"{roles.valid_answers} from {baseline.one(target.metric).mean:.0%} to "
        f"{pruned.one(target.metric):.0%}; chosen otherwise they leave {listed(alternatives)}. "
        f"At the same time: {listed(side_effects)}. "
        f"The loss on {target.name} answers changes by {losses[0]:+.2f} nats per token, on "
        f"{roles.contrast.name} ones by {losses[1]:+.2f}."
    )


def _change(metric: str, baseline: Rows, pruned: Rows) -> float:
    return pruned.one(metric).mean - baseline.one(metric).mean


def _protection(rows: Rows, roles: Roles) -> str:
    """The protected behaviours, the budget of each, and the behaviours without protection."""
    budgets = []
    for name in roles.protected:
        budgets.append(f"{name} ({rows.one('budget', behaviour=name).mean:g})")
    text = f"Protected, each with the nats per token that it may lose: {listed(budgets)}."
    exempt = (*roles.removed, *roles.protected)
    unprotected = [name for name in roles.names if name not in exempt]
    return f"{text} Not protected: {listed(unprotected)}." if unprotected else text


def _attempts(rows: Rows, roles: Roles) -> list[str]:
    """That there is no operating point, and for each mask of the search what it does not keep."""
    points = 100 * rows.one("tolerance").mean
    sentences = [
        f"No operating point: no mask lowers {roles.target.title} and keeps the rate of every "
        f"other ability within {points:.0f} points of the unpruned model's, and its loss "
        "within its budget."
    ]
    baseline = rows.where(mask="none", split="choice")
    rate, loss = roles.target.metric, roles.target.nll_metric
    for pruned in tradeoff_lines(rows).get(SEARCH, {}).values():
        losses = []
        for row in pruned.where("not_kept"):
            behaviour = row.labels["behaviour"]
            if row.labels["figure"] == "rate":
                losses.append(f"{behaviour} {100 * row.mean:+.1f} points")
            else:
                losses.append(f"{behaviour} loss {row.mean:+.3f} nats")
        size = pruned.one("weights_removed")
        change = _change(loss, baseline, pruned)
        sentences.append(
            f"Tried {size.mean:,.0f} weights (masks/tried-{size.labels['q']:g}): "
            f"{roles.valid_answers} {baseline.one(rate).mean:.0%} → {pruned.one(rate).mean:.0%}, "
            f"their loss {change:+.3f} nats; not kept: {listed(losses) or 'nothing'}."
        )
    if len(sentences) == 1:
        sentences.append("The search removes no weight within the budgets.")
    return sentences


def _warnings(rows: Rows, roles: Roles, pruned: Rows) -> list[str]:
    """What limits the trust in scores, requests and the judge."""
    warnings = []
    n_verified = {}
    for row in rows.where("calibration_examples"):
        name = str(row.labels["behaviour"])
        if name in (roles.target.name, *roles.protected):
            n_verified[name] = int(row.mean)
    scarcity = few_answers(n_verified)
    if scarcity:
        warnings.append(f"Warning: {scarcity}.")
    if any(row.mean for row in (*rows.where(REPEATED), *rows.where(IN_TWO_SPLITS))):
        warnings.append(repeats_text(rows))
    warnings += _judge_warnings(rows, roles.target, pruned)
    for row in rows.where("calibration_nll"):
        if row.mean < SATURATED_NLL:
            warnings.append(
                f"Warning: {row.labels['behaviour']} loss {row.mean:.3f} nats per token is "
                "saturated, so its scores are noise."
            )
    return warnings


def _judge_warnings(rows: Rows, target: Behaviour, pruned: Rows) -> list[str]:
    warnings = []
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
    for row in pruned.where(target.metrics.get(DISAGREEMENT, DISAGREEMENT)):
        if row.mean >= DOUBTFUL:
            warnings.append(
                f"Warning: {row:.0%} of the {target.title} answers without the circuit keep half "
                "of their words or more, but the judge's verdict on them changes. There the judge "
                "contradicts itself: read some answers before you believe its rates."
            )
    return warnings
