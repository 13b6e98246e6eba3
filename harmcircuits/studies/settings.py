"""What a study varies."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from harmcircuits.behaviours.behaviour import CONTRAST, TARGET
from harmcircuits.behaviours.model import OTHERS
from harmcircuits.search.circuit import BUDGET, STEPS

AUTO = "auto"


@dataclass(frozen=True)
class StudySettings:
    """What is removed and protected, and the grid of masks that is measured.

    >>> hc.StudySettings(sizes=(0.001, 0.002), steps=4).target
    'harmful'

    Attributes:
        target: the behaviour to remove.
        protect: the behaviours to spare; "others" for all others that the model shows.
        contrast: the target's harmless counterpart: its loss may hardly rise, and the same search
            for it is a control.
        sizes: shares of the weights to remove, at most.
        steps: of the search (see `hc.find_circuit`).
        budget: how far a loss may rise, nats per token: in a search that of each protected
            behaviour, at the operating point that of the contrast. Or by name, such as
            {"benign": 0.05, "others": 0.1}; the named ones count at the operating point too.
        tolerance: how far a kept rate may fall at the operating point.
        prefer: the behaviour that should take the target's place (see `Model.find_circuit`); "" for
            none: then the mask is what breaks the target, and answers become what they may. "auto"
            is "refusal" for harm where the model refuses, else none. Controls that are no searches
            are ranked by the target alone.
        seed: draws an organism's reference answers and the random masks.
        n_random: random masks of each kind.
        compare: whether the circuit is compared with other ways of choosing and with circuits of
            further searches (the contrast alone protected, the contrast's twin). The controls that
            are no searches are measured in any case.
        tasks: tasks of lm-evaluation-harness, measured with every held-out row: how many of its
            first examples, by name, 0 for all.

    Raises:
        ValueError: sizes outside (0, 1] or none, fewer than one step or random mask, or a negative
            tolerance or budget.
    """

    target: str = TARGET
    protect: tuple[str, ...] = (OTHERS,)
    contrast: str = CONTRAST
    sizes: tuple[float, ...] = (0.0005, 0.001, 0.002, 0.004)
    steps: int = STEPS
    budget: float | Mapping[str, float] = BUDGET
    tolerance: float = 0.01
    prefer: str = AUTO
    seed: int = 0
    n_random: int = 3
    compare: bool = True
    tasks: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.sizes or any(not 0 < size <= 1 for size in self.sizes):
            raise ValueError(f"sizes={list(self.sizes)}; expected shares of the weights in (0, 1]")
        if min(self.steps, self.n_random) < 1:
            raise ValueError(
                f"steps={self.steps}, n_random={self.n_random}; expected at least 1 of each"
            )

    @property
    def named_budgets(self) -> dict[str, float]:
        """The budgets of single behaviours, the contrast's among them."""
        named = {self.contrast: self.budget_of(self.contrast)}
        if isinstance(self.budget, Mapping):
            named |= self.budget
            named.pop(OTHERS, None)
        return named

    def budget_of(self, name: str) -> float:
        """How far the loss of a behaviour may rise, nats per token.

        Args:
            name: of the behaviour.
        """
        if isinstance(self.budget, Mapping):
            return self.budget.get(name, self.budget.get(OTHERS, BUDGET))
        return self.budget


# For models of a hundred million weights and more. The sizes are those where a model of half a
# billion parameters lost harm before benign answers. Requests that only look unsafe, and refusals
# of unsafe ones, are nearest to harm, so they may lose more than benign answers.
FOR_REAL_MODELS = StudySettings(
    sizes=(1e-5, 3e-5, 6e-5),
    budget={OTHERS: 0.1, "benign": 0.05, "prefilled": 0.05, "borderline": 0.1, "refusal": 0.1},
    tolerance=0.05,
)

QUICK_STEPS = 40
QUICK_SHARE = 0.1  # of an organism's items
QUICK_LIMIT = 20  # requests a split of another model


def quick(settings: StudySettings) -> StudySettings:
    """A first look in place of a study: fewer steps, every second size, no other searches."""
    return replace(
        settings,
        steps=min(QUICK_STEPS, settings.steps),
        sizes=settings.sizes[1::2] or settings.sizes,
        n_random=1,
        compare=False,
    )
