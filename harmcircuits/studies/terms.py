"""What the rows of a study are called: which metric shows what, and what tables call it."""

from collections.abc import Iterable
from dataclasses import dataclass

from harmcircuits.behaviours.behaviour import DEGENERATE, Behaviour
from harmcircuits.behaviours.model import Model
from harmcircuits.behaviours.standard import CONTRAST, TARGET, standard_behaviours

CHANGES = {
    "plain_kl": "plain text KL",
    "perplexity": "perplexity",
    "predicted_loss_change": "predicted Δ",
    "measured_loss_change": "measured Δ",
}


@dataclass(frozen=True)
class Terms:
    """The behaviours of a study in their roles."""

    target: Behaviour
    contrast: Behaviour
    behaviours: tuple[Behaviour, ...]
    protected: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        model: Model,
        target: str = TARGET,
        contrast: str = CONTRAST,
        protected: Iterable[str] = (),
    ) -> "Terms":
        """Of a model's whole behaviours, and of the target and contrast, which may be parts."""
        # Each once, in the order in which tables show them.
        names = dict.fromkeys([target, *model.whole_behaviours, contrast])
        behaviours = tuple(model.behaviour(name) for name in names)
        # Rows are told apart by their metric alone, not by a behaviour.
        named: dict[str, str] = {}
        for behaviour in behaviours:
            for metric in (behaviour.metric, behaviour.nll_metric):
                other = named.setdefault(metric, behaviour.name)
                if other != behaviour.name:
                    raise ValueError(
                        f"{other!r} and {behaviour.name!r} share the metric {metric!r}; "
                        "give one of them a metric and nll_metric of its own (see Behaviour.only)"
                    )
        ends = (model.behaviour(target), model.behaviour(contrast))
        return cls(*ends, behaviours, tuple(protected))

    @classmethod
    def standard(cls, protected: Iterable[str] = ()) -> "Terms":
        """Of the package's own behaviours, for rows whose model is not at hand."""
        behaviours = standard_behaviours()
        ends = (behaviours[TARGET], behaviours[CONTRAST])
        return cls(*ends, tuple(behaviours.values()), tuple(protected))

    @property
    def kept(self) -> tuple[Behaviour, ...]:
        """What the removal of the target must leave alone: abilities, and all that is protected."""
        # Where the target is one type of harm, harm as a whole is lowered with it.
        removed = (self.target.name, self.target.part_of)
        named = (self.contrast.name, *self.protected)
        behaviours = []
        for behaviour in self.behaviours:
            is_kept = behaviour.is_kept or behaviour.name in named
            if is_kept and behaviour.name not in removed:
                behaviours.append(behaviour)
        return tuple(behaviours)

    @property
    def kept_rates(self) -> tuple[str, ...]:
        """The metrics of `kept`."""
        return tuple(behaviour.metric for behaviour in self.kept)

    @property
    def names(self) -> list[str]:
        """Names of the behaviours."""
        return [behaviour.name for behaviour in self.behaviours]

    @property
    def measured(self) -> list[str]:
        """Names of the behaviours that a mask is chosen by: the target and what is kept."""
        chosen_by = {behaviour.name for behaviour in self.kept}
        chosen_by.add(self.target.name)
        return [name for name in self.names if name in chosen_by]

    @property
    def metrics(self) -> dict[str, str]:
        """Behaviour -> the rate that shows it."""
        return {behaviour.name: behaviour.metric for behaviour in self.behaviours}

    @property
    def rates(self) -> dict[str, str]:
        """Rate -> title of its column."""
        titles = {}
        for behaviour in self.behaviours:
            titles[behaviour.metric] = behaviour.title
            if DEGENERATE in behaviour.side_metrics:
                titles[behaviour.side_metrics[DEGENERATE]] = DEGENERATE
            if behaviour.words_metric:
                titles[behaviour.words_metric] = "kept words"
            if behaviour.doubt_metric:
                titles[behaviour.doubt_metric] = "doubted"
        return titles

    @property
    def losses(self) -> dict[str, str]:
        """Loss or divergence -> title of its column."""
        roles = (self.target.name, self.contrast.name)
        titles = {}
        for behaviour in self.behaviours:
            if behaviour.is_loss_shown or behaviour.name in roles:
                titles[behaviour.nll_metric] = f"{behaviour.title} NLL"
        return {**titles, self.kl_metric: f"{self.contrast.title} KL", **CHANGES}

    @property
    def kl_metric(self) -> str:
        """Name of the divergence on the contrast's reference answers."""
        return f"{self.contrast.name}_kl"

    @property
    def twin(self) -> str:
        """What tables call the mask of the same search with the contrast as the target."""
        return f"{self.contrast.name} twin"
