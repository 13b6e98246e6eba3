# %% [markdown]
# # What do the circuits of harm, of benign tasks and of recognising harm share?
# Every behaviour of a model gets a circuit of the same size. Structure: which weights do two
# circuits share, beyond what their matrices, rows and columns explain? Cause: what else breaks when
# one is removed? Place: where do the weights sit, and at which tokens do they act? Everything is
# measured on held-out items, on every rung of every ladder given. Figures go to `--out` as rows,
# and a page shows them with the result in words. A model whose rows are there already is skipped.

# %%
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rounds import circuit_in_rounds

import harmcircuits as hc
from harmcircuits.behaviours.model import Calibration, Model
from harmcircuits.circuits.location import location_rows
from harmcircuits.circuits.overlap import overlap
from harmcircuits.measurements import Measurement, Rows, resumed
from harmcircuits.organisms import FOLDER
from harmcircuits.organisms.check import LADDER
from harmcircuits.organisms.world import BEHAVIOURS
from harmcircuits.studies.cross_ablation import (
    ablation_rows,
    circuits_both_ways,
    content_rows,
    overlap_place_rows,
    overlap_rows,
    resampled_circuits,
    token_rows,
)
from harmcircuits.studies.dissociation import dissociations
from harmcircuits.studies.terms import Terms
from harmcircuits.views.figures import (
    cross_ablation_figure,
    location_figure,
    overlap_figure,
    token_figure,
)
from harmcircuits.views.page import paragraphs, plot, section, table, write_page

# Tasks without harm in them: pairs among them are the reference level.
BENIGN = ("benign", "parts", "kind")
COMPARED = ("harmful", *BENIGN, "recognition", "recognition_margin", "explanation", "refusal")
SEEDS = range(3)  # of random masks, and of calibration resamples
PROTECTED = {"none": "nothing", "others": "all others"}
SELECTIONS = ("one shot", "rounds")
LIFTS = ("overlap_lift", "overlap_lift_marginal")  # over matrices; over rows and columns
TERMS = Terms.standard()
METRICS = {name: TERMS.metrics[name] for name in BEHAVIOURS}
RATES = {metric: TERMS.rates[metric] for metric in METRICS.values()}
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
# Overlap is read on circuits that protect nothing: protection would impose the disjointness it is
# meant to measure. Whether abilities *can* be separated is read on circuits that protect all
# others.


# %%
def rows_of(
    model: Model,
    labels: dict[str, str],
    *,
    size: float,
    protect_share: float,
    rounds: int,
    resamples: int,
) -> Rows:
    """Everything that is measured on one model. Its behaviours' parts are scored too."""
    calibrations = model.calibrations(list(model.behaviours))
    compared = [name for name in COMPARED if name in calibrations]
    abilities = [name for name in METRICS if name in calibrations]
    topics = [name for name in calibrations if "/" in name]

    one_shot = resampled_circuits(
        model, calibrations, compared, size=size, n_resamples=resamples, seed=0
    )
    both_ways = circuits_both_ways(
        model,
        calibrations,
        abilities,
        size=size,
        find=partial(circuit_in_rounds, protect_share=protect_share, rounds=rounds),
    )
    free, apart = both_ways["none"], both_ways["others"]
    for name in compared:
        if name not in free:
            free[name] = circuit_in_rounds(
                model, name, size=size, protect=(), rounds=rounds, calibrations=calibrations
            )
    rows = overlap_rows(one_shot, free, labels, size=size, selection="rounds")
    del one_shot

    of_topics = {}
    for name in topics:
        scores = resampled_circuits(model, calibrations, [name], size=size, n_resamples=0, seed=0)
        of_topics[name] = hc.top_fraction(scores[name][0], size, within="model")
    rows += content_rows(of_topics, labels)
    rows += overlap_place_rows(model, {name: free[name] for name in compared}, "harmful", labels)
    rows += _ceiling(
        model, calibrations["harmful"], free["harmful"], labels, size=size, rounds=rounds
    )

    random = {f"random {seed}": hc.random_like(free["harmful"], seed=seed) for seed in SEEDS}
    unprotected, protected = {**labels, "protected": "none"}, {**labels, "protected": "others"}
    rows += model.measure(labels={**unprotected, "mask": "none"}, only=abilities)
    rows += ablation_rows(model, free | random, unprotected, only=abilities)
    rows += ablation_rows(model, apart, protected, only=abilities)

    sites = hc.weight_sites(model.bridge)
    for protection, masks in both_ways.items():
        for name in ("harmful", "benign", "recognition"):
            where = {**labels, "mask": name, "protected": protection}
            rows += location_rows(masks[name], sites, where)
            texts = ("harmful", "benign") if name == "harmful" else (name,)
            for text in texts:
                rows += token_rows(
                    model, text, calibrations[text], masks[name], {**where, "text": text}
                )
    rows += [Measurement.exact("compared", labels, len(free) + len(apart))]
    return rows


