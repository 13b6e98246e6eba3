"""The search by its gates: their gain, their projection, sizes and budgets; the set difference.

Would catch: a gain of another loss, a projection that is not the nearest, a mask beyond its size or
budget, a search that resumes otherwise.
"""

from dataclasses import replace

import pytest
import torch
from helpers import assert_bits_equal, random_batch, snapshot

from harmcircuits.batches import Batch, batched, split_for_checks, unpadded
from harmcircuits.circuits.gates import Gates, projected
from harmcircuits.circuits.masks import WeightMask, top_fraction
from harmcircuits.circuits.scores import Source
from harmcircuits.hooks.gradients import hook_pairs
from harmcircuits.hooks.losses import completion_nll
from harmcircuits.hooks.masking import masked
from harmcircuits.hooks.objectives import completion_loss, token_error
from harmcircuits.hooks.weights import Provenance, weight_sites
from harmcircuits.search import step
from harmcircuits.search.accumulation import GradientSums, mean_gradients
from harmcircuits.search.attribution import removal_effect, snip_scores
from harmcircuits.search.benefits import PRICE_WEIGHT, Benefits
from harmcircuits.search.circuit import find_circuit, set_difference
from harmcircuits.search.descent import Search
from harmcircuits.search.folder import Identity, _is_same
from harmcircuits.search.schedule import Schedule, Size
from harmcircuits.search.texts import (
    CHECKED_EVERY,
    CONTRAST_CAP,
    FREE_RISE,
    PREFERRED_FLOOR,
    TARGET_CAP,
    Protection,
    TextGroup,
)

SIZE = 0.1
TARGET = [random_batch()]
RETAIN_SET = [random_batch(6, 8, seed=1)]
SECOND_RETAIN_SET = [random_batch(4, 7, seed=2), random_batch(3, 9, seed=3)]


def search_on(bridge, objective=completion_loss) -> Search:
    """A search with texts of every role, and candidates."""
    sites = weight_sites(bridge)
    shapes = {name: tuple(site.parameter.shape) for name, site in sites.items()}
    groups = [
        TextGroup("target", "target", objective, weight=2.0),
        TextGroup("preferred", "preferred"),
        TextGroup("avoided", "avoided"),
        TextGroup("retained", "protected", budget=0.1),
    ]
    data = (TARGET, SECOND_RETAIN_SET[:1], SECOND_RETAIN_SET[1:], RETAIN_SET)
    for group, batches in zip(groups, data, strict=True):
        group.extend(bridge, batches)
    protection = Protection.of(bridge, {"retained": RETAIN_SET}, 0.1)
    benefits = Benefits(GradientSums(sites), {})
    gates = Gates.over(WeightMask({}, shapes, Provenance.of(bridge).source("test")), sites)
    schedule = Schedule(10, [Size(0.01, 100)])
    search = Search(bridge, groups, protection, benefits, schedule, gates)
    search._rescore(1)
    return search


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Qwen3Moe"])
def test_one_sum_holds_what_a_weight_is_worth_and_its_price(open_model, name):
    """Under a mask too, for weights that it has made zero, of either sign."""
    bridge = open_model(name)
    search = search_on(bridge)
    sites, slopes = search.benefits.slopes.sites, search.benefits.slopes.totals
    first = {name: slope.clone() for name, slope in slopes.items()}
    mask = top_fraction(removal_effect(bridge, TARGET), 0.05)
    for group in search.groups:
        search.benefits.add(bridge, group, mask)

    expected = {name: torch.zeros_like(slope) for name, slope in first.items()}
    for group in search.groups:
        with masked(bridge, mask):
            gradients = mean_gradients(bridge, group.batches, completion_loss, sites)
            # One token at a time has nothing to cancel: its price is its absolute gradient.
            by_token = _summed_over_tokens(bridge, group.batches, sites)
        for name, site in sites.items():
            weight = site.parameter.detach()
            signs = {"target": -2.0, "preferred": 1.0, "avoided": -1.0}
            if group.role == "protected":
                expected[name] -= PRICE_WEIGHT * weight.abs() * by_token[name]
            else:
                expected[name] += signs[group.role] * weight * gradients[name]
    for name, index in mask.removed.items():
        assert {-1.0, 1.0} <= set(sites[name].parameter.detach().flatten()[index].sign().tolist())
    for name, site in sites.items():
        growth = (slopes[name] - first[name]) * site.parameter.detach()
        torch.testing.assert_close(growth, expected[name], rtol=1e-4, atol=1e-7)


