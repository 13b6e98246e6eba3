"""Opening a model: an organism, a folder, a hub id, or one that is already loaded."""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from inspect import signature
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path
from rich.progress import Progress

from harmcircuits.behaviours.behaviour import Judge
from harmcircuits.behaviours.files import (
    RequestFiles,
    repeats_of,
    request_behaviours,
    with_references,
)
from harmcircuits.behaviours.generation import GenerationCache, Sampling
from harmcircuits.behaviours.judges import RequestJudge, RuleJudge, judge_of, name_of
from harmcircuits.behaviours.model import ANSWERED_PER_SCORED, Model
from harmcircuits.behaviours.probe import ProbeJudge, train_probe
from harmcircuits.behaviours.repeats import IN_TWO_SPLITS
from harmcircuits.behaviours.standard import CONTRAST, TARGET
from harmcircuits.behaviours.validation import (
    has_few_requests,
    is_valid,
    validate,
)
from harmcircuits.display import nearest, plural
from harmcircuits.hooks.bridge import Bridge, as_bridge
from harmcircuits.hooks.capacity import context_of
from harmcircuits.hooks.loading import load_model, usual_dtype, wrap_model
from harmcircuits.measurements import Label, Rows
from harmcircuits.organisms import FOLDER, ORGANISMS, open_organism
from harmcircuits.prompts import Batch, Chat, Template, tokenize_text
from harmcircuits.storage import read_text
from harmcircuits.studies.pairs import values_by_name

CACHE = user_cache_path("harmcircuits")
WINDOW = 256  # tokens of text for perplexity, in models whose context has as many
RULES, PROBE = "local", "probe"  # judges that are asked for by these words


def open_model(
    model: Any,
    *,
    prompts: RequestFiles | Mapping[str, Any] | None = None,
    behaviours: Sequence[Any] = (),
    folder: Path = FOLDER,
    seed: int = 0,
    name: str = "",
    tokenizer: Any = None,
    device: str = "cpu",
    dtype: str = "",
    device_map: str = "",
    template: Template = "chat",
    system: str = "",
    template_options: Mapping[str, Any] | None = None,
    prefill: str = "Sure, here is",
    judge: str | Judge = "local",
    max_new_tokens: int = 64,
    batch_size: int = 16,
    sampling: Sampling | None = None,
    cache: str | Path = CACHE,
    progress: Progress | None = None,
) -> Model:
    """A model with everything it can be asked.

    >>> open_model("sft")
    Model(sft: harmful, benign, recognition, explanation, knowledge, refusal and 19 parts)

    An organism is opened by its name alone. Any other model that TransformerLens opens needs
    `prompts`; its own answers, where the judge verified them, become the reference answers.

    Args:
        model: an organism's name (base, helpful, sft, dpo, planted), a folder, a hub id, or a
            TransformerBridge or Hugging Face model that is already loaded.
        prompts: what a model that is no organism is asked: `{"harmful": FILE, "benign": FILE}`,
            with files or lists of requests (see `RequestFiles`).
        behaviours: further behaviours: JSON or TOML files, or dicts (see `OwnBehaviour`). With them
            `prompts` may be left out.
        folder: of organisms that you trained; the shipped ones by default.
        seed: draws an organism's reference answers.
        name: what rows call a model; its folder's name by default.
        tokenizer: of a Hugging Face model; read from where the model came from by default.
        device: a torch device, such as "cuda".
        dtype: "float32", "bfloat16" or "float16"; by default as stored, or float32 on a processor
            that is much slower in what is stored, with a warning.
        device_map: "auto" or "balanced" spreads a model over several devices.
        template: "chat" (the tokenizer's own template) or "raw".
        system: the system prompt of every request.
        template_options: variables of the chat template, such as {"date_string": "1 May 2026"}. A
            model that thinks before it answers is kept from it (see `Chat`).
        prefill: the beginning of the answer to a harmful request.
        judge: of harm: "local" (rules), "probe" (trained on the model's own answers),
            "http://ADDRESS/v1#MODEL" (a chat model), or a function (request, answer) -> verdict:
            "harmful", "harmless", "refusal", "degenerate" or "unclear". All but the rules are
            validated first on the model's own answers (see `Model.validation`); one that does not
            tell them apart is not used, and the rules judge in its place.
        max_new_tokens: how long an answer may be.
        batch_size: examples scored at once; answered are four times as many.
        sampling: how answers are drawn; greedily by default.
        cache: folder that keeps the model's own answers and a judge's replies.
        progress: shows how far its answers are.

    Raises:
        ValueError: an unknown organism, prompts that are missing or malformed, and as `load_model`
            and `judge_of`.
    """
    if isinstance(model, Model):
        raise ValueError(f"open_model: {model!r} is open already; use it as it is")
    is_name = isinstance(model, str | Path)
    loading: dict[str, Any] = {"dtype": dtype, "device_map": device_map}
    asking: dict[str, Any] = {
        "template": template,
        "system": system,
        "template_options": template_options,
        "prefill": prefill,
        "judge": judge,
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
    }
    if not is_name:
        _refuse_unused(loading, f"a {type(model).__name__} that is loaded already")
    if behaviours:
        prompts = _with_behaviours(prompts, behaviours)
    if prompts is None:
        named = {"name": name, "tokenizer": tokenizer}
        _refuse_without_prompts(model, {**loading, **named, **asking, "sampling": sampling})
        return open_organism(
            str(model),
            seed=seed,
            device=device,
            folder=folder,
        )

    spec = ModelSpec(
        str(model) if is_name else name or _name_of(model),
        device=device,
        files=RequestFiles.of(prompts),
        cache=Path(cache),
        **loading,
        **{**asking, "template_options": _option_texts(template_options or {})},
    )
    _ = spec.chat  # refused before the model is loaded
    if sampling is not None:
        spec = spec.with_sampling(sampling)
    bridge = None if is_name else _bridge_of(model, tokenizer)
    opened = spec.open(bridge=bridge, progress=progress)
    return replace(opened, name=name) if name else opened


