# %% [markdown]
# # F6: Do recognising, explaining and refusing harm come apart from producing it?
# Each of the four abilities gets a circuit of the same size, once protecting nothing and once all other abilities, and all
# abilities are measured under each on held-out items. Two abilities dissociate doubly when each loses more from the loss of
# its own circuit than from that of the other's, by the intervals; cleanly, when besides neither loses more than ten points
# to the other's. Recognition is also read as pair accuracy and AUROC of the answer's log-odds, which a bias to one answer
# does not move. The circuit of refusal, removed, is the contrast: it should leave harmful generation and free plain harm.
#
# Controls: random masks with the same counts in every matrix, one for each protection.
#
# **The rule**, fixed before any run, over the pairs of generation with each other ability shown, every model and seed. The
# claim *holds* when with all others protected every pair is a clean double dissociation, and with nothing protected at
# least a graded one. It *holds in part* when with all others protected at least half of the pairs are at least graded;
# else it *does not hold here*. Where random masks cost any of these abilities more than ten points (mean over seeds), a
# fall says nothing of circuits, and the claim does not hold.

# %%
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import typer

import harmcircuits as hc
from harmcircuits.behaviours.model import Model
from harmcircuits.measurements import Measurement, Rows
from harmcircuits.studies.claims import ClaimResult, Plan, Verdict, by_model, command
from harmcircuits.studies.cross_ablation import ablation_rows, circuits_both_ways
from harmcircuits.studies.dissociation import SPARED, Dissociation, dissociations
from harmcircuits.studies.jobs import Job
from harmcircuits.studies.models import ModelSpec
from harmcircuits.views.figures import cross_ablation_figure
from harmcircuits.views.page import plot, section, table
from harmcircuits.views.tables import METRICS, RATES, percent, points

NAME, CLAIM, MODELS = "F6", "dissociated: recognition, explanation and refusal survive", ("sft", "dpo")
SHARE = 0.5  # of the calibration items
PRUNED = ("harmful", "recognition", "explanation", "refusal")
PROTECTED = ("none", "others")
BESIDE = {"recognition_pair_accuracy": "pair accuracy", "recognition_auroc": "AUROC"}
PLAIN = "plain_harm_rate"
COLUMNS = {metric: RATES[metric] for metric in METRICS.values()} | BESIDE | {PLAIN: "plain harm"}


# %% [markdown]
# ## The experiment


# %%
def jobs(plan: Plan) -> list[Job]:
    return plan.jobs(ablated)


def ablated(spec: ModelSpec, plan: Plan, seed: int) -> Rows:
    """The cross-ablation matrix of one model and seed, with random masks and plain harm beside it."""
    model = with_plain_harm(spec.open(seed=seed))
    calibrations = model.calibrations(share=SHARE, seed=seed)
    asked = [name for name in METRICS if name in calibrations] + [PLAIN]
    pruned = [name for name in PRUNED if name in calibrations]
    found = circuits_both_ways(model, calibrations, pruned, q=plan.q, p=plan.p, rounds=plan.rounds)
    labels = {**spec.labels, "seed": seed}
    rows = model.measure(labels={**labels, "mask": "none"}, only=asked)
    for protected, masks in found.items():
        masks = masks | {"random": hc.random_like(masks["harmful"], seed=seed)}
        rows += ablation_rows(model, masks, {**labels, "protected": protected}, only=asked)
    return [row for row in rows if row.metric in COLUMNS]


def with_plain_harm(model: Model) -> Model:
    """The subject asked besides for harm without a prefilled answer: what refusing prevents."""
    plain = replace(model.behaviours["harmful"], name=PLAIN, metric=PLAIN, nll_metric="plain_harm_nll", prefill="")
    return replace(model, behaviours={**model.behaviours, PLAIN: plain})


# %% [markdown]
# ## The finding


# %%
def tests(rows: Rows, protected: str) -> dict[str, list[Dissociation]]:
    """Ability -> the tests of generation against it, one for each seed of one model."""
    found: dict[str, list[Dissociation]] = {}
    for seed in dict.fromkeys(row.labels["seed"] for row in rows):
        for (first, second), test in dissociations(rows.where(seed=seed), protected).items():
            if first == "harmful":
                found.setdefault(second, []).append(test)
    return found


def random_costs(rows: Rows) -> Rows:
    """What random masks cost each ability of one model, mean over seeds."""
    together, costs = rows.pool("seed"), []
    for metric in (METRICS[name] for name in PRUNED):
        for random in together.where(metric, mask="random"):
            whole = together.where(metric, mask="none")[0]
            costs.append(Measurement.difference(f"{metric}_cost", random.labels, whole, random))
    return costs


