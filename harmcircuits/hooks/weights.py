"""Which tensors are the weights: clean TransformerLens names, live parameters, each once, with what their axes mean."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components import MoEBridge

from harmcircuits.hooks.walks import kept_while_same

KINDS = (
    "attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.in", "mlp.out",
    "mlp.router", "mlp.experts.gate_up_proj", "mlp.experts.down_proj",
)  # fmt: skip
_NAME = re.compile(r"blocks\.\d+\.(?:(?:attn\.[qkvo]|mlp\.(?:gate|in|out))\.weight|mlp\.experts\.(?:gate_up|down)_proj)")
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_INTEGERS = (torch.int8, torch.uint8, torch.int32)  # as quantised weights are stored; masks are bool, positions int64


@dataclass(frozen=True)
class Site:
    """One block matrix: its live parameter and what its axes mean.

    `input_axis` is the axis of the stored weight that reads the input: 1 for `nn.Linear` (d_out, d_in), 0 for GPT-2's
    `Conv1D` (d_in, d_out), 2 for stacked experts (expert, d_out, d_in). `unit_axis` is the axis cut into `n_units` equal
    heads (attention; query heads for q and o, key-value heads for k and v), neurons (mlp) or experts (router, experts).
    `is_hooked`: its input and output pass hook points; otherwise its gradient has to come from the parameter itself.
    """

    name: str
    layer: int
    kind: str
    parameter: nn.Parameter
    input_axis: Literal[0, 1, 2]
    unit_axis: Literal[0, 1]
    n_units: int
    is_hooked: bool = True

    @property
    def hook_in(self) -> str:
        """Hook point of the matrix's input."""
        return self.name.removesuffix("weight") + "hook_in"

    @property
    def hook_out(self) -> str:
        """Hook point of the matrix's output."""
        return self.name.removesuffix("weight") + "hook_out"

    def units(self, flat: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """The head, neuron or expert of each flat index into the weight as stored."""
        position = torch.unravel_index(flat, self.parameter.shape)[self.unit_axis]
        return position // (self.parameter.shape[self.unit_axis] // self.n_units)


def weight_sites(bridge: TransformerBridge, *, kinds: Sequence[str] = KINDS) -> dict[str, Site]:
    """Every block matrix of these kinds once, by clean name, layer by layer.

    Raises ValueError for an unknown kind, for processed weights (`enable_compatibility_mode` folds and centres in place,
    so scores would belong to another basis), for quantised weights, for weights that a `device_map` keeps on disk, and for
    a block with other matrices than these kinds.
    """
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown:
        raise ValueError(f"weight_sites: unknown kinds {unknown}; expected some of {list(KINDS)}")
    if bridge._weights_processed:
        raise ValueError(
            "weight_sites: this bridge's weights are processed (enable_compatibility_mode folds norms and centres weights "
            "in place), so scores and masks would not fit the model as stored; boot a fresh TransformerBridge"
        )
    return {site.name: site for site in _sites(bridge) if site.kind in kinds}


def named_weights(bridge: TransformerBridge, *, kinds: Sequence[str] = KINDS) -> dict[str, nn.Parameter]:
    """The live block matrices by clean TransformerLens name, as stored: `{"blocks.0.mlp.in.weight": Parameter}`.

    Editing one in place changes the next forward pass. Embedding, unembedding, norms and biases are not among them.
    Raises ValueError as `weight_sites`.
    """
    return {name: site.parameter for name, site in weight_sites(bridge, kinds=kinds).items()}


def model_fingerprint(bridge: TransformerBridge) -> str:
    """Sixteen hex digits that tell checkpoints apart and do not change under a mask or with the dtype.

    SHA-256 over the block matrices' names and shapes and up to 1024 bfloat16-rounded values of every embedding and norm.
    A merged LoRA of the block matrices therefore carries the fingerprint of its base.
    """
    digest = hashlib.sha256()
    for name, tensor in _fingerprinted(bridge):
        if tensor is None:
            digest.update(name.encode())
        else:
            flat = tensor.detach().flatten()
            sample = flat[:: max(1, flat.numel() // 1024)][:1024].to("cpu", torch.bfloat16)
            digest.update(name.encode() + sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def weights_digest(bridge: TransformerBridge) -> str:
    """Sixteen hex digits of all weights as they are now: another checkpoint, dtype, mask or training step changes them.

    SHA-256 over the fingerprint and, for every parameter, its name and the exact sum of its bits read as integers; the same
    on every device.
    """
    digest, seen = hashlib.sha256(model_fingerprint(bridge).encode()), set()
    for name, parameter in bridge.named_parameters():
        if parameter.data_ptr() not in seen:
            seen.add(parameter.data_ptr())
            bits = parameter.detach().flatten().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[parameter.itemsize])
            total = sum(part.sum(dtype=torch.int64).item() for part in bits.split(2**24))
            digest.update(f"{name} {parameter.dtype} {total}".encode())
    return digest.hexdigest()[:16]


def _tensors(bridge: TransformerBridge) -> dict[str, Tensor]:
    """Every stored tensor once by its clean name."""
    named = dict(bridge.state_dict(keep_vars=True))
    for layer, block in enumerate(bridge.blocks):
        if isinstance(getattr(block, "mlp", None), MoEBridge):  # the state dict lacks stacked experts
            for name, parameter in block.mlp.named_parameters():
                clean = f"blocks.{layer}.mlp.{name.replace('_original_component.', '')}"
                if _NAME.fullmatch(clean):
                    named[clean] = parameter
    return named


@kept_while_same
def _fingerprinted(bridge: TransformerBridge) -> list[tuple[str, Tensor | None]]:
    """What a fingerprint is made of: block matrices by name and shape, embeddings and norms with their values."""
    found = []
    for name, tensor in _tensors(bridge).items():
        if _NAME.fullmatch(name):
            found.append((f"{name}{tuple(tensor.shape)}", None))
        elif isinstance(tensor, nn.Parameter) and name.endswith("weight"):
            found.append((name, tensor))
    return found


@kept_while_same
def _sites(bridge: TransformerBridge) -> list[Site]:
    named = _tensors(bridge).items()
    matrices = {name: tensor for name, tensor in named if isinstance(tensor, nn.Parameter) and _NAME.fullmatch(name)}
    _refuse_offloaded(matrices)
    _refuse_uncovered(bridge, matrices)
    sites = [_site(bridge, name, parameter) for name, parameter in matrices.items()]
    return sorted(sites, key=lambda site: (site.layer, KINDS.index(site.kind)))


def _site(bridge: TransformerBridge, name: str, parameter: nn.Parameter) -> Site:
    layer, part = int(name.split(".")[1]), name.split(".", 2)[2].removesuffix(".weight")
    if isinstance(bridge.blocks[layer].mlp, MoEBridge) and part.startswith("mlp"):
        kind = "mlp.router" if part == "mlp.gate" else part
        return Site(name, layer, kind, parameter, 1 if parameter.ndim == 2 else 2, 0, parameter.shape[0], is_hooked=False)
    component = bridge.blocks[layer].get_submodule(part)
    input_axis = 0 if type(component.original_component).__name__ == "Conv1D" else 1
    unit_axis = input_axis if part in ("attn.o", "mlp.out") else 1 - input_axis
    if part.startswith("mlp"):
        n_units = parameter.shape[unit_axis]
    else:
        n_heads = bridge.cfg.n_heads
        n_units = n_heads if part in ("attn.q", "attn.o") else bridge.cfg.n_key_value_heads or n_heads
    return Site(name, layer, part, parameter, input_axis, unit_axis, n_units)


def _refuse_offloaded(matrices: dict[str, nn.Parameter]) -> None:
    for name, parameter in matrices.items():
        if parameter.is_meta:
            raise ValueError(
                f"weight_sites: {name} {tuple(parameter.shape)} is not in memory (device_map keeps it on disk or loads it "
                "for each pass), so it can be neither scored nor masked; give a device_map that fits the devices"
            )


def _refuse_uncovered(bridge: TransformerBridge, matrices: dict[str, nn.Parameter]) -> None:
    covered = {parameter.untyped_storage().data_ptr() for parameter in matrices.values()}
    named = chain(bridge.blocks.named_parameters(), bridge.blocks.named_buffers())
    inside = {f"blocks.{name.replace('._original_component', '')}": tensor for name, tensor in named}
    for name, tensor in (matrices | inside).items():
        is_parameter = isinstance(tensor, nn.Parameter)
        if tensor.ndim >= 2 and (tensor.dtype in _INTEGERS or (is_parameter and tensor.dtype not in _DTYPES)):
            raise ValueError(
                f"weight_sites: {name} {tuple(tensor.shape)} is {tensor.dtype}: quantised weights have no gradient and "
                "cannot be zeroed one by one; load the model in float32, bfloat16 or float16"
            )
        is_fused = ".qkv." in name  # GPT-NeoX, Falcon, BLOOM: split by the bridge, the fused original takes no part
        if is_parameter and tensor.ndim >= 2 and not is_fused and tensor.untyped_storage().data_ptr() not in covered:
            raise ValueError(
                f"weight_sites: {name} {tuple(tensor.shape)} is no matrix of the kinds {', '.join(KINDS)}, so scores and "
                "masks would silently leave it out; this block (shared experts, dense layers among sparse ones, or another "
                "unusual one) is not supported"
            )
