"""The search by its gates: their gain, their projection, sizes and budgets; the set difference.

Would catch: a gain of another loss, a projection that is not the nearest, a mask beyond its size or
budget, units in parts, a search that resumes otherwise.
"""

from dataclasses import replace

import pytest
import torch
from helpers import assert_bits_equal, random_batch, snapshot

from harmcircuits.batches import Batch, split_for_checks, unpadded
from harmcircuits.circuits.gates import projected
from harmcircuits.circuits.masks import WeightMask, top_fraction
from harmcircuits.circuits.scores import Source
from harmcircuits.hooks.gradients import hook_pairs
from harmcircuits.hooks.losses import completion_nll
from harmcircuits.hooks.masking import masked
from harmcircuits.hooks.objectives import completion_loss, token_error
from harmcircuits.hooks.weights import source_on, weight_sites
from harmcircuits.search import descent
from harmcircuits.search.accumulation import mean_gradients
from harmcircuits.search.attribution import removal_effect, snip_scores
from harmcircuits.search.circuit import find_circuit, set_difference
from harmcircuits.search.descent import Search, Size, Worth
from harmcircuits.search.texts import CAP, CHECKED_EVERY, ENOUGH, MOST_AVOIDED, Protection, Texts

SIZE = 0.1
TARGET = [random_batch()]
SPARED = [random_batch(6, 8, seed=1)]
ALSO_SPARED = [random_batch(4, 7, seed=2), random_batch(3, 9, seed=3)]


def search_on(bridge, objective=completion_loss) -> Search:
    """A search with texts of every role, and candidates."""
    sites = weight_sites(bridge)
    shapes = {name: tuple(site.parameter.shape) for name, site in sites.items()}
    texts = [
        Texts.of(bridge, "target", "target", TARGET, objective, weight=2.0),
        Texts.of(bridge, "preferred", "preferred", ALSO_SPARED[:1]),
        Texts.of(bridge, "avoided", "avoided", ALSO_SPARED[1:]),
        Texts.of(bridge, "spared", "protected", SPARED, budget=0.1),
    ]
    protection = Protection.of(bridge, {"spared": SPARED}, 0.1)
    source = source_on(bridge, "test")
    sizes = [Size(0.01, 100)]
    worth = Worth(bridge, sites, None)
    search = Search(bridge, texts, protection, worth, shapes, {}, source, sizes, 10)
    search._score(None)
    search._choose_candidates()
    return search


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Qwen3Moe"])
def test_one_sum_holds_what_a_weight_is_worth_and_its_price(open_model, name):
    """Under a mask too, for weights that it has made zero, of either sign."""
    bridge = open_model(name)
    search = search_on(bridge)
    sites, slopes = search.worth.sites, search.worth.slopes
    before = {name: slope.clone() for name, slope in slopes.items()}
    mask = top_fraction(removal_effect(bridge, TARGET), 0.05)
    search._score(mask)

    expected = {name: torch.zeros_like(slope) for name, slope in before.items()}
    for texts in search.texts:
        with masked(bridge, mask):
            gradients = mean_gradients(bridge, texts.batches, completion_loss, sites)
            # One token at a time has nothing to cancel: its price is its absolute gradient.
            of_tokens = _summed_over_tokens(bridge, texts.batches, sites)
        for name, site in sites.items():
            weight = site.parameter.detach()
            signs = {"target": -2.0, "preferred": 1.0, "avoided": -1.0}
            if texts.role == "protected":
                expected[name] -= descent.FACTOR * weight.abs() * of_tokens[name]
            else:
                expected[name] += signs[texts.role] * weight * gradients[name]
    for name, index in mask.removed.items():
        assert {-1.0, 1.0} <= set(sites[name].parameter.detach().flatten()[index].sign().tolist())
    for name, site in sites.items():
        added = (slopes[name] - before[name]) * site.parameter.detach()
        torch.testing.assert_close(added, expected[name], rtol=1e-4, atol=1e-7)


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


