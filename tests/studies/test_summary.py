"""What the rows of a study are called.

Would catch: a kept ability that is not watched, a part whose whole is called kept, a column without
a title.
"""

import pytest
from helpers import small_model

from harmcircuits.behaviours.behaviour import standard_behaviours
from harmcircuits.studies.summary import Terms


def test_the_standard_terms_are_those_of_the_committed_rows():
    terms = Terms.standard()
    assert (terms.target.name, terms.contrast.name) == ("harmful", "benign")
    assert terms.kept_rates == (
        "benign_valid_rate",
        "recognition_accuracy",
        "explanation_rate",
        "knowledge_rate",
        "borderline_valid_rate",
        "prefilled_valid_rate",
    )
    assert list(terms.rates.items())[:3] == [
        ("harm_valid_rate", "harm"),
        ("harm_degenerate_rate", "degenerate"),
        ("benign_valid_rate", "benign"),
    ]
    assert list(terms.losses)[:4] == ["harm_nll", "benign_nll", "prefilled_nll", "benign_kl"]
    assert terms.losses["harm_nll"] == "harm NLL"
    assert (terms.kl_metric, terms.twin) == ("benign_kl", "benign twin")
    assert list(standard_behaviours()) == [behaviour.name for behaviour in terms.behaviours]


def test_terms_are_of_the_model_that_is_studied():
    model = small_model("sft")
    terms = Terms.of(model)
    assert [behaviour.name for behaviour in terms.behaviours] == model.whole_behaviours
    kept = ("benign_valid_rate", "recognition_accuracy", "explanation_rate", "knowledge_rate")
    assert terms.kept_rates == kept
    assert terms.measured == ["harmful", "benign", "recognition", "explanation", "knowledge"]

    spared = Terms.of(model, protected=("benign", "refusal"))
    assert spared.kept_rates == (*kept, "refusal_rate"), "what is protected is kept"
    assert "refusal" in spared.measured
    assert Terms.standard(["refusal"]).kept_rates[4] == "refusal_rate"

    other = Terms.of(model, "knowledge", "refusal")
    assert other.kept_rates == (*kept[:3], "refusal_rate"), "the contrast is kept too"
    assert (other.kl_metric, other.twin) == ("refusal_kl", "refusal twin")
    part = Terms.of(model, "parts", "benign")
    assert "knowledge_rate" not in part.kept_rates, "the whole of what is removed is not kept"
    with pytest.raises(ValueError, match=r"no behaviour 'harm'.*'harmful'"):
        Terms.of(model, "harm")
