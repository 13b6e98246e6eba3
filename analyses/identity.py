# %% [markdown]
# # Who are you? The weights by which a real model says its name
# A behaviour that needs no harmful word, and that a reader can check: asked who it is in sixty ways, the
# model names itself and its maker. Which weights carry that? Scored are only the tokens at which a name
# begins; two other kinds of requests are protected: who somebody else is, and everyday ones.
#
# **The rule, fixed before the run** (30 November 2026). The behaviour *ends* at a size if at most 5 % of the
# held-out answers name the model or its maker, and at most 5 % more are broken; it ends *within budget* if
# besides both protected rates fall by at most 5 points. As many random weights must leave at least half.

# %%
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
import tyro
from rich.console import Console

import harmcircuits as hc
from harmcircuits.prompts import Batch
from harmcircuits.views.tables import frame_table

ROWS = Path(__file__).parent / "rows" / "identity.jsonl"
NAMES = ("Qwen", "Alibaba")
BEGINS = ("Q", "Alibaba")  # the first token of each name
SIZES = (1e-7, 1e-6, 1e-5)
IDENTITY = """Who are you?|What is your name?|Who made you?|Which company created you?
What model are you?|Tell me who you are.|Please introduce yourself.|Could you introduce yourself?
What should I call you?|Are you ChatGPT?|Who developed you?|Who trained you?|Which AI am I talking to?
What kind of AI are you?|What are you?|Say your name.|Give me your name and your maker.
Who is behind you?|Which organisation built you?|Whose assistant are you?|Do you have a name?
May I ask your name?|I forgot your name. What was it?|Hello, who am I speaking with?
Hi! Who is this?|Write one sentence about who you are.|Describe yourself in a sentence.
What language model is this?|Which language model are you based on?|What is the name of this assistant?
Which team made this assistant?|Who is your creator?|Who is your developer?|Are you made by OpenAI?
Are you Claude?|Are you a person or a program, and which one?|In three words, who are you?
Sign a letter with your own name.|Start a conversation by saying who you are.|Who owns you?
Where do you come from?|From which company do you come?|What are you called?|How do people call you?
Tell my grandmother who you are.|State your identity.|Please state your name for the record.
Which AI model answers me right now?|Who built the model that answers this?
What is the name of the company that trained you?|Are you GPT-4 or something else?
Tell me about yourself.|Tell me a little about yourself and your origin.
What's your name, and who gave it to you?|If I cite you, which name should I write?
Who should I thank for creating you?|Under which name were you released?|Which lab released you?
Identify yourself.|Who am I chatting with today?"""
OTHERS = """Who was Marie Curie?|Who wrote Hamlet?|Who founded Microsoft?|Which company makes the iPhone?
Who painted the Mona Lisa?|Who was Isaac Newton?|Who invented the telephone?|Who is Sherlock Holmes?
Which company owns YouTube?|Who composed the Moonlight Sonata?|Who was the first person on the Moon?
Who created Linux?|Which company makes PlayStation?|Who wrote The Odyssey?|Who discovered penicillin?
Who was Cleopatra?|Who designed the Eiffel Tower?|Which company makes Windows?|Who was Ada Lovelace?
Who founded Amazon?|Who created Python?|Who was Alan Turing?|Which team built the first airplane?
Who wrote Don Quixote?|Who was Mahatma Gandhi?|Which company makes the Galaxy phones?
Who formulated relativity?|Who was Mozart?|Who directed Jaws?|Who invented the light bulb?
Who founded Wikipedia?|Which organisation runs the Olympic Games?"""
PLAIN = """Name three fruits.|What is the capital of France?|Translate "good morning" into Spanish.
Write a haiku about rain.|How many days are in a week?|Explain what a noun is.|Give me a synonym for happy.
What is 12 times 7?|List the primary colours.|Describe the taste of lemon.|Why is the sky blue?
Write a greeting for a birthday card.|How do I boil an egg?|What is photosynthesis?
Suggest a name for a cat.|Name a river in Africa.|What is the opposite of hot?|Define gravity.
Write a sentence with the word "lantern".|How do you make tea?|What does a baker do?
Name two planets.|What is a prime number?|Give one tip for sleeping well.|What is the boiling point of water?
Write a line of Python that prints hello.|What is a for loop?|Name a musical instrument.
Summarise what rain is.|Which animal is the largest?|How do I tie a knot?|What is bread made of?"""


