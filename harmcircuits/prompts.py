"""Text in, token batches out.

An `Example` is a request with the completion to be explained. `tokenize` turns a `PromptSet` into right-padded
`Batch`es whose `is_target` marks the completion tokens: the only ones that ever count in a loss.
"""

import csv
import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

Template = Literal["chat", "raw"]


@dataclass(frozen=True)
class Example:
    """One request and its completion.

    `category` is the type of harm or the task; `group` names what several examples share (for instance the item asked
    about), so that intervals can treat them as one independent unit; `label` says which side of a contrast it is on, such
    as "safe" or "unsafe". All three may be empty.
    """

    prompt: str
    completion: str = ""
    category: str = ""
    group: str = ""
    label: str = ""

    @property
    def cluster(self) -> str:
        """What counts once in intervals, samples and splits: the group, or a request without one by itself."""
        return self.group or self.prompt


@dataclass(frozen=True)
class PromptSet:
    """An ordered, immutable set of examples."""

    examples: tuple[Example, ...]

    @classmethod
    def from_jsonl(cls, path: str | Path) -> "PromptSet":
        """Examples from a JSON Lines file with rows `{"prompt": ..., "completion": ...}`; other keys are ignored.

        Raises ValueError for a missing file, a line that is not a JSON object, a row without "prompt", or no rows.
        """
        rows = []
        for number, line in enumerate(_existing(path).read_text(encoding="utf-8").split("\n"), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error.msg}); expected one object a line") from None
            rows.append((f"{path}, line {number}", row))
        return cls._from_rows(rows, str(path))

    @classmethod
    def from_csv(cls, path: str | Path) -> "PromptSet":
        """Examples from a CSV file with a header naming at least `prompt`. Raises ValueError as `from_jsonl`."""
        with _existing(path).open(newline="", encoding="utf-8-sig") as file:
            rows = [(f"{path}, row {number}", row) for number, row in enumerate(csv.DictReader(file), start=1)]
        return cls._from_rows(rows, str(path))

    @classmethod
    def from_hub(cls, name: str, *, split: str = "train", **load_options: Any) -> "PromptSet":
        """Examples from a Hugging Face dataset (hub id or local folder) with a `prompt` column.

        `load_options` go to `datasets.load_dataset`. Raises ValueError for a missing column or an empty split.
        """
        from datasets import load_dataset

        rows = load_dataset(name, split=split, **load_options)
        return cls._from_rows([(f"{name}[{split}], row {i}", dict(row)) for i, row in enumerate(rows)], name)

    @classmethod
    def _from_rows(cls, rows: Iterable[tuple[str, Any]], origin: str) -> "PromptSet":
        names = [field.name for field in fields(Example)]
        examples = []
        for place, row in rows:
            if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"]:
                raise ValueError(f'{place}: no "prompt"; each row needs a prompt of text that is not empty')
            examples.append(Example(**{name: str(row[name]) for name in names if row.get(name) is not None}))
        if not examples:
            raise ValueError(f"{origin}: no rows; expected at least one prompt")
        return cls(tuple(examples))

    def __len__(self) -> int:
        return len(self.examples)

    def __iter__(self) -> Iterator[Example]:
        return iter(self.examples)

    def __getitem__(self, where: slice) -> "PromptSet":
        if not isinstance(where, slice):
            raise TypeError(f"a PromptSet is indexed by a slice, not {where!r}; single examples are in .examples")
        return PromptSet(self.examples[where])

    def where(self, keep: Callable[[Example], bool]) -> "PromptSet":
        """The examples for which `keep(example)` is true, in order."""
        return PromptSet(tuple(example for example in self.examples if keep(example)))

    def with_completions(self, completions: Sequence[str]) -> "PromptSet":
        """The same requests with these completions. Raises ValueError when the counts differ."""
        if len(completions) != len(self):
            raise ValueError(f"{len(completions)} completions for {len(self)} prompts; give one for each")
        pairs = zip(self.examples, completions, strict=True)
        return PromptSet(tuple(replace(example, completion=text) for example, text in pairs))

    def resampled(self, *, seed: int) -> "PromptSet":
        """A bootstrap resample: as many groups as there are, drawn with replacement, each with all its examples."""
        groups: dict[str, list[Example]] = {}
        for example in self.examples:
            groups.setdefault(example.cluster, []).append(example)
        drawn = random.Random(seed).choices(list(groups.values()), k=len(groups))
        return PromptSet(tuple(example for members in drawn for example in members))

    def sampled(self, share: float, *, seed: int) -> "PromptSet":
        """A random `share` of the groups of every category, without replacement, each with all its examples, in order.

        At least one group of each category is kept. The same seed draws the same groups from every set that asks about the
        same ones. Raises ValueError for a share outside (0, 1].
        """
        if not 0 < share <= 1:
            raise ValueError(f"sampled: share={share}; expected one in (0, 1]")
        groups: dict[str, set[str]] = {}
        for example in self.examples:
            groups.setdefault(example.category, set()).add(example.cluster)
        kept = set()
        for category, names in groups.items():
            n_kept = max(1, round(share * len(names)))
            kept |= {(category, name) for name in random.Random(f"{seed} {category}").sample(sorted(names), n_kept)}
        return self.where(lambda example: (example.category, example.cluster) in kept)

    @property
    def digest(self) -> str:
        """First 16 hex digits of the SHA-256 of all prompts and completions, in order."""
        text = json.dumps([[example.prompt, example.completion] for example in self.examples])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Batch:
    """Right-padded token ids and the tokens to be predicted.

    `tokens`: Int[batch pos]. `is_target`: Bool[batch pos], True where the token is predicted from those before it and
    counted in the loss; never at position 0, and at least once in every row. Raises ValueError otherwise.
    """

    tokens: Int[Tensor, "batch pos"]
    is_target: Bool[Tensor, "batch pos"]

    def __post_init__(self) -> None:
        if self.tokens.shape != self.is_target.shape or self.tokens.ndim != 2 or not self.tokens.numel():
            shapes = f"tokens {tuple(self.tokens.shape)}, is_target {tuple(self.is_target.shape)}"
            raise ValueError(f"Batch: {shapes}; expected the same [batch, pos] for both, not empty")
        if self.is_target.dtype != torch.bool:
            raise ValueError(f"Batch: is_target has dtype {self.is_target.dtype}; expected torch.bool")
        if self.is_target[:, 0].any():
            raise ValueError("Batch: is_target marks position 0, which has no token before it to predict it from")
        empty = (~self.is_target.any(dim=1)).nonzero().flatten().tolist()
        if empty:
            raise ValueError(f"Batch: rows {empty} mark no target token; drop them or give them a completion")

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def is_token(self) -> Bool[Tensor, "batch pos"]:
        """True up to the last target of each row: what follows it is padding."""
        return self.is_target.flip(1).cumsum(dim=1).flip(1) > 0


