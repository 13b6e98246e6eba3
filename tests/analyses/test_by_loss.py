"""The cross-ablation by loss judges made-up rows by its rule, and runs on an organism.

Would catch: a circuit that saw the type it is judged on, a rule that ignores a control or benign
answers, gaps of the wrong sign, an ability compared with itself.
"""

import dataclasses
from functools import partial

import by_loss as analysis
import pytest
import torch

import harmcircuits as hc
from harmcircuits.measurements import Measurement, Rows

LABELS = {"model": "m", "ladder": "own"}


def a_run(*, unseen=0.8, random=0.0, benign=0.05, gaps=(0.3, 0.3)) -> Rows:
    """Rises of harm (1.0 under the circuit of all types) and benign answers, and both gaps."""

    def row(metric: str, mean: float, **labels: str) -> Measurement:
        return Measurement(metric, {**LABELS, **labels}, mean, mean - 0.1, mean + 0.1, 40)

    rows = Rows([row("lift", 2.0, mask="harmful", of="benign", protected="none")])
    for protected in ("none", "benign"):
        where = {"protected": protected}
        rises = {
            ("harmful", "harmful"): 1.0,
            ("harmful", "benign"): benign,
            ("benign", "harmful"): 0.1,
            ("benign", "benign"): 1.0,
            (analysis.UNSEEN, "harmful"): unseen,
            (analysis.UNSEEN, "benign"): benign,
            (analysis.OPPOSITE, "harmful"): -0.2,
            ("random 0", "harmful"): random,
        }
        rows += [
            row("nll_rise", mean, mask=mask, of=of, **where) for (mask, of), mean in rises.items()
        ]
        rows += [row("nll_gap", gaps[0], of="harmful", against="benign", **where)]
        rows += [row("nll_gap", gaps[1], of="benign", against="harmful", **where)]
        rows += [row("weights_removed", 100, **where)]
    return rows


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, "holds"),
        ({"unseen": 0.4}, "holds in part"),  # below half of the rise under the circuit of all types
        ({"random": 0.7}, "holds in part"),
        ({"benign": 0.7}, "holds in part"),
        ({"gaps": (0.3, 0.05)}, "holds in part"),  # general, and one gap's interval holds zero
        ({"unseen": 0.4, "gaps": (0.05, 0.3)}, "does not hold here"),
    ],
)
def test_the_rule(change, expected):
    rows = a_run(**change)
    result = analysis.claim.result(rows)
    assert result.outcome == expected
    assert ("is not general" if change.get("unseen", 1) < 0.5 else "general") in result.words


@pytest.fixture(scope="module")
def model():
    """An organism asked about every eighth item: a few types of harm have items in every split."""
    model = hc.open_model("sft")
    behaviours = {}
    for name in ("harmful", "benign"):
        behaviour = model.behaviours[name]
        behaviours[name] = dataclasses.replace(behaviour, prompts=partial(every_eighth, behaviour))
    return analysis.typed(dataclasses.replace(model, behaviours=behaviours))


def every_eighth(behaviour, split: str) -> hc.PromptSet:
    return behaviour.prompts(split)[::8]


def test_circuits_that_leave_a_type_out_are_scored_on_the_others(model):
    calibrations = analysis.calibrations_of(model)
    types = analysis.shown_types(model, calibrations)
    assert len(types) >= 2
    shares = {"size": 0.002, "protect_share": 0.01}
    masks = analysis.every_mask(model, calibrations, types, ["benign"], **shares)
    pair = analysis.every_mask(model, calibrations, types[:2], ["benign"], **shares)
    for type_, other in (types[:2], types[1::-1]):
        without = removed(pair, f"all but {type_}")
        assert torch.equal(without, removed(pair, other)), "all but one of two is the other"
    assert (masks["benign", "harmful"] & masks["benign", analysis.OPPOSITE]).n_removed == 0
    assert len({mask.n_removed for mask in masks.values()}) == 1


def removed(masks, name: str) -> torch.Tensor:
    mask = masks["benign", name]
    return torch.cat([mask.dense(weight).flatten() for weight in mask.shapes])


def test_rises_are_paired_and_by_type(model):
    types = analysis.shown_types(model, analysis.calibrations_of(model))
    references = model.behaviours["harmful"].references("heldout")
    numbers = [types.index(f"harmful/{example.category}") for example in references]
    of_type = torch.tensor(numbers).float()
    n_benign = len(model.behaviours["benign"].references("heldout"))
    rises = {}
    for type_ in types:
        harm = of_type + (10.0 if type_ == types[0] else 20.0)
        rises[f"all but {type_}"] = {"harmful": harm, "benign": torch.full((n_benign,), 3.0)}
    rows = analysis.rise_rows(model, rises, types, LABELS)
    for number, type_ in enumerate(types):
        rise = rows.one("nll_rise", mask=f"all but {types[0]}", of=type_)
        assert rise.mean == pytest.approx(10 + number)
    unseen = rows.where("nll_rise", mask=analysis.UNSEEN)
    # Each item under the circuit that left its type out.
    expected = of_type + torch.where(of_type == 0, 10.0, 20.0)
    assert unseen.one(of="harmful").mean == pytest.approx(expected.mean().item())
    assert unseen.one(of="benign").mean == pytest.approx(3.0)

    both = {"harmful": {"harmful": of_type + 2, "benign": torch.ones(n_benign)}}
    both["benign"] = {"harmful": of_type, "benign": torch.full((n_benign,), 5.0)}
    gaps = analysis.gap_rows(model, both, ["benign"], LABELS)
    assert gaps.one(of="harmful", against="benign").mean == pytest.approx(2.0)
    assert gaps.one(of="benign", against="harmful").mean == pytest.approx(4.0)
