"""The jobs of the search bench: every model, part of its answers and method in turn."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from itertools import product

from harmcircuits.display import nearest
from harmcircuits.measurements import Labels, Rows
from harmcircuits.studies.bench.cases import PARTS, opened, tuning
from harmcircuits.studies.bench.methods import WAYS, Method
from harmcircuits.studies.jobs import Job
from harmcircuits.studies.models import ModelSpec


def bench_jobs(
    models: Iterable[ModelSpec],
    parts: Sequence[str],
    names: Sequence[str],
    methods: Mapping[str, Method],
    sizes: Sequence[float],
    split: str = "heldout",
) -> list[Job]:
    """A job for each model, part of its answers, and method.

    Args:
        models: the models.
        parts: of their answers, among `PARTS`.
        names: of the methods; all of them if there is none.
        methods: every method, by name.
        sizes: shares of the weights.
        split: on which edits are measured.

    Raises:
        ValueError: an unknown part or method, naming the nearest.
    """
    _check("part", parts, PARTS)
    _check("method", names, methods)
    jobs = []
    for spec, part, name in product(models, parts, names or methods):
        labels = {**spec.labels, "part": part, "method": name}
        run = partial(measured, spec, part, methods[name], sizes, split, labels)
        jobs.append(Job(labels, run))
    return jobs


def measured(
    spec: ModelSpec, part: str, method: Method, sizes: Sequence[float], split: str, labels: Labels
) -> Rows:
    """What the edits of a method do, found on a part of the answers.

    Args:
        spec: opens the model.
        part: of its answers.
        method: gives the edits.
        sizes: shares of the weights.
        split: on which edits are measured.
        labels: what the rows carry.
    """
    return opened(spec, part, split).searched(method, sizes, labels)


def tuning_jobs(names: Sequence[str], sizes: Sequence[float]) -> list[Job]:
    """A job for every setting of the methods that have others than the published one.

    Args:
        names: of the methods; all of them if there is none.
        sizes: shares of the weights.
    """
    _check("method", names, WAYS)
    jobs = []
    for name in names or WAYS:
        n_tried = len(WAYS[name].tried)
        for number in range(1 + n_tried) if n_tried else ():
            labels = {"way": name, "number": number}
            jobs.append(Job(labels, partial(tuning, name, number, sizes, labels)))
    return jobs


def _check(option: str, given: Iterable[str], known: Collection[str]) -> None:
    for name in given:
        if name not in known:
            raise ValueError(f"--{option} {name!r}; {nearest(name, known)}")
