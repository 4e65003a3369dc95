"""PEFT folders: find and read their files, and check that they are complete."""

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
# transformers names the index of a sharded adapter like that of a whole model
INDEXES = (f"{WEIGHTS}.index.json", "model.safetensors.index.json")
_MAX_TEXT = 32 << 20  # bytes of a configuration or index
_SHARD = re.compile(r"adapter_model-\d+-of-\d+\.safetensors")


@dataclass(frozen=True)
class PeftFolder:
    """The files of a PEFT adapter.

    Args:
        weights: The weight file, or all shards, sorted by name.
        config: Text of the configuration.
        index: The file that lists the shards, ``None`` for a single weight file.
        keys: Keys of the tensors that the index lists.
    """

    weights: tuple[Path, ...]
    config: str
    index: Path | None = None
    keys: frozenset[str] = frozenset()

    def check_complete(self, keys: Collection[str]) -> None:
        """Raise unless the weight files hold all tensors that the index lists.

        Args:
            keys: Keys of the tensors in the weight files.

        Raises:
            FormatError: Names the missing keys.
        """
        missing = sorted(self.keys - set(keys))
        if missing:
            raise FormatError(
                "Tensors that the index lists are in no shard of the weights.",
                file=self.index,
                found=f"no {name_some(missing, 3)}",
                remedy="download or export all shards again: they are not of one adapter",
            )


def find_peft_folder(path: Path) -> Path | None:
    """The PEFT folder that a path stands for: the path itself, or the folder of the weight file or shard it names."""
    if path.is_dir():
        return path
    belongs = (path.name == WEIGHTS and (path.parent / CONFIG).is_file()) or _SHARD.fullmatch(path.name)
    return path.parent if belongs and path.is_file() else None


def read_peft_folder(folder: Path) -> PeftFolder:
    """Read the configuration of a PEFT folder, and find its weight files.

    Raises:
        FormatError: Weights, a shard or the configuration are missing, or the weights are a pickle.
    """
    config, single = folder / CONFIG, folder / WEIGHTS
    shards = sorted(path.name for path in folder.iterdir() if _SHARD.fullmatch(path.name))
    if not config.is_file() and not single.is_file() and not shards:
        raise FormatError(
            "The folder holds no PEFT adapter.", file=folder, expected=f"{WEIGHTS} and {CONFIG}", found="neither"
        )
    if not config.is_file():
        raise FormatError(
            f"The folder has no {CONFIG}, so the scale is unknown.",
            file=folder,
            remedy=f"download {CONFIG} from the source of the adapter",
        )
    try:
        text = _read_text(config)
    except (OSError, ValueError) as error:
        raise FormatError(f"{CONFIG} cannot be read.", file=config, found=str(error)) from error
    if single.is_file():
        return PeftFolder((single,), text)
    for index in (folder / name for name in INDEXES):
        weight_map = _read_weight_map(index) if index.is_file() else {}
        if any(map(_SHARD.fullmatch, weight_map.values())):
            return _sharded(folder, shards, text, index, weight_map)
    pickle = folder / "adapter_model.bin"
    if shards:
        found = f"{name_some(shards, 3)}, without the index {INDEXES[0]}: the download or save was interrupted"
    elif pickle.exists():
        found = "adapter_model.bin, a pickle, which can run any program when it is opened; it was not"
    else:
        found = "only the configuration: the download or save was interrupted"
    raise FormatError(
        f"The folder has no {WEIGHTS}.", file=folder, found=found, remedy="get the safetensors version of the weights"
    )


def _read_text(path: Path) -> str:
    """Read a UTF-8 text. Raises: OSError; ValueError: Not UTF-8, or too long."""
    size = path.stat().st_size
    if size > _MAX_TEXT:
        raise ValueError(f"{size} bytes, more than {_MAX_TEXT}")
    return path.read_text(encoding="utf-8")


def _sharded(folder: Path, shards: list[str], config: str, index: Path, weight_map: dict[str, str]) -> PeftFolder:
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if name not in shards]
    if missing:
        raise FormatError(
            "A shard of the weights is missing.",
            file=index,
            expected=f"{len(names)} files adapter_model-..-of-...safetensors beside the index that lists them",
            found=f"no {name_some(missing, 3)}",
            remedy="the download or save was interrupted: repeat it",
        )
    return PeftFolder(tuple(folder / name for name in names), config, index, frozenset(weight_map))


def _read_weight_map(index: Path) -> dict[str, str]:
    """The index as tensor -> file."""
    try:
        weight_map: Any = from_json(_read_text(index))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FormatError("The index of the weights cannot be read.", file=index, found=repr(error)) from error
    names = weight_map.values() if isinstance(weight_map, dict) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise FormatError("The index of the weights is not valid.", file=index, expected="weight_map: tensor to file")
    return cast("dict[str, str]", weight_map)
