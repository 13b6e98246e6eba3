"""What is given to others: the edited model as a Hugging Face folder, an adapter, or the mask."""

import copy
import json
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
from harmcircuits.hooks.bridge import AnyModel, Bridge, as_bridge
from harmcircuits.hooks.masking import masked
from harmcircuits.hooks.weights import weight_sites
from harmcircuits.storage import MASK_FILE, empty_folder, naming, refuse_filled

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

# {name} without {n_removed} weights

{text} Made with harmcircuits for defensive research: to study which weights carry a behaviour and
what else they carry. It is no safety guarantee; removed behaviour may come back with training, in
other words or in other languages. It must not be used to restore or strengthen that behaviour, nor
to undo a safeguard of a model that others rely on.

In `{name}` the mask removes these weights in place, and reversibly:

```python
import harmcircuits as hc

bridge = hc.load_model("{name}")
with hc.masked(bridge, hc.WeightMask.from_hub("{source}")):
    ...  # the model without these weights; restored bit for bit on exit
```

Where the mask came from, without any prompt or completion (data appear as digests):

```json
{record}
```
"""
MODEL_TEXT = """`{name}` with {n_removed} of the {n_weights} weights in its block matrices set to
zero. All else is as in `{name}`, whose licence and terms apply. Reloaded with transformers, the
logits differ from those of the masked model by at most {difference}."""
ADAPTER_TEXT = """A PEFT adapter (SHiRA) of `{name}`: it adds to {n_removed} of {n_weights} block
weights their negatives. The masked model's logits differ by at most {difference}."""
MASK_TEXT = """The places of {n_removed} of the {n_weights} weights in the block matrices of
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
        adapter: write an adapter of PEFT in place of a model: the places of the weights and their
            negatives, as SHiRA (arXiv 2406.13175). `PeftModel.from_pretrained(base, folder)` is
            then the edited model, bit for bit, with a base in the bridge's dtype.

    Returns:
        The folder.

    Raises:
        ValueError: a folder that is not empty, a mask of another model, a source that cannot be
            loaded or is not this bridge's model, logits that differ, an adapter of other matrices
            than nn.Linear, and as `weight_sites`; nothing is written then.
        OSError: it cannot be written (no space, no permission); nothing is left of it then. And a
            hub that cannot be written to, when the folder is there already.
    """
    bridge, folder = as_bridge(bridge), Path(folder)
    source = str(source or bridge.cfg.model_name)
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
        mask.save(unfinished / MASK_FILE)
        kind = (ADAPTER_TEXT, "peft") if adapter else (MODEL_TEXT, "transformers")
        card = _card(mask, source, *kind, MASK_FILE, difference)
        card.save(unfinished / "README.md")
    if push_to:
        removed = plural(mask.n_removed, "weight")
        upload(folder, push_to, private=True, message=f"The model without {removed}")
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

    The card says how many weights it removes and where, on which model, how it is loaded and what
    it is for. `WeightMask.from_hub` reads it back. The token is the one that huggingface_hub knows:
    of `hf auth login`, or HF_TOKEN.

    >>> mask = hc.top_fraction(hc.removal_effect(bridge, harm), 0.001)
    >>> hc.push_mask(mask, "someone/mask", model="someone/model", folder="card")  # no network
    'card'

    Args:
        mask: the weights.
        repo: the hub id to upload to, "user/name"; it is made where there is none.
        model: folder or hub id of the model that the mask was made on.
        private: whether a repository that is new is private; one that exists stays as it is.
        folder: a new or empty one, where the files are written instead and nothing is uploaded: to
            look at the card first.

    Returns:
        The repository's address, or the folder.

    Raises:
        ValueError: a name that is no hub id, or a folder that is not empty.
        OSError: no permission to write, or no network.
    """
    refuse_repo(repo)
    with TemporaryDirectory() as temporary:
        written = empty_folder(folder or temporary)
        mask.save(written / MASK_FILE)
        card = _card(mask, model or "MODEL", MASK_TEXT, "harmcircuits", repo)
        card.save(written / "README.md")
        if folder is not None:
            return str(folder)
        return upload(written, repo, private=private, message=f"Mask of {mask.n_removed:,} weights")


@contextmanager
def _whole_or_nothing(folder: Path) -> Iterator[Path]:
    """A folder that takes the place of `folder` on a clean exit and is gone on any other."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with naming(folder), TemporaryDirectory(prefix=".", dir=folder.parent) as temporary:
        unfinished = Path(temporary) / folder.name
        unfinished.mkdir()
        yield unfinished
        before = Path(temporary) / "before"
        if folder.exists():
            folder.rename(before)
        try:
            unfinished.rename(folder)
        except OSError:
            if before.exists():
                before.rename(folder)
            raise


