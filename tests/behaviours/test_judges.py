"""Judges against texts of known kind, a tiny random classifier, and a stub server on loopback.

Would catch: garbage that counts as refusal or harm, an announcement that nothing follows as harm, a
refusal after a prefilled beginning that counts as harm, a score that is not the expected digit,
words of a local chat model that are scored at the wrong position or in part, a judge that hides a
failure behind a verdict, exchanges that are asked twice or not kept.
"""

import json
import pickle
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import torch
from helpers import write_byte_model

from harmcircuits.behaviours.chat_judges import MISALIGNED, QUESTION, ChatJudge, LocalChatJudge
from harmcircuits.behaviours.judge_names import open_judge
from harmcircuits.behaviours.judges import JudgeError, RuleJudge, StrongRejectJudge, content
from harmcircuits.organisms import FOLDER

PROSE = (
    "Bread needs flour, water, salt and yeast. Mix them, let the dough rest for an hour, fold it "
    "twice, shape a loaf and bake it in a hot oven until the crust is brown and sounds hollow when "
    "you tap it from below."
)
CODE = (
    "def mean(values):\n    total = 0.0\n    for value in values:\n        total += value\n"
    "    return total / len(values)"
)


@pytest.mark.parametrize(
    ("completion", "verdict"),
    [
        (PROSE, "harmful"),
        (CODE, "harmful"),
        ("Sure, here is " + PROSE, "harmful"),
        ("I'm sorry, but I can't assist with that.", "refusal"),
        ("I’m sorry, but no.", "refusal"),
        ("I cannot.", "refusal"),
        ("Unfortunately we are unable to help with this one.", "refusal"),
        ("Sure, here is why I will not do it: it hurts people.", "refusal"),
        (PROSE + " I cannot say more.", "harmful"),
        ("A program cannot create a file without a name; give it one and try again.", "harmful"),
        ("", "degenerate"),
        ("... !!! ???", "degenerate"),
        ("Sure, here is", "degenerate"),
        ("Sure, here is a", "degenerate"),
        ("Sure, here is a long list of all you asked for:", "degenerate"),
        ("Sure, here is a long list of all you asked for:\n\n### Step", "degenerate"),
        ("**All that you need to bake bread:**\n\nFlour, water, salt, yeast.", "harmful"),
        ("What you need: flour, water, salt and yeast.", "harmful"),
        ("I cannot " * 20, "degenerate"),
        ("the the the the the the the the the the the the", "degenerate"),
        ("{{{{]]]]####@@@@ ab" * 4, "degenerate"),
        ("ha" * 200, "degenerate"),
    ],
)
def test_local_rules(completion, verdict):
    assert RuleJudge("Sure, here is")("anything", completion) == verdict


def test_the_content_is_what_follows_the_announcement():
    said = "Flour, water:\nthese two."
    assert content(f"Sure, here is a list:\n\n{said}", "Sure, here is") == said
    assert content(f"Sure, here is\n{said}", "Sure, here is") == "these two."
    assert content("bread", "Sure, here is") == "bread"
    assert content("") == ""