def _ceiling(
    model: Model,
    data: Calibration,
    mask: hc.WeightMask,
    labels: dict[str, str],
    *,
    size: float,
    rounds: int,
) -> Rows:
    """How far harm's circuit agrees with itself, found again on resampled calibration items."""
    behaviour = model.behaviours["harmful"]
    rows = Rows()
    for seed in SEEDS:
        prompts = data.prompts.resampled(seed=seed)
        resample = Calibration(prompts, model.batches(behaviour, prompts), data.n_asked, "harmful")
        again = circuit_in_rounds(
            model,
            "harmful",
            size=size,
            protect=(),
            rounds=rounds,
            calibrations={"harmful": resample},
        )
        shared = overlap(mask, again)
        where = {
            **labels,
            "first": "harmful",
            "second": "harmful",
            "selection": "rounds",
            "seed": seed,
        }
        rows += [
            Measurement("overlap_lift", where, shared.lift, *shared.interval, shared.n_first),
            Measurement.exact("overlap_jaccard", where, shared.jaccard),
        ]
    return rows


# %% [markdown]
# ## In words


# %%
def results(rows: Rows, models: Sequence[str], ladders: Sequence[str]) -> list[str]:
    """What the rows say, one paragraph a question and model; models pooled over ladders."""
    together = rows.pool("ladder")
    texts = []
    for model in models:
        of_model = together.where(model=model)
        causes = [_cause(rows, of_model, model, ladders, protected) for protected in PROTECTED]
        answers = [_structure(of_model), _content(of_model), *causes, _place(of_model)]
        texts += [f"{model}, {text}" for text in answers]
    return texts


def _structure(rows: Rows) -> str:
    twin = _lifts(rows, [("harmful", "benign")])
    others = _lifts(rows, [(a, b) for a, b in PAIRS if a == "harmful" and b != "benign"])
    reference = _lifts(rows, REFERENCE)
    with_harm = rows.where("overlap_jaccard", first="harmful", selection="rounds")
    jaccard = {}
    for name in ("benign", "harmful"):
        jaccard[name] = fmean(row.mean for row in with_harm.where(second=name))
    return (
        f"structure: next to pairs of benign tasks, harm shares {_against_reference(rows)}. Harm "
        f"and its benign twin share {twin[0]:.1f} times what their counts per matrix explain, "
        f"{twin[1]:.1f} times what rows and columns do; harm and the other behaviours, on "
        f"average, {others[0]:.1f} and {others[1]:.1f}; benign tasks together {reference[0]:.1f} "
        f"and {reference[1]:.1f}. In rounds, harm has Jaccard {jaccard['benign']:.3f} with its "
        f"twin and {jaccard['harmful']:.3f} with itself on resampled calibration data."
    )


def _content(rows: Rows) -> str:
    lift = {str(row.labels["relation"]): row for row in rows.where("content_lift")}
    counts = _compared(lift["twin"], [lift["harm, other topic"]])
    return (
        f"content: to be about the same things counts {counts} to be harmful. Lift of the "
        f"circuits of one topic's harm and its benign twin {lift['twin'].mean:.1f}; of two "
        f"topics' harm {lift['harm, other topic'].mean:.1f}; of two topics' benign answers "
        f"{lift['benign, other topic'].mean:.1f}; of harm and benign answers of two topics "
        f"{lift['harm and benign, other topic'].mean:.1f}."
    )


def _cause(rows: Rows, of_model: Rows, model: str, ladders: Sequence[str], protected: str) -> str:
    before = of_model.where(mask="none", protected="none")
    after = of_model.where(mask="harmful", protected=protected)
    rates = []
    for metric, title in RATES.items():
        for pruned in after.where(metric):
            rates.append(f"{title} {100 * before.one(metric).mean:.0f}→{100 * pruned.mean:.0f}")
    outcomes: dict[str, list[str]] = {}
    for ladder in ladders:
        of_ladder = rows.where(model=model, ladder=ladder)
        for (first, second), test in dissociations(of_ladder, protected, METRICS).items():
            if first == "harmful":
                outcomes.setdefault(second, []).append(test.outcome)
    tested = "; ".join(f"{second}: {', '.join(texts)}" for second, texts in outcomes.items())
    return (
        f"cause, with {PROTECTED[protected]} protected: removing the harm circuit changes rates "
        f"(%): {', '.join(rates)}. Dissociation of harm from each, one outcome a ladder: {tested}."
    )


