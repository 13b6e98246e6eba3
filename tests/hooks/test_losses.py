"""Figures against hand-computed values, closed forms, brute force and transformers' own loss.

Would catch: an interval that takes answers about one item for independent, a bootstrap over rows where one over groups is
meant, ties miscounted in the AUROC, KL in the wrong direction or over padding, a likelihood over prompt tokens, log-odds
read at a padded position, a predicted change over the wrong weights.
"""

import math

import numpy as np
import pytest
import torch
from helpers import random_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from harmcircuits.circuits.masks import WeightMask, top_fraction
from harmcircuits.circuits.scores import Source, WeightScores
from harmcircuits.hooks.attribution import random_scores
from harmcircuits.hooks.losses import answer_log_odds, completion_nll, kl_under, perplexity
from harmcircuits.hooks.weights import named_weights
from harmcircuits.measurements import Measurement, auroc
from harmcircuits.organisms import load_organism
from harmcircuits.organisms.world import ALLOWED, requests
from harmcircuits.prompts import PromptSet, prompt_ids

LABELS = {"model": "x"}
BATCHES = [random_batch(), random_batch(2, 7, seed=1)]


@pytest.fixture(scope="module")
def sft():
    return load_organism("sft")


# Rates


def test_rate_by_hand():
    found = Measurement.rate("harm", LABELS, [True] * 8 + [False] * 2, range(10))
    # z = 1.959964: centre (0.8 + z^2/20) / (1 + z^2/10) = 0.716740; half-width 1.416010 * sqrt(0.016 + z^2/400) = 0.226578.
    assert (found.metric, found.labels, found.mean, found.n) == ("harm", LABELS, 0.8, 10)
    assert (found.low, found.high) == pytest.approx(
        (0.490162, 0.943318), abs=2e-6
    )  # the figures above have six digits


@settings(max_examples=100, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=80))
def test_rate_of_independent_examples_is_the_wilson_interval(hits):
    found = Measurement.rate("harm", LABELS, hits, range(len(hits)))
    expected = binomtest(sum(hits), len(hits)).proportion_ci(method="wilson")
    # The package's z has seven digits.
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-6)


@pytest.mark.parametrize("n", [2, 7, 100, 256])
def test_a_rate_stays_between_zero_and_one(n):
    """Rounding included: a figure that starts below zero is drawn outside its axes."""
    for hit in (False, True):
        found = Measurement.rate("harm", LABELS, [hit] * n, range(n))
        assert 0 <= found.low <= found.mean <= found.high <= 1


