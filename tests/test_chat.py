"""A chat template with a system prompt, options, and thinking that is kept out.

Would catch: a system prompt that is dropped, an option that does not reach the template, thinking
that the template or the model begins and that would then be scored as the answer.
"""

import pytest
from support.organisms.train import new_tokenizer

from harmcircuits.prompts import Chat, prompt_ids
from harmcircuits.studies.models import ModelSpec

PLAIN = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    "<assistant>{% if date %}{{ date }}{% endif %}"
)
SWITCHED = PLAIN + "{% if enable_thinking is false %}<think></think>{% endif %}"
ALWAYS = PLAIN + "<think>\n"
WITHOUT_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    + PLAIN
)


def written(template, chat) -> str:
    """The text that the tokenizer is given."""
    tokenizer = new_tokenizer()
    tokenizer.chat_template = template
    texts = []

    def encode(text, **_):
        texts.append(text)
        return []

    tokenizer.encode = encode
    prompt_ids("say it", tokenizer, chat)
    return texts[0]


def test_a_system_prompt_comes_first():
    assert written(PLAIN, "chat") == "<user>say it<assistant>"
    assert written(PLAIN, Chat()) == written(PLAIN, "chat")
    assert written(PLAIN, Chat(system="be short")) == "<system>be short<user>say it<assistant>"


def test_options_reach_the_template():
    chat = Chat(options={"date": "1 May 2026"})
    assert written(PLAIN, chat) == "<user>say it<assistant>1 May 2026"


def test_thinking_is_switched_off_or_ended():
    assert written(SWITCHED, "chat").endswith("<think></think>")
    assert written(SWITCHED, Chat(options={"enable_thinking": True})).endswith("<assistant>")
    assert written(ALWAYS, "chat") == "<user>say it<assistant><think>\n\n</think>\n\n"


def test_a_template_that_refuses_says_so():
    assert written(WITHOUT_SYSTEM, "chat") == "<user>say it<assistant>"
    with pytest.raises(ValueError, match=r"no system role.*leave out the system prompt"):
        written(WITHOUT_SYSTEM, Chat(system="be short"))


def test_a_spec_writes_requests_so():
    assert ModelSpec("m").chat == "chat"
    assert ModelSpec("m", template="raw").chat == "raw"
    spec = ModelSpec("m", system="be short", template_options=("enable_thinking=true", "date=May"))
    assert spec.chat == Chat("be short", {"enable_thinking": True, "date": "May"})
    with pytest.raises(ValueError, match=r"'raw'|\"raw\""):
        _ = ModelSpec("m", template="raw", system="be short").chat
    with pytest.raises(ValueError, match="'enable_thinking'; expected NAME=VALUE"):
        _ = ModelSpec("m", template_options=("enable_thinking",)).chat
