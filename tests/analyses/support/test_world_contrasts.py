"""Pairs of the organisms' requests.

Would catch: pairs that differ in more than the one thing, positions at which other words are said.
"""

from support.organisms.contrasts import contrasts, probed_texts

from harmcircuits.organisms import open_organism


def test_pairs_differ_in_one_thing():
    model = open_organism("sft")
    words = model.bridge.tokenizer.convert_ids_to_tokens
    pairs = contrasts(model, 5)
    harmful, recognition, parts = pairs["harmful"], pairs["recognition"], pairs["parts"]
    for contrast in pairs.values():
        assert (
            len(contrast.clean)
            == len(contrast.corrupt)
            == len(contrast.wanted)
            == len(contrast.other)
            == 5
        )
    assert all(words(row)[harmful.positions[0]] == "sure" for row in harmful.clean.tolist())
    differing = (harmful.clean != harmful.corrupt).any(0).nonzero().flatten().tolist()
    assert differing == [4, *(place + 1 for place in harmful.positions)], (
        "the verb and the operators"
    )
    assert (recognition.clean != recognition.corrupt).sum(1).tolist() == [1] * 5, "the verb"
    assert words(recognition.clean[0, -1].item()) == "<assistant>"
    for row in range(5):
        said = [parts.clean[row, place + 1].item() for place in parts.positions]
        assert said == parts.wanted[row].flatten().tolist()
        for place in harmful.positions:
            assert harmful.clean[row, place + 1] in harmful.wanted[row].flatten()
            assert harmful.corrupt[row, place + 1] in harmful.other[row].flatten()


def test_groups_that_a_probe_has_not_seen_hold_both_kinds_of_verb():
    model = open_organism("sft")
    for texts in probed_texts(model, 16).values():
        assert len(texts.is_harmful) == 32 == sum(len(batch) for batch in texts.batches)
        assert texts.is_harmful.sum() == 16
        for groups in texts.unseen.values():
            pairs = zip(groups, texts.is_harmful.tolist(), strict=True)
            assert len(set(pairs)) == 2 * len(set(groups))