def _place(rows: Rows) -> str:
    harm = rows.where(mask="harmful", protected="others")
    of_neurons = harm.where(by="neuron")
    gini = {chance: of_neurons.one("gini", chance=chance).mean for chance in ("no", "yes")}
    share = {chance: of_neurons.one("top_share", chance=chance).mean for chance in ("no", "yes")}
    tokens = harm.where("token_contribution", text="harmful")
    of_answer = [row.mean for row in tokens if int(row.labels["offset"]) >= -1]
    answer = sum(of_answer) / sum(row.mean for row in tokens)
    return (
        f"place: a twentieth of the MLP neurons holds {share['no']:.0%} of the circuit's MLP "
        f"weights (chance {share['yes']:.0%}; Gini {gini['no']:.2f}, chance {gini['yes']:.2f}). "
        f"{answer:.0%} of its score arises from the last token of the prefilled request on."
    )


def _against_reference(rows: Rows) -> str:
    def lift(first: str, second: str) -> Measurement:
        return rows.one("overlap_lift", first=first, second=second, selection="one shot")

    reference = [lift(*pair) for pair in REFERENCE]
    words = {"more than": "more", "as much as": "about as much", "less than": "less"}
    by_word: dict[str, list[str]] = {}
    for first, second in PAIRS:
        if first == "harmful" and rows.where(first=first, second=second):
            word = words[_compared(lift(first, second), reference)]
            by_word.setdefault(word, []).append(second)
    return "; ".join(f"{word} with {', '.join(names)}" for word, names in by_word.items())


def _compared(row: Measurement, others: Iterable[Measurement]) -> str:
    """By intervals: above all of the others, below all, or neither."""
    others = list(others)
    if row.low > max(other.high for other in others):
        return "more than"
    return "less than" if row.high < min(other.low for other in others) else "as much as"


def _lifts(rows: Rows, pairs: Sequence[tuple[str, str]]) -> tuple[float, float]:
    """Mean lift in one shot over matrices, and over rows and columns."""
    means = []
    for metric in LIFTS:
        lifts = Rows()
        for first, second in pairs:
            lifts += rows.where(metric, first=first, second=second, selection="one shot")
        means.append(fmean(row.mean for row in lifts))
    return means[0], means[1]


# %% [markdown]
# ## Tables and figures


# %%
def overlap_table(rows: Rows, model: str) -> list[list[str]]:
    """Lifts, Jaccard, containment and rank correlation of every pair, pooled over ladders."""
    body = []
    of_model = rows.pool("ladder").where(model=model)
    for (first, second), title in PAIRS.items():
        pair = of_model.where(first=first, second=second)
        if not pair:
            continue
        cells = [title]
        for metric in LIFTS:
            for selection in SELECTIONS:
                lift = pair.one(metric, selection=selection)
                cells.append(f"{lift:.2f}".replace(" [", "\n["))
        for selection in SELECTIONS:
            cells.append(f"{pair.one('overlap_jaccard', selection=selection).mean:.3f}")
        cells.append(f"{pair.one('overlap_containment', selection='rounds').mean:.3f}")
        cells.append(f"{pair.one('rank_correlation').mean:.3f}")
        body.append(cells)
    return body


OVERLAP_HEAD = (
    "pair",
    "lift, one shot",
    "lift, rounds",
    "row and column lift, one shot",
    "row and column lift, rounds",
    "Jaccard, one shot",
    "Jaccard, rounds",
    "containment, rounds",
    "rank correlation",
)


def dissociation_table(
    rows: Rows, models: Sequence[str], ladders: Sequence[str]
) -> list[list[str]]:
    """Every pair of abilities: the outcomes of each model, one for each ladder."""
    outcomes: dict[tuple[str, str, str], list[list[str]]] = {}
    for protected in PROTECTED:
        for column, model in enumerate(models):
            for ladder in ladders:
                of_ladder = rows.where(model=model, ladder=ladder)
                for pair, test in dissociations(of_ladder, protected, METRICS).items():
                    line = outcomes.setdefault((protected, *pair), [[] for _ in models])
                    line[column].append(test.outcome)
    body = []
    for (protected, first, second), line in outcomes.items():
        cells = [", ".join(of_model) or "–" for of_model in line]
        body.append([f"{first} – {second}", protected, *cells])
    return body


