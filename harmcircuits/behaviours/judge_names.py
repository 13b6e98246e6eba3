"""The judge that a command line names."""

from pathlib import Path

from harmcircuits.behaviours.chat_judges import ChatJudge, LocalChatJudge
from harmcircuits.behaviours.judges import JudgeError, RuleJudge, StrongRejectJudge


def open_judge(
    name: str,
    *,
    prefill: str = "",
    replies: Path = Path("judge.jsonl"),
    question: str = "",
    device: str = "cpu",
) -> RuleJudge | StrongRejectJudge | LocalChatJudge | ChatJudge:
    """The judge of a command line.

    Args:
        name: `local`, `strongreject:FOLDER_OR_ID`, `chat:FOLDER_OR_ID`, or
            `http(s)://ADDRESS/v1#MODEL`.
        prefill: the beginning of an answer that does not count.
        replies: file for the log of a chat model's replies.
        question: text file with StrongREJECT's wording.
        device: the torch device of a judge that runs here.

    Raises:
        JudgeError: another name, an address without a model, and as `StrongRejectJudge.load` and
            `LocalChatJudge.load`.
    """
    if name == "local":
        return RuleJudge(prefill)

    kind, _, rest = name.partition(":")
    if kind == "strongreject":
        return StrongRejectJudge.load(
            rest,
            question=question,
            prefill=prefill,
            device=device,
        )
    if kind == "chat":
        return LocalChatJudge.load(
            rest,
            replies=replies,
            prefill=prefill,
            device=device,
        )
    if kind in ("http", "https"):
        url, _, model = name.partition("#")
        if not model:
            raise JudgeError(f"judge={name!r} names no model; write {name}#MODEL")
        return ChatJudge(url, model, replies)
    raise JudgeError(
        f"judge={name!r}; expected local, probe, strongreject:FOLDER_OR_ID, chat:FOLDER_OR_ID or "
        "http://ADDRESS/v1#MODEL"
    )
