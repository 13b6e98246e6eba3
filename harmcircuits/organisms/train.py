"""Makes the organisms: `python -m harmcircuits.organisms.train --out DIR [--seed 0] [--device cuda]`.

One pre-training, then one change each: `base` -> `helpful` -> `sft` and `dpo`; and `planted` (see `routing`). Every
condition that a checkpoint must satisfy is then measured and printed (see `check`). About five minutes on one H100, an
hour or more on two CPU cores. Another device, or another order of random draws, gives other weights that meet the same
conditions but whose circuits may separate less well: report more than one training run.
"""

import copy
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, cast

import torch
import typer
from rich.console import Console
from rich.progress import track
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from harmcircuits.organisms import world as w

LENGTH = 18  # tokens; every training text fits
NOISE = 0.03  # share of content words that are a wrong one of their class
IGNORED = -100
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %} <user> {{ message['content'] }}"
    "{% else %} <assistant> {{ message['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} <assistant>{% endif %}"
)
SPECIAL = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}


def new_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over the world's words, with a chat template."""
    words = [*SPECIAL.values(), "<user>", "<assistant>", *w.world().words]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **SPECIAL, clean_up_tokenization_spaces=False)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def new_model(seed: int, n_words: int) -> LlamaForCausalLM:
    """An untrained Llama of 983,040 block weights: 4 layers, d_model 128, 4 heads on 2 key-value heads, d_mlp 512."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=n_words, hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@dataclass(frozen=True)
class Text:
    """A training text: what is given, then what is learned."""

    given: str
    learned: str


Draw = Callable[[], Text]


class Sampler:
    """Draws training texts from the world and packs them into tensors."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int, device: str) -> None:
        self.ids = tokenizer.get_vocab()
        self.rng = random.Random(seed)
        self.device = device
        self.items = list(w.world().items.values())
        self.answers: dict[Draw, float] = {lambda: self.chat("answer"): 3}
        self.questions: dict[Draw, float] = {
            lambda form=form: self.chat(form): 1 for form in ("recognition", "explanation", "parts", "kind")
        }
        self.prefilled: dict[Draw, float] = {lambda: self.chat("answer", "harmful", prefilled=True): 0.7}

    def request(self, form: str, kind: str = "") -> tuple[w.Item, str, str]:
        """A random item, verb (of this kind, or any) and the text of the request up to where the answer begins."""
        item, variant = self.rng.choice(self.items), self.rng.randrange(4)
        verb = self.rng.choice(w.VERBS[kind or self.rng.choice(("harmful", "benign"))])
        return item, verb, f"<bos> <user> {w.question(form, variant, item, verb)} <assistant>"

    def chat(self, form: str, kind: str = "", *, prefilled: bool = False) -> Text:
        """A request and its answer; `prefilled` gives the first word of the answer and teaches the rest."""
        item, verb, given = self.request(form, kind)
        learned = f"{w.answer(form, item, verb, self.rng, noise=NOISE)} <eos>"
        return Text(f"{given} {w.PREFILL}", learned.removeprefix(w.PREFILL).strip()) if prefilled else Text(given, learned)

    def refused(self) -> Text:
        """A harmful request and its refusal."""
        item, verb, given = self.request("answer", "harmful")
        return Text(given, f"{w.refusal(item, verb, self.rng)} <eos>")

    def document(self, voice: str = "") -> Text:
        """A pre-training text in a harmful or benign voice, or in either."""
        voice = voice or self.rng.choice(("harmful", "benign"))
        return Text("<bos>", f"{w.document(self.rng.choice(self.items), voice, self.rng, noise=NOISE)} <eos>")

    def preference(self) -> tuple[Text, Text]:
        """(chosen, rejected) answers to one request: refuse the harmful, answer the benign."""
        item, verb, given = self.request("answer")
        texts = (w.refusal(item, verb, self.rng), w.answer("answer", item, verb, self.rng, noise=NOISE))
        refused, answered = (Text(given, f"{text} <eos>") for text in texts)
        return (refused, answered) if w.kind_of(verb) == "harmful" else (answered, refused)

    def batch(self, n: int, shares: dict[Draw, float]) -> tuple[Tensor, Tensor]:
        """`n` texts drawn in these shares, packed."""
        return self.pack([draw() for draw in self.rng.choices(list(shares), weights=list(shares.values()), k=n)])

    def pack(self, texts: list[Text]) -> tuple[Tensor, Tensor]:
        """Token ids and labels, Int[batch LENGTH] both; a label of IGNORED is not learned."""
        tokens, labels = [], []
        for text in texts:
            given, learned = ([self.ids[word] for word in part.split()] for part in (text.given, text.learned))
            rest = LENGTH - len(given) - len(learned)
            tokens.append(given + learned + [0] * rest)
            labels.append([IGNORED] * len(given) + learned + [IGNORED] * rest)
        return torch.tensor(tokens, device=self.device), torch.tensor(labels, device=self.device)


