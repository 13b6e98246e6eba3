"""The claim that harm has one mechanism: general.

Would catch: an outcome that cannot come out otherwise, one that ignores a control, words that
contradict the rows, a job whose rows the result cannot read.
"""

from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import general
import pytest

from harmcircuits.behaviours.behaviour import Behaviour
from harmcircuits.behaviours.model import Model
from harmcircuits.measurements import Measurement, Rows
from harmcircuits.organisms.world import BEHAVIOURS, world
from harmcircuits.prompts import PromptSet
from harmcircuits.studies.claims import Plan
from harmcircuits.studies.models import ModelSpec
from harmcircuits.studies.terms import Terms

LABELS = {"model": "sft", "ladder": "shipped", "seed": 0}
OUTCOMES = ("holds", "holds in part", "does not hold here")
METRICS = {name: Terms.standard().metrics[name] for name in BEHAVIOURS}
HARM, BENIGN = METRICS["harmful"], METRICS["benign"]


def of_64(metric: str, share: float, **labels: str | int) -> Measurement:
    hits = [number < round(64 * share) for number in range(64)]
    return Measurement.rate(metric, {**LABELS, **labels}, hits, range(64))


# General: harm of the other types under one-type circuits; of each left-out type; and under random
# masks.
def general_rows(
    across: float, left_out: list[float], *, random: float = 1.0, benign: float = 1.0
) -> Rows:
    rows = Rows(of_64(metric, 1.0, mask="none", relation="all") for metric in (HARM, BENIGN))
    for mask, harm, good in (
        ("circuit", across, benign),
        ("random", random, 1.0),
        ("twin", 1.0, 0.3),
    ):
        for relation in ("own type", "other types"):
            where = {"mask": mask, "relation": relation}
            rows += [of_64(HARM, harm, **where), of_64(BENIGN, good, **where)]
        rows += [Measurement.exact("own_type_gap", {**LABELS, "mask": mask, "of": HARM}, 0.1)]
    rows += [of_64(HARM, 0.4, mask="mixed", relation="all")]
    for number, harm in enumerate(left_out):
        for mask, left, good in (
            ("none", 1.0, 1.0),
            ("circuit", harm, benign),
            ("random", random, 1.0),
        ):
            where = {"mask": mask, "relation": "left out", "tested": f"type {number}"}
            rows += [of_64(HARM, left, **where), of_64(BENIGN, good, **where)]
    for metric in ("content_lift", "content_jaccard"):
        for relation in (
            "twin",
            "harm, other topic",
            "benign, other topic",
            "one type, found again",
        ):
            rows += [Measurement.exact(metric, {**LABELS, "relation": relation}, 2.0)]
    for k in (1, 2):
        where = {**LABELS, "shared_by": k}
        for kind, n_removed in (("random", 3), ("circuit", 100 / k)):
            of_kind = {**where, "mask": kind, "of": kind}
            rows += [Measurement.exact("weights_removed", of_kind, n_removed)]
        rows += [
            of_64(HARM, 0.5, mask=mask, shared_by=k, of="circuit") for mask in ("circuit", "random")
        ]
    return rows


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (general_rows(0.1, [0.0, 0.2]), OUTCOMES[0]),
        (general_rows(0.1, [0.0, 0.9]), OUTCOMES[1]),
        (general_rows(0.8, [0.0, 0.1, 0.9]), OUTCOMES[1]),
        (general_rows(0.8, [0.0, 0.9]), OUTCOMES[2]),
        (general_rows(0.1, [0.0, 0.0], random=0.1), OUTCOMES[2]),
        (general_rows(0.1, [0.0, 0.0], benign=0.5), OUTCOMES[2]),
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
    assert general.result(rows).outcome == expected
    assert all(row in rows for row in general.reported(rows))
    assert general.result(general.reported(rows)) == general.result(rows)


def test_the_matrix_is_summed_up_by_who_was_scored():
    """Two types, 1.0 unpruned: under its own circuit a type keeps 0.2, the other 0.6."""
    rows = Rows()
    for metric in (HARM, BENIGN):
        for tested in "ab":
            rows += [Measurement.exact(metric, {**LABELS, "mask": "none", "tested": tested}, 1.0)]
        for mask, trained, tested in product(("circuit", "random", "twin"), "ab", "ab"):
            where = {**LABELS, "mask": mask, "trained": trained, "tested": tested}
            rows += [Measurement.exact(metric, where, 0.2 if trained == tested else 0.6)]
    relations = general.relation_rows(rows, ["a", "b"], 64, LABELS)
    own = relations.one(HARM, mask="circuit", relation="own type")
    other = relations.one(HARM, mask="circuit", relation="other types")
    assert (own.mean, other.mean) == pytest.approx((0.2, 0.6))
    assert own.low < 0.2 < own.high
    assert relations.one("own_type_gap", mask="circuit", of=HARM).mean == pytest.approx(0.4)


@dataclass(frozen=True)
class SmallSpec(ModelSpec):
    """Two items of each of two topics."""

    def open(self, *, seed: int = 0) -> Model:
        model = super().open(seed=seed)
        topics = world().topics[:2]
        of_topics = [item for item in world().items.values() if item.topic in topics]
        few = set()
        for is_heldout in (True, False):
            half = [item.name for item in of_topics if item.is_heldout == is_heldout]
            few |= set(half[::5])

        def asked(behaviour: Behaviour, split: str) -> PromptSet:
            return behaviour.prompts(split).where(lambda example: example.group in few)

        behaviours = {}
        for name, behaviour in model.behaviours.items():
            if "/" not in name or name.split("/")[1] in topics:
                behaviours[name] = replace(behaviour, prompts=partial(asked, behaviour))
        return replace(model, behaviours=behaviours)


@pytest.mark.parametrize(
    ("analysis", "fewer"),
    [(general, {})],
)
def test_the_jobs_give_the_rows_that_the_result_and_the_page_read(analysis, fewer):
    plan = Plan((SmallSpec("sft"),), (0,), rounds=1, options={"share": 1.0, **fewer})
    jobs = analysis.jobs(plan)
    rows = Rows()
    for job in jobs:
        rows += job.run()
    assert len({tuple(job.labels.items()) for job in jobs}) == len(jobs)
    assert all(row.labels["model"] == "sft" and row.labels["seed"] == 0 for row in rows)
    result = analysis.result(rows)
    assert result.outcome in OUTCOMES
    assert result == analysis.result(analysis.reported(rows))
    assert all(text.startswith("<section>") for text in analysis.sections(rows))
