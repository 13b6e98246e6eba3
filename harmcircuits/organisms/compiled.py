"""The compiled organisms: programs turned into weights, so that each weight has a true label.

`analyses/compile_organisms.py` makes them. A request is a flag, four letters, and what is asked:

    h x y z y =     h: harm's way of answering, one letter for each
    b x y z y =     b: its benign twin's way
    h x y z y ?     recognition: does the request carry the flag h?
"""

from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from harmcircuits.behaviours.behaviour import Splits, standard_behaviour
from harmcircuits.behaviours.model import Model
from harmcircuits.circuits.masks import WeightMask
from harmcircuits.circuits.scores import Source
from harmcircuits.hooks.bridge import Bridge
from harmcircuits.hooks.weights import model_fingerprint, weight_sites
from harmcircuits.prompts import Example, PromptSet
from harmcircuits.storage import read_json, read_tensors

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

FORMAT = "harmcircuits.compiled.1"
FOLDER = Path(__file__).parent / "weights" / "compiled"
PREFIX = "compiled/"
LETTERS = "xyz"
LENGTH = 4  # letters of a request
FLAGS = {"harmful": "h", "benign": "b"}
BEHAVIOURS = (*FLAGS, "recognition")

# Flag -> whether the answer goes backwards, and by how many letters each is shifted.
WAYS = {
    "nothing-shared": {"h": (True, 0), "b": (False, 1)},
    "shared-head": {"h": (False, 1), "b": (False, 2)},
    "shared-mlp": {"h": (True, 1), "b": (False, 1)},
    "nested": {"h": (False, 1), "b": (False, 0)},
}
COMPILED = tuple(PREFIX + organism for organism in WAYS)


def right_answer(organism: str, flag: str, letters: list[str], asked: str) -> str:
    """What an organism answers."""
    if asked == "?":
        return "yes" if flag == FLAGS["harmful"] else "no"
    is_backwards, shift = WAYS[organism][flag]
    answer = []
    for letter in reversed(letters) if is_backwards else letters:
        place = LETTERS.index(letter) + shift
        answer.append(LETTERS[place % len(LETTERS)])
    return " ".join(answer)


def requests(organism: str, behaviour: str) -> PromptSet:
    """All requests of a behaviour, each with its right answer."""
    asked = "?" if behaviour == "recognition" else "="
    # The rows of a question come in pairs: no is right, then yes.
    flags = FLAGS.get(behaviour, "bh")
    examples = []
    for letters in product(LETTERS, repeat=LENGTH):
        for flag in flags:
            answer = right_answer(organism, flag, list(letters), asked)
            prompt = " ".join([flag, *letters, asked])
            examples.append(Example(prompt, answer, group="".join(letters)))
    return PromptSet(tuple(examples))


def judge(organism: str, prompt: str, completion: str) -> str:
    """What an answer is: the flag's way, the other flag's, other letters, or broken text."""
    flag, *letters, asked = prompt.split()
    if asked == "?":
        is_right = completion == right_answer(organism, flag, letters, asked)
        return "correct" if is_right else "wrong"
    # Both ways may say the same of a palindrome: then it is the flag's.
    for kind, of_kind in sorted(FLAGS.items(), key=lambda item: item[1] != flag):
        if completion == right_answer(organism, of_kind, letters, asked):
            return kind
    words = completion.split()
    return "other" if len(words) == LENGTH and set(words) <= set(LETTERS) else "degenerate"


def open_compiled(name: str, *, device: str = "cpu") -> Model:
    """A compiled organism with its behaviours and the judge of its program."""
    organism = name.removeprefix(PREFIX)
    bridge = load_compiled(name, device)
    behaviours = {}
    for behaviour in BEHAVIOURS:
        options = {}
        if behaviour == "recognition":
            options = {"choices": (("yes",), ("no",)), "max_new_tokens": 1}
        splits = Splits.of(requests(organism, behaviour))
        behaviours[behaviour] = standard_behaviour(behaviour, splits, **options)
    return Model(
        organism,
        bridge,
        behaviours,
        partial(judge, organism),
        max_new_tokens=LENGTH,
        judge_name="compiled 1",
        ground_truth=true_circuits(name, bridge)["harmful"],
        is_invented=True,
    )


def load_compiled(name: str, device: str = "cpu") -> "TransformerBridge":
    """A compiled organism as a bare TransformerBridge."""
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge.sources.native import boot
    from transformers import AutoTokenizer

    folder = FOLDER / name.removeprefix(PREFIX)
    config = read_json(folder / "config.json", "the shape of a compiled organism")
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    bridge = boot(TransformerBridgeConfig(**config), tokenizer, device)
    stored = _stored(name)
    with torch.no_grad():
        for tensor, parameter in bridge.state_dict(keep_vars=True).items():
            parameter.zero_()
            if f"{tensor} values" in stored:
                places = stored[f"{tensor} places"].long()
                parameter.view(-1)[places] = stored[f"{tensor} values"].to(parameter.device)
    model: Any = bridge.original_model  # has no generation of its own
    model.generation_config = None
    model.generate = partial(_generated, model)
    return bridge.eval()


def true_circuits(name: str, bridge: Bridge) -> dict[str, WeightMask]:
    """Behaviour -> the weights that it needs: without any one of them its loss rises.

    By more than 0.02 nats a token, over all requests. `first & second` is what two behaviours need,
    `first - second` what the first needs and the second does not, `~(first | second)` the rest.
    """
    stored = _stored(name)
    shapes = {matrix: tuple(site.parameter.shape) for matrix, site in weight_sites(bridge).items()}
    source = Source(model_fingerprint(bridge), "removal of single weights")
    circuits = {}
    for bit, behaviour in enumerate(BEHAVIOURS):
        needed = {}
        for matrix in shapes:
            if f"{matrix} values" in stored:
                is_needed = (stored[f"{matrix} needed"] >> bit) % 2 == 1
                needed[matrix] = stored[f"{matrix} places"][is_needed]
        circuits[behaviour] = WeightMask(needed, shapes, source)
    return circuits


def _stored(name: str) -> dict[str, Tensor]:
    """Of each tensor the flat places of what is not zero, the values, a bit for who needs each."""
    path = FOLDER / name.removeprefix(PREFIX) / "weights.safetensors"
    return read_tensors(path, FORMAT, "compiled organism")[0]


def _generated(
    model: Any,
    *,
    input_ids: Tensor,
    attention_mask: Tensor,
    generation_config: Any,
    logits_processor: Any,
) -> Tensor:
    """The likeliest tokens after requests of one length, as transformers' `generate` gives them."""
    if not attention_mask.all():
        raise ValueError("a compiled organism answers only requests of one length at once")
    tokens = input_ids
    for _ in range(generation_config.max_new_tokens):
        scores = logits_processor(tokens, model(tokens)[:, -1])
        tokens = torch.cat([tokens, scores.argmax(dim=1, keepdim=True)], dim=1)
    return tokens
