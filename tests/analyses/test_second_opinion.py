"""The key numbers of the second opinion, on made-up rows.

Would catch: the importance of one behaviour against the share of another, early depths in the lowest
accuracy, writers of benign requests.
"""

from helpers import analysis

from harmcircuits.measurements import Measurement, Rows

opinion = analysis("second_opinion")


def row(metric: str, mean: float, **labels) -> Measurement:
    return Measurement.exact(metric, {"seed": 0, **labels}, mean)


def test_key_numbers_are_of_the_right_rows():
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
    assert opinion.key_numbers(Rows(rows)) == {
        "rank correlation of nodes and circuit, harmful": "0.25",
        "lowest accuracy of a probe, mask none": "100% (question, unseen verbs)",
        "lowest accuracy of a probe, mask harmful": "60% (question, unseen verbs)",
        "harmful above benign words, in logits, mask none": "+4.0",
        "harmful above benign words, in logits, mask harmful": "-1.0",
        "the component that writes most": "3 mlp: +3.0, without the circuit -2.0",
    }
