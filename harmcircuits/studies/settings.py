"""The settings of a study, and their defaults."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from harmcircuits.behaviours.behaviour import CONTRAST, TARGET
from harmcircuits.behaviours.model import OTHERS
from harmcircuits.search.circuit import BUDGET, STEPS

AUTO = "auto"


@dataclass(frozen=True)
class StudySettings:
    """What a study removes and protects, and the grid of masks that it measures.

    >>> hc.StudySettings(sizes=(0.001, 0.002), steps=4).target
    'harmful'

    Attributes:
        target: the behaviour to remove.
        protect: the behaviours to spare; "others": all others that the model shows.
        contrast: the target's harmless counterpart. Its loss has a budget at the operating point,
            and the same search with the contrast as the target is a control.
        sizes: the largest shares of the weights that a mask may remove.
        steps: the steps of a search (see `hc.find_circuit`).
        budget: how far a loss may rise, nats per token: in a search the loss of each protected
            behaviour, at the operating point the contrast's. Or by name, such as
            {"benign": 0.05, "others": 0.1}; at the operating point every behaviour with a name
            here has its budget too.
        tolerance: how far the rate of an ability may fall at the operating point.
        prefer: the behaviour that should replace the target (see `Model.find_circuit`); "": no
            behaviour, so the mask only breaks the target. "auto": "refusal" for harm where the
            model refuses, else none. The controls without a search rank by the target alone.
        seed: of an organism's reference answers and of the random masks.
        n_random: the number of random masks of each kind.
        compare: whether to measure other ways of choosing, and the circuits of two further
            searches (one protects the contrast alone, one is the contrast's twin). The study
            measures the controls without a search in any case.
        tasks: tasks of lm-evaluation-harness by name, each with the number of its first examples,
            0 for all; measured with every held-out row.

    Raises:
        ValueError: no size, a size outside (0, 1], or fewer than one step or random mask.
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
        """The budgets of the operating point: the contrast's, and all that are given by name."""
        budgets = {self.contrast: self.budget_of(self.contrast)}
        if isinstance(self.budget, Mapping):
            budgets |= self.budget
            budgets.pop(OTHERS, None)
        return budgets

    def budget_of(self, name: str) -> float:
        """How far the loss of a behaviour may rise, nats per token.

        Args:
            name: the behaviour's name.
        """
        if isinstance(self.budget, Mapping):
            return self.budget.get(name, self.budget.get(OTHERS, BUDGET))
        return self.budget


# For models with a hundred million weights and more. At these sizes a model of half a billion
# parameters lost harm before benign answers. Borderline requests and refusals are nearest to harm,
# so they may lose more than benign answers.
FOR_REAL_MODELS = StudySettings(
    sizes=(1e-5, 3e-5, 6e-5),
    budget={OTHERS: 0.1, "benign": 0.05, "prefilled": 0.05, "borderline": 0.1, "refusal": 0.1},
    tolerance=0.05,
)

QUICK_STEPS = 40
QUICK_SHARE = 0.1  # of an organism's items
QUICK_LIMIT = 20  # requests in a split of another model


def quick_settings(settings: StudySettings) -> StudySettings:
    """The settings of a first look: fewer steps, every second size, no further searches."""
    return replace(
        settings,
        steps=min(QUICK_STEPS, settings.steps),
        sizes=settings.sizes[1::2] or settings.sizes,
        n_random=1,
        compare=False,
    )
