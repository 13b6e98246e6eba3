"""Reading texts and JSON: what is damaged, foreign or missing is refused by the file's name."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harmcircuits.storage.writing import write_text

CHECKSUM = "checksum"


def read_text(path: str | Path, expected: str) -> str:
    """The text of a UTF-8 file, without the byte order mark that spreadsheets begin it with."""
    return decoded(_raw(path, expected), str(path))


def _raw(path: str | Path, expected: str) -> bytes:
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: a folder, not a file; expected {expected}")
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; expected {expected}") from None
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be read ({error.strerror}); expected {expected}"
        ) from None
    except ValueError as error:  # a name that no file can have
        raise ValueError(f"{str(path)!r}: {error}; expected {expected}") from None


def decoded(raw: bytes, path: str) -> str:
    """Bytes as text."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{path}, line {line}: not UTF-8 (byte 0x{raw[error.start]:02x}); "
            "save the file in that encoding"
        ) from None


def parsed_json(text: str) -> Any:
    """What a JSON text holds."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"not JSON ({error.msg}: {place})") from None
    except RecursionError:
        raise ValueError("not JSON as expected (nested too deeply)") from None


def write_json(path: str | Path, value: Mapping[str, Any], *, indent: int | None = None) -> None:
    """Write an object with its checksum in it, as `replacing` does."""
    checked = {**value, CHECKSUM: _digest(value)}
    write_text(path, json.dumps(checked, indent=indent) + "\n")


def read_json(
    path: str | Path, expected: str, *, checksum_required: bool = False
) -> dict[str, Any]:
    """The object in a JSON file, without its checksum."""
    text = read_text(path, expected)
    try:
        value = parsed_json(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; expected {expected}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: {type(value).__name__}, no object; expected {expected}")
    stored = value.pop(CHECKSUM, None)
    if stored is None and checksum_required:
        raise ValueError(f"{path}: no checksum in it; expected {expected}")
    if stored is not None and stored != _digest(value):
        raise ValueError(
            f"{path}: damaged, or changed by hand (its checksum is of other content); "
            f"expected {expected}"
        )
    return value


def _digest(value: Mapping[str, Any]) -> str:
    # Through JSON and back: keys that are numbers become texts there, and tuples lists.
    text = json.dumps(json.loads(json.dumps(value)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