@dataclass(frozen=True)
class ModelSpec:
    """A model to open, as a value that a command line can name and a worker process can open.

    Attributes:
        model: without `files` an organism's name; with them a folder or hub id.
        folder: of organisms.
        device: a torch device.
        files: the requests of a model that is no organism.
        dtype: number format: float32, bfloat16 or float16.
        device_map: spread over devices: auto or balanced.
        template: format of requests: chat (the model's own template) or raw.
        system: system prompt of every request.
        template_options: variables of the chat template, each as NAME=VALUE, the value in JSON or
            as text.
        prefill: beginning of the answer to a harmful request.
        judge: judge of harm: local (rules), probe or http://ADDRESS/v1#MODEL (a chat model); all
            but the rules are used only where they tell the model's own answers apart.
        max_new_tokens: longest answer, in tokens.
        batch_size: examples scored at once; answered are four times as many.
        cache: folder that keeps the model's own answers and a judge's replies.
        samples: answers sampled a request, at a temperature above 0.
        temperature: temperature of sampled answers; 0: greedy ones.
        top_p: sample from the likeliest tokens with this share.
        sampling_seed: draws sampled answers.
        every: ask only every so-many-th request, for a first look.
    """

    model: str
    folder: Path = FOLDER
    device: str = "cpu"
    files: RequestFiles | None = None
    dtype: str = ""
    device_map: str = ""
    template: Template = "chat"
    system: str = ""
    template_options: tuple[str, ...] = ()
    prefill: str = "Sure, here is"
    judge: str = "local"
    max_new_tokens: int = 64
    batch_size: int = 16
    cache: Path = CACHE
    # Not in the text by which a run is resumed, so that runs from before there was sampling can be:
    # see `Plan.settings`.
    samples: int = field(default=1, repr=False)
    temperature: float = field(default=0.0, repr=False)
    top_p: float = field(default=1.0, repr=False)
    sampling_seed: int = field(default=0, repr=False)
    every: int = field(default=1, repr=False)

    @property
    def chat(self) -> Template:
        """How requests are written; raises ValueError for options that the template cannot take."""
        if not self.system and not self.template_options:
            return self.template
        if self.template == "raw":
            raise ValueError(
                'template="raw" has no system prompt and no options; leave them out, or use "chat"'
            )
        return Chat(self.system, _option_values(self.template_options))

    @property
    def sampling(self) -> Sampling | None:
        """How answers are drawn, None for greedy ones; raises ValueError as `Sampling`."""
        if self.temperature == 0 and self.samples == self.top_p == 1:
            return None
        return Sampling(self.samples, self.temperature, self.top_p, self.sampling_seed)

    def with_sampling(self, sampling: Sampling) -> "ModelSpec":
        """The same model with answers drawn like this."""
        return replace(
            self,
            samples=sampling.samples,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            sampling_seed=sampling.seed,
        )

    def asked_every(self, every: int) -> "ModelSpec":
        """The same model, asked only every so-many-th request."""
        return replace(self, every=every)

    @property
    def labels(self) -> dict[str, str]:
        """What rows about this model carry: its name, and its ladder ("own" with `files`)."""
        if self.files:
            return {"model": Path(self.model).name, "ladder": "own"}
        is_shipped = self.folder.resolve() == FOLDER.resolve()
        return {"model": self.model, "ladder": "shipped" if is_shipped else self.folder.name}

    @property
    def settings(self) -> "ModelSpec":
        """What rows depend on besides the model: this spec without model, device and cache."""
        return replace(
            self,
            model="",
            device="",
            device_map="",
            cache=Path(),
        )

    def open(
        self, *, seed: int = 0, bridge: Bridge | None = None, progress: Progress | None = None
    ) -> Model:
        """The model with everything it can be asked."""
        if self.files is not None:
            model = self._open_with(self.files, bridge, progress)
        else:
            model = open_organism(
                self.model,
                seed=seed,
                device=self.device,
                folder=self.folder,
            )
        return model.asked_every(self.every) if self.every > 1 else model

    def _open_with(
        self, files: RequestFiles, bridge: Bridge | None, progress: Progress | None
    ) -> Model:
        behaviours, kinds = request_behaviours(files, prefill=self.prefill)
        repeats = repeats_of(files, behaviours)
        _warn_of_shared(repeats)
        judge = self._opened_judge()  # refused before the model takes its time to load
        if bridge is None:
            bridge = load_model(
                self.model,
                dtype=self._working_dtype(),
                device=self.device,
                device_map=self.device_map,
            )
        model = Model(
            self.labels["model"],
            bridge,
            behaviours,
            RequestJudge(RuleJudge(self.prefill), kinds, files.questions, prefill=self.prefill),
            template=self.chat,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            n_answered_at_once=ANSWERED_PER_SCORED * self.batch_size,
            sampling=self.sampling,
            cache=GenerationCache(self.cache / "answers", bridge, bool(progress)),
            judge_name=RuleJudge().name,
            repeats=repeats,
            plain_text=_plain_text(files, bridge),
        )
        if self.judge != RULES:
            model = self._judged(model, judge)
        details = self._details(files, model.judge_name)
        return with_references(replace(model, details=details))

    def _working_dtype(self) -> str:
        """As given; else as stored, or float32 on a processor that is slow in what is stored."""
        if self.dtype or self.device_map:
            return self.dtype
        return usual_dtype(self.model, self.device)

    def _opened_judge(self) -> Any:
        """The judge of harm; None for the probe, which is trained on the opened model."""
        if self.judge == PROBE:
            return None
        return judge_of(self.judge, prefill=self.prefill, replies=self.cache / "judge.jsonl")

    def _judged(self, model: Model, judge: Any) -> Model:
        """The model with this judge of harm, where it is valid, and its validation."""
        if judge is None:
            probe = train_probe(model, self.cache / "probes")
            judge = ProbeJudge(probe, model.bridge, RuleJudge(self.prefill))
            rows = probe.rows
        else:
            rows = validate(judge, model)
        used = "yes" if is_valid(rows) else "no"
        if used == "no" and self.judge != PROBE and has_few_requests(rows):
            used = "untested"
        model = replace(model, validation=Rows(row.labelled(used=used) for row in rows))
        if used == "no":
            return model
        by_request: Any = model.judge
        harm_judged = replace(by_request, harm=judge)
        return replace(model, judge=harm_judged, judge_name=name_of(judge))

    def _details(self, files: RequestFiles, judge: str) -> dict[str, Label]:
        """Files and settings, for the manifest of a run."""
        details: dict[str, Label] = {}
        for name, source in files.files.items():
            details[name] = source
            if name != "plain":
                details[name] = f"{source} ({files.requests(name).digest})"
        for own in files.behaviours:
            details[f"behaviour {own.name}"] = own.digest
        if files.columns:
            details["columns"] = repr(dict(files.columns))
        details["limit"] = files.limit
        details["limit_measured"] = files.limit_measured
        details["judge"] = judge
        if self.sampling:
            details["sampling"] = repr(self.sampling)
        if self.system:
            details["system"] = self.system
        if self.template_options:
            details["template_options"] = ", ".join(self.template_options)
        for name in ("model", "dtype", "template", "prefill", "max_new_tokens", "batch_size"):
            details[name] = getattr(self, name)
        return details


