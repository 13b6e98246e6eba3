"""A TransformerBridge from a folder or hub id."""

import warnings
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from harmcircuits.display import dtype_name, plural
from harmcircuits.hooks.bridge import Bridge
from harmcircuits.hooks.weights import weight_sites

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WIDE = 512  # a model's width, below which a slow number format is not felt
SLOW = 3.0  # times as long as float32
TIMED = 256  # width of the matrices that a number format is timed on
N_TIMES = 5  # of which the fastest counts


def refuse_device(device: str) -> None:
    """Raises ValueError for a device that this machine has not, before anything is loaded."""
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(
            f"device={device!r}: no such device; expected cpu, cuda or cuda:0"
        ) from None
    if place.type == "cuda":
        n_devices = torch.cuda.device_count()
        if (place.index or 0) >= n_devices:
            raise ValueError(
                f"device={device!r}: this machine has {plural(n_devices, 'CUDA device')}; "
                "give device='cpu', or one that it has"
            )
    if place.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"device={device!r}: this machine has no such device; give device='cpu'")


def load_model(
    model: str,
    *,
    dtype: str = "",
    device: str = "cpu",
    device_map: str = "",
) -> "TransformerBridge":
    """The model of a folder or hub id as a TransformerBridge.

    >>> from harmcircuits.organisms import FOLDER
    >>> type(hc.load_model(str(FOLDER / "base"))).__name__
    'TransformerBridge'

    Args:
        model: the folder or id.
        dtype: "float32", "bfloat16" or "float16"; as stored by default.
        device: a torch device.
        device_map: "auto" or "balanced" spreads the model over several devices instead.

    Raises:
        ValueError: another dtype, a model that cannot be loaded, an adapter that is not merged, and
            weights that cannot be scored (see `named_weights`).
    """
    # Imported here: opening a model is what TransformerLens, which takes seconds, is needed for.
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoConfig

    if dtype and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}; expected one of {', '.join(DTYPES)}")
    refuse_device(device)
    folder = Path(model)
    is_adapter = (folder / "adapter_config.json").is_file()
    if is_adapter and not (folder / "config.json").is_file():
        raise ValueError(
            f"{model} is an adapter; merge it into its base (merge_and_unload) "
            "and give the merged folder"
        )
    where: dict[str, Any] = {"device": device}
    if device_map:
        where = {"device_map": device_map}
    try:
        # The bridge would load in float32 whatever the file holds.
        stored = AutoConfig.from_pretrained(model).dtype or torch.float32
        chosen = DTYPES[dtype] if dtype else stored
        bridge = TransformerBridge.boot_transformers(model, dtype=chosen, **where)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    # A damaged file of a model ends in an error of the library that reads it, whichever that is.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"model {model!r} cannot be loaded; expected a folder or a hub id of a causal language "
            f"model that TransformerLens opens ({reason})"
        ) from error
    weight_sites(bridge)  # refuses what cannot be scored, before anything is measured
    return bridge


def slow_dtype(bridge: Bridge, device: str | torch.device) -> str:
    """A sentence where this processor computes much slower in the model's dtype than in float32."""
    weight = next(iter(weight_sites(bridge).values())).parameter
    if not _is_slow(bridge.cfg.d_model, weight.dtype, device):
        return ""
    return f"{_slowness(weight.dtype)}; give dtype='float32' where there is twice the memory"


def usual_dtype(model: str, device: str) -> str:
    """The number format to work in where none is given: float32 where that is much faster."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError):  # said by `load_model`
        return ""
    width = getattr(config.get_text_config(), "hidden_size", 0)
    stored: Any = config.dtype or torch.float32
    if not _is_slow(width, stored, device):
        return ""
    warnings.warn(
        f"{model} is opened in float32, in twice the memory, since {_slowness(stored)}; give "
        f"dtype={dtype_name(stored)!r} to leave it as it is stored",
        stacklevel=6,  # who calls `open_model`
    )
    return "float32"


def _is_slow(width: int, dtype: torch.dtype, device: str | torch.device) -> bool:
    is_felt = width >= WIDE and torch.device(device).type == "cpu"
    return is_felt and slowdown(dtype) >= SLOW


def _slowness(dtype: torch.dtype) -> str:
    times = f"{slowdown(dtype):.0f} times"
    return f"this processor takes {times} as long in {dtype_name(dtype)} as in float32"


@cache
def slowdown(dtype: torch.dtype) -> float:
    """How many times as long as in float32 a matrix takes on the CPU, forward and backward."""
    if dtype == torch.float32:
        return 1.0
    return _seconds(dtype) / _seconds(torch.float32)


def _seconds(dtype: torch.dtype) -> float:
    """Of the products that a linear layer makes of its weight."""
    weight = torch.ones(TIMED, TIMED, dtype=dtype)
    values = torch.ones(TIMED, TIMED, dtype=dtype)
    times = []
    for _ in range(N_TIMES):
        start = perf_counter()
        _ = values @ weight.T  # the output
        _ = values @ weight  # of the output's gradient, the input's
        times.append(perf_counter() - start)
    return min(times)


def load_outline(model: str, *, dtype: str = "") -> "TransformerBridge":
    """A model's shapes without its weights, from its configuration alone."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    if dtype and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}; expected one of {', '.join(DTYPES)}")
    try:
        config = AutoConfig.from_pretrained(model)
        chosen = DTYPES[dtype] if dtype else config.dtype or torch.float32
        with torch.device("meta"):
            outline = AutoModelForCausalLM.from_config(
                config, dtype=chosen, attn_implementation="eager"
            )
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"model {model!r} has no configuration of a language model; expected a folder, a hub "
            f"id or a config.json ({reason})"
        ) from None
    # The bridge asks for a tokenizer, and nothing is tokenized.
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_no_words())
    try:
        bridge = TransformerBridge.boot_transformers(
            model, hf_model=outline, tokenizer=tokenizer, dtype=chosen, device="meta"
        )
    except NotImplementedError:  # some fused matrices are split by their values
        raise ValueError(
            f"model {model!r} fuses matrices in a way that only a loaded model tells apart; "
            "load it and use estimate_search"
        ) from None
    weight_sites(bridge)
    return bridge


def _no_words() -> Any:
    from tokenizers import Tokenizer, models

    return Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>"))


def wrap_model(model: Any, tokenizer: Any = None) -> "TransformerBridge":
    """A Hugging Face model that is already loaded as a TransformerBridge over the same weights."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoTokenizer

    origin = getattr(model.config, "_name_or_path", "")
    if tokenizer is None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(origin)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"no tokenizer is stored at {origin!r}, where the model came from; "
                f"give tokenizer=... ({error})"
            ) from None
    bridge = TransformerBridge.boot_transformers(
        origin,
        hf_model=model,
        tokenizer=tokenizer,
        dtype=model.dtype,
        device=str(model.device),
    )
    weight_sites(bridge)
    return bridge
