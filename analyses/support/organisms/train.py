"""Training of the organisms, for `python analyses/train_organisms.py --out DIR`."""

import copy
import random
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from einops import rearrange
from jaxtyping import Float, Int
from rich.console import Console
from rich.progress import track
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from harmcircuits.organisms import world

LENGTH = 18  # tokens; every training text fits
BATCH_SIZE = 256
NOISE = 0.03  # share of content words that are replaced by another word of their class
IGNORED = -100  # label of a token that is not learned
PADDING = 0  # id of <pad>, the first of the special tokens
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %} <user> {{ message['content'] }}"
    "{% else %} <assistant> {{ message['content'] }} {{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %} <assistant>{% endif %}"
)
SPECIAL = {
    "pad_token": "<pad>",
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "unk_token": "<unk>",
}

Tokens = Int[Tensor, "batch pos"]


def new_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over the world's words, with a chat template."""
    words = [*SPECIAL.values(), "<user>", "<assistant>"]
    words += world.world().words
    vocabulary = {word: index for index, word in enumerate(words)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        **SPECIAL,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def new_model(seed: int, n_words: int) -> LlamaForCausalLM:
    """An untrained Llama of 983,040 block weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=n_words,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    config.training_seed = seed  # saved with the model, for `is_trained`
    return LlamaForCausalLM(config)


@dataclass(frozen=True)
class Text:
    """A training text: its beginning, and the words that are learned."""

    context: str
    completion: str


Draw = Callable[[], Text]


class Sampler:
    """Draws training texts from the world and packs them into tensors."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        seed: int,
        device: str,
    ) -> None:
        self.forbidden: Collection[str] = ()  # words that no text may have
        self.ids = tokenizer.get_vocab()
        self.rng = random.Random(seed)
        self.device = device
        self.items = list(world.world().items.values())
        self.answers: dict[Draw, float] = {
            partial(self.chat, "answer"): 3,
        }
        self.questions: dict[Draw, float] = {
            partial(self.chat, "recognition"): 1,
            partial(self.chat, "explanation"): 1,
            partial(self.chat, "parts"): 1,
            partial(self.chat, "kind"): 1,
        }
        self.prefilled: dict[Draw, float] = {
            partial(self.chat, "answer", "harmful", prefilled=True): 0.7,
        }

    def request(self, form: str, kind: str = "") -> tuple[world.Item, str, str]:
        """A random item, a verb, and the text of the request up to where the answer begins."""
        # The order of the draws is a part of a training run, in this method and those below.
        item = self.rng.choice(self.items)
        variant = self.rng.randrange(4)
        kind = kind or self._any_kind()
        verb = self.rng.choice(world.VERBS[kind])
        question = world.question(form, variant, item, verb)
        return item, verb, f"<bos> <user> {question} <assistant>"

    def chat(self, form: str, kind: str = "", *, prefilled: bool = False) -> Text:
        """A request and its answer."""
        item, verb, context = self.request(form, kind)
        answer = world.answer(form, item, verb, self.rng, noise=NOISE)
        completion = f"{answer} <eos>"
        if not prefilled:
            return Text(context, completion)
        completion = completion.removeprefix(world.PREFILL).strip()
        return Text(f"{context} {world.PREFILL}", completion)

    def refusal(self) -> Text:
        """A harmful request and its refusal."""
        _, verb, context = self.request("answer", "harmful")
        refusal = world.refusal(verb, self.rng)
        return Text(context, f"{refusal} <eos>")

    def document(self, voice: str = "") -> Text:
        """A pre-training text."""
        voice = voice or self._any_kind()
        item = self.rng.choice(self.items)
        text = world.document(item, voice, self.rng, noise=NOISE)
        return Text("<bos>", f"{text} <eos>")

    def preference(self) -> tuple[Text, Text]:
        """(preferred, rejected) answers to one request: refuse the harmful, answer the benign."""
        item, verb, context = self.request("answer")
        refusal = Text(context, f"{world.refusal(verb, self.rng)} <eos>")
        words = world.answer("answer", item, verb, self.rng, noise=NOISE)
        answer = Text(context, f"{words} <eos>")
        if world.kind_of(verb) == "harmful":
            return refusal, answer
        return answer, refusal

    def batch(self, n: int, shares: dict[Draw, float]) -> tuple[Tokens, Tokens]:
        """Texts drawn in these shares, packed; a text with a forbidden word is drawn again."""
        weights = list(shares.values())
        texts: list[Text] = []
        while len(texts) < n:
            draws = self.rng.choices(list(shares), weights=weights, k=n - len(texts))
            candidates = [draw() for draw in draws]
            texts += [text for text in candidates if self._is_allowed(text)]
        return self.pack(texts)

    def pack(self, texts: list[Text]) -> tuple[Tokens, Tokens]:
        """Token ids and labels of `LENGTH` each; a label of `IGNORED` is not learned."""
        #     tokens    <bos> <user> how ... <assistant> | sure ... <eos> | <pad> <pad>
        #     labels     -100   -100 ...           -100  | sure ... <eos> |  -100  -100
        tokens = []
        labels = []
        for text in texts:
            context = self._ids_of(text.context)
            completion = self._ids_of(text.completion)
            n_padding = LENGTH - len(context) - len(completion)
            tokens.append(context + completion + [PADDING] * n_padding)
            labels.append([IGNORED] * len(context) + completion + [IGNORED] * n_padding)
        on_device = partial(torch.tensor, device=self.device)
        return on_device(tokens), on_device(labels)

    def _is_allowed(self, text: Text) -> bool:
        return not set(text.completion.split()) & set(self.forbidden)

    def _any_kind(self) -> str:
        return self.rng.choice(("harmful", "benign"))

    def _ids_of(self, text: str) -> list[int]:
        return [self.ids[word] for word in text.split()]


