"""Walks that differ from the search in one thing each.

Would catch: a variant that differs from the search in more than that, one that does not differ at
all, a multiplier that moves the wrong way or out of its range.
"""

from functools import partial

import pytest
import torch
from helpers import small_model
from support.bench import variants

import harmcircuits as hc

SIZES = [0.001, 0.004]


@pytest.fixture(scope="module")
def small():
    """A model that is asked few requests, and three of its abilities."""
    model = small_model("sft")
    return model, model.calibrations(["harmful", "benign", "recognition"])


@pytest.fixture(scope="module")
def masks(small) -> list[hc.WeightMask]:
    return variants.walked(*small, SIZES, steps=3)


def test_the_walk_is_that_of_the_search(small, masks):
    """To 1 %, as the bench: 20 times the smallest of its sizes."""
    model, data = small
    reach = variants.LARGEST / min(SIZES)
    library = model.find_circuit("harmful", size=SIZES, calibrations=data, steps=3, reach=reach)
    assert [mask.digest for mask in masks] == [mask.digest for mask in library]


@pytest.mark.parametrize(
    "options",
    [
        {"kind": variants.FactorForEach},
        {"kind": variants.PricedAgain},
        {"objective": variants.log_loss},
        {"renew": False},
        {"laps": 2},
        {"kind": variants.OtherFactors, "tried": (1.0, 8.0)},
    ],
)
def test_a_variant_chooses_other_weights_of_the_same_number(small, masks, options):
    others = variants.walked(*small, SIZES, **{"steps": 3, **options})
    assert [mask.digest for mask in others] != [mask.digest for mask in masks]
    for mask, other in zip(masks, others, strict=True):
        assert 0 < other.n_removed <= mask.source.settings["n_allowed"]


def test_with_equal_multipliers_the_price_is_the_sum(small):
    """Before anything has moved them, a step is that of the usual walk."""
    one_step = partial(variants.walked, *small, SIZES, steps=1)
    each, usual = one_step(kind=variants.FactorForEach), one_step()
    for mask, other in zip(each, usual, strict=True):
        assert (mask - other).n_removed <= 0.001 * mask.n_removed  # sums in another order


def test_what_a_refused_mask_broke_is_priced_again_under_it(small):
    """Only that, at the weights that the mask left, and as often as there are steps."""
    seen = []

    class Watched(variants.PricedAgain):
        def _price_again(self, refused, step):
            before = {name: price.clone() for name, price in self.price.items()}
            kept = self.protection, self.refused
            super()._price_again(refused, step)
            assert (self.protection, self.refused) == kept

            expected = {name: torch.zeros_like(price) for name, price in before.items()}
            broken = [row for row in refused.rises if row.mean > 0.002]
            for row in broken:
                batches = self.protection.priced[str(row.labels["protected"])]
                with hc.masked(self.bridge, refused.mask):
                    price = hc.token_price(self.bridge, batches).values
                for name, values in price.items():
                    expected[name] += step * values
            for name, values in expected.items():
                grown = self.price[name] - before[name]
                grown[refused.mask.dense(name)] = 0  # their price is that of what they were
                torch.testing.assert_close(grown, values, atol=1e-6, rtol=1e-3)
            seen.append((step, len(broken)))

    variants.walked(*small, SIZES, kind=Watched, steps=2, budget=0.002)
    assert {step for step, _ in seen} == {1, 2}
    assert all(n_broken >= 1 for _, n_broken in seen)


def test_a_multiplier_follows_what_is_spent():
    assert variants.moved(1.0, 0.5) == 1.0
    assert variants.moved(1.0, 1.0) == pytest.approx(2**0.5)
    assert variants.moved(1.0, 30.0) == pytest.approx(2**0.5)
    assert variants.moved(1.0, -30.0) == pytest.approx(2**-0.5)
    assert variants.moved(4.0, 1.0) == 4.0
    assert variants.moved(0.25, 0.0) == 0.25


def test_factors_are_powers_of_two_in_their_range():
    tried = variants.factors(-2, 6, per_doubling=2).keywords["tried"]
    assert tried == variants.FACTORS
    assert variants.factors(-1, 1, per_doubling=1).keywords["tried"] == (0.5, 1.0, 2.0)


def test_losses_of_the_target_grow_less_where_it_is_lost(small):
    model, data = small
    batch = data["harmful"].batches[0]
    loss = hc.completion_loss(model.bridge, batch)
    torch.testing.assert_close(variants.log_loss(model.bridge, batch), torch.log(1 + loss))
    assert torch.equal(variants.capped_loss(model.bridge, batch), loss)
    with hc.masked(model.bridge, hc.top_fraction(hc.magnitude_scores(model.bridge), 0.2)):
        lost = hc.completion_loss(model.bridge, batch)
        capped = variants.capped_loss(model.bridge, batch)
    assert lost.max() > variants.CAP
    assert torch.equal(capped, lost.clamp(max=variants.CAP))
