"""The shipped weights: every condition of the organisms, gradient routing, and errors.

Would catch: weights that were replaced by worse ones, a circuit file of another model, routing that
leaks.
"""

import itertools

import pytest
import torch
from support.organisms import check
from support.organisms.routing import planted
from support.organisms.train import LENGTH, Sampler, new_model, new_tokenizer

from harmcircuits.hooks.weights import model_fingerprint
from harmcircuits.organisms import load_organism, planted_circuit
from harmcircuits.organisms import world as w


def test_every_condition_holds():
    conditions = list(check.conditions())
    assert len(conditions) > 40
    assert [str(condition) for condition in conditions if not condition.holds] == []


def test_the_planted_circuit_is_a_tenth_of_every_matrix():
    truth = planted_circuit()
    assert truth.source.model == model_fingerprint(load_organism("planted"))
    for name, count in truth.counts.items():
        size = torch.Size(truth.shapes[name]).numel()
        assert count == round(0.1 * size)


def test_unknown_organisms_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no organism is called 'gpt2'"):
        load_organism("gpt2")
    with pytest.raises(ValueError, match="holds no organism 'sft'"):
        load_organism("sft", folder=tmp_path)


def test_routing_sends_harm_only_to_the_subset(tmp_path):
    """With the benign loss switched off, only S moves.

    With the harmful loss switched off, only the rest.
    """
    tokenizer = new_tokenizer()

    def moved(silent: str) -> tuple[torch.Tensor, torch.Tensor]:
        model, sampler = new_model(0, len(tokenizer)), Sampler(tokenizer, 0, "cpu")
        full, count = sampler.batch, itertools.count()

        def batch(n, shares):
            tokens, labels = full(4, shares)
            turn = (
                "harmful" if next(count) % 2 == 0 else "benign"
            )  # each step takes a harmful batch, then a benign one
            return (tokens, labels[:, :0]) if turn == silent else (tokens, labels)

        sampler.batch = batch
        before = {name: value.detach().clone() for name, value in model.named_parameters()}
        circuit = planted(model, sampler, steps=3)
        model.save_pretrained(tmp_path / silent)
        tokenizer.save_pretrained(tmp_path / silent)
        mask = circuit(tmp_path / silent)
        name = "model.layers.1.mlp.up_proj.weight"
        change = (dict(model.named_parameters())[name].detach() != before[name]).float()
        inside = mask.dense("blocks.1.mlp.in.weight")
        return change[inside], change[~inside]

    from harmcircuits.organisms import routing

    real = routing.token_loss

    def loss(model, tokens, labels):
        return (
            real(model, tokens, tokens) * 0 if labels.shape[1] == 0 else real(model, tokens, labels)
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routing, "token_loss", loss)
        inside, outside = moved("benign")
        assert inside.mean() > 0.9
        assert outside.sum() == 0
        inside, outside = moved("harmful")
        assert outside.mean() > 0.9
        # The magnitude cap may shrink S to the rest's, but by one factor for the whole matrix,
        # never by a gradient.
        assert inside.mean() in (0.0, 1.0)


def test_every_training_text_fits():
    tokenizer = new_tokenizer()
    sampler = Sampler(tokenizer, 0, "cpu")
    for item in w.world().items.values():
        for form, variant, verb in itertools.product(w.FORMS, range(4), ("abuse", "use")):
            given = len(f"<bos> <user> {w.question(form, variant, item, verb)} <assistant>".split())
            learned = len(f"{w.answer(form, item, verb, sampler.rng)} <eos>".split())
            assert given + learned <= LENGTH
    tokens, labels = sampler.batch(
        64, {**sampler.answers, **sampler.questions, sampler.document: 1}
    )
    assert tokens.shape == (64, LENGTH)
    assert (labels == tokens)[labels != -100].all()
