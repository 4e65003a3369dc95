"""ComfyUI's own: dotted paths (``diffusion_model.``, ``text_encoders.``) with ``lora_down``, ``lora_up``, ``alpha``."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor

from ..adapter import Adapter, Source
from . import reading, writing


class Comfy:
    """Written by ComfyUI's trainer, lightx2v and others. ComfyUI knows most other names too, so any name fits."""

    name = "comfy"

    def matches(self, keys: Collection[str]) -> bool:
        return any(key.startswith(("diffusion_model.", "text_encoders.")) or ".lora_down." in key for key in keys)

    def fits(self, module: str) -> bool:
        return True

    def carries(self, module: str) -> bool:
        return self.fits(module)

    def read(
        self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], source: Source, convert_rank: int | None
    ) -> Adapter:
        return reading.assemble(tensors, metadata, source, convert_rank=convert_rank)

    def write(self, adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
        return writing.with_alpha(adapter), writing.strings(adapter.metadata)