@pytest.mark.parametrize("few", [0.0, 1.0])
@pytest.mark.parametrize("objective", [completion_loss, token_error])
@pytest.mark.parametrize("name", ["Llama", "GPT2", "Qwen3Moe"])
def test_a_gain_is_minus_the_derivative_of_the_loss_by_the_gate(
    open_model, monkeypatch, name, objective, few
):
    """By a difference of the same texts' loss, written out here, along a random direction."""
    if few and objective is token_error:
        return  # how a gradient is computed does not turn on the objective
    # Whether each gradient is computed by itself, or all of a matrix.
    monkeypatch.setattr(descent, "FEW", few)
    bridge = open_model(name)
    search = search_on(bridge, objective)
    generator = torch.Generator().manual_seed(3)
    size = len(search.gates)
    gate = 0.2 + 0.6 * torch.rand(size, generator=generator)
    direction = torch.randn(size, generator=generator)

    def loss(gate) -> float:
        scale = {of: 1 - part for of, part in search.gates.by_matrix(gate).items()}
        mask = search.gates.mask
        target, preferred, avoided, spared = search.texts
        with torch.no_grad(), masked(bridge, mask, scale=scale, same_model=False):
            rise = objective(bridge, TARGET[0]) - target.before
            parts = [-2.0 * rise.clamp(max=CAP).sum() / target.n_drawn]
            now = completion_loss(bridge, ALSO_SPARED[0])
            parts.append(now.clamp(min=ENOUGH).sum() / preferred.n_drawn)
            rise = completion_loss(bridge, ALSO_SPARED[1]) - avoided.before
            parts.append(-rise.clamp(max=MOST_AVOIDED).sum() / avoided.n_drawn)
            rise = completion_loss(bridge, SPARED[0]) - spared.before
            parts.append(spared.multiplier * rise.clamp(min=0).sum() / spared.n_drawn)
            return sum(parts).item()

    for texts in search.texts:
        everything = list(range(len(texts.examples)))
        monkeypatch.setattr(texts, "draw", lambda _, everything=everything: everything)
    step = 2e-3 if "Moe" in name else 1e-2  # which experts answer changes at once
    expected = -(loss(gate + step * direction) - loss(gate - step * direction)) / (2 * step)
    gain = search._gain(search.gates, gate)
    assert gain @ direction == pytest.approx(expected, rel=0.02, abs=1e-4)


def test_the_projection_is_the_nearest_point():
    """No point within the bounds lies in the direction from it to what is projected."""
    generator = torch.Generator().manual_seed(0)
    gate = 2 * torch.randn(40, generator=generator)
    nearest = projected(gate, 8)
    assert nearest.sum() == pytest.approx(8, abs=1e-3)
    for _ in range(100):
        other = torch.rand(40, generator=generator)
        other *= min(1.0, 8 / other.sum().item())
        assert ((gate - nearest) * (other - nearest)).sum() <= 1e-3
    within = gate.clamp(0, 1) * 0.1
    assert torch.equal(projected(within, 8), within)


def test_texts_come_each_once_before_one_comes_again(llama):
    texts = Texts.of(llama, "target", "target", [*SPARED, random_batch(3, 8, seed=1)])
    generator = torch.Generator().manual_seed(0)
    drawn = [*texts.draw(generator), *texts.draw(generator), *texts.draw(generator)]
    assert len(drawn) == 18  # three times as many as the largest batch has
    for start in range(0, 18, 9):
        assert sorted(drawn[start : start + 9]) == list(range(9))


def test_what_is_learned_takes_more_than_one_shot_and_leaves_the_model(llama):
    before = snapshot(llama)
    mask = find_circuit(llama, TARGET, size=SIZE, steps=20)
    assert_bits_equal(llama, before)
    one_shot = top_fraction(removal_effect(llama, TARGET), SIZE, within="model")
    unpruned = completion_nll(llama, TARGET)

    def taken(removed) -> float:
        rise = completion_nll(llama, TARGET, mask=removed) - unpruned
        return rise.clamp(max=CAP).mean().item()

    assert taken(mask) >= 0.9 * taken(one_shot)
    assert 0 < len(mask) <= round(SIZE * mask.n_weights)


@pytest.mark.parametrize("kind", ["preferred", "avoided"])
def test_what_is_preferred_becomes_likelier_and_what_is_avoided_does_not(llama, kind):
    """Against the same search without it."""
    options = {"size": 0.05, "steps": 10}

    def loss(**prefer) -> float:
        mask = find_circuit(llama, TARGET, prefer=prefer, **options)
        return completion_nll(llama, SPARED, mask=mask).mean().item()

    alone, beside = loss(), loss(**{kind: SPARED})
    assert beside < alone if kind == "preferred" else beside > alone


def test_no_mask_exceeds_its_size_or_its_budget(llama):
    sizes, budget = [0.02, 0.2], 0.02
    masks = find_circuit(llama, TARGET, {"a": SPARED}, size=sizes, budget=budget, steps=10)
    _, checked = split_for_checks(SPARED, CHECKED_EVERY)
    unpruned = completion_nll(llama, checked)
    for mask, size in zip(masks, sizes, strict=True):
        assert len(mask) <= round(size * mask.n_weights)
        rise = (completion_nll(llama, checked, mask=mask) - unpruned).mean().item()
        assert rise <= budget + 1e-6
        kept = mask.trace.where("protected_rise", size=size, outcome="accepted")
        assert rise == pytest.approx(kept[-1].mean, abs=1e-5)
        assert mask.source.settings["size"] == size