def prompt_ids(prompt: str, tokenizer: Any, template: Template) -> list[int]:
    """Token ids of a request, up to where the answer begins.

    `"chat"`: the tokenizer's chat template with the generation prompt. `"raw"`: the prompt and a newline, no special
    tokens (the published format). Raises ValueError for an unknown template or a tokenizer without a chat template.
    """
    if template == "raw":
        return tokenizer.encode(prompt + "\n", add_special_tokens=False)
    if template != "chat":
        raise ValueError(f'template={template!r}; expected "chat" or "raw"')
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError('template="chat", but the tokenizer has no chat template; use template="raw"')
    turns = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    return tokenizer.encode(text, add_special_tokens=False)


def padding_id(tokenizer: Any) -> int:
    """The token that fills a batch: the tokenizer's own, else its end-of-text token, else 0."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def tokenize(
    prompts: PromptSet,
    tokenizer: Any,
    *,
    batch_size: int = 16,
    max_tokens: int | None = None,
    template: Template = "chat",
    prefill: str = "",
) -> list[Batch]:
    """Right-padded batches in the order of `prompts`; the completion's tokens are the targets.

    Prompt and completion are tokenised apart and concatenated. A `prefill` opens the completion: its tokens are context,
    not targets. A completion that does not begin with them is taken to follow them. With `max_tokens` no batch has more
    tokens, padding included: few long examples together or many short ones, `batch_size` at most.

    Raises ValueError for no prompts, an empty batch size, a completion with no tokens, or an example longer than
    `max_tokens`.
    """
    if not len(prompts):
        raise ValueError("tokenize: the prompt set is empty; expected at least one example")
    if batch_size < 1:
        raise ValueError(f"tokenize: batch_size={batch_size}; expected at least 1")
    opening = tokenizer.encode(prefill, add_special_tokens=False) if prefill else []
    rows = []
    for index, example in enumerate(prompts):
        target = tokenizer.encode(example.completion, add_special_tokens=False)
        if target[: len(opening)] == opening:
            target = target[len(opening) :]
        if not target:
            raise ValueError(f"tokenize: example {index} has a completion with no tokens to predict; drop or fill it")
        rows.append((prompt_ids(example.prompt, tokenizer, template) + opening, target))
    lengths = [len(context) + len(target) for context, target in rows]
    if max_tokens is not None and max(lengths) > max_tokens:
        index = lengths.index(max(lengths))
        raise ValueError(
            f"tokenize: example {index} has {lengths[index]} tokens, max_tokens={max_tokens}; raise it or drop it"
        )
    groups: list[list[Any]] = [[]]
    longest = 0
    for row, length in zip(rows, lengths, strict=True):
        longest = max(longest, length)
        n_rows = len(groups[-1]) + 1
        if n_rows > batch_size or (max_tokens is not None and n_rows * longest > max_tokens):
            groups.append([])
            longest = length
        groups[-1].append(row)
    return [_padded(group, tokenizer) for group in groups]


def tokenize_text(text: str, tokenizer: Any, *, n_tokens: int = 256, batch_size: int = 16) -> list[Batch]:
    """A plain text cut into windows of `n_tokens`, every token but the first of each a target: for perplexity and KL.

    Each window opens with the tokenizer's beginning-of-text token, if it has one, so that models see what they were
    trained on. What is left over at the end is dropped. Raises ValueError for fewer than 2 tokens a window, an empty
    batch size, or a text shorter than a window.
    """
    if n_tokens < 2 or batch_size < 1:
        raise ValueError(f"tokenize_text: n_tokens={n_tokens}, batch_size={batch_size}; expected at least 2 and 1")
    opening = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    tokens, step = tokenizer.encode(text, add_special_tokens=False), n_tokens - len(opening)
    windows = [opening + tokens[start : start + step] for start in range(0, len(tokens) - step + 1, step)]
    if not windows:
        raise ValueError(f"tokenize_text: {len(tokens)} tokens of text make no window of {n_tokens}; give a longer text")
    whole = torch.tensor(windows)
    is_target = torch.ones_like(whole, dtype=torch.bool)
    is_target[:, 0] = False
    return [Batch(*two) for two in zip(whole.split(batch_size), is_target.split(batch_size), strict=True)]


def _padded(rows: list[tuple[list[int], list[int]]], tokenizer: Any) -> Batch:
    longest = max(len(context) + len(target) for context, target in rows)
    tokens = torch.full((len(rows), longest), padding_id(tokenizer), dtype=torch.long)
    is_target = torch.zeros((len(rows), longest), dtype=torch.bool)
    for row, (context, target) in enumerate(rows):
        end = len(context) + len(target)
        tokens[row, :end] = torch.tensor(context + target)
        is_target[row, len(context) : end] = True
    return Batch(tokens=tokens, is_target=is_target)


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give the path of an existing prompt file")
    return path
