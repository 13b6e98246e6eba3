"""The edited model as an ordinary Hugging Face folder."""

import copy
import json
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from safetensors import SafetensorError
from torch import Tensor, nn

from harmcircuits.circuits.hub import MASK_FILE
from harmcircuits.circuits.masks import WeightMask
from harmcircuits.circuits.sites import KINDS, Site
from harmcircuits.display import plural
from harmcircuits.hooks.bridge import AnyModel, Bridge, as_bridge
from harmcircuits.hooks.masking import masked
from harmcircuits.hooks.weights import weight_sites
from harmcircuits.hub import refuse_repo, upload
from harmcircuits.storage import refuse_filled, write_text

# transformers and the bridge round in another order. The weights are compared bit for bit.
EPSILONS = 64
N_COMPARED = 16  # positions of the text on which logits are compared

# What the bridge splits into parts, in the order of its split: the parts and the split's name.
FUSED = (
    (("q", "k", "v"), "split_qkv_matrix"),
    (("gate", "in"), "split_gate_up_matrix"),
)

CARD = """---
{header}
---

# {name}, with {n_removed} weights removed

{n_removed} of the {n_weights} weights in the block matrices of `{name}` are zero; all other
tensors, the tokenizer and the configuration are those of `{name}`, whose licence and terms apply.
Made with harmcircuits for defensive research: to study which weights carry a behaviour and what
else they carry. It is no safety guarantee; removed behaviour may come back with training.

## What was removed

Weights set to zero, by layer and matrix:

{table}

## Where the mask came from

As recorded in `{file}`, without any prompt or completion (data appear as digests):

```json
{record}
```

## Undo, or apply the mask alone

`{name}` itself is unchanged, so loading it undoes everything. `{file}` holds the flat index of each
removed weight; on `{name}` it does the same in place, and reversibly:

```python
import harmcircuits as hc
from transformer_lens.model_bridge import TransformerBridge

bridge = TransformerBridge.boot_transformers("{name}")
with hc.masked(bridge, hc.WeightMask.load("{file}")):
    ...  # the edited model; restored bit for bit on exit
```

Reloaded with transformers, the logits of this folder differed from those of that edited model by at
most {difference}.
"""


def export(
    bridge: AnyModel,
    mask: WeightMask,
    folder: str | Path,
    *,
    source: str | Path | None = None,
    push_to: str | None = None,
    force: bool = False,
) -> Path:
    """The model without the mask's weights as a Hugging Face folder, checked by reloading it.

    The source model is loaded afresh in the dtype it is stored in, the mask's weights become zero
    in it, and it is saved with its tokenizer and generation config, `mask.safetensors` and a model
    card. Then it is reloaded in the bridge's dtype: every parameter must equal the masked bridge's
    bit for bit, and the logits of transformers the bridge's within 64 machine epsilons of the
    largest logit, or half the dtype's digits if that is less. The folder appears only after that.

    >>> mask = hc.top_fraction(hc.removal_effect(bridge, harm), 0.001)
    >>> hc.export(model, mask, "edited").name
    'edited'

    Args:
        bridge: a TransformerBridge, or a `Model` with one.
        mask: the weights to remove.
        folder: a new or empty one.
        source: a folder or hub id; what the bridge was booted from by default.
        push_to: uploads the folder to this hub id, which is made private if it is new.
        force: replace a folder that this function wrote, once the new one is checked.

    Returns:
        The folder.

    Raises:
        ValueError: a folder that is not empty, a mask of another model, a source that cannot be
            loaded or is not this bridge's model, logits that differ, and as `weight_sites`; nothing
            is written then. And a hub that cannot be written to, when the folder is there already.
        OSError: it cannot be written (no space, no permission); nothing is left of it then.
    """
    bridge = as_bridge(bridge)
    folder = Path(folder)
    source = str(source or bridge.cfg.model_name)
    if push_to:
        refuse_repo(push_to)
    if force:
        _refuse_another_kind(folder)
    else:
        refuse_filled(folder)
    with masked(bridge, mask), _whole_or_nothing(folder) as unfinished:
        sites = weight_sites(bridge)
        _write_model(bridge, mask, sites, source, unfinished)
        difference = _reload_difference(bridge, unfinished, source)
        mask.save(unfinished / MASK_FILE)
        card = _card(mask, sites, source, difference)
        write_text(unfinished / "README.md", card)
    if push_to:
        removed = plural(mask.n_removed, "weight")
        upload(folder, push_to, private=True, message=f"The model without {removed}")
    return folder


