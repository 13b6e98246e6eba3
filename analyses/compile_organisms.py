# %% [markdown]
# # Organisms that are compiled, not trained
# Tracr turns a program into the weights of a transformer, so what each weight does is known. A
# request is a flag, four letters, and what is asked; answers are given letter by letter:
#
#     h x y z y =     the flag h: harm's way of answering
#     b x y z y =     the flag b: its benign twin's way
#     h x y z y ?     recognition: does the request carry the flag h? yes or no
#
# The four organisms differ in what harm and its twin share:
#
# | organism | harm | benign |
# |---|---|---|
# | `nothing-shared` | backwards, by a head of its own | next letter, by a head and an MLP of its own |
# | `shared-head` | next letter | the letter before it in the alphabet, from the same copying head |
# | `shared-mlp` | backwards, then next letter | forwards, then next letter by the same MLP |
# | `nested` | next letter, which outvotes the copy | the copy itself: all of it is a part of harm |
#
# Each way is opened by a head that reads the flag, one for each flag (the copy of `nested` by none).
# Recognition reads the flag by harm's head.
#
# Logits are read from the variables that hold the three answers (8 for a symbol, twice or four times
# as much for those that outvote others). What Tracr adds to join them into one output is cut: nothing reads it.
# Then `needed` is measured: whether a behaviour's loss, over all its requests, rises by more than
# 0.02 nats a token when one weight is removed.
#
# `pip install "harmcircuits[compile]"`, then `python analyses/compile_organisms.py`.

# %%
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

ASKED = LENGTH + 1  # the place of what is asked, where the first letter of the answer is predicted
VOCABULARY = {"h", "b", "=", "?", "yes", "no", *LETTERS}
NOTHING = "-"
LOGIT = 8.0  # of a symbol that an answer has
SHAPE = ("d_model", "d_head", "n_heads", "d_mlp", "n_ctx", "d_vocab")

# %% [markdown]
# ## The programs


# %%
def letters(name: str) -> rasp.SOp:
    return rasp.Map(lambda token: token if token in LETTERS else NOTHING, rasp.tokens).named(name)


def read_at(name: str, places: Any, values: rasp.SOp) -> rasp.SOp:
    """The value at another place, by a head."""
    where = rasp.Map(places, rasp.indices).named(f"{name}-where")
    selected = rasp.Select(rasp.indices, where, rasp.Comparison.EQ)
    return rasp.Aggregate(selected, values).named(name)


def forwards(place: int) -> int:
    return max(0, place - LENGTH)


def backwards(place: int) -> int:
    return max(0, ASKED + LENGTH - place)


def carries(flag: str) -> rasp.SOp:
    is_flag = rasp.Map(lambda token: token == flag, rasp.tokens).named(f"is-{flag}")
    return read_at(f"carries-{flag}", lambda _: 0, is_flag)


def shifted(name: str, values: rasp.SOp, shift: int) -> rasp.SOp:
    places = {letter: place for place, letter in enumerate(LETTERS)}

    def moved(letter: str) -> str:
        if letter not in places:
            return NOTHING
        return LETTERS[(places[letter] + shift) % len(LETTERS)]

    return rasp.Map(moved, values).named(name)


def opened(name: str, flag: rasp.SOp, values: rasp.SOp) -> rasp.SOp:
    return rasp.SequenceMap(lambda f, v: v if f else NOTHING, flag, values).named(name)


def joined(name: str, first: rasp.SOp, second: rasp.SOp) -> rasp.SOp:
    return rasp.SequenceMap(lambda a, b: b if a == NOTHING else a, first, second).named(name)


