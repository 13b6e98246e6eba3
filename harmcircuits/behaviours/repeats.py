"""Counts of repeated requests: no request should be both scored and held out."""

from collections.abc import Mapping
from itertools import product

from harmcircuits.behaviours.behaviour import Behaviour, Splits
from harmcircuits.display import listed, plural
from harmcircuits.measurements import Measurement, Rows
from harmcircuits.prompts import SPLITS, PromptSet, plain_text, plain_texts

REPEATED = "requests_repeated"
IN_TWO_SPLITS = "requests_in_two_splits"


def repeat_rows(behaviours: Mapping[str, Behaviour]) -> Rows:
    """The number of repeated requests in each source, and across the splits of all behaviours."""
    rows = Rows()
    calibration, heldout = {}, {}
    for name, behaviour in behaviours.items():
        splits = behaviour.prompts
        if isinstance(splits, Splits) and splits.source is not None:
            for kind, count in _repeats(splits.source, splits.heldout).items():
                rows += [Measurement.exact(REPEATED, {"source": name, "kind": kind}, count)]

        # A question repeats the request that it is about.
        sets = getattr(splits, "subjects", None) or {split: splits(split) for split in SPLITS}
        calibration[name] = plain_texts([sets["calibration"], sets["choice"]])
        heldout[name] = plain_texts([sets["heldout"]])

    # A behaviour with itself too: its splits may be a user's own.
    for first, second in product(behaviours, repeat=2):
        count = len(calibration[first] & heldout[second])
        if count:
            labels = {"behaviour": first, "measured": second}
            rows += [Measurement.exact(IN_TWO_SPLITS, labels, count)]
    return rows


def _repeats(source: PromptSet, heldout: PromptSet | None) -> dict[str, int]:
    """The number of repeated requests by kind."""
    texts = {example.prompt for example in source}
    counts = {
        # The repeated ones are left out.
        "same text": len(source) + source.n_left_out - len(texts),
        # They differ in capitals, spaces or punctuation, and stay together in one split.
        "same words": len(texts) - len(plain_texts([source])),
    }
    if heldout is not None:
        # They are in the file of held-out requests too, and only held out.
        heldout_texts = plain_texts([heldout])
        counts["held out"] = sum(plain_text(text) in heldout_texts for text in texts)
    return counts


def repeats_text(rows: Rows) -> str:
    """The counts as sentences; empty without counts."""
    sentences = []
    repeats = rows.where(REPEATED)
    if repeats:
        sources = [_source_text(*source) for source in repeats.by("source").items()]
        sentences.append(
            f"Requests that repeat another: {listed(filter(None, sources)) or 'none'}."
        )
    sentences += [f"Warning: {text}." for text in leak_texts(rows)]
    return " ".join(sentences)


def _source_text(source: str, counts: Rows) -> str:
    """The counts of one source; empty without repeated requests."""
    kinds = [f"{row.labels['kind']} {row.mean:,.0f}" for row in counts if row.mean]
    if not kinds:
        return ""
    total = sum(row.mean for row in counts)
    return f"{source} {total:,.0f} ({', '.join(kinds)})"


def leak_texts(rows: Rows) -> list[str]:
    """A sentence for each behaviour that is measured on requests that one is scored on."""
    texts = []
    for row in rows.where(IN_TWO_SPLITS):
        requests = plural(int(row.mean), "request")
        texts.append(
            f"{requests} that {row.labels['behaviour']} was scored or chosen on are held out for "
            f"{row.labels['measured']}"
        )
    return texts
