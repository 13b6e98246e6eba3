"""Harmless behaviours of a real model, each judged by patterns; their requests are in everyday.toml."""

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
# The commonest words of a language, those that others share included; or the letters of its script.
LANGUAGES = {
    "English": """the a an of and is are was in to that with for it you this on as by from or be can
        not have has at which they their more your will one""",
    "French": """le la les l un une des du de d et est en que qui dans pour sur avec il elle ce se ne
        pas plus par au aux sont a à ou son sa ses c qu nous on peut être cette""",
    "Spanish": """el la los las lo una un de del y es en que se por con para su sus al como más no son
        o a pero este esta ser muy también puede hay""",
    "German": """der die das den dem des ein eine einen einem einer und ist sind in im zu zum zur von
        mit auf für nicht sich es ich wie auch als an oder wird werden kann er sie wir man aus bei""",
    "Portuguese": """o a os as um uma de do da dos das e é em no na nos nas que para com por não se
        mais como ao à são ou seu sua foi pode ser também""",
    "Italian": """il lo la i gli le l un uno una di del della dei delle d e è in nel nella per che con
        non si da a al alla come sono più o ma questo questa anche può essere""",
    "Dutch": """de het een en is van in op te dat die voor met niet zijn aan er om ook als of naar bij
        door je wordt kan dit uit over maar was""",
    "Russian": "[а-яё]+",
    "Chinese": "[一-鿿]",
}
UNKNOWN = "unknown"  # of a text in which no language has the most words
MULTILINGUAL = ("language", "unscored", "chinese")  # whose requests stand under their languages
IN_A_LANGUAGE = (*MULTILINGUAL, "german")
RULES = RuleJudge(min_words=1)
Shows = Callable[[str, str], bool]


# Judges


def readability(request: str, answer: str) -> str:
    """The verdict whether an answer is readable text, by the rules of the package."""
    return DEGENERATE if RULES(request, answer) == DEGENERATE else READABLE


def verdict(name: str, shows: Shows, request: str, answer: str) -> str:
    """The name of a behaviour that an answer shows; of another answer, whether it is readable."""
    return name if shows(request, answer) else readability(request, answer)


def language_verdict(name: str, languages: dict[str, str], request: str, answer: str) -> str:
    """The verdict whether an answer is in the language of its request; it may be unknown."""
    answered = language(answer)
    if answered == languages[request]:
        return name
    other = readability(request, answer)
    return UNKNOWN if other == READABLE and answered == UNKNOWN else other


def language(text: str) -> str:
    """The language with the most of its commonest words in a text; unknown if none or two have."""
    words = re.findall(r"[一-鿿]|\w+", text.lower())
    counts = {}
    for name, common_words in LANGUAGES.items():
        pattern = "|".join(common_words.split())
        counts[name] = sum(bool(re.fullmatch(pattern, word)) for word in words)

    most = max(counts.values())
    names = [name for name, count in counts.items() if count == most]
    return names[0] if most and len(names) == 1 else UNKNOWN


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
    languages: dict[str, str] = {}  # request -> the language to answer in
    requests: dict[str, list[str]] = {}
    for name in MULTILINGUAL:
        requests[name] = []
        for spoken, text in tables.pop(name).items():
            for request in _requests(text):
                requests[name].append(request)
                languages[request] = spoken
    requests |= {name: _requests(**table) for name, table in tables.items()}
    for request in requests["german"]:
        languages[request] = "German"

    shows: dict[str, Shows] = {}
    for name in ("capitals", "products", "sums"):
        answers = dict(pair.split(" = ") for pair in requests[name])
        requests[name] = list(answers)
        shows[name] = partial(is_right, answers)
    judges: dict[str, Any] = {**dict.fromkeys(requests, readability), **PATTERNS}
    for name, is_shown in shows.items():
        judges[name] = partial(verdict, name, is_shown)
    for name in IN_A_LANGUAGE:
        judges[name] = partial(language_verdict, name, languages)

    behaviours = {}
    for name, texts in requests.items():
        others = [DEGENERATE, UNKNOWN] if name in IN_A_LANGUAGE else [DEGENERATE]
        behaviours[name] = Behaviour(
            name,
            {
                "calibration": _prompts(texts[::2]),
                "choice": _prompts([]),
                "heldout": _prompts(texts[1::2]),
            },
            judges[name],
            wanted=READABLE if judges[name] is readability else name,
            metrics={other: f"{name}_{other}_rate" for other in others},
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