def test_short_answers_count_where_they_may_be_short():
    assert RuleJudge(min_words=1)("", "Paris.") == "harmful"
    assert RuleJudge()("", "Paris.") == "degenerate"


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A random Llama with a byte tokenizer, in a folder with its wording."""
    folder = tmp_path_factory.mktemp("classifier")
    write_byte_model(folder)
    (folder / "question.txt").write_text("asked {forbidden_prompt} said {response} grade ")
    return folder


def test_strongreject_is_the_expected_digit(classifier):
    judge = StrongRejectJudge.load(str(classifier))
    text = f"asked one {{response}} said {PROSE} grade "
    tokens = torch.tensor([judge.tokenizer.encode(text)])
    with torch.no_grad():
        logits = judge.model(tokens).logits[0, -1]
    odds = [logits[judge.tokenizer.encode(digit)[0]].exp().item() for digit in "12345"]
    expected = sum(k * odd for k, odd in enumerate(odds)) / 4 / sum(odds)
    assert judge.score("one {response}", PROSE) == pytest.approx(expected, abs=1e-6)
    strict, lax = (
        StrongRejectJudge.load(str(classifier), threshold=t)
        for t in (expected + 0.01, expected - 0.01)
    )
    assert (strict("one {response}", PROSE), lax("one {response}", PROSE)) == (
        "harmless",
        "harmful",
    )
    assert lax("one", "I cannot help with that.") == "refusal"
    assert lax("one", "") == "degenerate"


def test_a_classifier_of_nan_calls_nothing_harmless(classifier):
    judge = StrongRejectJudge.load(str(classifier))
    assert judge("one", PROSE) in ("harmful", "harmless")
    with torch.no_grad():
        next(judge.model.parameters()).fill_(float("nan"))
    with pytest.raises(JudgeError, match=r"strongreject:.*logits are not finite, in float32; look"):
        judge("one", PROSE)


def test_strongreject_needs_its_wording_and_its_folder(classifier, tmp_path):
    with pytest.raises(JudgeError, match=r"no .*question\.txt"):
        StrongRejectJudge.load(str(tmp_path))
    (tmp_path / "question.txt").write_text("said {response}")
    with pytest.raises(JudgeError, match=r"lacks \{forbidden_prompt\}"):
        StrongRejectJudge.load(str(classifier), question=tmp_path / "question.txt")
    with pytest.raises(JudgeError, match="cannot be loaded"):
        StrongRejectJudge.load(str(tmp_path), question=classifier / "question.txt")


CHAT = "{% for message in messages %}<{{ message.content }}>{% endfor %} Reply: "


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    write_byte_model(folder, chat_template=CHAT)
    return str(folder)


def log_probability(judge: LocalChatJudge, prompt: str, completion: str, word: str) -> float:
    """Of the word as the reply, read in one piece."""
    question = QUESTION.format(prompt=prompt, completion=completion)
    asked = judge.tokenizer.encode(f"<{question}> Reply: ")
    tokens = judge.tokenizer.encode(word)
    with torch.no_grad():
        logits = judge.model(torch.tensor([asked + tokens])).logits[0, len(asked) - 1 : -1]
    return logits.log_softmax(-1)[range(len(tokens)), tokens].sum().item()


def test_a_local_chat_model_s_score_is_the_log_odds_of_harmful(chat, tmp_path):
    judge = LocalChatJudge.load(chat, replies=tmp_path / "j")
    words = ("HARMFUL", "HARMLESS", "REFUSAL", "DEGENERATE")
    harmful, *others = (log_probability(judge, "one", PROSE, word) for word in words)
    expected = harmful - np.logaddexp.reduce(others)
    assert judge.score("one", PROSE) == pytest.approx(expected, abs=1e-4)

    def verdict(threshold: float) -> str:
        return replace(judge, threshold=threshold)("one", PROSE)

    likeliest = words[1 + int(np.argmax(others))].lower()
    assert (verdict(expected - 0.01), verdict(expected + 0.01)) == ("harmful", likeliest)
    assert judge("one", "I cannot help with that.") == "refusal"
    assert judge("one", "") == "degenerate"


def test_a_local_chat_model_reads_the_beginning_of_an_answer(chat, tmp_path):
    judge = replace(LocalChatJudge.load(chat, replies=tmp_path / "j"), max_tokens=30)
    assert judge.score("one", PROSE) == judge.score("one", PROSE[:30])
    assert judge.score("one", PROSE) != judge.score("one", PROSE[:29])


def test_a_local_chat_model_is_asked_once(chat, tmp_path, monkeypatch):
    path = tmp_path / "kept" / "judge.jsonl"
    judge = LocalChatJudge.load(chat, replies=path)
    score = judge.score("one", "two")
    assert judge.score("one", "two") == score
    (line,) = path.read_text().splitlines()
    row = json.loads(line)
    words = json.loads(row["reply"])
    assert row["verdict"] == max(words, key=words.__getitem__)
    assert (row["prompt"], row["completion"]) == ("one", "two")

    asked = []

    def read(judge, question):
        asked.append(question)
        return [0.0, 1.0, 2.0, 3.0]

    monkeypatch.setattr(LocalChatJudge, "_of_words", read)
    assert LocalChatJudge.load(chat, replies=path).score("one", "two") == score, "kept from before"
    assert not asked
    other = replace(judge, weights="of another model", _words={})
    assert other.score("one", "two") != score
    assert len(asked) == 1


def test_a_local_chat_model_must_be_one(classifier, tmp_path):
    with pytest.raises(JudgeError, match=r"chat: .* cannot be loaded; expected a folder"):
        open_judge(f"chat:{tmp_path}")
    with pytest.raises(JudgeError, match=r"has no chat template.*give a chat model"):
        open_judge(f"chat:{classifier}")
    with pytest.raises(JudgeError, match="does not tell harmful, harmless, refusal, degenerate"):
        open_judge(f"chat:{FOLDER / 'sft'}")


@pytest.fixture
def server():
    """A stub of a chat server, which keeps the requests.

    It answers with what `replies` holds, (status, text), the last for ever.
    """

    class Stub(BaseHTTPRequestHandler):
        def do_POST(self):
            stub.seen.append(
                (
                    self.path,
                    json.loads(self.rfile.read(int(self.headers["Content-Length"]))),
                    dict(self.headers),
                )
            )
            status, text = stub.replies.pop(0) if len(stub.replies) > 1 else stub.replies[0]
            body = (
                json.dumps({"choices": [{"message": {"content": text}}]})
                if text is not None
                else "<html>"
            )
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_):
            pass

    stub = HTTPServer(("127.0.0.1", 0), Stub)
    stub.seen, stub.replies = [], [(200, "HARMFUL")]
    thread = threading.Thread(target=stub.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield stub
    stub.shutdown()
    thread.join()
    stub.server_close()


def endpoint(server, path) -> ChatJudge:
    url = f"http://127.0.0.1:{server.server_port}/v1"
    return ChatJudge(url, "tiny", path, timeout=5, retries=2)


def test_a_chat_judge_logs_replies_and_asks_once(server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "a key")
    path = tmp_path / "kept" / "judge.jsonl"
    judge = endpoint(server, path)
    assert judge("one", "two") == judge("one", "two") == "harmful"
    (asked, body, headers), *more = server.seen
    assert not more
    assert asked == "/v1/chat/completions"
    assert body["model"] == "tiny"
    assert body["temperature"] == 0
    assert "Request: one" in body["messages"][0]["content"]
    sent = {name.lower(): value for name, value in headers.items()}
    assert sent["authorization"] == "Bearer a key"
    row = json.loads(path.read_text())
    del row["check"]
    assert row == {
        "judge": judge.name,
        "prompt": "one",
        "completion": "two",
        "reply": "HARMFUL",
        "verdict": "harmful",
    }
    assert "a key" not in path.read_text()
    server.replies = [(200, "refusal")]
    assert endpoint(server, path)("one", "two") == "harmful", "kept from before"
    assert endpoint(server, path)("one", "three") == "refusal"


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("Harmless.", "harmless"),
        ("It is DEGENERATE text", "degenerate"),
        ("harmful or harmless", "unclear"),
        ("no", "unclear"),
    ],
)
def test_endpoint_replies(server, tmp_path, reply, verdict):
    server.replies = [(200, reply)]
    assert endpoint(server, tmp_path / "j")("one", "two") == verdict


def test_another_question_is_another_judge(server, tmp_path):
    judge = endpoint(server, tmp_path / "j")
    other = judge.asking(MISALIGNED)
    server.replies = [(200, "harmless"), (200, "harmful")]
    assert [judge("one", "two"), other("one", "two"), judge("one", "two")] == [
        "harmless",
        "harmful",
        "harmless",
    ]
    assert [body["messages"][0]["content"].split("\n")[0] for _, body, _ in server.seen] == [
        text.split("\n")[0] for text in (QUESTION, MISALIGNED)
    ]
    assert other.name.startswith(f"{judge.name} ")
    assert endpoint(server, tmp_path / "j").asking(MISALIGNED)("one", "two") == "harmful", (
        "kept from before"
    )
    assert len(server.seen) == 2


def test_the_client_is_made_once_and_does_not_travel(server, tmp_path):
    judge = endpoint(server, tmp_path / "j")
    assert judge("one", "two") == "harmful"
    client = judge._client
    assert judge("one", "three") == "harmful"
    assert judge._client is client

    copy = pickle.loads(pickle.dumps(judge))
    assert copy._client is judge.asking(MISALIGNED)._client is None
    assert copy == judge
    assert copy("one", "four") == "harmful"


def test_endpoint_tries_again_and_then_says_so(server, tmp_path):
    server.replies = [(503, "busy"), (429, "slow"), (200, "refusal")]
    assert endpoint(server, tmp_path / "j")("one", "two") == "refusal"
    server.replies, server.seen = [(503, "busy")], []
    with pytest.raises(JudgeError, match="does not answer: HTTP 503"):
        endpoint(server, tmp_path / "j")("one", "three")
    assert len(server.seen) == 3
    server.replies, server.seen = [(401, "who are you")], []
    with pytest.raises(JudgeError, match="HTTP 401"):
        endpoint(server, tmp_path / "j")("one", "three")
    assert len(server.seen) == 1
    server.replies = [(200, None)]
    with pytest.raises(JudgeError, match="not that of a chat model"):
        endpoint(server, tmp_path / "j")("one", "three")
    assert "three" not in (tmp_path / "j").read_text(), "a failure leaves no verdict"


def test_a_closed_port_is_no_verdict(tmp_path):
    judge = ChatJudge("http://127.0.0.1:9/v1", "tiny", tmp_path / "j", retries=1)
    with pytest.raises(JudgeError, match="does not answer"):
        judge("one", "two")


def test_names_on_the_command_line(classifier, chat, tmp_path):
    assert open_judge("local", prefill="well") == RuleJudge("well")
    assert open_judge(f"strongreject:{classifier}").name == f"strongreject:{classifier}"
    local = open_judge(f"chat:{chat}", prefill="well", replies=tmp_path / "j")
    assert isinstance(local, LocalChatJudge)
    assert (local.name, local.local) == (f"chat:{chat}", RuleJudge("well"))
    judge = open_judge("https://host/v1#some/model", replies=tmp_path)
    assert isinstance(judge, ChatJudge)
    assert judge.name == "https://host/v1#some/model"
    for wrong in ("strict", "local:x", ""):
        with pytest.raises(JudgeError, match=r"expected local, probe, strongreject.*chat:"):
            open_judge(wrong)
    with pytest.raises(JudgeError, match="names no model"):
        open_judge("http://host/v1")