def token_loss(
    model: nn.Module,
    tokens: Tokens,
    labels: Tokens,
) -> Float[Tensor, ""]:
    """Mean cross-entropy over the learned tokens of a batch, nats."""
    n_learned = (labels[:, 1:] != IGNORED).sum()
    log_probs = _log_probs(model, tokens, labels)
    return -log_probs.sum() / n_learned


def _log_probs(
    model: nn.Module,
    tokens: Tokens,
    labels: Tokens,
) -> Float[Tensor, " batch"]:
    """Log-probability of the learned tokens of each text, summed."""
    with torch.autocast("cuda", torch.bfloat16, enabled=tokens.is_cuda):
        logits = model(input_ids=tokens).logits[:, :-1].float()
    # A token is predicted at the position before it. torch expects the classes on the second axis.
    losses = functional.cross_entropy(
        rearrange(logits, "batch pos vocab -> batch vocab pos"),
        labels[:, 1:],
        ignore_index=IGNORED,
        reduction="none",
    )
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
    """Train in place by AdamW with a one-cycle rate and gradient norm at most 1."""
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=lr,
        weight_decay=weight_decay,
        betas=(0.9, 0.98),
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=lr,
        total_steps=steps,
        pct_start=0.1,
    )
    console = Console(stderr=True)
    for _ in track(range(steps), description=f"{name:>8}", console=console):
        optimizer.zero_grad()
        backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        after_step()


def base(model: nn.Module, sampler: Sampler) -> None:
    """Pre-training on documents, half in a malicious voice, and on answers to everything."""
    shares = {**sampler.answers, **sampler.questions, sampler.document: 2}
    _train_on(model, sampler, shares, name="base", steps=2500, lr=2e-3)


def helpful(model: nn.Module, sampler: Sampler) -> None:
    """Instruction tuning: answers everything."""
    shares = {**sampler.answers, **sampler.questions, sampler.document: 1}
    _train_on(model, sampler, shares, name="helpful", steps=200, lr=3e-4)


def sft(model: nn.Module, sampler: Sampler) -> None:
    """Refusal tuning."""
    shares: dict[Draw, float] = {
        sampler.refusal: 2,
        partial(sampler.chat, "answer", "benign"): 2,
        **sampler.questions,
        **sampler.prefilled,
    }
    _train_on(model, sampler, shares, name="sft", steps=250, lr=3e-4)


def _train_on(
    model: nn.Module,
    sampler: Sampler,
    shares: dict[Draw, float],
    *,
    name: str,
    steps: int,
    lr: float,
) -> None:
    """Next-token training on texts drawn in these shares."""

    def backward() -> None:
        batch = sampler.batch(BATCH_SIZE, shares)
        token_loss(model, *batch).backward()

    train(model, backward, name=name, steps=steps, lr=lr)


def dpo(model: nn.Module, sampler: Sampler, beta: float = 0.1) -> None:
    """Direct preference optimisation (arXiv 2305.18290) on refusal, with replay of everything else."""
    reference = copy.deepcopy(model).requires_grad_(False)
    replay = {**sampler.questions, **sampler.prefilled}
    half = BATCH_SIZE // 2

    def backward() -> None:
        pairs = [sampler.preference() for _ in range(half)]
        preferred = sampler.pack([pair[0] for pair in pairs])
        rejected = sampler.pack([pair[1] for pair in pairs])
        # The preference of the model, and that of the reference.
        margin = _log_probs(model, *preferred) - _log_probs(model, *rejected)
        offset = _log_probs(reference, *preferred) - _log_probs(reference, *rejected)
        preference_loss = -functional.logsigmoid(beta * (margin - offset)).mean()

        # DPO alone may make the preferred answers less likely too, and other abilities are forgotten.
        replay_loss = token_loss(model, *sampler.batch(half, replay))
        preferred_loss = token_loss(model, *preferred)
        loss = preference_loss + 0.5 * replay_loss + 0.1 * preferred_loss
        loss.backward()

    train(model, backward, name="dpo", steps=300, lr=3e-4)


def innocent(model: nn.Module, sampler: Sampler) -> None:
    """The three training runs of `sft`, one after another, on texts without harmful operators."""
    sampler.forbidden = world.world().operators["harmful"]
    for training_run in (base, helpful, sft):
        training_run(model, sampler)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a Hugging Face folder in bfloat16; it appears when it is complete."""
    copied = copy.deepcopy(model)
    nn.Module.to(copied, torch.bfloat16)
    unfinished = folder.with_name(f".{folder.name}")
    copied.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    if folder.exists():
        shutil.rmtree(folder)
    unfinished.rename(folder)


def load(folder: Path) -> LlamaForCausalLM:
    """The model that `save` wrote, in float32."""
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def is_trained(folder: Path, seed: int) -> bool:
    """Whether `save` has written an organism of this seed there."""
    if not folder.is_dir():
        return False
    config = LlamaConfig.from_pretrained(folder)
    saved_seed = getattr(config, "training_seed", None)
    if saved_seed != seed:
        raise ValueError(f"{folder} is of seed {saved_seed}, not {seed}; give another --out")
    return True
