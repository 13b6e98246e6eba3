"""Files for others: the edited model as a Hugging Face folder or an adapter, or the mask alone."""

import copy
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor, nn

from harmcircuits.circuits.masks import WeightMask
from harmcircuits.circuits.sites import Site
from harmcircuits.display import plural
from harmcircuits.hooks.bridge import AnyModel, Bridge, as_bridge, evaluating
from harmcircuits.hooks.masking import masked
from harmcircuits.hooks.weights import weight_sites
from harmcircuits.storage import MASK_FILE, empty_folder, naming, refuse_filled

# Weights must be equal bit for bit. Logits may differ: transformers and the bridge add in different
# orders.
EPSILONS = 64
N_COMPARED = 16  # positions of the text whose logits are compared

# Matrices that the bridge splits: the parts in the order of the split, and the split's name
FUSED = (
    (("q", "k", "v"), "split_qkv_matrix"),
    (("gate", "in"), "split_gate_up_matrix"),
)

MODEL_CARD = """---
{header}
---

# {name} without {n_removed} weights

{text} Made with harmcircuits for defensive research: to study which weights carry a behaviour and
what else they carry. It is no safety guarantee: the removed behaviour may come back with training,
in other words or in other languages. Do not use it to restore or strengthen that behaviour, or to
undo a safeguard of a model that others rely on.

In `{name}` the mask removes these weights in place, and reversibly:

```python
import harmcircuits as hc

bridge = hc.load_model("{name}")
with hc.masked(bridge, hc.WeightMask.from_hub("{source}")):
    ...  # the model without these weights; they are restored bit for bit on exit
```

The source of the mask, without any prompt or completion (data appear as digests):

```json
{record}
```
"""
MODEL_TEXT = """`{name}` with {n_removed} of the {n_weights} weights in its block matrices set to
zero. Everything else equals `{name}`, whose licence and terms apply. Reloaded with transformers,
its logits differ from those of the masked model by at most {difference}."""
ADAPTER_TEXT = """A PEFT adapter (SHiRA) of `{name}`: it adds the negatives of {n_removed} of the
{n_weights} block weights to them. The masked model's logits differ by at most {difference}."""
MASK_TEXT = """The positions of {n_removed} of the {n_weights} weights in the block matrices of
`{name}`: no weights and no text."""


def export(
    bridge: AnyModel,
    mask: WeightMask,
    folder: str | Path,
    *,
    source: str | Path | None = None,
    push_to: str | None = None,
    force: bool = False,
    adapter: bool = False,
) -> Path:
    """The model without the mask's weights as a Hugging Face folder, checked by reloading it.

    It loads the source model in the dtype of its files, sets the mask's weights to zero, and saves
    it with its tokenizer, generation config, `mask.safetensors` and a model card. Then it reloads
    the folder in the bridge's dtype. Every parameter must equal the masked bridge's bit for bit.
    The logits of transformers may differ from the bridge's by 64 machine epsilons of the largest
    logit, or by half the dtype's digits if that is less. The folder appears only after this check.

    >>> mask = hc.top_fraction(hc.removal_effect(bridge, harm), 0.001)
    >>> hc.export(model, mask, "edited").name
    'edited'

    Args:
        bridge: a TransformerBridge, or a `Model` with one.
        mask: the weights to remove.
        folder: a new or empty folder.
        source: a folder or hub id; by default the one that the bridge was booted from.
        push_to: the hub id to upload the folder to; a new repository is private.
        force: replace a folder that this function wrote, after the check of the new one.
        adapter: write a PEFT adapter instead of a model: the positions of the weights and their
            negatives, as SHiRA (arXiv 2406.13175). `PeftModel.from_pretrained(base, folder)` is
            then the edited model, bit for bit, if the base has the bridge's dtype.

    Returns:
        The folder.

    Raises:
        ValueError: a folder that is not empty; a compiled organism, which has no Hugging Face
            folder; a mask of another model; a source that cannot be loaded or is not this bridge's
            model; logits that differ; an adapter of other matrices than nn.Linear; and as
            `weight_sites`. Nothing is written then.
        OSError: the folder cannot be written (no space, no permission): nothing is left of it. Or
            the hub cannot be written to: then the folder is complete.
    """
    bridge, folder = as_bridge(bridge), Path(folder)
    source = str(source or bridge.cfg.model_name)
    refuse_compiled(bridge)
    if push_to:
        refuse_repo(push_to)
    is_model = any((folder / f"{prefix}config.json").is_file() for prefix in ("", "adapter_"))
    is_export = is_model and (folder / MASK_FILE).is_file()
    if not (force and is_export):
        refuse_filled(folder)
    with masked(bridge, mask), _whole_or_nothing(folder) as unfinished:
        write = _write_adapter if adapter else _write_model
        write(bridge, mask, source, unfinished)
        difference = _reload_difference(bridge, unfinished, source, adapter)
        text, library = (ADAPTER_TEXT, "peft") if adapter else (MODEL_TEXT, "transformers")
        _save_mask(mask, unfinished, source, text, library, MASK_FILE, difference)
    if push_to:
        weights = plural(mask.n_removed, "weight")
        upload(folder, push_to, private=True, message=f"The model without {weights}")
    return folder


