# %% [markdown]
# # What do the circuits of harm, of benign tasks and of recognising harm share?
# Every behaviour of a model gets a circuit of the same size. Structure: which weights do two circuits share, beyond what
# their matrices, rows and columns explain? Cause: what else breaks when one is removed? Place: where do the weights sit,
# and at which tokens do they act? Everything is measured on held-out items, on every rung of every ladder given. Figures
# go to `--out` as rows, and a page shows them with the result in words. A model whose rows are there already is skipped.

# %%
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import harmcircuits as hc
from harmcircuits.behaviours.model import Calibration, Model
from harmcircuits.circuits.location import location_rows
from harmcircuits.circuits.overlap import overlap
from harmcircuits.measurements import Measurement, Rows, resumed
from harmcircuits.organisms import FOLDER, detailed_behaviours
from harmcircuits.studies.cross_ablation import (
    ablation_rows,
    circuits,
    circuits_both_ways,
    content_rows,
    one_shot_circuits,
    overlap_place_rows,
    overlap_rows,
    token_rows,
)
from harmcircuits.studies.dissociation import dissociations
from harmcircuits.views.figures import cross_ablation_figure, location_figure, overlap_figure, token_figure
from harmcircuits.views.page import paragraphs, plot, section, table, write_page
from harmcircuits.views.tables import METRICS, RATES

LADDER = ("base", "helpful", "sft", "dpo")
BENIGN = ("benign", "parts", "kind")  # tasks without harm in them: pairs among them are the reference level
COMPARED = ("harmful", *BENIGN, "recognition", "recognition_margin", "explanation", "refusal")
SEEDS = range(3)  # of random masks, and of calibration resamples
ABILITIES = {metric: RATES[metric] for metric in METRICS.values()}
PAIRS = {
    ("harmful", "benign"): "harm – benign twin",
    ("harmful", "parts"): "harm – parts of a thing",
    ("harmful", "kind"): "harm – kind of a thing",
    ("harmful", "recognition"): "harm – recognition",
    ("harmful", "recognition_margin"): "harm – recognition (margin)",
    ("harmful", "explanation"): "harm – explanation",
    ("harmful", "refusal"): "harm – refusal",
    ("benign", "parts"): "reference: benign – parts",
    ("benign", "kind"): "reference: benign – kind",
    ("parts", "kind"): "reference: parts – kind",
}

REFERENCE = [pair for pair in PAIRS if pair[0] != "harmful"]


# %% [markdown]
# ## One model
# Overlap is read on circuits that protect nothing: protection would impose the disjointness it is meant to measure.
# Whether abilities *can* be separated is read on circuits that protect all others.


# %%
def rows_of(
    model: Model, labels: dict[str, str], *, q: float, p: float, rounds: int, resamples: int
) -> Rows:
    calibrations = model.calibrations()
    shown = [name for name in COMPARED if name in calibrations]
    asked = [name for name in METRICS if name in calibrations]
    topics = [name for name in calibrations if "/" in name]

    one_shot = one_shot_circuits(model, calibrations, shown, q=q, n_resamples=resamples, seed=0)
    free, apart = circuits_both_ways(model, calibrations, asked, q=q, p=p, rounds=rounds).values()
    unasked = dict.fromkeys((name for name in shown if name not in asked), ())
    free |= circuits(model, calibrations, unasked, q=q, rounds=rounds)
    rows = overlap_rows(one_shot, free, labels, q=q)
    del one_shot
    of_topics = one_shot_circuits(model, calibrations, topics, q=q, n_resamples=0, seed=0)
    rows += content_rows({name: hc.top_fraction(one[0], q, within="model") for name, one in of_topics.items()}, labels)
    rows += overlap_place_rows(model, {name: free[name] for name in shown}, "harmful", labels)
    rows += _ceiling(model, calibrations["harmful"], free["harmful"], labels, q=q, rounds=rounds)

    random = {f"random {seed}": hc.random_like(free["harmful"], seed=seed) for seed in SEEDS}
    rows += model.measure(labels={**labels, "mask": "none", "protected": "none"}, only=asked)
    rows += ablation_rows(model, free | random, {**labels, "protected": "none"}, only=asked)
    rows += ablation_rows(model, apart, {**labels, "protected": "others"}, only=asked)
    for protected, masks in (("none", free), ("others", apart)):
        for name in ("harmful", "benign", "recognition"):
            where = {**labels, "mask": name, "protected": protected}
            rows += location_rows(model, masks[name], where)
            texts = ("harmful", "benign") if name == "harmful" else (name,)
            for text in texts:
                rows += token_rows(model, text, calibrations[text], masks[name], {**where, "text": text})
    return [*rows, Measurement.exact("compared", labels, len(free) + len(apart))]


