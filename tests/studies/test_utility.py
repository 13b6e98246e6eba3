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
import torch
from helpers import asked_few
from scipy.stats import t as student
from support.organisms.train import new_tokenizer
from transformers import AutoTokenizer

from harmcircuits.circuits.masks import top_fraction
from harmcircuits.export import export
from harmcircuits.hooks.attribution import random_scores
from harmcircuits.hooks.masking import masked
from harmcircuits.hooks.weights import weights_digest
from harmcircuits.measurements import Rows
from harmcircuits.organisms import open_organism, world
from harmcircuits.studies import utility
from harmcircuits.studies.run import Study
from harmcircuits.studies.settings import StudySettings
from harmcircuits.studies.study import _heldout_rows, _masked_rows, study
from harmcircuits.studies.utility import evaluate_tasks

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
MODELS, N = ("Llama", "GPT2"), 60


@pytest.fixture(scope="module")
def open_reader(open_model):
    """open_reader("Llama") -> a small model with the organisms' vocabulary."""
    n_words = len(new_tokenizer())
    return lambda name: open_model(name, vocab_size=n_words, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def examples(open_reader) -> dict[str, list[dict]]:
    """For each model two pairs of items a question; what the model chooses unmasked is right."""
    items = [item.name for item in world.world().items.values()]
    questions = []
    for i in range(N):
        choices = [f"{items[i]} {items[i + 1]}", f"{items[i + 2]} {items[i + 3]}"]
        questions.append({"question": f"what is {items[i]} ?", "choices": choices})
    labelled = {}
    for name in MODELS:
        right = chosen(open_reader(name), questions)
        pairs = zip(questions, right, strict=True)
        labelled[name] = [{**question, "label": label} for question, label in pairs]
    return labelled


@pytest.fixture(scope="module")
def tasks_from(tmp_path_factory, examples):
    """A folder with a task of each model's name, and `absent`, whose data are not there."""
    reason = "lm-eval is not installed (pip install 'harmcircuits[real]')"
    pytest.importorskip("lm_eval", reason=reason)
    folder = tmp_path_factory.mktemp("tasks")
    for name in (*MODELS, "absent"):
        file = folder / f"{name}.jsonl"
        if name in examples:
            file.write_text("\n".join(map(json.dumps, examples[name])))
        text = TASK.replace("NAME", name).replace("FILE", str(file))
        (folder / f"{name}.yaml").write_text(text.replace("CACHE", str(folder / "cache")))
    return folder


def chosen(bridge, examples) -> list[int]:
    """The choice with the larger sum of log-probabilities, an example at a time.

    As the folder's tokenizer reads it.
    """
    tokenizer = AutoTokenizer.from_pretrained(bridge.cfg.model_name)
    choices = []
    for example in examples:
        start = len(tokenizer.encode(example["question"]))
        sums = []
        for choice in example["choices"]:
            tokens = torch.tensor(tokenizer.encode(f"{example['question']} {choice}"))
            with torch.no_grad():
                log_p = bridge(tokens[None])[0, :-1].log_softmax(-1)
            sums.append(log_p.gather(1, tokens[1:, None])[start - 1 :].sum().item())
        choices.append(int(sums[1] > sums[0]))
    return choices


def hits(choices, examples) -> int:
    return sum(
        choice == example["label"] for choice, example in zip(choices, examples, strict=True)
    )


@pytest.mark.parametrize("name", MODELS)
def test_the_edited_model_is_measured_and_restored(
    open_reader, tasks_from, examples, tmp_path, name
):
    bridge = open_reader(name)
    options = {"include_path": tasks_from, "batch_size": 7, "labels": {"mask": "x"}}
    mask = top_fraction(random_scores(bridge), 0.3)
    tokens = bridge.tokenizer("what is it ?").input_ids
    digest = weights_digest(bridge)
    rows = evaluate_tasks(bridge, [name], **options)
    assert isinstance(rows, Rows)
    [before] = rows
    with masked(bridge, mask):
        share = hits(chosen(bridge, examples[name]), examples[name]) / N
        bridge.original_model.train()  # dropout is on in GPT-2
        [under] = evaluate_tasks(bridge, [name], **options)
    assert all(module.training for module in bridge.original_model.modules())
    bridge.original_model.eval()
    assert weights_digest(bridge) == digest
    assert bridge.tokenizer("what is it ?").input_ids == tokens
    assert evaluate_tasks(bridge, [name], **options) == rows

    figures = (before.mean, before.low, before.high)
    assert figures == (1, 1, 1), "right is what the unmasked model chooses"
    assert under.mean == share < 1
    # The standard error of a mean of N numbers, from their sample variance.
    half = student.ppf(0.975, N - 1) * (share * (1 - share) / (N - 1)) ** 0.5
    assert (under.low, under.high) == pytest.approx((share - half, share + half))
    expected = ("task_acc", {"mask": "x", "task": name}, N)
    assert (under.metric, under.labels, under.n) == expected

    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    folder = str(export(bridge, mask, tmp_path / "out"))
    saved = HFLM(pretrained=folder, device="cpu", dtype="float32")
    manager = utility.task_manager([name], tasks_from)
    again = simple_evaluate(saved, tasks=[name], task_manager=manager)
    theirs = again["results"][name]["acc,none"]
    assert theirs == share, "the harness's own figure of the exported folder"


def test_a_limit_takes_the_first_examples(open_reader, tasks_from, examples):
    bridge = open_reader("Llama")
    options = {"include_path": tasks_from, "labels": {}}
    with masked(bridge, top_fraction(random_scores(bridge), 0.3)):
        choices = chosen(bridge, examples["Llama"][:7])
        [seven] = evaluate_tasks(bridge, ["Llama"], limit=7, **options)
        [single] = evaluate_tasks(bridge, ["Llama"], limit=1, **options)
    assert (seven.mean, seven.n) == (hits(choices, examples["Llama"][:7]) / 7, 7)
    assert single.is_exact, "one example has no standard error"
    assert single.labels["interval"] == "none"


def test_a_study_measures_them_without_and_under_each_mask(open_reader, tasks_from, monkeypatch):
    measured = partial(evaluate_tasks, include_path=tasks_from)
    monkeypatch.setattr("harmcircuits.studies.study.evaluate_tasks", measured)
    model = asked_few(replace(open_organism("sft"), bridge=open_reader("Llama")), first=4)
    run = Study(model, StudySettings(tasks={"Llama": 20}))
    mask = top_fraction(random_scores(model.bridge), 0.3)
    before = _heldout_rows(run, {"mask": "none"}).one("task_acc")
    rows = _masked_rows(run, mask, {"mask": "random"})
    under = rows.one("task_acc")
    assert before.mean == 1 > under.mean
    assert before.n == under.n == 20
    assert before.labels == {"mask": "none", "split": "heldout", "task": "Llama"}
    assert under.labels == {"mask": "random", "split": "heldout", "task": "Llama"}
    assert rows.one("weights_removed").mean == len(mask)


def test_an_unknown_task_ends_a_study_before_it_begins(tasks_from, tmp_path):
    with pytest.raises(ValueError, match="the harness knows no task zzx"):
        study(open_organism("sft"), StudySettings(tasks={"zzx": 0}), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_filters_groups_and_metrics_without_an_error_are_rows():
    figures = {
        "f1,none": 0.5,
        "f1_stderr,none": 0.1,
        "f1,strict": 0.25,
        "f1_stderr,strict": "N/A",
    }
    rows = utility._rows("x", {"alias": "x", "sample_len": 9, **figures}, {"mask": "none"})
    first, second = rows
    named = (first.metric, first.n, dict(first.labels))
    assert named == ("task_f1", 9, {"mask": "none", "task": "x"})
    # Student's quantile for 8 degrees of freedom is 2.306.
    assert (first.low, first.high) == pytest.approx((0.5 - 0.2306, 0.5 + 0.2306), abs=1e-5)
    expected = {"mask": "none", "task": "x", "filter": "strict", "interval": "none"}
    assert second.labels == expected
    assert second.low == second.mean == second.high == 0.25


def test_what_cannot_be_measured_is_refused(llama, tasks_from):
    with pytest.raises(ValueError, match=r"knows no task bloriv, zzx"):
        evaluate_tasks(llama, ["zzx", "Llama", "bloriv"], include_path=tasks_from)
    with pytest.raises(ValueError, match=r"\['absent'\].*cannot be loaded \(.*absent\.jsonl"):
        evaluate_tasks(llama, ["absent"], include_path=tasks_from)


def test_without_lm_eval_the_extra_is_named(llama, monkeypatch):
    loaded = [name for name in sys.modules if name.split(".")[0] == "lm_eval"]
    for name in [*loaded, "lm_eval", "lm_eval.tasks"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=r"is not installed .*pip install 'harmcircuits\[real\]'"):
        evaluate_tasks(llama, ["Llama"], labels={})
