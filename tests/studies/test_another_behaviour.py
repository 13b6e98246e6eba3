"""The main job on a behaviour that has nothing to do with harm: what the model knows of one topic.

Would catch: a word of the default behaviours that is wired into the main job, a part whose whole is
protected from its own removal, figures of one behaviour taken for those of another.
"""

import pytest
from helpers import small_model

import harmcircuits as hc
from harmcircuits.behaviours.model import other_behaviours
from harmcircuits.organisms.world import world
from harmcircuits.studies.summary import Roles, held_out_lines, summary

TOPIC = world().topics[0]


@pytest.fixture(scope="module")
def model():
    model = small_model("sft", every=16, only=["harmful", "benign", "knowledge"])
    knowledge = model.behaviours["knowledge"]
    topic = knowledge.only(
        "first topic",
        lambda example: example.category == TOPIC,
        metric="topic_rate",
        nll_metric="topic_nll",
    )
    rest = knowledge.only(
        "other topics",
        lambda example: example.category != TOPIC,
        metric="rest_rate",
        nll_metric="rest_nll",
    )
    return model.with_behaviours(topic, rest)


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    settings = hc.StudySettings(sizes=(0.02,), steps=1, n_random=1, budget=50.0, tolerance=1.0)
    return hc.study(
        model,
        settings,
        target="first topic",
        contrast="other topics",
        protect=["other topics", "benign"],
        out=tmp_path_factory.mktemp("another"),
    )


def test_others_are_neither_the_target_nor_its_whole(model):
    assert other_behaviours(model, "first topic") == ["harmful", "benign"]


def test_the_study_speaks_of_its_own_behaviours(run):
    assert run.choice is not None
    metrics = set(run.rows.metrics)
    assert {"topic_rate", "topic_nll", "rest_rate", "rest_nll", "other topics_kl"} <= metrics
    assert {"circuit", "one_shot", "other_topics_twin", "opposite_sign"} <= set(run.masks)
    assert "other topics twin" in held_out_lines(run.rows, run.roles)
    text = summary(run.rows, run.roles).partition("\n")[0]
    assert "first topic answers" in text and "harm" not in text
    assert "first topic" in (run.out / "report.html").read_text(encoding="utf-8")


def test_removing_it_raises_its_loss_more_than_random_weights_do(run):
    before = run.rows.one("topic_nll", mask="none", split="heldout")
    circuit = run.rows.where("topic_nll", mask="circuit", split="heldout")[0]
    random = run.rows.one("topic_nll", mask="random", split="heldout")
    assert circuit.mean - before.mean > 2 * abs(random.mean - before.mean)


def test_behaviours_that_share_a_metric_are_refused(model):
    part = model.behaviours["knowledge"].only("a part", lambda example: True)
    with pytest.raises(ValueError, match="knowledge_rate"):
        Roles.of(model.with_behaviours(part), "a part", "benign")
