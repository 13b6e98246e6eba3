"""Answers of one token, of the end of the text alone, and of none, in every score and loss.

Would catch: a mean over no tokens, an empty answer that counts.
"""

import pytest
import torch

import harmcircuits as hc
from harmcircuits.behaviours.generation import generate
from harmcircuits.behaviours.outcomes import NotShownError
from harmcircuits.prompts import Answer


@pytest.fixture
def bridge(open_model):
    return open_model("Llama", vocab_size=320)  # as many as the tests' tokenizer has


def test_every_score_takes_answers_of_one_token(bridge):
    """One example by itself: the mean of one, whose interval is that value."""
    batches, protected = (
        hc.tokenize([("use it", word)], bridge.tokenizer) for word in ("sure", "it")
    )
    for scores in (hc.snip_scores, hc.token_price, hc.wanda_scores):
        assert any(value.any() for value in scores(bridge, batches).values.values())
    mask = hc.find_circuit(bridge, batches, protect=[protected], size=0.01, steps=4, budget=9)
    assert mask.n_removed > 0
    assert hc.kl_under(bridge, mask, batches).min() > 0
    rows = hc.activation_patching(bridge, mask, batches[0], parts=["mlp"], positions=[])
    assert all(row.low == row.mean == row.high for row in rows.where("reference_nll"))
    with hc.fine_tuning(bridge, batches, lr=1e-3) as run:
        run.until(1)
    assert run.losses[0] == pytest.approx(hc.completion_nll(bridge, batches).mean().item())


def test_the_end_of_the_text_is_scored_and_is_no_part_of_an_answer(bridge):
    end = bridge.tokenizer.eos_token
    (batch,) = hc.tokenize([("use it", end)], bridge.tokenizer)
    assert batch.tokens[0, -1] == bridge.tokenizer.eos_token_id
    expected = -bridge(batch.tokens)[0, -2].log_softmax(-1)[batch.tokens[0, -1]]
    torch.testing.assert_close(hc.completion_loss(bridge, batch)[0], expected)

    # The first token of the answer becomes the end of the text: the answer is empty.
    prompts = hc.PromptSet.of(["use it"])
    (answer,) = generate(bridge, prompts, max_new_tokens=3)
    bridge.original_model.generation_config.eos_token_id = answer.tokens[0]
    assert generate(bridge, prompts, max_new_tokens=3) == [Answer("", ())]
    with pytest.raises(ValueError, match=r"example 0 .* and 0 to predict"):
        hc.tokenize(prompts.with_completions([Answer("", ())]), bridge.tokenizer)


@pytest.mark.parametrize("prefill", ["sure", ""])
def test_an_answer_of_the_prefill_alone_is_not_scored(bridge, monkeypatch, prefill):
    def model_that_says(text: str) -> hc.Model:
        """A model that gives this answer to all requests; its judge says yes to all."""
        answer = Answer(text, tuple(bridge.tokenizer.encode(text, add_special_tokens=False)))

        def generated(_bridge, prompts, **_options):
            return [answer] * len(prompts)

        monkeypatch.setattr("harmcircuits.behaviours.model.generate", generated)
        prompts = hc.PromptSet((hc.Example("use it"), hc.Example("clean it")))
        behaviour = hc.Behaviour("asked", lambda _split: prompts, wanted="yes", prefill=prefill)
        return hc.Model("m", bridge, {"asked": behaviour}, lambda *_: "yes")

    word = f"{prefill} yes".strip()
    data = model_that_says(word).calibration("asked")
    assert data.n_verified == 2
    assert [int(batch.is_target.sum()) for batch in data.batches] == [2], "one token each"
    silent = model_that_says(prefill)
    with pytest.raises(NotShownError, match="2 calibration requests"):
        silent.calibration("asked")
    assert silent.measure().metrics == ["asked_rate"], "a rate, and no loss of nothing"
