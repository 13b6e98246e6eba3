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
        behaviour: the behaviour whose requests they are.
        answers: the requests with the model's own answers; the samples of a request follow each
            other.
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

    # Of three requests with two samples each, `answers` and `verdicts` hold six items and `nll` and
    # `groups` three:
    #
    #     answers     a 0   a 1  | b 0   b 1  | c 0   c 1
    #     is shown     x     .   |  x     x   |  .     .
    #     hits            .5     |     1      |     0

    @property
    def n_samples(self) -> int:
        """Answers to each request."""
        n_requests = max(1, len(self.nll))  # there is a loss, or NaN, for every request
        return max(1, len(self.verdicts) // n_requests)

    @property
    def hits(self) -> list[float]:
        """For each request the share of its answers that show the behaviour."""
        n_samples = self.n_samples
        is_shown = [verdict == self.behaviour.wanted for verdict in self.verdicts]
        shares = []
        for start in range(0, len(is_shown), n_samples):
            samples = is_shown[start : start + n_samples]
            shares.append(sum(samples) / n_samples)
        return shares

    @property
    def groups(self) -> list[str]:
        """What each request is about; intervals resample whole groups."""
        first_samples = self.answers.examples[:: self.n_samples]
        return [example.cluster for example in first_samples]

    def rows(self, labels: Labels) -> Rows:
        """The rate of the wanted verdict, the side metrics, and the NLL of references.

        Rates are over all answers, with intervals that count each group once. The NLL is left out
        where no request has a reference.

        Args:
            labels: what the rows carry.
        """
        behaviour = self.behaviour
        where = {**labels, "attack": "prefill" if behaviour.prefill else "none"}
        if self.judge:
            where["judge"] = self.judge

        # Rates count every answer, so a request's group occurs once for each of its samples.
        metrics = {behaviour.wanted: behaviour.metric, **behaviour.side_metrics}
        groups = [example.cluster for example in self.answers]
        rows = Rows()
        for counted, metric in metrics.items():
            hits = [verdict == counted for verdict in self.verdicts]
            rows += [Measurement.rate(metric, where, hits, groups)]

        # Losses count every request that has a reference once. Neither attack nor judge is a label
        # of theirs: a loss asks for no answer.
        has_reference = ~self.nll.isnan()
        if has_reference.any():
            groups = []
            for group, has in zip(self.groups, has_reference.tolist(), strict=True):
                if has:
                    groups.append(group)
            losses = self.nll[has_reference]
            rows += [Measurement.average(behaviour.nll_metric, labels, losses, groups)]
        return rows
