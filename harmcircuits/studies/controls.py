"""Masks of the same size that a circuit must beat."""

from collections.abc import Iterable, Mapping, Sequence

from harmcircuits.behaviours.model import OTHERS, Calibration, Model
from harmcircuits.behaviours.standard import CONTRAST
from harmcircuits.circuits.masks import Scope, WeightMask, random_like, top_fraction, union
from harmcircuits.circuits.scores import WeightScores
from harmcircuits.display import plural
from harmcircuits.hooks.attribution import removal_effect
from harmcircuits.hooks.weights import named_weights
from harmcircuits.studies.rounds import PROTECT_SHARE, protected_weights, prune_in_rounds


class Controls(dict[str, list[WeightMask]]):
    """Control masks by name; `searched` names those that are searches of their own."""

    def __init__(self, masks: Mapping[str, list[WeightMask]], searched: tuple[str, ...]) -> None:
        super().__init__(masks)
        self.searched = searched

    def __repr__(self) -> str:
        names = []
        for name, masks in self.items():
            searched = ", a search of its own" if name in self.searched else ""
            names.append(f"{name} ({plural(len(masks), 'mask')}{searched})")
        return f"Controls({', '.join(names)})"


def controls(
    model: Model,
    target: str,
    mask: WeightMask,
    *,
    protect: str | Iterable[str] = OTHERS,
    contrast: str = CONTRAST,
    protect_share: float | None = None,
    rounds: int | None = None,
    n_random: int = 3,
    seed: int = 0,
    calibrations: Mapping[str, Calibration] | None = None,
    first: tuple[WeightScores, Sequence[WeightMask]] | None = None,
    max_memory: int | None = None,
) -> Controls:
    """Masks of the size of a circuit that are chosen otherwise, by name.

    "random": as many weights in each matrix; "random magnitude": and of like magnitude; "opposite
    sign": weights whose removal should lower the loss; "second slice": the next in the ranking;
    "benign twin" (or another contrast's): the same search for the contrast instead, with the target
    protected. The last is a search of its own; `find_circuit` may give it fewer weights.

    >>> mask = model.find_circuit("harmful", protect="benign", size=0.001, steps=2)
    >>> hc.controls(model, "harmful", mask, protect="benign", n_random=2)
    Controls(random (2 masks), random magnitude (2 masks), opposite sign (1 mask),
        second slice (1 mask), benign twin (1 mask, a search of its own))

    Args:
        model: the model, unpruned.
        target: the behaviour that the mask was found for.
        mask: its circuit.
        protect: as in `Model.find_circuit`.
        contrast: the behaviour of the twin; without it, or where it is the target, there is none.
        protect_share: as in `Model.find_circuit`; the mask's own by default.
        rounds: finds the twin in so many rounds. By default it is found as the mask was: by
            `find_circuit` with the mask's settings, or in the mask's own rounds.
        n_random: masks of each random kind.
        seed: of the first random mask; the others follow.
        calibrations: data to score on, where it is there already.
        first: the target's scores and the protected weights, where they are known already.
        max_memory: bytes for accumulated scores.

    Raises:
        ValueError: as `Model.find_circuit`.
    """
    made_by = mask.source.settings
    within: Scope = made_by.get("within", "model")
    is_by_walk = "reach" in made_by and rounds is None
    if protect_share is None:
        protect_share = float(made_by.get("protect_share", PROTECT_SHARE))
    if rounds is None:
        rounds = int(made_by.get("round", 1))

    protected = model.protected(target, protect, calibrations)
    data = (calibrations or {}).get(target) or model.calibration(target)
    if first is None:
        first = _scored(model, target, data, protected, protect_share, within, max_memory)
    seeds = range(seed, seed + n_random)
    masks = _without_search(model, mask, *first, seeds, within)

    twin = _twin_data(model, target, contrast, protected, calibrations)
    if twin is None:
        return Controls(masks, ())
    spared = {name: other for name, other in protected.items() if name != contrast}
    spared[target] = data
    if is_by_walk:
        circuit = _twin_by_walk(model, contrast, twin, spared, mask, max_memory)
    else:
        circuit = prune_in_rounds(
            model.bridge,
            twin.batches,
            [other.batches for other in spared.values()],
            size=mask.fraction,
            protect_share=protect_share,
            rounds=rounds,
            within=within,
            objective=model.behaviour(contrast).objective,
            max_memory=max_memory,
        )
    name = f"{contrast} twin"
    return Controls({**masks, name: [circuit]}, (name,))


def _twin_by_walk(
    model: Model,
    contrast: str,
    twin: Calibration,
    spared: Mapping[str, Calibration],
    mask: WeightMask,
    max_memory: int | None,
) -> WeightMask:
    """The search of `find_circuit` for the contrast, with the settings of the mask's own."""
    made_by = mask.source.settings
    budget = {name: value for name, value in made_by["budget"].items() if name in spared}
    return model.find_circuit(
        contrast,
        size=mask.fraction,
        protect=list(spared),
        budget=budget,
        steps=made_by["steps"],
        reach=made_by["reach"],
        unit=made_by.get("unit", "weight"),
        layers=made_by.get("layers"),
        kinds=made_by.get("kinds"),
        renew=made_by["renewed"],
        calibrations={**spared, contrast: twin},
        max_memory=max_memory,
    )


def _scored(
    model: Model,
    target: str,
    data: Calibration,
    protected: Mapping[str, Calibration],
    protect_share: float,
    within: Scope,
    max_memory: int | None,
) -> tuple[WeightScores, list[WeightMask]]:
    """The target's scores on the unpruned model, and the weights that each behaviour keeps."""
    bridge, taken = model.bridge, []
    for spared in protected.values():
        kept = protected_weights(bridge, spared.batches, protect_share, within, max_memory)
        taken.append(kept)
    objective = model.behaviour(target).objective
    scores = removal_effect(bridge, data.batches, objective, max_memory=max_memory)
    return scores, taken


def _without_search(
    model: Model,
    mask: WeightMask,
    scores: WeightScores,
    taken: Sequence[WeightMask],
    seeds: Iterable[int],
    within: Scope,
) -> dict[str, list[WeightMask]]:
    """The controls that are drawn or ranked only: random ones, the opposite sign, what follows."""
    weights = named_weights(model.bridge)
    size = mask.fraction
    opposite = top_fraction(-scores, size, within=within, exclude=union(taken))
    following = top_fraction(scores, size, within=within, exclude=union([*taken, mask]))
    return {
        "random": [random_like(mask, seed=number) for number in seeds],
        "random magnitude": [random_like(mask, seed=number, weights=weights) for number in seeds],
        "opposite sign": [opposite],
        "second slice": [following],
    }


def _twin_data(
    model: Model,
    target: str,
    contrast: str,
    protected: Mapping[str, Calibration],
    calibrations: Mapping[str, Calibration] | None,
) -> Calibration | None:
    """The contrast's calibration data; None where it is the target, unknown or not shown."""
    if contrast == target:
        return None
    known = {**protected, **(calibrations or {})}
    if contrast in known or calibrations is not None:
        return known.get(contrast)
    names = [contrast] if contrast in model.behaviours else []
    return model.calibrations(names).get(contrast)
