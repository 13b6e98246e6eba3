"""Requests that ask the same as others: counted, so that none is scored and measured unseen."""

from collections.abc import Iterable, Mapping
from itertools import permutations

from harmcircuits.behaviours.behaviour import Behaviour
from harmcircuits.display import listed, plural
from harmcircuits.measurements import Measurement, Rows
from harmcircuits.prompts import PromptSet, plain_text

REPEATED = "requests_repeated"
IN_TWO_SPLITS = "requests_in_two_splits"

# What a request may have in common with an earlier one, and what becomes of it.
SAME_TEXT = "same text"  # left out
SAME_WORDS = "same words"  # but for capitals, spaces and punctuation: kept, in the same split
HELD_OUT = "held out"  # in the file of held-out requests: left out of the others


def repeat_rows(source: str, requests: PromptSet, heldout: PromptSet | None = None) -> Rows:
    """How many requests of a source ask the same as another, by what becomes of them."""
    texts = {example.prompt for example in requests}
    words = set(map(plain_text, texts))
    counts = {
        SAME_TEXT: len(requests) + requests.n_left_out - len(texts),
        SAME_WORDS: len(texts) - len(words),
    }
    if heldout is not None:
        measured = {plain_text(example.prompt) for example in heldout}
        counts[HELD_OUT] = len([text for text in texts if plain_text(text) in measured])
    rows = []
    for kind, count in counts.items():
        rows.append(Measurement.exact(REPEATED, {"source": source, "kind": kind}, count))
    return Rows(rows)


def shared_rows(behaviours: Mapping[str, Behaviour]) -> Rows:
    """How many requests one behaviour scores or chooses on while another is measured on them."""
    scored, measured = {}, {}
    for name, behaviour in behaviours.items():
        sets = {split: behaviour.prompts(split) for split in ("calibration", "choice", "heldout")}
        scored[name] = plain_texts(sets, ("calibration", "choice"))
        measured[name] = plain_texts(sets, ("heldout",))
    rows = []
    for first, second in permutations(behaviours, 2):
        count = len(scored[first] & measured[second])
        if count:
            labels = {"behaviour": first, "measured": second}
            rows.append(Measurement.exact(IN_TWO_SPLITS, labels, count))
    return Rows(rows)


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
    for row in rows.where(IN_TWO_SPLITS):
        labels = row.labels
        sentences.append(
            f"Warning: {plural(int(row.mean), 'request')} that {labels['behaviour']} was scored or "
            f"chosen on are held out for {labels['measured']}."
        )
    return " ".join(sentences)


def plain_texts(sets: Mapping[str, PromptSet], splits: Iterable[str]) -> set[str]:
    """The requests of some splits as they are compared (see `plain_text`)."""
    texts = set()
    for split in splits:
        texts |= {plain_text(example.prompt) for example in sets[split]}
    return texts
