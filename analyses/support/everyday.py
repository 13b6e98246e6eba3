"""Behaviours of a real model that anybody may read, each with an exact judge; requests in everyday.toml."""

import re
import tomllib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from harmcircuits.behaviours.behaviour import Behaviour
from harmcircuits.behaviours.judges import DEGENERATE, RuleJudge
from harmcircuits.prompts import Example, PromptSet

FILE = Path(__file__).with_suffix(".toml")
TOLD = "told"  # the verdict on an answer in readable words
# What an answer must contain: also the tokens that are scored.
PATTERNS = {"identity": "Qwen|Alibaba", "fence": "```", "fact": "Paris"}
LOUD = "Answer in capital letters only. "
# Words of a text that a request gives, and that an answer must go on with.
N_GIVEN, N_CONTINUED = 12, 5
WORDS = {
    "French": "le la les des une est et dans pour que qui sur avec il elle",
    "Spanish": "el los las una es en para que con por se y del su",
    "German": "der die das und ist ein eine mit von zu den nicht im sich",
    "Portuguese": "o os as uma um é em para que com por não do da",
    "English": "the of and is are in to that with for it was you this",
}
RULES = RuleJudge(min_words=1)
Shows = Callable[[str, str], bool]


# Judges


def told(request: str, answer: str) -> str:
    """Whether an answer is readable text, by the rules of the package."""
    return DEGENERATE if RULES(request, answer) == DEGENERATE else TOLD


def shown(name: str, shows: Shows, request: str, answer: str) -> str:
    """Whether an answer shows a behaviour, or is other text, or is broken."""
    return name if shows(request, answer) else told(request, answer)


def is_in_language(request: str, answer: str) -> bool:
    """Whether an answer is in the language of its request, by the commonest words."""
    return language(answer) == language(request)


def language(text: str) -> str:
    """The language of which a text has most words."""
    words = re.findall(r"\w+", text.lower())
    counts = {name: sum(words.count(word) for word in of.split()) for name, of in WORDS.items()}
    return max(counts, key=lambda name: counts[name])


def is_foreign(_: str, answer: str) -> bool:
    """Whether an answer is not in English."""
    return language(answer) != "English"


def is_loud(_: str, answer: str) -> bool:
    """Whether an answer is in capital letters."""
    letters = [letter for letter in answer if letter.isalpha()]
    return bool(letters) and sum(map(str.isupper, letters)) >= 0.9 * len(letters)


def is_right(answers: dict[str, str], request: str, answer: str) -> bool:
    """Whether an answer names what is right for its request."""
    return answers[request] in answer


def goes_on(text: str, request: str, answer: str) -> bool:
    """Whether an answer goes on with the next words of a text, wherever it takes it up."""
    given = _words(request.partition(": ")[2])
    _, _, following = _words(text).partition(given)
    return " ".join(following.split()[:N_CONTINUED]) in _words(answer)


def _words(text: str) -> str:
    """A text's words in small letters, with a blank between two of them."""
    return " ".join(re.findall(r"[a-z']+", text.lower()))


# Behaviours


def everyday(max_new_tokens: int) -> dict[str, Behaviour]:
    """All of them by name: every other request is scored on, the rest measures."""
    given = tomllib.loads(FILE.read_text(encoding="utf-8"))
    requests = {name: _listed(of["requests"]) for name, of in given.items() if "requests" in of}
    capitals = dict(pair.split(" = ") for pair in requests["capitals"])
    requests["capitals"] = list(capitals)
    requests["loud"] = [LOUD + request for request in requests["plain"]]
    shows: dict[str, Shows] = {
        "language": is_in_language,
        "unscored": is_foreign,
        "chinese": is_foreign,
        "loud": is_loud,
        "capitals": partial(is_right, capitals),
    }
    for name in ("licence", "zen"):
        text = given[name]["text"]
        requests[name] = _pieces(text)
        shows[name] = partial(goes_on, text)
    judges: dict[str, Any] = {**dict.fromkeys(requests, told), **PATTERNS}
    for name, is_shown in shows.items():
        judges[name] = partial(shown, name, is_shown)

    behaviours = {}
    for name, of_name in requests.items():
        behaviours[name] = Behaviour(
            name,
            {
                "calibration": _set(of_name[::2]),
                "choice": _set([]),
                "heldout": _set(of_name[1::2]),
            },
            judges[name],
            wanted=TOLD if judges[name] is told else name,
            metrics={DEGENERATE: f"{name}_degenerate_rate"},
            max_new_tokens=max_new_tokens,
            scored_on=PATTERNS.get(name, ""),
        )
    return behaviours


def _listed(text: str) -> list[str]:
    """What stands between bars and on lines."""
    return [request.strip() for request in re.split(r"[|\n]", text.strip())]


def _pieces(text: str) -> list[str]:
    """Requests to go on with a text, from every third word on."""
    words = text.split()
    starts = range(0, len(words) - N_GIVEN - 2 * N_CONTINUED, 3)
    pieces = [" ".join(words[start : start + N_GIVEN]) for start in starts]
    return [f"Continue this text word for word: {piece}" for piece in pieces]


def _set(requests: list[str]) -> PromptSet:
    return PromptSet(tuple(Example(request) for request in requests))
