"""Files: written whole or not at all, read whole or refused by their name."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import gettempdir, mkstemp
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT, DIGEST = "format", "digest"  # entries of a header

# Whole files


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A new file that takes the place of `path` on a clean exit and is gone on any other."""
    path = Path(path)
    # In the same folder, since a rename is atomic only within a file system.
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
    """Errors of the disk, such as a full one, name this place; safetensors has its own for them."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(f"{place}: cannot be written ({error})") from error


def write_text(path: str | Path, text: str) -> None:
    """Write a text as UTF-8."""
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def read_text(path: str | Path, expected: str) -> str:
    """The text of a UTF-8 file, without the byte order mark that spreadsheets begin it with."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); expected {expected}, UTF-8") from None


def write_json(path: str | Path, value: Mapping[str, Any], *, indent: int | None = None) -> None:
    """Write an object."""
    write_text(path, json.dumps(value, indent=indent) + "\n")


def read_json(path: str | Path, expected: str) -> dict[str, Any]:
    """The object in a JSON file."""
    text = read_text(path, expected)
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: no object in JSON ({error}); expected {expected}") from None


def empty_folder(folder: str | Path) -> Path:
    """A folder with nothing in it, made if it is not there."""
    folder = Path(folder)
    refuse_filled(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def refuse_filled(folder: Path) -> None:
    """Raises ValueError for a file, and for a folder that holds something."""
    is_filled = folder.is_dir() and any(folder.iterdir())
    if folder.is_file() or is_filled:
        raise ValueError(f"{folder} exists and is not empty; give a new folder")


# JSON Lines


def append_lines(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add rows to a file, all or none, and see them onto the disk."""
    path = Path(path)
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+", buffering=0) as file:
            file.seek(0)
            last = file.read().rpartition(b"\n")[2]
            text = _lines(rows).encode()
            if last and _row(last) is None:  # half a line that a killed run left
                file.truncate(file.tell() - len(last))
            elif last:
                text = b"\n" + text
            end = file.seek(0, os.SEEK_END)
            try:
                # Where a disk fills up, a write takes a part, and only the next one fails.
                while text:
                    text = text[file.write(text) :]
                os.fsync(file.fileno())
            except OSError:
                file.truncate(end)
                raise


def _lines(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_lines(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a file that holds these rows and no others."""
    write_text(path, _lines(rows))


def read_lines(path: str | Path, expected: str) -> list[dict[str, Any]]:
    """The rows of a file; half a line at its end, which a killed run left, is none."""
    # Not by `splitlines`, which also splits at characters that a text may hold.
    *lines, last = read_text(path, expected).split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        row = _row(line)
        if row is not None:
            rows.append(row)
        elif line.strip():
            raise ValueError(f"{path}, line {number}: no object in JSON; expected {expected}")
    last_row = _row(last)
    return rows if last_row is None else [*rows, last_row]


def _row(line: str | bytes) -> dict[str, Any] | None:
    """The object in a line; None where there is none."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


# Tensors


def write_tensors(
    path: str | Path, format: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file with a digest of all that it holds."""
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
            f"{path}: not a safetensors file, or a damaged one ({error}); expected a saved {noun}"
        ) from None
    if header.get(FORMAT) != format:
        raise ValueError(
            f"{path}: no {noun} of harmcircuits (format {header.get(FORMAT)!r}, not {format!r})"
        )
    digest = header.pop(DIGEST, "none")
    if digest != _digest(header, tensors):
        raise ValueError(f"{path}: damaged, its digest ({digest}) does not fit; make it again")
    return tensors, header


def _digest(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """Thirty-two hex digits of all entries, names, number formats, shapes and bytes: SHA-256."""
    digest = hashlib.sha256(json.dumps(sorted(header.items())).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()[:32]


def tensor_bytes(tensor: Tensor) -> Any:
    """The bytes of a tensor as they are stored, without a copy where it lies in order on a CPU."""
    flat = tensor.detach().to("cpu").contiguous().flatten()
    # numpy has no bfloat16, so the values are handed over as bytes.
    return flat.view(torch.uint8).numpy().data


def mapped_copy(tensor: Tensor) -> Tensor:
    """The same numbers on the CPU, in a temporary file: read like memory, and no memory kept."""
    folder = gettempdir()
    descriptor, name = mkstemp(prefix="harmcircuits-", dir=folder)
    os.close(descriptor)
    path = Path(name)
    try:
        # Written, not only made as long: a full disk is an error here, and where a mapping is first
        # used it would be the end of the process.
        with naming(f"{folder} (TMPDIR sets where temporary files lie)"):
            path.write_bytes(tensor_bytes(tensor))
        mapped = torch.from_file(name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
    finally:
        # The mapping lives on without a name; Windows takes none from a file that is in use.
        with suppress(PermissionError):
            path.unlink()
    return mapped.view(tensor.shape)


MASK_FILE = "mask.safetensors"


REMEDY = "check the name and the network, and log in with `hf auth login` or set HF_TOKEN"


def mask_file(source: str | Path, filename: str = MASK_FILE, revision: str | None = None) -> Path:
    """Where a mask's file is on this machine; one of the hub is downloaded or from its cache."""
    path = Path(source)
    if path.is_file():
        return path
    if path.is_dir():
        return path / filename
    # Imported here: a mask of this machine needs no hub.
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(str(source), filename, revision=revision))
    except (OSError, ValueError) as error:  # each error of the hub is one of these
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"{source}: no such file, and no {filename} on the hub ({reason}); {REMEDY}"
        ) from None
