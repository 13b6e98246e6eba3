"""The block matrices of a model by clean TransformerLens name, and digests of its weights."""

import hashlib
import re
import warnings
from collections.abc import Mapping, Sequence
from itertools import accumulate, chain, groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from harmcircuits.circuits.masks import WeightMask
from harmcircuits.circuits.scores import Source
from harmcircuits.circuits.sites import MATRIX_KINDS, Site, place_of
from harmcircuits.hooks.bridge import AnyModel, Bridge, as_bridge
from harmcircuits.storage import tensor_bytes

# Names of block matrices: blocks.0.attn.q.weight, blocks.3.mlp.in.weight, and, where one parameter
# stacks several experts, blocks.3.mlp.experts.gate_up_proj.
MATRIX_NAME = re.compile(
    r"blocks\.\d+\.((attn\.[qkvo]|mlp\.(gate|in|out))\.weight|mlp\.experts\.(gate_up|down)_proj)"
)

FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# The dtypes of quantised weights. Masks are bool and positions int64, so neither is among them.
QUANTISED_DTYPES = (torch.int8, torch.uint8, torch.int32)
# The digest in masks and scores is of bfloat16 values, so that float32 gives the same.
PROVENANCE_DTYPE = torch.bfloat16
VALUES_PER_TRANSFER = 2**24  # of a digest


def weight_sites(bridge: AnyModel) -> dict[str, Site]:
    """Every block matrix once, by clean name, layer by layer, with the meaning of its axes.

    >>> site = hc.weight_sites(bridge)["blocks.1.attn.q.weight"]
    >>> site.layer, site.kind, site.n_units
    (1, 'attn.q', 4)

    Args:
        bridge: the model.

    Raises:
        ValueError: anything that is no bridge, processed weights (`enable_compatibility_mode` folds
            and centres weights in place, so scores would belong to another basis), quantised
            weights, weights that a `device_map` keeps on disk, and a block with a matrix that is
            none of `MATRIX_KINDS`.
    """
    return block_sites(as_bridge(bridge))


def block_sites(bridge: Bridge) -> dict[str, Site]:
    """`weight_sites` of a bridge itself."""
    if bridge._weights_processed:
        raise ValueError(
            "weight_sites: this bridge's weights are processed (enable_compatibility_mode folds "
            "norms and centres weights in place), so scores and masks would not fit the model as "
            "stored; open a new TransformerBridge"
        )
    matrices = _matrices(bridge)
    _refuse_unsupported(bridge, matrices)

    sites = [_site(bridge, name, parameter) for name, parameter in matrices.items()]
    sites.sort(key=lambda site: (site.layer, MATRIX_KINDS.index(site.kind)))
    return {site.name: site for site in sites}


def named_weights(bridge: AnyModel) -> dict[str, nn.Parameter]:
    """The live block matrices by clean name, as stored: `{"blocks.0.mlp.in.weight": Parameter}`.

    An edit of one in place changes the next forward pass. Embedding, unembedding, norms and biases
    are left out.

    >>> weights = hc.named_weights(bridge)
    >>> len(weights), tuple(weights["blocks.0.mlp.in.weight"].shape)
    (28, (512, 128))

    Args:
        bridge: the model.

    Raises:
        ValueError: as `weight_sites`.
    """
    return {name: site.parameter for name, site in weight_sites(bridge).items()}


def changed_weights(base: AnyModel, edited: AnyModel) -> WeightMask:
    """The weights that differ between two models, as a mask of `base`.

    Finds the weights that any edit changed. After full fine-tuning these are nearly all weights.

    >>> mask = hc.top_fraction(hc.removal_effect(bridge, harm), 0.001)
    >>> edited = hc.load_model(str(hc.export(model, mask, "edited")), dtype="float32")
    >>> hc.changed_weights(bridge, edited) == mask
    True

    Args:
        base: the model before the edit.
        edited: the model after the edit, in the same dtype.

    Raises:
        ValueError: a matrix that is missing or has another shape or dtype, and as `named_weights`.
    """
    new_weights = named_weights(edited)
    index, shapes = {}, {}
    for name, weight in named_weights(base).items():
        new = new_weights.get(name)
        if new is None or (new.shape, new.dtype) != (weight.shape, weight.dtype):
            raise ValueError(
                f"changed_weights: {name} is not of one shape and dtype in both models; load both "
                "in the same way, such as with dtype='float32'"
            )
        is_changed = weight.detach() != new.detach().to(weight.device)
        index[name] = is_changed.flatten().nonzero().flatten()
        shapes[name] = tuple(weight.shape)
    source = Provenance.of(as_bridge(base)).source("changed_weights")
    return WeightMask(index, shapes, source)


