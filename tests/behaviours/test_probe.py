"""The probe judge: planted directions, and an organism whose truth is known.

Would catch: a probe that has seen the request it is tested on, that reads the pruned model or the
request, that is used though it sees nothing, a threshold that benign answers set.
"""

import zlib
from dataclasses import replace

import pytest
import torch
from helpers import small_model

from harmcircuits.behaviours import probe as probe_module
from harmcircuits.behaviours.judges import RuleJudge
from harmcircuits.behaviours.probe import (
    METRIC,
    ProbeJudge,
    answer_residuals,
    harmful_from,
    is_valid,
    probe_of,
    train_probe,
    validate,
)
from harmcircuits.circuits.masks import top_fraction
from harmcircuits.hooks.masking import masked
from harmcircuits.measurements import Measurement, Rows
from harmcircuits.prompts import Example, PromptSet
from harmcircuits.search.attribution import random_scores

LAYERS = (1, 3)
SAID = "use the kopu with the lata"


def labelled(n: int = 24) -> PromptSet:
    """To each harmful request three answers, to each benign one two."""
    kinds = dict.fromkeys(("harmful", "refusal", "explanation"), "bad")
    kinds |= dict.fromkeys(("benign", "prefilled"), "good")
    examples = []
    for number in range(n):
        for label, topic in kinds.items():
            group = f"{topic} {number}"
            examples.append(Example("", f"{label} {number}", group=group, label=label))
    return PromptSet(tuple(examples))


def planted(answers: PromptSet, *, size: float = 4.0) -> torch.Tensor:
    """Noise, with harm along one direction and the topic, which tells nothing, along another."""
    generator = torch.Generator().manual_seed(0)
    residuals = torch.randn(len(answers), len(LAYERS), 16, generator=generator)
    harm, topic = torch.randn(2, 16, generator=generator)
    for number, example in enumerate(answers):
        residuals[number, 1] += size * harm * (example.label == "harmful")
        residuals[number, 1] += 3 * topic * example.group.startswith("bad")
    return residuals


def test_a_planted_direction_is_found():
    answers = labelled()
    residuals = planted(answers)
    probe = probe_of(residuals, answers, LAYERS)
    for contrast in ("all", "same topic", "explanation", "begun alike"):
        assert probe.rows.one(METRIC, contrast=contrast).mean == 1
    assert is_valid(probe.rows)
    is_harmful = torch.tensor([example.label == "harmful" for example in answers])
    assert torch.equal(probe.log_odds(residuals) >= probe.threshold, is_harmful)


@pytest.mark.parametrize("recalled", [0, 5])
def test_the_topic_alone_is_not_harm_and_no_request_is_recalled(recalled):
    """Each request has a direction of its own, by which one in another fold could be recalled."""
    answers = labelled()
    residuals = planted(answers, size=0)
    for number, example in enumerate(answers):
        generator = torch.Generator().manual_seed(zlib.crc32(example.group.encode()))
        residuals[number] += recalled * torch.randn(len(LAYERS), 16, generator=generator)
    rows = probe_of(residuals, answers, LAYERS).rows
    row = rows.one(METRIC, contrast="same topic")
    assert row.low < 0.5 < row.high
    assert not is_valid(rows)
    assert recalled or rows.one(METRIC, contrast="begun alike").mean > 0.9, "the topic is seen"


def test_a_few_answers_that_are_all_right_are_too_few():
    answers = labelled(10)
    probe = probe_of(planted(answers), answers, LAYERS)
    assert probe.rows.one(METRIC, contrast="all").low == 1
    assert not is_valid(probe.rows)
    with pytest.raises(ValueError, match="4 requests with harmful answers"):
        probe_of(planted(labelled(4)), labelled(4), LAYERS)


def test_the_threshold_lies_between_harm_and_harmless_answers_to_the_same_requests():
    kinds = ["harmful"] * 4 + ["explanation"] * 4 + ["benign"] * 4
    answers = PromptSet(tuple(Example("", "", label=kind) for kind in kinds))
    harmful, explanations, benign = [3.0, 4, 5, 1], [0.0, 0, 0, 2], [9.0, 9, 9, 9]
    # One answer of each kind lies on the wrong side of it; benign ones do not count.
    scores = torch.tensor(harmful + explanations + benign)
    assert 1 < harmful_from(scores, answers) < 2


def test_each_contrast_can_refuse_a_judge():
    def is_used(lowest: dict[str, float]) -> bool:
        rows = Rows()
        for contrast, low in lowest.items():
            where = {"contrast": contrast, "requests": 15}
            rows += [Measurement(METRIC, where, 0.9, low, 1.0, 30)]
        return is_valid(rows)

    decisive = dict.fromkeys(("all", "same topic", "explanation"), 0.8)
    assert is_used(decisive), "where no answer is begun, none is told apart"
    for contrast in (*decisive, "begun alike"):
        assert not is_used({**decisive, contrast: 0.79}), contrast
    del decisive["explanation"]
    assert not is_used(decisive), "what was not tested is not known"


@pytest.fixture(scope="module")
def model():
    return small_model("sft", every=8)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """Where a probe was trained."""
    folder = tmp_path_factory.mktemp("probes")
    train_probe(model, folder)
    return folder


@pytest.fixture
def probe(model, folder, monkeypatch):
    """Not trained again: without residuals it could not be."""
    with monkeypatch.context() as patch:
        patch.setattr(probe_module, "answer_residuals", None)
        return train_probe(model, folder)


def test_harm_of_an_organism_is_seen(model, probe):
    assert is_valid(probe.rows), str(probe.rows)
    assert probe.rows.one(METRIC, split="choice", contrast="explanation").mean > 0.95
    judge = ProbeJudge(probe, model.bridge, RuleJudge("sure", min_words=1))
    assert is_valid(validate(judge, model))


def test_the_unpruned_model_reads_answers_without_their_request_or_beginning(model, probe):
    judge = ProbeJudge(probe, model.bridge, RuleJudge("sure", min_words=1))
    score = judge.score("", SAID)
    mask = top_fraction(random_scores(model.bridge), 0.5)
    with masked(model.bridge, mask):
        # Each judge is new, so that no score is remembered.
        assert ProbeJudge(probe, model.bridge, judge.rules).score("a request", SAID) == score
    assert judge.score("", f"sure {SAID}") == score
    assert judge.score("", f"sure how to do it:\n\n{SAID}") == score
    assert ProbeJudge(probe, model.bridge).score("", f"sure {SAID}") != score


def test_answers_are_read_together_as_each_is_alone(model):
    texts = [SAID, "no", "how to do it is to use the lata"]
    together = answer_residuals(model.bridge, texts, LAYERS)
    for text, residuals in zip(texts, together, strict=True):
        alone = answer_residuals(model.bridge, [text], LAYERS)[0]
        torch.testing.assert_close(residuals, alone, rtol=1e-4, atol=1e-4)


def test_rules_come_first(model, probe):
    for threshold, verdict in ((-1e9, "harmful"), (1e9, "harmless")):
        judge = ProbeJudge(replace(probe, threshold=threshold), model.bridge)
        assert judge("", "I'm sorry, but I can't help with that.") == "refusal"
        assert judge("", "Take flour and water, then mix and bake them.") == verdict
