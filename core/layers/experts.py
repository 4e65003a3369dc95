"""One name for an expert's layers where some adapters have them one by one, and others stacked into parameters."""

from __future__ import annotations

from collections.abc import Sequence

from ..adapter import Adapter
from ..errors import MergeError
from ..formats.peft_experts import SINGLE_EXPERT, STACKED_EXPERT
from .keymap import MappedRows, apply_key_map

_HALVES = (("gate_proj", "up_proj"), ("w1", "w3"))


def unify_experts(adapters: Sequence[Adapter]) -> list[Adapter]:
    """The adapters with all experts under names of single layers, if any adapter has such names. Exact.

    The rows of ``experts.gate_up_proj`` are those of ``gate_proj``, then those of ``up_proj``.

    Raises:
        MergeError: A stacked parameter that has no counterpart among single layers.
    """
    single = {match[3] for a in adapters for name in a.modules if (match := SINGLE_EXPERT.fullmatch(name))}
    if not single:
        return list(adapters)
    halves, down = (_HALVES[1], "w2") if single & {"w1", "w2", "w3"} else (_HALVES[0], "down_proj")
    result: list[Adapter] = []
    for adapter in adapters:
        key_map: dict[str, tuple[MappedRows, ...]] = {}
        for name, part in adapter.modules.items():
            match = STACKED_EXPERT.fullmatch(name)
            if match is None:
                continue
            owner, parameter, half = f"{match[1]}.{match[3]}", match[2], part.d_out // 2
            if parameter == "down_proj":
                key_map[name] = (MappedRows(f"{owner}.{down}"),)
            elif parameter == "gate_up_proj" and part.d_out % 2 == 0:
                key_map[name] = (
                    MappedRows(f"{owner}.{halves[0]}", ((0, half),)),
                    MappedRows(f"{owner}.{halves[1]}", ((half, part.d_out),)),
                )
            else:
                raise MergeError(
                    "One LoRA has single experts, another has experts stacked in a parameter without a counterpart.",
                    file=adapter.source.path or None,
                    module=name,
                    expected="gate_up_proj and down_proj",
                    found=parameter,
                )
        result.append(apply_key_map(adapter, key_map) if key_map else adapter)
    return result