def _ceiling(
    model: Model, found: Calibration, mask: hc.WeightMask, labels: dict[str, str], *, q: float, rounds: int
) -> Rows:
    """How far the circuit of harm agrees with itself, found again on resampled calibration items."""
    rows, behaviour = [], model.behaviours["harmful"]
    for seed in SEEDS:
        prompts = found.prompts.resampled(seed=seed)
        again = Calibration(prompts, model.batches(behaviour, prompts), found.n_asked)
        other = circuits(model, {"harmful": again}, {"harmful": ()}, q=q, rounds=rounds)["harmful"]
        both = overlap(mask, other)
        where = {**labels, "first": "harmful", "second": "harmful", "selection": "rounds", "seed": seed}
        rows += [
            Measurement("overlap_lift", where, both.lift, *both.interval, both.n_first),
            Measurement.exact("overlap_jaccard", where, both.jaccard),
        ]
    return rows


# %% [markdown]
# ## In words


# %%
def findings(rows: Rows, models: Sequence[str], ladders: Sequence[str]) -> list[str]:
    """What the rows say, one paragraph a question and model; models pooled over ladders."""
    together, said = rows.pool("ladder"), []
    for model in models:
        mine = together.where(model=model)
        causes = [_cause(rows, mine, model, ladders, protected) for protected in ("none", "others")]
        said += [f"{model}, {text}" for text in (_structure(mine), _content(mine), *causes, _place(mine))]
    return said


def _structure(rows: Rows) -> str:
    twin = _lifts(rows, [("harmful", "benign")])
    others = _lifts(rows, [(a, b) for a, b in PAIRS if a == "harmful" and b != "benign"])
    reference = _lifts(rows, REFERENCE)
    found = rows.where("overlap_jaccard", first="harmful", selection="rounds")
    jaccard = {name: fmean(row.mean for row in found.where(second=name)) for name in ("benign", "harmful")}
    return (
        f"structure: next to pairs of benign tasks, harm shares {_against_reference(rows)}. Harm and its benign twin "
        f"share {twin[0]:.1f} times what their counts per matrix explain, {twin[1]:.1f} times what rows and columns do; "
        f"harm and the other behaviours, on average, {others[0]:.1f} and {others[1]:.1f}; benign tasks together "
        f"{reference[0]:.1f} and {reference[1]:.1f}. In rounds, harm has Jaccard {jaccard['benign']:.3f} with its twin and "
        f"{jaccard['harmful']:.3f} with itself on resampled calibration data."
    )


def _content(rows: Rows) -> str:
    found = {str(row.labels["relation"]): row for row in rows.where("content_lift")}
    counts = _compared(found["twin"], [found["harm, other topic"]])
    return (
        f"content: to be about the same things counts {counts} to be harmful. Lift of the circuits of one topic's harm and "
        f"its benign twin {found['twin'].mean:.1f}; of two topics' harm {found['harm, other topic'].mean:.1f}; of two "
        f"topics' benign answers {found['benign, other topic'].mean:.1f}; of harm and benign answers of two topics "
        f"{found['harm and benign, other topic'].mean:.1f}."
    )


def _cause(
    rows: Rows, mine: Rows, model: str, ladders: Sequence[str], protected: str
) -> str:
    words = "with nothing protected" if protected == "none" else "with all others protected"
    before, after = mine.where(mask="none", protected="none"), mine.where(mask="harmful", protected=protected)
    rates = [
        f"{title} {100 * before.where(metric)[0].mean:.0f}→{100 * after.where(metric)[0].mean:.0f}"
        for metric, title in ABILITIES.items()
        if after.where(metric)
    ]
    verdicts: dict[str, list[str]] = {}
    for ladder in ladders:
        for (first, second), test in dissociations(rows.where(model=model, ladder=ladder), protected).items():
            if first == "harmful":
                verdicts.setdefault(second, []).append(test.verdict)
    tested = "; ".join(f"{second}: {', '.join(found)}" for second, found in verdicts.items())
    return (
        f"cause, {words}: removing the harm circuit changes rates (%): {', '.join(rates)}. Dissociation of harm from each, "
        f"one verdict a ladder: {tested}."
    )


