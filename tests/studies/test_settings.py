"""What a study varies.

Would catch: a grid that cannot be measured, and is refused only when it is.
"""

from dataclasses import replace

import pytest

from harmcircuits.studies.settings import FOR_REAL_MODELS, StudySettings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": ()}, r"sizes=\[\]; expected one or more shares"),
        ({"sizes": (0.0, 0.1)}, r"sizes=\[0\.0, 0\.1\]; expected .* in \(0, 1\]"),
        ({"sizes": (0.1, 1.5)}, r"sizes=\[0\.1, 1\.5\]; expected .* in \(0, 1\]"),
        ({"steps": 0}, "steps=0; expected at least 1"),
        ({"n_random": 0}, "n_random=0; expected at least 1"),
        ({"decides": "nll"}, 'decides=\'nll\'; expected "rate" or "loss"'),
        ({"tolerance": -0.1}, r"tolerance=-0\.1; expected 0 or more"),
        ({"budget": -1.0}, r"budget=-1\.0; expected 0 or more"),
        ({"budgets": {"benign": -0.1}}, r"budgets: -0\.1 for 'benign'; expected 0 or more"),
        ({"task_limit": -1}, "task_limit=-1; expected 0 or more"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_settings_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        StudySettings(**options)
    with pytest.raises(ValueError, match=message):
        replace(FOR_REAL_MODELS, **options)


def test_a_behaviour_has_its_own_budget_or_the_common_one():
    settings = StudySettings(budget=0.2, budgets={"refusal": 0.1})
    assert settings.budget_of("refusal") == 0.1
    assert settings.budget_of("benign") == 0.2
