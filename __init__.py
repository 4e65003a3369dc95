"""legomole: combine LoRAs without breaking them.

This folder is both the Python package and the ComfyUI node pack. Importing it loads neither torch nor ComfyUI: public
names are looked up on first use, and ComfyUI gets the nodes from the entry point.
"""

from __future__ import annotations

import importlib
from typing import Any

WEB_DIRECTORY = "./web"

_PUBLIC = {
    # adapters and files
    "Adapter": "core.adapter",
    "LowRank": "core.lowrank",
    "align": "api",
    "load": "core.formats",
    "save": "api",
    # merging
    "METHODS": "core.merge.methods",
    "Calibrated": "core.merge.methods.calibrated",
    "Concat": "core.merge.methods.concat",
    "Dare": "core.merge.methods.dare",
    "Knots": "core.merge.methods.knots",
    "Lego": "core.merge.methods.lego",
    "Linear": "core.merge.methods.linear",
    "NP": "core.merge.methods.np_lora",
    "SSR": "core.merge.methods.ssr",
    "SVD": "core.merge.methods.svd",
    "Ties": "core.merge.methods.ties",
    "Rank": "core.merge.rank",
    "Recipe": "core.recipes.recipe",
    "Statistics": "core.merge.statistics",
    "merge": "api",
    "run": "api",
    "sweep": "api",
    # mixing
    "GateSet": "core.mole.gates",
    "GateSettings": "core.mole.gates",
    "Mixture": "core.mole.mixture",
    "Record": "core.mole.record",
    "TrainedGates": "core.mole.trained",
    "attach": "core.mole.attach",
    "experts": "hosts.api",
    "freeze": "core.mole.freeze",
    "load_gates": "hosts.api",
    "mixed": "hosts.api",
    "routed": "hosts.api",
    "train_gates": "hosts.api",
    # errors
    "FormatError": "core.errors",
    "LegoMoleError": "core.errors",
    "MergeError": "core.errors",
    "SaveError": "core.errors",
    "__version__": "core",
}


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(_PUBLIC)


async def comfy_entrypoint() -> Any:
    """Return the extension with the nodes. ComfyUI calls it once its own modules are loaded."""
    return importlib.import_module(".nodes.extension", __name__).LegoMoleExtension()