def test_groups_widen_the_interval():
    hits = [True] * 24 + [False] * 16
    alone = Measurement.rate("harm", LABELS, hits, range(40))
    grouped = Measurement.rate("harm", LABELS, hits, [number // 4 for number in range(40)])
    assert grouped.low < alone.low < alone.mean == grouped.mean < alone.high < grouped.high
    assert (alone.n, grouped.n) == (40, 40)
    once = Measurement.rate("harm", LABELS, hits[::4], range(10))
    assert (grouped.low, grouped.high) == (once.low, once.high), (
        "four copies of an answer are worth one"
    )


# Averages


def test_average_by_hand():
    """Two groups have four resamples, with means 1 (aa), 2 (ab, ba) and 5 (bb); each tail of 2.5 % lies in aa or bb."""
    found = Measurement.average(
        "nll", LABELS, torch.tensor([1.0, 1.0, 5.0, 1.0]), ["a", "a", "b", "a"]
    )
    assert (found.mean, found.low, found.high, found.n) == (2.0, 1.0, 5.0, 4)
    one = Measurement.average("nll", LABELS, torch.tensor([1.0, 2.0]), ["a", "a"])
    assert (one.low, one.mean, one.high) == (1.5, 1.5, 1.5), "one group has nothing to resample"


def test_average_weighs_examples_not_groups():
    """Of 100 groups, 50 hold nine zeros and 50 a single one; k of the latter in a resample give k / (k + 9 (100 - k))."""
    values, groups = (
        torch.tensor([0.0] * 450 + [1.0] * 50),
        [number // 9 for number in range(450)] + list(range(50, 100)),
    )
    found = Measurement.average("nll", LABELS, values, groups)
    assert found.mean == 0.1
    # k is binomial(100, 1/2), whose 2.5 % quantiles are 40 and 60; a k off by one shifts the figures by at most 4 %.
    assert (found.low, found.high) == pytest.approx((40 / 580, 60 / 420), rel=0.05)


def test_average_depends_on_seed_only_in_its_interval():
    values = torch.randn(30, generator=torch.Generator().manual_seed(0))
    first, again, other = (
        Measurement.average("nll", LABELS, values, range(30), seed=seed) for seed in (0, 0, 1)
    )
    assert first == again
    assert (
        first.mean == other.mean == pytest.approx(values.mean().item(), abs=1e-6)
    )  # float32 mean of 30 numbers
    assert (first.low, first.high) != (other.low, other.high)


def test_average_of_independent_values_has_the_normal_interval():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)).double()
    found = Measurement.average("nll", LABELS, values, range(400))
    half = 1.959964 * values.std().item() / 20
    # A quantile of 2,000 resamples at 2.5 % is off by a standard error of 0.06 sd, that is 3 % of the half-width.
    assert found.high - found.mean == pytest.approx(half, rel=0.12)
    assert found.mean - found.low == pytest.approx(half, rel=0.12)


def test_average_covers_the_truth_when_groups_share_their_value():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(40), 5)
    covered, covered_alone = 0, 0
    for trial in range(600):
        values = torch.from_numpy(rng.normal(size=40)[groups] + 0.2 * rng.normal(size=200))
        found, alone = (
            Measurement.average("nll", LABELS, values, g, seed=trial)
            for g in (groups.tolist(), range(200))
        )
        covered += found.low < 0 < found.high
        covered_alone += alone.low < 0 < alone.high
    # 95 % nominal, 1 to 2 % less for a percentile bootstrap of 40 groups; 600 trials have a standard error of 1 %.
    assert 0.90 < covered / 600 < 0.98
    assert covered_alone / 600 < 0.75, (
        "the comparison must be able to fail: rows are not independent here"
    )


def test_exact_figures_have_no_interval():
    found = Measurement.exact("weights_removed", LABELS, 7)
    assert (found.low, found.mean, found.high, found.n) == (7, 7, 7, 1)


# Ranking


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(-2, 2), min_size=1, max_size=12),
    st.lists(st.integers(-2, 2), min_size=1, max_size=12),
)
def test_auroc_equals_brute_force(positives, negatives):
    values = torch.tensor([*positives, *negatives]).float()
    is_positive = torch.tensor([True] * len(positives) + [False] * len(negatives))
    wins = sum((p > n) + (p == n) / 2 for p in positives for n in negatives)
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(len(values)))
    # Sums of halves are exact; only the last division rounds.
    assert auroc(values[order], is_positive[order]) == pytest.approx(
        wins / len(positives) / len(negatives), abs=1e-12
    )


def test_auroc_needs_both_kinds():
    for kind in (True, False):
        with pytest.raises(ValueError, match="at least one of each"):
            auroc(torch.arange(3.0), torch.tensor([kind] * 3))
    with pytest.raises(ValueError, match="0 positives among 0"):
        auroc(torch.empty(0), torch.empty(0, dtype=torch.bool))


