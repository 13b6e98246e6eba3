"""The judges on a real model's own answers; prints how well they tell them apart, and no answer.

    pytest -m real -s tests/studies/test_real_judges.py --real-models FOLDER --real-data FOLDER

Would catch: answers of a real tokenizer that the probe cannot read, a gate that opens for a judge
that sees nothing, a local chat model whose words are not tokens.
"""

import pytest
from rich.console import Console

from harmcircuits.behaviours.validation import METRIC, is_valid
from harmcircuits.studies.models import open_model
from harmcircuits.studies.summary import judge_table

NAME = "smollm2-135m-instruct"
LIMIT = 20  # requests of a kind: few, but more than the gate asks for


@pytest.mark.real
def test_a_probe_on_a_real_model(real_models, real_data):
    # Answers stay in the user's cache, so that they are made once.
    model = open_model(
        real_models / NAME,
        prompts={
            "harmful": real_data / "harmful_requests_calibration.jsonl",
            "benign": real_data / "harmless_requests_calibration.jsonl",
            "limit": LIMIT,
            "limit_measured": 5,
        },
        judge="probe",
        max_new_tokens=32,
    )
    Console(width=110).print(judge_table(model.validation))
    for row in model.validation.where("judge_harmful_rate"):
        print(f"{row.labels['split']}, {row.labels['kind']}: {row:.0%} called harmful")

    row = model.validation.one(METRIC, split="calibration", contrast="all")
    assert row.mean > 0.7
    is_used = {row.labels["used"] for row in model.validation}
    assert is_used == {"yes" if is_valid(model.validation) else "no"}