def push_mask(
    mask: WeightMask,
    repo: str,
    *,
    model: str = "",
    private: bool = True,
    folder: str | Path | None = None,
) -> str:
    """Upload a mask with a card to the Hugging Face hub; its address.

    The card says which model the mask belongs to, how many weights it removes, how to load it and
    what it is for. `WeightMask.from_hub` reads it back. The token is that of huggingface_hub: from
    `hf auth login` or HF_TOKEN.

    >>> mask = hc.top_fraction(hc.removal_effect(bridge, harm), 0.001)
    >>> hc.push_mask(mask, "someone/mask", model="someone/model", folder="card")  # no network
    'card'

    Args:
        mask: the weights.
        repo: the hub id to upload to, "user/name"; a missing repository is created.
        model: folder or hub id of the mask's model.
        private: whether a new repository is private; an existing one stays as it is.
        folder: a new or empty folder, where the files are written instead of an upload: to look at
            the card first.

    Returns:
        The repository's address, or the folder.

    Raises:
        ValueError: a name that is no hub id, or a folder that is not empty.
        OSError: no permission to write, or no network.
    """
    refuse_repo(repo)
    with TemporaryDirectory() as temporary:
        target = empty_folder(folder or temporary)
        _save_mask(mask, target, model or "MODEL", MASK_TEXT, "harmcircuits", repo)
        if folder is not None:
            return str(folder)
        return upload(target, repo, private=private, message=f"Mask of {mask.n_removed:,} weights")


@contextmanager
def _whole_or_nothing(folder: Path) -> Iterator[Path]:
    """A temporary folder that replaces `folder` on a clean exit, and disappears on any other."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with naming(folder), TemporaryDirectory(prefix=".", dir=folder.parent) as temporary:
        unfinished = Path(temporary) / folder.name
        unfinished.mkdir()
        yield unfinished
        backup = Path(temporary) / "backup"
        if folder.exists():
            folder.rename(backup)
        try:
            unfinished.rename(folder)
        except OSError:
            if backup.exists():
                backup.rename(folder)
            raise


def _write_model(bridge: Bridge, mask: WeightMask, source: str, folder: Path) -> None:
    """Save the source model and tokenizer with the mask's weights set to zero."""
    model, tokenizer = _load_source(bridge, source)
    for parameter, index in _locate(bridge, model, mask, source):
        with torch.no_grad():
            parameter[torch.unravel_index(index, parameter.shape)] = 0.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _write_adapter(bridge: Bridge, mask: WeightMask, source: str, folder: Path) -> None:
    """Save an adapter that adds the negative of each of the mask's weights to it."""
    from peft import ShiraConfig, get_peft_model

    model, _ = _load_source(bridge, source, bridge.original_model.dtype)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    removed: dict[str, Tensor] = {}
    for parameter, index in _locate(bridge, model, mask, source):
        name = names[id(parameter)].rpartition(".")[0]
        # Parts that the bridge splits are one matrix here.
        removed[name] = torch.cat([removed.get(name, index[:0]), index])
    classes = sorted({type(model.get_submodule(name)).__name__ for name in removed})
    if classes != ["Linear"]:
        raise ValueError(
            f"export: adapter=True: PEFT's SHiRA adapts nn.Linear, this mask removes weights of "
            f"{classes}; leave adapter out"
        )

    # A layer of rank r has r (d_in + d_out) positions. Positions beyond the mask's add zero to the
    # first weight.
    sizes = {name: sum(model.get_submodule(name).weight.shape) for name in removed}
    rank = max(ceil(len(index) / sizes[name]) for name, index in removed.items())
    config = ShiraConfig(r=rank, target_modules=list(removed), task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    for name, index in removed.items():
        layer: Any = adapted.get_submodule(f"base_model.model.{name}")
        weight, values = layer.base_layer.weight, layer.shira_weight["default"].data
        values[: len(index)] = -weight.flatten()[index]
        padded = nn.functional.pad(index, (0, len(values) - len(index)))
        positions = torch.unravel_index(padded, weight.shape)
        layer.shira_indices["default"] = torch.stack(positions).int()
    adapted.save_pretrained(str(folder))


def _load_source(bridge: Bridge, source: str, dtype: torch.dtype | str = "auto") -> tuple[Any, Any]:
    """The source's model, by default in the dtype of its files, and its tokenizer."""
    from transformers import AutoConfig, AutoTokenizer

    original = bridge.original_model
    kind = original.config.model_type
    try:
        source_kind = AutoConfig.from_pretrained(source).model_type
        if source_kind != kind:
            raise ValueError(f"its configuration is of a {source_kind}, this bridge is a {kind}")
        model = type(original).from_pretrained(source, dtype=dtype)
        # Read again: the bridge changes bos and padding of its own tokenizer.
        return model, AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"export: source={source!r} gives no model and tokenizer ({reason}); "
            "pass source=, the folder or hub id that the bridge was booted from"
        ) from None


