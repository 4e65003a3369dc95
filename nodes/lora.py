"""Lora: the value that flows through LEGOMOLE_LORA sockets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..core.adapter import Adapter
from ..core.errors import MergeError
from ..core.recipes.recipe import Recipe


@dataclass(frozen=True, eq=False)
class Lora:
    """A LoRA on its way through a graph, with the strengths to use it at. Immutable: ComfyUI caches and fans it out.

    Args:
        content: A file, the state dict of a LoRA trained in the graph, or a merged adapter.
        label: What to call it in reports.
        strength_model: How strongly it acts on the diffusion model. strength_clip: On the text encoders.
        convert_rank: Rank to which updates that are not low rank may be approximated; 0 forbids it.
        recipe: How to make a merged LoRA again from files; ``None`` for other LoRAs and where that is impossible.
    """

    content: Path | Mapping[str, Tensor] | Adapter
    label: str
    strength_model: float = 1.0
    strength_clip: float = 1.0
    convert_rank: int = 0
    recipe: Recipe | None = None


def flatten(values: Mapping[str, object], find: Callable[[str], Path]) -> list[Lora]:
    """All LoRAs that a growing input received, in socket order; a stack counts as its entries.

    Args:
        values: Socket name (``lora0``, ``lora1`` ..) -> `Lora`, a trained LoRA's state dict, or a stack: a list of
            ``(file, strength_model, strength_clip)``.
        find: The path of a LoRA's file name.

    Raises:
        MergeError: Nothing is connected, or something that is none of these.
    """
    loras: list[Lora] = []
    for socket in sorted(values, key=lambda name: (len(name), name)):
        value = values[socket]
        if isinstance(value, Lora):
            loras.append(value)
        elif isinstance(value, Mapping):
            loras.append(Lora(value, f"{socket} (trained)"))
        elif isinstance(value, (list, tuple)):
            loras += [_stacked(entry, socket, find) for entry in value if not _is_blank(entry)]
        elif value is not None:
            raise MergeError("This is not a LoRA.", module=socket, found=type(value).__name__)
    if not loras:
        raise MergeError("No LoRA is connected.", expected="at least one on the loras inputs", found="none")
    return loras


def _is_blank(entry: object) -> bool:
    """Some packs' stackers leave rows nobody filled in."""
    return not entry or (isinstance(entry, (list, tuple)) and entry[0] in (None, "", "None"))


def _stacked(entry: object, socket: str, find: Callable[[str], Path]) -> Lora:
    try:
        name, strength_model, strength_clip = entry  # type: ignore[misc]
        name, strengths = str(name), (float(strength_model), float(strength_clip))
    except (TypeError, ValueError):
        raise MergeError(
            "This is not an entry of a LORA_STACK.",
            module=socket,
            expected="(file name, strength_model, strength_clip)",
            found=repr(entry)[:200],
        ) from None
    return Lora(find(name), Path(name).stem, *strengths)
