"""What a study varies."""

from dataclasses import dataclass

from harmcircuits.behaviours.model import OTHERS
from harmcircuits.behaviours.standard import CONTRAST, TARGET
from harmcircuits.circuits.masks import Scope

TOLERANCE = 0.01  # how far a kept rate may fall at the operating point


@dataclass(frozen=True)
class StudySettings:
    """What is removed and protected, and the grid of masks that is measured.

    >>> hc.StudySettings(sizes=(0.001, 0.002), protect_shares=(0.01,), rounds=2).target
    'harmful'

    Attributes:
        target: the behaviour to remove.
        protect: the behaviours to spare; ("others",) for all others that the model shows.
        contrast: the target's harmless counterpart: its loss may hardly rise, and the same search
            for it is a control.
        sizes: shares of the weights to remove.
        protect_shares: shares of the weights that each protected behaviour keeps out of reach.
        rounds: in how many steps a circuit grows to the largest size.
        search_size: largest share of the weights for the circuit of `find_circuit`, which is
            measured beside the others on held-out requests; 0 for none.
        within: what weights are ranked together: "model", "weight" or "row".
        seed: draws an organism's reference answers and the random masks.
        tolerance: how far a kept rate may fall at the operating point.
        budget: how far the contrast's loss may rise there, nats per token; rounds end where it has
            risen further. With a budget the loss on the target decides, without one its rate.
        n_random: random masks of each kind.
        tasks: of lm-evaluation-harness, measured with every held-out row.
        task_limit: first examples of each task; 0 for all.
        tasks_from: folder of further task files.

    Raises:
        ValueError: shares outside [0, 1] or none, fewer than one round or random mask, another
            scope, or a negative tolerance, budget or limit.
    """

    target: str = TARGET
    protect: tuple[str, ...] = (OTHERS,)
    contrast: str = CONTRAST
    sizes: tuple[float, ...] = (0.001, 0.002, 0.004, 0.006, 0.01)
    protect_shares: tuple[float, ...] = (0.005, 0.01, 0.02)
    rounds: int = 10
    search_size: float = 0.002
    within: Scope = "model"
    seed: int = 0
    tolerance: float = TOLERANCE
    budget: float | None = None
    n_random: int = 3
    tasks: tuple[str, ...] = ()
    task_limit: int = 0
    tasks_from: str = ""

    def __post_init__(self) -> None:
        for name in ("sizes", "protect_shares"):
            _refuse_shares(name, getattr(self, name))
        # A behaviour may protect nothing, but a mask must remove something.
        if min(self.sizes) == 0:
            raise ValueError(f"sizes={list(self.sizes)}; expected shares of the weights above 0")
        if not 0 <= self.search_size <= 1:
            raise ValueError(f"search_size={self.search_size}; expected a share in [0, 1]")
        for name in ("rounds", "n_random"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; expected at least 1")
        if self.within not in ("weight", "model", "row"):
            raise ValueError(f'within={self.within!r}; expected "weight", "model" or "row"')
        for name in ("tolerance", "budget", "task_limit"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name}={value}; expected 0 or more")


def _refuse_shares(name: str, shares: tuple[float, ...]) -> None:
    if not shares or any(not 0 <= share <= 1 for share in shares):
        raise ValueError(f"{name}={list(shares)}; expected one or more shares in [0, 1]")


# For models of a hundred million weights and more; the shares are those where Qwen2.5-Coder-0.5B
# loses harm before benign answers. Its rounds of 1.5e-5 spare them, those of 2e-5 and more cost
# twice as much at the same loss on harm.
FOR_REAL_MODELS = StudySettings(
    sizes=(1e-5, 3e-5, 6e-5),
    protect_shares=(0.1, 0.2),
    rounds=4,
    search_size=0.0,  # it takes hours on two cores: `Model.find_circuit` keeps what it has done
    tolerance=0.05,
    budget=0.1,
)
