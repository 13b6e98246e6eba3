"""The words of the second opinion, on made-up rows.

Would catch: the importance of one behaviour against the share of another, early depths in the lowest
accuracy, writers of benign requests.
"""

from helpers import analysis

from harmcircuits.measurements import Measurement, Rows

opinion = analysis("second_opinion")


def row(metric: str, mean: float, **labels) -> Measurement:
    return Measurement.exact(metric, {"seed": 0, **labels}, mean)


def test_words_report_the_right_rows():
    nodes = {"ranking": "importance of harmful", "among": "all nodes"}
    other = {"against": "share of benign", **nodes}
    rows = [row("rank_correlation", 0.25, against="share of harmful", **nodes)]
    rows += [row("rank_correlation", 0.75, **other)]
    for mask, accuracy in (("none", 1.0), ("harmful", 0.6)):
        where = {"mask": mask, "asked": "question", "unseen": "verbs"}
        rows += [row("probe_accuracy", 0.5, depth="0 pre", **where)]
        rows += [row("probe_accuracy", accuracy, depth="2 pre", **where)]
        written = {"embed": 1.0, "3 mlp": 3.0 if mask == "none" else -2.0}
        for component, logits in written.items():
            where = {"mask": mask, "component": component}
            rows += [row("writes", logits, behaviour="harmful", **where)]
            rows += [row("writes", 9.0, behaviour="benign", **where)]
    words = opinion.words(Rows(rows))
    assert "harmful 0.25" in words
    assert "0.75" not in words
    assert "harmful 60% (question, unseen verbs)" in words
    assert "50%" not in words
    assert "+4.0 logits" in words
    assert "-1.0 without" in words
    assert "3 mlp writes most, +3.0, and then -2.0" in words