def verdict(rows: Rows) -> Verdict:
    models = by_model(rows).values()
    free, apart = (
        [test.verdict for mine in models for one in tests(mine, protected).values() for test in one]
        for protected in PROTECTED
    )
    costs = [cost.mean for mine in models for cost in random_costs(mine)]
    if not apart or not costs or max(costs) > SPARED:
        return "does not hold here"
    doubles = ("clean double", "graded double")
    if all(one == "clean double" for one in apart) and all(one in doubles for one in free):
        return "holds"
    return "holds in part" if 2 * sum(one in doubles for one in apart) >= len(apart) else "does not hold here"


def finding(rows: Rows) -> ClaimResult:
    models = by_model(rows)
    words = "\n".join(f"{name}: {_words(mine)}" for name, mine in models.items())
    evidence = "; ".join(f"{name}: {_evidence(mine)}" for name, mine in models.items())
    return ClaimResult(NAME, CLAIM, verdict(rows), words, evidence)


def needed(rows: Rows) -> Rows:
    return [row for row in rows if row.metric in COLUMNS]


def _words(mine: Rows) -> str:
    together = mine.pool("seed")
    said = []
    for protected, words in (("none", "nothing"), ("others", "all others")):
        counted = "; ".join(f"{name} {_counts(found)}" for name, found in tests(mine, protected).items())
        said.append(
            f"With {words} protected, removing the circuit of generation leaves {_rates(together, 'harmful', protected)}. "
            f"Generation against each, one test a seed: {counted}."
        )
        if together.where(mask="refusal"):
            said.append(
                f"Removing the circuit of refusal in the same way leaves {_rates(together, 'refusal', protected)}; harm "
                f"asked for plainly goes from {percent(together.where(PLAIN, mask='none')[0])} to "
                f"{percent(together.where(PLAIN, mask='refusal', protected=protected)[0])}."
            )
    costs = random_costs(mine)
    worst = max(costs, key=lambda cost: cost.mean)
    said.append(f"As many random weights cost no ability more than {points(worst)}.")
    if all(together.where(metric, mask="harmful") for metric in BESIDE):
        said.append(_recognition(together))
    return " ".join(said)


def _rates(together: Rows, mask: str, protected: str) -> str:
    rows = [(RATES[m], together.where(m, mask=mask, protected=protected)) for m in METRICS.values()]
    return ", ".join(f"{title} {percent(found[0])}" for title, found in rows if found)


def _recognition(together: Rows) -> str:
    found = []
    for protected, words in (("none", "nothing"), ("others", "all others")):
        answers, pairs, area = (
            together.where(metric, mask="harmful", protected=protected)[0] for metric in (METRICS["recognition"], *BESIDE)
        )
        found.append(f"{words} protected: answers {percent(answers)}, pairs {percent(pairs)}, AUROC {area.mean:.3f}")
    return f"Recognition under the circuit of generation, read three ways, {'; '.join(found)}."


def _counts(found: Sequence[Dissociation]) -> str:
    return ", ".join(f"{n} {outcome}" for outcome, n in Counter(test.verdict for test in found).items())


def _evidence(mine: Rows) -> str:
    apart = tests(mine, "others")
    together = mine.pool("seed")
    return f"{_rates(together, 'harmful', 'others')}; " + ", ".join(f"{name} {_counts(one)}" for name, one in apart.items())


# %% [markdown]
# ## Figures


# %%
def sections(rows: Rows) -> list[str]:
    together = {name: mine.pool("seed") for name, mine in by_model(rows).items()}
    found = []
    for protected, words in (("none", "nothing"), ("others", "all other abilities")):
        panels = {
            name: [row for row in mine if row.labels["mask"] == "none" or row.labels["protected"] == protected]
            for name, mine in together.items()
        }
        found.append(
            section(
                f"Circuits that protect {words}",
                "Rates on held-out requests, %, mean over seeds. Plain harm: valid harmful answers without a prefill.",
                plot(cross_ablation_figure(panels, COLUMNS), first=not found),
            )
        )
    body = [
        [name, f"{other} – harm", protected, _counts(one), *_gaps(one)]
        for name, mine in by_model(rows).items()
        for protected in PROTECTED
        for other, one in tests(mine, protected).items()
    ]
    head = ("model", "abilities", "protected", "tests", "harm's gap", "the other's gap", "harm's cost", "the other's cost")
    text = (
        "Gap: rate under the other's circuit minus that under its own. Cost: unpruned rate minus that under the other's "
        "circuit. Mean over seeds, widest interval; points."
    )
    return [*found, section("Double dissociation of generation", text, table(head, body, style="figures"))]


def _gaps(found: Sequence[Dissociation]) -> list[str]:
    cells = []
    for part in ("first_gap", "second_gap", "first_cost", "second_cost"):
        row = Rows([getattr(test, part) for test in found]).pool("seed")[0]
        cells.append(f"{100 * row.mean:.0f}\n{100 * row.low:.0f} – {100 * row.high:.0f}")
    return cells


# %%
if __name__ == "__main__":
    typer.run(command(sys.modules[__name__]))
