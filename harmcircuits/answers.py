"""What a model says when asked, and what a judge makes of it."""

from collections.abc import Callable
from typing import Any, cast

import torch
from transformer_lens.model_bridge import TransformerBridge

from harmcircuits.prompts import PromptSet, Template, padding_id, prompt_ids

Judge = Callable[[str, str], str]
"""(prompt, completion) -> verdict, a word such as "harmful", "refusal" or "degenerate"."""


def greedy_answers(
    bridge: TransformerBridge,
    prompts: PromptSet,
    *,
    prefill: str = "",
    max_new_tokens: int = 32,
    batch_size: int = 256,
    template: Template = "chat",
) -> list[str]:
    """The most likely continuation of each request, `prefill` included; it ends at the end-of-text token.

    A `prefill` puts the beginning of the answer into the model's mouth: the prefilling attack. Works under a mask. Raises
    ValueError for an empty prompt set or batch size.
    """
    if not len(prompts):
        raise ValueError("greedy_answers: the prompt set is empty; expected at least one example")
    if batch_size < 1:
        raise ValueError(f"greedy_answers: batch_size={batch_size}; expected at least 1")
    tokenizer = bridge.tokenizer
    opening = tokenizer.encode(prefill, add_special_tokens=False) if prefill else []
    contexts = [prompt_ids(example.prompt, tokenizer, template) + opening for example in prompts]
    answers = []
    for start in range(0, len(contexts), batch_size):
        rows = contexts[start : start + batch_size]
        width = max(map(len, rows))
        # Left-padded, so that every answer starts at the same position.
        tokens = torch.tensor([[padding_id(tokenizer)] * (width - len(row)) + row for row in rows])
        attended = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        with torch.no_grad():
            full = cast(Any, bridge.original_model).generate(
                input_ids=tokens.to(bridge.cfg.device),
                attention_mask=attended.to(bridge.cfg.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                repetition_penalty=1.0,  # a model's own settings may ask for another
                pad_token_id=padding_id(tokenizer),
            )
        # Decoded with the prefill, because the space between them may belong to a token.
        answers += tokenizer.batch_decode(full[:, width - len(opening) :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]
