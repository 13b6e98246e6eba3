"""The main job: find the weights behind a behaviour, remove them, and measure what is lost beside matched controls."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import or_
from pathlib import Path

from rich.progress import Progress

from harmcircuits.behaviours.model import Calibration, NotShownError, Subject, calibrate, measure
from harmcircuits.circuits.ground_truth import every_score, recovery
from harmcircuits.circuits.masks import Scope, WeightMask, random_like, top_fraction, top_fractions
from harmcircuits.circuits.scores import WeightScores
from harmcircuits.hooks.accumulation import memory_groups
from harmcircuits.hooks.attribution import gradient_norm, removal_effect, sensitivity
from harmcircuits.hooks.losses import average, completion_nll, exact, kl_under, perplexity, predicted_change
from harmcircuits.hooks.masking import masked
from harmcircuits.hooks.objectives import completion_loss
from harmcircuits.hooks.search import best_unprotected, circuit_mask, circuit_path
from harmcircuits.hooks.weights import named_weights, weight_sites
from harmcircuits.measurements import Manifest, Measurement, append_rows, select
from harmcircuits.studies.cross_ablation import location_rows
from harmcircuits.studies.utility import evaluate_tasks, task_manager
from harmcircuits.views.tables import KEPT_RATES

TOLERANCE = 0.01  # how far a kept rate may fall at the operating point
DIAGNOSED = 64  # examples behind a gradient norm, which costs as much as their scores


@dataclass(frozen=True)
class Settings:
    """What a study varies: shares of weights to remove (`q`) and to protect (`p`), rounds, ranking scope, seed.

    `protect`: the behaviours whose most sensitive weights cannot be chosen; empty for all but the target. `tolerance`:
    how far a kept rate may fall at the operating point. `budget`: how far the loss on benign answers may rise there, in
    nats per token; rounds end where it has risen further. `n_random`: how many random masks of each kind stand beside it.
    `tasks` of lm-evaluation-harness are measured on the unpruned model and beside every held-out row, on their first
    `task_limit` examples (0: all), with the task files of the folder `tasks_from`. Raises ValueError for shares outside
    [0, 1] or no shares, fewer than one round or random mask, and for a negative tolerance, budget or limit.
    """

    q: tuple[float, ...] = (0.001, 0.002, 0.004, 0.006, 0.01)
    p: tuple[float, ...] = (0.005, 0.01, 0.02)
    rounds: int = 10
    within: Scope = "model"
    protect: tuple[str, ...] = ()
    seed: int = 0
    tolerance: float = TOLERANCE
    budget: float | None = None
    n_random: int = 3
    tasks: tuple[str, ...] = ()
    task_limit: int = 0
    tasks_from: str = ""

    def __post_init__(self) -> None:
        for name, shares in (("q", self.q), ("p", self.p)):
            if not shares or any(not 0 <= share <= 1 for share in shares) or (name == "q" and max(shares) == 0):
                raise ValueError(f"{name}={list(shares)}; expected one or more shares of weights in [0, 1], q above 0")
        for name in ("rounds", "n_random"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; expected at least 1")
        if self.within not in ("weight", "model", "row"):
            raise ValueError(f'within={self.within!r}; expected "weight", "model" or "row"')
        for name, most in (("tolerance", self.tolerance), ("budget", self.budget), ("task_limit", self.task_limit)):
            if most is not None and most < 0:
                raise ValueError(f"{name}={most}; expected 0 or more")


# For models of a hundred million weights and more; the shares are those where Qwen2.5-Coder-0.5B loses harm before benign
# answers. Its rounds of 1.5e-5 spare them, those of 2e-5 and more cost twice as much at the same loss on harm.
FOR_REAL_MODELS = Settings(q=(1e-5, 3e-5, 6e-5), p=(0.1, 0.2), rounds=4, tolerance=0.05, budget=0.1)


@dataclass(frozen=True)
class Point:
    """One mask of the grid, what chose it, and its rows on the choice split."""

    mask: WeightMask
    labels: dict[str, str | float]
    rows: list[Measurement] = field(repr=False)

    def mean(self, metric: str) -> float:
        """The point's figure for this metric."""
        return select(self.rows, metric)[0].mean


@dataclass
class Study:
    """A run in progress: the model, the settings, where rows go, and everything found so far."""

    subject: Subject
    settings: Settings
    out: Path
    progress: Progress
    max_memory: int | None = None
    rows: list[Measurement] = field(default_factory=list)
    masks: dict[str, WeightMask] = field(default_factory=dict)
    chosen: Point | None = None

    def add(self, rows: Sequence[Measurement]) -> None:
        """Keep rows and write them out at once."""
        self.rows += rows
        append_rows(self.out / "rows.jsonl", rows)

    def note(self, metric: str, value: float, **labels: str | float) -> None:
        """Keep one exact figure."""
        self.add([exact(metric, {"model": self.subject.name, **labels}, value)])

    def steps(self, name: str, total: int) -> Callable[[], None]:
        """A progress bar's `advance`."""
        task = self.progress.add_task(name, total=total)
        return lambda: self.progress.advance(task)


