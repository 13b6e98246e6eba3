"""Files of JSON Lines that grow: an addition counts as a whole, and every line is checked."""

import json
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from harmcircuits.storage.text import parsed_json, read_text
from harmcircuits.storage.writing import replacing

CHECK = re.compile(r', "check": "(\d+):([0-9a-f]{8})"\}$')


class Line(NamedTuple):
    """A line of a file."""

    number: int
    row: dict[str, Any]
    is_checked: bool
    block: int


class _Check(NamedTuple):
    """The end of a line: how many lines follow in its block, and the CRC of the block so far."""

    n_left: int
    crc: int


def append_lines(
    path: str | Path, rows: Sequence[Mapping[str, Any]], *, together: bool = True
) -> None:
    """Add rows to a file in one write, and see them onto the disk."""
    path = Path(path)
    blocks = [rows] if together else [[row] for row in rows]
    text = "".join(map(_block, blocks)).encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+", buffering=0) as file:
            # Half a line that an interrupted run left stays by itself.
            is_torn = file.tell() and not _ends_in_line_break(file)
            _write_all(file, (b"\n" if is_torn else b"") + text)
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_lines(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a file that holds these rows and no others, as one block."""
    with replacing(path) as unfinished:
        unfinished.write_text(_block(rows), encoding="utf-8")


def read_lines(
    path: str | Path, noun: str, expected: str, *, is_resumed: bool = False
) -> list[Line]:
    """The lines of a file, each checked; of blank ones none."""
    text = read_text(path, expected)
    try:
        return _checked(text, is_resumed)
    except ValueError as error:
        raise ValueError(f"{path}: not a file of {noun} ({error})") from None


def cut_unfinished(path: str | Path, lines: Sequence[Line]) -> None:
    """Leave only these lines in a file, which `read_lines` gave of it, if it holds others."""
    path = Path(path)
    stored = path.read_bytes().split(b"\n")
    left = [stored[line.number - 1] for line in lines]
    if [line for line in stored if line.strip()] == left:
        return
    with replacing(path) as unfinished:
        unfinished.write_bytes(b"".join(line + b"\n" for line in left))


def _block(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    crc = 0
    for n_left, row in zip(range(len(rows) - 1, -1, -1), rows, strict=True):
        body = json.dumps(row)
        crc = _crc(body, n_left, crc)
        lines.append(f'{body[:-1]}, "check": "{n_left}:{crc:08x}"}}\n')
    return "".join(lines)


def _crc(body: str, n_left: int, before: int) -> int:
    return zlib.crc32(f"{n_left}:{body}".encode(), before)


def _write_all(file: Any, raw: bytes) -> None:
    """Write every byte; where a disk fills up, a write takes a part, and only the next fails."""
    while raw:
        raw = raw[file.write(raw) :]


def _ends_in_line_break(file: Any) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def _checked(text: str, is_resumed: bool) -> list[Line]:
    """The lines of finished blocks; raises ValueError for damage."""
    blocks = _Blocks(is_resumed)
    # Not by `splitlines`, which also splits at characters that a text may hold.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            blocks.take(number, line)
    blocks.refuse_unfinished(text.count("\n") + 1)
    return blocks.lines


class _Blocks:
    """What has been read of a file."""

    def __init__(self, is_resumed: bool) -> None:
        self.is_resumed = is_resumed
        self.lines: list[Line] = []
        self.block: list[Line] = []
        self.before: _Check | None = None

    def take(self, number: int, text: str) -> None:
        """Read one line more; raises ValueError where it is damaged."""
        body, check = _body_and_check(text)
        line = _line(number, body, check, self.is_resumed)
        if line is not None and _continues(body, check, self.before):
            self.block.append(line._replace(block=self.block[0].block))
        else:
            self._begin(number, line, body, check)

        is_open = line is not None and check is not None and check.n_left > 0
        self.before = check if is_open else None
        if not is_open:
            _refuse_unchecked(self.lines, self.block)
            self.lines += self.block
            self.block = []

    def _begin(self, number: int, line: Line | None, body: str, check: _Check | None) -> None:
        if line is not None and not _starts(body, check):
            raise ValueError(f"line {number}: damaged, moved or changed by hand, as its check says")
        self.refuse_unfinished(number)
        self.block = [] if line is None else [line]

    def refuse_unfinished(self, number: int) -> None:
        """Raises ValueError where a block should go on at this line, and does not."""
        if self.before is not None and not self.is_resumed:
            raise ValueError(_unfinished(number, self.before))


def _body_and_check(line: str) -> tuple[str, _Check | None]:
    match = CHECK.search(line)
    if match is None:
        return line, None
    return line[: match.start()] + "}", _Check(int(match[1]), int(match[2], base=16))


def _continues(body: str, check: _Check | None, before: _Check | None) -> bool:
    """Whether a line is the next one of a block."""
    if check is None or before is None:
        return False
    n_left = before.n_left - 1
    return check == _Check(n_left, _crc(body, n_left, before.crc))


def _starts(body: str, check: _Check | None) -> bool:
    """Whether a line is the first one of a block; one without a check is a block by itself."""
    return check is None or check.crc == _crc(body, check.n_left, 0)


def _line(number: int, body: str, check: _Check | None, is_resumed: bool) -> Line | None:
    """A line's object; None for half a line that an interrupted run left, where that is allowed."""
    try:
        row = parsed_json(body)
    except ValueError as error:
        if is_resumed:
            return None
        raise ValueError(f"line {number}: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"line {number}: {type(row).__name__}; expected an object")
    return Line(number, row, check is not None, block=number)


def _refuse_unchecked(lines: Sequence[Line], block: Sequence[Line]) -> None:
    """Raises ValueError for a line without a check after lines that have one."""
    for line in block:
        if lines and lines[-1].is_checked and not line.is_checked:
            raise ValueError(
                f"line {line.number}: without a check, after lines that have one; to keep what was "
                'added by hand, take ", "check": ..." out of every line'
            )


def _unfinished(number: int, before: _Check) -> str:
    return (
        f"before line {number}: {before.n_left} lines are missing of those written together; "
        "resume the interrupted run, or take a whole copy of the file"
    )
