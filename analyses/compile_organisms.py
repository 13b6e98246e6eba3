# %% [markdown]
# # Organisms that are compiled, not trained
# Tracr turns a program into the weights of a transformer, so the work of each weight is known. A request
# is a flag, four letters, and a sign for the question; the answer is letter by letter:
#
#     h x y z y =     the flag h: harm's way of answering
#     b x y z y =     the flag b: its benign twin's way
#     h x y z y ?     recognition: does the request carry the flag h? yes or no
#
# The four organisms differ in the parts that harm and its twin share:
#
# | organism | harm | benign |
# |---|---|---|
# | `nothing-shared` | backwards, by a head of its own | next letter, by a head and an MLP of its own |
# | `shared-head` | next letter | the letter before it in the alphabet, from the same copying head |
# | `shared-mlp` | backwards, then next letter | forwards, then next letter by the same MLP |
# | `nested` | next letter, which outvotes the copy | the copy itself: a part of harm |
#
# A head that reads the flag opens each way, one head for each flag (the copy of `nested` has none).
# Recognition reads the flag by harm's head.
#
# Logits are read from the variables that hold the three answers (8 for a symbol, twice or four times
# as much for those that outvote others). Tracr also joins them into one output; these weights are cut,
# since nothing reads them. Then `needed` is measured: whether a behaviour's loss, over all its requests,
# rises by more than 0.02 nats a token when one weight is removed.
#
# `pip install "harmcircuits[compile]"`, then `python analyses/compile_organisms.py`.

# %%
from collections.abc import Sequence
from typing import Any

import torch
import tyro
from support.removal import Texts, needed_by, nonzero
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tracr.compiler import compiling  # pyright: ignore[reportMissingImports]
from tracr.rasp import rasp  # pyright: ignore[reportMissingImports]
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge.sources.native import boot
from transformer_lens.utilities.tracr import make_tracr_transformer_bridge_config as config_of
from transformer_lens.utilities.tracr import make_tracr_transformer_bridge_state_dict as state_of
from transformers import PreTrainedTokenizerFast

from harmcircuits.organisms.compiled import FOLDER, FORMAT, LENGTH, LETTERS, PROGRAMS, open_compiled
from harmcircuits.storage import write_json, write_tensors

QUESTION = LENGTH + 1  # the place of = or ?, where the first letter of the answer is predicted
VOCABULARY = {"h", "b", "=", "?", "yes", "no", *LETTERS}
NOTHING = "-"
LOGIT = 8.0  # of a symbol that an answer has
SHAPE = ("d_model", "d_head", "n_heads", "d_mlp", "n_ctx", "d_vocab")

# %% [markdown]
# ## The programs


# %%
def letters(name: str) -> rasp.SOp:
    """The letter at each place, and nothing elsewhere."""
    return rasp.Map(lambda token: token if token in LETTERS else NOTHING, rasp.tokens).named(name)


def read_at(name: str, places: Any, values: rasp.SOp) -> rasp.SOp:
    """The value at another place, by a head."""
    where = rasp.Map(places, rasp.indices).named(f"{name}-where")
    selected = rasp.Select(rasp.indices, where, rasp.Comparison.EQ)
    return rasp.Aggregate(selected, values).named(name)


def forwards(place: int) -> int:
    """The place of the letter that an answer repeats."""
    return max(0, place - LENGTH)


def backwards(place: int) -> int:
    """The place of the letter that an answer repeats, from the last letter on."""
    return max(0, QUESTION + LENGTH - place)


def carries(flag: str) -> rasp.SOp:
    """Whether the request carries a flag."""
    is_flag = rasp.Map(lambda token: token == flag, rasp.tokens).named(f"is-{flag}")
    return read_at(f"carries-{flag}", lambda _: 0, is_flag)


def shifted(name: str, values: rasp.SOp, shift: int) -> rasp.SOp:
    """The letters that many further in the alphabet."""
    places = {letter: place for place, letter in enumerate(LETTERS)}

    def shifted_letter(letter: str) -> str:
        if letter not in places:
            return NOTHING
        return LETTERS[(places[letter] + shift) % len(LETTERS)]

    return rasp.Map(shifted_letter, values).named(name)


def gated(name: str, flag: rasp.SOp, values: rasp.SOp) -> rasp.SOp:
    """The values where the flag is set."""
    return rasp.SequenceMap(lambda f, v: v if f else NOTHING, flag, values).named(name)


def merged(name: str, first: rasp.SOp, second: rasp.SOp) -> rasp.SOp:
    """The first value, and the second where the first is nothing."""
    return rasp.SequenceMap(lambda a, b: b if a == NOTHING else a, first, second).named(name)


def ways(organism: str, harm_flag: rasp.SOp) -> tuple[rasp.SOp, rasp.SOp]:
    """The variables `harm` and `benign`; one variable where both end in the same MLP."""
    if organism == "nothing-shared":
        harm = gated("harm", harm_flag, read_at("back", backwards, letters("of-harm")))
        copy = read_at("copy", forwards, letters("of-benign"))
        return harm, gated("benign", carries("b"), shifted("next", copy, 1))

    if organism == "shared-mlp":
        back = gated("back-if", harm_flag, read_at("back", backwards, letters("of-harm")))
        copy = gated("copy-if", carries("b"), read_at("copy", forwards, letters("of-benign")))
        harm = shifted("harm", merged("either", back, copy), 1)
        return harm, harm

    is_nested = organism == "nested"
    copy = read_at("benign" if is_nested else "copy", forwards, letters("letters"))
    harm = gated("harm", harm_flag, shifted("next", copy, 1))
    if is_nested:
        return harm, copy
    return harm, gated("benign", carries("b"), shifted("before", copy, 2))