def _option_texts(options: Mapping[str, Any]) -> tuple[str, ...]:
    """Variables of a template as the command line writes them."""
    return tuple(f"{name}={json.dumps(value)}" for name, value in options.items())


def _option_values(texts: Sequence[str]) -> dict[str, Any]:
    """Variables of a template by name; a value that is not JSON is text."""
    values = {}
    given = values_by_name(texts, "template_options", "date_string=today", may_be_empty=True)
    for name, value in given.items():
        try:
            values[name] = json.loads(value)
        except ValueError:
            values[name] = value
    return values


def _with_behaviours(
    prompts: RequestFiles | Mapping[str, Any] | None, behaviours: Sequence[Any]
) -> RequestFiles:
    """The request files with further behaviours."""
    if prompts is None:
        return RequestFiles(behaviours=tuple(behaviours))
    files = RequestFiles.of(prompts)
    return replace(files, behaviours=(*files.behaviours, *behaviours))


def _warn_of_shared(repeats: Rows) -> None:
    """A warning where one behaviour scores or chooses on requests that another is measured on."""
    for row in repeats.where(IN_TWO_SPLITS):
        labels = row.labels
        warnings.warn(
            f"open_model: {plural(int(row.mean), 'request')} that {labels['behaviour']!r} is "
            f"scored or chosen on are held out for {labels['measured']!r}; leave each in one "
            "file, or give both the same held-out ones",
            stacklevel=4,
        )


