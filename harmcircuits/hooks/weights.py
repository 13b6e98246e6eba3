"""Which tensors are the weights: clean TransformerLens names, live parameters, each once, with what their axes mean."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

KINDS = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.in", "mlp.out")
_NAME = re.compile(r"blocks\.(\d+)\.(attn\.[qkvo]|mlp\.(?:gate|in|out))\.weight")


@dataclass(frozen=True)
class Site:
    """One block matrix: its live parameter and what its two axes mean.

    `input_axis` is the axis of the stored weight that reads the input: 1 for `nn.Linear` (d_out, d_in), 0 for GPT-2's
    `Conv1D` (d_in, d_out). `unit_axis` is the axis cut into `n_units` equal heads (attention) or neurons (mlp):
    query heads for q and o, key-value heads for k and v.
    """

    name: str
    layer: int
    kind: str
    parameter: nn.Parameter
    input_axis: Literal[0, 1]
    unit_axis: Literal[0, 1]
    n_units: int

    @property
    def hook_in(self) -> str:
        """Hook point of the matrix's input."""
        return self.name.removesuffix("weight") + "hook_in"

    @property
    def hook_out(self) -> str:
        """Hook point of the matrix's output."""
        return self.name.removesuffix("weight") + "hook_out"

    def units(self, flat: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """The head or neuron of each flat index into the weight as stored."""
        columns = self.parameter.shape[1]
        position = flat // columns if self.unit_axis == 0 else flat % columns
        return position // (self.parameter.shape[self.unit_axis] // self.n_units)


def weight_sites(bridge: TransformerBridge, *, kinds: Sequence[str] = KINDS) -> dict[str, Site]:
    """Every block matrix of these kinds once, by clean name, layer by layer.

    Raises ValueError for an unknown kind, for processed weights (`enable_compatibility_mode` folds and centres in place,
    so scores would belong to another basis), and for a block with matrices that have no hook pair (mixture-of-experts).
    """
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown:
        raise ValueError(f"weight_sites: unknown kinds {unknown}; expected some of {list(KINDS)}")
    if bridge._weights_processed:
        raise ValueError(
            "weight_sites: this bridge's weights are processed (enable_compatibility_mode folds norms and centres weights "
            "in place), so scores and masks would not fit the model as stored; boot a fresh TransformerBridge"
        )
    parameters = {name: p for name, p in bridge.state_dict(keep_vars=True).items() if isinstance(p, nn.Parameter)}
    _refuse_uncovered(bridge, parameters)
    matches = {name: match for name in parameters if (match := _NAME.fullmatch(name))}
    order = sorted(matches, key=lambda name: (int(matches[name][1]), KINDS.index(matches[name][2])))
    return {name: _site(bridge, name, parameters[name], matches[name]) for name in order if matches[name][2] in kinds}


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
    for name, parameter in bridge.state_dict(keep_vars=True).items():
        if _NAME.fullmatch(name):
            digest.update(f"{name}{tuple(parameter.shape)}".encode())
        elif isinstance(parameter, nn.Parameter) and name.endswith("weight"):
            flat = parameter.detach().flatten()
            sample = flat[:: max(1, flat.numel() // 1024)][:1024].to("cpu", torch.bfloat16)
            digest.update(name.encode() + sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def _site(bridge: TransformerBridge, name: str, parameter: nn.Parameter, match: re.Match[str]) -> Site:
    layer, kind = int(match[1]), match[2]
    component = bridge.blocks[layer].get_submodule(kind)
    input_axis = 0 if type(component.original_component).__name__ == "Conv1D" else 1
    reads_units = kind in ("attn.o", "mlp.out")
    unit_axis = input_axis if reads_units else 1 - input_axis
    if kind.startswith("mlp"):
        n_units = parameter.shape[unit_axis]
    else:
        n_heads = bridge.cfg.n_heads
        n_units = n_heads if kind in ("attn.q", "attn.o") else bridge.cfg.n_key_value_heads or n_heads
    return Site(name, layer, kind, parameter, input_axis, unit_axis, n_units)


def _refuse_uncovered(bridge: TransformerBridge, parameters: dict[str, nn.Parameter]) -> None:
    covered = {p.untyped_storage().data_ptr() for name, p in parameters.items() if _NAME.fullmatch(name)}
    for name, parameter in bridge.blocks.named_parameters():
        is_fused = ".qkv." in name  # GPT-NeoX, Falcon, BLOOM: split by the bridge, the fused original takes no part
        if parameter.ndim >= 2 and not is_fused and parameter.untyped_storage().data_ptr() not in covered:
            raise ValueError(
                f"weight_sites: {name.replace('._original_component', '')} {tuple(parameter.shape)} in a block is no plain "
                "attention or mlp matrix (a mixture-of-experts or unusual block); only dense transformers are supported"
            )
