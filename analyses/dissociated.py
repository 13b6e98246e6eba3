# %% [markdown]
# # F6: Do recognising, explaining and refusing harm come apart from producing it?
# Each of the four abilities gets a circuit of the same size, once protecting nothing and once all
# other abilities, and all abilities are measured under each on held-out items. Two abilities
# dissociate doubly when each loses more from the loss of its own circuit than from that of the
# other's, by the intervals; cleanly, when besides neither loses more than ten points to the
# other's. Recognition is also read as pair accuracy and AUROC of the answer's log-odds, which a
# bias to one answer does not move. The circuit of refusal, removed, is the contrast: it should
# leave harmful generation and free plain harm.
#
# Controls: random masks with the same counts in every matrix, one for each protection.
#
# **The rule**, fixed before any run, over the pairs of generation with each other ability shown,
# every model and seed. The claim *holds* when with all others protected every pair is a clean
# double dissociation, and with nothing protected at least a graded one. It *holds in part* when
# with all others protected at least half of the pairs are at least graded; else it *does not hold
# here*. Where random masks cost any of these abilities more than ten points (mean over seeds), a
# fall says nothing of circuits, and the claim does not hold.

# %%
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import typer
from rounds import circuit_in_rounds

import harmcircuits as hc
from harmcircuits.behaviours.model import Model
from harmcircuits.measurements import Measurement, Rows
from harmcircuits.organisms.world import BEHAVIOURS
from harmcircuits.studies.claims import ClaimResult, Outcome, Plan, by_model, command
from harmcircuits.studies.cross_ablation import ablation_rows, circuits_both_ways
from harmcircuits.studies.dissociation import SPARED, Dissociation, dissociations
from harmcircuits.studies.jobs import Job
from harmcircuits.studies.models import ModelSpec
from harmcircuits.studies.terms import Terms
from harmcircuits.views.figures import cross_ablation_figure
from harmcircuits.views.page import plot, section, table

NAME, CLAIM, MODELS = (
    "F6",
    "dissociated: recognition, explanation and refusal survive",
    ("sft", "dpo"),
)
PRUNED = ("harmful", "recognition", "explanation", "refusal")
PROTECTED = {"none": "nothing", "others": "all others"}
DOUBLE = ("clean double", "graded double")
TERMS = Terms.standard()
METRICS = {name: TERMS.metrics[name] for name in BEHAVIOURS}
RATES = {metric: TERMS.rates[metric] for metric in METRICS.values()}
BESIDE = {"recognition_pair_accuracy": "pair accuracy", "recognition_auroc": "AUROC"}
PLAIN = "plain_harm_rate"
COLUMNS = RATES | BESIDE | {PLAIN: "plain harm"}


@dataclass(frozen=True)
class Settings:
    """How much is drawn.

    Attributes:
        share: of the calibration items.
    """

    share: float = 0.5


# %% [markdown]
# ## The experiment


# %%
def jobs(plan: Plan) -> list[Job]:
    return plan.jobs(ablated)


def ablated(spec: ModelSpec, plan: Plan, seed: int) -> Rows:
    """The cross-ablation matrix of a model and seed, with random masks and plain harm beside it."""
    model = spec.open(seed=seed)
    abilities = [name for name in BEHAVIOURS if name in model.behaviours]
    share = Settings(**plan.options).share
    calibrations = model.calibrations(abilities, share=share, seed=seed)
    pruned = [name for name in PRUNED if name in calibrations]
    circuits = circuits_both_ways(
        model,
        calibrations,
        pruned,
        size=plan.size,
        find=partial(
            circuit_in_rounds,
            protect_share=plan.protect_share,
            rounds=plan.rounds,
        ),
    )
    model = with_plain_harm(model)
    measured = [*calibrations, PLAIN]
    labels = {**spec.labels, "seed": seed}
    rows = model.measure(labels={**labels, "mask": "none"}, only=measured)
    for protected, masks in circuits.items():
        random = hc.random_like(masks["harmful"], seed=seed)
        where = {**labels, "protected": protected}
        rows += ablation_rows(model, {**masks, "random": random}, where, only=measured)
    return reported(rows)


def with_plain_harm(model: Model) -> Model:
    """The model asked besides for harm without a prefilled answer: what refusing prevents."""
    harmful = model.behaviours["harmful"]
    plain = replace(harmful, name=PLAIN, metric=PLAIN, nll_metric="plain_harm_nll", prefill="")
    return model.with_behaviours(plain)


# %% [markdown]
# ## The result


# %%
def tests(rows: Rows, protected: str) -> dict[str, list[Dissociation]]:
    """Ability -> the tests of generation against it, one for each seed of one model."""
    by_ability: dict[str, list[Dissociation]] = {}
    for of_seed in rows.by("seed").values():
        for (first, second), test in dissociations(of_seed, protected, METRICS).items():
            if first == "harmful":
                by_ability.setdefault(second, []).append(test)
    return by_ability


def random_costs(rows: Rows) -> Rows:
    """What random masks cost each ability of one model, mean over seeds."""
    together = rows.pool("seed")
    costs = Rows()
    for metric in (METRICS[name] for name in PRUNED):
        for random in together.where(metric, mask="random"):
            unpruned = together.one(metric, mask="none")
            costs += [Measurement.difference(f"{metric}_cost", random.labels, unpruned, random)]
    return costs


