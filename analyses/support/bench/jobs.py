"""The jobs of the search bench: every model, part of its answers and method in turn."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from itertools import product

from support.bench.cases import PARTS, opened, tuning
from support.bench.methods import WAYS, Method
from support.jobs import Job
from support.models import ModelSpec

from harmcircuits.display import nearest
from harmcircuits.measurements import Labels, Rows


def bench_jobs(
    models: Iterable[ModelSpec],
    parts: Sequence[str],
    names: Sequence[str],
    methods: Mapping[str, Method],
    sizes: Sequence[float],
    split: str = "heldout",
) -> list[Job]:
    """A job for each model, part of its answers, and method."""
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
    """What the edits of a method do, found on a part of the answers."""
    return opened(spec, part, split).searched(method, sizes, labels)


def tuning_jobs(names: Sequence[str], sizes: Sequence[float]) -> list[Job]:
    """A job for every setting of the methods that have others than the published one."""
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
