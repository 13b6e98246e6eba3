"""The main job on a behaviour that has nothing to do with harm: what the model knows of one topic.

Would catch: a word of the default behaviours that is wired into the main job, a part whose whole is
protected from its own removal, figures of one behaviour taken for those of another.
"""

from dataclasses import replace

import pytest

import harmcircuits as hc
from harmcircuits.behaviours.model import other_behaviours
from harmcircuits.organisms.world import world
from harmcircuits.studies.study_page import write_study_page
from harmcircuits.studies.summary import Terms, held_out_lines, summary

TOPIC = world().topics[0]


def thinned(behaviour: hc.Behaviour) -> hc.Behaviour:
    """Every twelfth request, in matched pairs: few, of every topic."""
    whole = behaviour.prompts

    def prompts(split: str) -> hc.PromptSet:
        requests = whole(split).examples
        pairs = [requests[start : start + 2] for start in range(0, len(requests), 24)]
        return hc.PromptSet(sum(pairs, ()))

    return replace(behaviour, prompts=prompts)


@pytest.fixture(scope="module")
def model():
    model = hc.open_model("sft")
    whole = [thinned(model.behaviours[name]) for name in model.whole_behaviours]
    model = replace(model, behaviours={behaviour.name: behaviour for behaviour in whole})
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
    settings = hc.StudySettings(sizes=(0.01,), steps=2, n_random=1, budget=1.0, tolerance=1.0)
    return hc.study(
        model,
        settings,
        target="first topic",
        contrast="other topics",
        protect=["other topics", "benign", "recognition"],
        out=tmp_path_factory.mktemp("another"),
    )


def test_others_are_neither_the_target_nor_its_whole(model):
    assert other_behaviours(model, "first topic") == [
        name for name in model.whole_behaviours if name != "knowledge"
    ]


def test_the_study_speaks_of_its_own_behaviours(run):
    assert run.chosen is not None
    metrics = set(run.rows.metrics)
    assert {"topic_rate", "topic_nll", "rest_rate", "rest_nll", "other topics_kl"} <= metrics
    assert set(run.masks) >= {
        "circuit",
        "one_shot",
        "other_topics_twin",
        "opposite_sign",
        "random-0",
    }
    lines = held_out_lines(run.rows, run.terms)
    assert "other topics twin" in lines
    text = summary(run.rows, run.terms).partition("\n")[0]
    assert "first topic answers" in text and "harm" not in text


def test_removing_it_raises_its_loss_more_than_random_weights_do(run):
    before = run.rows.one("topic_nll", mask="none", split="heldout")
    circuit = run.rows.where("topic_nll", mask="circuit", split="heldout")[0]
    random = run.rows.one("topic_nll", mask="random", split="heldout")
    assert circuit.mean - before.mean > 2 * abs(random.mean - before.mean)


def test_its_page_is_written(run, tmp_path):
    write_study_page(run, tmp_path / "page.html")
    assert "first topic" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_behaviours_that_share_a_metric_are_refused(model):
    part = model.behaviours["knowledge"].only("a part", lambda example: True)
    with pytest.raises(ValueError) as error:
        Terms.of(model.with_behaviours(part), "a part", "benign")
    assert "knowledge_rate" in str(error.value) and "metric" in str(error.value)
