"""A mask file of the Hugging Face hub, or of a folder that stands for it."""

from pathlib import Path

MASK_FILE = "mask.safetensors"


def mask_file(source: str | Path, filename: str = MASK_FILE, revision: str | None = None) -> Path:
    """Where a mask file is on this machine; one of the hub is downloaded or from its cache."""
    path = Path(source)
    if path.is_file():
        return path
    if path.is_dir():
        return _in_folder(path, filename)
    if str(source).count("/") != 1 or path.suffix == ".safetensors":
        raise ValueError(
            f"{source}: no such file; give the path of a saved mask, a folder that holds "
            f"{filename}, or a hub id such as user/name"
        )
    return _downloaded(str(source), filename, revision)


def _in_folder(folder: Path, filename: str) -> Path:
    path = folder / filename
    if path.is_file():
        return path
    names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*.safetensors"))
    held = ", ".join(names[:5]) or "none"
    raise ValueError(f"{folder}: no {filename} in it; give filename= one of its files ({held})")


def _downloaded(repo: str, filename: str, revision: str | None) -> Path:
    # Imported here: a mask of this machine needs no hub.
    from huggingface_hub import errors, hf_hub_download

    at = f"{repo} at {revision}" if revision else repo
    try:
        return Path(hf_hub_download(repo, filename, revision=revision))
    except errors.GatedRepoError:
        reason = f"its owner decides who reads it; ask for access at https://huggingface.co/{repo}"
    except errors.RepositoryNotFoundError:
        reason = (
            "no repository of this name can be seen; check the name, and for a private one log in "
            "with `hf auth login` or set HF_TOKEN"
        )
    except errors.RevisionNotFoundError:
        reason = "no such branch, tag or commit; leave revision= out for the newest"
    except errors.LocalEntryNotFoundError:
        reason = (
            f"{filename} is not in the cache and the hub cannot be reached; download it where "
            "there is a network, and give the file or its folder"
        )
    except errors.EntryNotFoundError:
        reason = f"it holds no {filename}; give filename= the name of its mask file"
    except (OSError, ValueError) as error:
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        reason = f"{first_line}; check the name and the network, or give a file or folder"
    raise ValueError(f"{at}: {reason}")