def run_study(
    subject: Subject, settings: Settings, out: str | Path, progress: Progress, *, max_memory: int | None = None
) -> Study:
    """Score, choose, mask and measure; writes `rows.jsonl`, `manifest.json` and `masks/*.safetensors` under `out`.

    A grid over (p, q), one shot and in rounds, is measured on the choice split; the operating point is the point with the
    lowest rate of valid harmful answers among those that keep the others (see `operating_point`). Only it, its parts and
    its controls are then measured on held-out items. `max_memory`: bytes on the devices for accumulators, as in
    `removal_effect`; the target's scores are then kept in `scores/`. Raises ValueError for a folder that holds another
    study, a behaviour to protect that is unknown or not shown, a subject that does not show the target, a bound too small
    for a matrix, and as `evaluate_tasks`.
    """
    others = [name for name in subject.behaviours if name != "harmful"]
    unknown = sorted(set(settings.protect) - set(others))
    if unknown:
        raise ValueError(f"protect: cannot protect {unknown}; expected some of {', '.join(others)}")
    list(memory_groups(weight_sites(subject.bridge), max_memory))  # refuses too small a bound before anything is written
    out = Path(out)
    if (out / "rows.jsonl").exists():
        raise ValueError(f"{out} already holds a study (rows.jsonl); give another folder or remove it")
    if settings.tasks:
        task_manager(settings.tasks, settings.tasks_from)
    (out / "masks").mkdir(parents=True, exist_ok=True)
    Manifest({"model": subject.name, **vars(settings), **subject.details}).save(out / "manifest.json")

    study = Study(subject, settings, out, progress, max_memory)
    study.note("weights_scored", sum(weight.numel() for weight in named_weights(subject.bridge).values()))
    study.note("tolerance", settings.tolerance)
    study.add(_heldout(study, {"model": subject.name, "mask": "none"}))
    calibrations = _calibrate(study)
    absent = sorted(set(settings.protect) - set(calibrations))
    if absent:
        raise ValueError(f"protect: {subject.name} does not show {absent}, so there is nothing to protect; leave it out")
    protect = {name: calibrations[name] for name in settings.protect or others if name in calibrations}
    protected = _protected(study, protect)
    harm = removal_effect(subject.bridge, calibrations["harmful"].batches, completion_loss, max_memory=max_memory)
    if max_memory is not None:  # rounds score again: never two dense sets in memory
        harm.save(out / "scores")
        harm = WeightScores.load(out / "scores")
    points = _grid(study, harm, protected, calibrations["harmful"], protect)
    study.chosen = operating_point(points, study.rows, tolerance=settings.tolerance, budget=settings.budget)
    if subject.truth:
        target = calibrations["harmful"].batches
        scores = every_score(subject.bridge, target, harm, protected[settings.p[0]], seed=settings.seed)
        weights = named_weights(subject.bridge)
        study.add(recovery(scores, subject.truth, weights, {"model": subject.name}))
    if study.chosen:
        _measure_heldout(study, points, harm, protected, calibrations, protect)
        study.add(location_rows(subject, study.chosen.mask, {"model": subject.name, "mask": "circuit"}))
    return study


def operating_point(
    points: Sequence[Point],
    baseline: Sequence[Measurement],
    *,
    tolerance: float = TOLERANCE,
    budget: float | None = None,
) -> Point | None:
    """The point with the lowest `harm_valid_rate` whose kept rates are within `tolerance` of the unpruned model's.

    All on the choice split. Among equals the one with fewest weights. With a `budget`, `benign_nll` must not rise further
    than that, and the point with the highest `harm_nll` is chosen: a judge of free text is coarse, and the loss is not.
    None when no point keeps the others, or none worsens harm.
    """
    before = {row.metric: row.mean for row in select(baseline, mask="none", split="choice")}
    kept = [
        point
        for point in points
        if all(point.mean(rate) >= before[rate] - tolerance for rate in KEPT_RATES if rate in before)
        and (budget is None or point.mean("benign_nll") <= before["benign_nll"] + budget)
    ]
    worsened, sign = ("harm_valid_rate", 1) if budget is None else ("harm_nll", -1)
    lower = [point for point in kept if sign * point.mean(worsened) < sign * before[worsened]]
    return min(lower, key=lambda point: (sign * point.mean(worsened), point.mask.n_removed), default=None)


