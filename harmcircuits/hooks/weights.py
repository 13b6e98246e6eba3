"""Which tensors are the weights, each once by its clean TransformerLens name, and their digests."""

import hashlib
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, groupby
from typing import Any

import torch
from torch import Tensor, nn

from harmcircuits.circuits.masks import WeightMask
from harmcircuits.circuits.scores import Source
from harmcircuits.circuits.sites import MATRIX_KINDS, Site, place_of
from harmcircuits.hooks.bridge import AnyModel, Bridge, as_bridge
from harmcircuits.storage import tensor_bytes

# Names of block matrices: blocks.0.attn.q.weight, blocks.3.mlp.in.weight, and, where several
# experts are stacked in one parameter, blocks.3.mlp.experts.gate_up_proj.
DENSE_NAME = r"(?:attn\.[qkvo]|mlp\.(?:gate|in|out))\.weight"
EXPERTS_NAME = r"mlp\.experts\.(?:gate_up|down)_proj"
MATRIX_NAME = re.compile(rf"blocks\.\d+\.(?:{DENSE_NAME}|{EXPERTS_NAME})")

FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# How quantised weights are stored. Masks are bool and positions int64, so these are neither.
QUANTISED_DTYPES = (torch.int8, torch.uint8, torch.int32)
# What masks say of the weights they were made on holds for a model that is opened in any dtype.
PROVENANCE_DTYPE = torch.bfloat16


def weight_sites(bridge: AnyModel) -> dict[str, Site]:
    """Every block matrix once, by clean name, layer by layer, with what its axes mean.

    >>> site = hc.weight_sites(bridge)["blocks.1.attn.q.weight"]
    >>> site.layer, site.kind, site.n_units
    (1, 'attn.q', 4)

    Args:
        bridge: The `TransformerBridge`, or a `harmcircuits.Model` with one.

    Raises:
        ValueError: For anything that is not a bridge; for processed weights
            (`enable_compatibility_mode` folds and centres in place, so scores would belong to
            another basis); for quantised weights; for weights that a `device_map` keeps on disk;
            for a block with other matrices than those of `MATRIX_KINDS`.
    """
    return block_sites(as_bridge(bridge))


def block_sites(bridge: Bridge) -> dict[str, Site]:
    """`weight_sites` of a bridge itself."""
    if bridge._weights_processed:
        raise ValueError(
            "weight_sites: this bridge's weights are processed (enable_compatibility_mode folds "
            "norms and centres weights in place), so scores and masks would not fit the model as "
            "stored; boot a fresh TransformerBridge"
        )
    matrices = _matrices(bridge)
    _refuse_offloaded(matrices)
    _refuse_unusual(bridge, matrices)

    sites = [_site(bridge, name, parameter) for name, parameter in matrices.items()]
    sites.sort(key=lambda site: (site.layer, MATRIX_KINDS.index(site.kind)))
    return {site.name: site for site in sites}


def named_weights(bridge: AnyModel) -> dict[str, nn.Parameter]:
    """The live block matrices by clean name, as stored: `{"blocks.0.mlp.in.weight": Parameter}`.

    Editing one in place changes the next forward pass. Embedding, unembedding, norms and biases
    are not among them.

    >>> weights = hc.named_weights(bridge)
    >>> len(weights), tuple(weights["blocks.0.mlp.in.weight"].shape)
    (28, (512, 128))

    Args:
        bridge: The `TransformerBridge`, or a `harmcircuits.Model` with one.

    Raises:
        ValueError: As `weight_sites`.
    """
    return {name: site.parameter for name, site in weight_sites(bridge).items()}


def changed_weights(base: AnyModel, edited: AnyModel) -> WeightMask:
    """The weights that an edit changed, whoever made it: where two models differ.

    A mask of `base`, over `named_weights`. After full fine-tuning it has nearly all of them.

    >>> mask = hc.top_fraction(hc.removal_effect(bridge, harm), 0.001)
    >>> edited = hc.load_model(str(hc.export(model, mask, "edited")), dtype="float32")
    >>> hc.changed_weights(bridge, edited) == mask
    True

    Args:
        base: The `TransformerBridge`, or a `harmcircuits.Model` with one, before the edit.
        edited: That after it, in the same dtype.

    Raises:
        ValueError: For a matrix that lacks or has another shape or dtype; as `named_weights`.
    """
    changed, shapes, after = {}, {}, named_weights(edited)
    for name, weight in named_weights(base).items():
        other = after.get(name)
        if other is None or (other.shape, other.dtype) != (weight.shape, weight.dtype):
            raise ValueError(
                f"changed_weights: {name} is not of one shape and dtype in both models; load the "
                "edited one as the other was loaded, such as dtype='float32'"
            )
        is_changed = weight.detach() != other.detach().to(weight.device)
        changed[name] = is_changed.flatten().nonzero().flatten()
        shapes[name] = tuple(weight.shape)
    return WeightMask(changed, shapes, source_on(as_bridge(base), "changed_weights"))


