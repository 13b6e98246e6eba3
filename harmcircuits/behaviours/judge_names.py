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
    """The judge of a command line."""
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
