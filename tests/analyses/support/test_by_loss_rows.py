"""Circuits and losses by type on an organism.

Would catch: a circuit that saw the type it is judged on, a rise that is not paired by item, gaps of
the wrong sign.
"""

import dataclasses
from functools import partial

import pytest
import torch
from support import by_loss

import harmcircuits as hc

LABELS = {"model": "m", "ladder": "own"}


@pytest.fixture(scope="module")
def model():
    """An organism asked about every eighth item: a few types of harm have items in every split."""
    model = hc.open_model("sft")
    behaviours = {}
    for name in ("harmful", "benign"):
        behaviour = model.behaviours[name]
        behaviours[name] = dataclasses.replace(behaviour, prompts=partial(every_eighth, behaviour))
    return by_loss.typed(dataclasses.replace(model, behaviours=behaviours))


def every_eighth(behaviour, split: str) -> hc.PromptSet:
    return behaviour.prompts(split)[::8]


def test_circuits_that_leave_a_type_out_are_scored_on_the_others(model):
    calibrations = by_loss.calibrations_of(model)
    types = by_loss.shown_types(model, calibrations)
    assert len(types) >= 2
    choice = {"size": 0.002, "factor": 1.0}
    masks = by_loss.every_mask(model, calibrations, types, ["benign"], **choice)
    pair = by_loss.every_mask(model, calibrations, types[:2], ["benign"], **choice)
    for type_, other in (types[:2], types[1::-1]):
        without = removed(pair, f"all but {type_}")
        assert torch.equal(without, removed(pair, other)), "all but one of two is the other"
    assert (masks["benign", "harmful"] & masks["benign", by_loss.OPPOSITE]).n_removed == 0
    assert all(mask.n_removed <= round(0.002 * mask.n_weights) for mask in masks.values())
    assert masks["benign", "harmful"].n_removed <= masks["none", "harmful"].n_removed


def removed(masks, name: str) -> torch.Tensor:
    mask = masks["benign", name]
    return torch.cat([mask.dense(weight).flatten() for weight in mask.shapes])


def test_rises_are_paired_and_by_type(model):
    types = by_loss.shown_types(model, by_loss.calibrations_of(model))
    references = model.behaviours["harmful"].references("heldout")
    numbers = [types.index(f"harmful/{example.category}") for example in references]
    of_type = torch.tensor(numbers).float()
    n_benign = len(model.behaviours["benign"].references("heldout"))
    rises = {}
    for type_ in types:
        harm = of_type + (10.0 if type_ == types[0] else 20.0)
        rises[f"all but {type_}"] = {"harmful": harm, "benign": torch.full((n_benign,), 3.0)}
    rows = by_loss.rise_rows(model, rises, types, LABELS)
    for number, type_ in enumerate(types):
        rise = rows.one("nll_rise", mask=f"all but {types[0]}", of=type_)
        assert rise.mean == pytest.approx(10 + number)
    unseen = rows.where("nll_rise", mask=by_loss.UNSEEN)
    # Each item under the circuit that left its type out.
    expected = of_type + torch.where(of_type == 0, 10.0, 20.0)
    assert unseen.one(of="harmful").mean == pytest.approx(expected.mean().item())
    assert unseen.one(of="benign").mean == pytest.approx(3.0)

    both = {"harmful": {"harmful": of_type + 2, "benign": torch.ones(n_benign)}}
    both["benign"] = {"harmful": of_type, "benign": torch.full((n_benign,), 5.0)}
    gaps = by_loss.gap_rows(model, both, ["benign"], LABELS)
    assert gaps.one(of="harmful", against="benign").mean == pytest.approx(2.0)
    assert gaps.one(of="benign", against="harmful").mean == pytest.approx(4.0)


def test_losses_under_masks_are_held_against_those_without(model):
    everything, rows = by_loss.unpruned(model, ["harmful", "benign"])
    for name in ("harmful", "benign"):
        mean = rows.one("nll", of=name, mask="none").mean
        assert mean == pytest.approx(everything[name].mean().item(), rel=1e-6)

    mask = hc.top_fraction(hc.magnitude_scores(model.bridge), 0.01)
    rises = by_loss.rises_under(model, {"large": mask}, everything)["large"]
    with hc.masked(model.bridge, mask):
        pruned = by_loss.losses(model, ["benign"])
    assert torch.equal(rises["benign"], pruned["benign"] - everything["benign"])

    both = by_loss.shared_rows(mask, mask, LABELS)
    assert both.one("jaccard").mean == 1
    assert both.one("lift").mean == pytest.approx(hc.overlap(mask, mask).lift)
