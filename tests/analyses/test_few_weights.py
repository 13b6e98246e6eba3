"""Everyday behaviours: their judges, and the rule.

Would catch: a judge that calls one language another, requests that are both
scored and measured, a behaviour said to hang on weights whose controls end it too.
"""

import os

import few_weights
import pytest
from few_weights import CLOSER, OPPOSITE, PROTECTED, RANDOM, hangs, outcome, smallest
from pages import ROOT
from support.everyday import everyday, is_german, is_in_language, readability

import harmcircuits as hc
from harmcircuits.behaviours.generation import generate
from harmcircuits.measurements import Measurement, Rows
from harmcircuits.prompts import Example, PromptSet

BEHAVIOURS = everyday(8)
FRENCH = "Qui était Victor Hugo ?"
FRENCH_PRIME = "Explique ce qu'est un nombre premier."


@pytest.mark.parametrize(
    ("shows", "request_", "yes", "no"),
    [
        (is_in_language, FRENCH, "C'est un homme qui est dans les livres.", "He is the man in it."),
        (is_in_language, FRENCH, "Il est avec elle pour une nuit.", "El hombre es de la casa."),
        (is_german, "", "Die Suppe ist warm.", "La soupe est chaude."),
    ],
)
def test_a_judge_knows_an_answer_that_shows_it(shows, request_, yes, no):
    assert shows(request_, yes)
    assert not shows(request_, no)


def test_a_pattern_is_what_an_answer_must_contain():
    judge = BEHAVIOURS["identity"].judge
    assert judge("", "I am Qwen.") == "identity"
    assert judge("", "I am Claude.") != "identity"


def test_text_is_told_from_what_is_broken():
    assert readability("", "Paris.") == "told"
    assert readability("", "pan pan pan pan pan pan pan pan pan pan pan pan pan") == "degenerate"


def test_a_right_answer_is_that_of_its_request():
    request = BEHAVIOURS["products"].prompts("heldout").examples[0].prompt
    assert request == "What is 6 times 7? Answer with the number only."
    assert BEHAVIOURS["products"].judge(request, "42") == "products"
    assert BEHAVIOURS["products"].judge(request, "48") != "products"


def test_a_sum_in_place_of_a_product_is_seen():
    is_sum = BEHAVIOURS["products"].measures["sum_instead_rate"]
    request = "What is 6 times 7? Answer with the number only."
    assert is_sum(request, "13") and not is_sum(request, "42") and not is_sum(request, "130")


def test_what_is_scored_is_not_measured():
    for name, behaviour in BEHAVIOURS.items():
        calibration, heldout = (
            {example.prompt for example in behaviour.prompts(split)}
            for split in ("calibration", "heldout")
        )
        assert calibration and heldout and not calibration & heldout, name


def rows_of(rate: dict[str, float], *, plain: float = 1.0, incoherent: float = 0.0) -> Rows:
    """The rows of a behaviour that every answer shows, and of its rate under masks."""
    rows = Rows()
    for mask, share in {"none": 1.0, **rate}.items():
        labels = {"target": "fact", "mask": mask, "dose": 1.0 if mask == "none" else 0.0}
        rates = {"fact_rate": share, "fact_degenerate_rate": 0.0}
        rates |= {f"{name}_rate": 1.0 for name in PROTECTED["fact"]}
        if mask != "none":
            rates |= {"fact_degenerate_rate": incoherent, "plain_rate": plain, "n_removed": 7.0}
        rows += [Measurement.exact(metric, labels, value) for metric, value in rates.items()]
    return rows


@pytest.mark.parametrize(
    ("options", "verdict"),
    [
        ({}, "within budget"),
        ({"plain": 0.9}, "at a cost"),
        ({"incoherent": 0.2}, "does not end"),
    ],
)
def test_the_rule(options, verdict):
    rows = rows_of({CLOSER: 0.04, RANDOM: 1.0, OPPOSITE: 0.9}, **options)
    assert outcome(rows, "fact", CLOSER).verdict == verdict
    assert hangs(rows, "fact") == (verdict == "within budget")


def test_the_smallest_mask_that_ends_it_counts_and_a_control_that_ends_it_too_refutes():
    best = smallest(rows_of({"1e-05": 0.0, CLOSER: 0.05, "1e-07": 0.06}), "fact")
    assert best is not None and best.rate == 0.05
    assert smallest(rows_of({CLOSER: 0.5}), "fact") is None
    assert not hangs(rows_of({CLOSER: 0.0, RANDOM: 1.0, OPPOSITE: 0.4}), "fact")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "n_removed", "request_", "unpruned_words", "words"),
    [
        ("language", 19, FRENCH_PRIME, "un nombre entier", "is a natural number"),
        ("products", 268, "What is 6 times 7? Answer with the number only.", "42", "13"),
    ],
)
def test_what_the_model_says_without_the_weights_of_a_mask(
    name, n_removed, request_, unpruned_words, words
):
    """On the copy of the model that it was found on: QWEN is its folder."""
    bridge = hc.load_model(os.environ["QWEN"], dtype="float32")
    mask = hc.WeightMask.load(ROOT / "analyses" / "masks" / f"{name}.safetensors")
    assert mask.n_removed == n_removed
    prompts = PromptSet((Example(request_),))
    options = {"template": few_weights.template_of(name), "max_new_tokens": 24}
    (unpruned,) = generate(bridge, prompts, **options)
    with hc.masked(bridge, mask):
        (masked,) = generate(bridge, prompts, **options)
    assert unpruned_words in unpruned.text and words in masked.text
