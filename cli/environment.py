"""What commands need of this machine: a device and its dtype, a host library, the local Hugging Face cache."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import MergeError
from ..hosts import loading
from ..hosts.hub import cached_folder

if TYPE_CHECKING:
    pass


def check_device(name: str) -> None:
    """Raise MergeError unless torch can use the device."""
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch built without CUDA
        raise MergeError(
            "This device cannot be used.", expected="cpu, or a device of this machine", found=f"{name}: {error}"
        ) from error


_EXTRAS = {"ray": "ray", "transformers.mixing": "peft", "transformers.training": "peft"}


def import_host(name: str) -> Any:
    """Import a module of `hosts`.

    Raises:
        MergeError: The library it needs is not installed.
    """
    return loading.import_host(name, _EXTRAS.get(name, "diffusers"))


def launched_devices(device: str) -> tuple[Any, bool, str]:
    """Return how ``accelerate launch`` distributes the work, if it started this process.

    Returns:
        The `AcceleratorDevices` or ``None``; whether this process prints and writes; the device it computes on.
    """
    devices = import_host("accelerate").AcceleratorDevices.launched(cpu=device == "cpu")
    if devices is None:
        return None, True, device
    return devices, devices.rank == 0, str(devices.accelerator.device)


_HUB_NAME = re.compile(r"(hf:/{1,2})?([\w.-]+/[\w.-]+(?:@[\w./-]+)?)")


def recipe_path(text: str) -> str:
    """Return an input as a recipe names it: ``OWNER/NAME[@REVISION]`` with the prefix of the Hugging Face cache.

    Text that names an existing file or folder, or a file in an existing folder, is a path and stays as it is.
    """
    from ..core.recipes.recipe import HUB_PREFIX

    match = _HUB_NAME.fullmatch(text)
    local = Path(text).exists() or Path(text).parent.is_dir() or text.endswith(".safetensors")
    return text if match is None or (local and match[1] is None) else HUB_PREFIX + match[2]


def base_path(text: str | None) -> str | None:
    """Return the absolute path of a base model typed as a path or as a name in the Hugging Face cache.

    Raises:
        FormatError: The cache has no such name.
    """
    from ..core.recipes.recipe import HUB_PREFIX

    if text is None:
        return None
    name = recipe_path(text)
    hub = name.startswith(HUB_PREFIX)
    return str(cached_folder(name.removeprefix(HUB_PREFIX), "base model") if hub else Path(text).absolute())


def local_path(path: Path) -> Path:
    """Return the file or folder of an input typed as a path or as a name in the Hugging Face cache.

    Raises:
        FormatError: The cache has no such name.
    """
    from ..core.recipes.run import input_path

    return input_path(recipe_path(str(path)), Path(), cached_folder)
