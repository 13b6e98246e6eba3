"""Opening a model: an organism, a folder, a hub id, or a loaded model."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from harmcircuits.batches import Batch, Template, tokenize_text
from harmcircuits.behaviours.behaviour import CONTRAST, TARGET, Behaviour, Splits
from harmcircuits.behaviours.generation import GenerationCache
from harmcircuits.behaviours.judges import Judge, RuleJudge, judge_of, name_of
from harmcircuits.behaviours.model import (
    ANSWERED_PER_SCORED,
    Model,
    refuse_unreadable,
    verified_together,
)
from harmcircuits.behaviours.probe import (
    ProbeJudge,
    has_few_requests,
    is_valid,
    train_probe,
    validate,
)
from harmcircuits.behaviours.repeats import leak_texts, repeat_rows
from harmcircuits.behaviours.request_files import RequestFiles, request_behaviours
from harmcircuits.behaviours.request_judge import RequestJudge
from harmcircuits.display import nearest
from harmcircuits.hooks.bridge import Bridge, as_bridge
from harmcircuits.hooks.checks import context_of
from harmcircuits.hooks.generation import Sampling
from harmcircuits.hooks.loading import load_model, wrap_model
from harmcircuits.measurements import Label, Rows
from harmcircuits.organisms.compiled import COMPILED, PREFIX
from harmcircuits.organisms.shipped import ORGANISMS, open_organism
from harmcircuits.prompts import SPLITS, PromptSet
from harmcircuits.storage import read_text

CACHE = user_cache_path("harmcircuits")
WINDOW = 256  # tokens of a text for perplexity, or the whole context of a smaller model
RULES, PROBE = "local", "probe"  # names of judges
SPREAD = ("auto", "balanced")  # over several devices
SHIPPED = (*ORGANISMS, *COMPILED)


def open_model(
    model: Any,
    *,
    prompts: RequestFiles | Mapping[str, Any] | None = None,
    behaviours: Sequence[Behaviour] = (),
    template: Template = "chat",
    prefill: str = "Sure, here is",
    judge: str | Judge = RULES,
    max_new_tokens: int = 64,
    batch_size: int = 16,
    sampling: Sampling | None = None,
    device: str = "cpu",
    dtype: str = "",
    cache: str | Path = CACHE,
) -> Model:
    """A model with everything it can be asked.

    >>> open_model("sft")
    Model(sft: harmful, benign, recognition, explanation, knowledge, refusal and 19 parts)

    An organism needs its name alone; `harmcircuits.organisms.shipped.open_organism` opens one that
    you trained. Any other model that TransformerLens opens is asked `prompts`, `behaviours` or
    both; its own answers become the references, where the judge verified them. Without either it
    only generates.

    Args:
        model: an organism's name (base, helpful, sft, dpo, planted or innocent; compiled/nested,
            /nothing-shared, /shared-head or /shared-mlp), a folder, a hub id, or a loaded
            TransformerBridge or Hugging Face model.
        prompts: the requests to a model that is no organism: `{"harmful": FILE, "benign": FILE}`,
            with files or lists of requests (see `RequestFiles`).
        behaviours: further behaviours; `Behaviour(name, requests, judge)` is enough.
        template: "chat" (the tokenizer's own template), a `Chat` with a system prompt or variables
            of the template, or "raw". A model that thinks before it answers is kept from it.
        prefill: the beginning of the answer to a harmful request.
        judge: of harm: "local" (rules), "probe" (trained on the model's own answers),
            "http://ADDRESS/v1#MODEL" (a chat model), or a function (request, answer) -> verdict:
            "harmful", "harmless", "refusal", "degenerate" or "unclear". All but the rules are
            validated first on the model's own answers (see `Model.validation`); the rules replace a
            judge that does not tell these answers apart.
        max_new_tokens: the length of an answer.
        batch_size: examples scored at once; four times as many are answered at once.
        sampling: how answers are drawn; greedily by default.
        device: a torch device, such as "cuda"; "auto" or "balanced" spreads a model over several.
        dtype: "float32", "bfloat16" or "float16"; the dtype of the files by default.
        cache: folder for the model's own answers and a judge's replies.

    Raises:
        ValueError: an unknown organism, prompts that are missing or malformed, and as `load_model`
            and `judge_of`.
    """
    if isinstance(model, Model):
        raise ValueError(f"open_model: {model!r} is open already; use it as it is")
    settings = {
        "dtype": dtype,
        "prefill": prefill,
        "template": template,
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "sampling": sampling,
    }
    if isinstance(model, str) and model in SHIPPED and prompts is None:
        _refuse_unused({**settings, "judge": judge}, f"the organism {model!r}")
        return open_organism(model, device=device).with_behaviours(*behaviours)
    if prompts is None and not behaviours:
        _refuse_unknown_name(model)

    files = RequestFiles.of(prompts or {})
    requests, kinds = request_behaviours(files, behaviours, prefill=prefill)
    repeats = repeat_rows(requests)
    for text in leak_texts(repeats):
        warnings.warn(f"open_model: {text}; leave each in one file", stacklevel=2)

    folder = Path(cache)
    rules = RuleJudge(prefill)
    harm = None
    if judge != PROBE:  # an unknown judge is refused before the model takes its time to load
        harm = judge_of(judge, prefill=prefill, replies=folder / "judge.jsonl")
    name, bridge = _name_and_bridge(model, device, dtype)
    result = Model(
        name,
        bridge,
        requests,
        RequestJudge(rules, kinds, files.questions, prefill=prefill),
        template=template,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        n_answered_at_once=ANSWERED_PER_SCORED * batch_size,
        sampling=sampling,
        cache=GenerationCache(folder / "answers", bridge, progress=True),
        judge_name=rules.name,
        repeats=repeats,
        details=_details(files, behaviours, {"judge": rules.name, "model": model, **settings}),
        plain_text=_plain_text(files, bridge),
    )
    if judge != RULES:
        result = _with_judge(result, harm, rules, folder)
    return _with_references(result)


def _name_and_bridge(model: Any, device: str, dtype: str) -> tuple[str, Bridge]:
    """The model's name in rows, and its bridge."""
    if isinstance(model, str | Path):
        where = {"device_map": device} if device in SPREAD else {"device": device}
        return Path(model).name, load_model(str(model), dtype=dtype, **where)
    loaded = f"a {type(model).__name__} that is loaded already"
    _refuse_unused({"device": device, "dtype": dtype}, loaded)
    inner = getattr(model, "original_model", model)
    config = getattr(inner, "config", None)
    name = Path(getattr(config, "_name_or_path", "") or type(inner).__name__).name
    is_hugging_face = hasattr(model, "config") and not hasattr(model, "blocks")
    return name, wrap_model(model) if is_hugging_face else as_bridge(model)


def _with_judge(model: Model, judge: Judge | None, rules: RuleJudge, folder: Path) -> Model:
    """The model with its validation, and with this judge of harm (None: a probe) if it is valid."""
    if judge is None:
        probe = train_probe(model, folder / "probes")
        judge = ProbeJudge(probe, model.bridge, rules)
        rows = probe.rows
    else:
        rows = validate(judge, model)
    use = "yes" if is_valid(rows) else "no"
    if use == "no" and not isinstance(judge, ProbeJudge) and has_few_requests(rows):
        use = "untested"
    model = replace(model, validation=Rows(row.labelled(used=use) for row in rows))
    if use == "no":
        return model
    name = name_of(judge)
    by_request: Any = model.judge
    return replace(
        model,
        judge=replace(by_request, harm=judge),
        judge_name=name,
        details={**model.details, "judge": name},
    )


def _with_references(model: Model) -> Model:
    """The model with its own answers as reference answers, where the judge verified them."""
    behaviours = []
    questions = []
    for behaviour in model.behaviours.values():
        refuse_unreadable(model, behaviour)
        if not behaviour.choices and not behaviour.is_scored_on_references:
            behaviours.append(behaviour)
            questions += [(behaviour, behaviour.prompts(split)) for split in SPLITS]
    answers = iter(verified_together(model, questions))

    with_answers = []
    for behaviour in behaviours:
        sets = {split: next(answers) for split in SPLITS}
        if behaviour.name in (TARGET, CONTRAST):
            _refuse_not_shown(model.name, behaviour.name, sets)
        with_answers.append(replace(behaviour, prompts=Splits(sets)))
    return model.with_behaviours(*with_answers)


def _refuse_not_shown(model: str, behaviour: str, sets: Mapping[str, PromptSet]) -> None:
    for split, prompts in sets.items():
        if not any(example.completion for example in prompts):
            raise ValueError(
                f"{model} does not show {behaviour!r} in any of {len(prompts)} {split} requests, "
                "so there is nothing to measure; give more requests, or another prefill or judge"
            )


def _details(
    files: RequestFiles, behaviours: Sequence[Behaviour], settings: Mapping[str, Any]
) -> dict[str, Label]:
    """Requests and settings, for the manifest of a run."""
    details: dict[str, Label] = {}
    details |= files.sources
    for name, prompts in files.requests.items():
        details[name] = f"{files.sources[name]} ({prompts.digest})"
    for behaviour in behaviours:
        digests = [behaviour.prompts(split).digest for split in SPLITS]
        details[f"behaviour {behaviour.name}"] = ", ".join(digests)
    if files.columns:
        details["columns"] = repr(dict(files.columns))
    details["limit"] = files.limit
    details["limit_measured"] = files.limit_measured
    for name, value in settings.items():
        if value is not None:
            details[name] = value if isinstance(value, int) else str(value)
    return details


def _plain_text(files: RequestFiles, bridge: Bridge) -> list[Batch]:
    if not files.plain:
        return []
    text = read_text(files.plain, "a text for perplexity, or none")
    n_tokens = min(WINDOW, context_of(bridge) or WINDOW)
    windows = tokenize_text(text, bridge.tokenizer, n_tokens=n_tokens, batch_size=1)
    limit = files.limits["heldout"]
    return windows[:limit] if limit else windows


def _refuse_unknown_name(model: Any) -> None:
    """An error for a name that is no organism, no folder and no hub id."""
    is_id = "/" in str(model) and not str(model).startswith(PREFIX)
    if isinstance(model, str) and not is_id and not Path(model).exists():
        raise ValueError(
            f"no organism is called {model!r}; {nearest(model, SHIPPED)}. Another model is opened "
            "by its folder or hub id"
        )


def _refuse_unused(options: Mapping[str, Any], model: str) -> None:
    """An option without effect is a slip."""
    defaults = signature(open_model).parameters
    for name, value in options.items():
        if value != defaults[name].default:
            raise ValueError(
                f"open_model: {name}={value!r} has no effect for {model}; leave it out"
            )