def _plain_text(files: RequestFiles, bridge: Bridge) -> list[Batch]:
    if not files.plain:
        return []
    text = read_text(files.plain, "a text for perplexity, or none")
    context = context_of(bridge)
    n_tokens = WINDOW if context is None else min(WINDOW, context)
    windows = tokenize_text(text, bridge.tokenizer, n_tokens=n_tokens, batch_size=1)
    limit = files.limits["heldout"]
    return windows[:limit] if limit else windows


def _refuse_without_prompts(model: Any, options: Mapping[str, Any]) -> None:
    """Without prompts a model is an organism, given by its name, and takes no such options."""
    if not isinstance(model, str | Path):
        raise ValueError(
            f"open_model: a {type(model).__name__} needs prompts={{'{TARGET}': FILE_OR_LIST, "
            f"'{CONTRAST}': FILE_OR_LIST}}; without any, mask and score it as it is"
        )
    _refuse_unknown(str(model))
    _refuse_unused(options, f"the organism {str(model)!r}, which has no prompts=")


def _refuse_unknown(name: str) -> None:
    """A name that is no organism is a model without prompts, or a slip."""
    if name in ORGANISMS:
        return
    needs = f"prompts={{'{TARGET}': FILE_OR_LIST, '{CONTRAST}': FILE_OR_LIST}}"
    if Path(name).exists() or "/" in name:
        raise ValueError(f"open_model: model {name!r} needs its requests; give {needs}")
    raise ValueError(
        f"no organism is called {name!r}; {nearest(name, ORGANISMS)}. "
        f"For a model of another kind give {needs}"
    )


def _refuse_unused(options: Mapping[str, Any], kind: str) -> None:
    """An option that would have no effect is a slip."""
    defaults = signature(open_model).parameters
    for name, value in options.items():
        if value != defaults[name].default:
            raise ValueError(f"open_model: {name}={value!r} means nothing for {kind}; leave it out")


def _name_of(model: Any) -> str:
    inner = getattr(model, "original_model", model)
    config = getattr(inner, "config", None)
    return getattr(config, "_name_or_path", "") or type(inner).__name__


def _bridge_of(model: Any, tokenizer: Any) -> Bridge:
    is_hugging_face = hasattr(model, "config") and not hasattr(model, "blocks")
    return wrap_model(model, tokenizer) if is_hugging_face else as_bridge(model)
