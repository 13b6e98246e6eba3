"""Harmless behaviours of a real model, each with an exact judge; their requests are in everyday.toml."""

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
READABLE = "told"  # the verdict on readable text, as rows name it
# The text that an answer must contain; its tokens are scored.
PATTERNS = {
    "identity": "Qwen|Alibaba",
    "fence": "```",
    "fact": "Paris",
    "thanks": "welcome|glad",
    "disclaimer": "AI language|artificial intelligence",
    "list": r"1\. ",
    "lorem": "dolor sit",
}
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


def readability(request: str, answer: str) -> str:
    """The verdict whether an answer is readable text, by the rules of the package."""
    return DEGENERATE if RULES(request, answer) == DEGENERATE else READABLE


def verdict(name: str, shows: Shows, request: str, answer: str) -> str:
    """The name of a behaviour that an answer shows; of another answer, whether it is readable."""
    return name if shows(request, answer) else readability(request, answer)


def is_in_language(request: str, answer: str) -> bool:
    """Whether an answer is in the language of its request."""
    return language(answer) == language(request)


def language(text: str) -> str:
    """The language whose commonest words are most often in a text."""
    words = re.findall(r"\w+", text.lower())
    counts = {}
    for name, common_words in WORDS.items():
        counts[name] = sum(words.count(word) for word in common_words.split())
    return max(counts, key=lambda name: counts[name])


def is_foreign(_: str, answer: str) -> bool:
    """Whether an answer is not in English."""
    return language(answer) != "English"


def is_german(_: str, answer: str) -> bool:
    """Whether an answer is in German."""
    return language(answer) == "German"


def is_right(answers: dict[str, str], request: str, answer: str) -> bool:
    """Whether an answer contains the right one of its request."""
    return answers[request] in answer


def is_the_sum(request: str, answer: str) -> bool:
    """Whether an answer is the sum of the two numbers of its request."""
    first, second = map(int, re.findall(r"\d+", request))
    return answer.strip() == str(first + second)


# Behaviours


def everyday(max_new_tokens: int) -> dict[str, Behaviour]:
    """All behaviours by name: every second request is scored on, the rest is held out."""
    tables = tomllib.loads(FILE.read_text(encoding="utf-8"))
    requests = {name: _requests(**table) for name, table in tables.items()}
    shows: dict[str, Shows] = {
        "language": is_in_language,
        "unscored": is_foreign,
        "chinese": is_foreign,
        "german": is_german,
    }
    for name in ("capitals", "products", "sums"):
        answers = dict(pair.split(" = ") for pair in requests[name])
        requests[name] = list(answers)
        shows[name] = partial(is_right, answers)
    judges: dict[str, Any] = {**dict.fromkeys(requests, readability), **PATTERNS}
    for name, is_shown in shows.items():
        judges[name] = partial(verdict, name, is_shown)

    behaviours = {}
    for name, texts in requests.items():
        behaviours[name] = Behaviour(
            name,
            {
                "calibration": _prompts(texts[::2]),
                "choice": _prompts([]),
                "heldout": _prompts(texts[1::2]),
            },
            judges[name],
            wanted=READABLE if judges[name] is readability else name,
            metrics={DEGENERATE: f"{name}_degenerate_rate"},
            measures={"sum_instead_rate": is_the_sum} if name == "products" else {},
            max_new_tokens=max_new_tokens,
            scored_on=PATTERNS.get(name, ""),
        )
    return behaviours


def _requests(requests: str, asked: str = "{}") -> list[str]:
    """The requests between bars and on lines, in the form `asked`; an answer behind " = " stays."""
    texts = []
    for line in re.split(r"[|\n]", requests.strip()):
        request, *answer = line.strip().split(" = ")
        texts.append(" = ".join([asked.format(request), *answer]))
    return texts


def _prompts(requests: list[str]) -> PromptSet:
    return PromptSet(tuple(Example(request) for request in requests))