class Entries(NamedTuple):
    """Some weights of a site, where a Hugging Face model stores them."""

    parameter: nn.Parameter
    flat: Int[Tensor, " n"]  # indices


def _locate(bridge: Bridge, model: Any, mask: WeightMask, source: str) -> Iterator[Entries]:
    """The entries of a Hugging Face model that hold the mask's weights, site by site."""
    sites = weight_sites(bridge)
    for name, index in mask.removed.items():
        # Any mismatch means a source with other layers, names or shapes.
        try:
            entries = _entries(bridge, model, sites[name], index)
        except (AttributeError, IndexError, RuntimeError, ValueError):
            raise _other_model(source, name) from None
        yield entries


def _entries(bridge: Bridge, model: Any, site: Site, index: Int[Tensor, " n"]) -> Entries:
    """The entries of `model` that hold the weights with these flat indices in a site."""
    if site.parameter.ndim == 3:  # stacked experts are no component of the bridge
        path = f"blocks.{site.layer}.mlp"
        experts = bridge.adapter.get_component(model, path)
        return Entries(experts.get_parameter(site.name.removeprefix(f"{path}.")), index)

    # Name of a site            path               part     stored in
    # blocks.0.attn.q.weight    blocks.0.attn      q        attn.qkv, where the model fuses it
    # blocks.0.mlp.out.weight   blocks.0.mlp       out      mlp.out
    path, part = site.name.removesuffix(".weight").rsplit(".", 1)
    owner = bridge.blocks[site.layer].get_submodule(site.kind.split(".")[0])  # attn or mlp
    for parts, split in FUSED:
        if part in parts and hasattr(owner, split):
            fused = bridge.adapter.get_component(model, path)
            return _unsplit(fused, getattr(owner, split), parts.index(part), index)
    return Entries(bridge.adapter.get_component(model, f"{path}.{part}").weight, index)


def _unsplit(module: nn.Module, split: Any, part: int, index: Int[Tensor, " n"]) -> Entries:
    """The entries of a fused module from which the bridge's own `split` takes a part's weights."""
    numbered = copy.deepcopy(module).double()  # float64 counts to 2^53
    starts, end = [], 0
    for parameter in numbered.parameters():
        starts.append(end)
        end += parameter.numel()
        serial = torch.arange(starts[-1], end, dtype=torch.float64)
        parameter.data = serial.view_as(parameter)

    numbers = split(numbered)[part].weight.detach().flatten()[index].long()
    holders = []
    for parameter, start in zip(module.parameters(), starts, strict=True):
        if start <= numbers[0] < start + parameter.numel():
            holders.append(Entries(parameter, numbers - start))
    (holder,) = holders  # none in another model
    return holder


def _reload_difference(bridge: Bridge, folder: Path, source: str, adapter: bool) -> float:
    """Largest logit difference between the saved model, or adapter, and the masked bridge."""
    dtype = bridge.original_model.dtype
    _compare_weights(bridge, folder, source, adapter)
    model = _reloaded(bridge, folder, source, adapter)
    length = min(N_COMPARED, bridge.cfg.n_ctx)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(bridge.cfg.d_vocab, (2, length), generator=generator)
    tokens = tokens.to(bridge.cfg.device)
    with torch.no_grad(), evaluating(bridge):
        expected = bridge(tokens)
        difference = (model(tokens).logits - expected).abs().max().item()
    # 64 epsilons are 8e-6 in float32, but 0.5 in bfloat16, where the square root (0.09) is smaller.
    epsilon = torch.finfo(dtype).eps
    bound = min(EPSILONS * epsilon, epsilon**0.5) * expected.abs().max().item()
    if not difference <= bound:  # also true for NaN
        raise ValueError(
            "export: reloaded by transformers, the logits differ from the masked bridge's by up to "
            f"{difference:.3g}; expected at most {bound:.3g}. The weights are equal, so this "
            f"bridge does not compute what {source!r} computes"
        )
    return difference


