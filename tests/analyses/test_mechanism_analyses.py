"""The three claims about the mechanism of harm: general, distinct, dissociated.

Would catch: a verdict that cannot come out otherwise, one that ignores a control, words that contradict the rows, a job
whose rows the finding cannot read.
"""

from dataclasses import dataclass, replace

import dissociated
import distinct
import general
import pytest

from harmcircuits.behaviours.model import Model
from harmcircuits.measurements import Measurement, Rows
from harmcircuits.organisms.world import world
from harmcircuits.studies.claims import Plan
from harmcircuits.studies.models import ModelSpec
from harmcircuits.views.tables import METRICS

LABELS = {"model": "sft", "ladder": "shipped", "seed": 0}
VERDICTS = ("holds", "holds in part", "does not hold here")
HARM, BENIGN = METRICS["harmful"], METRICS["benign"]


def of_64(metric: str, share: float, **labels: str | int) -> Measurement:
    return Measurement.rate(metric, {**LABELS, **labels}, [i < round(64 * share) for i in range(64)], range(64))


# General: harm of the other types under one-type circuits; of each left-out type; and under random masks.
def general_rows(across: float, left_out: list[float], *, random: float = 1.0, benign: float = 1.0) -> Rows:
    found = [of_64(metric, 1.0, mask="none", relation="all") for metric in (HARM, BENIGN)]
    for mask, harm, good in (("circuit", across, benign), ("random", random, 1.0), ("twin", 1.0, 0.3)):
        for relation in ("own type", "other types"):
            found += [of_64(HARM, harm, mask=mask, relation=relation), of_64(BENIGN, good, mask=mask, relation=relation)]
        found.append(Measurement.exact("own_type_gap", {**LABELS, "mask": mask, "of": HARM}, 0.1))
    found.append(of_64(HARM, 0.4, mask="mixed", relation="all"))
    for number, harm in enumerate(left_out):
        for mask, left, good in (("none", 1.0, 1.0), ("circuit", harm, benign), ("random", random, 1.0)):
            where = {"mask": mask, "relation": "left out", "tested": f"type {number}"}
            found += [of_64(HARM, left, **where), of_64(BENIGN, good, **where)]
    for metric in ("content_lift", "content_jaccard"):
        for relation in ("twin", "harm, other topic", "benign, other topic", "one type, found again"):
            found.append(Measurement.exact(metric, {**LABELS, "relation": relation}, 2.0))
    for k in (1, 2):
        where = {**LABELS, "shared_by": k}
        found.append(Measurement.exact("weights_removed", {**where, "mask": "random", "of": "random"}, 3))
        found.append(Measurement.exact("weights_removed", {**where, "mask": "circuit", "of": "circuit"}, 100 / k))
        found += [of_64(HARM, 0.5, mask=mask, shared_by=k, of="circuit") for mask in ("circuit", "random")]
    return found


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (general_rows(0.1, [0.0, 0.2]), VERDICTS[0]),
        (general_rows(0.1, [0.0, 0.9]), VERDICTS[1]),
        (general_rows(0.8, [0.0, 0.1, 0.9]), VERDICTS[1]),
        (general_rows(0.8, [0.0, 0.9]), VERDICTS[2]),
        (general_rows(0.1, [0.0, 0.0], random=0.1), VERDICTS[2]),
        (general_rows(0.1, [0.0, 0.0], benign=0.5), VERDICTS[2]),
    ],
    ids=[
        "all transfer",
        "one type stays",
        "only left-out types",
        "half of them",
        "random does the same",
        "benign goes too",
    ],
)
def test_general_comes_out_by_its_rule(rows, expected):
    assert general.finding(rows).verdict == expected
    assert general.needed(rows) == [row for row in general.needed(rows) if row in rows]
    assert general.finding(general.needed(rows)) == general.finding(rows)


def test_the_matrix_is_summed_up_by_who_was_scored():
    """Two types, 1.0 unpruned: under its own circuit a type keeps 0.2, the other 0.6."""
    rows = []
    for metric in (HARM, BENIGN):
        rows += [Measurement.exact(metric, {**LABELS, "mask": "none", "tested": one}, 1.0) for one in "ab"]
        for mask in ("circuit", "random", "twin"):
            rows += [
                Measurement.exact(metric, {**LABELS, "mask": mask, "trained": one, "tested": other}, 0.2 if one == other else 0.6)
                for one in "ab"
                for other in "ab"
            ]
    found = general.relation_rows(rows, ["a", "b"], 64, LABELS)
    own, other = (found.where(HARM, mask="circuit", relation=name)[0] for name in ("own type", "other types"))
    assert (own.mean, other.mean) == pytest.approx((0.2, 0.6))
    assert own.low < 0.2 < own.high
    assert found.where("own_type_gap", mask="circuit", of=HARM)[0].mean == pytest.approx(0.4)


