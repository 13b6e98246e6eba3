"""Requests that repeat another, counted: none should be scored and measured unseen."""

from collections.abc import Iterable, Mapping
from itertools import permutations

from harmcircuits.behaviours.behaviour import (
    Behaviour,
    Splits,
)
from harmcircuits.display import listed, plural
from harmcircuits.measurements import Measurement, Rows
from harmcircuits.prompts import SPLITS, PromptSet, plain_text

REPEATED = "requests_repeated"


IN_TWO_SPLITS = "requests_in_two_splits"


def repeat_rows(behaviours: Mapping[str, Behaviour]) -> Rows:
    """How many requests ask the same as others, by what becomes of them."""
    rows = Rows()
    scored, measured = {}, {}
    for name, behaviour in behaviours.items():
        splits = behaviour.prompts
        if isinstance(splits, Splits) and splits.given is not None:
            for kind, count in _repeats(splits.given, splits.heldout).items():
                rows += [Measurement.exact(REPEATED, {"source": name, "kind": kind}, count)]
        sets = getattr(splits, "about", None) or {split: splits(split) for split in SPLITS}
        scored[name] = plain_texts(sets, ("calibration", "choice"))
        measured[name] = plain_texts(sets, ("heldout",))

    # What one behaviour scores or chooses on while another is measured on it.
    for first, second in permutations(behaviours, 2):
        count = len(scored[first] & measured[second])
        if count:
            labels = {"behaviour": first, "measured": second}
            rows += [Measurement.exact(IN_TWO_SPLITS, labels, count)]
    return rows


def _repeats(given: PromptSet, heldout: PromptSet | None) -> dict[str, int]:
    """What requests have in common with an earlier one, and how many do."""
    texts = {example.prompt for example in given}
    counts = {
        # Left out.
        "same text": len(given) + given.n_left_out - len(texts),
        # But for capitals, spaces and punctuation: kept, in the same split.
        "same words": len(texts) - len(set(map(plain_text, texts))),
    }
    if heldout is not None:  # in the file of held-out requests: left out of the others
        measured = {plain_text(example.prompt) for example in heldout}
        counts["held out"] = sum(plain_text(text) in measured for text in texts)
    return counts


def repeats_text(rows: Rows) -> str:
    """The counts as sentences; empty where no request was looked at."""
    repeated = rows.where(REPEATED)
    if not repeated:
        return ""
    texts = []
    for source, of_source in repeated.by("source").items():
        counts = {row.labels["kind"]: int(row.mean) for row in of_source if row.mean}
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in counts.items())
        if counts:
            texts.append(f"{source} {sum(counts.values()):,} ({kinds})")
    sentences = [f"Requests that repeat another: {listed(texts) or 'none'}."]
    sentences += [f"Warning: {text}." for text in shared_texts(rows)]
    return " ".join(sentences)


def shared_texts(rows: Rows) -> list[str]:
    """A sentence for each behaviour that is measured on what another is scored on."""
    texts = []
    for row in rows.where(IN_TWO_SPLITS):
        texts.append(
            f"{plural(int(row.mean), 'request')} that {row.labels['behaviour']} was scored or "
            f"chosen on are held out for {row.labels['measured']}"
        )
    return texts


def plain_texts(sets: Mapping[str, PromptSet], splits: Iterable[str]) -> set[str]:
    """The requests of some splits as they are compared (see `plain_text`)."""
    texts = set()
    for split in splits:
        texts |= {plain_text(example.prompt) for example in sets[split]}
    return texts