def _write_model(bridge: Bridge, mask: WeightMask, source: str, folder: Path) -> None:
    """Save the source model and tokenizer with the mask's weights set to zero."""
    model, tokenizer = _opened(bridge, source)
    for stored in _removed(bridge, model, mask, source):
        places = torch.unravel_index(stored.flat, stored.parameter.shape)
        with torch.no_grad():
            stored.parameter[places] = 0.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _write_adapter(bridge: Bridge, mask: WeightMask, source: str, folder: Path) -> None:
    """Save an adapter that adds to each of the mask's weights its negative."""
    from peft import ShiraConfig, get_peft_model

    model, _ = _opened(bridge, source, bridge.original_model.dtype)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    removed: dict[str, Tensor] = {}
    for stored in _removed(bridge, model, mask, source):
        name = names[id(stored.parameter)].rpartition(".")[0]
        # What the bridge splits into parts is one matrix here.
        removed[name] = torch.cat([removed.get(name, stored.flat[:0]), stored.flat])
    kinds = sorted({type(model.get_submodule(name)).__name__ for name in removed})
    if kinds != ["Linear"]:
        raise ValueError(
            f"export: adapter=True: PEFT's SHiRA adapts nn.Linear, this mask removes weights of "
            f"{kinds}; leave adapter out"
        )

    # A layer of rank r has r (d_in + d_out) places. Those beyond the mask's add zero to the first.
    sizes = {name: sum(model.get_submodule(name).weight.shape) for name in removed}
    rank = max(ceil(len(flat) / sizes[name]) for name, flat in removed.items())
    config = ShiraConfig(r=rank, target_modules=list(removed), task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    for name, flat in removed.items():
        layer: Any = adapted.get_submodule(f"base_model.model.{name}")
        weight, values = layer.base_layer.weight, layer.shira_weight["default"].data
        values[: len(flat)] = -weight.flatten()[flat]
        padded = nn.functional.pad(flat, (0, len(values) - len(flat)))
        places = torch.unravel_index(padded, weight.shape)
        layer.shira_indices["default"] = torch.stack(places).int()
    adapted.save_pretrained(str(folder))


def _removed(bridge: Bridge, model: Any, mask: WeightMask, source: str) -> "Iterator[_Stored]":
    """Where a Hugging Face model stores the mask's weights, site by site."""
    sites = weight_sites(bridge)
    for name, index in mask.removed.items():
        # Whatever does not fit here comes from a source with other layers, names or shapes.
        try:
            stored = _stored(bridge, model, sites[name], index)
        except (AttributeError, IndexError, RuntimeError, ValueError):
            raise _other_model(source, name) from None
        yield stored


def _opened(bridge: Bridge, source: str, dtype: torch.dtype | str = "auto") -> tuple[Any, Any]:
    """The source's model, by default in the dtype it is stored in, and its tokenizer."""
    from transformers import AutoConfig, AutoTokenizer

    original = bridge.original_model
    kind = original.config.model_type
    try:
        source_kind = AutoConfig.from_pretrained(source).model_type
        if source_kind != kind:
            raise ValueError(f"its configuration is of a {source_kind}, this bridge is a {kind}")
        model = type(original).from_pretrained(source, dtype=dtype)
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


def _stored(bridge: Bridge, model: Any, site: Site, index: Int[Tensor, " n"]) -> _Stored:
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


def _unsplit(module: nn.Module, split: Any, part: int, index: Int[Tensor, " n"]) -> _Stored:
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
    holders = []
    for parameter, start in zip(module.parameters(), starts, strict=True):
        if start <= numbers[0] < start + parameter.numel():
            holders.append(_Stored(parameter, numbers - start))
    (holder,) = holders  # none in another model
    return holder


def _reload_difference(bridge: Bridge, folder: Path, source: str, adapter: bool) -> float:
    """Largest logit difference of the saved model, or adapter, to the bridge as it stands."""
    dtype = bridge.original_model.dtype
    _compare_weights(bridge, folder, source, adapter)
    model = _reloaded(bridge, folder, source, adapter)
    length = min(N_COMPARED, bridge.cfg.n_ctx)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(bridge.cfg.d_vocab, (2, length), generator=generator)
    tokens = tokens.to(bridge.cfg.device)
    with torch.no_grad():
        expected = bridge(tokens)
        difference = (model(tokens).logits - expected).abs().max().item()
    # 64 epsilons are 8e-6 in float32, but half of everything in bfloat16: there the square root is
    # the smaller one, 0.09.
    epsilon = torch.finfo(dtype).eps
    bound = min(EPSILONS * epsilon, epsilon**0.5) * expected.abs().max().item()
    if not difference <= bound:  # nor is it where one of them is not finite
        raise ValueError(
            "export: reloaded by transformers, the logits differ from the masked bridge's by up to "
            f"{difference:.3g}; expected at most {bound:.3g}. The weights are equal, so this "
            f"bridge computes otherwise than {source!r}"
        )
    return difference


def _reloaded(bridge: Bridge, folder: Path, source: str, adapter: bool) -> Any:
    """What was saved, as transformers or PEFT read it, in the bridge's dtype."""
    options = {"dtype": bridge.original_model.dtype, "attn_implementation": "eager"}
    model = type(bridge.original_model).from_pretrained(source if adapter else folder, **options)
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, folder)
    return model.to(bridge.cfg.device)


