"""What commands need of this machine: a device, its number format, a host library, an adapter in its cache."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import MergeError
from ..hosts.hub import cached_folder

if TYPE_CHECKING:
    from .options import DtypeName


def check_device(name: str) -> None:
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # the latter from a torch built without CUDA
        raise MergeError(
            "This device cannot be used.", expected="cpu, or a device of this machine", found=f"{name}: {error}"
        ) from error


def computing(device: str) -> DtypeName:
    """The number format that a pipeline computes in on a device, where nothing else is asked for."""
    return "float32" if device == "cpu" else "bfloat16"


_EXTRAS = {"ray": "ray", "transformers.mixing": "peft", "transformers.training": "peft"}


def host(name: str) -> Any:
    """A module of `hosts`.

    Raises:
        MergeError: The library it is for is not installed.
    """
    try:
        return importlib.import_module(f"..hosts.{name}", __package__)
    except ImportError as error:
        raise MergeError(
            "What this needs is not installed.",
            found=str(error),
            remedy=f"pip install 'legomole[{_EXTRAS.get(name, 'diffusers')}]'",
        ) from error


def launched(device: str) -> tuple[Any, bool, str]:
    """What ``accelerate launch`` started this process for, if it did.

    Returns:
        The `AcceleratorDevices` or ``None``; whether this process tells and writes; the device it computes on.
    """
    devices = host("accelerate").AcceleratorDevices.launched(cpu=device == "cpu")
    if devices is None:
        return None, True, device
    return devices, devices.rank == 0, str(devices.accelerator.device)


_HUB_NAME = re.compile(r"(hf:/{1,2})?([\w.-]+/[\w.-]+(?:@[\w./-]+)?)")


def named(text: str) -> str:
    """An input as a recipe names it: ``OWNER/NAME[@REVISION]`` as one of the Hugging Face cache, a path as it is.

    What is a file or folder here, or would lie in a folder that is, is taken for a path.
    """
    from ..core.recipes.recipe import HUB

    match = _HUB_NAME.fullmatch(text)
    local = Path(text).exists() or Path(text).parent.is_dir() or text.endswith(".safetensors")
    return text if match is None or (local and match[1] is None) else HUB + match[2]


def located(path: Path) -> Path:
    """Where an input lies that was typed as a path, or as a name in the Hugging Face cache.

    Raises:
        FormatError: There is no such name.
    """
    from ..core.recipes.run import place

    return place(named(str(path)), Path(), cached_folder)
