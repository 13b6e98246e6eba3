"""Writing: a file is there whole or not at all, and nothing is overwritten that was not named."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A new file that takes the place of `path` on a clean exit and is gone on any other."""
    path = Path(path)
    # In the same folder, since a rename is atomic only within a file system. The end of the name
    # is none that a folder is searched for.
    unfinished = path.with_name(f".{path.name}.{uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        _sync(unfinished)
        unfinished.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        unfinished.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text as UTF-8, as `replacing` does."""
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def empty_folder(folder: str | Path) -> Path:
    """A folder with nothing in it, made if it is not there."""
    folder = Path(folder)
    refuse_filled(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def refuse_filled(folder: Path) -> None:
    """Raises ValueError for a file, and for a folder that holds something."""
    if folder.is_file():
        raise ValueError(f"{folder} is a file; give a folder that does not exist yet")
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(
            f"{folder} exists and is not empty; give a new folder, one that does not exist yet"
        )


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Put the name of a new file on the disk too, where a folder can be synced."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return  # Windows opens no folders
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # nor do some network file systems sync them
    finally:
        os.close(descriptor)
