"""Layer names across dialects: diffusers knows them, and is imported only when two dialects meet."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..core.errors import MergeError

if TYPE_CHECKING:
    from ..core.adapter import Adapter
    from ..core.layers.keymap import KeyMap


def key_map(adapters: Sequence[Adapter]) -> KeyMap:
    """The key map that `core.layers.align.align` takes, made by diffusers.

    Raises:
        MergeError: diffusers is not installed.
    """
    return _layer_names().key_map(adapters)


def rename_for_format(adapter: Adapter, format: str) -> Adapter:
    """The adapter under module names of the format; the adapter itself if they are already.

    Raises:
        MergeError: diffusers is not installed, or has no such names.
    """
    from ..core.formats import FORMATS

    if format not in ("diffusers", "kohya") or all(FORMATS[format].is_native_name(name) for name in adapter.layers):
        return adapter
    return _layer_names().to_diffusers(adapter) if format == "diffusers" else _layer_names().to_kohya(adapter)


def _layer_names() -> Any:
    try:
        return importlib.import_module("..diffusers.layer_names", __name__)
    except ImportError as error:
        raise MergeError(
            "The layer names must be translated, and diffusers, which knows them, is not installed.",
            found=str(error),
            remedy="pip install 'legomole[diffusers]'",
        ) from error
