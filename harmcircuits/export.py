"""The edited model as an ordinary Hugging Face folder."""

import copy
import json
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from harmcircuits.circuits.masks import WeightMask
from harmcircuits.circuits.sites import KINDS, Site
from harmcircuits.hooks.bridge import Bridge, as_bridge
from harmcircuits.hooks.masking import masked
from harmcircuits.hooks.weights import weight_sites

MASK_FILE = "mask.safetensors"
EPSILONS = 64  # transformers and the bridge round in another order; the weights are compared bit for bit
CARD = """---
{header}
---

# {name}, with {n_removed} weights removed

{n_removed} of the {n_weights} weights in the block matrices of `{name}` are zero; all other tensors, the tokenizer and the
configuration are those of `{name}`, whose licence and terms apply. Made with harmcircuits for defensive research: to study
which weights carry a behaviour and what else they carry. It is no safety guarantee; removed behaviour may come back with
training.

## What was removed

Weights set to zero, by layer and matrix:

{table}

## Where the mask came from

As recorded in `{file}`, without any prompt or completion (data appear as digests):

```json
{record}
```

## Undo, or apply the mask alone

`{name}` itself is unchanged, so loading it undoes everything. `{file}` holds the flat index of each removed weight; on
`{name}` it does the same in place, and reversibly:

```python
import harmcircuits as hc
from transformer_lens.model_bridge import TransformerBridge

bridge = TransformerBridge.boot_transformers("{name}")
with hc.masked(bridge, hc.WeightMask.load("{file}")):
    ...  # the edited model; restored bit for bit on exit
```

Reloaded with transformers, the logits of this folder differed from those of that edited model by at most {difference}.
"""


def export(
    bridge: Bridge,
    mask: WeightMask,
    folder: str | Path,
    *,
    source: str | Path | None = None,
    push_to: str | None = None,
) -> Path:
    """The model without the mask's weights as a Hugging Face folder, checked by reloading it; returns the folder.

    The source model (`source`: a folder or hub id; by default what the bridge was booted from) is loaded afresh in the
    dtype it is stored in, the mask's weights become zero in it, and it is saved with its tokenizer and generation config,
    `mask.safetensors` and a model card. Then it is reloaded in the bridge's dtype: every parameter must equal the masked
    bridge's bit for bit, and the logits of transformers the bridge's within 64 machine epsilons of the largest logit, or
    half the dtype's digits if that is less. The folder appears only after that. `push_to` uploads it to this hub id, which
    is made private if it is new. Raises ValueError, with nothing written, for a folder that is not empty, a mask of
    another model, a source that cannot be loaded or is not this bridge's model, logits that differ, and as
    `weight_sites`.

    >>> mask = hc.top_fraction(hc.removal_effect(bridge, harm), 0.001)
    >>> hc.export(model, mask, "edited").name
    'edited'
    """
    bridge = as_bridge(bridge)
    folder, source = Path(folder), str(source or bridge.cfg.model_name)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ValueError(f"export: {folder} exists and is not empty; give a folder that does not exist yet")
    with masked(bridge, mask), _whole_or_nothing(folder) as unfinished:
        sites = weight_sites(bridge)
        _write_model(bridge, mask, sites, source, unfinished)
        difference = _reload_difference(bridge, unfinished, source)
        mask.save(unfinished / MASK_FILE)
        (unfinished / "README.md").write_text(_card(mask, sites, source, difference), encoding="utf-8")
    if push_to:
        from huggingface_hub import HfApi

        HfApi().create_repo(push_to, private=True, exist_ok=True)
        HfApi().upload_folder(repo_id=push_to, folder_path=folder)
    return folder


@contextmanager
def _whole_or_nothing(folder: Path) -> Iterator[Path]:
    """A sibling that takes the place of `folder` on a clean exit and is gone on any other."""
    unfinished = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        if folder.is_dir():
            folder.rmdir()
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write_model(bridge: Bridge, mask: WeightMask, sites: Mapping[str, Site], source: str, folder: Path) -> None:
    """Save the source model and tokenizer with the mask's weights set to zero."""
    from transformers import AutoConfig, AutoTokenizer

    original: Any = bridge.original_model
    try:
        kind, ours = AutoConfig.from_pretrained(source).model_type, original.config.model_type
        if kind != ours:
            raise ValueError(f"its configuration is of a {kind}, this bridge is a {ours}")
        model = type(original).from_pretrained(source, dtype="auto")
        # The bridge changes bos and padding of its own tokenizer.
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"export: source={source!r} gives no model and tokenizer ({str(error).splitlines()[0]}); "
            "pass source=, the folder or hub id that the bridge was booted from"
        ) from None
    for name, index in mask.removed.items():
        try:
            parameter, where = _stored(bridge, model, sites[name], index)
        except (AttributeError, IndexError, RuntimeError, ValueError):
            raise _other_model(source, name) from None
        with torch.no_grad():
            parameter[torch.unravel_index(where, parameter.shape)] = 0.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _stored(
    bridge: Bridge, model: Any, site: Site, index: Int[Tensor, " n"]
) -> tuple[nn.Parameter, Int[Tensor, " n"]]:
    """The Hugging Face model's own parameter that holds these weights of a site, and their flat indices in it."""
    if site.parameter.ndim == 3:  # stacked experts are no component of the bridge
        path = f"blocks.{site.layer}.mlp"
        experts: Any = bridge.adapter.get_component(model, path)
        return experts.get_parameter(site.name.removeprefix(f"{path}.")), index
    path, part = site.name.removesuffix(".weight").rsplit(".", 1)
    owner = bridge.blocks[site.layer].get_submodule(site.kind.split(".")[0])
    for fused, split in ((["q", "k", "v"], "split_qkv_matrix"), (["gate", "in"], "split_gate_up_matrix")):
        if part in fused and hasattr(owner, split):
            module = bridge.adapter.get_component(model, path)
            return _unsplit(module, getattr(owner, split), fused.index(part), index)
    module: Any = bridge.adapter.get_component(model, f"{path}.{part}")
    return module.weight, index