def _summed_over_tokens(bridge, batches, sites):
    """The mean over examples of sum_t |g_t| |x_t|^T; of experts, the mean absolute gradient."""
    totals = {name: torch.zeros(site.parameter.shape) for name, site in sites.items()}
    n_examples = sum(map(len, batches))

    def add(site, x, g):
        first, second = (g, x) if site.input_axis == 1 else (x, g)
        totals[site.name] += torch.einsum("bpi,bpj->ij", first.abs(), second.abs()) / n_examples

    hooked = {name: site for name, site in sites.items() if site.is_hooked}
    with torch.enable_grad(), hook_pairs(bridge, hooked, add):
        for batch in batches:
            completion_loss(bridge, batch).sum().backward()
    unhooked = {name: site for name, site in sites.items() if not site.is_hooked}
    if unhooked:
        totals |= mean_gradients(bridge, batches, completion_loss, unhooked, "per example")
    return totals


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("objective", [completion_loss, token_error])
@pytest.mark.parametrize("name", ["Llama", "GPT2", "Qwen3Moe"])
def test_a_gain_is_minus_the_derivative_of_the_loss_by_the_gate(
    open_model, monkeypatch, name, objective, share
):
    """By a difference of the same texts' loss, written out here, along a random direction."""
    if share and objective is token_error:
        return  # how a gradient is computed does not turn on the objective
    # Whether each gradient is computed by itself, or all of a matrix.
    monkeypatch.setattr(step, "ENTRYWISE_UNTIL", share)
    bridge = open_model(name)
    search = search_on(bridge, objective)
    generator = torch.Generator().manual_seed(3)
    size = len(search.gates)
    z = 0.2 + 0.6 * torch.rand(size, generator=generator)
    direction = torch.randn(size, generator=generator)

    def loss(z) -> float:
        scale = {of: 1 - values for of, values in search.gates.by_matrix(z).items()}
        mask = search.gates.candidates
        target, preferred, avoided, retained = search.groups
        with torch.no_grad(), masked(bridge, mask, scale=scale, same_model=False):
            rise = objective(bridge, TARGET[0]) - target.base_loss
            parts = [-2.0 * rise.clamp(max=TARGET_CAP).sum() / target.n_drawn]
            answer_loss = completion_loss(bridge, SECOND_RETAIN_SET[0])
            parts.append(answer_loss.clamp(min=PREFERRED_FLOOR).sum() / preferred.n_drawn)
            rise = completion_loss(bridge, SECOND_RETAIN_SET[1]) - avoided.base_loss
            parts.append(-rise.clamp(max=CONTRAST_CAP).sum() / avoided.n_drawn)
            rise = completion_loss(bridge, RETAIN_SET[0]) - retained.base_loss
            parts.append(
                retained.multiplier * (rise - FREE_RISE).clamp(min=0).sum() / retained.n_drawn
            )
            return sum(parts).item()

    for group in search.groups:
        everything = list(range(len(group.examples)))
        monkeypatch.setattr(group, "draw", lambda _, everything=everything: everything)
    width = 2e-3 if "Moe" in name else 1e-2  # which experts answer changes at once
    expected = -(loss(z + width * direction) - loss(z - width * direction)) / (2 * width)
    sites = search.benefits.slopes.sites
    gain, _ = step.step_gain(bridge, search.groups, search.gates, z, sites, search.generator)
    assert gain @ direction == pytest.approx(expected, rel=0.02, abs=1e-4)


def test_the_projection_is_the_nearest_point():
    """No point within the bounds lies in the direction from it to what is projected."""
    generator = torch.Generator().manual_seed(0)
    gate = 2 * torch.randn(40, generator=generator)
    nearest = projected(gate, 8)
    assert nearest.sum() == pytest.approx(8, abs=1e-3)
    for _ in range(100):
        point = torch.rand(40, generator=generator)
        point *= min(1.0, 8 / point.sum().item())
        assert ((gate - nearest) * (point - nearest)).sum() <= 1e-3
    within = gate.clamp(0, 1) * 0.1
    assert torch.equal(projected(within, 8), within)


def test_texts_come_each_once_before_one_comes_again(llama):
    group = TextGroup("target", "target")
    group.extend(llama, [*RETAIN_SET, random_batch(3, 8, seed=1)])
    generator = torch.Generator().manual_seed(0)
    numbers = [*group.draw(generator), *group.draw(generator)]
    assert len(numbers) == 18  # twice as many as there are
    for start in range(0, 18, 9):
        assert sorted(numbers[start : start + 9]) == list(range(9))


