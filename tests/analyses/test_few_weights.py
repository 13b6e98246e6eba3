"""Everyday behaviours: their judges, and the rule.

Would catch: a judge that calls one language another, requests that are both
scored and measured, a behaviour said to hang on weights whose controls end it too.
"""

import os
import tomllib
from pathlib import Path

import few_weights
import pytest
from few_weights import CLOSER, OPPOSITE, PROTECTED, RANDOM, hangs, outcome, smallest
from support.everyday import LANGUAGES, READABLE, UNKNOWN, everyday, language, readability

import harmcircuits as hc
from harmcircuits.behaviours.generation import generate
from harmcircuits.measurements import Measurement, Rows
from harmcircuits.prompts import Example, PromptSet

BEHAVIOURS = everyday(8)
FRENCH_PRIME = "Explique ce qu'est un nombre premier."
SENTENCES = tomllib.loads(Path(__file__).with_name("languages.toml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", LANGUAGES)
def test_a_sentence_is_in_its_language_or_unknown_and_never_in_another(name):
    read = [language(sentence) for sentence in SENTENCES[name].strip().splitlines()]
    assert len(read) == 12 and set(read) <= {name, UNKNOWN}
    assert read.count(name) >= 9


@pytest.mark.parametrize("text", ["", "...", "13", "Rembrandt", "la", "un verbo", "the der"])
def test_a_tie_and_a_text_without_common_words_are_unknown(text):
    assert language(text) == UNKNOWN


@pytest.mark.parametrize(
    ("name", "request_", "answer", "verdict"),
    [
        ("language", FRENCH_PRIME, "C'est un nombre qui est divisible par deux.", "language"),
        ("language", FRENCH_PRIME, "Un nombre is a number that has two divisors.", READABLE),
        ("language", "Wie macht man Tee?", "Man nimmt Wasser und Blätter.", "language"),
        ("language", "Como se faz café?", "The water is hot.", READABLE),
        ("language", FRENCH_PRIME, "Victor Hugo.", UNKNOWN),
        ("unscored", "Wie was Rembrandt?", "Hij was een schilder.", "unscored"),
        ("german", "Translate into German: The soup is hot.", "Die Suppe ist warm.", "german"),
    ],
)
def test_an_answer_is_read_in_the_language_that_its_request_is_labelled_with(
    name, request_, answer, verdict
):
    assert BEHAVIOURS[name].judge(request_, answer) == verdict


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


def rows_of(
    rate: dict[str, float], *, plain: float = 1.0, incoherent: float = 0.0, unknown: float = 0.0
) -> Rows:
    """The rows of a behaviour that every answer shows, and of its rate under masks."""
    rows = Rows()
    for mask, share in {"none": 1.0, **rate}.items():
        labels = {"target": "fact", "mask": mask, "dose": 1.0 if mask == "none" else 0.0}
        rates = {"fact_rate": share, "fact_degenerate_rate": 0.0}
        rates |= {f"{name}_rate": 1.0 for name in PROTECTED["fact"]}
        if mask != "none":
            rates |= {"fact_degenerate_rate": incoherent, "fact_unknown_rate": unknown}
            rates |= {"plain_rate": plain, "n_removed": 7.0}
        rows += [Measurement.exact(metric, labels, value) for metric, value in rates.items()]
    return rows


@pytest.mark.parametrize(
    ("options", "verdict"),
    [
        ({}, "within budget"),
        ({"plain": 0.9}, "at a cost"),
        ({"incoherent": 0.2}, "does not end"),
        ({"unknown": 0.2}, "undecided"),
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
    mask = hc.WeightMask.load(name)
    assert mask.n_removed == n_removed
    prompts = PromptSet((Example(request_),))
    options = {"template": few_weights.template_of(name), "max_new_tokens": 24}
    (unpruned,) = generate(bridge, prompts, **options)
    with hc.masked(bridge, mask):
        (masked,) = generate(bridge, prompts, **options)
    assert unpruned_words in unpruned.text and words in masked.text