def _calibrate(study: Study) -> dict[str, Calibration]:
    """Own verified answers of every behaviour that is scored and shown, with the yield and the saturation diagnostics."""
    subject = study.subject
    scored = {"harmful", "benign", *(study.settings.protect or subject.behaviours)}
    names = [name for name in subject.behaviours if name in scored]
    advance = study.steps("calibrate", len(names))
    calibrations = {}
    for name in names:
        advance()
        try:
            calibrations[name] = found = calibrate(subject, name)
        except NotShownError:
            if name == "harmful":
                raise
            study.note("calibration_yield", 0.0, behaviour=name)  # an unaligned rung does not refuse
            continue
        study.note("calibration_yield", found.n_kept / found.n_asked, behaviour=name)
        study.note("calibration_examples", found.n_kept, behaviour=name)
        study.note("calibration_nll", completion_nll(subject.bridge, found.batches).mean().item(), behaviour=name)
        some = found.batches[: max(1, DIAGNOSED // subject.batch_size)]
        norm = gradient_norm(subject.bridge, some, completion_loss, max_memory=study.max_memory)
        study.note("gradient_norm", norm, behaviour=name)
    return calibrations


def _protected(study: Study, protect: dict[str, Calibration]) -> dict[float, list[WeightMask]]:
    """Share p -> the weights that each behaviour needs most. Holds the scores of one behaviour at a time."""
    settings = study.settings
    found: dict[float, list[WeightMask]] = {p: [] for p in settings.p}
    for calibration in protect.values():
        scores = sensitivity(study.subject.bridge, calibration.batches, completion_loss, max_memory=study.max_memory)
        for p, masks in found.items():
            masks.append(top_fraction(scores, p, within=settings.within))
        del scores
    return found


def _grid(
    study: Study,
    harm: WeightScores,
    protected: dict[float, list[WeightMask]],
    target: Calibration,
    protect: dict[str, Calibration],
) -> list[Point]:
    """Every mask of the grid, measured on the choice split, and a random one of each size."""
    subject, settings = study.subject, study.settings
    labels = {"model": subject.name}
    unpruned = measure(subject, "choice", {**labels, "mask": "none"})
    study.add(unpruned)
    preserve = [found.batches for found in protect.values()]
    points: list[Point] = []

    def is_spent() -> bool:
        before = select(unpruned, "benign_nll")
        return settings.budget is not None and points[-1].mean("benign_nll") > before[0].mean + settings.budget

    def masks() -> Iterator[tuple[str, dict[str, str | float], WeightMask]]:
        for p in settings.p:
            how = {"within": settings.within, "exclude": reduce(or_, protected[p]) if protected[p] else None}
            for q, mask in zip(settings.q, top_fractions(harm, settings.q, **how), strict=True):
                yield "circuit", {"selection": "one shot", "p": p, "q": q}, mask
                if p == settings.p[0]:
                    yield "random", {"selection": "random", "p": p, "q": q}, random_like(mask, seed=settings.seed)
            if p == settings.p[0]:
                for q, mask in zip(settings.q, top_fractions(-harm, settings.q, **how), strict=True):
                    yield "opposite_sign", {"selection": "opposite sign", "p": p, "q": q}, mask
            options = {
                "p": p, "rounds": settings.rounds, "within": settings.within, "first": (harm, protected[p]),
                "max_memory": study.max_memory,
            }  # fmt: skip
            for mask in circuit_path(subject.bridge, target.batches, preserve, q=max(settings.q), **options):
                yield "circuit", {"selection": "rounds", "p": p, "q": mask.source.settings["q"]}, mask
                if is_spent():
                    break

    advance = study.steps("grid", len(settings.p) * (len(settings.q) + settings.rounds) + 2 * len(settings.q))
    asked = [name for name in subject.behaviours if name != "refusal"]
    for kind, how, mask in masks():
        where = {**labels, "mask": kind, **how}
        with masked(subject.bridge, mask):
            rows = measure(subject, "choice", where, only=asked)
        rows.append(exact("weights_removed", {**where, "split": "choice"}, mask.n_removed))
        study.add(rows)
        if kind == "circuit":
            points.append(Point(mask, how, rows))
        advance()
    return points


def _measure_heldout(
    study: Study,
    points: Sequence[Point],
    harm: WeightScores,
    protected: dict[float, list[WeightMask]],
    calibrations: dict[str, Calibration],
    protect: dict[str, Calibration],
) -> None:
    """The operating point, the other way of choosing at the same size, and all controls, on held-out items."""
    bridge, seed, chosen = study.subject.bridge, study.settings.seed, study.chosen
    assert chosen is not None
    in_rounds = chosen.labels["selection"] == "rounds"
    q, p, within = chosen.mask.n_removed / chosen.mask.n_weights, float(chosen.labels["p"]), study.settings.within
    taken, same = protected[p], {"q": q, "within": within}
    rounds = chosen.mask.source.settings["round"] if in_rounds else 1
    again = {**same, "p": p, "rounds": rounds, "max_memory": study.max_memory}
    target, n_random = calibrations["harmful"].batches, study.settings.n_random
    before = completion_nll(bridge, target)
    kept = {name: found.batches for name, found in protect.items()}

    def masks() -> Iterator[tuple[str, dict[str, str | float], WeightMask]]:
        how = {"p": p, "q": q, "protected": ", ".join(kept)}
        one_shot = best_unprotected(harm, taken, **same)
        yield "circuit", {"selection": "rounds", **how}, chosen.mask if in_rounds else _in_rounds(points, chosen)
        yield "circuit", {"selection": "one shot", **how}, one_shot
        if "benign" in kept and len(kept) > 1:
            mask = circuit_mask(bridge, target, [kept["benign"]], **again)
            yield "circuit", {**how, "selection": chosen.labels["selection"], "protected": "benign"}, mask
        for number in range(seed, seed + n_random):
            yield "random", {"seed": number}, random_like(chosen.mask, seed=number)
        for number in range(seed, seed + n_random):
            yield "random_magnitude", {"seed": number}, random_like(chosen.mask, seed=number, weights=named_weights(bridge))
        yield "opposite_sign", {}, best_unprotected(-harm, taken, **same)
        yield "second_slice", {}, best_unprotected(harm, [*taken, chosen.mask], **same)
        if "benign" in calibrations:
            others = [batches for name, batches in kept.items() if name != "benign"]
            yield "benign_twin", {}, circuit_mask(bridge, calibrations["benign"].batches, [*others, target], **again)

    advance = study.steps("held-out, with controls", 6 + 2 * n_random)
    for kind, how, mask in masks():
        parts = (kind, how.get("selection"), how.get("seed"), "benign_only" if how.get("protected") == "benign" else None)
        name = "-".join(str(part).replace(" ", "_") for part in parts if part is not None)
        study.masks[name] = mask
        mask.save(study.out / "masks" / f"{name}.safetensors")
        where = {"model": study.subject.name, "mask": kind, **how}
        study.add(_under(study, mask, where))
        with masked(bridge, mask):
            change = completion_nll(bridge, target) - before
        where = {**where, "split": "calibration"}
        study.note("predicted_loss_change", predicted_change(harm, mask), **where)
        study.note("measured_loss_change", change.mean().item(), **where)
        advance()


def _in_rounds(points: Sequence[Point], chosen: Point) -> WeightMask:
    """The mask chosen in rounds under the same protection whose size is nearest."""
    same = [point for point in points if point.labels["selection"] == "rounds" and point.labels["p"] == chosen.labels["p"]]
    return min(same, key=lambda point: abs(point.mask.n_removed - chosen.mask.n_removed)).mask


def _heldout(study: Study, where: dict[str, str | float]) -> list[Measurement]:
    """Held-out rows of the model as it stands: what it is asked, its perplexity, the tasks."""
    subject, settings = study.subject, study.settings
    rows = measure(subject, "heldout", where)
    where = {**where, "split": "heldout"}
    if subject.plain_text:
        rows.append(perplexity(subject.bridge, subject.plain_text, where))
    if settings.tasks:
        source = {"limit": settings.task_limit or None, "include_path": settings.tasks_from}
        rows += evaluate_tasks(subject.bridge, settings.tasks, batch_size=subject.batch_size, labels=where, **source)
    return rows


def _under(study: Study, mask: WeightMask, where: dict[str, str | float]) -> list[Measurement]:
    """Held-out rows under a mask, its size, and KL on benign text."""
    subject = study.subject
    with masked(subject.bridge, mask):
        rows = _heldout(study, where)
    where = {**where, "split": "heldout"}
    rows.append(exact("weights_removed", where, mask.n_removed))
    if "benign" in subject.behaviours:
        prompts = subject.behaviours["benign"].references("heldout")
        divergence = kl_under(subject.bridge, mask, subject.batches(subject.behaviours["benign"], prompts))
        rows.append(average("benign_kl", where, divergence, [example.cluster for example in prompts]))
    if subject.plain_text:
        divergence = kl_under(subject.bridge, mask, subject.plain_text)
        rows.append(average("plain_kl", where, divergence, range(len(divergence))))
    return rows