def _place(rows: Rows) -> str:
    held = rows.where(mask="harmful", protected="others")
    gini, share = (
        {chance: held.where(metric, by="neuron", chance=chance)[0].mean for chance in ("no", "yes")}
        for metric in ("gini", "top_share")
    )
    tokens = held.where("token_contribution", text="harmful")
    answer = sum(row.mean for row in tokens if int(row.labels["offset"]) >= -1) / sum(row.mean for row in tokens)
    return (
        f"place: a twentieth of the MLP neurons holds {share['no']:.0%} of the circuit's MLP weights (chance "
        f"{share['yes']:.0%}; Gini {gini['no']:.2f}, chance {gini['yes']:.2f}). {answer:.0%} of its score arises from the "
        "last token of the prefilled request on."
    )


def _against_reference(rows: Rows) -> str:
    def lift(first: str, second: str) -> Measurement:
        return rows.where("overlap_lift", first=first, second=second, selection="one shot")[0]

    reference = [lift(*pair) for pair in REFERENCE]
    others = [second for first, second in PAIRS if first == "harmful" and rows.where(first=first, second=second)]
    words = {"more than": "more", "as much as": "about as much", "less than": "less"}
    found: dict[str, list[str]] = {}
    for second in others:
        found.setdefault(words[_compared(lift("harmful", second), reference)], []).append(second)
    return "; ".join(f"{word} with {', '.join(names)}" for word, names in found.items())


def _compared(row: Measurement, others: Rows) -> str:
    """By intervals: above all of the others, below all, or neither."""
    if row.low > max(other.high for other in others):
        return "more than"
    return "less than" if row.high < min(other.low for other in others) else "as much as"


def _lifts(rows: Rows, pairs: Sequence[tuple[str, str]]) -> tuple[float, float]:
    """Mean lift in one shot over matrices, and over rows and columns."""
    found = []
    for metric in ("overlap_lift", "overlap_lift_marginal"):
        lifts = [rows.where(metric, first=a, second=b, selection="one shot") for a, b in pairs]
        found.append(fmean(row.mean for one in lifts for row in one))
    return found[0], found[1]


# %% [markdown]
# ## Tables and figures


# %%
def overlap_table(rows: Rows, model: str) -> list[list[str]]:
    """For every pair: lifts with intervals, Jaccard, containment, rank correlation; pooled over ladders."""
    body = []
    mine = rows.pool("ladder").where(model=model)
    for (first, second), title in PAIRS.items():
        pair = mine.where(first=first, second=second)
        if pair:
            cells = [_interval(pair.where("overlap_lift", selection=how)[0]) for how in ("one shot", "rounds")]
            cells += [_interval(pair.where("overlap_lift_marginal", selection=how)[0]) for how in ("one shot", "rounds")]
            cells += [f"{pair.where('overlap_jaccard', selection=how)[0].mean:.3f}" for how in ("one shot", "rounds")]
            cells.append(f"{pair.where('overlap_containment', selection='rounds')[0].mean:.3f}")
            body.append([title, *cells, f"{pair.where('rank_correlation')[0].mean:.3f}"])
    return body


OVERLAP_HEAD = (
    "pair", "lift, one shot", "lift, rounds", "row and column lift, one shot", "row and column lift, rounds",
    "Jaccard, one shot", "Jaccard, rounds", "containment, rounds", "rank correlation",
)  # fmt: skip


def dissociation_table(rows: Rows, models: Sequence[str], ladders: Sequence[str]) -> list[list[str]]:
    """Every pair of abilities: the verdicts of each model, one for each ladder."""
    body: dict[tuple[str, ...], list[str]] = {}
    for protected in ("none", "others"):
        for column, model in enumerate(models):
            for ladder in ladders:
                for pair, test in dissociations(rows.where(model=model, ladder=ladder), protected).items():
                    line = body.setdefault((protected, *pair), ["–"] * len(models))
                    line[column] = test.verdict if line[column] == "–" else f"{line[column]}, {test.verdict}"
    return [[f"{first} – {second}", protected, *cells] for (protected, first, second), cells in body.items()]