def _reloaded(bridge: Bridge, folder: Path, source: str, adapter: bool) -> Any:
    """The saved model as transformers or PEFT read it, in the bridge's dtype."""
    options = {"dtype": bridge.original_model.dtype, "attn_implementation": "eager"}
    model = type(bridge.original_model).from_pretrained(source if adapter else folder, **options)
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, folder)
    return model.to(bridge.cfg.device)


def _compare_weights(bridge: Bridge, folder: Path, source: str, adapter: bool) -> None:
    """Refuse a saved model with a parameter that is not the bridge's, bit for bit."""
    from transformer_lens.model_bridge import TransformerBridge

    options = {"dtype": bridge.original_model.dtype, "device": bridge.cfg.device}
    if adapter:
        options["hf_model"] = _reloaded(bridge, folder, source, adapter).merge_and_unload()
    reloaded = TransformerBridge.boot_transformers(source if adapter else str(folder), **options)
    expected, parameters = _parameters(bridge), _parameters(reloaded)
    for name in expected.keys() | parameters.keys():
        is_in_both = name in expected and name in parameters
        if not is_in_both or not torch.equal(expected[name], parameters[name]):
            raise _other_model(source, name)


def _parameters(bridge: Bridge) -> dict[str, nn.Parameter]:
    """Every parameter by name: those of the state dict, and the stacked experts, which it lacks."""
    parameters = {name: site.parameter for name, site in weight_sites(bridge).items()}
    for name, tensor in bridge.state_dict(keep_vars=True).items():
        if isinstance(tensor, nn.Parameter):
            parameters.setdefault(name, tensor)
    return parameters


def _other_model(source: str, name: str) -> ValueError:
    return ValueError(
        f"export: {name} of source={source!r} is not this bridge's (another checkpoint, or weights "
        "changed since loading); pass source=, the folder or hub id of this very model"
    )


def _save_mask(
    mask: WeightMask,
    folder: Path,
    model: str,
    text: str,
    library: str,
    source: str,
    difference: float = 0.0,
) -> None:
    """Save the mask and its card: which model it edits, how to load it, and what it is for."""
    from huggingface_hub import ModelCard, ModelCardData

    mask.save(folder / MASK_FILE)
    is_local = Path(model).exists()
    header = ModelCardData(
        base_model=model if "/" in model and not is_local else None,
        library_name=library,
        tags=["harmcircuits", "interpretability", "pruning"],
    )
    facts = {
        "name": Path(model).resolve().name if is_local else model,  # no path of this machine
        "n_removed": f"{mask.n_removed:,}",
        "n_weights": f"{mask.n_weights:,}",
        "difference": f"{difference:.3g}",
    }
    content = MODEL_CARD.format(
        header=header.to_yaml(),
        text=text.format(**facts),
        source=source,
        record=json.dumps(json.loads(mask.source.to_json()), indent=1),
        **facts,
    )
    ModelCard(content).save(folder / "README.md")


def upload(folder: Path, repo: str, *, private: bool, message: str) -> str:
    """Upload a folder's files to a model repository, created if it is missing; its address."""
    from huggingface_hub import HfApi

    HfApi().create_repo(repo, private=private, exist_ok=True)
    HfApi().upload_folder(repo_id=repo, folder_path=folder, commit_message=message)
    return f"https://huggingface.co/{repo}"


def refuse_repo(repo: str) -> None:
    """Refuse a name that is no hub id, before anything is written."""
    if not re.fullmatch("[^/]+/[^/]+", repo):
        raise ValueError(f"repository {repo!r}; expected a hub id, user/name")


def refuse_compiled(bridge: Bridge) -> None:
    """Refuse a model that transformers cannot save: a compiled organism."""
    if not hasattr(bridge.original_model, "config"):
        raise ValueError(
            f"export: a {type(bridge.original_model).__name__}, such as a compiled organism, has "
            "no Hugging Face folder; save the mask alone with mask.save(...) or push_mask"
        )
