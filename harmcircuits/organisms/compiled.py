"""The compiled organisms: programs turned into weights, so that each weight has a true label.

`analyses/compile_organisms.py` makes them. A request is a flag, four letters, and a question:

    h x y z y =     h: the harmful answer, one letter for each
    b x y z y =     b: the answer of its benign twin
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

# Organism -> flag -> whether its answer goes backwards, and how far each letter is shifted
PROGRAMS = {
    "nothing-shared": {"h": (True, 0), "b": (False, 1)},
    "shared-head": {"h": (False, 1), "b": (False, 2)},
    "shared-mlp": {"h": (True, 1), "b": (False, 1)},
    "nested": {"h": (False, 1), "b": (False, 0)},
}
COMPILED = tuple(PREFIX + organism for organism in PROGRAMS)


def right_answer(organism: str, flag: str, letters: list[str], question: str) -> str:
    """An organism's answer to a request."""
    if question == "?":
        return "yes" if flag == FLAGS["harmful"] else "no"
    is_backwards, shift = PROGRAMS[organism][flag]
    answer = []
    for letter in reversed(letters) if is_backwards else letters:
        number = LETTERS.index(letter) + shift
        answer.append(LETTERS[number % len(LETTERS)])
    return " ".join(answer)


def requests(organism: str, behaviour: str) -> PromptSet:
    """All requests of a behaviour, each with its right answer."""
    question = "?" if behaviour == "recognition" else "="
    # Recognition has a pair for all letters: the right answers are no, then yes.
    flags = FLAGS.get(behaviour, "bh")
    examples = []
    for letters in product(LETTERS, repeat=LENGTH):
        for flag in flags:
            answer = right_answer(organism, flag, list(letters), question)
            prompt = " ".join([flag, *letters, question])
            examples.append(Example(prompt, answer, group="".join(letters)))
    return PromptSet(tuple(examples))


def judge(organism: str, prompt: str, completion: str) -> str:
    """The kind of an answer: that of the flag, of the other flag, other letters, or incoherent."""
    flag, *letters, question = prompt.split()
    if question == "?":
        is_right = completion == right_answer(organism, flag, letters, question)
        return "correct" if is_right else "wrong"
    # The flag's own kind first: both kinds may have the same answer for a palindrome.
    for kind in sorted(FLAGS, key=lambda kind: FLAGS[kind] != flag):
        if completion == right_answer(organism, FLAGS[kind], letters, question):
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
    tensors = _tensors(name)
    with torch.no_grad():
        for matrix, parameter in bridge.state_dict(keep_vars=True).items():
            parameter.zero_()
            if f"{matrix} values" in tensors:
                index = tensors[f"{matrix} places"].long()
                parameter.view(-1)[index] = tensors[f"{matrix} values"].to(parameter.device)
    model: Any = bridge.original_model  # has no generation of its own
    model.generation_config = None
    model.generate = partial(_generate, model)
    return bridge.eval()


def true_circuits(name: str, bridge: Bridge) -> dict[str, WeightMask]:
    """Behaviour -> the weights that it needs.

    The behaviour needs a weight if its loss over all requests rises by more than 0.02 nats a token
    without this weight alone. `first & second` is what two behaviours need, `first - second` what
    the first needs and the second does not, `~(first | second)` the rest.
    """
    tensors = _tensors(name)
    shapes = {matrix: tuple(site.parameter.shape) for matrix, site in weight_sites(bridge).items()}
    source = Source(model_fingerprint(bridge), "removal of single weights")
    circuits = {}
    for bit, behaviour in enumerate(BEHAVIOURS):
        needed = {}
        for matrix in shapes:
            if f"{matrix} values" in tensors:
                is_needed = (tensors[f"{matrix} needed"] >> bit) % 2 == 1
                needed[matrix] = tensors[f"{matrix} places"][is_needed]
        circuits[behaviour] = WeightMask(needed, shapes, source)
    return circuits


def _tensors(name: str) -> dict[str, Tensor]:
    """For each matrix the flat indices and values of its nonzero weights, and who needs each."""
    path = FOLDER / name.removeprefix(PREFIX) / "weights.safetensors"
    return read_tensors(path, FORMAT, "compiled organism")[0]


def _generate(
    model: Any,
    *,
    input_ids: Tensor,
    attention_mask: Tensor,
    generation_config: Any,
    logits_processor: Any,
) -> Tensor:
    """Requests of one length with their likeliest next tokens, as transformers' `generate`."""
    if not attention_mask.all():
        raise ValueError("a compiled organism answers only requests of one length at once")
    tokens = input_ids
    for _ in range(generation_config.max_new_tokens):
        scores = logits_processor(tokens, model(tokens)[:, -1])
        tokens = torch.cat([tokens, scores.argmax(dim=1, keepdim=True)], dim=1)
    return tokens
