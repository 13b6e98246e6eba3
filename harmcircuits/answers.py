"""What a model says when asked, and what a judge makes of it."""

from collections.abc import Callable

import torch
from transformer_lens.model_bridge import TransformerBridge

from harmcircuits.prompts import PromptSet, Template, prompt_ids

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
    ValueError for an empty prompt set.
    """
    if not len(prompts):
        raise ValueError("greedy_answers: the prompt set is empty; expected at least one example")
    tokenizer = bridge.tokenizer
    opening = tokenizer.encode(prefill, add_special_tokens=False) if prefill else []
    contexts = [prompt_ids(example.prompt, tokenizer, template) + opening for example in prompts]
    answers = []
    for start in range(0, len(contexts), batch_size):
        rows = contexts[start : start + batch_size]
        width = max(map(len, rows))
        # Left-padded, so that every answer starts at the same position.
        tokens = torch.tensor([[tokenizer.pad_token_id or 0] * (width - len(row)) + row for row in rows])
        attended = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        with torch.no_grad():
            full = bridge.original_model.generate(
                input_ids=tokens.to(bridge.cfg.device),
                attention_mask=attended.to(bridge.cfg.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id or 0,
            )
        answers += tokenizer.batch_decode(full[:, width:], skip_special_tokens=True)
    return [f"{prefill} {answer.strip()}".strip() for answer in answers]
