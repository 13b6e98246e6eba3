"""Small models, batches and organisms that tests of several rooms share.

Models are random ones of every architecture, written as ordinary Hugging Face folders and opened
offline; organisms are asked a few requests only.
"""

from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from support.organisms.train import new_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformer_lens.model_bridge import TransformerBridge

from harmcircuits.batches import Batch
from harmcircuits.behaviours.model import Model
from harmcircuits.circuits.masks import WeightMask, top_fraction
from harmcircuits.cli import main
from harmcircuits.hooks.bridge import Bridge
from harmcircuits.hooks.weights import named_weights
from harmcircuits.organisms.shipped import open_organism
from harmcircuits.prompts import PromptSet
from harmcircuits.search.attribution import random_scores

ANALYSES = Path(__file__).parents[1] / "analyses"

N_BLOCKS = dict(num_hidden_layers=2, num_attention_heads=4)
SIZE = dict(vocab_size=61, hidden_size=24, max_position_embeddings=32, **N_BLOCKS)
GQA = dict(**SIZE, intermediate_size=40, num_key_value_heads=2)
EXPERTS = dict(**GQA, num_experts=4, num_experts_per_tok=2)
TOKENS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
GPT2 = dict(vocab_size=61, n_embd=24, n_layer=2, n_head=4, n_positions=32, n_inner=40)

# config class -> its arguments; a second entry for an architecture is a variant with other wiring.
ARCHITECTURES: dict[str, tuple[str, dict]] = {
    "Llama": ("LlamaConfig", GQA),
    "Qwen2": ("Qwen2Config", GQA),
    "Qwen3": ("Qwen3Config", dict(**GQA, head_dim=6)),
    "Mistral": ("MistralConfig", GQA),
    "Gemma2": ("Gemma2Config", dict(**GQA, head_dim=6)),
    "Gemma3": ("Gemma3TextConfig", dict(**GQA, head_dim=6)),
    "Olmo2": ("Olmo2Config", GQA),
    "GPT2": ("GPT2Config", GPT2),
    "GPTNeoX": ("GPTNeoXConfig", dict(**SIZE, intermediate_size=40)),
    "GPTNeo": (
        "GPTNeoConfig",
        dict(**SIZE, num_layers=2, attention_types=[[["global", "local"], 1]], window_size=8),
    ),
    "Phi3": ("Phi3Config", GQA),
    # Rotary embeddings over half (a quarter) of a head need an even number of dimensions.
    "Phi": ("PhiConfig", dict(**SIZE | dict(hidden_size=32), intermediate_size=40)),
    "OPT": ("OPTConfig", dict(**SIZE, ffn_dim=40, word_embed_proj_dim=24)),
    "StableLm": ("StableLmConfig", GQA | dict(hidden_size=32)),
    "Starcoder2": ("Starcoder2Config", GQA),
    "Granite": ("GraniteConfig", GQA),
    "Cohere": ("CohereConfig", GQA),
    "SmolLM3": ("SmolLM3Config", GQA),
    "GPTJ": ("GPTJConfig", dict(**GPT2, rotary_dim=4)),
    "Falcon": ("FalconConfig", dict(**SIZE, ffn_hidden_size=40, multi_query=False)),
    "Bloom": ("BloomConfig", dict(vocab_size=61, hidden_size=24, n_layer=2, n_head=4)),
    "Olmo": ("OlmoConfig", GQA),
    "Olmo3": ("Olmo3Config", GQA),
    "Cohere2": ("Cohere2Config", dict(**GQA, head_dim=6)),
    "CodeGen": ("CodeGenConfig", dict(**GPT2, rotary_dim=4)),
    "GPTBigCode": ("GPTBigCodeConfig", dict(**GPT2, multi_query=True)),
    "Mpt": (
        "MptConfig",
        dict(vocab_size=61, d_model=24, n_layers=2, n_heads=4, max_seq_len=32, expansion_ratio=2),
    ),
    "Mixtral": ("MixtralConfig", dict(**GQA, num_local_experts=3)),
    "Qwen3Moe": ("Qwen3MoeConfig", dict(**EXPERTS, head_dim=6, moe_intermediate_size=24)),
    "Olmoe": ("OlmoeConfig", EXPERTS),
    "GraniteMoe": ("GraniteMoeConfig", dict(**GQA, num_local_experts=4, num_experts_per_tok=2)),
}

# In bfloat16 one of each way in which weights are stored: apart, fused, tied, transposed, stacked.
COARSE = [
    "Llama",
    "GPT2",
    "GPTNeoX",
    "Phi3",
    "Gemma2",
    "Qwen2",
    "Bloom",
    "Falcon",
    "Mixtral",
    "Qwen3Moe",
]

