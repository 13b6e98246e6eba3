"""What a model still can: tasks of lm-evaluation-harness, on the bridge as it stands."""

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoTokenizer

from harmcircuits.hooks.gradients import frozen
from harmcircuits.measurements import Labels, Measurement, Rows, Z


def evaluate_tasks(
    bridge: TransformerBridge,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    include_path: str | Path | None = None,
    batch_size: int = 16,
    labels: Labels,
) -> Rows:
    """A row for each metric of each of these tasks of lm-evaluation-harness; within `masked`, of the edited model.

    A row's metric is "task_" and the harness's name for it (`task_acc`); its labels add `task` and, where the task has
    several, `filter`. Its mean is the harness's, its interval mean ± 1.96 standard errors, which may leave the metric's
    range; where the harness gives no standard error, low = mean = high and the label `interval` is "none". A group is a row
    beside its tasks. Prompts are put in no chat template. `limit`: the first so many examples of each task. `include_path`:
    a folder of further task files. The tokenizer is the stored one, so that the figure is that of the exported folder: the
    bridge's own puts a beginning before every text. The global seeds are set as the harness sets them. Raises ValueError
    where lm-eval is not installed, for no or unknown tasks, a limit below 1, and data that cannot be loaded.
    """
    manager = task_manager(tasks, include_path)
    if limit is not None and limit < 1:
        raise ValueError(f"evaluate_tasks: limit={limit}; expected at least 1, or None for all examples")
    wrap, evaluate = _harness("lm_eval.models.huggingface").HFLM, _harness("lm_eval").simple_evaluate
    tokenizer = AutoTokenizer.from_pretrained(bridge.tokenizer.name_or_path)
    with frozen(bridge):  # the harness turns dropout off for good
        model = wrap(pretrained=bridge.original_model, tokenizer=tokenizer, batch_size=batch_size)
        try:
            found = evaluate(model, tasks=list(tasks), limit=limit, task_manager=manager, log_samples=False)
        except OSError as error:
            raise ValueError(f"evaluate_tasks: the data of {list(tasks)} cannot be loaded ({error})") from None
    rows = Rows()
    for name, figures in found["results"].items():
        rows += _rows(name, figures, labels)
    return rows


def task_manager(tasks: Sequence[str], include_path: str | Path | None = None) -> Any:
    """The harness's `TaskManager`, which knows these tasks. Raises ValueError as `evaluate_tasks`, without loading data."""
    if not tasks or isinstance(tasks, str):
        raise ValueError(f"evaluate_tasks: tasks={tasks!r}; expected a list of one or more names of tasks")
    if include_path and not Path(include_path).is_dir():
        raise ValueError(f"evaluate_tasks: include_path={str(include_path)!r} is no folder; give one with task files")
    manager = _manager(str(include_path or ""))
    unknown = sorted(set(tasks) - set(manager.all_tasks))
    if unknown:
        raise ValueError(
            f"evaluate_tasks: the harness knows no task {', '.join(unknown)}; `lm-eval ls tasks` lists what it knows, "
            "and include_path (--tasks-from) adds a folder of your own"
        )
    return manager


@cache  # it reads thousands of files
def _manager(include_path: str) -> Any:
    return _harness("lm_eval.tasks").TaskManager(include_path=include_path or None)


def _harness(module: str) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"evaluate_tasks: lm-evaluation-harness is not installed ({error}); pip install 'harmcircuits[real]'"
        ) from None


def _rows(name: str, figures: dict[str, Any], labels: Labels) -> Rows:
    """The harness names a figure "acc,none" and its standard error "acc_stderr,none"; the latter may be "N/A"."""
    rows = []
    for key, mean in figures.items():
        metric, _, variant = key.partition(",")
        if metric.endswith("_stderr") or not isinstance(mean, int | float) or not variant:
            continue
        error = figures.get(f"{metric}_stderr,{variant}")
        has_error = isinstance(error, float)
        half = Z * error if has_error else 0.0
        more = {} if variant == "none" else {"filter": variant}
        more |= {} if has_error else {"interval": "none"}
        where = {**labels, "task": name, **more}
        rows.append(Measurement(f"task_{metric}", where, float(mean), mean - half, mean + half, figures["sample_len"]))
    return Rows(rows)