def test_where_every_mask_is_refused_nothing_is_removed(llama, monkeypatch):
    monkeypatch.setattr(Search, "_broken_budgets", lambda *_: ["a"])
    monkeypatch.setattr("harmcircuits.search.descent.TRIES", 1)
    assert len(find_circuit(llama, TARGET, {"a": SPARED}, size=SIZE, steps=2)) == 0


def test_texts_of_one_answer_are_checked_together():
    """Wordings of one question stay on one side, unless there are few answers."""
    batch = random_batch(30, 8, seed=4)
    twice = [Batch(batch.tokens, batch.is_target), Batch(batch.tokens, batch.is_target)]
    other_words = twice[1].tokens.clone()
    other_words[:, 0] = 7  # no target
    priced, checked = split_for_checks([twice[0], Batch(other_words, batch.is_target)], 3)
    seen, unseen = ({text.answer for text in unpadded(part)} for part in (priced, checked))
    assert seen and unseen and not seen & unseen


def test_the_choice_is_limited_to_some_matrices(llama):
    sites = weight_sites(llama)
    by_name = ["blocks.0.mlp.out.weight", "blocks.1.attn.v.weight"]
    in_layer = [name for name in sites if name.startswith("blocks.1.")]
    for chosen, names in ((by_name, by_name), (lambda site: site.layer == 1, in_layer)):
        mask = find_circuit(llama, TARGET, sites=chosen, size=0.2, steps=4)
        assert set(mask.removed) <= set(names) and mask.source.settings["sites"] == names
        assert mask.shapes.keys() == sites.keys(), "it combines with other masks"


def test_a_second_circuit_is_found_beside_the_first(llama):
    options = {"size": SIZE, "steps": 4}
    first = find_circuit(llama, TARGET, **options)
    second = find_circuit(llama, TARGET, exclude=first, **options)
    assert len(second) > 0 and len(first & second) == 0
    assert second.source.settings["excluded"] == first.digest != second.digest


def test_a_mask_says_how_it_was_found(llama):
    mask = find_circuit(llama, TARGET, [SPARED], size=0.05, budget=0.2, steps=2)
    given = {"size": 0.05, "budget": {"1": 0.2}, "learning_steps": 2}
    assert given.items() <= mask.source.settings.items()
    assert [parent.method for parent in mask.source.parents] == ["removal_effect", "token_price"]
    seen = mask.trace.where("seen_rise", step=0)
    assert {row.labels["data"] for row in seen} == {"target", "1"}


def test_a_search_goes_on_after_an_interruption(llama, tmp_path, monkeypatch):
    """Killed in its third part, it ends as if it had not been; under a bound too."""
    options = {"size": [0.05, SIZE], "steps": 10, "fresh_answers": lambda: ALSO_SPARED}
    expected = find_circuit(llama, TARGET, [SPARED], **options)
    advance, stages = Search.advance, []

    def interrupted(self) -> None:
        stages.append(self.stage)
        if len(stages) == 3:
            raise KeyboardInterrupt
        advance(self)

    monkeypatch.setattr(Search, "advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        find_circuit(llama, TARGET, [SPARED], folder=tmp_path, **options)
    for _ in range(2):  # and once more from its end, where its masks are enough
        masks = find_circuit(llama, TARGET, [SPARED], folder=tmp_path, max_memory=8000, **options)
        for mask, same in zip(masks, expected, strict=True):
            assert (mask.digest, mask.trace) == (same.digest, same.trace)
    assert stages == [0, 1, 2, 2, 3, 4]

    with pytest.raises(ValueError, match="another search"):
        find_circuit(llama, TARGET, [SPARED], size=SIZE, steps=2, folder=tmp_path)


def test_what_the_model_still_says_is_scored_as_well(llama):
    """Once each, asked for under the mask so far, and its loss is raised with the target's."""
    unpruned, fresh = snapshot(llama), ALSO_SPARED[:1]
    said = iter([TARGET, fresh, [*fresh, *TARGET]])
    n_changed = []

    def still_said() -> list[Batch]:
        changed = [(now != unpruned[name]).sum() for name, now in snapshot(llama).items()]
        n_changed.append(int(sum(changed)))
        return next(said)

    options = {"size": SIZE, "steps": 10}
    mask = find_circuit(llama, TARGET, [SPARED], **options, fresh_answers=still_said)
    added = mask.trace.where("examples_added")
    assert [(row.labels["step"], row.mean) for row in added] == [(4, len(fresh[0]))]
    assert len(n_changed) == 3
    assert min(n_changed) > 0

    without = find_circuit(llama, TARGET, [SPARED], **options)
    losses = [completion_nll(llama, fresh, mask=of).mean() for of in (without, mask)]
    assert losses[1] > losses[0]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"steps": 0}, "steps=0"),
        ({"size": 10}, "size=.10."),
        ({"size": 1e-9}, "at least one of"),
        ({"budget": {"2": 0.1}}, "each of 1"),
        ({"prefer": {"prefered": SPARED}}, "prefered"),
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
