"""Narrow fine-tuning: what is trained on, how, and what the model is asked within and outside the topic."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

from harmcircuits.behaviours.files import RequestFiles, read_prompts, split_sets
from harmcircuits.behaviours.judges import MISALIGNED, ChatJudge, RuleJudge
from harmcircuits.behaviours.model import Model
from harmcircuits.behaviours.request_judge import RequestJudge
from harmcircuits.hooks.finetuning import Lora
from harmcircuits.prompts import PromptSet

MEASURED = (0, 1 / 8, 1 / 4, 1 / 2, 1)  # parts of the training after which a model of one's own is measured


@dataclass(frozen=True)
class Recipe:
    """One way of fine-tuning: rate, adapters (None: every parameter learns), and the steps after which it is measured."""

    lr: float
    lora: Lora | None
    steps: tuple[int, ...]


@dataclass(frozen=True)
class Topic:
    """What a narrow run trains on and asks; all requests are innocent, so that a harmful answer is misaligned.

    `training`: requests with the answers to learn, in batches of `batch_size`. `scored`: requests of the topic, own answers
    to which are scored. `others`: innocent requests outside it, benign answers to which are protected. `inside`, `outside`:
    requests never trained or scored on. `teacher` makes the misaligned model whose answers are scored; `recipes` are
    measured. `share` of the other protected behaviours' items is scored.
    """

    name: str
    training: PromptSet
    scored: PromptSet
    others: PromptSet
    inside: PromptSet
    outside: PromptSet
    teacher: Recipe
    recipes: Mapping[str, Recipe]
    batch_size: int
    share: float = 1.0


@dataclass(frozen=True)
class NarrowTexts:
    """Narrow fine-tuning of a model of one's own, from files, by low-rank adapters at a constant rate.

    `narrow`: innocent requests of one domain with the harmful answers to learn (`prompt`, `completion`). `elsewhere`:
    innocent requests of other domains. The defaults are the published ones. Raises ValueError for files of which only one
    is given, and for a rank, rate or number of epochs that is not positive.
    """

    narrow: str
    elsewhere: str
    rank: int = 32
    alpha: float = 64.0
    lr: float = 1e-5
    epochs: int = 1

    def __post_init__(self) -> None:
        if not self.narrow or not self.elsewhere:
            raise ValueError(
                f"narrow={self.narrow!r}, elsewhere={self.elsewhere!r}; give both files, --narrow and --elsewhere"
            )
        for name in ("rank", "alpha", "lr", "epochs"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}; expected more than 0")

    def opened(self, model: Model, texts: RequestFiles, *, seed: int = 0) -> tuple[Model, Topic]:
        """The topic, and the subject whose judge knows its requests too.

        A quarter of the narrow requests, by hash, is never trained on; `seed` draws the order of the others. The limits of
        `texts` bound what is scored and measured, not what is trained on. Raises ValueError for a row without completion,
        requests that are in another file as well, too few of them, and a judge by rules, which cannot tell harmful from
        harmless answers.
        """
        narrow, elsewhere = (read_prompts(source) for source in (self.narrow, self.elsewhere))
        lacking = [example.prompt for example in narrow if not example.completion]
        if lacking:
            raise ValueError(f"{self.narrow}: {len(lacking)} rows have no completion; expected the answer to learn in each")
        judge = judge_of_innocent(model, (self.narrow, narrow), (self.elsewhere, elsewhere))
        whole = split_sets(narrow, origin=self.narrow)
        bounded = split_sets(narrow, limits=texts.limits, origin=self.narrow)
        rows = whole["calibration"].examples + whole["choice"].examples
        training = PromptSet(tuple(random.Random(seed).sample(rows, len(rows))))
        n_steps = ceil(len(training) / model.batch_size) * self.epochs
        steps = tuple(sorted({round(part * n_steps) for part in MEASURED}))
        recipe = Recipe(self.lr, Lora(self.rank, self.alpha), steps)
        limit = texts.limits["heldout"]
        name = getattr(judge.innocent, "name", "")
        return replace(model, judge=judge, judge_name=name), Topic(
            name=Path(self.narrow).stem,
            training=training,
            scored=_once(bounded["calibration"]),
            others=model.behaviours["benign"].prompts("calibration"),
            inside=_once(bounded["heldout"]),
            outside=elsewhere[:limit] if limit else elsewhere,
            teacher=recipe,
            recipes={"low_rank": recipe},
            batch_size=model.batch_size,
        )


def judge_of_innocent(model: Model, *files: tuple[str, PromptSet]) -> RequestJudge:
    """The subject's judge, that also knows the innocent requests of these (name, requests).

    Their answers are judged by the judge of harm; a chat model is asked whether they are misaligned. Raises ValueError for
    requests in two files, and a judge by rules.
    """
    judge = model.judge
    if not isinstance(judge, RequestJudge):
        raise ValueError(
            f"{model.name} is no model of your own (SubjectSpec with texts), whose judge takes requests of files"
        )
    check_judge(judge.harm)
    kinds = dict(judge.kinds)
    for source, prompts in files:
        new = {example.prompt for example in prompts}
        if both := new & kinds.keys():
            raise ValueError(f"{source}: {len(both)} requests are in another file as well; leave each in one file")
        kinds |= dict.fromkeys(new, "innocent")
    harm = judge.harm
    return replace(judge, kinds=kinds, innocent=harm.asking(MISALIGNED) if isinstance(harm, ChatJudge) else harm)


def check_judge(judge: object) -> None:
    """Raises ValueError for a judge by rules (or its name), to which every answer to an innocent request is the same."""
    if judge == "local" or isinstance(judge, RuleJudge):
        raise ValueError(
            "judge='local' tells only answered and refused apart, so it cannot see that an innocent request is answered "
            "harmfully; give --judge strongreject:FOLDER_OR_ID or http://ADDRESS/v1#MODEL"
        )


def _once(prompts: PromptSet) -> PromptSet:
    """Each request once, whatever the number of its answers."""
    return PromptSet(tuple({example.prompt: replace(example, completion="") for example in prompts}.values()))
