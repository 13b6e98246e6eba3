"""What a study varies."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from harmcircuits.behaviours.model import OTHERS
from harmcircuits.behaviours.standard import CONTRAST, TARGET
from harmcircuits.hooks.search import BUDGET, STEPS

TOLERANCE = 0.01  # how far a kept rate may fall at the operating point

Decides = Literal["rate", "loss"]
ScoredBy = Literal["loss", "error"]


@dataclass(frozen=True)
class StudySettings:
    """What is removed and protected, and the grid of masks that is measured.

    >>> hc.StudySettings(sizes=(0.001, 0.002), steps=4).target
    'harmful'

    Attributes:
        target: the behaviour to remove.
        protect: the behaviours to spare; ("others",) for all others that the model shows.
        contrast: the target's harmless counterpart: its loss may hardly rise, and the same search
            for it is a control.
        sizes: shares of the weights to remove, at most.
        steps: in how many steps the search's mask grows.
        budget: how far a loss may rise, nats per token: in a search that of each protected
            behaviour, at the operating point that of the contrast.
        budgets: how far the loss of single behaviours may rise, in place of `budget`, in a search
            and at the operating point: by name, or on the command line as NAME=NATS. Those that the
            model does not have, or that are not protected, play no part.
        tolerance: how far a kept rate may fall at the operating point.
        decides: which figure of the target decides at the operating point: its "rate", or its
            "loss" where the verdicts on free text are coarse.
        scored_by: what answers of the target are scored by: their "loss", or their "error", the
            share of their tokens that a draw would miss (`token_error`), which is bounded: no few
            broken answers can pay for the others. What is protected is priced by its loss in any
            case.
        prefer: the behaviour that should take the target's place, such as "refusal" (see
            `Model.find_circuit`); none by default. Controls that are no searches are ranked by the
            target alone.
        protect_first: protect the first so many tokens of every protected answer by themselves as
            well: they decide whether it refuses, and its mean loss hardly shows them. 0: do not.
        seed: draws an organism's reference answers and the random masks.
        n_random: random masks of each kind.
        compare: whether the circuit is compared with other ways of choosing and with circuits of
            further searches (the contrast alone protected, the contrast's twin). The controls that
            are no searches are measured in any case.
        published: whether the protocol of arXiv 2604.09544 is run as published, in place of the
            search: in every matrix the best `size` of the weights on the target less the best five
            times as many on the contrast, scored on raw text (request, newline, answer). Nothing
            else is spared, and nothing compared.
        tasks: of lm-evaluation-harness, measured with every held-out row.
        task_limit: first examples of each task; 0 for all.
        tasks_from: folder of further task files.

    Raises:
        ValueError: sizes outside (0, 1] or none, fewer than one step or random mask, a negative
            tolerance, budget or limit, another figure that decides or scores, or the published
            protocol with something to compare, protecting anything but the contrast, by the error,
            with something to prefer, or with first tokens by themselves.
    """

    target: str = TARGET
    protect: tuple[str, ...] = (OTHERS,)
    contrast: str = CONTRAST
    sizes: tuple[float, ...] = (0.0005, 0.001, 0.002, 0.004)
    steps: int = STEPS
    budget: float = BUDGET
    budgets: Mapping[str, float] = field(default_factory=dict)
    tolerance: float = TOLERANCE
    decides: Decides = "rate"
    scored_by: ScoredBy = "loss"
    prefer: str = ""
    protect_first: int = 0
    seed: int = 0
    n_random: int = 3
    compare: bool = True
    published: bool = False
    tasks: tuple[str, ...] = ()
    task_limit: int = 0
    tasks_from: str = ""

    def __post_init__(self) -> None:
        self._refuse_numbers()
        self._refuse_figures()
        if self.published:
            self._refuse_other_protocol()

    def _refuse_numbers(self) -> None:
        if not self.sizes or any(not 0 < size <= 1 for size in self.sizes):
            raise ValueError(
                f"sizes={list(self.sizes)}; expected one or more shares of the weights in (0, 1]"
            )
        for name in ("steps", "n_random"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; expected at least 1")
        for name in ("tolerance", "budget", "protect_first", "task_limit"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)}; expected 0 or more")
        for name, budget in self.budgets.items():
            if not budget >= 0:
                raise ValueError(f"budgets: {budget} for {name!r}; expected 0 or more")

    def _refuse_figures(self) -> None:
        if self.decides not in ("rate", "loss"):
            raise ValueError(f'decides={self.decides!r}; expected "rate" or "loss"')
        if self.scored_by not in ("loss", "error"):
            raise ValueError(f'scored_by={self.scored_by!r}; expected "loss" or "error"')

    def _refuse_other_protocol(self) -> None:
        if self.scored_by != "loss":
            raise ValueError(
                f"published=True with scored_by={self.scored_by!r}; the published protocol scores "
                "by the loss: leave scored_by out"
            )
        if self.prefer:
            raise ValueError(
                f"published=True with prefer={self.prefer!r}; the published protocol scores the "
                "target alone: leave prefer out"
            )
        if self.protect_first:
            raise ValueError(
                f"published=True with protect_first={self.protect_first}; the published protocol "
                "spares whole answers: leave protect_first out"
            )
        if self.compare or self.protect != (self.contrast,):
            raise ValueError(
                f"published=True with compare={self.compare} and protect={list(self.protect)}; it "
                f"is no search, and spares {self.contrast!r} alone: give compare=False and "
                f"protect={[self.contrast]}"
            )

    def budget_of(self, name: str) -> float:
        """How far the loss of a behaviour may rise, nats per token.

        Args:
            name: of the behaviour.
        """
        return self.budgets.get(name, self.budget)


# What each kind of request may lose on a real model. Requests that only look unsafe, and refusals
# of unsafe ones, are nearest to harm.
REAL_BUDGETS = {
    "benign": 0.05,
    "prefilled": 0.05,
    "borderline": 0.1,
    "refusal": 0.1,
}

PUBLISHED_SIZE = 1e-5  # q; p is five times as much (arXiv 2604.09544, on a model of 8 billion)

QUICK_STEPS = 4
QUICK_SHARE = 0.1  # of the requests
QUICK_LIMIT = 20  # requests a split, where the share of no limit can be taken


def quick(settings: StudySettings) -> StudySettings:
    """A first look in place of a study: fewer steps, every second size, no other searches."""
    return replace(
        settings,
        steps=min(QUICK_STEPS, settings.steps),
        sizes=settings.sizes[1::2] or settings.sizes,
        n_random=1,
        compare=False,
    )


def as_published(settings: StudySettings) -> StudySettings:
    """The published protocol in place of the search: q = 1e-5, the contrast spared alone."""
    return replace(
        settings,
        published=True,
        protect=(settings.contrast,),
        sizes=(PUBLISHED_SIZE,),
        compare=False,
    )


# For models of a hundred million weights and more. The sizes are those where a model of half a
# billion parameters lost harm before benign answers; rules judge its words coarsely, so the loss
# decides.
FOR_REAL_MODELS = StudySettings(
    sizes=(1e-5, 3e-5, 6e-5),
    steps=8,
    budget=0.1,
    budgets=REAL_BUDGETS,
    tolerance=0.05,
    decides="loss",
)
