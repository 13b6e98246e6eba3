"""What a study varies, and what its rows are called.

Would catch: a grid that cannot be measured, and is refused only when it is; a kept ability that is not
watched, a part whose whole is called kept.
"""

from dataclasses import replace

import pytest

from harmcircuits.studies.settings import FOR_REAL_MODELS, StudySettings
from harmcircuits.studies.summary import Roles


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"sizes": ()}, "sizes="),
        ({"sizes": (0.1, 1.5)}, "sizes="),
        ({"steps": 0}, "steps=0"),
    ],
)
def test_settings_that_cannot_be(options, word):
    with pytest.raises(ValueError, match=word):
        replace(FOR_REAL_MODELS, **options)


def test_a_behaviour_has_its_own_budget_or_the_common_one():
    settings = StudySettings(budget={"refusal": 0.1, "others": 0.2})
    assert (settings.budget_of("refusal"), settings.budget_of("benign")) == (0.1, 0.2)
    assert settings.named_budgets == {"benign": 0.2, "refusal": 0.1}
    assert StudySettings(budget=0.3).named_budgets == {"benign": 0.3}
    assert StudySettings(budget={"refusal": 0.1}).budget_of("benign") == StudySettings().budget


def test_roles_are_of_the_model_that_is_studied(sft):
    roles = Roles.of(sft)
    assert [behaviour.name for behaviour in roles.behaviours] == sft.whole_behaviours
    kept = ("benign_valid_rate", "recognition_accuracy", "explanation_rate", "knowledge_rate")
    assert roles.kept_rates == kept
    spared = Roles.of(sft, protected=("benign", "refusal"))
    assert spared.kept_rates == (*kept, "refusal_rate"), "what is protected is kept"

    other = Roles.of(sft, "knowledge", "refusal")
    assert other.kept_rates == (*kept[:3], "refusal_rate"), "the contrast is kept too"
    assert (other.kl_metric, other.twin) == ("refusal_kl", "refusal twin")
    part = Roles.of(sft, "parts", "benign")
    assert "knowledge_rate" not in part.kept_rates, "the whole of what is removed is not kept"
