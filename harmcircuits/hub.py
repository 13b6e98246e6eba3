"""The Hugging Face hub: a mask's file from there, a folder to there."""

from pathlib import Path

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


def upload(folder: Path, repo: str, *, private: bool, message: str) -> str:
    """Upload a folder's files to a model repository, made where there is none; its address."""
    from huggingface_hub import HfApi

    HfApi().create_repo(repo, private=private, exist_ok=True)
    HfApi().upload_folder(repo_id=repo, folder_path=folder, commit_message=message)
    return f"https://huggingface.co/{repo}"


def refuse_repo(repo: str) -> None:
    """Raises ValueError for what is no hub id, before anything is written."""
    user, _, name = repo.partition("/")
    if not user or not name or "/" in name:
        raise ValueError(f"repository {repo!r}; expected a hub id, user/name")
