"""diffusers: ``unet.``, ``transformer.``, ``text_encoder.`` paths with ``lora_A``, ``lora_B``, the scale folded in."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from torch import Tensor

from ..adapter import Adapter, Source
from . import writing
from .base_weights import BaseWeights
from .lora_metadata import assemble_with_metadata

_NAME = re.compile(r"(unet|prior|(transformer|text_encoder|connectors)(_\d+)?)\..+")
# prefixes of other dialects; any other dotted path can be stored (bare paths, base_model.model.)
_FOREIGN_PREFIXES = ("lora_", "lycoris_", "oft_", "diffusion_model.", "text_encoders.")


class Diffusers:
    """Written by diffusers, ai-toolkit, SimpleTuner and many trainers. The fallback for all remaining names."""

    name = "diffusers"

    def matches(self, keys: Collection[str]) -> bool:
        return True

    def is_native_name(self, module: str) -> bool:
        return _NAME.fullmatch(module) is not None

    def can_store_name(self, module: str) -> bool:
        return not module.startswith(_FOREIGN_PREFIXES)

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
        writing.check_names(
            adapter, self.name, self.can_store_name, "unet.down_blocks.0... or transformer.transformer_blocks.0..."
        )
        state: dict[str, Tensor] = {}
        for name, part in adapter.modules.items():
            down, up = writing.processor_keys(name) or (f"{name}.lora_A.weight", f"{name}.lora_B.weight")
            state[down], state[up] = writing.unflatten(writing.fold_scale(part, name))
        for name, bias in writing.lora_B_biases(adapter, self.name).items():
            state[f"{name}.lora_B.bias"] = bias
        metadata = {"format": "pt", **writing.string_metadata(adapter.metadata)}
        return writing.add_extras(state, adapter), metadata
