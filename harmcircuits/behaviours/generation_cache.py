"""A model's own answers, kept on disk: generated once, whoever asks."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.progress import Progress

from harmcircuits.behaviours.generation import Sampling, generate
from harmcircuits.hooks.bridge import Bridge
from harmcircuits.hooks.weights import weights_digest
from harmcircuits.prompts import Example, PromptSet, Template


class GenerationCache:
    """`generate` for one model as it is now, with its answers kept on disk.

    Files are named by the digest of all weights, the settings and the chat template, and hold one
    request with its answer (or the list of its samples) a line; an interrupted file is continued.
    Under a mask, while fine-tuning, or with hooks on the bridge answers are made anew, and nothing
    is read or written. Requests of similar length are answered together.

    Args:
        folder: where the files are.
        bridge: the model.
        progress: shows how many answers are made.
    """

    def __init__(
        self, folder: str | Path, bridge: Bridge, progress: Progress | None = None
    ) -> None:
        self.folder = Path(folder)
        self.weights = weights_digest(bridge)
        self.progress = progress

    def __repr__(self) -> str:
        return f"GenerationCache({str(self.folder)!r}, weights {self.weights})"

    def __call__(
        self,
        bridge: Bridge,
        prompts: PromptSet,
        *,
        sampling: Sampling | None = None,
        prefill: str = "",
        max_new_tokens: int = 32,
        batch_size: int = 256,
        template: Template = "chat",
    ) -> list[str]:
        """As `generate`."""
        settings: dict[str, Any] = {
            "prefill": prefill,
            "max_new_tokens": max_new_tokens,
            "template": template,
        }
        options = {**settings, "batch_size": batch_size, "sampling": sampling}
        is_hooked = any(point.fwd_hooks for point in bridge.hook_dict.values())
        if is_hooked or weights_digest(bridge) != self.weights:
            return generate(bridge, prompts, **options)

        if sampling:
            settings["sampling"] = asdict(sampling)  # greedy answers are named without it
        path = self._path(settings, bridge.tokenizer.chat_template if template == "chat" else "")
        stored = _stored(path)
        missing = {example.prompt for example in prompts} - stored.keys()
        by_length = sorted(missing, key=lambda prompt: (len(prompt), prompt))
        advance = self._bar(len(by_length))
        for start in range(0, len(by_length), batch_size):
            some = by_length[start : start + batch_size]
            answers = generate(bridge, PromptSet(tuple(map(Example, some))), **options)
            per_request = _per_request(answers, sampling)
            _append(path, some, per_request)
            stored |= dict(zip(some, per_request, strict=True))
            advance(len(some))

        ordered = [stored[example.prompt] for example in prompts]
        if not sampling:
            return ordered
        flat: list[str] = []
        for samples in ordered:
            flat += samples
        return flat

    def _path(self, settings: dict[str, Any], chat_template: str) -> Path:
        named = json.dumps([self.weights, settings, chat_template], sort_keys=True)
        digest = hashlib.sha256(named.encode()).hexdigest()[:16]
        return self.folder / f"{self.weights}-{digest}.jsonl"

    def _bar(self, total: int) -> Any:
        """A function that moves the progress bar on by so many answers."""
        if self.progress is None or not total:
            return lambda _: None
        progress, task = self.progress, self.progress.add_task("own answers", total=total)
        return lambda count: progress.advance(task, count)


def _per_request(answers: list[str], sampling: Sampling | None) -> list[Any]:
    """An answer for each request, or the list of its samples."""
    if not sampling:
        return answers
    size = sampling.samples
    return [answers[start : start + size] for start in range(0, len(answers), size)]


def _stored(path: Path) -> dict[str, Any]:
    stored = {}
    if not path.is_file():
        return stored
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # a line that an interrupted run did not finish
            continue
        stored[row["prompt"]] = row["completion"]
    return stored


def _append(path: Path, prompts: Sequence[str], answers: Sequence[str | list[str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for prompt, answer in zip(prompts, answers, strict=True):
        rows.append(json.dumps({"prompt": prompt, "completion": answer}))
    with path.open("a", encoding="utf-8") as file:
        # Each on a new line, whatever an interrupted run left.
        file.write("".join(f"\n{row}" for row in rows))
