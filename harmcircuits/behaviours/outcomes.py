"""What a model does with each request of a behaviour, and the rates and losses that follow."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from harmcircuits.behaviours.behaviour import Behaviour
from harmcircuits.measurements import Labels, Measurement, Rows
from harmcircuits.prompts import PromptSet


@dataclass(frozen=True, repr=False)
class Outcomes:
    """What a model does with each request of a behaviour, in their order.

    Attributes:
        behaviour: what was asked.
        answers: the requests with the model's own answers, each as many times in a row as it is
            sampled.
        verdicts: the judge's verdict on each answer.
        nll: nats per token of the reference answer to each request; NaN for one without.
        judge: the judge's name, which rates carry as a label; empty for none.
    """

    behaviour: Behaviour
    answers: PromptSet
    verdicts: tuple[str, ...]
    nll: Float[Tensor, " n"]
    judge: str = ""

    def __repr__(self) -> str:
        return f"Outcomes({self.behaviour.name}: {len(self.verdicts)} answers)"

    @property
    def n_samples(self) -> int:
        """Answers to each request."""
        n_requests = max(1, len(self.nll))
        return max(1, len(self.verdicts) // n_requests)

    @property
    def hits(self) -> list[float]:
        """For each request the share of its answers that show the behaviour."""
        is_shown = [verdict == self.behaviour.wanted for verdict in self.verdicts]
        shares = []
        for start in range(0, len(is_shown), self.n_samples):
            samples = is_shown[start : start + self.n_samples]
            shares.append(sum(samples) / self.n_samples)
        return shares

    @property
    def groups(self) -> list[str]:
        """What each request is about; intervals resample whole groups."""
        one_a_request = self.answers.examples[:: self.n_samples]
        return [example.cluster for example in one_a_request]

    def rows(self, labels: Labels) -> Rows:
        """The rate of the wanted verdict, the side metrics, and the NLL of references.

        Rates are over all answers, with intervals that count each group once. The NLL is left out
        where no request has a reference.

        Args:
            labels: what the rows carry.
        """
        behaviour = self.behaviour
        asked_how = {"attack": "prefill" if behaviour.prefill else "none"}
        if self.judge:
            asked_how["judge"] = self.judge
        counted = {behaviour.wanted: behaviour.metric, **behaviour.side_metrics}
        groups = [example.cluster for example in self.answers]
        rows = Rows()
        for verdict, metric in counted.items():
            hits = [given == verdict for given in self.verdicts]
            rows += [Measurement.rate(metric, {**labels, **asked_how}, hits, groups)]

        has_reference = ~self.nll.isnan()
        if has_reference.any():
            pairs = zip(self.groups, has_reference.tolist(), strict=True)
            groups = [group for group, has in pairs if has]
            losses = self.nll[has_reference]
            rows += [Measurement.average(behaviour.nll_metric, labels, losses, groups)]
        return rows
