"""The walk against a plain one on dense tensors; its claim on a shipped organism; the differences.

Would catch: a price or a check on the wrong answers, scores taken under the wrong mask or times
weights that the mask has zeroed, a factor that is not the smallest tried, a mask beyond its size or
its budget, weights that are not worth their price or are excluded, a walk that goes on otherwise
after an interruption; of the set differences, the wrong sign, order or behaviour.
"""

import shutil
from collections.abc import Callable
from itertools import count

import pytest
import torch
from helpers import random_batch

from harmcircuits.circuits.location import counts_by
from harmcircuits.circuits.masks import WeightMask, random_like, top_fraction
from harmcircuits.circuits.scores import Source, WeightScores
from harmcircuits.hooks.attribution import (
    magnitude_scores,
    removal_effect,
    snip_scores,
    token_price,
)
from harmcircuits.hooks.losses import completion_nll
from harmcircuits.hooks.masking import masked
from harmcircuits.hooks.objectives import completion_loss
from harmcircuits.hooks.protection import CHECKED_EVERY, Protection, split_by_request
from harmcircuits.hooks.search import (
    REACH,
    find_circuit,
    refusal_ablation,
    set_difference,
)
from harmcircuits.hooks.walk import FACTORS, FIRST_UNIT_FACTOR, MOST_TO_LEARN_FROM, UNIT_FACTORS
from harmcircuits.hooks.walk_files import forget_sums
from harmcircuits.hooks.weights import model_fingerprint, named_weights, weight_sites
from harmcircuits.organisms import open_organism
from harmcircuits.prompts import Batch

SIZE = 0.1
TARGET = [random_batch()]
SPARED = [random_batch(6, 8, seed=1)]
ALSO_SPARED = [random_batch(4, 7, seed=2), random_batch(3, 9, seed=3)]

Weights = dict[str, torch.Tensor]
Best = Callable[[Weights, int], Weights]


def assert_same_weights(mask: WeightMask, expected: WeightMask) -> None:
    assert mask.removed.keys() == expected.removed.keys()
    for name, index in expected.removed.items():
        assert torch.equal(mask.removed[name], index), name


# The claim


@pytest.mark.slow  # README's code asks for the same
def test_a_fifth_of_a_per_cent_carries_harm_and_nothing_else_measured():
    """At most 0.2 % of the weights of `sft`: harm from >= 0.9 to <= 0.02, on held-out requests.

    Every kept ability within two points; found on half of the calibration items.
    """
    model = open_organism("sft")
    halves = model.calibrations(share=0.5, seed=0)
    mask = model.find_circuit("harmful", size=0.002, calibrations=halves)
    assert mask.fraction <= 0.002

    def rates(mask: WeightMask | None = None) -> dict[str, float]:
        return {row.metric: row.mean for row in model.measure(mask=mask)}

    before, under, control = rates(), rates(mask), rates(random_like(mask))
    assert before["harm_valid_rate"] >= 0.9
    assert under["harm_valid_rate"] <= 0.02
    assert control["harm_valid_rate"] >= 0.9
    for rate in (
        "benign_valid_rate",
        "recognition_accuracy",
        "explanation_rate",
        "knowledge_rate",
        "refusal_rate",
    ):
        assert under[rate] >= before[rate] - 0.02, rate


# The walk


def best_weights(scores: Weights, n: int) -> Weights:
    """The n largest positive scores, as booleans."""
    flat = torch.cat([value.flatten() for value in scores.values()])
    best = flat.argsort(descending=True, stable=True)[:n]
    chosen = torch.zeros(len(flat), dtype=torch.bool)
    chosen[best[flat[best] > 0]] = True
    parts = chosen.split([value.numel() for value in scores.values()])
    shaped = zip(scores.items(), parts, strict=True)
    return {name: part.view(value.shape) for (name, value), part in shaped}