def _refuse_another_kind(folder: Path) -> None:
    """Raises ValueError for a folder with something else in it than what `export` writes."""
    has_model = (folder / MASK_FILE).is_file() and (folder / "config.json").is_file()
    if not has_model:
        refuse_filled(folder)


@contextmanager
def _whole_or_nothing(folder: Path) -> Iterator[Path]:
    """A sibling that takes the place of `folder` on a clean exit and is gone on any other."""
    unfinished = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        before = folder.with_name(f"{unfinished.name}-before")
        if folder.is_dir():
            folder.rename(before)
        unfinished.rename(folder)
        shutil.rmtree(before, ignore_errors=True)
    # Other libraries do not name the folder, and safetensors has its own name for a full disk.
    except (OSError, SafetensorError) as error:
        raise OSError(f"{folder}: cannot be written ({error})") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write_model(
    bridge: Bridge,
    mask: WeightMask,
    sites: Mapping[str, Site],
    source: str,
    folder: Path,
) -> None:
    """Save the source model and tokenizer with the mask's weights set to zero."""
    model, tokenizer = _opened(bridge, source)
    for name, index in mask.removed.items():
        # Whatever does not fit here comes from a source with other layers, names or shapes.
        try:
            stored = _stored(bridge, model, sites[name], index)
        except (AttributeError, IndexError, RuntimeError, ValueError):
            raise _other_model(source, name) from None
        places = torch.unravel_index(stored.flat, stored.parameter.shape)
        with torch.no_grad():
            stored.parameter[places] = 0.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _opened(bridge: Bridge, source: str) -> tuple[Any, Any]:
    """The source's model, in the dtype it is stored in, and its tokenizer."""
    from transformers import AutoConfig, AutoTokenizer

    original = bridge.original_model
    kind = original.config.model_type
    try:
        source_kind = AutoConfig.from_pretrained(source).model_type
        if source_kind != kind:
            raise ValueError(f"its configuration is of a {source_kind}, this bridge is a {kind}")
        model = type(original).from_pretrained(source, dtype="auto")
        # Read afresh: the bridge changes bos and padding of its own tokenizer.
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"export: source={source!r} gives no model and tokenizer ({reason}); "
            "pass source=, the folder or hub id that the bridge was booted from"
        ) from None
    return model, tokenizer


class _Stored(NamedTuple):
    """Where a Hugging Face model stores some weights of a site."""

    parameter: nn.Parameter
    flat: Int[Tensor, " n"]


def _stored(
    bridge: Bridge,
    model: Any,
    site: Site,
    index: Int[Tensor, " n"],
) -> _Stored:
    """Where `model` stores the weights with these flat indices in a site."""
    if site.parameter.ndim == 3:  # stacked experts are no component of the bridge
        path = f"blocks.{site.layer}.mlp"
        experts = bridge.adapter.get_component(model, path)
        name = site.name.removeprefix(f"{path}.")
        return _Stored(experts.get_parameter(name), index)

    # Name of a site            path               part     stored in
    # blocks.0.attn.q.weight    blocks.0.attn      q        attn.qkv, where the model fuses it
    # blocks.0.mlp.out.weight   blocks.0.mlp       out      mlp.out
    path, part = site.name.removesuffix(".weight").rsplit(".", 1)
    attention_or_mlp = site.kind.split(".")[0]
    owner = bridge.blocks[site.layer].get_submodule(attention_or_mlp)
    for parts, split in FUSED:
        if part in parts and hasattr(owner, split):
            fused = bridge.adapter.get_component(model, path)
            return _unsplit(fused, getattr(owner, split), parts.index(part), index)
    module = bridge.adapter.get_component(model, f"{path}.{part}")
    return _Stored(module.weight, index)


def _unsplit(
    module: nn.Module,
    split: Any,
    part: int,
    index: Int[Tensor, " n"],
) -> _Stored:
    """Where in a fused module the bridge's own `split` takes these weights of a part from."""
    numbered = copy.deepcopy(module).double()  # float64 counts to 2^53
    n_before = 0
    starts = []
    for parameter in numbered.parameters():
        starts.append(n_before)
        end = n_before + parameter.numel()
        serial = torch.arange(n_before, end, dtype=torch.float64)
        parameter.data = serial.view_as(parameter)
        n_before = end

    numbers_of_part = split(numbered)[part].weight.detach().flatten()
    numbers = numbers_of_part[index].long()
    for parameter, start in zip(module.parameters(), starts, strict=True):
        if start <= numbers[0] < start + parameter.numel():
            return _Stored(parameter, numbers - start)
    raise ValueError(f"{type(module).__name__} has no weight that the bridge splits")


