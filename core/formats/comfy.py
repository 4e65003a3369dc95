"""ComfyUI's format: dotted paths (``diffusion_model.``, ``text_encoders.``), ``lora_down``, ``lora_up``, ``alpha``."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor

from ..adapter import Adapter, Source
from . import writing
from .base_weights import BaseWeights
from .lora_metadata import assemble_with_metadata


class Comfy:
    """Written by ComfyUI's trainer, lightx2v and others. ComfyUI reads most other names too, so any name is allowed."""

    name = "comfy"

    def matches(self, keys: Collection[str]) -> bool:
        return any(key.startswith(("diffusion_model.", "text_encoders.")) or ".lora_down." in key for key in keys)

    def is_native_name(self, module: str) -> bool:
        return True

    def can_store_name(self, module: str) -> bool:
        return self.is_native_name(module)

    def read(
        self,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, str],
        source: Source,
        convert_rank: int | None,
        base: BaseWeights | None = None,
    ) -> Adapter:
        return assemble_with_metadata(tensors, metadata, source, convert_rank, base)

    def write(self, adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
        return writing.state_dict_with_alpha(adapter), writing.string_metadata(adapter.metadata)