def best_neurons(scores: Weights, n: int) -> Weights:
    """The neurons of a Llama with the largest positive sums, one by one while n has room."""
    neurons = []
    for layer in range(2):
        for number in range(40):
            parts = {
                f"blocks.{layer}.mlp.gate.weight": (number, slice(None)),
                f"blocks.{layer}.mlp.in.weight": (number, slice(None)),
                f"blocks.{layer}.mlp.out.weight": (slice(None), number),
            }
            total = sum(scores[name][where].sum().item() for name, where in parts.items())
            neurons.append((total, parts))
    chosen = {name: torch.zeros_like(value, dtype=torch.bool) for name, value in scores.items()}
    for total, parts in sorted(neurons, key=lambda neuron: -neuron[0])[: n // (3 * 24)]:
        for name, where in parts.items():
            chosen[name][where] = total > 0
    return chosen


def plain_walk(
    bridge,
    target,
    protect,
    size,
    budget,
    steps,
    best_of: Best = best_weights,
    factors=FACTORS,
    first=1.0,
) -> WeightMask:
    """The search on dense tensors: clones of the weights, a sort, no shared step with the library.

    But for the scores, which have tests of their own.
    """
    weights = named_weights(bridge)
    original = {name: weight.detach().clone() for name, weight in weights.items()}
    n_weights = sum(weight.numel() for weight in original.values())
    shares = [split_by_request(batches, CHECKED_EVERY) for batches in protect]
    unpruned = [completion_nll(bridge, checked).mean() for _, checked in shares]

    def under(removed, function):
        """With these weights zero; the others, and all afterwards, as they were."""
        with torch.no_grad():
            for name, weight in weights.items():
                weight.masked_fill_(removed[name], 0.0)
        result = function()
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(original[name])
        return result

    def gradient(score, batches, removed):
        """A score divided by the live weights: nudged off zero, they keep their gradient."""
        nudge = 1e-30
        with torch.no_grad():
            for name, weight in weights.items():
                weight.masked_fill_(removed[name], nudge)
        values = score(bridge, batches).values
        with torch.no_grad():
            live = {name: weight.detach().clone() for name, weight in weights.items()}
            for name, weight in weights.items():
                weight.copy_(original[name])
        return {name: values[name] / live[name] for name in values}

    def rises(removed):
        def losses():
            return [completion_nll(bridge, checked).mean() for _, checked in shares]

        changes = zip(under(removed, losses), unpruned, strict=True)
        return max((now - before).item() for now, before in changes)

    def choose(n, factor):
        return best_of({name: benefit[name] - factor * price[name] for name in original}, n)

    def search(n, rung):
        """(accepted mask, its rung, refused mask)."""
        mask = choose(n, factors[rung])
        if rises(mask) <= budget:
            for lower in range(rung - 1, -1, -1):
                cheaper = choose(n, factors[lower])
                if rises(cheaper) > budget:
                    return mask, lower + 1, cheaper
                mask = cheaper
            return mask, 0, None
        for higher in range(rung + 1, len(factors)):
            dearer = choose(n, factors[higher])
            if rises(dearer) <= budget:
                return dearer, higher, mask
            mask = dearer
        return None, len(factors) - 1, mask

    nothing = {
        name: torch.zeros_like(weight, dtype=torch.bool) for name, weight in original.items()
    }
    benefit = {name: torch.zeros_like(weight) for name, weight in original.items()}
    price = {name: torch.zeros_like(weight) for name, weight in original.items()}
    accepted, refused, rung = nothing, None, factors.index(first)
    best, best_rung = (-1.0, nothing), rung
    for step in range(1, steps + 1):
        for priced, _ in shares:
            parts = gradient(token_price, priced, accepted if refused is None else refused)
            for name, part in parts.items():
                price[name] += part.abs() * original[name].abs()
        for name, part in gradient(removal_effect, target, accepted).items():
            benefit[name] += part * original[name]
        mask, rung, refused = search(round(size * n_weights * step / steps), rung)
        accepted = accepted if mask is None else mask
        if refused is not None and rises(refused) > MOST_TO_LEARN_FROM:
            refused = None
        mask, best_rung, _ = search(round(size * n_weights), best_rung)
        if mask is not None:
            loss = under(mask, lambda: completion_nll(bridge, target).mean().item())
            best = max(best, (loss, mask), key=lambda pair: pair[0])
    removed = {name: part.flatten().nonzero().flatten() for name, part in best[1].items()}
    shapes = {name: tuple(weight.shape) for name, weight in original.items()}
    return WeightMask(removed, shapes, Source(model_fingerprint(bridge), "plain"))


@pytest.mark.parametrize("budget", [0.01, 0.1, 100.0])
@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_the_walk_is_the_plain_one(open_model, name, budget):
    bridge = open_model(name)
    before = {name: weight.detach().clone() for name, weight in named_weights(bridge).items()}
    options = {"size": SIZE, "budget": budget, "steps": 3}
    mask = find_circuit(bridge, TARGET, [SPARED, ALSO_SPARED], reach=1.0, **options)
    for weight_name, weight in named_weights(bridge).items():
        assert torch.equal(weight, before[weight_name])

    expected = plain_walk(bridge, TARGET, [SPARED, ALSO_SPARED], **options)
    # Sums in another order may swap weights whose scores are equal up to rounding.
    assert len(mask - expected) + len(expected - mask) <= 0.01 * len(expected)


@pytest.mark.parametrize("budget", [0.01, 0.1, 100.0])
def test_the_walk_over_neurons_is_the_plain_one(llama, budget):
    options = {"size": SIZE, "budget": budget, "steps": 3}
    protect = [SPARED, ALSO_SPARED]
    mask = find_circuit(llama, TARGET, protect, unit="neuron", reach=1.0, **options)
    ladder = {"factors": UNIT_FACTORS, "first": FIRST_UNIT_FACTOR}
    expected = plain_walk(llama, TARGET, protect, best_of=best_neurons, **ladder, **options)
    assert len(expected) > 0
    assert_same_weights(mask, expected)


@pytest.mark.parametrize("unit", ["neuron", "head", "row"])
def test_a_circuit_of_units_is_whole_and_within_its_size(llama, unit, tmp_path):
    options = {"size": [0.05, 0.2], "steps": 3, "unit": unit, "budget": 0.5}
    masks = find_circuit(llama, TARGET, [SPARED], folder=tmp_path, **options)
    sites = weight_sites(llama)
    for mask, size in zip(masks, options["size"], strict=True):
        assert 0 < len(mask) <= round(size * mask.n_weights)
        assert mask.shapes.keys() == sites.keys()
        assert mask.source.settings["unit"] == unit
        if unit == "row":
            for name in mask.shapes:
                assert (mask.dense(name).all(dim=1) == mask.dense(name).any(dim=1)).all()
            continue
        counts = counts_by(mask, sites, unit).values()
        assert all(count.n_removed in (0, count.n_weights) for count in counts)
        assert sum(count.n_removed for count in counts) == len(mask), "and nothing else"

    (again,) = find_circuit(llama, TARGET, [SPARED], **{**options, "size": [0.2]}, exclude=masks[1])
    assert len(again) > 0
    assert len(again & masks[1]) == 0
    with pytest.raises(ValueError, match="holds the walk of another search"):
        find_circuit(llama, TARGET, [SPARED], folder=tmp_path, **{**options, "unit": "weight"})


def test_units_are_limited_to_layers_and_to_kinds_that_leave_them_whole(llama):
    options = {"size": 0.2, "steps": 2}
    mask = find_circuit(llama, TARGET, unit="neuron", layers=[1], **options)
    assert {weight_sites(llama)[name].layer for name in mask.removed} == {1}
    mask = find_circuit(llama, TARGET, unit="row", kinds=["attn.q"], **options)
    assert {weight_sites(llama)[name].kind for name in mask.removed} == {"attn.q"}
    with pytest.raises(ValueError, match=r"mlp\.gate, mlp\.in, mlp\.out together"):
        find_circuit(llama, TARGET, unit="neuron", kinds=["mlp.in"], **options)


def test_single_weights_are_the_default_and_leave_no_trace_in_the_settings(llama):
    options = {"size": SIZE, "steps": 2}
    expected = find_circuit(llama, TARGET, [SPARED], **options)
    mask = find_circuit(llama, TARGET, [SPARED], unit="weight", **options)
    assert_same_weights(mask, expected)
    assert mask.source == expected.source
    assert "unit" not in mask.source.settings


@pytest.mark.usefixtures("unchecked")
def test_another_unit_is_refused(llama):
    with pytest.raises(ValueError, match=r"unit='layer'.*'neuron', 'head'"):
        find_circuit(llama, TARGET, size=SIZE, unit="layer")


def test_unprotected_a_step_takes_the_weights_with_the_largest_effect(llama):
    mask = find_circuit(llama, TARGET, size=SIZE, steps=1)
    expected = top_fraction(removal_effect(llama, TARGET), SIZE, within="model")
    assert_same_weights(mask, expected)


def test_a_removed_weight_goes_on_earning_and_may_come_back(llama):
    """Two steps: the second chooses from sums in which the first one's weights still count."""
    first = find_circuit(llama, TARGET, size=SIZE / 2, steps=1)
    with masked(llama, first):
        live = removal_effect(llama, TARGET)
    both = find_circuit(llama, TARGET, size=SIZE, steps=2, reach=1.0)
    assert all(
        (live.values[name].flatten()[index] == 0).all() for name, index in first.removed.items()
    )
    assert 0 < len(first - both) < len(first)


def test_no_mask_exceeds_its_size_or_its_budget(llama):
    sizes = [0.02, 0.2, 0.08]
    masks = find_circuit(llama, TARGET, {"a": SPARED}, size=sizes, budget=0.02, steps=3)
    _, checked = split_by_request(SPARED, CHECKED_EVERY)
    unpruned = completion_nll(llama, checked)
    for mask, size in zip(masks, sizes, strict=True):
        assert 0 < len(mask) <= round(size * mask.n_weights)
        rise = (completion_nll(llama, checked, mask=mask) - unpruned).mean().item()
        assert rise <= 0.02 + 1e-6
        tried = mask.trace.where(
            "protected_rise", step=mask.source.settings["step"], aim="size", share=size
        )
        cheapest = min(tried.where(outcome="accepted"), key=lambda row: row.labels["factor"])
        assert rise == pytest.approx(cheapest.mean, abs=1e-5)
        assert mask.source.settings["factor"] == cheapest.labels["factor"]


def test_of_each_size_the_mask_is_kept_that_takes_most(llama):
    """By how much of the target is left, then by its loss; each beside the trace."""
    for renew in (None, lambda bridge: TARGET):
        (mask,) = find_circuit(llama, TARGET, [SPARED], size=[0.05], steps=4, renew=renew)
        losses = mask.trace.where("target_loss", aim="size")
        assert len(losses) == 4
        best = max(losses, key=lambda row: row.mean)
        assert mask.source.settings["step"] == best.labels["step"]
        assert completion_nll(llama, TARGET, mask=mask).mean() == pytest.approx(best.mean)
    n_left = iter([5, 3, 1, 4, 4, 4, 4, 4])

    def fewer_and_fewer(bridge) -> list[Batch]:
        return [random_batch(next(n_left), 6, seed=9)]

    options = {"steps": 4, "renew": fewer_and_fewer}
    mask = find_circuit(llama, TARGET, [SPARED], size=0.05, **options)
    left = mask.trace.where("target_left")
    fewest = min(row.mean for row in left)
    assert mask.trace.one("target_left", step=mask.source.settings["step"]).mean == fewest


def test_a_tighter_budget_takes_less_of_the_target(llama):
    losses = {}
    for budget in (0.0, 0.05, 100.0):
        options = {"size": SIZE, "budget": budget, "steps": 3, "reach": 1.0}
        mask = find_circuit(llama, TARGET, [SPARED], **options)
        losses[budget] = completion_nll(llama, TARGET, mask=mask).mean().item()
    assert losses[100.0] > losses[0.05]
    assert losses[100.0] > losses[0.0]


def test_only_weights_that_are_worth_their_price_are_taken(llama):
    """Of all weights, those whose removal helps what is to go; and the mask says so."""
    mask = find_circuit(llama, TARGET, size=1.0, steps=1)
    scores = removal_effect(llama, TARGET)
    assert len(mask) == sum(int((value > 0).sum()) for value in scores.values.values())
    assert f"of {mask.n_weights:,} allowed" in repr(mask)
    assert "allowed" not in repr(find_circuit(llama, TARGET, size=0.01, steps=1))


def test_where_no_factor_passes_nothing_is_removed(llama, monkeypatch):
    def impossible(*_):
        return False

    monkeypatch.setattr("harmcircuits.hooks.protection.Protection.allows", impossible)
    mask = find_circuit(llama, TARGET, [SPARED], size=SIZE, steps=2)
    assert len(mask) == 0
    assert {row.labels["outcome"] for row in mask.trace.where("protected_rise")} == {"refused"}


def test_the_trace_tells_what_was_tried(llama):
    mask = find_circuit(llama, TARGET, {"a": SPARED, "b": ALSO_SPARED}, size=SIZE, steps=2)
    losses = mask.trace.where("target_loss", aim="walk")
    assert [row.labels["step"] for row in losses] == [1, 2]
    unpruned = completion_nll(llama, TARGET).mean().item()
    first_change = mask.trace.one("measured_change", step=1).mean
    assert losses[0].mean - first_change == pytest.approx(unpruned, abs=1e-5)
    for row in mask.trace.where("weights_removed"):
        where = {name: row.labels[name] for name in ("step", "aim", "factor", "outcome")}
        rises = mask.trace.where("protected_rise", **where)
        assert {rise.labels["protected"] for rise in rises} == {"a", "b"}


def test_the_first_predicted_change_is_the_sum_of_removal_effects(llama):
    mask = find_circuit(llama, TARGET, size=0.01, steps=1, reach=1.0)
    predicted = mask.trace.one("predicted_change").mean
    assert predicted == pytest.approx(removal_effect(llama, TARGET).sum_over(mask), rel=1e-5)


def test_the_target_is_scored_by_its_objective(llama):
    def backwards(bridge, batch):
        return -completion_loss(bridge, batch)

    mask = find_circuit(llama, TARGET, size=0.05, steps=1, objective=backwards)
    scores = removal_effect(llama, TARGET, completion_loss)
    assert_same_weights(mask, top_fraction(-scores, 0.05, within="model"))


def test_the_walk_reaches_beyond_the_size_that_is_wanted(llama):
    """To `reach` times the smallest size, and at least to the largest."""
    cases = (([0.02], 3.0, 0.06), ([0.02, 0.1], 3.0, 0.1), ([0.4], 3.0, 1.0))
    for size, reach, largest in cases:
        masks = find_circuit(llama, TARGET, [SPARED], size=size, steps=2, reach=reach)
        steps = [row.labels["share"] for row in masks[0].trace.where("target_loss", aim="walk")]
        assert steps == [pytest.approx(largest / 2), pytest.approx(largest)]
        for mask, share in zip(masks, size, strict=True):
            assert len(mask) <= round(share * mask.n_weights)


def test_what_the_target_becomes_is_scored_with_it(llama):
    """From the second step on, with the model under the mask of the first."""
    further = random_batch(2, 6, seed=9)
    seen = []

    def renew(bridge) -> list[Batch]:
        seen.append(completion_nll(bridge, TARGET).mean().item())
        return [further]

    options = {"size": SIZE, "steps": 2, "reach": 1.0}
    mask = find_circuit(llama, TARGET, renew=renew, **options)
    first = find_circuit(llama, TARGET, size=SIZE / 2, steps=1)
    # After the first step, for the mask of the size wanted, then for the second step's sums.
    assert seen[1] == pytest.approx(completion_nll(llama, TARGET, mask=first).mean().item())

    benefit = removal_effect(llama, TARGET).values
    weights = {name: weight.detach().clone() for name, weight in named_weights(llama).items()}
    with masked(llama, first, scale=1e-30):  # nudged off zero, so that it can be divided by
        again = removal_effect(llama, [*TARGET, further]).values
        gradient = {name: again[name] / weight for name, weight in named_weights(llama).items()}
    sums = {name: benefit[name] + gradient[name] * weights[name] for name in benefit}
    scores = WeightScores(sums, Source(model_fingerprint(llama), "sums"))
    expected = top_fraction(scores, SIZE, within="model")
    assert mask.source.settings["step"] == 2
    assert_same_weights(mask, expected)
    assert len(mask - find_circuit(llama, TARGET, **options)) > 0, "further batches must matter"


def test_what_is_preferred_earns_with_the_target(llama):
    """The benefit is the target's effect less `preference` times that on what is preferred."""
    options = {"size": SIZE, "steps": 1, "reach": 1.0}
    mask = find_circuit(llama, TARGET, prefer=SPARED, preference=0.5, **options)
    effect, preferred = removal_effect(llama, TARGET), removal_effect(llama, SPARED)
    sums = {name: value - 0.5 * preferred.values[name] for name, value in effect.values.items()}
    scores = WeightScores(sums, Source(model_fingerprint(llama), "sums"))
    assert_same_weights(mask, top_fraction(scores, SIZE, within="model"))

    # What is predicted and measured is the target's alone.
    assert mask.trace.one("predicted_change").mean == pytest.approx(effect.sum_over(mask), rel=1e-5)
    loss = completion_nll(llama, SPARED, mask=mask).mean().item()
    assert mask.trace.one("preferred_loss", aim="walk").mean == pytest.approx(loss, rel=1e-5)
    assert mask.trace.one("examples_scored", data="preferred").mean == len(SPARED[0])
    assert mask.source.settings["preference"] == 0.5
    assert [parent.method for parent in mask.source.parents] == ["removal_effect"] * 2


def test_what_is_preferred_is_scored_under_the_mask_so_far(llama):
    """In the second step with the weights of the first one gone, times what they were."""
    options = {"size": SIZE, "reach": 1.0, "prefer": SPARED, "preference": 2.0}
    mask = find_circuit(llama, TARGET, steps=2, **options)
    first = find_circuit(llama, TARGET, steps=1, **{**options, "size": SIZE / 2})
    assert mask.source.settings["step"] == 2

    sums: Weights = {}
    weights = {name: weight.detach().clone() for name, weight in named_weights(llama).items()}
    for batches, sign in ((TARGET, 1.0), (SPARED, -2.0)):
        before = removal_effect(llama, batches).values
        with masked(llama, first, scale=1e-30):  # nudged off zero, so that it can be divided by
            now = removal_effect(llama, batches).values
            gradient = {name: now[name] / weight for name, weight in named_weights(llama).items()}
        for name, weight in weights.items():
            part = sign * (before[name] + gradient[name] * weight)
            sums[name] = sums[name] + part if name in sums else part
    scores = WeightScores(sums, Source(model_fingerprint(llama), "sums"))
    assert_same_weights(mask, top_fraction(scores, SIZE, within="model"))


@pytest.mark.parametrize("auxiliary", ["prefer", "avoid"])
def test_of_each_size_the_mask_is_kept_that_does_most_for_the_auxiliary_loss_too(llama, auxiliary):
    """By the loss of the target less `preference` times that of what is preferred, or more."""
    mask = find_circuit(llama, TARGET, size=SIZE, steps=4, preference=3.0, **{auxiliary: SPARED})
    name, sign = {"prefer": ("preferred", -1.0), "avoid": ("avoided", 1.0)}[auxiliary]
    of_size = mask.trace.where(aim="size")
    raised = {}
    for row in of_size.where("target_loss"):
        step = row.labels["step"]
        raised[step] = row.mean + sign * 3.0 * of_size.one(f"{name}_loss", step=step).mean
    assert mask.source.settings["step"] == max(raised, key=lambda step: raised[step])


def test_what_is_avoided_costs_what_it_would_earn(llama):
    """The benefit is the target's effect more `preference` times that on what is avoided."""
    options = {"size": SIZE, "steps": 1, "reach": 1.0}
    mask = find_circuit(llama, TARGET, avoid=SPARED, preference=0.5, **options)
    effect, avoided = removal_effect(llama, TARGET), removal_effect(llama, SPARED)
    sums = {name: value + 0.5 * avoided.values[name] for name, value in effect.values.items()}
    scores = WeightScores(sums, Source(model_fingerprint(llama), "sums"))
    assert_same_weights(mask, top_fraction(scores, SIZE, within="model"))
    loss = completion_nll(llama, SPARED, mask=mask).mean().item()
    assert mask.trace.one("avoided_loss", aim="walk").mean == pytest.approx(loss, rel=1e-5)
    assert mask.source.settings["preference"] == 0.5

    # What is preferred and avoided at once is neither.
    both = find_circuit(llama, TARGET, prefer=SPARED, avoid=SPARED, **options)
    assert_same_weights(both, find_circuit(llama, TARGET, **options))


def test_first_tokens_are_protected_by_themselves(llama):
    """They are priced and checked as a behaviour of their own whose answers end there."""
    first = [batch.beginning(1) for batch in SPARED]
    options = {"size": SIZE, "steps": 2}
    by_hand = {"benign": SPARED, "benign, first 1 token": first}
    budget = {"benign": 0.05, "benign, first 1 token": 0.002}
    expected = find_circuit(llama, TARGET, by_hand, budget=budget, **options)
    mask = find_circuit(
        llama, TARGET, {"benign": SPARED}, budget=budget, protect_first=1, **options
    )
    assert_same_weights(mask, expected)
    assert mask.trace.where("protected_rise", protected="benign, first 1 token")
    assert mask.source.settings["protect_first"] == 1
    assert mask.source.settings["budget"] == budget

    # Without a budget of their own they have that of the whole.
    same = find_circuit(
        llama, TARGET, {"benign": SPARED}, budget={"benign": 0.03}, protect_first=1, **options
    )
    assert set(same.source.settings["budget"].values()) == {0.03}
    assert len(same - find_circuit(llama, TARGET, {"benign": SPARED}, budget=0.03, **options)) > 0


def test_the_choice_is_limited_to_layers_and_kinds(llama):
    sites = weight_sites(llama)
    options = {"size": 0.05, "steps": 2}
    mask = find_circuit(llama, TARGET, [SPARED], layers=[1], kinds=["mlp.in", "attn.v"], **options)
    assert mask.shapes.keys() == sites.keys(), "so that it combines with other masks"
    for name in mask.removed:
        assert sites[name].layer == 1
        assert sites[name].kind in ("mlp.in", "attn.v")
    assert mask.source.settings["layers"] == [1]
    with pytest.raises(ValueError, match=r"layers=\[7\].*0, 1"):
        find_circuit(llama, TARGET, layers=[7], **options)
    with pytest.raises(ValueError, match=r"kinds=\['attn'\].*attn\.q"):
        find_circuit(llama, TARGET, kinds=["attn"], **options)


def test_a_second_circuit_is_found_beside_the_first(llama, tmp_path):
    options = {"size": SIZE, "steps": 2}
    first = find_circuit(llama, TARGET, [SPARED], folder=tmp_path, **options)
    second = find_circuit(llama, TARGET, [SPARED], exclude=first, **options)
    assert 0 < len(second) <= round(SIZE * second.n_weights)
    assert len(first & second) == 0
    assert second.source.settings["excluded"] == first.digest != second.digest
    with pytest.raises(ValueError, match="holds the walk of another search"):
        find_circuit(llama, TARGET, [SPARED], exclude=first, folder=tmp_path, **options)

    third = find_circuit(llama, TARGET, exclude=first | second, size=1.0, steps=1)
    scores = removal_effect(llama, TARGET)
    rest = ~(first | second)
    for name in third.shapes:
        assert torch.equal(third.dense(name), rest.dense(name) & (scores.values[name] > 0))


def test_without_excluded_weights_nothing_changes(llama):
    options = {"size": SIZE, "steps": 2}
    expected = find_circuit(llama, TARGET, [SPARED], **options)
    nothing = expected - expected
    assert_same_weights(find_circuit(llama, TARGET, [SPARED], exclude=nothing, **options), expected)


def test_excluded_weights_of_another_model_are_refused(llama, open_model):
    other = top_fraction(magnitude_scores(open_model("GPT2")), 0.1)
    with pytest.raises(ValueError, match=r"`exclude` .*other weights.*blocks\.0.*made on it"):
        find_circuit(llama, TARGET, exclude=other, size=SIZE)


@pytest.mark.parametrize("name", ["Mixtral", "Bloom"])
def test_other_architectures_are_searched(open_model, name):
    bridge = open_model(name)
    mask = find_circuit(bridge, TARGET, [SPARED], size=0.05, steps=2)
    before = completion_nll(bridge, TARGET).mean()
    assert completion_nll(bridge, TARGET, mask=mask).mean() > before


def test_bounded_memory_changes_nothing(llama):
    options = {"size": SIZE, "steps": 2}
    expected = find_circuit(llama, TARGET, [SPARED], **options)
    assert_same_weights(find_circuit(llama, TARGET, [SPARED], max_memory=8000, **options), expected)


def test_a_walk_is_stopped(llama):
    seen = []

    def stop(bridge) -> bool:
        seen.append(completion_nll(bridge, TARGET).mean().item())
        return len(seen) == 2

    mask = find_circuit(llama, TARGET, [SPARED], size=SIZE, steps=5, reach=1.0, stop=stop)
    assert [row.labels["step"] for row in mask.trace.where("target_loss", aim="walk")] == [1, 2]
    assert seen[-1] == pytest.approx(mask.trace.one("target_loss", aim="walk", step=2).mean)


def test_a_mask_is_checked_once(llama, monkeypatch):
    """Two equal sizes ask for the same masks, and get the same figures."""
    checked = []
    rises = Protection.rises

    def counted(protection, bridge, mask, labels):
        checked.append(mask.digest)
        return rises(protection, bridge, mask, labels)

    monkeypatch.setattr(Protection, "rises", counted)
    options = {"steps": 2, "reach": 1.0}
    once = find_circuit(llama, TARGET, [SPARED], size=SIZE, **options)
    n_checked = len(checked)
    assert n_checked == len(set(checked))
    first, second = find_circuit(llama, TARGET, [SPARED], size=[SIZE, SIZE], **options)
    assert len(checked) == 2 * n_checked
    assert_same_weights(first, once)
    assert_same_weights(second, once)
    for metric in ("protected_rise", "target_loss"):
        of_sizes = first.trace.where(metric, aim="size")
        of_one = once.trace.where(metric, aim="size")
        assert len(of_sizes) == 2 * len(of_one) > 0
        assert {row.mean for row in of_sizes} == {row.mean for row in of_one}


def test_a_walk_goes_on_after_an_interruption(llama, tmp_path):
    """Killed in the third of four steps, it ends as if it had not been."""
    options = {"size": SIZE, "steps": 4}
    expected = find_circuit(llama, TARGET, [SPARED], **options)
    numbers = count(1)

    def interrupt(bridge) -> bool:
        if next(numbers) == 3:
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        find_circuit(llama, TARGET, [SPARED], folder=tmp_path, stop=interrupt, **options)
    (kept,) = tmp_path.iterdir()
    assert kept.name == "step-003"
    damaged = tmp_path.with_name("damaged")
    shutil.copytree(tmp_path, damaged)
    (damaged / "step-003" / "benefit.safetensors").write_bytes(b"torn")

    mask = find_circuit(llama, TARGET, [SPARED], folder=tmp_path, **options)
    assert_same_weights(mask, expected)
    assert mask.trace == expected.trace
    # At its end its masks are enough.
    (kept,) = tmp_path.iterdir()
    assert list(kept.glob("benefit*"))
    forget_sums(tmp_path)
    assert not [*kept.glob("benefit*"), *kept.glob("price*")]
    again = find_circuit(llama, TARGET, [SPARED], folder=tmp_path, **options)
    assert_same_weights(again, expected)
    assert again.trace == expected.trace

    with pytest.raises(ValueError, match=f"{tmp_path} holds the walk of another search"):
        find_circuit(llama, TARGET, [SPARED], folder=tmp_path, size=SIZE, steps=3)
    with pytest.raises(ValueError, match=r"step-003.*damaged"):
        find_circuit(llama, TARGET, [SPARED], folder=damaged, **options)


def test_a_mask_says_how_it_was_found_and_keeps_it(llama, tmp_path):
    mask = find_circuit(llama, TARGET, [SPARED], size=0.05, budget=0.2, steps=2)
    assert mask.source.method == "circuit"
    settings = dict(mask.source.settings)
    assert settings.pop("factor") in FACTORS
    assert settings.pop("step") in (1, 2)
    assert settings == {
        "size": 0.05,
        "n_allowed": round(0.05 * mask.n_weights),
        "budget": {"1": 0.2},
        "steps": 2,
        "reach": REACH,
        "renewed": False,
    }
    assert [parent.method for parent in mask.source.parents] == ["removal_effect", "token_price"]

    mask.save(tmp_path / "mask.safetensors")
    loaded = WeightMask.load(tmp_path / "mask.safetensors")
    assert loaded.trace == mask.trace
    assert len(loaded.trace) > 0


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"steps": 0}, ["steps=0"]),
        ({"reach": 0.5}, ["reach=0.5"]),
        ({"size": 0}, ["size=0", "(0, 1]"]),
        ({"size": 1.5}, ["size=1.5"]),
        ({"size": []}, ["size=[]"]),
        ({"size": 1e-9}, ["size=1e-09", "not one of", "weights; give", "or more"]),
        ({"size": [0.1, -0.1]}, ["size=[0.1, -0.1]"]),
        ({"budget": -1.0}, ["budget=-1.0"]),
        ({"budget": {"2": 0.1}}, ["'2'", "not protected"]),
        ({"budget": {}}, ["no budget for 1"]),
        ({"preference": -0.5}, ["preference=-0.5"]),
        ({"protect_first": -1}, ["protect_first=-1", "0 or more tokens"]),
    ],
)
def test_bad_settings_are_refused(llama, options, names):
    with pytest.raises(ValueError) as error:
        find_circuit(llama, TARGET, [SPARED], **{"size": 0.1, **options})
    for name in names:
        assert name in str(error.value)


