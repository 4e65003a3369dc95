"""Layer names across dialects: diffusers knows them, and is loaded only when two dialects meet."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..core.errors import MergeError

if TYPE_CHECKING:
    from ..core.adapter import Adapter
    from ..core.layers.keymap import KeyMap


def key_map(adapters: Sequence[Adapter]) -> KeyMap:
    """What `core.layers.align.align` asks for.

    Raises:
        MergeError: diffusers is not installed.
    """
    return _diffusers().key_map(adapters)


def names_for_format(adapter: Adapter, format: str) -> Adapter:
    """The adapter under names the format can say; unchanged where it has them.

    Raises:
        MergeError: diffusers is not installed, or has no such names.
    """
    from ..core.formats import FORMATS

    if format not in ("diffusers", "kohya") or all(FORMATS[format].fits(name) for name in adapter.layers):
        return adapter
    return _diffusers().to_diffusers(adapter) if format == "diffusers" else _diffusers().to_kohya(adapter)


def _diffusers() -> Any:
    try:
        return importlib.import_module("..diffusers.layer_names", __name__)
    except ImportError as error:
        raise MergeError(
            "The layer names must be translated, and diffusers, which knows them, is not installed.",
            found=str(error),
            remedy="pip install 'legomole[diffusers]'",
        ) from error