# Distinct: under each protection, harm left, and the changes of utility under the circuit of harm.
def distinct_rows(
    *, change: dict[str, float], lift: float = 2.0, random: float = 1.0, twin: float = 0.2
) -> Rows:
    found = [of_64(metric, 1.0, mask="none") for metric in METRICS.values()]
    for protected, lost in change.items():
        for mask in ("harmful", "random", "benign", "knowledge"):
            where = {"mask": mask, "protected": protected}
            harm = {"harmful": 0.0, "random": random}.get(mask, 1.0)
            good = {"harmful": 1.0 + lost, "benign": twin}.get(mask, 1.0)
            found += [of_64(metric, 1.0, **where) for metric in METRICS.values() if metric not in (HARM, BENIGN)]
            found += [of_64(HARM, harm, **where), of_64(BENIGN, good, **where)]
            changes = {f"{BENIGN}_change": lost, "knowledge_rate_change": 0.0, "benign_nll_change": 0.0, "benign_kl": 0.1}
            found += [Measurement.exact(metric, {**LABELS, **where}, value) for metric, value in changes.items()]
    for first, second, value in (("harmful", "benign", lift), ("benign", "parts", 3.0)):
        where = {**LABELS, "first": first, "second": second, "selection": "one shot"}
        found.append(Measurement.exact("overlap_lift", where, value))
    return found


KEPT = {"none": 0.0, "benign": 0.0, "others": 0.0}


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (distinct_rows(change=KEPT), VERDICTS[0]),
        (distinct_rows(change=KEPT, lift=6.0), VERDICTS[1]),
        (distinct_rows(change=KEPT | {"none": -0.2}), VERDICTS[1]),
        (distinct_rows(change=dict.fromkeys(KEPT, -0.2)), VERDICTS[2]),
        (distinct_rows(change=KEPT, random=0.0), VERDICTS[2]),
        (distinct_rows(change=KEPT, twin=1.0), VERDICTS[2]),
    ],
    ids=[
        "apart",
        "shared with the twin",
        "only protected",
        "utility goes",
        "random does the same",
        "nothing breaks benign",
    ],
)
def test_distinct_comes_out_by_its_rule(rows, expected):
    assert distinct.finding(rows).verdict == expected
    assert distinct.finding(distinct.needed(rows)) == distinct.finding(rows)


def test_the_words_say_when_only_protection_keeps_utility():
    words = distinct.finding(distinct_rows(change=KEPT | {"none": -0.2})).words
    assert "protection imposes a part" in words
    assert "protection imposes a part" not in distinct.finding(distinct_rows(change=KEPT)).words
    assert "to be about the same things counts" in distinct.finding(distinct_rows(change=KEPT, lift=6.0)).words


# Dissociated: rates of (harm, other) under each circuit, the other abilities alike.
def dissociated_rows(free: float, apart: float, *, random: float = 1.0) -> Rows:
    """`free`, `apart`: what each ability keeps under the other's circuit, with nothing and with all others protected."""
    found = [of_64(metric, 1.0, mask="none") for metric in dissociated.COLUMNS]
    for protected, kept in (("none", free), ("others", apart)):
        for mask in (*dissociated.PRUNED, "random"):
            for metric in dissociated.COLUMNS:
                left = random if mask == "random" else 0.3 if METRICS[mask] == metric else kept
                found.append(of_64(metric, left, mask=mask, protected=protected))
    return found


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (dissociated_rows(0.7, 1.0), VERDICTS[0]),
        (dissociated_rows(0.3, 1.0), VERDICTS[1]),
        (dissociated_rows(0.7, 0.7), VERDICTS[1]),
        (dissociated_rows(0.7, 0.3), VERDICTS[2]),
        (dissociated_rows(0.7, 1.0, random=0.5), VERDICTS[2]),
    ],
    ids=["clean", "not without protection", "graded", "none", "random does the same"],
)
def test_dissociated_comes_out_by_its_rule(rows, expected):
    assert dissociated.finding(rows).verdict == expected
    assert dissociated.needed(rows) == rows


@dataclass(frozen=True)
class SmallSpec(ModelSpec):
    """Two items of each of two topics."""

    def open(self, *, seed: int = 0) -> Model:
        model = super().open(seed=seed)
        items = [item for topic in world().topics[:2] for item in world().items.values() if item.topic == topic]
        few = {item.name for half in (True, False) for item in [i for i in items if i.is_heldout == half][::5]}
        behaviours = {
            name: replace(
                found, prompts=lambda split, found=found: found.prompts(split).where(lambda one: one.group in few)
            )
            for name, found in model.behaviours.items()
            if "/" not in name or name.split("/")[1] in world().topics[:2]
        }
        return replace(model, behaviours=behaviours)


@pytest.mark.parametrize("analysis", [general, distinct, dissociated])
def test_the_jobs_give_the_rows_that_the_finding_and_the_page_read(analysis, monkeypatch):
    monkeypatch.setattr(analysis, "SHARE", 1.0)
    monkeypatch.setattr(distinct, "N_RESAMPLES", 2)
    monkeypatch.setattr(distinct, "N_SAMPLES", 2)
    plan = Plan((SmallSpec("sft"),), (0,), rounds=1)
    jobs = analysis.jobs(plan)
    rows = [row for job in jobs for row in job.run()]
    assert len({tuple(job.labels.items()) for job in jobs}) == len(jobs)
    assert all(row.labels["model"] == "sft" and row.labels["seed"] == 0 for row in rows)
    found = analysis.finding(rows)
    assert found.verdict in VERDICTS
    assert found == analysis.finding(analysis.needed(rows))
    assert all(text.startswith("<section>") for text in analysis.sections(rows))
