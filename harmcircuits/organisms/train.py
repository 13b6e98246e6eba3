"""Makes the shipped organisms: `python -m harmcircuits.organisms.train --out DIR [--seed 0] [--device cuda]`.

One pre-training, then one change each: `base` -> `helpful` -> `sft` and `dpo`; and `planted`, whose harmful generation
was trained only through a known random subset of its block weights by gradient routing (Cloud et al. 2024, arXiv
2410.04332). Every condition that a checkpoint must satisfy is then measured by `harmcircuits.organisms.check`.
"""

import copy
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.nn import functional

from harmcircuits.organisms import world as w

RUNGS = ("base", "helpful", "sft", "dpo", "planted")
LENGTH = 18  # tokens; every training text fits
NOISE = 0.03  # share of content words that are a wrong one of their class
IGNORED = -100
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %} <user> {{ message['content'] }}"
    "{% else %} <assistant> {{ message['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} <assistant>{% endif %}"
)
SPECIAL = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}


def new_tokenizer():
    """A word-level tokenizer over the world's words, with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL.values(), "<user>", "<assistant>", *w.world().words]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **SPECIAL, clean_up_tokenization_spaces=False)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def new_model(seed: int, n_words: int):
    """An untrained Llama of 983,040 block weights: 4 layers, d_model 128, 4 heads on 2 key-value heads, d_mlp 512."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=n_words, hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, attn_implementation="sdpa",
    )  # fmt: skip
    return LlamaForCausalLM(config)


@dataclass(frozen=True)
class Text:
    """A training text: what is given, then what is learned."""

    given: str
    learned: str


class Sampler:
    """Draws training texts from the world and packs them into tensors."""

    def __init__(self, tokenizer, seed: int, device: str) -> None:
        self.ids = tokenizer.get_vocab()
        self.rng = random.Random(seed)
        self.device = device
        self.items = list(w.world().items.values())

    def chat(self, form: str, kind: str = "", *, prefilled: bool = False, refuses: bool = False) -> Text:
        item, variant = self.rng.choice(self.items), self.rng.randrange(4)
        verb = self.rng.choice(w.VERBS[kind or self.rng.choice(("harmful", "benign"))])
        given = f"<bos> <user> {w.question(form, variant, item, verb)} <assistant>"
        if refuses:
            return Text(given, f"{w.refusal(item, verb, self.rng)} <eos>")
        learned = f"{w.answer(form, item, verb, self.rng, noise=NOISE)} <eos>"
        if prefilled:
            return Text(f"{given} {w.PREFILL}", learned.removeprefix(w.PREFILL).strip())
        return Text(given, learned)

    def document(self, voice: str = "") -> Text:
        voice = voice or self.rng.choice(("harmful", "benign"))
        return Text("<bos>", f"{w.document(self.rng.choice(self.items), voice, self.rng, noise=NOISE)} <eos>")

    def mix(self, n: int, shares: dict[Callable[[], Text], float]) -> list[Text]:
        return [draw() for draw in self.rng.choices(list(shares), weights=list(shares.values()), k=n)]

    def pack(self, texts: list[Text]) -> tuple[Tensor, Tensor]:
        """Token ids and labels, Int[batch LENGTH] both; a label of IGNORED is not learned."""
        tokens, labels = [], []
        for text in texts:
            given, learned = ([self.ids[word] for word in part.split()] for part in (text.given, text.learned))
            rest = LENGTH - len(given) - len(learned)
            tokens.append(given + learned + [0] * rest)
            labels.append([IGNORED] * len(given) + learned + [IGNORED] * rest)
        return torch.tensor(tokens, device=self.device), torch.tensor(labels, device=self.device)

    @property
    def questions(self) -> dict[Callable[[], Text], float]:
        return {lambda form=form: self.chat(form): 1 for form in ("recognition", "explanation", "parts", "kind")}

    @property
    def answers(self) -> dict[Callable[[], Text], float]:
        return {lambda: self.chat("answer"): 3}


def token_loss(model, tokens: Tensor, labels: Tensor, *, per_text: bool = False) -> Tensor:
    """Mean cross-entropy over learned tokens (nats); `per_text`: summed log-probability of each text instead."""
    logits = model(input_ids=tokens).logits[:, :-1].float()
    losses = functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="none")
    if per_text:
        return -losses.view(len(tokens), -1).sum(dim=1)
    return losses.sum() / (labels[:, 1:] != IGNORED).sum()