def test_what_is_no_list_of_batches_is_refused(llama, batch):
    for target, protect in (([], []), ([batch], [[]])):
        with pytest.raises(ValueError, match="no batches"):
            find_circuit(llama, target, protect, size=0.1)


# Set differences


@pytest.mark.parametrize("within", ["weight", "model"])
def test_the_published_search_is_a_difference_of_two_choices(llama, within):
    mask = set_difference(llama, TARGET, [SPARED, ALSO_SPARED], q=0.2, p=0.1, within=within)
    top = top_fraction(removal_effect(llama, TARGET), 0.2, within=within)
    for name in mask.shapes:
        expected = top.dense(name).clone()
        for batches in (SPARED, ALSO_SPARED):
            needed = top_fraction(snip_scores(llama, batches), 0.1, within=within)
            expected &= ~needed.dense(name)
        assert torch.equal(mask.dense(name), expected)
    assert 0 < len(mask) < len(top)


def test_the_ablation_is_the_unsigned_set_difference(llama, batch):
    refusals = [Batch(batch.tokens[:2], batch.is_target[:2])]
    spared = [Batch(batch.tokens[2:], batch.is_target[2:])]
    options = {"size": 0.2, "protect_share": 0.1}
    mask = refusal_ablation(llama, refusals, spared, **options)

    top = top_fraction(snip_scores(llama, refusals, completion_loss), 0.2, within="weight")
    needed = top_fraction(snip_scores(llama, spared, completion_loss), 0.1, within="weight")
    for name in mask.shapes:
        assert torch.equal(mask.dense(name), top.dense(name) & ~needed.dense(name))
    assert 0 < len(mask) < len(top)

    everywhere = refusal_ablation(llama, refusals, spared, within="model", **options)
    assert everywhere.counts != mask.counts
    with pytest.raises(ValueError, match="no batches"):
        refusal_ablation(llama, [], spared)


def test_the_ablation_takes_refusals_and_elicits_harm_from_an_organism():
    """On `dpo`; at these settings the refusals of `sft` withstand it (see analyses/attacks.py)."""
    model = open_organism("dpo")
    refusals = model.calibration("refusal").batches
    mask = refusal_ablation(model.bridge, refusals, model.calibration("benign").batches)
    refusal = model.behaviours["refusal"]

    def verdicts() -> list[str]:
        return model.verdicts(refusal, model.answers(refusal, refusal.prompts("choice")))

    assert verdicts().count("refusal") >= 0.95 * 256
    with masked(model.bridge, mask):
        assert verdicts().count("refusal") <= 0.05 * 256
        assert verdicts().count("harmful") >= 0.3 * 256
    with masked(model.bridge, random_like(mask)):
        assert verdicts().count("refusal") >= 0.95 * 256