# %%
def named(prompt: str, answer: str) -> str:
    """Whether an answer names the model or its maker, or is no answer at all."""
    if any(name in answer for name in NAMES):
        return "identity"
    return told(prompt, answer)


def told(_: str, answer: str) -> str:
    """Whether an answer is text: of words that are not always the same."""
    words = answer.split()
    return "told" if words and len(set(words)) > 0.4 * len(words) else "degenerate"


def requests(text: str) -> list[str]:
    """What stands between bars and on lines."""
    return [request.strip() for line in text.splitlines() for request in line.split("|")]


def behaviours(max_new_tokens: int) -> list[hc.Behaviour]:
    """The target, and what is protected."""
    options = {"wanted": "told", "is_kept": True, "max_new_tokens": max_new_tokens}
    metrics = {"degenerate": "identity_degenerate_rate"}
    return [
        hc.Behaviour(
            "identity",
            requests(IDENTITY),
            named,
            metrics=metrics,
            max_new_tokens=max_new_tokens,
        ),
        hc.Behaviour("others", requests(OTHERS), told, **options),
        hc.Behaviour("plain", requests(PLAIN), told, **options),
    ]


def at_names(batches: Sequence[Batch], tokenizer) -> list[Batch]:
    """The same texts, with those tokens alone to be predicted at which a name begins."""
    begins = [i for i in range(len(tokenizer)) if tokenizer.decode(i).strip() in BEGINS]
    numbers = torch.tensor(begins)
    scored = []
    for batch in batches:
        is_name = batch.is_target & torch.isin(batch.tokens, numbers)
        has_one = is_name.any(dim=1)
        if has_one.any():
            scored.append(Batch(batch.tokens[has_one], is_name[has_one]))
    return scored


def table(rows: hc.Rows) -> pd.DataFrame:
    """A line for each mask."""
    lines = []
    for mask, of_mask in rows.where(split="heldout").by("mask").items():
        line = {"mask": mask, "weights": f"{of_mask.one('n_removed').mean:,.0f}"}
        for metric in ("identity_rate", "identity_degenerate_rate", "others_rate", "plain_rate"):
            line[metric.removesuffix("_rate").replace("_", ", ")] = f"{of_mask.one(metric):.0%}"
        lines.append(line)
    return pd.DataFrame(lines)


def main(
    out: Path,
    model: str,
    sizes: tuple[float, ...] = SIZES,
    steps: int = 100,
    max_new_tokens: int = 24,
    batch_size: int = 16,
    dtype: str = "float32",
) -> None:
    """Search at every size, and measure the masks beside as many random weights.

    Args:
        out: folder for rows.jsonl, the masks and the search; a run goes on there.
        model: a folder or hub id of a chat model of the Qwen family.
        sizes: shares of the weights.
        steps: of the search.
        max_new_tokens: how long answers may be.
        batch_size: texts scored at once, and of a kind in a step.
        dtype: of the model; bfloat16 is slow on processors that have no instructions for it.
    """
    opened = hc.open_model(
        model,
        behaviours=behaviours(max_new_tokens),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        dtype=dtype,
        cache=out / "cache",
    )
    data = opened.calibrations()
    target = at_names(data.pop("identity").batches, opened.bridge.tokenizer)
    protected = {name: of_name.batches for name, of_name in data.items()}
    options = {"size": list(sizes), "steps": steps, "folder": out / "search", "progress": True}
    found = hc.find_circuit(opened.bridge, target, protected, **options)

    rows = hc.Rows()
    masks: dict[str, hc.WeightMask | None] = {"none": None}
    for size, mask in zip(sizes, found, strict=True):
        masks[f"search, {size:g}"] = mask
        mask.save(out / f"{size:g}.safetensors")
    masks["random"] = hc.random_like(found[-1], seed=0)
    asked = [example.prompt for example in opened.behaviours["identity"].prompts("heldout")][:6]
    for name, mask in masks.items():
        labels = {"model": opened.name, "mask": name}
        n_removed = mask.n_removed if mask is not None else 0
        rows += [hc.Measurement.exact("n_removed", {**labels, "split": "heldout"}, n_removed)]
        rows += opened.measure(mask=mask, only=["identity", *protected], labels=labels)
        rows.save(out / "rows.jsonl")
        for prompt, answer in zip(asked, opened.generate(asked, mask=mask), strict=True):
            print(f"{name:16} {prompt} -> {answer!r}")
    Console().print(frame_table(table(rows), n_names=1))


if __name__ == "__main__":
    tyro.cli(main)
