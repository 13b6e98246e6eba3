"""Which tensors are the weights: clean TransformerLens names, live parameters, each once."""

import hashlib
import re
from collections.abc import Callable, Iterator
from functools import cache, wraps
from itertools import chain
from operator import is_
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from harmcircuits.circuits.sites import KINDS, Site
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
# The integers that a parameter's bits are read as, by bytes an element.
INTEGER_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
CHUNK = 2**20  # elements

Result = TypeVar("Result")


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
            for a block with other matrices than those of `KINDS`.
    """
    bridge = as_bridge(bridge)
    _refuse_processed(bridge)
    return {site.name: site for site in _sites(bridge)}


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


def model_fingerprint(bridge: Bridge) -> str:
    """Sixteen hex digits that tell checkpoints apart and do not change under a mask."""
    return _fingerprint(_fingerprinted(bridge))


def weights_and_fingerprint(bridge: Bridge) -> tuple[dict[str, nn.Parameter], str]:
    """`named_weights` and `model_fingerprint`, after one look at what the bridge consists of."""
    _refuse_processed(bridge)
    sites, entries = _sites_and_fingerprinted(bridge)
    return {site.name: site.parameter for site in sites}, _fingerprint(entries)


def weights_digest(bridge: Bridge) -> str:
    """Sixteen hex digits of all weights as they are now: SHA-256 of their names and bytes."""
    return _kept_digest(bridge, None)


def values_digest(bridge: Bridge) -> str:
    """Sixteen hex digits of all weights rounded to bfloat16: as `weights_digest`, for any dtype."""
    return _kept_digest(bridge, torch.bfloat16)


def _kept_digest(bridge: Bridge, dtype: torch.dtype | None) -> str:
    # Kept on the bridge itself, so that it goes when the bridge goes.
    digests: dict[Any, str] = vars(bridge).setdefault("_harmcircuits_digests", {})
    question = dtype, weights_checksum(bridge)
    if question not in digests:
        digests[question] = parameters_digest(bridge, model_fingerprint(bridge), dtype=dtype)
    return digests[question]


def weights_checksum(bridge: Bridge) -> str:
    """Sixteen hex digits by which weights are known again in this process, on their own device."""
    digest = hashlib.sha256()
    for name, parameter in _distinct_parameters(bridge):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        flat = parameter.detach().flatten()
        # In the widest integers that divide it: for bfloat16, a fourth of the products.
        n_bytes = flat.numel() * flat.itemsize
        width = 8 if n_bytes % 8 == 0 and flat.data_ptr() % 8 == 0 else flat.itemsize
        total = 0
        for part in flat.view(INTEGER_OF_SIZE[width]).split(CHUNK):
            products = _multipliers(str(part.device))[: len(part)] * part
            total += products.sum().item()
        digest.update(f"{total % 2**64}".encode())
    return digest.hexdigest()[:16]


@cache
def _multipliers(device: str) -> Tensor:
    """Odd random numbers, one for each element of a chunk."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(-(2**62), 2**62, (CHUNK,), generator=generator)
    return (2 * numbers + 1).to(device)