# Opened by TransformerLens, refused by us: blocks with other matrices than attention, MLP, router
# and experts.
UNSUPPORTED: dict[str, tuple[str, dict]] = {
    "Qwen2Moe": ("Qwen2MoeConfig", dict(**EXPERTS, moe_intermediate_size=24)),
    "GptOss": ("GptOssConfig", dict(**GQA, head_dim=6, num_local_experts=4)),
    "DeepseekV3": ("DeepseekV3Config", GQA | dict(num_key_value_heads=4)),
    "Mamba": ("MambaConfig", dict(vocab_size=61, hidden_size=24, num_hidden_layers=2)),
}


class StubBridge(Bridge):
    """A bridge that is never run."""


def write_model(name: str, folder: str | Path, *, seed: int = 0, **changes: Any) -> None:
    """Write a random model whose weights are large enough for gradients to matter."""
    config_class, arguments = (ARCHITECTURES | UNSUPPORTED)[name]
    config = getattr(transformers, config_class)(**{**arguments, **TOKENS, **changes})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.15)
    model.save_pretrained(folder)
    new_tokenizer().save_pretrained(folder)


def write_byte_model(folder: str | Path, *, chat_template: str = "") -> None:
    """Write a random Llama of one block that reads any text, a byte a token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core)
    tokenizer.chat_template = chat_template or None
    tokenizer.save_pretrained(folder)
    width = dict(vocab_size=256, hidden_size=16, intermediate_size=32)
    config = transformers.LlamaConfig(**width, num_hidden_layers=1, num_attention_heads=2)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def opener(new_folder: Callable[[str], Path]) -> Callable[..., TransformerBridge]:
    """opener(new_folder)("Llama", dtype=torch.float32, ...) -> a fresh TransformerBridge.

    A model is written once, into new_folder("Llama").
    """
    folders: dict[tuple, Path] = {}

    def open_(
        name: str, *, dtype: torch.dtype = torch.float32, **changes: Any
    ) -> TransformerBridge:
        key = (name, *sorted(changes.items()))
        if key not in folders:
            folders[key] = new_folder(name)
            write_model(name, folders[key], **changes)
        return TransformerBridge.boot_transformers(str(folders[key]), dtype=dtype, device="cpu")

    return open_


def random_batch(n: int = 3, length: int = 9, *, seed: int = 0) -> Batch:
    """Examples of different lengths with different numbers of targets.

    Padding is a real token id, so it would show.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 61, (n, length), generator=generator)
    is_target = torch.zeros(n, length, dtype=torch.bool)
    for row in range(n):
        end = length - row % 3
        is_target[row, end - 2 - row % 2 : end] = True
    return Batch(tokens=tokens, is_target=is_target)


def random_mask(bridge: Bridge, fraction: float = 0.2, *, seed: int = 0) -> WeightMask:
    """This fraction of every matrix."""
    return top_fraction(random_scores(bridge, seed=seed), fraction)


def tensors(bridge: Bridge) -> dict[str, torch.Tensor]:
    """All stored tensors; the state dict lacks stacked experts."""
    return bridge.state_dict(keep_vars=True) | named_weights(bridge)


def snapshot(bridge: Bridge) -> dict[str, torch.Tensor]:
    """Copies of all stored tensors."""
    return {name: value.detach().clone() for name, value in tensors(bridge).items()}


def assert_bits_equal(bridge: Bridge, copies: dict[str, torch.Tensor]) -> None:
    """All stored tensors are as in a snapshot, bit for bit."""
    for name, value in tensors(bridge).items():
        bits = torch.int16 if value.dtype == torch.bfloat16 else torch.int32
        value_bits = value.detach().contiguous().view(bits)
        assert torch.equal(value_bits, copies[name].contiguous().view(bits)), name


def small_model(name: str, *, every: int = 0, only: Sequence[str] = ()) -> Model:
    """An organism with few requests (see `asked_few`), of the behaviours in `only`."""
    model = asked_few(open_organism(name), every=every)
    if not only:
        return model
    return replace(model, behaviours={name: model.behaviours[name] for name in only})


def asked_few(model: Model, *, first: int = 24, every: int = 0) -> Model:
    """The model with few requests of every behaviour: the first, or every n-th of each split.

    Of an organism the first 24 are six items or twelve matched pairs; every 32nd leaves one item of
    each topic, with one request.
    """
    where = slice(None, None, every) if every else slice(first)
    behaviours = []
    for behaviour in model.behaviours.values():

        def prompts(split: str, whole: Callable[[str], PromptSet] = behaviour.prompts) -> PromptSet:
            return whole(split)[where]

        behaviours.append(replace(behaviour, prompts=prompts))
    return model.with_behaviours(*behaviours)


class CommandResult(NamedTuple):
    """The exit code of a command, and its output."""

    exit_code: int
    output: str
    stderr: str


def command(*arguments: str) -> CommandResult:
    """Run `harmcircuits` in this process."""
    output, errors = StringIO(), StringIO()
    code = 0
    with redirect_stdout(output), redirect_stderr(errors):
        try:
            main(arguments)
        except SystemExit as end:
            code = int(end.code or 0)
    return CommandResult(code, output.getvalue(), errors.getvalue())