def test_a_learned_mask_takes_more_than_one_shot_and_leaves_the_model(llama):
    weights = snapshot(llama)
    mask = find_circuit(llama, TARGET, size=SIZE, steps=20)
    assert_bits_equal(llama, weights)
    one_shot = top_fraction(removal_effect(llama, TARGET), SIZE, within="model")
    unpruned = completion_nll(llama, TARGET)

    def capped_rise(removed) -> float:
        rise = completion_nll(llama, TARGET, mask=removed) - unpruned
        return rise.clamp(max=TARGET_CAP).mean().item()

    assert capped_rise(mask) >= 0.9 * capped_rise(one_shot)
    assert 0 < len(mask) <= round(SIZE * mask.n_weights)


@pytest.mark.parametrize("role", ["preferred", "avoided"])
def test_preferred_answers_become_likelier_and_the_contrast_does_not(llama, role):
    """Against the same search without it."""
    options = {"size": 0.05, "steps": 10}

    def loss(**prefer) -> float:
        mask = find_circuit(llama, TARGET, prefer=prefer, **options)
        return completion_nll(llama, RETAIN_SET, mask=mask).mean().item()

    alone, beside = loss(), loss(**{role: RETAIN_SET})
    assert beside < alone if role == "preferred" else beside > alone


def test_no_mask_exceeds_its_size_or_its_budget(llama):
    sizes, budget = [0.02, 0.2], 0.02
    masks = find_circuit(llama, TARGET, {"a": RETAIN_SET}, size=sizes, budget=budget, steps=10)
    _, checked = split_for_checks(RETAIN_SET, CHECKED_EVERY)
    unpruned = completion_nll(llama, checked)
    for mask, size in zip(masks, sizes, strict=True):
        assert len(mask) <= round(size * mask.n_weights)
        rise = (completion_nll(llama, checked, mask=mask) - unpruned).mean().item()
        assert rise <= budget + 1e-6
        accepted = mask.trace.where("protected_rise", size=size, outcome="accepted")
        assert rise == pytest.approx(accepted[-1].mean, abs=1e-5)
        assert mask.source.settings["size"] == size


def test_where_every_mask_is_refused_nothing_is_removed(llama, monkeypatch):
    monkeypatch.setattr(Search, "_keeps_budgets", lambda *_: False)
    monkeypatch.setattr("harmcircuits.search.descent.TRIES", 1)
    assert len(find_circuit(llama, TARGET, {"a": RETAIN_SET}, size=SIZE, steps=2)) == 0


def test_texts_of_one_answer_are_checked_together():
    """Wordings of one question stay on one side, unless there are few answers."""
    batch = random_batch(30, 8, seed=4)
    twice = [Batch(batch.tokens, batch.is_target), Batch(batch.tokens, batch.is_target)]
    other_words = twice[1].tokens.clone()
    other_words[:, 0] = 7  # no target
    priced, checked = split_for_checks([twice[0], Batch(other_words, batch.is_target)], 3)
    first, second = ({text.answer for text in unpadded(part)} for part in (priced, checked))
    assert first and second and not first & second


def test_the_choice_is_limited_to_some_matrices(llama):
    sites = weight_sites(llama)
    by_name = ["blocks.0.mlp.out.weight", "blocks.1.attn.v.weight"]
    in_layer = [name for name in sites if name.startswith("blocks.1.")]
    for choice, names in ((by_name, by_name), (lambda site: site.layer == 1, in_layer)):
        mask = find_circuit(llama, TARGET, sites=choice, size=0.2, steps=4)
        assert set(mask.removed) <= set(names) and mask.source.settings["sites"] == names
        assert mask.shapes.keys() == sites.keys(), "it combines with other masks"


def test_a_second_circuit_is_found_beside_the_first(llama):
    options = {"size": SIZE, "steps": 4}
    first = find_circuit(llama, TARGET, **options)
    second = find_circuit(llama, TARGET, exclude=first, **options)
    assert len(second) > 0 and len(first & second) == 0
    assert second.source.settings["excluded"] == first.digest != second.digest


def test_a_mask_tells_how_the_search_made_it(llama):
    mask = find_circuit(llama, TARGET, [RETAIN_SET], size=0.05, budget=0.2, steps=2)
    settings = {"size": 0.05, "budget": {"1": 0.2}, "learning_steps": 2}
    assert settings.items() <= mask.source.settings.items()
    assert [parent.method for parent in mask.source.parents] == ["removal_effect", "token_price"]
    rises = mask.trace.where("seen_rise", step=0)
    assert {row.labels["data"] for row in rises} == {"target", "1"}


