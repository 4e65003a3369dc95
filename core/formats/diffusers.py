"""diffusers: ``unet.``, ``transformer.``, ``text_encoder.`` paths with ``lora_A``, ``lora_B``, the scale folded in."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, cast

from torch import Tensor

from ..adapter import Adapter, Source
from ..errors import FormatError
from ..json_text import from_json
from . import reading, writing
from .peft_config import PeftScale

_CONFIG = "lora_adapter_metadata"
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
        self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], source: Source, convert_rank: int | None
    ) -> Adapter:
        alpha_of = _alpha_lookup(metadata, source)
        return reading.assemble(tensors, metadata, source, convert_rank=convert_rank, alpha_of=alpha_of)

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
        # an input's configuration would apply its alpha a second time
        metadata = {"format": "pt", **writing.string_metadata(adapter.metadata, _CONFIG)}
        return writing.add_extras(state, adapter), metadata


def _alpha_lookup(metadata: Mapping[str, str], source: Source) -> reading.AlphaLookup | None:
    """Alphas of the configuration that diffusers stores: one flat JSON object, keys prefixed by the component."""
    if _CONFIG not in metadata:
        return None
    try:
        flat = cast("dict[str, Any]", from_json(metadata[_CONFIG]))
        components = {key.split(".", 1)[0] for key in flat}
        scales = {
            name: PeftScale.from_config(
                {key.split(".", 1)[1]: value for key, value in flat.items() if key.startswith(f"{name}.")}, source
            )
            for name in components
        }
    except (ValueError, TypeError, AttributeError, IndexError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(
            "The adapter configuration in the file's metadata cannot be read.",
            file=source.path or None,
            module=_CONFIG,
            found=str(error),
        ) from error

    def alpha_of(module: str, rank: int) -> float | None:
        component, _, path = module.partition(".")
        return scales[component](path, rank) if component in scales else None

    return alpha_of
