"""A TransformerBridge from a folder or hub id, or over a loaded Hugging Face model."""

from typing import TYPE_CHECKING, Any

import torch

from harmcircuits.hooks.weights import weight_sites

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def refuse_device(device: str) -> None:
    """Check that this machine has a device, before a model is loaded."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise ValueError(
            f"device={device!r}: this machine has no such device; give device='cpu' or 'cuda:0'"
        ) from None


def load_model(
    model: str,
    *,
    dtype: str = "",
    device: str = "cpu",
    device_map: str = "",
) -> "TransformerBridge":
    """The model in a folder or under a hub id, as a TransformerBridge.

    >>> from harmcircuits.organisms.shipped import FOLDER
    >>> type(hc.load_model(str(FOLDER / "base"))).__name__
    'TransformerBridge'

    Args:
        model: the folder or id.
        dtype: "float32", "bfloat16" or "float16"; by default that of the file.
        device: a torch device.
        device_map: "auto" or "balanced" spreads the model over several devices instead.

    Raises:
        ValueError: another dtype, a model that cannot be loaded, an adapter that is not merged, and
            weights that cannot be scored (see `named_weights`).
    """
    # Imported here, because TransformerLens takes seconds and only opening a model needs it.
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoConfig

    if dtype and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}; expected one of {', '.join(DTYPES)}")
    refuse_device(device)
    placement: Any = {"device_map": device_map} if device_map else {"device": device}
    try:
        # By default the bridge would load any file in float32.
        file_dtype = AutoConfig.from_pretrained(model).dtype or torch.float32
        torch_dtype = DTYPES[dtype] if dtype else file_dtype
        bridge = TransformerBridge.boot_transformers(model, dtype=torch_dtype, **placement)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    # A damaged file can raise any error of the library that reads it.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"model {model!r} cannot be loaded; expected a folder or a hub id of a causal language "
            "model that TransformerLens opens, an adapter merged into its base (merge_and_unload): "
            f"{reason}"
        ) from error
    weight_sites(bridge)  # refuses models that cannot be scored, before any measurement
    return bridge


def wrap_model(model: Any, tokenizer: Any = None) -> "TransformerBridge":
    """A TransformerBridge over a loaded Hugging Face model, with the same weights in memory."""
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