def _unsplit(module: nn.Module, split: Any, part: int, index: Int[Tensor, " n"]) -> tuple[nn.Parameter, Int[Tensor, " n"]]:
    """Where the bridge's own `split` takes these weights of a part from: it is given serial numbers to split."""
    numbered, start = copy.deepcopy(module).double(), 0  # float64 counts to 2^53
    for number in numbered.parameters():
        number.data = torch.arange(start, start := start + number.numel(), dtype=torch.float64).view_as(number)
    serial = split(numbered)[part].weight.detach().flatten()[index].long()
    for parameter, number in zip(module.parameters(), numbered.parameters(), strict=True):
        first = int(number.flatten()[0])
        if first <= serial[0] < first + parameter.numel():
            return parameter, serial - first
    raise ValueError(f"{type(module).__name__} has no weight that the bridge splits")


def _reload_difference(bridge: Bridge, folder: Path, source: str) -> float:
    """Largest logit difference of the saved model to the bridge as it stands; raises ValueError when they are not equal."""
    from transformer_lens.model_bridge import TransformerBridge

    dtype, device = next(iter(weight_sites(bridge).values())).parameter.dtype, bridge.cfg.device
    ours = _parameters(bridge)
    theirs = _parameters(TransformerBridge.boot_transformers(str(folder), dtype=dtype, device=device))
    for name in ours.keys() | theirs.keys():
        if name not in ours or name not in theirs or not torch.equal(ours[name], theirs[name]):
            raise _other_model(source, name)
    del theirs
    original: Any = bridge.original_model
    model = type(original).from_pretrained(folder, dtype=dtype, attn_implementation="eager").to(device)
    length = min(16, bridge.cfg.n_ctx)
    tokens = torch.randint(bridge.cfg.d_vocab, (2, length), generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad():
        expected = bridge(tokens)
        difference = (model(tokens).logits - expected).abs().max().item()
    epsilon = torch.finfo(dtype).eps
    bound = min(EPSILONS * epsilon, epsilon**0.5) * expected.abs().max().item()
    if not difference <= bound:
        raise ValueError(
            f"export: reloaded by transformers, the logits differ from the masked bridge's by up to {difference:.3g}; "
            f"expected at most {bound:.3g}. The weights are equal, so this bridge computes otherwise than {source!r}"
        )
    return difference


def _parameters(bridge: Bridge) -> dict[str, nn.Parameter]:
    named = {name: p for name, p in bridge.state_dict(keep_vars=True).items() if isinstance(p, nn.Parameter)}
    return named | {name: site.parameter for name, site in weight_sites(bridge).items()}


def _other_model(source: str, name: str) -> ValueError:
    return ValueError(
        f"export: {name} of source={source!r} is not this bridge's (another checkpoint, or weights changed since loading); "
        "pass source=, the folder or hub id of this very model"
    )


def _card(mask: WeightMask, sites: Mapping[str, Site], source: str, difference: float) -> str:
    """The model card: what was removed, where the mask came from, how to undo and to reuse it."""
    is_local = Path(source).exists()
    name = Path(source).resolve().name if is_local else source
    header = [
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [harmcircuits, interpretability, pruning]",
    ]
    header += [] if is_local else [f"base_model: {source}"]
    kinds = [kind for kind in KINDS if any(site.kind == kind for site in sites.values())]
    counts = {(sites[weight].layer, sites[weight].kind): count for weight, count in mask.counts.items()}
    rows = [["layer", *kinds], ["---"] * (len(kinds) + 1)]
    for layer in sorted({site.layer for site in sites.values()}):
        rows.append([str(layer), *(f"{counts.get((layer, kind), 0):,}" for kind in kinds)])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    record = json.dumps(json.loads(mask.source.to_json()), indent=1)
    return CARD.format(
        header="\n".join(header), name=name, mask=mask, n_removed=f"{mask.n_removed:,}", n_weights=f"{mask.n_weights:,}",
        table=table, record=record, file=MASK_FILE, difference=f"{difference:.3g}",
    )  # fmt: skip