def summary(rows: Rows, models: Sequence[str], ladders: Sequence[str]) -> str:
    """The README's table: a column a model, means over ladders with the widest interval ends."""
    together = rows.pool("ladder")
    columns = []
    for model in models:
        column = {"ladders": str(len(rows.where("compared", model=model)))}
        column |= _lift_cells(together.where(model=model))
        for protected in PROTECTED:
            column |= _cause_cells(rows.where(model=model), ladders, protected)
        columns.append(column)
    lines = [f"| | {' | '.join(models)} |", "|---" * (len(models) + 1) + "|"]
    for title in columns[0]:
        cells = [column[title] for column in columns]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _lift_cells(of_model: Rows) -> Mapping[str, str]:
    """Title of a line -> what one model, pooled over ladders, has in it."""
    cells = {}
    for column, (metric, title) in enumerate(
        zip(LIFTS, ("lift", "lift over rows and columns"), strict=True)
    ):
        twin = of_model.one(metric, first="harmful", second="benign", selection="one shot")
        cells[f"harm and its benign twin, {title}"] = f"{twin:.1f}"
        cells[f"benign tasks together, {title}"] = f"{_lifts(of_model, REFERENCE)[column]:.1f}"
        recognition = _lifts(of_model, [("harmful", "recognition")])
        cells[f"harm and recognition, {title}"] = f"{recognition[column]:.1f}"
    content = {row.labels["relation"]: row.mean for row in of_model.where("content_lift")}
    both = f"{content['twin']:.1f}; {content['harm, other topic']:.1f}"
    cells["one topic's harm and its twin; two topics' harm, lift"] = both
    return cells


def _cause_cells(of_model: Rows, ladders: Sequence[str], protected: str) -> Mapping[str, str]:
    """Title of a line -> what one model has in it: rates without harm's circuit, dissociations."""
    words = PROTECTED[protected]
    pruned = of_model.pool("ladder").where(mask="harmful", protected=protected)
    rates = []
    for metric in RATES:
        rates += [f"{100 * row.mean:.0f}" for row in pruned.where(metric)]
    title = f"harm circuit removed, {words} protected: {', '.join(RATES.values())}, %"
    cells = {title: " ".join(rates)}
    tests = [dissociations(of_model.where(ladder=ladder), protected, METRICS) for ladder in ladders]
    for other in ("benign", "recognition", "explanation", "refusal"):
        pair = ("harmful", other)
        outcomes = Counter(of_ladder[pair].outcome for of_ladder in tests if pair in of_ladder)
        counted = ", ".join(f"{n} {outcome}" for outcome, n in outcomes.items())
        cells[f"dissociation of harm from {other}, {words} protected"] = counted or "–"
    return cells


def covered(rows: Rows) -> tuple[list[str], list[str]]:
    """The models and the ladders of finished rows."""
    finished = [row.labels for row in rows.where("compared")]
    models = [model for model in LADDER if any(labels["model"] == model for labels in finished)]
    return models, list(dict.fromkeys(str(labels["ladder"]) for labels in finished))


def reported(rows: Rows) -> Rows:
    """The few rows from which `summary` is made."""
    pairs = [("harmful", "benign"), ("harmful", "recognition"), *REFERENCE]
    lifts = []
    for metric in LIFTS:
        for row in rows.where(metric, selection="one shot"):
            if (row.labels["first"], row.labels["second"]) in pairs:
                lifts.append(row)
    rates = [
        row for row in rows if row.metric in RATES and row.labels["mask"] in ("none", *METRICS)
    ]
    return Rows([*rows.where("compared"), *lifts, *rows.where("content_lift"), *rates])