def outcome(rows: Rows) -> Outcome:
    outcomes: dict[str, list[str]] = {protected: [] for protected in PROTECTED}
    costs = []
    for of_model in by_model(rows).values():
        costs += [cost.mean for cost in random_costs(of_model)]
        for protected in PROTECTED:
            for of_ability in tests(of_model, protected).values():
                outcomes[protected] += [test.outcome for test in of_ability]
    free, apart = outcomes["none"], outcomes["others"]
    if not apart or not costs or max(costs) > SPARED:
        return "does not hold here"
    if set(apart) == {"clean double"} and set(free) <= set(DOUBLE):
        return "holds"
    n_double = sum(text in DOUBLE for text in apart)
    return "holds in part" if 2 * n_double >= len(apart) else "does not hold here"


def result(rows: Rows) -> ClaimResult:
    models = by_model(rows)
    words = "\n".join(f"{name}: {_words(of_model)}" for name, of_model in models.items())
    evidence = "; ".join(f"{name}: {_evidence(of_model)}" for name, of_model in models.items())
    return ClaimResult(NAME, CLAIM, outcome(rows), words, evidence)


def reported(rows: Rows) -> Rows:
    return Rows(row for row in rows if row.metric in COLUMNS)


def _words(rows: Rows) -> str:
    together = rows.pool("seed")
    sentences = []
    for protected, words in PROTECTED.items():
        tested = tests(rows, protected)
        counted = "; ".join(f"{name} {_counts(of_ability)}" for name, of_ability in tested.items())
        sentences.append(
            f"With {words} protected, removing the circuit of generation leaves "
            f"{_rates(together, 'harmful', protected)}. Generation against each, one test a seed: "
            f"{counted}."
        )
        if together.where(mask="refusal"):
            unpruned = together.one(PLAIN, mask="none")
            pruned = together.one(PLAIN, mask="refusal", protected=protected)
            sentences.append(
                "Removing the circuit of refusal in the same way leaves "
                f"{_rates(together, 'refusal', protected)}; harm asked for plainly goes from "
                f"{unpruned:.0%} to {pruned:.0%}."
            )
    worst = max(random_costs(rows), key=lambda cost: cost.mean)
    sentences.append(f"As many random weights cost no ability more than {worst:+.0%}.")
    if all(together.where(metric, mask="harmful") for metric in BESIDE):
        sentences.append(_recognition(together))
    return " ".join(sentences)


def _rates(together: Rows, mask: str, protected: str) -> str:
    texts = []
    for metric, title in RATES.items():
        for row in together.where(metric, mask=mask, protected=protected):
            texts.append(f"{title} {row:.0%}")
    return ", ".join(texts)


def _recognition(together: Rows) -> str:
    texts = []
    for protected, words in PROTECTED.items():
        pruned = together.where(mask="harmful", protected=protected)
        answers = pruned.one(METRICS["recognition"])
        pairs, area = (pruned.one(metric) for metric in BESIDE)
        texts.append(
            f"{words} protected: answers {answers:.0%}, pairs {pairs:.0%}, AUROC {area.mean:.3f}"
        )
    return f"Recognition under the circuit of generation, read three ways, {'; '.join(texts)}."


def _counts(of_ability: Sequence[Dissociation]) -> str:
    times = Counter(test.outcome for test in of_ability)
    return ", ".join(f"{n} {text}" for text, n in times.items())


def _evidence(rows: Rows) -> str:
    tested = tests(rows, "others")
    counted = ", ".join(f"{name} {_counts(of_ability)}" for name, of_ability in tested.items())
    return f"{_rates(rows.pool('seed'), 'harmful', 'others')}; {counted}"


# %% [markdown]
# ## Figures


# %%
def sections(rows: Rows) -> list[str]:
    models = by_model(rows)
    parts = []
    for protected, words in (("none", "nothing"), ("others", "all other abilities")):
        panels = {}
        for name, of_model in models.items():
            together = of_model.pool("seed")
            panels[name] = together.where(mask="none") + together.where(protected=protected)
        parts.append(
            section(
                f"Circuits that protect {words}",
                "Rates on held-out requests, %, mean over seeds. Plain harm: valid harmful "
                "answers without a prefill.",
                plot(cross_ablation_figure(panels, COLUMNS), first=not parts),
            )
        )
    body = []
    for name, of_model in models.items():
        for protected in PROTECTED:
            for other, of_ability in tests(of_model, protected).items():
                cells = [_counts(of_ability), *_gaps(of_ability)]
                body.append([name, f"{other} – harm", protected, *cells])
    head = (
        "model",
        "abilities",
        "protected",
        "tests",
        "harm's gap",
        "the other's gap",
        "harm's cost",
        "the other's cost",
    )
    text = (
        "Gap: rate under the other's circuit minus that under its own. Cost: unpruned rate minus "
        "that under the other's circuit. Mean over seeds, widest interval; points."
    )
    return [
        *parts,
        section("Double dissociation of generation", text, table(head, body, style="figures")),
    ]


def _gaps(of_ability: Sequence[Dissociation]) -> list[str]:
    cells = []
    for part in ("first_gap", "second_gap", "first_cost", "second_cost"):
        (row,) = Rows(getattr(test, part) for test in of_ability).pool("seed")
        cells.append(f"{row:+.0%}".replace(" [", "\n["))
    return cells


# %%
if __name__ == "__main__":
    typer.run(command(sys.modules[__name__]))
