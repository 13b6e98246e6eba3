"""Safetensors files with a checksum of every tensor and of all that is said about them."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from harmcircuits.storage.text import parsed_json
from harmcircuits.storage.writing import replacing

FORMAT, DIGESTS, CHECKSUM = "format", "digests", "checksum"  # entries of the header


def write_tensors(
    path: str | Path, format: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write tensors with their checksums, as `replacing` does."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    digests = {name: tensor_digest(tensor) for name, tensor in tensors.items()}
    header = {FORMAT: format, **metadata, DIGESTS: json.dumps(digests)}
    header[CHECKSUM] = _header_digest(header)
    with replacing(path) as unfinished:
        try:
            save_file(tensors, unfinished, metadata=header)
        except SafetensorError as error:  # its own name for a full disk
            raise OSError(f"{path}: cannot be written ({error})") from None


def open_tensors(path: str | Path, format: str, noun: str, known: tuple[str, ...]) -> "TensorFile":
    """A file of this format; its header is checked at once, each tensor as it is read."""
    path = Path(path)
    if not path.is_file():
        kind = "a folder, not a file" if path.is_dir() else "no such file"
        raise ValueError(f"{path}: {kind}; give the path of a saved {noun}")
    try:
        with safe_open(path, framework="pt") as file:
            header = dict(file.metadata() or {})
            names = tuple(file.keys())
            layouts = {name: _layout(file, name) for name in names}
    # Whatever the library makes of bytes that are no file of its own.
    except Exception as error:
        raise ValueError(
            f"{path}: not a safetensors file, or a damaged one ({_first_line(error)}); "
            f"expected a saved {noun}"
        ) from None
    if header.get(FORMAT) != format:
        raise ValueError(
            f"{path}: a safetensors file, but no {noun} of harmcircuits "
            f"(format {header.get(FORMAT)!r}, expected {format!r})"
        )
    digests = _checked_digests(path, header, names, known)
    metadata = {name: text for name, text in header.items() if name in known}
    return TensorFile(path, metadata, layouts, digests)


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file whose header was checked."""

    path: Path
    metadata: Mapping[str, str]
    layouts: Mapping[str, tuple[str, tuple[int, ...]]]
    digests: Mapping[str, str] | None = None
    _verified: set[str] = field(default_factory=set, repr=False, compare=False)

    def read(self, name: str) -> Tensor:
        """A tensor, mapped into memory; the first time its checksum is compared."""
        try:
            with safe_open(self.path, framework="pt") as file:
                tensor = file.get_tensor(name)
        except Exception as error:
            raise self.damaged(f"{name} cannot be read, {_first_line(error)}") from None
        if self.digests is not None and name not in self._verified:
            if tensor_digest(tensor) != self.digests[name]:
                raise self.damaged(f"the values of {name} are not those that were written")
            self._verified.add(name)
        return tensor

    def read_all(self) -> dict[str, Tensor]:
        """Every tensor by name; raises ValueError as `read`."""
        return {name: self.read(name) for name in self.layouts}

    def json(self, name: str) -> Any:
        """What the JSON in an entry of the metadata holds."""
        if name not in self.metadata:
            raise self.damaged(f"no {name!r} in it")
        try:
            return parsed_json(self.metadata[name])
        except ValueError as error:
            raise self.damaged(f"{name}: {error}") from None

    def damaged(self, fault: str) -> ValueError:
        """The error for a fault of this file."""
        return ValueError(f"{self.path}: damaged ({fault}); take a whole copy, or make it again")


def tensor_digest(tensor: Tensor) -> str:
    """Thirty-two hex digits of a tensor's number format, shape and bytes: SHA-256."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor_bytes(tensor))
    return digest.hexdigest()[:32]


def tensor_bytes(tensor: Tensor) -> Any:
    """The bytes of a tensor as they are stored, without a copy where it lies in order on a CPU."""
    flat = tensor.detach().to("cpu").contiguous().flatten()
    # numpy has no bfloat16, so the values are handed over as bytes.
    return flat.view(torch.uint8).numpy().data


def _layout(file: Any, name: str) -> tuple[str, tuple[int, ...]]:
    part = file.get_slice(name)
    return part.get_dtype(), tuple(part.get_shape())


def _header_digest(header: Mapping[str, str]) -> str:
    text = json.dumps(sorted(header.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _checked_digests(
    path: Path, header: Mapping[str, str], names: tuple[str, ...], known: tuple[str, ...]
) -> Mapping[str, str] | None:
    """The tensors' digests; raises ValueError where the header is not as it was written."""
    unknown = sorted(header.keys() - {FORMAT, DIGESTS, CHECKSUM, *known})
    if unknown:
        raise ValueError(f"{path}: damaged ({unknown[0]!r} in its header); make it again")
    if DIGESTS not in header and CHECKSUM not in header:
        return None
    others = {name: text for name, text in header.items() if name != CHECKSUM}
    if header.get(CHECKSUM) != _header_digest(others):
        raise ValueError(
            f"{path}: damaged (its header is not the one that was written); "
            "take a whole copy, or make it again"
        )
    digests = json.loads(header[DIGESTS])
    if digests.keys() != set(names):
        raise ValueError(f"{path}: damaged (tensors are missing or added); make it again")
    return digests


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