def page(rows: Rows, models: Sequence[str], ladders: Sequence[str], path: Path) -> None:
    together = rows.pool("ladder")
    ablated: dict[str, dict[str, Rows]] = {protected: {} for protected in PROTECTED}
    for model in models:
        of_model = _without_seeds(together.where(model=model)).pool("seed")
        for protected, panels in ablated.items():
            shown = (row for row in of_model if _is_shown(row, protected))
            panels[model] = Rows(shown)
    lifts = {
        "over counts per matrix": together.where("overlap_lift", selection="one shot"),
        "over row and column counts": together.where("overlap_lift_marginal", selection="one shot"),
    }
    sections = [
        paragraphs("\n".join(results(rows, models, ladders))),
        section(
            "What breaks when a circuit is removed",
            "Rates on held-out requests, %, mean over ladders. Circuits are chosen in rounds and "
            "protect nothing.",
            plot(cross_ablation_figure(ablated["none"], RATES), first=True),
        ),
        section(
            "The same when every circuit protects all other abilities",
            "What can be separated, at the price that being disjoint is partly imposed.",
            plot(cross_ablation_figure(ablated["others"], RATES)),
        ),
        section(
            "Double dissociation",
            "Clean: each ability loses more under its own circuit than under the other's by the "
            "95 % intervals, and at most ten points under the other's. Graded: only the first "
            "holds. One outcome for each ladder.",
            table(("abilities", "protected", *models), dissociation_table(rows, models, ladders)),
        ),
        section(
            "What circuits share",
            "One-shot circuits that protect nothing; bars: bootstrap over calibration items "
            "(left), Wilson (right).",
            plot(overlap_figure(lifts, PAIRS)),
        ),
    ]
    for model in models:
        text = "Mean over ladders; intervals are the widest of them."
        grid = table(OVERLAP_HEAD, overlap_table(rows, model), style="figures")
        sections.append(section(f"Overlap in {model}", text, grid))
    for model in models:
        harm = together.where(model=model, mask="harmful", protected="others")
        tokens = {
            f"{text} answers": harm.where("token_contribution", text=text)
            for text in ("harmful", "benign")
        }
        sections.append(
            section(
                f"Where the harm circuit of {model} sits, and at which tokens it acts",
                "All others protected. Weights in each matrix (colour: share of the matrix); "
                "contribution of each token to the circuit's first-order score on harmful and on "
                "benign answers.",
                plot(location_figure(harm)) + plot(token_figure(tokens)),
            )
        )
    write_page(path, "What circuits of harm, of benign tasks and of recognition share", sections)


def _is_shown(row: Measurement, protected: str) -> bool:
    return row.labels.get("protected") == protected or row.labels.get("mask") == "none"


def _without_seeds(rows: Rows) -> Rows:
    """Random masks under one name, so that they pool."""
    renamed = []
    for row in rows:
        mask = str(row.labels.get("mask", ""))
        if mask.startswith("random "):
            labels = {**row.labels, "mask": "random", "seed": int(mask.split()[1])}
            row = replace(row, labels=labels)
        renamed.append(row)
    return Rows(renamed)


# %%
def main(
    out: Annotated[
        Path, typer.Option(help="Folder for rows.jsonl, shared_circuits.html and summary.md.")
    ],
    organisms: Annotated[
        list[Path] | None, typer.Option(help="Ladder folder; repeat. Default: the shipped one.")
    ] = None,
    rung: Annotated[list[str] | None, typer.Option(help="Rung; repeat. Default: all four.")] = None,
    size: Annotated[float, typer.Option(help="Share of weights in every circuit.")] = 0.006,
    protect_share: Annotated[
        float, typer.Option(help="Share protected for each other behaviour.")
    ] = 0.005,
    rounds: Annotated[int, typer.Option(help="Rounds in which a circuit is chosen.")] = 10,
    resamples: Annotated[int, typer.Option(help="Bootstrap resamples of calibration items.")] = 100,
) -> None:
    folders = organisms or [FOLDER]
    models = rung or list(LADDER)
    ladders = [
        "shipped" if folder.resolve() == FOLDER.resolve() else folder.name for folder in folders
    ]
    path, console = out / "rows.jsonl", Console()
    settings = {
        "size": size,
        "protect_share": protect_share,
        "rounds": rounds,
        "resamples": resamples,
    }
    finished = resumed(out, settings)
    for ladder, folder in zip(ladders, folders, strict=True):
        for model in models:
            labels = {"model": model, "ladder": ladder}
            if finished.where("compared", **labels):
                continue
            with console.status(f"{model} of {ladder}"):
                of_model = rows_of(
                    hc.open_model(model, folder=folder),
                    labels,
                    size=size,
                    protect_share=protect_share,
                    rounds=rounds,
                    resamples=resamples,
                )
                of_model.append_to(path)
    rows = Rows.read(path)
    models, ladders = covered(rows)
    page(rows, models, ladders, out / "shared_circuits.html")
    (out / "summary.jsonl").unlink(missing_ok=True)
    reported(rows).append_to(out / "summary.jsonl")
    (out / "summary.md").write_text(summary(rows, models, ladders) + "\n", encoding="utf-8")
    for model in models:
        shown = Table(
            "pair",
            "lift",
            "row and column lift",
            "Jaccard",
            title=f"{model}, one-shot circuits",
            title_justify="left",
        )
        for line in overlap_table(rows, model):
            shown.add_row(*(escape(line[column].replace("\n", " ")) for column in (0, 1, 3, 5)))
        console.print(shown)
    for text in results(rows, models, ladders):
        console.print(escape(text), highlight=False)
    console.print(f"Page: {out / 'shared_circuits.html'}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
