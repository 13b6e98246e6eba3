"""What a study varies.

Would catch: a grid that cannot be measured, and is refused only when it is.
"""

from dataclasses import fields, replace

import pytest

from harmcircuits.studies.settings import FOR_REAL_MODELS, StudySettings


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"sizes": ()}, "sizes="),
        ({"sizes": (0.0, 0.1)}, "sizes="),
        ({"sizes": (0.1, 1.5)}, "sizes="),
        ({"steps": 0}, "steps=0"),
        ({"n_random": 0}, "n_random=0"),
        ({"tolerance": -0.1}, "tolerance=-0.1"),
        ({"budget": -1.0}, "budget=-1.0"),
        ({"budget": {"benign": -0.1}}, "-0.1"),
    ],
)
def test_settings_that_cannot_be(options, word):
    with pytest.raises(ValueError, match=word):
        replace(FOR_REAL_MODELS, **options)


def test_a_behaviour_has_its_own_budget_or_the_common_one():
    settings = StudySettings(budget={"refusal": 0.1, "others": 0.2})
    assert settings.budget_of("refusal") == 0.1
    assert settings.budget_of("benign") == 0.2
    assert settings.named_budgets == {"benign": 0.2, "refusal": 0.1}
    assert StudySettings(budget=0.3).named_budgets == {"benign": 0.3}
    assert StudySettings(budget={"refusal": 0.1}).budget_of("benign") == StudySettings().budget


def test_there_are_few():
    assert len(fields(StudySettings)) <= 13
