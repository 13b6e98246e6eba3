"""Probes of the residual stream of an organism.

Would catch: a probe that is scored on what it was fitted on, that reads the wrong token, or that is
fitted under a mask when it should be applied as it is.
"""

from support.organisms.contrasts import probed_texts
from support.probes import probe_rows

import harmcircuits as hc
from harmcircuits.organisms import open_organism


def test_probes_are_scored_on_what_was_left_out_and_transfer_without_a_mask_is_the_same_probe():
    model = open_organism("sft")
    texts = probed_texts(model, 32)["question"]
    unseen = {"items": texts.unseen["items"]}
    masks = {"half": hc.top_fraction(hc.random_scores(model.bridge), 0.5)}
    rows = probe_rows(
        model.bridge, texts.batches, texts.is_harmful, unseen, masks, {"asked": "question"}
    )

    accuracy = rows.where("probe_accuracy", mask="none")
    assert accuracy.one(depth="0 pre").mean == 0.5, "the token before the answer is always the same"
    end = accuracy.one(depth="3 post")
    assert end.mean == 1
    assert 0 < end.n < 64
    transfer = rows.where("probe_transfer", mask="none")
    assert [row.mean for row in accuracy] == [row.mean for row in transfer]
    broken = rows.one("probe_transfer", mask="half", depth="3 post")
    assert broken.mean < rows.one("probe_accuracy", mask="half", depth="3 post").mean
