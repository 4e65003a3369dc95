"""legomole: combine LoRAs without breaking them.

The same folder is the Python package and the ComfyUI node pack. Importing it loads neither torch nor ComfyUI:
the Python names below are looked up in `legomole.core` on first use, the nodes by ComfyUI through the entry point.
"""

from __future__ import annotations

import importlib
from typing import Any

WEB_DIRECTORY = "./web"

_PUBLIC = {
    "Adapter": "adapter",
    "GateSet": "mole.gates",
    "GateSettings": "mole.gates",
    "Lego": "merge.methods.lego",
    "LowRank": "lowrank",
    "METHODS": "merge.methods",
    "Mixture": "mole.mixture",
    "Rank": "merge.rank",
    "TrainedGates": "mole.trained",
    "__version__": "version",
    "align": "layers.align",
    "attach": "mole.attach",
    "freeze": "mole.freeze",
    "load": "formats",
    "merge": "merge.engine",
    "save": "formats",
}


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f".core.{_PUBLIC[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])


async def comfy_entrypoint() -> Any:
    """Called by ComfyUI once its own modules are loaded; returns the extension with our nodes."""
    return importlib.import_module(".nodes.extension", __name__).LegoMoleExtension()
