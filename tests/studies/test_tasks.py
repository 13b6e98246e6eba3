"""Tasks of lm-evaluation-harness under a mask, on a task file and examples of invented words.

Would catch: the unedited model measured under a mask, a model or tokenizer left changed, another
tokenizer than that of the exported folder, an interval that is not the harness's, a task that is
silently left out.
"""

import json
import sys
from dataclasses import replace
from functools import partial

import pytest
from helpers import asked_few
from scipy.stats import t as student
from support.organisms.train import new_tokenizer

from harmcircuits.circuits.masks import top_fraction
from harmcircuits.export import export
from harmcircuits.hooks.masking import masked
from harmcircuits.organisms import world
from harmcircuits.organisms.shipped import open_organism
from harmcircuits.search.attribution import random_scores
from harmcircuits.studies import tasks
from harmcircuits.studies.run import Study
from harmcircuits.studies.settings import StudySettings
from harmcircuits.studies.study import _masked_rows
from harmcircuits.studies.tasks import evaluate_tasks

TASK = """
task: NAME
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}, cache_dir: CACHE}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
N = 60


@pytest.fixture(scope="module")
def bridge(open_model):
    """A small model with the organisms' vocabulary, and dropout."""
    return open_model("GPT2", vocab_size=len(new_tokenizer()), tie_word_embeddings=True)


@pytest.fixture(scope="module")
def tasks_from(tmp_path_factory):
    """A folder with the task `items`: which of two pairs of items is in a question."""
    pytest.importorskip("lm_eval", reason="pip install 'harmcircuits[real]'")
    tmp_path = tmp_path_factory.mktemp("tasks")
    items = [item.name for item in world.world().items.values()]
    examples = []
    for i in range(N):
        choices = [f"{items[i]} {items[i + 1]}", f"{items[i + 2]} {items[i + 3]}"]
        question = {"question": f"what is {items[i]} ?", "choices": choices}
        examples.append({**question, "label": int(i < 20)})
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, examples)))
    text = TASK.replace("NAME", "items").replace("FILE", str(tmp_path / "items.jsonl"))
    (tmp_path / "items.yaml").write_text(text.replace("CACHE", str(tmp_path / "cache")))
    return tmp_path


def test_the_edited_model_is_measured_and_restored(bridge, tasks_from, tmp_path):
    """As the harness measures the exported folder."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    options = {"include_path": tasks_from, "batch_size": 7, "labels": {"mask": "x"}}
    mask = top_fraction(random_scores(bridge), 0.3)
    tokens = bridge.tokenizer("what is it ?").input_ids
    [before] = rows = evaluate_tasks(bridge, ["items"], **options)
    with masked(bridge, mask):
        bridge.original_model.train()  # with dropout
        [under] = evaluate_tasks(bridge, ["items"], **options)
        [single] = evaluate_tasks(bridge, ["items"], limit=1, **options)
    assert all(module.training for module in bridge.original_model.modules())
    bridge.original_model.eval()
    assert bridge.tokenizer("what is it ?").input_ids == tokens
    assert evaluate_tasks(bridge, ["items"], **options) == rows

    folder = str(export(bridge, mask, tmp_path / "out"))
    saved = HFLM(pretrained=folder, device="cpu", dtype="float32")
    manager = tasks.task_manager(["items"], tasks_from)
    again = simple_evaluate(saved, tasks=["items"], task_manager=manager)
    share = again["results"]["items"]["acc,none"]
    assert under.mean == share != before.mean
    # The standard error of a mean of N numbers, from their sample variance.
    half = student.ppf(0.975, N - 1) * (share * (1 - share) / (N - 1)) ** 0.5
    assert (under.low, under.high) == pytest.approx((share - half, share + half))
    expected = ("task_acc", {"mask": "x", "task": "items"}, N)
    assert (under.metric, under.labels, under.n) == expected
    assert single.is_exact and single.labels["interval"] == "none", "one has no standard error"


def test_a_study_measures_them_under_each_mask(bridge, tasks_from, monkeypatch):
    measured = partial(evaluate_tasks, include_path=tasks_from)
    monkeypatch.setattr("harmcircuits.studies.study.evaluate_tasks", measured)
    model = asked_few(replace(open_organism("sft"), bridge=bridge), first=4)
    run = Study(model, StudySettings(tasks={"items": 20}))
    mask = top_fraction(random_scores(bridge), 0.3)
    under = _masked_rows(run, mask, {"mask": "random"}).one("task_acc")
    assert under.n == 20
    assert under.labels == {"mask": "random", "split": "heldout", "task": "items"}


def test_what_cannot_be_measured_is_refused(bridge, tasks_from, monkeypatch):
    with pytest.raises(ValueError, match="knows no task zzx"):
        evaluate_tasks(bridge, ["zzx", "items"], include_path=tasks_from)
    tasks._manager.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=r"is not installed .*pip install 'harmcircuits\[real\]'"):
        evaluate_tasks(bridge, ["items"])
