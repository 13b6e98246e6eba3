"""Narrow fine-tuning: what is trained on, how, and what is asked within and outside the topic."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

from harmcircuits.behaviours.chat_judges import MISALIGNED, ChatJudge
from harmcircuits.behaviours.files import RequestFiles
from harmcircuits.behaviours.judges import RuleJudge
from harmcircuits.behaviours.model import Model
from harmcircuits.behaviours.request_judge import RequestJudge
from harmcircuits.hooks.finetuning import Lora
from harmcircuits.prompts import PromptSet

# Parts of the training after which a custom model is measured.
MEASURED = (0, 1 / 8, 1 / 4, 1 / 2, 1)


@dataclass(frozen=True)
class Recipe:
    """One way of fine-tuning.

    Attributes:
        lr: learning rate.
        lora: adapters; None where every parameter learns.
        steps: those after which the model is measured.
    """

    lr: float
    lora: Lora | None
    steps: tuple[int, ...]


@dataclass(frozen=True)
class Topic:
    """What a narrow run trains on and asks.

    All requests are innocent, so that a harmful answer is misaligned.

    Attributes:
        name: of the topic.
        training: requests with the answers to learn.
        scored: requests of the topic, own answers to which are scored.
        others: innocent requests outside it, benign answers to which are protected.
        inside: requests of the topic that are never trained or scored on.
        outside: requests of other topics that are never trained or scored on.
        teacher: makes the misaligned model whose answers are scored.
        recipes: are measured, by name.
        batch_size: of the training.
        share: of the other protected behaviours' items that is scored.
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
class NarrowFiles:
    """Narrow fine-tuning of a custom model, from files, by low-rank adapters at a constant rate.

    The defaults are the published ones.

    Attributes:
        narrow: innocent requests of one domain with the harmful answers to learn (`prompt`,
            `completion`).
        elsewhere: innocent requests of other domains.
        rank: of the adapters.
        alpha: their scale is alpha / rank.
        lr: learning rate.
        epochs: passes over the narrow requests.

    Raises:
        ValueError: files of which only one is given, or a rank, scale, rate or number of epochs
            that is not positive.
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
                f"narrow={self.narrow!r}, elsewhere={self.elsewhere!r}; "
                "give both files, --narrow and --elsewhere"
            )
        for name in ("rank", "alpha", "lr", "epochs"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}; expected more than 0")

    def opened(self, model: Model, files: RequestFiles, *, seed: int = 0) -> tuple[Model, Topic]:
        """The model whose judge knows the requests of the topic too, and the topic.

        A quarter of the narrow requests, by hash, is never trained on.

        Args:
            model: the custom model.
            files: its requests; their limits bound what is scored and measured, not what is trained
                on.
            seed: draws the order of what is trained on.

        Raises:
            ValueError: a row without completion, requests that are in another file as well, too few
                of them, and a judge by rules, which cannot tell harmful from harmless answers.
        """
        narrow = PromptSet.read(self.narrow)
        elsewhere = PromptSet.read(self.elsewhere)
        lacking = [example.prompt for example in narrow if not example.completion]
        if lacking:
            raise ValueError(
                f"{self.narrow}: {len(lacking)} rows have no completion; "
                "expected the answer to learn in each"
            )
        judge = judge_of_innocent(model, (self.narrow, narrow), (self.elsewhere, elsewhere))
        whole = narrow.splits(origin=self.narrow)
        bounded = narrow.splits(limits=files.limits, origin=self.narrow)
        rows = whole["calibration"].examples + whole["choice"].examples
        shuffled = random.Random(seed).sample(rows, len(rows))

        n_steps = ceil(len(shuffled) / model.batch_size) * self.epochs
        steps = sorted({round(part * n_steps) for part in MEASURED})
        recipe = Recipe(self.lr, Lora(self.rank, self.alpha), tuple(steps))
        limit = files.limits["heldout"]
        topic = Topic(
            name=Path(self.narrow).stem,
            training=PromptSet(tuple(shuffled)),
            scored=_once(bounded["calibration"]),
            others=model.behaviours["benign"].prompts("calibration"),
            inside=_once(bounded["heldout"]),
            outside=elsewhere[:limit] if limit else elsewhere,
            teacher=recipe,
            recipes={"low_rank": recipe},
            batch_size=model.batch_size,
        )
        judge_name = getattr(judge.innocent, "name", "")
        return replace(model, judge=judge, judge_name=judge_name), topic


def judge_of_innocent(model: Model, *files: tuple[str, PromptSet]) -> RequestJudge:
    """The model's judge, that also knows the innocent requests of these files.

    Their answers are judged by the judge of harm; a chat model is asked whether they are
    misaligned.

    Args:
        model: a custom model.
        files: name and requests of each.

    Raises:
        ValueError: a model that is no custom one, requests in two files, and a judge by rules.
    """
    judge = model.judge
    if not isinstance(judge, RequestJudge):
        raise ValueError(
            f"{model.name} is no custom model, whose judge takes requests of files; "
            "open one with harmful and benign requests"
        )
    check_judge(judge.harm)
    kinds = dict(judge.kinds)
    for source, prompts in files:
        new = {example.prompt for example in prompts}
        both = new & kinds.keys()
        if both:
            raise ValueError(
                f"{source}: {len(both)} requests are in another file as well; leave each in one "
                "file"
            )
        kinds |= dict.fromkeys(new, "innocent")
    harm = judge.harm
    innocent = harm.asking(MISALIGNED) if isinstance(harm, ChatJudge) else harm
    return replace(judge, kinds=kinds, innocent=innocent)


def check_judge(judge: object) -> None:
    """Refuse a judge by rules, to which every answer to an innocent request is the same.

    Args:
        judge: a judge, or the name of one.

    Raises:
        ValueError: a judge by rules.
    """
    if judge == "local" or isinstance(judge, RuleJudge):
        raise ValueError(
            "judge='local' tells only answered and refused apart, so it cannot see that an "
            "innocent request is answered harmfully; give --judge strongreject:FOLDER_OR_ID or "
            "http://ADDRESS/v1#MODEL"
        )


def _once(prompts: PromptSet) -> PromptSet:
    """Each request once, whatever the number of its answers."""
    first = {example.prompt: replace(example, completion="") for example in prompts}
    return PromptSet(tuple(first.values()))
