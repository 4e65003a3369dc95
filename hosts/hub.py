"""huggingface_hub: adapters and models in the local cache of downloads from the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from ..core.errors import FormatError
from ..core.safe_paths import is_safe_name

# the files of an adapter; other files of its repository may be missing from the cache
_ADAPTER_FILES = ["adapter_config.json", "adapter_model*.safetensors", "*.safetensors.index.json"]


def split_revision(name: str) -> tuple[str, str | None]:
    """Return repository and revision of ``owner/name`` or ``owner/name@revision``.

    Raises:
        ValueError: The revision would lead out of the cache, where huggingface_hub opens a file of its name.
    """
    repository, _, revision = name.partition("@")
    if "\0" in name or (revision and not is_safe_name(revision)):
        raise ValueError(f"{revision!r} is no branch, tag or commit")
    return repository, revision or None


def cached_folder(name: str, kind: str = "adapter") -> Path:
    """The folder of an adapter or model in the local cache. Downloads nothing.

    Args:
        name: ``owner/name`` or ``owner/name@revision`` with a branch, tag or commit.
        kind: ``adapter``, or the word for it in error messages; then all files of the repository must be there.

    Raises:
        FormatError: The folder is not in the cache, or huggingface_hub is not installed.
    """
    try:
        repository, revision = split_revision(name)
        from huggingface_hub import snapshot_download

        files = _ADAPTER_FILES if kind == "adapter" else None
        return Path(snapshot_download(repository, revision=revision, local_files_only=True, allow_patterns=files))
    except ImportError as error:
        raise FormatError(
            "This looks like a name on the Hugging Face Hub, and huggingface_hub is not installed.",
            file=name,
            found=str(error),
            remedy="pip install 'legomole[peft]', or name the file or folder",
        ) from error
    except (OSError, ValueError) as error:
        raise FormatError(
            f"There is no such file or folder, and no {kind} of this name in the local Hugging Face cache.",
            file=name,
            expected="a path, or OWNER/NAME or OWNER/NAME@REVISION of a download",
            found=str(error).partition(". ")[0],
            remedy=f"check the path, or download it first: hf download {name.replace('@', ' --revision ', 1)}",
        ) from error