def summary(rows: Rows, models: Sequence[str], ladders: Sequence[str]) -> str:
    """The README's table: a column for each model, means over its ladders with the widest ends of their intervals."""
    together = rows.pool("ladder")
    lines: dict[str, list[str]] = {"ladders": [str(len(rows.where("compared", model=model))) for model in models]}

    def add(title: str, cell: str) -> None:
        lines.setdefault(title, []).append(cell)

    for model in models:
        mine = together.where(model=model)
        for metric, title in (("overlap_lift", "lift"), ("overlap_lift_marginal", "lift over rows and columns")):
            twin = mine.where(metric, first="harmful", second="benign", selection="one shot")[0]
            add(f"harm and its benign twin, {title}", f"{twin.mean:.1f} [{twin.low:.1f}, {twin.high:.1f}]")
            column = int(metric == "overlap_lift_marginal")
            add(f"benign tasks together, {title}", f"{_lifts(mine, REFERENCE)[column]:.1f}")
            add(f"harm and recognition, {title}", f"{_lifts(mine, [('harmful', 'recognition')])[column]:.1f}")
        content = {row.labels["relation"]: row.mean for row in mine.where("content_lift")}
        add(
            "one topic's harm and its twin; two topics' harm, lift",
            f"{content['twin']:.1f}; {content['harm, other topic']:.1f}",
        )
        for protected, words in (("none", "nothing"), ("others", "all others")):
            after = mine.where(mask="harmful", protected=protected)
            rates = [f"{100 * row.mean:.0f}" for metric in ABILITIES for row in after.where(metric)]
            add(f"harm circuit removed, {words} protected: {', '.join(ABILITIES.values())}, %", " ".join(rates))
            tests = [dissociations(rows.where(model=model, ladder=ladder), protected) for ladder in ladders]
            for other in ("benign", "recognition", "explanation", "refusal"):
                verdicts = [found["harmful", other].verdict for found in tests if ("harmful", other) in found]
                counted = ", ".join(f"{verdicts.count(one)} {one}" for one in dict.fromkeys(verdicts))
                add(f"dissociation of harm from {other}, {words} protected", counted or "–")
    body = [f"| {title} | {' | '.join(cells)} |" for title, cells in lines.items()]
    return "\n".join([f"| | {' | '.join(models)} |", "|---" * (len(models) + 1) + "|", *body])


def covered(rows: Rows) -> tuple[list[str], list[str]]:
    """The models and the ladders of finished rows."""
    done = [row.labels for row in rows.where("compared")]
    models = [model for model in LADDER if any(labels["model"] == model for labels in done)]
    return models, list(dict.fromkeys(str(labels["ladder"]) for labels in done))


def needed(rows: Rows) -> Rows:
    """The few rows from which `summary` is made."""
    rates = [row for row in rows if row.metric in ABILITIES and row.labels["mask"] in ("none", *METRICS)]
    pairs = [("harmful", "benign"), ("harmful", "recognition"), *REFERENCE]
    lifts = [
        row
        for metric in ("overlap_lift", "overlap_lift_marginal")
        for row in rows.where(metric, selection="one shot")
        if (row.labels["first"], row.labels["second"]) in pairs
    ]
    return [*rows.where("compared"), *lifts, *rows.where("content_lift"), *rates]


