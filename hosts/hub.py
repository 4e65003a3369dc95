"""huggingface_hub: adapters and models in the local cache of what was downloaded from the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from ..core.errors import FormatError
from ..core.safe_paths import relative

# an adapter's own files; other files of a repository need not be there
_FILES = ["adapter_config.json", "adapter_model*.safetensors", "*.safetensors.index.json"]


def cached(name: str, what: str = "adapter") -> Path:
    """The folder of an adapter (or a model) in the local cache. Nothing is downloaded.

    Args:
        name: ``owner/name`` or ``owner/name@revision``, a branch, tag or commit.
        what: For errors: what should be there. All files of what is no adapter count.

    Raises:
        FormatError: It is not there, or huggingface_hub is not installed.
    """
    repository, _, revision = name.partition("@")
    try:
        if "\0" in name or (revision and not relative(revision)):  # it is looked up as the name of a file
            raise ValueError(f"{revision!r} is no branch, tag or commit")
        from huggingface_hub import snapshot_download

        files = _FILES if what == "adapter" else None
        return Path(
            snapshot_download(repository, revision=revision or None, local_files_only=True, allow_patterns=files)
        )
    except ImportError as error:
        raise FormatError(
            "This looks like a name on the Hugging Face Hub, and huggingface_hub is not installed.",
            file=name,
            found=str(error),
            remedy="pip install 'legomole[peft]', or name the file or folder",
        ) from error
    except (OSError, ValueError) as error:
        raise FormatError(
            f"There is no such file or folder, and no {what} of this name in the local Hugging Face cache.",
            file=name,
            expected="a path, or OWNER/NAME or OWNER/NAME@REVISION of what was downloaded",
            found=str(error).partition(". ")[0],
            remedy=f"check the path, or download it first: hf download {repository}"
            + (f" --revision {revision}" if revision else ""),
        ) from error