def test_a_search_goes_on_after_an_interruption(llama, tmp_path, monkeypatch):
    """Killed in its third part, it ends as if it had not been; under a bound too."""
    options = {"size": [0.05, SIZE], "steps": 10, "fresh_answers": lambda: SECOND_RETAIN_SET}
    expected = find_circuit(llama, TARGET, [RETAIN_SET], **options)
    advance, stages = Search.advance, []

    def interrupted(self) -> None:
        stages.append(self.stage)
        if len(stages) == 3:
            raise KeyboardInterrupt
        advance(self)

    monkeypatch.setattr(Search, "advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        find_circuit(llama, TARGET, [RETAIN_SET], folder=tmp_path, **options)
    for _ in range(2):  # and once more from its end, where its masks are enough
        masks = find_circuit(
            llama, TARGET, [RETAIN_SET], folder=tmp_path, max_memory=8000, **options
        )
        for mask, whole in zip(masks, expected, strict=True):
            assert (mask.digest, mask.trace) == (whole.digest, whole.trace)
    assert stages == [0, 1, 2, 2, 3, 4]

    with pytest.raises(ValueError, match="another search"):
        find_circuit(llama, TARGET, [RETAIN_SET], size=SIZE, steps=2, folder=tmp_path)


def test_fresh_answers_are_scored_as_well(llama):
    """Once each, asked for under the mask so far, and its loss is raised with the target's."""
    unpruned, fresh = snapshot(llama), SECOND_RETAIN_SET[:1]
    answers = iter([TARGET, fresh, [*fresh, *TARGET]])
    n_changed = []

    def fresh_answers() -> list[Batch]:
        changed = [(weight != unpruned[name]).sum() for name, weight in snapshot(llama).items()]
        n_changed.append(int(sum(changed)))
        return next(answers)

    options = {"size": SIZE, "steps": 10}
    mask = find_circuit(llama, TARGET, [RETAIN_SET], **options, fresh_answers=fresh_answers)
    additions = mask.trace.where("examples_added")
    assert [(row.labels["step"], row.mean) for row in additions] == [(4, len(fresh[0]))]
    assert len(n_changed) == 3
    assert min(n_changed) > 0

    without = find_circuit(llama, TARGET, [RETAIN_SET], **options)
    losses = [completion_nll(llama, fresh, mask=of).mean() for of in (without, mask)]
    assert losses[1] > losses[0]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"steps": 0}, "steps=0"),
        ({"size": 10}, "size=.10."),
        ({"size": 1e-9}, "at least one of"),
        ({"budget": {"2": 0.1}}, "each of 1"),
        ({"prefer": {"prefered": RETAIN_SET}}, "prefered"),
        ({"sites": ["blocks.7.mlp.in.weight"]}, "blocks.7"),
        ({"protect": [[]]}, "no batches"),
        ({"exclude": WeightMask({}, {"a": (1, 1)}, Source("other", "test"))}, "exclude"),
    ],
)
def test_bad_settings_are_refused(llama, options, word):
    with pytest.raises(ValueError, match=word):
        find_circuit(llama, TARGET, **{"protect": [RETAIN_SET], "size": 0.1, **options})


@pytest.mark.parametrize(("signed", "within"), [(True, "weight"), (False, "model")])
def test_the_published_search_is_a_difference_of_two_choices(llama, signed, within):
    retain_sets = [RETAIN_SET, SECOND_RETAIN_SET]
    mask = set_difference(llama, TARGET, retain_sets, q=0.2, p=0.1, signed=signed, within=within)
    score = removal_effect if signed else snip_scores
    top = top_fraction(score(llama, TARGET), 0.2, within=within)
    for name in mask.shapes:
        expected = top.dense(name).clone()
        for batches in retain_sets:
            needed = top_fraction(snip_scores(llama, batches), 0.1, within=within)
            expected &= ~needed.dense(name)
        assert torch.equal(mask.dense(name), expected)
    assert 0 < len(mask) < len(top)


def other_answers(batch: Batch, token: int) -> Batch:
    """The batch with other answers in every third row."""
    tokens = batch.tokens.clone()
    for row in range(2, len(batch), 3):
        tokens[row, batch.is_target[row]] = token
    return Batch(tokens, batch.is_target)