def _reload_difference(bridge: Bridge, folder: Path, source: str) -> float:
    """Largest logit difference of the saved model to the bridge as it stands."""
    first_site = next(iter(weight_sites(bridge).values()))
    dtype = first_site.parameter.dtype
    _compare_weights(bridge, folder, dtype, source)

    original = bridge.original_model
    model = type(original).from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    model.to(bridge.cfg.device)
    tokens = _random_tokens(bridge)
    with torch.no_grad():
        expected = bridge(tokens)
        difference = (model(tokens).logits - expected).abs().max().item()
    # 64 epsilons are 8e-6 in float32, but half of everything in bfloat16: there the square root is
    # the smaller one, 0.09.
    epsilon = torch.finfo(dtype).eps
    relative_bound = min(EPSILONS * epsilon, epsilon**0.5)
    bound = relative_bound * expected.abs().max().item()
    if not difference <= bound:  # nor is it where one of them is not finite
        raise ValueError(
            "export: reloaded by transformers, the logits differ from the masked bridge's by up to "
            f"{difference:.3g}; expected at most {bound:.3g}. The weights are equal, so this "
            f"bridge computes otherwise than {source!r}"
        )
    return difference


def _compare_weights(
    bridge: Bridge,
    folder: Path,
    dtype: torch.dtype,
    source: str,
) -> None:
    """Raises ValueError unless every parameter of the saved model is the bridge's, bit for bit."""
    from transformer_lens.model_bridge import TransformerBridge

    reloaded = TransformerBridge.boot_transformers(
        str(folder),
        dtype=dtype,
        device=bridge.cfg.device,
    )
    expected = _parameters(bridge)
    parameters = _parameters(reloaded)
    # A name that only one of them has is a difference too.
    for name in expected.keys() | parameters.keys():
        is_in_both = name in expected and name in parameters
        if not is_in_both or not torch.equal(expected[name], parameters[name]):
            raise _other_model(source, name)


def _random_tokens(bridge: Bridge) -> Int[Tensor, "batch pos"]:
    length = min(N_COMPARED, bridge.cfg.n_ctx)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(bridge.cfg.d_vocab, (2, length), generator=generator)
    return tokens.to(bridge.cfg.device)


def _parameters(bridge: Bridge) -> dict[str, nn.Parameter]:
    """Every parameter by name: those of the state dict, and stacked experts, which it lacks."""
    named = {}
    for name, tensor in bridge.state_dict(keep_vars=True).items():
        if isinstance(tensor, nn.Parameter):
            named[name] = tensor
    for name, site in weight_sites(bridge).items():
        named[name] = site.parameter
    return named


def _other_model(source: str, name: str) -> ValueError:
    return ValueError(
        f"export: {name} of source={source!r} is not this bridge's (another checkpoint, or weights "
        "changed since loading); pass source=, the folder or hub id of this very model"
    )


def _card(
    mask: WeightMask,
    sites: Mapping[str, Site],
    source: str,
    difference: float,
) -> str:
    """The model card: what was removed, where the mask came from, how to undo and to reuse it."""
    header = [
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [harmcircuits, interpretability, pruning]",
    ]
    if Path(source).exists():
        name = Path(source).resolve().name  # no path of this machine
    else:
        name = source
        header.append(f"base_model: {source}")
    record = json.loads(mask.source.to_json())
    return CARD.format(
        header="\n".join(header),
        name=name,
        n_removed=f"{mask.n_removed:,}",
        n_weights=f"{mask.n_weights:,}",
        table=_table(mask, sites),
        record=json.dumps(record, indent=1),
        file=MASK_FILE,
        difference=f"{difference:.3g}",
    )


def _table(mask: WeightMask, sites: Mapping[str, Site]) -> str:
    """The removed weights by layer and kind, in Markdown."""
    counts = {}
    for name, count in mask.counts.items():
        site = sites[name]
        counts[site.layer, site.kind] = count
    present = {site.kind for site in sites.values()}
    kinds = [kind for kind in KINDS if kind in present]
    lines = [["layer", *kinds], ["---"] * (len(kinds) + 1)]
    for layer in sorted({site.layer for site in sites.values()}):
        numbers = [counts.get((layer, kind), 0) for kind in kinds]
        lines.append([str(layer), *map("{:,}".format, numbers)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
