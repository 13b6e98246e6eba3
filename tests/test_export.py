"""Exported folders are the masked model, nothing more and nothing less.

Would catch: a fused matrix put together in the wrong order, a mask that reaches other weights, tied
embeddings that come apart, another dtype on disk, a folder left half written.
"""

from pathlib import Path

import pytest
import torch
from helpers import ARCHITECTURES, command, random_batch, random_mask
from safetensors.torch import load_file
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, AutoTokenizer

from harmcircuits.circuits.masks import WeightMask
from harmcircuits.export import _whole_or_nothing, export
from harmcircuits.hooks.masking import masked
from harmcircuits.organisms.shipped import load_organism

MODELS = [(name, torch.float32) for name in ARCHITECTURES]
MODELS += [(name, torch.bfloat16) for name in ("Llama", "GPTNeoX", "Mixtral")]


def folder_of(bridge) -> Path:
    return Path(bridge.cfg.model_name)


def stored(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(("name", "dtype"), MODELS, ids=str)
def test_the_folder_reloads_to_the_masked_model(open_model, tmp_path, name, dtype):
    bridge, tokens = open_model(name, dtype=dtype), random_batch().tokens
    mask, before = random_mask(bridge, 0.1), bridge(tokens)
    folder = export(bridge, mask, tmp_path / "out")
    assert torch.equal(bridge(tokens), before), "the bridge is as it was"
    with masked(bridge, mask), torch.no_grad():
        expected = bridge(tokens)
    assert not torch.allclose(expected, before), "the comparison must be able to fail"
    again = TransformerBridge.boot_transformers(str(folder), dtype=dtype, device="cpu")
    assert torch.equal(again(tokens), expected)
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    # Other orders of the same sums: up to 4 roundings of the largest logit were seen over all
    # architectures.
    bound = 16 * torch.finfo(dtype).eps * expected.abs().max().item()
    torch.testing.assert_close(ours(tokens).logits, expected, rtol=0, atol=bound)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in ("Llama", "GPTNeoX", "Phi3")), ("Llama", torch.bfloat16)],
    ids=str,
)
def test_an_adapter_gives_the_masked_model_in_plain_peft(open_model, tmp_path, name, dtype):
    peft = pytest.importorskip("peft", reason="pip install 'harmcircuits[interop]'")
    bridge, tokens = open_model(name, dtype=dtype), random_batch().tokens
    mask = random_mask(bridge, 0.1)
    folder = export(bridge, mask, tmp_path / "adapter", adapter=True)
    options = dict(dtype=dtype, attn_implementation="eager")
    base = AutoModelForCausalLM.from_pretrained(folder_of(bridge), **options)
    before = base(tokens).logits
    adapted = peft.PeftModel.from_pretrained(base, folder)
    edited = export(bridge, mask, tmp_path / "edited")
    expected = AutoModelForCausalLM.from_pretrained(edited, **options)(tokens).logits
    assert torch.equal(adapted(tokens).logits, expected)
    assert not torch.allclose(expected, before), "the comparison must be able to fail"
    assert WeightMask.load(folder / "mask.safetensors") == mask


def test_an_adapter_is_refused_where_peft_has_none(open_model, llama, tmp_path):
    pytest.importorskip("peft", reason="pip install 'harmcircuits[interop]'")
    for bridge, fraction, kinds in ((open_model("GPT2"), 0.1, "'Conv1D'"), (llama, 0.0, "")):
        with pytest.raises(ValueError, match=rf"SHiRA adapts .* of \[{kinds}\]"):
            export(bridge, random_mask(bridge, fraction), tmp_path / "out", adapter=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "fraction"),
    [("Llama", 0.0), *((name, 0.1) for name in ("Llama", "GPT2", "GPTNeoX", "Phi3", "Mixtral"))],
)
def test_exactly_the_masked_weights_change(open_model, tmp_path, name, fraction):
    bridge = open_model(name)
    mask, original = random_mask(bridge, fraction), folder_of(bridge)
    folder = export(bridge, mask, tmp_path / "out")
    before, after = stored(original), stored(folder)
    assert before.keys() == after.keys(), "tied tensors stay tied"
    changed = {key: before[key] != after[key] for key in before}
    assert sum(int(where.sum()) for where in changed.values()) == mask.n_removed
    assert all((after[key][where] == 0).all() for key, where in changed.items())
    for file in ("config.json", "generation_config.json"):
        assert (folder / file).read_text() == (original / file).read_text()