def test_auroc_over_resamples_groups():
    """Ten equal groups: whatever is drawn, the AUROC is the same. Ten unequal ones: the interval has a width."""
    is_positive = torch.tensor([False, True] * 20)
    groups = [number // 4 for number in range(40)]
    equal = Measurement.auroc(
        "auroc", LABELS, torch.tensor([1.0, 2.0, 3.0, 2.0] * 10), is_positive, groups
    )
    assert (equal.low, equal.mean, equal.high, equal.n) == (0.5, 0.5, 0.5, 40)
    values = torch.randn(40, generator=torch.Generator().manual_seed(0)) + is_positive
    mixed = Measurement.auroc("auroc", LABELS, values, is_positive, groups)
    assert mixed.mean == auroc(values, is_positive)
    assert 0 < mixed.low < mixed.mean < mixed.high <= 1
    assert mixed == Measurement.auroc("auroc", LABELS, values, is_positive, groups)


def test_auroc_over_covers_the_truth_when_groups_share_a_shift():
    """Positives are N(1, 4 + 1) with the N(1, 4) shared by their group, negatives N(0, 1)."""
    truth = 0.5 * (1 + math.erf(1 / math.sqrt(6) / math.sqrt(2)))  # P(N(1, 5 + 1) > 0)
    rng = np.random.default_rng(0)
    groups, is_positive = np.repeat(np.arange(40), 8), torch.tensor([False, True] * 160)
    covered, covered_alone = 0, 0
    for _ in range(60):
        shift = rng.normal(1, 2, size=40)[groups] * is_positive.numpy()
        values = torch.from_numpy(rng.normal(size=320) + shift)
        pairs = [number // 2 for number in range(320)]
        found, alone = (
            Measurement.auroc("auroc", LABELS, values, is_positive, g)
            for g in (groups.tolist(), pairs)
        )
        covered += found.low < truth < found.high
        covered_alone += alone.low < truth < alone.high
    # 95 % nominal, about 2 % less for 200 resamples of 40 groups; 60 trials have a standard error of 3 %.
    assert covered / 60 > 0.84
    assert covered_alone / 60 < 0.8, (
        "the comparison must be able to fail: pairs are not independent here"
    )


# Likelihoods


def test_completion_nll_is_the_loss_of_transformers(llama):
    """Row by row, unpadded, with every label but the targets' ignored."""
    expected = []
    for batch in BATCHES:
        for tokens, is_target, is_token in zip(
            batch.tokens, batch.is_target, batch.is_token, strict=True
        ):
            tokens, is_target = tokens[is_token][None], is_target[is_token][None]
            with torch.no_grad():
                loss = llama.original_model(
                    input_ids=tokens, labels=tokens.where(is_target, -100)
                ).loss
            expected.append(loss.item())
    found = completion_nll(llama, BATCHES)
    assert not found.requires_grad
    torch.testing.assert_close(
        found, torch.tensor(expected), rtol=1e-5, atol=1e-5
    )  # float32 sums in another order


# Divergence


def test_kl_of_an_empty_mask_is_zero(llama):
    empty = top_fraction(random_scores(llama), 0.0)
    assert empty.n_removed == 0
    assert kl_under(llama, empty, BATCHES).tolist() == [0.0] * 5


def test_kl_by_hand(llama, open_model):
    """In float64, against a second copy of the model whose weights are zeroed for good, row by row without padding."""
    mask = top_fraction(random_scores(llama, seed=0), 0.1)
    pruned = open_model("Llama")
    with torch.no_grad():
        for name, weight in named_weights(pruned).items():
            weight[mask.dense(name)] = 0
    expected, reverse = [], []
    for batch in BATCHES:
        for tokens, is_token in zip(batch.tokens, batch.is_token, strict=True):
            with torch.no_grad():
                p, q = (
                    model(tokens[is_token][None])[0].double().softmax(-1)
                    for model in (llama, pruned)
                )
            expected.append((p * (p / q).log()).sum(-1).mean())
            reverse.append((q * (q / p).log()).sum(-1).mean())
    expected, reverse = torch.stack(expected), torch.stack(reverse)
    found = kl_under(llama, mask, BATCHES).double()
    # float32 log-probabilities carry 1e-6 each; the divergences are about 0.1.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (expected > 0.01).all()
    assert not torch.allclose(expected, reverse, rtol=1e-2), "the direction must show"


def test_kl_leaves_the_model_as_it_was(llama):
    before = llama(BATCHES[0].tokens)
    kl_under(llama, top_fraction(random_scores(llama, seed=0), 0.5), BATCHES)
    assert torch.equal(llama(BATCHES[0].tokens), before)


# Log-odds


def test_log_odds_by_definition(sft):
    """Each request alone, unpadded, in float64; over more requests than one internal batch of 64 holds."""
    prompts = requests("recognition", "heldout")[:70]
    assert len({len(example.prompt.split()) for example in prompts[62:68]}) > 1, (
        "equal lengths would need no padding"
    )
    found = answer_log_odds(sft, prompts, ALLOWED["benign"], ALLOWED["harmful"])
    assert found.shape == (70,)
    vocabulary = sft.tokenizer.get_vocab()
    for index in (0, 1, 2, 5, 62, 63, 64, 65, 69):
        tokens = torch.tensor([prompt_ids(prompts.examples[index].prompt, sft.tokenizer, "chat")])
        with torch.no_grad():
            p = sft(tokens)[0, -1].double().softmax(-1)
        yes, no = (
            sum(p[vocabulary[word]].item() for word in ALLOWED[kind])
            for kind in ("benign", "harmful")
        )
        # Log-odds of order 10 from float32 logits: 1e-6 relative each, over four layers.
        assert found[index].item() == pytest.approx(math.log(yes / no), abs=1e-4)


def test_log_odds_do_not_depend_on_the_batch(sft):
    prompts = requests("recognition", "heldout")[:12]
    yes, no = ALLOWED["benign"], ALLOWED["harmful"]
    whole = answer_log_odds(sft, prompts, yes, no)
    alone = torch.cat([answer_log_odds(sft, prompts[i : i + 1], yes, no) for i in range(12)])
    torch.testing.assert_close(whole, alone, rtol=1e-5, atol=1e-4)  # float32 sums in another order
    torch.testing.assert_close(answer_log_odds(sft, prompts, no, yes), -whole)
    raw = answer_log_odds(sft, prompts, yes, no, template="raw")
    assert not torch.allclose(raw, whole, atol=0.1)


def test_a_token_for_yes_and_no_is_refused(sft):
    prompts = requests("recognition", "heldout")[:1]
    with pytest.raises(ValueError, match="share a first token"):
        answer_log_odds(sft, prompts, ["yes", "fine"], ["no", "yes"])
    with pytest.raises(ValueError, match="share a first token"):  # both unknown
        answer_log_odds(sft, prompts, ["certainly"], ["impossible"])


# Prediction


def test_predicted_change_by_hand():
    source = Source("model", "test")
    scores = WeightScores(
        {"a": torch.tensor([[1.0, 2.0], [-4.0, 8.0]]), "b": torch.tensor([[0.5, 100.0]])}, source
    )
    removed = {"a": torch.tensor([0, 2, 3]), "b": torch.tensor([0])}
    assert scores.sum_over(WeightMask(removed, scores.shapes, source)) == 1 - 4 + 8 + 0.5
    assert scores.sum_over(WeightMask({}, scores.shapes, source)) == 0


# Errors

NOTHING = torch.empty(0)
EMPTY = {
    "rate": lambda bridge: Measurement.rate("harm", LABELS, [], []),
    "average": lambda bridge: Measurement.average("harm", LABELS, NOTHING, []),
    "auroc_over": lambda bridge: Measurement.auroc("harm", LABELS, NOTHING, NOTHING.bool(), []),
    "completion_nll": lambda bridge: completion_nll(bridge, []),
    "kl_under": lambda bridge: kl_under(bridge, top_fraction(random_scores(bridge), 0.1), []),
    "answer_log_odds": lambda bridge: answer_log_odds(bridge, PromptSet(()), ["yes"], ["no"]),
}


@pytest.mark.parametrize("name", EMPTY)
def test_nothing_to_measure_is_refused(llama, name):
    with pytest.raises(ValueError, match="expected at least one"):
        EMPTY[name](llama)


VALUES, IS_POSITIVE = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([True, False, True])
GROUPED = {
    "rate": lambda groups: Measurement.rate("harm", LABELS, IS_POSITIVE.tolist(), groups),
    "average": lambda groups: Measurement.average("harm", LABELS, VALUES, groups),
    "auroc_over": lambda groups: Measurement.auroc("harm", LABELS, VALUES, IS_POSITIVE, groups),
}


@pytest.mark.parametrize("n_groups", [2, 4])
@pytest.mark.parametrize("name", GROUPED)
def test_every_value_needs_its_group(name, n_groups):
    with pytest.raises(ValueError):
        GROUPED[name](["one"] * n_groups)


def test_perplexity_is_that_of_all_tokens(llama):
    found = perplexity(llama, [random_batch(3, 9)], LABELS)
    batch = random_batch(3, 9)
    with torch.no_grad():
        odds = llama(batch.tokens)[:, :-1].log_softmax(-1)
    taken = odds.gather(2, batch.tokens[:, 1:, None])[..., 0]
    nll = [
        -row[target].mean().item()
        for row, target in zip(taken, batch.is_target[:, 1:], strict=True)
    ]
    assert found.mean == pytest.approx(math.exp(sum(nll) / 3), rel=1e-5)
    assert (
        math.exp(min(nll)) * (1 - 1e-6)
        <= found.low
        <= found.mean
        <= found.high
        <= math.exp(max(nll)) * (1 + 1e-6)
    )
    assert (found.metric, found.n) == ("perplexity", 3)
    with pytest.raises(ValueError, match="nothing to measure"):
        perplexity(llama, [], LABELS)