def test_a_folder_belongs_to_one_search(llama, tmp_path):
    target, benign = [random_batch(seed=1)], random_batch(seed=2, n=6)
    loss = completion_loss

    def search(name, objective, protect):
        options = {"size": 0.02, "steps": 2, "folder": tmp_path / name}
        return find_circuit(llama, target, [protect], objective=objective, **options)

    base = loss(llama, target[0])

    def rise(sign: float):
        """Objectives of one name, which are all zero on the unpruned model."""

        def change(*pair):
            return sign * (loss(*pair) - base.detach())

        return change

    search("rise", rise(1.0), [benign])
    with pytest.raises(ValueError, match="another objective"):
        search("rise", rise(-1.0), [benign])

    search("a", lambda *pair: loss(*pair), [benign])
    with pytest.raises(ValueError, match="another objective"):
        search("a", lambda *pair: -loss(*pair), [benign])
    with pytest.raises(ValueError, match="another search"):
        search("a", lambda *pair: loss(*pair), [other_answers(benign, 7)])


def test_a_search_leaves_the_files_of_others(llama, tmp_path):
    paths = [tmp_path / "unfinished" / "x", tmp_path / "step-900" / "checkpoint"]
    for path in paths:
        path.parent.mkdir()
        path.write_text("mine")
    options = {"size": 0.01, "steps": 1, "folder": tmp_path}
    first = find_circuit(llama, [random_batch()], **options)
    assert find_circuit(llama, [random_batch()], **options) == first
    assert all(path.read_text() == "mine" for path in paths)


def test_a_search_refuses_a_mask_of_another_model(llama):
    mask = top_fraction(removal_effect(llama, [random_batch()]), 0.01)
    foreign = replace(mask, source=Source("another", "x"))
    with pytest.raises(ValueError, match="another"):
        find_circuit(llama, [random_batch()], size=0.01, steps=1, exclude=foreign)


def mask_of(bridge, target, retain_set) -> WeightMask:
    return find_circuit(bridge, target, [retain_set], size=SIZE, steps=10)


def test_a_rise_of_rounding_noise_is_not_penalised(llama):
    """With all gates closed its sign is chance, and the term would be all or nothing."""
    group = TextGroup("retained", "protected")
    group.extend(llama, RETAIN_SET)
    noise = torch.tensor([1e-7, -1e-7, 5e-6, 0.0, 1e-4], requires_grad=True)
    term = group.loss_term(noise, noise)
    term.backward()
    assert term == 0
    assert not noise.grad.any()


@pytest.mark.parametrize("size", [1, 2, 5])
def test_the_size_of_batches_changes_no_mask(llama, size):
    expected = mask_of(llama, TARGET, RETAIN_SET)
    target = batched(unpadded(TARGET), size)
    retain_set = batched(unpadded(RETAIN_SET), size)
    mask = mask_of(llama, target, retain_set)
    assert len(mask) == len(mask & expected) == len(expected)


def test_no_batch_of_a_step_is_larger_than_the_largest_given(llama):
    """One text is fifteen times as long as the others, in a batch of its own."""
    long, short = random_batch(1, 120, seed=1), random_batch(12, 8, seed=2)
    groups = [TextGroup("target", "target"), TextGroup("retained", "protected")]
    groups[0].extend(llama, [long, short])
    groups[1].extend(llama, [short])
    sizes = []
    for draws in step._batches(groups, step._draws(groups, torch.Generator().manual_seed(0))):
        sizes.append(len(draws) * max(len(draw.text.tokens) for draw in draws))
    assert max(sizes) <= long.tokens.numel()


def test_rounding_does_not_make_another_search():
    """In bfloat16 another number of threads moved a loss of 15.6 by 0.63."""
    first = Identity("settings", "answers", [15.6, 0.5])
    assert _is_same(first, first._replace(losses=[15.6 - 0.63, 0.55]))
    assert not _is_same(first, first._replace(losses=[15.6, 0.7]))
    assert not _is_same(first, first._replace(losses=[12.0, 0.5]))


def test_a_folder_belongs_to_its_fresh_answers(llama, tmp_path):
    options = {"size": SIZE, "steps": 5, "folder": tmp_path}
    mask = find_circuit(llama, TARGET, **options, fresh_answers=lambda: RETAIN_SET)
    assert find_circuit(llama, TARGET, **options, fresh_answers=lambda: RETAIN_SET) == mask
    with pytest.raises(ValueError, match="other fresh answers"):
        find_circuit(llama, TARGET, **options, fresh_answers=lambda: SECOND_RETAIN_SET)