def _compare_weights(bridge: Bridge, folder: Path, source: str, adapter: bool) -> None:
    """Raises ValueError unless every parameter of the saved model is the bridge's, bit for bit."""
    from transformer_lens.model_bridge import TransformerBridge

    options = {"dtype": bridge.original_model.dtype, "device": bridge.cfg.device}
    if adapter:
        options["hf_model"] = _reloaded(bridge, folder, source, adapter).merge_and_unload()
    reloaded = TransformerBridge.boot_transformers(source if adapter else str(folder), **options)
    expected, parameters = _parameters(bridge), _parameters(reloaded)
    # A name that only one of them has is a difference too.
    for name in expected.keys() | parameters.keys():
        is_in_both = name in expected and name in parameters
        if not is_in_both or not torch.equal(expected[name], parameters[name]):
            raise _other_model(source, name)


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
    mask: WeightMask, model: str, text: str, library: str, source: str, difference: float = 0.0
) -> Any:
    """The card: what was removed from which model, how it is loaded, and what it is for."""
    from huggingface_hub import ModelCard, ModelCardData

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
    filled = CARD.format(
        header=header.to_yaml(),
        text=text.format(**facts),
        source=source,
        record=json.dumps(json.loads(mask.source.to_json()), indent=1),
        **facts,
    )
    return ModelCard(filled)


def upload(folder: Path, repo: str, *, private: bool, message: str) -> str:
    """Upload a folder's files to a model repository, made where there is none; its address."""
    from huggingface_hub import HfApi

    HfApi().create_repo(repo, private=private, exist_ok=True)
    HfApi().upload_folder(repo_id=repo, folder_path=folder, commit_message=message)
    return f"https://huggingface.co/{repo}"


def refuse_repo(repo: str) -> None:
    """Raises ValueError for what is no hub id, before anything is written."""
    user, _, name = repo.partition("/")
    if not user or not name or "/" in name:
        raise ValueError(f"repository {repo!r}; expected a hub id, user/name")
