"""Tensors in temporary files: the system reads them like memory, and needs no memory for them."""

import os
from contextlib import suppress
from pathlib import Path
from tempfile import gettempdir, mkstemp

import torch
from torch import Tensor

from harmcircuits.storage.tensors import tensor_bytes


def mapped_copy(tensor: Tensor) -> Tensor:
    """The same numbers in a temporary file that is mapped into memory, on the CPU."""
    folder = gettempdir()
    descriptor, name = mkstemp(prefix="harmcircuits-", dir=folder)
    os.close(descriptor)
    path = Path(name)
    try:
        # Written, not only made as long: a full disk is an error here, and where a mapping is first
        # used it would be the end of the process.
        path.write_bytes(tensor_bytes(tensor))
        mapped = torch.from_file(name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
    except OSError as error:
        reason = f"{error.strerror} for scores in temporary files (TMPDIR sets where they lie)"
        raise OSError(error.errno, reason, folder) from None
    finally:
        # The mapping lives on without a name. Windows does not take the name from a file that is in
        # use; there it stays until temporary files are cleared.
        with suppress(PermissionError):
            path.unlink()
    return mapped.view(tensor.shape)