def model_fingerprint(bridge: Bridge) -> str:
    """Sixteen hex digits that tell checkpoints apart and do not change under a mask."""
    # Matrices by name and shape; embeddings and norms by name and up to 1024 of their values,
    # rounded to bfloat16.
    entries = []
    # The bridge's state dict leaves out stacked experts.
    tensors = dict(bridge.state_dict(keep_vars=True)) | _matrices(bridge)
    for name, tensor in tensors.items():
        if MATRIX_NAME.fullmatch(name):
            entries.append((f"{name}{tuple(tensor.shape)}", tensor.detach().flatten()[:0]))
        elif isinstance(tensor, nn.Parameter) and name.endswith("weight"):
            flat = tensor.detach().flatten()
            step = max(1, flat.numel() // 1024)
            entries.append((name, flat[::step][:1024]))
    digest = hashlib.sha256()
    _update(digest, entries, torch.bfloat16)
    return digest.hexdigest()[:16]


def weights_digest(bridge: Bridge, dtype: torch.dtype | None = None) -> str:
    """Sixteen hex digits of all weights in their current state, or as converted to a dtype."""
    entries = []
    addresses = set()
    for name, parameter in bridge.named_parameters():
        if parameter.is_meta or parameter.data_ptr() in addresses:  # tied embeddings
            continue
        addresses.add(parameter.data_ptr())
        title = f"{name} {dtype or parameter.dtype} {tuple(parameter.shape)}"
        entries.append((title, parameter.detach().flatten()))
    digest = hashlib.sha256(model_fingerprint(bridge).encode())
    _update(digest, entries, dtype)
    return digest.hexdigest()[:16]


def _update(
    digest: Any,
    entries: Sequence[tuple[str, Tensor]],
    dtype: torch.dtype | None,
) -> None:
    """Add titles and values to a digest; all that fit in one transfer go to the host together."""
    ends = accumulate(tensor.numel() for _, tensor in entries)
    transfers = groupby(
        zip(entries, ends, strict=True),
        key=lambda pair: pair[1] // VALUES_PER_TRANSFER,
    )
    for _, transfer in transfers:
        group = [entry for entry, _ in transfer]
        values = on_host([tensor.to(dtype or tensor.dtype) for _, tensor in group])
        for (title, _), tensor in zip(group, values, strict=True):
            digest.update(title.encode())
            digest.update(tensor_bytes(tensor))


def on_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Flat tensors on the CPU; neighbours of one device and dtype go in one transfer."""
    copies: list[Tensor] = []
    for _, neighbours in groupby(tensors, key=lambda tensor: (tensor.device, tensor.dtype)):
        group = list(neighbours)
        copies += torch.cat(group).cpu().split([len(tensor) for tensor in group])
    return copies


class Provenance(NamedTuple):
    """The model and a digest of its weights, on which scores or a mask are made."""

    model: str
    weights: str

    @classmethod
    def of(cls, bridge: Bridge) -> "Provenance":
        """That of a model in its current state: all its weights are read."""
        return cls(model_fingerprint(bridge), weights_digest(bridge, PROVENANCE_DTYPE))

    def source(
        self,
        method: str,
        settings: Mapping[str, Any] | None = None,
        parents: tuple[Source, ...] = (),
    ) -> Source:
        """The source of scores or a mask that a method makes on these weights."""
        return Source(self.model, method, settings or {}, parents, self.weights)


def refuse_other_model(bridge: Bridge, mask: WeightMask) -> None:
    """Check that the mask was made on this model, by its fingerprint."""
    fingerprint = model_fingerprint(bridge)
    if mask.source.model != fingerprint:
        raise ValueError(
            f"the mask was made on model {mask.source.model}, this one is {fingerprint}; "
            "nothing was changed. masked(..., same_model=False) applies it to another checkpoint"
        )


def warn_of_other_weights(bridge: Bridge, mask: WeightMask) -> None:
    """Warn if a mask was made on other weights than the model's."""
    digests = frozenset(mask.source.all_weights)
    # Warn once per model and origin of masks, and read the weights once.
    origins: set[frozenset[str]] = vars(bridge).setdefault("_harmcircuits_origins", set())
    if not digests or digests in origins:
        return
    origins.add(digests)
    digest = weights_digest(bridge, PROVENANCE_DTYPE)
    if digest not in digests:
        warnings.warn(
            f"{mask.file or 'masked'}: the mask was made on weights "
            f"{', '.join(sorted(digests))}, this model "
            f"has {digest}. It is another checkpoint, or it was trained further. Find a mask on "
            "these weights, or confirm the use of this mask by same_model=False",
            stacklevel=5,  # masked, its context manager, and whoever enters it
        )


def _matrices(bridge: Bridge) -> dict[str, nn.Parameter]:
    """The block matrices by clean name."""
    # A bridge wraps the modules of the Hugging Face model and has each weight under several names,
    # one of which is clean:
    #
    #     0.mlp._original_component.gate_proj._original_component.weight
    #     0.mlp.gate._original_component.weight
    matrices = {}
    for name, parameter in bridge.blocks.named_parameters(remove_duplicate=False):
        clean_name = "blocks." + name.replace("._original_component", "")
        if MATRIX_NAME.fullmatch(clean_name):
            matrices[clean_name] = parameter
    return matrices


def _site(bridge: Bridge, name: str, parameter: nn.Parameter) -> Site:
    layer, kind = place_of(name)
    block = bridge.blocks[layer]
    if kind.startswith("mlp") and hasattr(block.mlp, "experts"):
        return _expert_site(name, layer, kind, parameter)

    # The meaning of a weight's axes depends on its storage and on its kind:
    #
    #                               nn.Linear             Conv1D (GPT-2)
    #     attn.q, k, v              [heads, d_model]      [d_model, heads]
    #     mlp.gate, in              [neurons, d_model]    [d_model, neurons]
    #     attn.o                    [d_model, heads]      [heads, d_model]
    #     mlp.out                   [d_model, neurons]    [neurons, d_model]
    component = block.get_submodule(kind)
    stored_type = type(component.original_component).__name__
    input_axis = 0 if stored_type == "Conv1D" else 1
    reads_units = kind in ("attn.o", "mlp.out")  # other kinds write to units
    unit_axis = input_axis if reads_units else 1 - input_axis

    n_units = bridge.cfg.n_heads
    if kind.startswith("mlp"):
        n_units = parameter.shape[unit_axis]  # a neuron is one row or column
    elif kind in ("attn.k", "attn.v") and bridge.cfg.n_key_value_heads:
        n_units = bridge.cfg.n_key_value_heads  # several query heads read each
    return Site(name, layer, kind, parameter, input_axis, unit_axis, n_units)


def _expert_site(name: str, layer: int, kind: str, parameter: nn.Parameter) -> Site:
    # A unit is an expert, and the first axis is that of the experts:
    #
    #     router          [expert, d_model]          mlp.gate in a sparse block
    #     gate_up_proj    [expert, 2 d_mlp, d_model]
    #     down_proj       [expert, d_model, d_mlp]
    n_experts = parameter.shape[0]
    if kind == "mlp.gate":
        return Site(name, layer, "mlp.router", parameter, 1, 0, n_experts, is_hooked=False)
    return Site(name, layer, kind, parameter, 2, 0, n_experts, is_hooked=False)


def _refuse_unsupported(bridge: Bridge, matrices: Mapping[str, nn.Parameter]) -> None:
    """Refuse blocks with weights that scores and masks would leave out."""
    # Compared by memory, not by name: the gate and up parts of a fused matrix (Phi-3) are views of
    # it, so the fused original is covered.
    covered = {parameter.untyped_storage().data_ptr() for parameter in matrices.values()}
    tensors: dict[str, Tensor] = dict(matrices)
    for name, tensor in chain(bridge.blocks.named_parameters(), bridge.blocks.named_buffers()):
        tensors["blocks." + name.replace("._original_component", "")] = tensor

    for name, tensor in tensors.items():
        # GPT-NeoX, Falcon, BLOOM: the bridge computes with split copies of a fused matrix, and does
        # not use the original.
        is_covered = ".qkv." in name or tensor.untyped_storage().data_ptr() in covered
        fault = _fault(tensor, is_covered)
        if tensor.ndim >= 2 and fault:
            raise ValueError(f"weight_sites: {name} {tuple(tensor.shape)} {fault}")


def _fault(tensor: Tensor, is_covered: bool) -> str:
    """Why scores and masks cannot hold a matrix; empty where they can."""
    if tensor.is_meta:  # a shape without values
        return (
            "is not in memory (device_map keeps it on disk or loads it for each pass), so it can "
            "be neither scored nor masked; give a device_map whose parts fit the devices"
        )
    is_parameter = isinstance(tensor, nn.Parameter)
    if tensor.dtype in QUANTISED_DTYPES or (is_parameter and tensor.dtype not in FLOAT_DTYPES):
        return (
            f"is {tensor.dtype}: quantised weights have no gradient and cannot be zeroed one by "
            "one; load the model in float32, bfloat16 or float16"
        )
    if is_parameter and not is_covered:
        return (
            f"is no matrix of the kinds {', '.join(MATRIX_KINDS)}, so scores and masks would "
            "silently leave it out; this block (shared experts, dense layers among sparse ones, or "
            "another) is not supported"
        )
    return ""