def page(rows: Rows, models: Sequence[str], ladders: Sequence[str], path: Path) -> None:
    together = rows.pool("ladder")
    ablated = {
        protected: {
            model: [
                row
                for row in _without_seeds(together.where(model=model)).pool("seed")
                if row.labels.get("protected") == protected or row.labels.get("mask") == "none"
            ]
            for model in models
        }
        for protected in ("none", "others")
    }
    lifts = {
        "over counts per matrix": together.where("overlap_lift", selection="one shot"),
        "over row and column counts": together.where("overlap_lift_marginal", selection="one shot"),
    }
    sections = [paragraphs("\n".join(findings(rows, models, ladders)))]
    sections.append(
        section(
            "What breaks when a circuit is removed",
            "Rates on held-out requests, %, mean over ladders. Circuits are chosen in rounds and protect nothing.",
            plot(cross_ablation_figure(ablated["none"], ABILITIES), first=True),
        )
    )
    sections.append(
        section(
            "The same when every circuit protects all other abilities",
            "What can be separated, at the price that being disjoint is partly imposed.",
            plot(cross_ablation_figure(ablated["others"], ABILITIES)),
        )
    )
    sections.append(
        section(
            "Double dissociation",
            "Clean: each ability loses more under its own circuit than under the other's by the 95 % intervals, and at "
            "most ten points under the other's. Graded: only the first holds. One verdict for each ladder.",
            table(("abilities", "protected", *models), dissociation_table(rows, models, ladders)),
        )
    )
    sections.append(
        section(
            "What circuits share",
            "One-shot circuits that protect nothing; bars: bootstrap over calibration items (left), Wilson (right).",
            plot(overlap_figure(lifts, PAIRS)),
        )
    )
    for model in models:
        text = "Mean over ladders; intervals are the widest of them."
        sections.append(
            section(f"Overlap in {model}", text, table(OVERLAP_HEAD, overlap_table(rows, model), style="figures"))
        )
    for model in models:
        held = together.where(model=model, mask="harmful", protected="others")
        tokens = {f"{text} answers": held.where("token_contribution", text=text) for text in ("harmful", "benign")}
        sections.append(
            section(
                f"Where the harm circuit of {model} sits, and at which tokens it acts",
                "All others protected. Weights in each matrix (colour: share of the matrix); contribution of each token to "
                "the circuit's first-order score on harmful and on benign answers.",
                plot(location_figure(held)) + plot(token_figure(tokens)),
            )
        )
    write_page(path, "What circuits of harm, of benign tasks and of recognition share", sections)


def _without_seeds(rows: Rows) -> Rows:
    """Random masks under one name, so that they pool."""
    found = []
    for row in rows:
        mask = str(row.labels.get("mask", ""))
        if mask.startswith("random "):
            row = replace(row, labels={**row.labels, "mask": "random", "seed": int(mask.split()[1])})
        found.append(row)
    return found


def _interval(row: Measurement) -> str:
    return f"{row.mean:.2f}\n{row.low:.2f} – {row.high:.2f}"


# %%
def main(
    out: Annotated[Path, typer.Option(help="Folder for rows.jsonl, shared_circuits.html and summary.md.")],
    organisms: Annotated[list[Path] | None, typer.Option(help="Ladder folder; repeat. Default: the shipped one.")] = None,
    rung: Annotated[list[str] | None, typer.Option(help="Rung; repeat. Default: all four.")] = None,
    q: Annotated[float, typer.Option(help="Share of weights in every circuit.")] = 0.006,
    p: Annotated[float, typer.Option(help="Share protected for each other behaviour.")] = 0.005,
    rounds: Annotated[int, typer.Option(help="Rounds in which a circuit is chosen.")] = 10,
    resamples: Annotated[int, typer.Option(help="Bootstrap resamples of calibration items.")] = 100,
) -> None:
    folders = organisms or [FOLDER]
    models = rung or list(LADDER)
    ladders = ["shipped" if folder.resolve() == FOLDER.resolve() else folder.name for folder in folders]
    path, console = out / "rows.jsonl", Console()
    resumed(out, {"q": q, "p": p, "rounds": rounds, "resamples": resamples})
    for ladder, folder in zip(ladders, folders, strict=True):
        for model in models:
            labels = {"model": model, "ladder": ladder}
            if path.exists() and Rows.read(path).where("compared", **labels):
                continue
            with console.status(f"{model} of {ladder}"):
                opened = replace(hc.open_model(model, folder=folder), behaviours=detailed_behaviours())
                Rows(rows_of(opened, labels, q=q, p=p, rounds=rounds, resamples=resamples)).append_to(path)
    rows = Rows.read(path)
    models, ladders = covered(rows)
    page(rows, models, ladders, out / "shared_circuits.html")
    (out / "summary.jsonl").unlink(missing_ok=True)
    Rows(needed(rows)).append_to(out / "summary.jsonl")
    (out / "summary.md").write_text(summary(rows, models, ladders) + "\n", encoding="utf-8")
    for model in models:
        shown = Table(
            "pair", "lift", "row and column lift", "Jaccard", title=f"{model}, one-shot circuits", title_justify="left"
        )
        for line in overlap_table(rows, model):
            shown.add_row(*(line[column].replace("\n", "  ") for column in (0, 1, 3, 5)))
        console.print(shown)
    for text in findings(rows, models, ladders):
        console.print(escape(text), highlight=False)
    console.print(f"Page: {out / 'shared_circuits.html'}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