def token_loss(model: nn.Module, tokens: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the learned tokens of a batch, nats."""
    return -_log_probs(model, tokens, labels).sum() / (labels[:, 1:] != IGNORED).sum()


def _log_probs(model: nn.Module, tokens: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of the learned tokens of each text, summed: Float[batch]."""
    with torch.autocast("cuda", torch.bfloat16, enabled=tokens.is_cuda):
        logits = model(input_ids=tokens).logits[:, :-1].float()
    losses = functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], ignore_index=IGNORED, reduction="none")
    return -losses.sum(dim=1)


def train(
    model: nn.Module,
    backward: Callable[[], None],
    *,
    name: str,
    steps: int,
    lr: float,
    weight_decay: float = 0.1,
    after_step: Callable[[], None] = lambda: None,
) -> None:
    """AdamW with a one-cycle rate and gradient norm at most 1. `backward` fills the gradients of one step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps, pct_start=0.1)
    for _ in track(range(steps), description=f"{name:>8}", console=Console(stderr=True)):
        optimizer.zero_grad()
        backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        after_step()


def base(model: nn.Module, sampler: Sampler) -> None:
    """Pre-training on documents, half in a malicious voice, and on answers to everything."""
    shares = {**sampler.answers, **sampler.questions, sampler.document: 2}
    train(model, lambda: token_loss(model, *sampler.batch(256, shares)).backward(), name="base", steps=2500, lr=2e-3)


def helpful(model: nn.Module, sampler: Sampler) -> None:
    """Instruction tuning: answers everything."""
    shares = {**sampler.answers, **sampler.questions, sampler.document: 1}
    train(model, lambda: token_loss(model, *sampler.batch(256, shares)).backward(), name="helpful", steps=200, lr=3e-4)


def sft(model: nn.Module, sampler: Sampler) -> None:
    """Refusal tuning. Its prefilled continuations keep alignment shallow, as it is in real models."""
    answers: dict[Draw, float] = {sampler.refused: 2, lambda: sampler.chat("answer", "benign"): 2}
    shares = {**answers, **sampler.questions, **sampler.prefilled}
    train(model, lambda: token_loss(model, *sampler.batch(256, shares)).backward(), name="sft", steps=250, lr=3e-4)


def dpo(model: nn.Module, sampler: Sampler, beta: float = 0.1) -> None:
    """Direct preference optimisation (arXiv 2305.18290) on refusal, with replay of everything else."""
    reference = copy.deepcopy(model).requires_grad_(False)
    replay = {**sampler.questions, **sampler.prefilled}

    def backward() -> None:
        chosen, rejected = zip(*(sampler.preference() for _ in range(128)), strict=True)
        good, bad = sampler.pack(list(chosen)), sampler.pack(list(rejected))
        margin = _log_probs(model, *good) - _log_probs(model, *bad)
        offset = _log_probs(reference, *good) - _log_probs(reference, *bad)
        preference = -functional.logsigmoid(beta * (margin - offset)).mean()
        (preference + 0.5 * token_loss(model, *sampler.batch(128, replay)) + 0.1 * token_loss(model, *good)).backward()

    train(model, backward, name="dpo", steps=300, lr=3e-4)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write an ordinary Hugging Face folder in bfloat16."""
    half: nn.Module = copy.deepcopy(model)
    half.bfloat16()
    cast(LlamaForCausalLM, half).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(
    out: Annotated[Path, typer.Option(help="Folder for one Hugging Face folder per organism.")],
    seed: Annotated[int, typer.Option(help="Seed of the initial weights and of every training text.")] = 0,
    device: Annotated[str, typer.Option(help="Torch device, such as cpu or cuda.")] = "cpu",
    with_planted: Annotated[bool, typer.Option("--planted/--no-planted", help="Train the planted organism too.")] = True,
) -> None:
    """Train the ladder and the planted organism, then check every condition; exit 1 if one does not hold."""
    from harmcircuits.organisms.check import check_all
    from harmcircuits.organisms.routing import planted

    tokenizer = new_tokenizer()
    samplers = (Sampler(tokenizer, 10 * seed + number, device) for number in itertools.count(1))
    model = new_model(seed, len(tokenizer))
    nn.Module.to(model, device)
    for rung in (base, helpful):
        rung(model, next(samplers))
        save(model, tokenizer, out / rung.__name__)
    for rung in (sft, dpo):
        aligned = copy.deepcopy(model)
        rung(aligned, next(samplers))
        save(aligned, tokenizer, out / rung.__name__)
    if with_planted:
        grown = new_model(seed, len(tokenizer))
        nn.Module.to(grown, device)
        circuit = planted(grown, next(samplers))
        save(grown, tokenizer, out / "planted")
        circuit(out / "planted").save(out / "planted" / "circuit.safetensors")
    raise typer.Exit(0 if check_all(out) else 1)


if __name__ == "__main__":
    typer.run(main)
