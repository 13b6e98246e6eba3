"""Files are written completely or not at all; a reader refuses a damaged file by its name."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT, DIGEST = "format", "digest"  # keys in the metadata of a safetensors file
MASK_FILE = "mask.safetensors"

# Whole files


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary file that replaces `path` on a clean exit and is deleted on an error."""
    path = Path(path)
    # In the same folder, because a rename is atomic only within one file system.
    unfinished = path.with_name(f".{path.name}.{uuid4().hex[:8]}")
    try:
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield unfinished
            with unfinished.open("rb+") as file:
                os.fsync(file.fileno())
            unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def naming(place: str | Path) -> Iterator[None]:
    """Errors of the disk, such as a full disk, name this file or folder."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk
        raise OSError(f"{place}: cannot be written ({error})") from error


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in UTF-8."""
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def read_text(path: str | Path, expected: str) -> str:
    """The text of a UTF-8 file, without the byte order mark that spreadsheets write."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); expected {expected}, UTF-8") from None


def write_json(path: str | Path, value: Mapping[str, Any], *, indent: int | None = None) -> None:
    """Write an object as a JSON file."""
    write_text(path, json.dumps(value, indent=indent) + "\n")


def read_json(path: str | Path, expected: str) -> dict[str, Any]:
    """The object in a JSON file."""
    text = read_text(path, expected)
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: holds no JSON object ({error}); expected {expected}") from None


def empty_folder(folder: str | Path) -> Path:
    """An empty folder, which is created if it does not exist."""
    folder = Path(folder)
    refuse_filled(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def refuse_filled(folder: Path) -> None:
    """Refuse a file, and a folder that is not empty."""
    is_filled = folder.is_dir() and any(folder.iterdir())
    if folder.is_file() or is_filled:
        raise ValueError(f"{folder} exists and is not empty; give a new folder")


# JSON Lines


def append_lines(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append rows to a file, all of them or none, and flush them to the disk."""
    path = Path(path)
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+", buffering=0) as file:
            file.seek(0)
            last = file.read().rpartition(b"\n")[2]
            text = _lines(rows).encode()
            if last and _row(last) is None:  # a killed run left half a line
                file.truncate(file.tell() - len(last))
            elif last:
                text = b"\n" + text
            end = file.seek(0, os.SEEK_END)
            try:
                # On a full disk, the first write stores a part and only the next one fails.
                while text:
                    text = text[file.write(text) :]
                os.fsync(file.fileno())
            except OSError:
                file.truncate(end)
                raise


def _lines(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_lines(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a file that holds exactly these rows."""
    write_text(path, _lines(rows))


def read_lines(path: str | Path, expected: str) -> list[dict[str, Any]]:
    """The rows of a file; a last line that a killed run left unfinished is ignored."""
    # `splitlines` also splits at characters that a text may contain.
    lines = read_text(path, expected).split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        row = _row(line)
        if row is not None:
            rows.append(row)
        elif line.strip() and number < len(lines):
            raise ValueError(f"{path}, line {number}: holds no JSON object; expected {expected}")
    return rows


def _row(line: str | bytes) -> dict[str, Any] | None:
    """The JSON object in a line; None if the line holds no object."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


# Tensors


def write_tensors(
    path: str | Path, format: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file with a digest of its metadata and tensors."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    header = {FORMAT: format, **metadata}
    header[DIGEST] = _digest(header, tensors)
    with replacing(path) as unfinished:
        save_file(tensors, unfinished, metadata=header)


def read_tensors(
    path: str | Path, format: str, noun: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file of this format, mapped into memory, and its metadata.

    Raises ValueError for any other file, and for values that are not those that were written.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path}: not a safetensors file, or damaged ({error}); expected a saved {noun}"
        ) from None
    if header.get(FORMAT) != format:
        raise ValueError(
            f"{path}: no {noun} of harmcircuits (format {header.get(FORMAT)!r}, not {format!r})"
        )
    digest = header.pop(DIGEST, "none")
    if digest != _digest(header, tensors):
        raise ValueError(f"{path}: damaged, its digest ({digest}) does not match; create it again")
    return tensors, header


def _digest(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the metadata and of all names, dtypes, shapes and bytes: 32 hex digits."""
    digest = hashlib.sha256(json.dumps(sorted(header.items())).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()[:32]


def tensor_bytes(tensor: Tensor) -> Any:
    """The bytes of a tensor; no copy is made of a contiguous tensor on the CPU."""
    flat = tensor.detach().to("cpu").contiguous().flatten()
    # numpy has no bfloat16, so it gets the values as bytes.
    return flat.view(torch.uint8).numpy().data


def mapped_copy(tensor: Tensor) -> Tensor:
    """A copy in a temporary file that is mapped into memory, so that it occupies no memory."""
    with (
        naming(f"{gettempdir()} (TMPDIR sets the folder of temporary files)"),
        # The mapping needs no name, so its file can go; Windows keeps a file that is in use.
        TemporaryDirectory(prefix="harmcircuits-", ignore_cleanup_errors=True) as folder,
    ):
        path = Path(folder) / "tensor"
        # All bytes are written now: on a full disk that is an error, while the first use of a
        # sparse mapping would kill the process.
        path.write_bytes(tensor_bytes(tensor))
        mapping = torch.from_file(
            str(path),
            shared=True,
            size=tensor.numel(),
            dtype=tensor.dtype,
        )
    return mapping.view(tensor.shape)


# The hub


def mask_file(source: str | Path, filename: str = MASK_FILE, revision: str | None = None) -> Path:
    """The path of a mask's file: in a local folder, or in the cache of the Hugging Face hub."""
    path = Path(source)
    if path.is_file():
        return path
    if path.is_dir():
        return path / filename
    # Imported here, because a local mask needs no hub.
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(str(source), filename, revision=revision))
    except (OSError, ValueError) as error:  # every error of the hub is one of these
        first_line, *_ = str(error).splitlines() or [type(error).__name__]
        raise ValueError(
            f"{source}: no such file, and no {filename} on the hub ({first_line}); check the name "
            "and the network, and log in with `hf auth login` or set HF_TOKEN"
        ) from None