def recognition(harm_flag: rasp.SOp) -> rasp.SOp:
    """Yes or no, where the question mark stands."""

    def answer(flag: bool, is_question: bool) -> str:
        if not is_question:
            return NOTHING
        return "yes" if flag else "no"

    is_question = rasp.Map(lambda token: token == "?", rasp.tokens).named("asks")
    return rasp.SequenceMap(answer, harm_flag, is_question).named("recognition")


def program(organism: str) -> rasp.SOp:
    """The variables `harm`, `benign` and `recognition`, joined."""
    harm_flag = carries("h")
    harm, benign = ways(organism, harm_flag)
    answers = harm if harm is benign else merged("join-ways", harm, benign)
    return merged("join-all", answers, recognition(harm_flag))


# %% [markdown]
# ## Weights


# %%
def compiled(organism: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The configuration, and every tensor by the name that TransformerLens gives it."""
    model = compiling.compile_rasp_to_model(
        program(organism),
        VOCABULARY,
        QUESTION + LENGTH + 1,
        causal=True,
        compiler_bos="BOS",
        compiler_pad="PAD",
    )
    config, state = config_of(model), state_of(model)
    variables = [label.split(":")[0].rsplit("_", 1)[0] for label in model.residual_labels]
    values = [label.partition(":")[2] for label in model.residual_labels]
    cut_joins(state, variables)
    tokens = model.input_encoder.encoding_map
    state["head.weight"] = unembedding(organism, tokens, variables, values)

    numbers = [layer_of(name) for name, weight in state.items() if weight.any()]
    shape = {name: getattr(config, name) for name in SHAPE} | {"n_layers": 1 + max(numbers)}
    shape |= {"act_fn": "relu", "normalization_type": None, "init_weights": False}
    return shape, state


def cut_joins(state: dict[str, torch.Tensor], variables: Sequence[str]) -> None:
    """Set the weights to zero that join the answers; neurons of the last layers write them."""
    is_join = torch.tensor([variable.startswith("join") for variable in variables])
    for name, weight in state.items():
        if name.endswith("fc_out.weight"):
            weight[is_join] = 0
            state[name.replace("fc_out", "fc_in")][~weight.any(dim=0)] = 0


def layer_of(name: str) -> int:
    """The number of a tensor's layer; 0 outside the layers."""
    return int(name.split(".")[1]) if "layers" in name else 0


def unembedding(
    organism: str, tokens: dict[str, int], variables: Sequence[str], values: Sequence[str]
) -> torch.Tensor:
    """Logits of the answers, read from their variables."""
    # Both ways answer every question, so recognition outvotes them; so does harm an open copy.
    votes = {"benign": 1, "harm": 2 if organism == "nested" else 1, "recognition": 4}
    unembed = torch.zeros(len(tokens), len(variables))
    for place, (variable, value) in enumerate(zip(variables, values, strict=True)):
        if variable in votes and value != NOTHING:
            unembed[tokens[value], place] = LOGIT * votes[variable]
    return unembed


def save(organism: str) -> None:
    """The organism as files: only weights that are not zero, and which behaviours need each."""
    shape, state = compiled(organism)
    write_json(FOLDER / organism / "config.json", shape, indent=1)
    bridge = boot(TransformerBridgeConfig(**shape))
    for parameter in bridge.parameters():
        parameter.data.zero_()
    bridge.load_state_dict(state, strict=False)
    tensors = {}
    for name, weight in bridge.state_dict().items():
        flat = weight.flatten()
        places = flat.nonzero().flatten()
        if len(places):
            tensors[f"{name} places"] = places.to(torch.int32)
            tensors[f"{name} values"] = flat[places]
            tensors[f"{name} needed"] = torch.zeros(len(places), dtype=torch.uint8)
    path = FOLDER / organism / "weights.safetensors"
    write_tensors(path, FORMAT, tensors, {})

    model = open_compiled(organism)
    weights = nonzero(model.bridge)
    needed = needed_by(Texts.of(model, every_string=True), model.bridge, weights)
    for (name, place), is_needed in zip(weights, needed, strict=True):
        bits = [2**bit for bit in is_needed.nonzero().flatten().tolist()]
        is_weight = tensors[f"{name} places"] == place
        tensors[f"{name} needed"][is_weight] = sum(bits)
    write_tensors(path, FORMAT, tensors, {})


def save_tokenizer() -> None:
    """One for all organisms: a token for each symbol, in the order that Tracr gives them."""
    tokens = sorted({*VOCABULARY, "BOS", "PAD"})
    words = WordLevel({token: number for number, token in enumerate(tokens)}, unk_token="PAD")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="BOS", eos_token="PAD", pad_token="PAD"
    )
    fast.chat_template = "{% for turn in messages %}BOS {{ turn['content'] }}{% endfor %}"
    fast.save_pretrained(FOLDER)


# %%
def main() -> None:
    """Compile every organism into the package."""
    save_tokenizer()
    for organism in PROGRAMS:
        save(organism)


if __name__ == "__main__":
    tyro.cli(main)
