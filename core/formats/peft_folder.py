"""A PEFT folder: which files make it up, and whether they are all there."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ..errors import FormatError, name_some
from ..json_text import from_json

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
# transformers writes parts of an adapter with the index of a whole model
INDEXES = (f"{WEIGHTS}.index.json", "model.safetensors.index.json")
_MAX_TEXT = 32 << 20  # bytes of a configuration or index
_PART = re.compile(r"adapter_model-\d+-of-\d+\.safetensors")


@dataclass(frozen=True)
class Folder:
    """The files of a PEFT adapter.

    Args:
        weights: Its weight file, or all parts of it, sorted by name.
        config: Text of its configuration.
        index: Where the parts are listed, ``None`` for a single file. keys: The tensors it lists.
    """

    weights: tuple[Path, ...]
    config: str
    index: Path | None = None
    keys: frozenset[str] = frozenset()

    def demand_all(self, found: Collection[str]) -> None:
        """Raise unless all tensors that the index lists were found.

        Raises:
            FormatError: Names the missing ones.
        """
        missing = sorted(self.keys - set(found))
        if missing:
            raise FormatError(
                "Tensors that the index lists are in no part of the weights.",
                file=self.index,
                found=f"no {name_some(missing, 3)}",
                remedy="download or export all parts again: they are not of one adapter",
            )


def folder_of(path: Path) -> Path | None:
    """The PEFT folder that a path means: itself, or where its weight file or a part of the weights was named."""
    if path.is_dir():
        return path
    meant = (path.name == WEIGHTS and (path.parent / CONFIG).is_file()) or _PART.fullmatch(path.name)
    return path.parent if meant and path.is_file() else None


def read_folder(folder: Path) -> Folder:
    """The files of a PEFT folder.

    Raises:
        FormatError: Weights or configuration are missing, a part of the weights is, or they are only there as a pickle.
    """
    config, single = folder / CONFIG, folder / WEIGHTS
    parts = sorted(path.name for path in folder.iterdir() if _PART.fullmatch(path.name))
    if not config.is_file() and not single.is_file() and not parts:
        raise FormatError(
            "The folder holds no PEFT adapter.", file=folder, expected=f"{WEIGHTS} and {CONFIG}", found="neither"
        )
    if not config.is_file():
        raise FormatError(
            f"The folder has no {CONFIG}, so the scale is unknown.",
            file=folder,
            remedy=f"fetch {CONFIG} from where the adapter came from",
        )
    try:
        text = _text(config)
    except (OSError, ValueError) as error:
        raise FormatError(f"{CONFIG} cannot be read.", file=config, found=str(error)) from error
    if single.is_file():
        return Folder((single,), text)
    for index in (folder / name for name in INDEXES):
        listed = _listed(index) if index.is_file() else {}
        if any(map(_PART.fullmatch, listed.values())):
            return _in_parts(folder, parts, text, index, listed)
    pickle = folder / "adapter_model.bin"
    if parts:
        found = f"{name_some(parts, 3)}, without the index {INDEXES[0]}: the download or save was interrupted"
    elif pickle.exists():
        found = "adapter_model.bin, a pickle, which can run any program when it is opened; it was not"
    else:
        found = "only the configuration: the download or save was interrupted"
    raise FormatError(
        f"The folder has no {WEIGHTS}.", file=folder, found=found, remedy="get the safetensors version of the weights"
    )


def _text(path: Path) -> str:
    """Raises: OSError. ValueError: Not UTF-8, or too long."""
    size = path.stat().st_size
    if size > _MAX_TEXT:
        raise ValueError(f"{size} bytes, more than {_MAX_TEXT}")
    return path.read_text(encoding="utf-8")


def _in_parts(folder: Path, parts: list[str], config: str, index: Path, listed: dict[str, str]) -> Folder:
    names = sorted(set(listed.values()))
    missing = [name for name in names if name not in parts]
    if missing:
        raise FormatError(
            "A part of the weights is missing.",
            file=index,
            expected=f"{len(names)} files adapter_model-..-of-...safetensors beside the index that lists them",
            found=f"no {name_some(missing, 3)}",
            remedy="the download or save was interrupted: repeat it",
        )
    return Folder(tuple(folder / name for name in names), config, index, frozenset(listed))


def _listed(index: Path) -> dict[str, str]:
    """Tensor -> file."""
    try:
        listed: Any = from_json(_text(index))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FormatError("The index of the weights cannot be read.", file=index, found=repr(error)) from error
    if not isinstance(listed, dict) or not listed or not all(isinstance(name, str) for name in listed.values()):
        raise FormatError("The index of the weights is not sound.", file=index, expected="weight_map: tensor to file")
    return cast("dict[str, str]", listed)