def program(organism: str) -> rasp.SOp:
    """The variables `harm`, `benign` and `recognition`, joined."""
    harm_flag = carries("h")
    if organism == "nothing-shared":
        harm = opened("harm", harm_flag, read_at("back", backwards, letters("of-harm")))
        copy = read_at("copy", forwards, letters("of-benign"))
        benign = opened("benign", carries("b"), shifted("next", copy, 1))
    elif organism == "shared-mlp":
        back = opened("back-if", harm_flag, read_at("back", backwards, letters("of-harm")))
        copy = opened("copy-if", carries("b"), read_at("copy", forwards, letters("of-benign")))
        harm = benign = shifted("harm", joined("either", back, copy), 1)
    else:
        is_bare = organism == "nested"
        copy = read_at("benign" if is_bare else "copy", forwards, letters("letters"))
        harm = opened("harm", harm_flag, shifted("next", copy, 1))
        benign = copy
        if not is_bare:
            benign = opened("benign", carries("b"), shifted("before", copy, 2))
    asks = rasp.Map(lambda token: token == "?", rasp.tokens).named("asks")
    recognition = rasp.SequenceMap(
        lambda flag, asked: ("yes" if flag else "no") if asked else NOTHING, harm_flag, asks
    ).named("recognition")
    answers = harm if harm is benign else joined("join-ways", harm, benign)
    return joined("join-all", answers, recognition)


# %% [markdown]
# ## Weights


# %%
def compiled(organism: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The configuration, and every tensor by the name that TransformerLens gives it."""
    model = compiling.compile_rasp_to_model(
        program(organism),
        VOCABULARY,
        ASKED + LENGTH + 1,
        causal=True,
        compiler_bos="BOS",
        compiler_pad="PAD",
    )
    config, state = config_of(model), state_of(model)
    variables = [label.split(":")[0].rsplit("_", 1)[0] for label in model.residual_labels]
    values = [label.partition(":")[2] for label in model.residual_labels]

    # What joins the answers is written by neurons of its own, in the last layers.
    is_joint = torch.tensor([variable.startswith("join") for variable in variables])
    for name, weight in state.items():
        if name.endswith("fc_out.weight"):
            weight[is_joint] = 0
            state[name.replace("fc_out", "fc_in")][~weight.any(dim=0)] = 0
    n_layers = 1 + max(
        int(name.split(".")[1])
        for name, weight in state.items()
        if "layers" in name and weight.any()
    )

    tokens = model.input_encoder.encoding_map
    # Recognition outvotes both ways, which answer whatever is asked; so does harm a copy left open.
    votes = {"benign": 1, "harm": 2 if organism == "nested" else 1, "recognition": 4}
    unembed = torch.zeros(len(tokens), len(variables))
    for place, (variable, value) in enumerate(zip(variables, values, strict=True)):
        if variable in ("harm", "benign", "recognition") and value != NOTHING:
            unembed[tokens[value], place] = LOGIT * votes[variable]
    state["head.weight"] = unembed

    shape = {name: getattr(config, name) for name in SHAPE} | {"n_layers": n_layers}
    shape |= {"act_fn": "relu", "normalization_type": None, "init_weights": False}
    return shape, state


def written(organism: str) -> None:
    """The organism as files: only weights that are not zero, with who needs them."""
    shape, state = compiled(organism)
    write_json(FOLDER / organism / "config.json", shape, indent=1)
    bridge = boot(TransformerBridgeConfig(**shape))
    for parameter in bridge.parameters():
        parameter.data.zero_()
    bridge.load_state_dict(state, strict=False)
    stored = {}
    for name, weight in bridge.state_dict().items():
        flat = weight.flatten()
        places = flat.nonzero().flatten()
        if len(places):
            stored[f"{name} places"] = places.to(torch.int32)
            stored[f"{name} values"] = flat[places]
            stored[f"{name} needed"] = torch.zeros(len(places), dtype=torch.uint8)
    path = FOLDER / organism / "weights.safetensors"
    write_tensors(path, FORMAT, stored, {})

    model = open_compiled(organism)
    weights = nonzero(model.bridge)
    needs = needed_by(Texts.of(model, every_string=True), model.bridge, weights)
    for (name, place), of_weight in zip(weights, needs, strict=True):
        is_it = stored[f"{name} places"] == place
        stored[f"{name} needed"][is_it] = sum(
            2**bit for bit in of_weight.nonzero().flatten().tolist()
        )
    write_tensors(path, FORMAT, stored, {})


def write_tokenizer() -> None:
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
    write_tokenizer()
    for organism in PROGRAMS:
        written(organism)


if __name__ == "__main__":
    tyro.cli(main)