def _distinct_parameters(module: Bridge | nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter by name; of those in the same memory, such as tied embeddings, the first."""
    seen = set()
    for name, parameter in module.named_parameters():
        if not parameter.is_meta and parameter.data_ptr() not in seen:
            seen.add(parameter.data_ptr())
            yield name, parameter


def parameters_digest(
    module: Bridge | nn.Module, start: str = "", *, dtype: torch.dtype | None = None
) -> str:
    """Sixteen hex digits of all parameters of any module, as in `weights_digest`."""
    digest = hashlib.sha256(start.encode())
    for name, parameter in _distinct_parameters(module):
        stored = dtype or parameter.dtype
        digest.update(f"{name} {stored} {tuple(parameter.shape)}".encode())
        for part in parameter.detach().flatten().split(CHUNK):  # bounds what is copied at once
            digest.update(tensor_bytes(part.to(stored)))
    return digest.hexdigest()[:16]


def cached_on_bridge(walk: Callable[[Bridge], Result]) -> Callable[[Bridge], Result]:
    """`walk` with its result cached on the bridge."""

    @wraps(walk)
    def cached_walk(bridge: Bridge) -> Result:
        # Kept on the bridge itself, so that it goes when the bridge goes.
        cache = vars(bridge).setdefault("_harmcircuits_cache", {})
        if walk in cache:
            structure, result = cache[walk]
            if structure.is_of(bridge):
                return result
            del cache[walk]

        structure = _Structure(bridge)
        result = walk(bridge)
        cache[walk] = structure, result
        return result

    return cached_walk


class _Structure:
    """Which modules, parameters and buffers a bridge consists of, and where their memory is."""

    def __init__(self, bridge: Bridge) -> None:
        # The bridge does not register it as a child, so its modules are added to the bridge's own.
        # Most are in both, hence the keys.
        self.original_model = bridge.original_model
        modules = {}
        for module in chain(bridge.modules(), self.original_model.modules()):
            modules[id(module)] = module

        # Three dictionaries of each module. Held by reference: whoever replaces a weight or a
        # child writes into them, so reading them again shows what the model consists of by then.
        #
        #     a Linear     _parameters {"weight": W, "bias": b}   _buffers {}   _modules {}
        #     a block      _parameters {}   _buffers {}   _modules {"attn": A, "mlp": M}
        self.tables: list[dict[str, Any]] = []
        for module in modules.values():
            self.tables += [module._parameters, module._buffers, module._modules]
        self.sizes = list(map(len, self.tables))
        self.filled_tables = [table for table in self.tables if table]  # most are empty

        self.names = self._names()
        self.members = self._members()
        self.tensors = [member for member in self.members if isinstance(member, Tensor)]
        self.memory = _memory(self.tensors)

    def is_of(self, bridge: Bridge) -> bool:
        """Whether the bridge still consists of the very same objects."""
        # The cheapest question first. A module that is new somewhere changes the `_modules` of its
        # parent, so the modules need not be walked again.
        if bridge.original_model is not self.original_model:
            return False
        if list(map(len, self.tables)) != self.sizes or self._names() != self.names:
            return False

        # The very same object may have been given other memory: `parameter.data = ...`.
        is_same = all(map(is_, self._members(), self.members))
        return is_same and _memory(self.tensors) == self.memory

    def _names(self) -> list[str]:
        return list(chain.from_iterable(self.filled_tables))

    def _members(self) -> list[Any]:
        return list(chain.from_iterable(map(dict.values, self.filled_tables)))


def _memory(tensors: list[Tensor]) -> list[Any]:
    return [(tensor.data_ptr(), tensor.dtype, tensor.shape) for tensor in tensors]


@cached_on_bridge
def _fingerprinted(bridge: Bridge) -> list[tuple[str, Tensor | None]]:
    """Block matrices by name and shape, embeddings and norms by name and values."""
    entries = []
    for name, tensor in stored_tensors(bridge).items():
        if MATRIX_NAME.fullmatch(name):
            entries.append((f"{name}{tuple(tensor.shape)}", None))
        elif isinstance(tensor, nn.Parameter) and name.endswith("weight"):
            entries.append((name, tensor))
    return entries


def _fingerprint(entries: list[tuple[str, Tensor | None]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in entries:
        digest.update(name.encode())
        if tensor is not None:
            digest.update(_sampled_bits(tensor))
    return digest.hexdigest()[:16]


def _sampled_bits(tensor: Tensor) -> bytes:
    """Up to 1024 values, evenly over the tensor, as bfloat16."""
    flat = tensor.detach().flatten()
    step = max(1, flat.numel() // 1024)
    sample = flat[::step][:1024].to("cpu", torch.bfloat16)
    # numpy has no bfloat16, so the bits are handed over as integers.
    return sample.view(torch.int16).numpy().tobytes()


@cached_on_bridge
def _sites(bridge: Bridge) -> list[Site]:
    matrices = {}
    for name, tensor in stored_tensors(bridge).items():
        if isinstance(tensor, nn.Parameter) and MATRIX_NAME.fullmatch(name):
            matrices[name] = tensor

    # All refusals before the first site: a score or mask that left something out would look whole.
    tensors = matrices | _block_tensors(bridge)
    if str(bridge.cfg.device) != "meta":  # where a model is an outline, all of it is
        _refuse_offloaded(matrices)
    _refuse_quantised(tensors)
    _refuse_uncovered(tensors, matrices)

    sites = [_site(bridge, name, parameter) for name, parameter in matrices.items()]
    return sorted(sites, key=lambda site: (site.layer, KINDS.index(site.kind)))


@cached_on_bridge
def _sites_and_fingerprinted(
    bridge: Bridge,
) -> tuple[list[Site], list[tuple[str, Tensor | None]]]:
    return _sites(bridge), _fingerprinted(bridge)


def stored_tensors(bridge: Bridge) -> dict[str, Tensor]:
    """Every stored tensor once by its clean name."""
    named = dict(bridge.state_dict(keep_vars=True))
    for layer, block in enumerate(bridge.blocks):
        if not _has_experts(block):
            continue
        # The bridge's state dict leaves out stacked experts, which its MLP holds as
        # _original_component.experts.gate_up_proj.
        for name, parameter in block.mlp.named_parameters():
            part = name.replace("_original_component.", "")
            clean_name = f"blocks.{layer}.mlp.{part}"
            if MATRIX_NAME.fullmatch(clean_name):
                named[clean_name] = parameter
    return named


def _block_tensors(bridge: Bridge) -> dict[str, Tensor]:
    """Every parameter and buffer of the blocks, by the name under which the bridge holds it."""
    tensors = {}
    named = chain(bridge.blocks.named_parameters(), bridge.blocks.named_buffers())
    for name, tensor in named:
        clean_name = name.replace("._original_component", "")
        tensors[f"blocks.{clean_name}"] = tensor
    return tensors


def _has_experts(block: Any) -> bool:
    # Imported late: whoever has a bridge has loaded TransformerLens already, and scores and masks
    # alone do not need the seconds that it takes.
    from transformer_lens.model_bridge.generalized_components import MoEBridge

    return isinstance(getattr(block, "mlp", None), MoEBridge)


def _site(bridge: Bridge, name: str, parameter: nn.Parameter) -> Site:
    _, layer, part = name.split(".", maxsplit=2)
    part = part.removesuffix(".weight")
    block = bridge.blocks[int(layer)]
    if part.startswith("mlp") and _has_experts(block):
        return _expert_site(name, int(layer), part, parameter)

    # What the axes of a weight mean depends on how it is stored and on what it does:
    #
    #                               nn.Linear             Conv1D (GPT-2)
    #     attn.q, k, v              [heads, d_model]      [d_model, heads]
    #     mlp.gate, in              [neurons, d_model]    [d_model, neurons]
    #     attn.o                    [d_model, heads]      [heads, d_model]
    #     mlp.out                   [d_model, neurons]    [neurons, d_model]
    component = block.get_submodule(part)
    stored_type = type(component.original_component).__name__
    input_axis = 0 if stored_type == "Conv1D" else 1
    reads_units = part in ("attn.o", "mlp.out")  # the others write to them
    unit_axis = input_axis if reads_units else 1 - input_axis
    return Site(
        name=name,
        layer=int(layer),
        kind=part,
        parameter=parameter,
        input_axis=input_axis,
        unit_axis=unit_axis,
        n_units=_n_units(bridge, part, parameter.shape[unit_axis]),
    )


def _n_units(bridge: Bridge, part: str, size: int) -> int:
    if part.startswith("mlp"):
        return size  # a neuron is a single row or column
    # With grouped queries several query heads share one head of keys and values.
    if part in ("attn.k", "attn.v") and bridge.cfg.n_key_value_heads:
        return bridge.cfg.n_key_value_heads
    return bridge.cfg.n_heads


def _expert_site(
    name: str,
    layer: int,
    part: str,
    parameter: nn.Parameter,
) -> Site:
    # A unit is an expert, and experts come first on every axis order:
    #
    #     router          [expert, d_model]          mlp.gate in a sparse block
    #     gate_up_proj    [expert, 2 d_mlp, d_model]
    #     down_proj       [expert, d_model, d_mlp]
    is_router = part == "mlp.gate"
    return Site(
        name=name,
        layer=layer,
        kind="mlp.router" if is_router else part,
        parameter=parameter,
        input_axis=1 if is_router else 2,
        unit_axis=0,
        n_units=parameter.shape[0],
        is_hooked=False,
    )


def _refuse_processed(bridge: Bridge) -> None:
    if bridge._weights_processed:
        raise ValueError(
            "weight_sites: this bridge's weights are processed (enable_compatibility_mode folds "
            "norms and centres weights in place), so scores and masks would not fit the model as "
            "stored; boot a fresh TransformerBridge"
        )


def _refuse_offloaded(matrices: dict[str, nn.Parameter]) -> None:
    for name, parameter in matrices.items():
        if parameter.is_meta:  # a shape without values
            raise ValueError(
                f"weight_sites: {name} {tuple(parameter.shape)} is not in memory (device_map "
                "keeps it on disk or loads it for each pass), so it can be neither scored nor "
                "masked; give a device_map that fits the devices"
            )


def _refuse_quantised(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        is_quantised = tensor.dtype in QUANTISED_DTYPES
        if isinstance(tensor, nn.Parameter) and tensor.dtype not in FLOAT_DTYPES:
            is_quantised = True
        if tensor.ndim >= 2 and is_quantised:
            raise ValueError(
                f"weight_sites: {name} {tuple(tensor.shape)} is {tensor.dtype}: quantised weights "
                "have no gradient and cannot be zeroed one by one; load the model in float32, "
                "bfloat16 or float16"
            )


def _refuse_uncovered(tensors: dict[str, Tensor], matrices: dict[str, nn.Parameter]) -> None:
    # By memory, not by name: the gate and up parts of a fused matrix (Phi-3) are views of it, so
    # the fused original counts as covered.
    covered = {parameter.untyped_storage().data_ptr() for parameter in matrices.values()}
    for name, tensor in tensors.items():
        if tensor.ndim < 2 or not isinstance(tensor, nn.Parameter):
            continue
        # GPT-NeoX, Falcon, BLOOM: the bridge computes with the parts that it has split off, and
        # the fused original takes no part.
        is_fused = ".qkv." in name
        if not is_fused and tensor.untyped_storage().data_ptr() not in covered:
            raise ValueError(
                f"weight_sites: {name} {tuple(tensor.shape)} is no matrix of the kinds "
                f"{', '.join(KINDS)}, so scores and masks would silently leave it out; this block "
                "(shared experts, dense layers among sparse ones, or another unusual one) is not "
                "supported"
            )
