"""Circuits that transfer between types of harm, and whether the words that types share explain it.

Would catch: a test of words that cannot tell them from types, or that takes other types for topics.
"""

from itertools import permutations

import numpy as np
import pytest
from support.transfer import common_words_test

from harmcircuits.measurements import Measurement, Rows
from harmcircuits.organisms.world import world


def pair_rows(rate) -> Rows:
    """The rate of each topic under the circuit of each other one."""
    rows = []
    for first, second in permutations(world().topics, 2):
        where = {"scored": first, "tested": second}
        rows.append(Measurement.exact("rate", where, rate(first, second)))
    return Rows(rows)


def n_common(first: str, second: str) -> int:
    words = (set(world().favoured[topic, "harmful"]) for topic in (first, second))
    return len(set.intersection(*words))


def test_words_explain_what_transfers_where_they_do():
    test = common_words_test(pair_rows(lambda *pair: 1 - n_common(*pair) / 2))
    assert test.rates == {0: 1.0, 1: 0.5, 2: 0.0}
    assert test.p is not None and test.p < 0.01


def test_words_do_not_explain_what_is_drawn_at_random_or_goes_the_other_way():
    draw = np.random.default_rng(0)
    test = common_words_test(pair_rows(lambda *_: float(draw.random())))
    assert test.p is not None and test.p > 0.05
    test = common_words_test(pair_rows(lambda *pair: n_common(*pair) / 2))
    assert test.p == pytest.approx(1, abs=0.02)


def test_types_that_are_no_topics_have_no_words():
    where = {"scored": "fraud", "tested": "hacking"}
    assert common_words_test(Rows([Measurement.exact("rate", where, 1.0)])).p is None