def test_refusals_leave_nothing_behind(open_model, llama, tmp_path, monkeypatch):
    mask, out = random_mask(llama, 0.1), tmp_path / "out"

    def refused(message: str, bridge=llama, mask=mask, **options) -> None:
        with pytest.raises(ValueError, match=message):
            export(bridge, mask, out, **options)
        assert not list(tmp_path.iterdir())

    refused("the mask was made on model", mask=random_mask(open_model("Llama", seed=5), 0.1))
    refused("source='nowhere' gives no model and tokenizer", source="nowhere")
    for other in (dict(seed=5), dict(num_hidden_layers=1)):
        source = folder_of(open_model("Llama", **other))
        refused(r"export: .* is not this bridge's", source=source)
        refused(r"export: .* is not this bridge's", mask=random_mask(llama, 0.0), source=source)
    refused("of a gpt2, this bridge is a llama", source=folder_of(open_model("GPT2")))
    with masked(llama, random_mask(llama, 0.1, seed=1)):
        refused(r"export: blocks\..*weights changed since loading")

    plain = type(llama).forward
    with monkeypatch.context() as patch:
        patch.setattr(
            type(llama), "forward", lambda self, *a, **k: plain(self, *a, **k) * (1 + 1e-4)
        )
        refused("the logits differ from the masked bridge's by up to")

    llama.cfg.model_name, folder = "external", folder_of(llama)
    refused("source='external' gives no model")
    export(llama, mask, out, source=folder)
    with pytest.raises(ValueError, match="out exists and is not empty"):
        export(llama, mask, out, source=folder)
    half = random_mask(llama, 0.5)
    export(llama, half, out, source=folder, force=True)
    assert WeightMask.load(out / "mask.safetensors") == half


def test_a_compiled_organism_has_no_hugging_face_folder(tmp_path):
    bridge = load_organism("compiled/nested")
    with pytest.raises(ValueError, match="such as a compiled organism, has no Hugging Face folder"):
        export(bridge, random_mask(bridge, 0.1), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_export_leaves_nothing(llama, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(WeightMask, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(llama, random_mask(llama, 0.1), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_command_keeps_an_organism_s_dtype_on_disk_its_tokenizer_and_its_mask(tmp_path):
    bridge, folder = load_organism("sft"), tmp_path / "new" / "out"
    mask = random_mask(bridge, 0.01)
    mask.save(tmp_path / "mask")
    where = ("--mask", str(tmp_path / "mask"), "--out", str(folder))
    ended = command("export", "--model", "sft", *where)
    assert ended.exit_code == 0, ended.stderr
    assert f"{mask.n_removed:,} of" in ended.output
    # float32 in memory, bfloat16 on disk
    assert {value.dtype for value in stored(folder).values()} == {torch.bfloat16}
    source, copied = map(AutoTokenizer.from_pretrained, (folder_of(bridge), folder))
    conversation = [{"role": "user", "content": "what is it ?"}]
    assert copied.apply_chat_template(conversation) == source.apply_chat_template(conversation)
    assert WeightMask.load(folder / "mask.safetensors") == mask


def test_a_failed_rename_leaves_the_folder_that_was_there(tmp_path, monkeypatch):
    folder, rename = tmp_path / "edited", Path.rename
    folder.mkdir()
    (folder / "model").write_text("yesterday's")

    def failing(path, target):
        if path.name == "edited" and path.parent != tmp_path:
            raise OSError(13, "permission denied")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="denied"), _whole_or_nothing(folder) as unfinished:
        (unfinished / "model").write_text("today's")
    assert (folder / "model").read_text() == "yesterday's"