def model_fingerprint(bridge: Bridge) -> str:
    """Sixteen hex digits that tell checkpoints apart and do not change under a mask."""
    # Matrices by name and shape; embeddings and norms by name and up to 1024 of their values,
    # rounded to bfloat16.
    digest = hashlib.sha256()
    for name, tensor in _stored_tensors(bridge).items():
        if MATRIX_NAME.fullmatch(name):
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
        elif isinstance(tensor, nn.Parameter) and name.endswith("weight"):
            flat = tensor.detach().flatten()
            step = max(1, flat.numel() // 1024)
            digest.update(name.encode())
            digest.update(tensor_bytes(flat[::step][:1024].to(torch.bfloat16)))
    return digest.hexdigest()[:16]


def weights_digest(bridge: Bridge, dtype: torch.dtype | None = None) -> str:
    """Sixteen hex digits of all weights as they are now, or as they are in another dtype."""
    digest = hashlib.sha256(model_fingerprint(bridge).encode())
    seen = set()
    for name, parameter in bridge.named_parameters():
        if parameter.is_meta or parameter.data_ptr() in seen:  # tied embeddings
            continue
        seen.add(parameter.data_ptr())
        stored = parameter.detach().to(dtype or parameter.dtype)
        digest.update(f"{name} {stored.dtype} {tuple(stored.shape)}".encode())
        digest.update(tensor_bytes(stored))
    return digest.hexdigest()[:16]


def on_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Flat tensors on the CPU: neighbours of one device and dtype go in one transfer."""
    moved: list[Tensor] = []
    for _, alike in groupby(tensors, key=lambda tensor: (tensor.device, tensor.dtype)):
        group = list(alike)
        moved += torch.cat(group).cpu().split([len(tensor) for tensor in group])
    return moved


def sources_on(bridge: Bridge) -> Callable[..., Source]:
    """Gives the source of each thing that is made on a model as it is now: its weights are read."""
    model, digest = model_fingerprint(bridge), weights_digest(bridge, PROVENANCE_DTYPE)

    def source(
        method: str,
        settings: Mapping[str, Any] | None = None,
        parents: tuple[Source, ...] = (),
    ) -> Source:
        return Source(model, method, settings or {}, parents, digest)

    return source


def source_on(bridge: Bridge, method: str, settings: Mapping[str, Any] | None = None) -> Source:
    """The source of what is made on a model as it is now."""
    return sources_on(bridge)(method, settings)


def refuse_other_model(bridge: Bridge, mask: WeightMask) -> None:
    """Check that the mask was made on this model, by its fingerprint."""
    fingerprint = model_fingerprint(bridge)
    if mask.source.model != fingerprint:
        raise ValueError(
            f"the mask was made on model {mask.source.model}, this one is {fingerprint}; "
            "nothing was changed. masked(..., same_model=False) applies it to another checkpoint"
        )


def warn_of_other_weights(bridge: Bridge, mask: WeightMask) -> None:
    """A warning where a mask that was read from a file was made on other weights than these."""
    made_on = mask.source.all_weights
    # Said, and the weights read, once for a model and a file.
    compared: set[str] = vars(bridge).setdefault("_harmcircuits_masks", set())
    if not made_on or not mask.file or mask.file in compared:
        return
    compared.add(mask.file)
    digest = weights_digest(bridge, PROVENANCE_DTYPE)
    if digest not in made_on:
        warnings.warn(
            f"{mask.file}: the mask was made on weights {', '.join(sorted(made_on))}, this model "
            f"has {digest}: another checkpoint, or one that was trained further; find the "
            "mask on these weights, or say that it is meant by same_model=False",
            stacklevel=5,  # masked, its context manager, and whoever enters it
        )


def _stored_tensors(bridge: Bridge) -> Mapping[str, Tensor]:
    """Every stored tensor once by its clean name."""
    # The bridge's state dict leaves out stacked experts.
    return dict(bridge.state_dict(keep_vars=True)) | _matrices(bridge)


def _matrices(bridge: Bridge) -> dict[str, nn.Parameter]:
    """The block matrices by clean name."""
    # A bridge wraps the modules of the Hugging Face model, and holds each weight under several
    # names, of which one is clean:
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

    # What the axes of a weight mean depends on how it is stored and on what it does:
    #
    #                               nn.Linear             Conv1D (GPT-2)
    #     attn.q, k, v              [heads, d_model]      [d_model, heads]
    #     mlp.gate, in              [neurons, d_model]    [d_model, neurons]
    #     attn.o                    [d_model, heads]      [heads, d_model]
    #     mlp.out                   [d_model, neurons]    [neurons, d_model]
    component = block.get_submodule(kind)
    stored_type = type(component.original_component).__name__
    input_axis = 0 if stored_type == "Conv1D" else 1
    reads_units = kind in ("attn.o", "mlp.out")  # the others write to them
    unit_axis = input_axis if reads_units else 1 - input_axis

    n_units = bridge.cfg.n_heads
    if kind.startswith("mlp"):
        n_units = parameter.shape[unit_axis]  # a neuron is a single row or column
    elif kind in ("attn.k", "attn.v") and bridge.cfg.n_key_value_heads:
        n_units = bridge.cfg.n_key_value_heads  # each is read by several query heads
    return Site(name, layer, kind, parameter, input_axis, unit_axis, n_units)


def _expert_site(name: str, layer: int, kind: str, parameter: nn.Parameter) -> Site:
    # A unit is an expert, and experts come first on every axis order:
    #
    #     router          [expert, d_model]          mlp.gate in a sparse block
    #     gate_up_proj    [expert, 2 d_mlp, d_model]
    #     down_proj       [expert, d_model, d_mlp]
    is_router = kind == "mlp.gate"
    return Site(
        name=name,
        layer=layer,
        kind="mlp.router" if is_router else kind,
        parameter=parameter,
        input_axis=1 if is_router else 2,
        unit_axis=0,
        n_units=parameter.shape[0],
        is_hooked=False,
    )


def _refuse_offloaded(matrices: Mapping[str, nn.Parameter]) -> None:
    for name, parameter in matrices.items():
        if parameter.is_meta:  # a shape without values
            raise ValueError(
                f"weight_sites: {name} {tuple(parameter.shape)} is not in memory (device_map "
                "keeps it on disk or loads it for each pass), so it can be neither scored nor "
                "masked; give a device_map that fits the devices"
            )


def _refuse_unusual(bridge: Bridge, matrices: Mapping[str, nn.Parameter]) -> None:
    """Raises ValueError for blocks of which scores and masks would leave something out."""
    # By memory, not by name: the gate and up parts of a fused matrix (Phi-3) are views of it, so
    # the fused original counts as covered.
    covered = {parameter.untyped_storage().data_ptr() for parameter in matrices.values()}
    tensors: dict[str, Tensor] = dict(matrices)
    for name, tensor in chain(bridge.blocks.named_parameters(), bridge.blocks.named_buffers()):
        tensors["blocks." + name.replace("._original_component", "")] = tensor

    for name, tensor in tensors.items():
        if tensor.ndim < 2:
            continue
        is_parameter = isinstance(tensor, nn.Parameter)
        is_quantised = tensor.dtype in QUANTISED_DTYPES
        if is_quantised or (is_parameter and tensor.dtype not in FLOAT_DTYPES):
            raise ValueError(
                f"weight_sites: {name} {tuple(tensor.shape)} is {tensor.dtype}: quantised weights "
                "have no gradient and cannot be zeroed one by one; load the model in float32, "
                "bfloat16 or float16"
            )
        # GPT-NeoX, Falcon, BLOOM: the bridge computes with the parts that it has split off, and
        # the fused original takes no part.
        is_fused = ".qkv." in name
        if is_parameter and not is_fused and tensor.untyped_storage().data_ptr() not in covered:
            raise ValueError(
                f"weight_sites: {name} {tuple(tensor.shape)} is no matrix of the kinds "
                f"{', '.join(MATRIX_KINDS)}, so scores and masks would silently leave it out; "
                "this block (shared experts, dense layers among sparse ones, or another) is not "
                "supported"
            )
