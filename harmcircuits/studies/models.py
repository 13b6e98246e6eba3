"""Which model to study: a value that can be named on a command line, sent to a worker, and opened there."""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoConfig

from harmcircuits.behaviours.files import Texts, read_prompts, request_behaviours, with_references
from harmcircuits.behaviours.generation import Sampling
from harmcircuits.behaviours.generation_cache import StoredAnswers
from harmcircuits.behaviours.judges import named_judge
from harmcircuits.behaviours.model import Subject
from harmcircuits.behaviours.questions import RequestJudge
from harmcircuits.hooks.weights import weight_sites
from harmcircuits.organisms import FOLDER, detailed_behaviours, organism_subject
from harmcircuits.prompts import Batch, Template, tokenize_text

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "harmcircuits"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class SubjectSpec:
    """A model to open. Without `texts` an organism by name, from the shipped ladder or a `folder` of organisms you trained.

    With `texts` any model that TransformerLens opens: `model` is a folder or hub id, `dtype` as stored unless given,
    `device_map` ("auto", "balanced") spreads it over several devices. `template`: chat or raw. `prefill` begins the
    answer to a harmful request. `judge` of harm: see `named_judge`, with `judge_question` its wording. Answers are at
    most `max_new_tokens` long and kept under `cache`; `batch_size` examples are scored and answered at once. At
    `temperature` 0 answers are greedy; above, `samples` a request are drawn (see `Sampling`).
    """

    model: str
    folder: Path = FOLDER
    device: str = "cpu"
    texts: Texts | None = None
    dtype: str = ""
    device_map: str = ""
    template: Template = "chat"
    prefill: str = "Sure, here is"
    judge: str = "local"
    judge_question: str = ""
    max_new_tokens: int = 64
    batch_size: int = 16
    cache: Path = CACHE
    # Not in the text by which a run is resumed, so that runs from before there was sampling can be: see `Plan.settings`.
    samples: int = field(default=1, repr=False)
    temperature: float = field(default=0.0, repr=False)
    top_p: float = field(default=1.0, repr=False)
    sampling_seed: int = field(default=0, repr=False)

    @property
    def sampling(self) -> Sampling | None:
        """How answers are drawn, None for greedy ones; raises ValueError as `Sampling`."""
        if self.temperature == 0 and self.samples == self.top_p == 1:
            return None
        return Sampling(self.samples, self.temperature, self.top_p, self.sampling_seed)

    @property
    def labels(self) -> dict[str, str]:
        """What rows about this model carry: its name, and the ladder it belongs to ("own" for a model with texts)."""
        if self.texts:
            return {"model": Path(self.model).name, "ladder": "own"}
        return {"model": self.model, "ladder": "shipped" if self.folder.resolve() == FOLDER.resolve() else self.folder.name}

    @property
    def settings(self) -> "SubjectSpec":
        """What rows depend on beside the model: this spec with model, device and cache left out."""
        return replace(self, model="", device="", device_map="", cache=Path())

    def open(self, *, seed: int = 0, progress: Progress | None = None) -> Subject:
        """The model with everything it can be asked.

        An organism: parts of behaviours included, reference answers drawn with `seed`. Another model: its own answers where
        the judge verified them are the references, made now if `cache` does not hold them; they do not depend on `seed`.
        Raises ValueError as `organism_subject`, `load_model`, `request_behaviours` and `named_judge`.
        """
        if self.texts:
            return self._opened(self.texts, progress)
        subject = organism_subject(self.model, seed=seed, device=self.device, folder=self.folder)
        return replace(subject, behaviours=detailed_behaviours(seed))

    def _opened(self, texts: Texts, progress: Progress | None) -> Subject:
        behaviours, kinds = request_behaviours(texts, prefill=self.prefill)
        options: dict[str, Any] = {"prefill": self.prefill, "question": self.judge_question, "device": self.device}
        harm = named_judge(self.judge, transcripts=self.cache / "judge.jsonl", **options)
        bridge = load_model(self.model, dtype=self.dtype, device=self.device, device_map=self.device_map)
        subject = Subject(
            self.labels["model"],
            bridge,
            behaviours,
            RequestJudge(harm, kinds, texts.wording, prefill=self.prefill),
            template=self.template,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            answers=StoredAnswers(self.cache / "answers", bridge, progress),
            sampling=self.sampling,
            n_answered_at_once=self.batch_size,
            judge_name=harm.name,
            details=self._details(texts, harm.name),
            plain_text=self._plain_text(texts, bridge),
        )
        return with_references(subject)

    def _details(self, texts: Texts, judge: str) -> dict[str, str | int]:
        found: dict[str, str | int] = {
            name: f"{source} ({read_prompts(source).digest})" for name, source in texts.files.items() if name != "plain"
        }
        if texts.plain:
            found["plain"] = texts.plain
        names = ("model", "dtype", "template", "prefill", "max_new_tokens", "batch_size")
        return {
            **found,
            "limit": texts.limit,
            "limit_measured": texts.limit_measured,
            "judge": judge,
            **({"sampling": repr(self.sampling)} if self.sampling else {}),
            **{name: getattr(self, name) for name in names},
        }

    def _plain_text(self, texts: Texts, bridge: TransformerBridge) -> list[Batch]:
        if not texts.plain:
            return []
        if not Path(texts.plain).is_file():
            raise ValueError(f"{texts.plain}: no such file; give a text for perplexity, or none")
        text = Path(texts.plain).read_text(encoding="utf-8")
        windows = tokenize_text(text, bridge.tokenizer, batch_size=1)
        limit = texts.limits["heldout"]
        return windows[:limit] if limit else windows


def load_model(model: str, *, dtype: str = "", device: str = "cpu", device_map: str = "") -> TransformerBridge:
    """The model of a folder or hub id; `dtype` as stored unless given, `device_map` instead of one `device`.

    Raises ValueError for an unknown dtype, a model that cannot be loaded, an adapter that is not merged, and weights that
    cannot be scored (see `weight_sites`).
    """
    if dtype and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}; expected one of {', '.join(DTYPES)}")
    folder = Path(model)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ValueError(f"{model} is an adapter; merge it into its base (merge_and_unload) and give the merged folder")
    try:
        chosen = DTYPES[dtype] if dtype else AutoConfig.from_pretrained(model).dtype or torch.float32
        where: dict[str, Any] = {"device_map": device_map} if device_map else {"device": device}
        bridge = TransformerBridge.boot_transformers(model, dtype=chosen, **where)
    except OSError as error:
        raise ValueError(f"model {model!r} cannot be loaded; expected a folder or a hub id ({error})") from None
    weight_sites(bridge)
    return bridge