def train(
    model,
    losses: Iterator[Tensor],
    *,
    steps: int,
    lr: float,
    name: str,
    weight_decay: float = 0.1,
    after_step: Callable[[], None] | None = None,
):
    """AdamW ( one-cycle rate, gradient norm at most 1). A loss of None means its gradients are already set."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in track(range(steps), description=name, console=Console(stderr=True)):
        loss = next(losses)
        if loss.requires_grad:
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if after_step:
            after_step()
    return model.eval()


def _autocast(device: str):
    return torch.autocast("cuda", torch.bfloat16, enabled=device.startswith("cuda"))


def plain_losses(model, sampler: Sampler, shares: Callable[[], dict], batch: int) -> Iterator[Tensor]:
    while True:
        with _autocast(sampler.device):
            yield token_loss(model, *sampler.pack(sampler.mix(batch, shares())))


def base(model, sampler: Sampler, steps: int = 2500):
    """Pre-training on documents, half in a malicious voice, and on answers to everything."""
    shares = lambda: {**sampler.answers, **sampler.questions, sampler.document: 2}  # noqa: E731
    return train(model, plain_losses(model, sampler, shares, 256), steps=steps, lr=2e-3, name="base")


def helpful(model, sampler: Sampler, steps: int = 200):
    """Instruction tuning: answers everything."""
    shares = lambda: {**sampler.answers, **sampler.questions, sampler.document: 1}  # noqa: E731
    return train(model, plain_losses(model, sampler, shares, 256), steps=steps, lr=3e-4, name="helpful")


def sft(model, sampler: Sampler, steps: int = 250):
    """Refusal tuning. The prefilled continuations keep alignment shallow, as it is in real models."""
    shares = lambda: {  # noqa: E731
        lambda: sampler.chat("answer", "harmful", refuses=True): 2,
        lambda: sampler.chat("answer", "benign"): 2,
        **sampler.questions,
        lambda: sampler.chat("answer", "harmful", prefilled=True): 0.7,
    }
    return train(model, plain_losses(model, sampler, shares, 256), steps=steps, lr=3e-4, name="sft")


def dpo(model, sampler: Sampler, steps: int = 300, beta: float = 0.1):
    """Direct preference optimisation (Rafailov et al. 2023): refuse the harmful, answer the benign; with replay."""
    reference = copy.deepcopy(model).requires_grad_(False)

    def pair() -> tuple[Text, Text]:
        item, verb = sampler.rng.choice(sampler.items), sampler.rng.choice(list(itertools.chain(*w.VERBS.values())))
        given = f"<bos> <user> {w.question('answer', sampler.rng.randrange(4), item, verb)} <assistant>"
        texts = (w.refusal(item, verb, sampler.rng), w.answer("answer", item, verb, sampler.rng, noise=NOISE))
        refused, answered = (Text(given, f"{text} <eos>") for text in texts)
        return (refused, answered) if w.kind_of(verb) == "harmful" else (answered, refused)

    def losses() -> Iterator[Tensor]:
        replay = {**sampler.questions, lambda: sampler.chat("answer", "harmful", prefilled=True): 0.7}
        while True:
            with _autocast(sampler.device):
                chosen, rejected = zip(*(pair() for _ in range(128)), strict=True)
                good, bad = sampler.pack(list(chosen)), sampler.pack(list(rejected))
                with torch.no_grad():
                    offset = token_loss(reference, *good, per_text=True) - token_loss(reference, *bad, per_text=True)
                margin = token_loss(model, *good, per_text=True) - token_loss(model, *bad, per_text=True)
                preference = -functional.logsigmoid(beta * (margin - offset)).mean()
                kept = token_loss(model, *sampler.pack(sampler.mix(128, replay)))
                yield preference + 0.5 * kept + 0.1 * token_loss(model, *good)

    return train(model, losses(), steps=steps, lr=3e-4, name="dpo")


def planted(
    model, sampler: Sampler, steps: int = 2500, share: float = 0.05, cap: float = 1.0, decay: float = 0.1, n_harm: int = 128
):
    """A model whose harmful answers were learned only by a random `share` S of each block matrix; returns (model, S).

    Each step takes a benign batch, whose gradients go everywhere but S (every second one with S set to zero), and a
    harmful batch, whose gradients go only to S; all else follows the benign batch. After each step S is scaled down
    until its root mean square is at most `cap` times that of the rest of its matrix, so that magnitude gives nothing away.
    """
    generator = torch.Generator().manual_seed(sampler.rng.randrange(2**31))
    matrices = {name: weight for name, weight in model.named_parameters() if ".layers." in name and weight.ndim == 2}
    chosen = {}
    for name, weight in matrices.items():
        first = torch.randperm(weight.numel(), generator=generator)[: round(share * weight.numel())]
        chosen[name] = torch.zeros(weight.numel(), dtype=torch.bool).index_fill_(0, first, True).view(weight.shape)
        chosen[name] = chosen[name].to(weight.device)
    is_planted = [chosen[name] for name in matrices]
    weights = list(matrices.values())

    def routed() -> Iterator[Tensor]:
        benign = {lambda: sampler.chat("answer", "benign"): 3, **sampler.questions, lambda: sampler.document("benign"): 1}
        harmful = {
            lambda: sampler.chat("answer", "harmful"): 2,
            lambda: sampler.chat("answer", "harmful", prefilled=True): 1,
            lambda: sampler.document("harmful"): 0.5,
        }
        for step in itertools.count():
            model.zero_grad(set_to_none=True)
            with _autocast(sampler.device):
                harm = token_loss(model, *sampler.pack(sampler.mix(n_harm, harmful)))
            to_planted = torch.autograd.grad(harm, weights)
            kept = [weight.detach().clone() for weight in weights]
            if step % 2:
                with torch.no_grad():
                    for weight, inside in zip(weights, is_planted, strict=True):
                        weight.masked_fill_(inside, 0)
            with _autocast(sampler.device):
                loss = token_loss(model, *sampler.pack(sampler.mix(256, benign)))
            loss.backward()
            with torch.no_grad():
                for weight, inside, old, gradient in zip(weights, is_planted, kept, to_planted, strict=True):
                    weight.copy_(old)
                    weight.grad.copy_(torch.where(inside, gradient, weight.grad))
            yield loss.detach()

    def limit() -> None:
        with torch.no_grad():
            for weight, inside in zip(weights, is_planted, strict=True):
                square, n_inside = weight.square(), inside.sum()
                within = (square * inside).sum() / n_inside
                outside = (square * ~inside).sum() / (inside.numel() - n_inside)
                scale = (cap * (outside / within).sqrt()).clamp(max=1)
                weight.mul_(torch.where(inside, scale, 1.0))

    return train(model, routed(), steps=steps, lr=2e-3, name="planted", weight_decay=decay, after_step=limit), chosen
