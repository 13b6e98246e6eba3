"""Abilities of a model: tasks of lm-evaluation-harness, on the bridge as it is."""

from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from harmcircuits.hooks.bridge import Bridge, HasBridge, as_bridge
from harmcircuits.hooks.gradients import frozen
from harmcircuits.measurements import Labels, Measurement, Rows, student_quantile


def evaluate_tasks(
    bridge: Bridge | HasBridge,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    include_path: str | Path | None = None,
    batch_size: int = 16,
    labels: Labels | None = None,
) -> Rows:
    """A row for each metric of each task; within `masked`, of the edited model.

    The metric of a row is "task_" and the harness's name (`task_acc`). Its labels add `task` and,
    where the task has several filters, `filter`. The mean is the harness's. The interval is
    Student's, from the harness's standard error, and may leave the metric's range; without a
    standard error low = mean = high, and the label `interval` is "none". A group of tasks has a row
    of its own beside those of its tasks.

    Prompts have no chat template. The tokenizer is read from its files, so that the figure equals
    that of the exported folder: the bridge's own tokenizer puts a beginning-of-text token before
    every text. The harness sets the global seeds.

    >>> hc.evaluate_tasks(model, ["lambada_openai"], limit=10)  # doctest: +SKIP
    Rows(2: task_perplexity, task_acc)

    Args:
        bridge: a TransformerBridge, or a `Model` with one.
        tasks: the harness's names of tasks or groups.
        limit: the number of examples of each task, from the first on; all by default.
        include_path: a folder with further task files.
        batch_size: the number of examples at once.
        labels: further labels of the rows.

    Raises:
        ValueError: lm-eval is not installed, or a task is unknown.
    """
    from transformers import AutoTokenizer

    bridge = as_bridge(bridge)
    manager = task_manager(tasks, include_path)
    wrap = _harness("lm_eval.models.huggingface").HFLM
    evaluate = _harness("lm_eval").simple_evaluate
    tokenizer = AutoTokenizer.from_pretrained(bridge.tokenizer.name_or_path)
    with frozen(bridge):  # the harness turns dropout off for good
        model = wrap(
            pretrained=bridge.original_model,
            tokenizer=tokenizer,
            batch_size=batch_size,
        )
        evaluation = evaluate(
            model,
            tasks=list(tasks),
            limit=limit,
            task_manager=manager,
            log_samples=False,
        )
    rows = Rows()
    for name, figures in evaluation["results"].items():
        rows += _rows(name, figures, labels or {})
    return rows


def task_manager(tasks: Sequence[str], include_path: str | Path | None = None) -> Any:
    """The harness's `TaskManager` with these tasks; it loads no data."""
    manager = _manager(str(include_path) if include_path else None)
    unknown = sorted(set(tasks) - set(manager.all_tasks))
    if unknown:
        raise ValueError(
            f"the harness knows no task {', '.join(unknown)}; `lm-eval ls tasks` lists its tasks, "
            "and include_path= adds a folder with further ones"
        )
    return manager


@cache  # reading thousands of files takes ten seconds
def _manager(include_path: str | None) -> Any:
    return _harness("lm_eval.tasks").TaskManager(include_path=include_path)


def _harness(module: str) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"lm-evaluation-harness is not installed ({error}); pip install 'harmcircuits[real]'"
        ) from None


def _rows(name: str, figures: Mapping[str, Any], labels: Labels) -> Rows:
    """The rows of one task."""
    rows = []
    for key, mean in figures.items():
        metric, _, variant = key.partition(",")
        is_figure = bool(variant) and isinstance(mean, int | float)
        if not is_figure or metric.endswith("_stderr"):
            continue
        where = {**labels, "task": name}
        if variant != "none":  # a way to find the answer in the text
            where["filter"] = variant
        # Groups of tasks and some metrics have no standard error.
        half, n = 0.0, figures["sample_len"]
        error = figures.get(f"{metric}_stderr,{variant}")
        if isinstance(error, float) and n > 1:
            half = student_quantile(n) * error
        else:
            where["interval"] = "none"
        mean = float(mean)
        rows.append(Measurement(f"task_{metric}", where, mean, mean - half, mean + half, n))
    return Rows(rows)
