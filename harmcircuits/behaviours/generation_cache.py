"""A model's own answers, kept on disk: generated once, whoever asks."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.progress import Progress
from transformer_lens.model_bridge import TransformerBridge

from harmcircuits.behaviours.generation import Sampling, greedy_answers, sampled_answers
from harmcircuits.hooks.weights import weights_digest
from harmcircuits.prompts import Example, PromptSet, Template


class StoredAnswers:
    """`greedy_answers`, or with `sampling` `sampled_answers`, of one model as it is now, kept on disk.

    Files under `folder` are named by the digest of all weights (`weights_digest`), the settings and the chat template, and
    hold one request with its answer (or the list of its samples) a line; an unfinished file is gone on with. Under a mask,
    while fine-tuning, or with hooks on the bridge answers are made anew and nothing is read or written. Requests of similar
    length are answered together.
    """

    def __init__(self, folder: str | Path, bridge: TransformerBridge, progress: Progress | None = None) -> None:
        self.folder = Path(folder)
        self.weights = weights_digest(bridge)
        self.progress = progress

    def __call__(
        self,
        bridge: TransformerBridge,
        prompts: PromptSet,
        *,
        prefill: str = "",
        max_new_tokens: int = 32,
        batch_size: int = 256,
        template: Template = "chat",
        sampling: Sampling | None = None,
    ) -> list[str]:
        """As `greedy_answers` or `sampled_answers`."""
        length: dict[str, Any] = {"prefill": prefill, "max_new_tokens": max_new_tokens, "template": template}
        options = {**length, "batch_size": batch_size}
        if sampling:
            length |= {"sampling": asdict(sampling)}  # greedy answers are named without it
        is_hooked = any(point.fwd_hooks for point in bridge.hook_dict.values())
        if is_hooked or weights_digest(bridge) != self.weights:
            return _answers(bridge, prompts, sampling, options)
        chat = bridge.tokenizer.chat_template if template == "chat" else ""
        settings = json.dumps([self.weights, length, chat], sort_keys=True)
        path = self.folder / f"{self.weights}-{hashlib.sha256(settings.encode()).hexdigest()[:16]}.jsonl"
        known = _stored(path)
        left = sorted({example.prompt for example in prompts} - known.keys(), key=lambda prompt: (len(prompt), prompt))
        task = self.progress.add_task("own answers", total=len(left)) if self.progress and left else None
        for start in range(0, len(left), batch_size):
            some = left[start : start + batch_size]
            answers = _answers(bridge, PromptSet(tuple(map(Example, some))), sampling, options)
            if sampling:
                answers = [answers[i : i + sampling.samples] for i in range(0, len(answers), sampling.samples)]
            _append(path, some, answers)
            known |= dict(zip(some, answers, strict=True))
            if self.progress and task is not None:
                self.progress.advance(task, len(some))
        found = [known[example.prompt] for example in prompts]
        return [answer for samples in found for answer in samples] if sampling else found


def _answers(
    bridge: TransformerBridge, prompts: PromptSet, sampling: Sampling | None, options: dict[str, Any]
) -> list[Any]:
    if sampling:
        return sampled_answers(bridge, prompts, sampling=sampling, **options)
    return greedy_answers(bridge, prompts, **options)


def _stored(path: Path) -> dict[str, Any]:
    found = {}
    for line in path.read_text(encoding="utf-8").split("\n") if path.is_file() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # a line that an interrupted run did not finish
            continue
        found[row["prompt"]] = row["completion"]
    return found


def _append(path: Path, prompts: Sequence[str], answers: Sequence[str | list[str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps({"prompt": one, "completion": two}) for one, two in zip(prompts, answers, strict=True)]
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(f"\n{row}" for row in rows))  # on a new line, whatever an interrupted run left
