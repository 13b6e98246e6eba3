"""Elicitation: what each attack asks, and of which model.

Would catch: a prefill that stays when the request is asked plainly, an attacker's mask that is left
on, refusals scored on the unpruned model, refusals removed from a model that has none.
"""

from helpers import small_model
from support.elicitation import elicited, refusals_removed

import harmcircuits as hc


def test_a_refusing_model_answers_once_its_refusals_are_gone():
    model = small_model("dpo", every=16)
    unrefusing = refusals_removed(model)
    rows = elicited(model, unrefusing=unrefusing).where("harm_refusal_rate")
    rates = {row.labels["attack"]: row.mean for row in rows}
    assert rates["plain"] >= 0.9 and rates["prefill"] == 0
    assert rates["refusal ablation"] < rates["plain"]
    assert list(rates)[-1] == "prefill + refusal ablation"

    again = elicited(model, unrefusing=unrefusing, only_plain=True).where("harm_refusal_rate")
    assert [row.mean for row in again] == [rates["plain"]], "nothing is left removed"


def test_refusals_are_scored_on_what_is_left():
    model = small_model("dpo", every=32)
    circuit = hc.top_fraction(hc.magnitude_scores(model.bridge), 0.01)
    unpruned, pruned = refusals_removed(model), refusals_removed(model, mask=circuit)
    assert pruned is not None and unpruned is not None
    assert pruned.digest != unpruned.digest


def test_a_model_that_refuses_nothing_is_only_asked():
    model = small_model("helpful", every=32)
    assert refusals_removed(model) is None
    attacks = [row.labels["attack"] for row in elicited(model).where("harm_valid_rate")]
    assert attacks == ["plain", "prefill"]


def test_a_sampled_model_is_asked_about_whole_items():
    model = small_model("sft").sampled(0.5, seed=1)
    whole = small_model("sft")
    for split in ("calibration", "heldout"):
        some = model.behaviours["harmful"].prompts(split)
        every = whole.behaviours["harmful"].prompts(split)
        drawn = {example.cluster for example in some}
        assert 0 < len(some) < len(every)
        assert len(some) == sum(example.cluster in drawn for example in every)
