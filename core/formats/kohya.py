"""kohya: flat names such as ``lora_unet_..._attn1_to_q`` with ``lora_down``, ``lora_up`` and ``alpha``."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from torch import Tensor

from ..adapter import Adapter, Source
from . import reading, writing
from .base_weights import BaseWeights

_NAME = re.compile(r"(lora|lycoris|oft)_[^.]+")


class Kohya:
    """Written by sd-scripts, musubi-tuner, LyCORIS and OneTrainer."""

    name = "kohya"

    def matches(self, keys: Collection[str]) -> bool:
        return any(self.is_native_name(key.split(".", 1)[0]) for key in keys)

    def is_native_name(self, module: str) -> bool:
        return _NAME.fullmatch(module) is not None

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
        return reading.assemble(tensors, metadata, source, convert_rank=convert_rank, base=base)

    def write(self, adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
        writing.check_names(adapter, self.name, self.is_native_name, "lora_unet_down_blocks_0_attentions_0_proj_in")
        metadata = writing.string_metadata(adapter.metadata) | _network_metadata(adapter)
        return writing.state_dict_with_alpha(adapter), metadata


def _network_metadata(adapter: Adapter) -> dict[str, str]:
    """Metadata that kohya's tools need, from the factors; "Dynamic" is their word for ranks that differ by layer."""
    ranks = {part.rank for part in adapter.modules.values()}
    alphas = {float(part.rank if part.alpha is None else part.alpha) for part in adapter.modules.values()}
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": f"{alphas.pop():g}" if len(alphas) == 1 else "Dynamic",
    }
