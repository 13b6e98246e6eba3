"""What a behaviour is scored on: the model's own answers that the judge verified."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from harmcircuits.display import card, facts, listed, share
from harmcircuits.prompts import Batch, PromptSet

FEW_ANSWERS = 20  # verified, below which another sample of them may well give another circuit


class NotShownError(ValueError):
    """The model shows a behaviour in none of its answers."""


@dataclass(frozen=True, repr=False)
class Calibration:
    """What a behaviour is scored on: the model's own answers that the judge verified."""

    prompts: PromptSet
    batches: Sequence[Batch]
    n_asked: int
    behaviour: str = ""

    def __repr__(self) -> str:
        return (
            f"Calibration({self.behaviour}: {self.n_verified} of {self.n_asked} answers verified)"
        )

    def _repr_html_(self) -> str:
        n_targets = sum(int(batch.is_target.sum()) for batch in self.batches)
        of_asked = share(self.n_verified / self.n_asked) if self.n_asked else "none"
        values = {
            "verified": f"{self.n_verified} of {self.n_asked} answers, {of_asked}",
            "scored on": f"{n_targets:,} tokens of answers",
        }
        return card(f"Calibration: {self.behaviour}", facts(values))

    @property
    def n_verified(self) -> int:
        """How many answers the judge verified."""
        return len(self.prompts)


def few_answers(n_verified: Mapping[str, int]) -> str:
    """What is to be said of behaviours that are scored on few answers; empty where none is."""
    few = [f"{name} {number}" for name, number in n_verified.items() if number < FEW_ANSWERS]
    if not few:
        return ""
    return (
        f"scored on fewer than {FEW_ANSWERS} verified answers: {listed(few)}; another sample may "
        "give another circuit"
    )
