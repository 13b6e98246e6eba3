"""The walk against a plain one on dense tensors; what the search adds to it; the set difference.

Would catch: scores under the wrong mask, a mask beyond its size or budget, a walk that resumes otherwise.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from helpers import assert_bits_equal, random_batch, snapshot
from torch import Tensor

from harmcircuits.circuits.masks import WeightMask, top_fraction
from harmcircuits.circuits.scores import Source
from harmcircuits.circuits.units import Units
from harmcircuits.hooks.attribution import removal_effect, snip_scores, token_price
from harmcircuits.hooks.losses import completion_nll
from harmcircuits.hooks.objectives import completion_loss
from harmcircuits.hooks.protection import CHECKED_EVERY, Protection, split_by_request
from harmcircuits.hooks.search import even_shares, find_circuit, set_difference
from harmcircuits.hooks.walk import (
    FACTORS,
    FIRST_UNIT_FACTOR,
    MOST_TO_LEARN_FROM,
    PREFERENCE,
    UNIT_FACTORS,
)
from harmcircuits.hooks.walk_files import forget_sums
from harmcircuits.hooks.weights import model_fingerprint, named_weights, weight_sites
from harmcircuits.prompts import Batch

SIZE = 0.1
TARGET = [random_batch()]
SPARED = [random_batch(6, 8, seed=1)]
ALSO_SPARED = [random_batch(4, 7, seed=2), random_batch(3, 9, seed=3)]
NOTHING: dict[str, Sequence[Batch]] = {}
BESIDE = {"preferred": -PREFERENCE, "avoided": PREFERENCE}  # what a nat of their loss is worth

Weights = dict[str, Tensor]
Best = Callable[[Weights, int], Weights]


def best_weights(scores: Weights, n: int) -> Weights:
    """The n largest positive scores, as booleans."""
    flat = torch.cat([value.flatten() for value in scores.values()])
    rank = flat.argsort(descending=True, stable=True).argsort()
    parts = ((rank < n) & (flat > 0)).split([value.numel() for value in scores.values()])
    shaped = zip(scores.items(), parts, strict=True)
    return {name: part.view(value.shape) for (name, value), part in shaped}


def plain_walk(
    bridge,
    target: Sequence[Batch],
    protect: Sequence[Sequence[Batch]],
    *,
    size: float,
    budget: float,
    steps: Sequence[float],
    best_of: Best = best_weights,
    factors: Sequence[float] = FACTORS,
    first: float = 1.0,
    prefer: Mapping[str, Sequence[Batch]] = NOTHING,
    further: Sequence[Batch] = (),
) -> WeightMask:
    """The search on dense tensors: clones of the weights, a sort, no shared step with the library.

    But for the scores, which have tests of their own. Further batches are the target's from the
    second step on.
    """
    weights = named_weights(bridge)
    original = {name: weight.detach().clone() for name, weight in weights.items()}
    n_weights = sum(weight.numel() for weight in original.values())
    shares = [split_by_request(batches, CHECKED_EVERY) for batches in protect]
    unpruned = [completion_nll(bridge, checked).mean() for _, checked in shares]

    def under(removed, function, value=0.0):
        """With these weights at a value; the others, and all afterwards, as they were."""
        with torch.no_grad():
            for name, weight in weights.items():
                weight.masked_fill_(removed[name], value)
        result = function()
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(original[name])
        return result

    def gradient(score, batches, removed):
        """A score divided by the live weights: nudged off zero, they keep their gradient."""

        def by_weight():
            values = score(bridge, batches).values
            return {name: value / weights[name].detach() for name, value in values.items()}

        return under(removed, by_weight, value=1e-30)

    def rises(removed):
        def losses():
            return [completion_nll(bridge, checked).mean() for _, checked in shares]

        changes = zip(under(removed, losses), unpruned, strict=True)
        return max(((now - before).item() for now, before in changes), default=0.0)

    def worth():
        loss = completion_nll(bridge, target).mean().item()
        for name, batches in prefer.items():
            loss += BESIDE[name] * completion_nll(bridge, batches).mean().item()
        return loss

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

    benefit = {name: torch.zeros_like(weight) for name, weight in original.items()}
    price = {name: torch.zeros_like(weight) for name, weight in original.items()}
    nothing = {name: zeros.bool() for name, zeros in benefit.items()}
    accepted, refused, rung = nothing, None, factors.index(first)
    best, best_rung = (-math.inf, nothing), rung
    for number, share in enumerate(steps):
        for priced, _ in shares:
            parts = gradient(token_price, priced, accepted if refused is None else refused)
            for name, part in parts.items():
                price[name] += part.abs() * original[name].abs()
        scored = [([*target, *further] if number else target, 1.0)]
        scored += [(batches, BESIDE[name]) for name, batches in prefer.items()]
        for batches, factor in scored:
            for name, part in gradient(removal_effect, batches, accepted).items():
                benefit[name] += factor * part * original[name]
        mask, rung, refused = search(round(share * n_weights), rung)
        accepted = accepted if mask is None else mask
        if refused is not None and rises(refused) > MOST_TO_LEARN_FROM:
            refused = None
        mask, best_rung, _ = search(round(size * n_weights), best_rung)
        if mask is not None:
            best = max(best, (under(mask, worth), mask), key=lambda pair: pair[0])
    removed = {name: part.flatten().nonzero().flatten() for name, part in best[1].items()}
    shapes = {name: tuple(weight.shape) for name, weight in original.items()}
    return WeightMask(removed, shapes, Source(model_fingerprint(bridge), "plain"))


@pytest.mark.parametrize(
    ("name", "budget", "steps", "shares"),
    [
        # Evenly to four times the size, as by default, and over shares that are given.
        ("Llama", 0.01, 2, even_shares(2, 4 * SIZE)),
        ("GPT2", 0.1, [0.03, SIZE], [0.03, SIZE]),
    ],
)
def test_the_walk_is_the_plain_one(open_model, name, budget, steps, shares):
    bridge = open_model(name)
    before = snapshot(bridge)
    options = {"size": SIZE, "budget": budget}
    mask = find_circuit(bridge, TARGET, [SPARED, ALSO_SPARED], steps=steps, **options)
    assert_bits_equal(bridge, before)
    expected = plain_walk(bridge, TARGET, [SPARED, ALSO_SPARED], steps=shares, **options)
    assert len(expected) > 0
    # Sums in another order may swap weights whose scores are equal up to rounding.
    assert len(mask - expected) + len(expected - mask) <= 0.01 * len(expected)


def test_the_walk_over_neurons_is_the_plain_one(llama):
    options = {"size": SIZE, "budget": 0.01, "steps": even_shares(2, SIZE)}
    protect, sites = [SPARED, ALSO_SPARED], weight_sites(llama)
    units = Units.of(sites, "neuron", sites)

    def best_neurons(scores: Weights, n: int) -> Weights:
        chosen = {name: torch.zeros_like(value).bool() for name, value in scores.items()}
        for name, index in units.largest(scores, n, {}).items():
            chosen[name].view(-1)[index] = True
        return chosen

    mask = find_circuit(llama, TARGET, protect, unit="neuron", **options)
    ladder = {"factors": UNIT_FACTORS, "first": FIRST_UNIT_FACTOR}
    expected = plain_walk(llama, TARGET, protect, best_of=best_neurons, **ladder, **options)
    assert len(expected) > 0
    assert mask.digest == expected.digest


def test_what_the_target_becomes_is_scored_with_it(llama):
    """From the second step on, asked of the model under the mask so far."""
    further, on_the_model = [random_batch(2, 6, seed=9)], []

    def target(mask) -> list[Batch]:
        if mask is None:
            return TARGET
        for name, weight in named_weights(llama).items():
            on_the_model.append(bool((weight[mask.dense(name)] == 0).all()))
        return further

    options = {"size": SIZE, "budget": 1.0, "steps": [SIZE / 2, SIZE]}
    mask = find_circuit(llama, target, **options)
    assert mask.digest == plain_walk(llama, TARGET, [], further=further, **options).digest
    assert on_the_model and all(on_the_model)
    assert len(mask - find_circuit(llama, TARGET, **options)) > 0, "further batches must matter"


@pytest.mark.parametrize("name", BESIDE)
def test_what_is_preferred_earns_with_the_target_and_what_is_avoided_costs(llama, name):
    """Their effects count in every step under the mask so far, and their losses at the end."""
    options = {"size": 0.05, "budget": 1.0, "steps": [0.025, 0.05], "prefer": {name: SPARED}}
    mask = find_circuit(llama, TARGET, **options)
    assert mask.digest == plain_walk(llama, TARGET, [], **options).digest
    assert len(mask - find_circuit(llama, TARGET, **{**options, "prefer": {}})) > 0


def test_unprotected_a_step_takes_the_weights_with_the_largest_effect(llama):
    """On the loss, or on whatever objective is given."""

    def backwards(bridge, batch):
        return -completion_loss(bridge, batch)

    effect = removal_effect(llama, TARGET)
    for objective, scores in ((completion_loss, effect), (backwards, -effect)):
        mask = find_circuit(llama, TARGET, size=SIZE, steps=1, objective=objective)
        assert mask.digest == top_fraction(scores, SIZE, within="model").digest
        predicted = mask.trace.one("predicted_change").mean
        assert predicted == pytest.approx(scores.sum_over(mask), rel=1e-5)


def test_no_mask_exceeds_its_size_or_its_budget(llama):
    sizes = [0.02, 0.2]
    masks = find_circuit(llama, TARGET, {"a": SPARED}, size=sizes, budget=0.02, steps=2)
    _, checked = split_by_request(SPARED, CHECKED_EVERY)
    unpruned = completion_nll(llama, checked)
    for mask, size in zip(masks, sizes, strict=True):
        assert 0 < len(mask) <= round(size * mask.n_weights)
        rise = (completion_nll(llama, checked, mask=mask) - unpruned).mean().item()
        assert rise <= 0.02 + 1e-6
        step = mask.source.settings["step"]
        tried = mask.trace.where("protected_rise", step=step, aim="size", share=size)
        cheapest = min(tried.where(outcome="accepted"), key=lambda row: row.labels["factor"])
        assert rise == pytest.approx(cheapest.mean, abs=1e-5)
        assert mask.source.settings["factor"] == cheapest.labels["factor"]


def test_where_no_factor_passes_nothing_is_removed(llama, monkeypatch):
    monkeypatch.setattr(Protection, "allows", lambda *_: False)
    mask = find_circuit(llama, TARGET, [SPARED], size=SIZE, steps=2)
    assert len(mask) == 0
    assert {row.labels["outcome"] for row in mask.trace.where("protected_rise")} == {"refused"}


def test_of_each_size_the_mask_is_kept_that_takes_most(llama):
    """By how much of the target is left, before its loss; each beside the trace."""
    n_left = iter([5, 3, 1, 4, 4, 4])

    def fewer_and_fewer(mask) -> list[Batch]:
        return TARGET if mask is None else [random_batch(next(n_left), 6, seed=9)]

    mask = find_circuit(llama, fewer_and_fewer, [SPARED], size=0.05, steps=3)
    fewest = min(mask.trace.where("target_left"), key=lambda row: row.mean)
    assert fewest.labels["step"] == mask.source.settings["step"]


def test_the_choice_is_limited_to_some_matrices(llama):
    by_name = ["blocks.0.mlp.out.weight", "blocks.1.attn.v.weight"]
    in_layer = [name for name in weight_sites(llama) if name.startswith("blocks.1.")]
    for sites, names in ((by_name, by_name), (lambda site: site.layer == 1, in_layer)):
        mask = find_circuit(llama, TARGET, sites=sites, size=0.2, steps=1)
        assert list(mask.removed) == names == mask.source.settings["sites"]
        assert mask.shapes.keys() == weight_sites(llama).keys(), "it combines with other masks"


def test_a_second_circuit_is_found_beside_the_first(llama):
    options = {"size": SIZE, "steps": 2}
    first = find_circuit(llama, TARGET, **options)
    second = find_circuit(llama, TARGET, exclude=first, **options)
    assert 0 < len(second) <= round(SIZE * second.n_weights)
    assert len(first & second) == 0
    assert second.source.settings["excluded"] == first.digest != second.digest

    # Of the rest, all whose removal helps what is to go.
    third = find_circuit(llama, TARGET, exclude=first | second, size=1.0, steps=1)
    rest = ~(first | second)
    for name, value in removal_effect(llama, TARGET).values.items():
        assert torch.equal(third.dense(name), rest.dense(name) & (value > 0))


def test_a_mask_says_how_it_was_found(llama):
    mask = find_circuit(llama, TARGET, [SPARED], size=0.05, budget=0.2, steps=2)
    given = {"size": 0.05, "budget": {"1": 0.2}, "steps": 2, "reach": 4.0, "renewed": False}
    assert given.items() <= mask.source.settings.items()
    assert [parent.method for parent in mask.source.parents] == ["removal_effect", "token_price"]


def test_a_walk_goes_on_after_an_interruption(llama, tmp_path):
    """Killed in the last of three steps, it ends as if it had not been; under a bound too."""
    options = {"size": SIZE, "steps": 3}
    calls = []

    def renewed(mask) -> list[Batch]:
        calls.append(mask)
        if len(calls) == 6:  # at first, then once in the first step and twice in each other
            raise KeyboardInterrupt
        return TARGET

    with pytest.raises(KeyboardInterrupt):
        find_circuit(llama, renewed, [SPARED], folder=tmp_path, **options)
    expected = find_circuit(llama, renewed, [SPARED], **options)
    (kept,) = tmp_path.glob("step-*")
    assert kept.name == "step-002"

    for _ in range(2):  # and once more from its end, where its masks are enough
        mask = find_circuit(llama, renewed, [SPARED], folder=tmp_path, max_memory=8000, **options)
        assert (mask.digest, mask.trace) == (expected.digest, expected.trace)
        (kept,) = tmp_path.iterdir()
        forget_sums(tmp_path)
        assert sorted(path.name for path in kept.iterdir()) == ["masks", "walk.json"]

    with pytest.raises(ValueError, match="walk of another search"):
        find_circuit(llama, TARGET, [SPARED], size=SIZE, steps=2, folder=tmp_path)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"steps": 0}, "steps=0"),
        ({"size": 10}, "size=.10."),
        ({"size": 1e-9}, "at least one of"),
        ({"budget": {"2": 0.1}}, "each of 1"),
        ({"sites": ["blocks.7.mlp.in.weight"]}, "blocks.7"),
        ({"protect": [[]]}, "no batches"),
        ({"exclude": WeightMask({}, {"a": (1, 1)}, Source("other", "test"))}, "exclude"),
    ],
)
def test_bad_settings_are_refused(llama, options, word):
    with pytest.raises(ValueError, match=word):
        find_circuit(llama, TARGET, **{"protect": [SPARED], "size": 0.1, **options})


@pytest.mark.parametrize(("signed", "within"), [(True, "weight"), (False, "model")])
def test_the_published_search_is_a_difference_of_two_choices(llama, signed, within):
    spared = [SPARED, ALSO_SPARED]
    mask = set_difference(llama, TARGET, spared, q=0.2, p=0.1, signed=signed, within=within)
    score = removal_effect if signed else snip_scores
    top = top_fraction(score(llama, TARGET), 0.2, within=within)
    for name in mask.shapes:
        expected = top.dense(name).clone()
        for batches in spared:
            needed = top_fraction(snip_scores(llama, batches), 0.1, within=within)
            expected &= ~needed.dense(name)
        assert torch.equal(mask.dense(name), expected)
    assert 0 < len(mask) < len(top)
