"""GraphLora: the value on LEGOMOLE_LORA sockets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..core.adapter import Adapter
from ..core.errors import MergeError
from ..core.recipes.recipe import Recipe


@dataclass(frozen=True, eq=False)
class GraphLora:
    """A LoRA in a graph, with its strengths. Immutable, because ComfyUI caches it and passes it to several nodes.

    Args:
        content: A file, the state dict of a LoRA trained in the graph, or a merged adapter.
        label: Name for reports.
        strength_model: Strength on the diffusion model.
        strength_clip: Strength on the text encoders.
        convert_rank: Rank at which updates that are not low rank are approximated; 0 refuses them.
        recipe: How to repeat a merged LoRA from files; ``None`` for other LoRAs and where that is impossible.
        words: Words that call for it in a prompt, in place of those in its file.
    """

    content: Path | Mapping[str, Tensor] | Adapter
    label: str
    strength_model: float = 1.0
    strength_clip: float = 1.0
    convert_rank: int = 0
    recipe: Recipe | None = None
    words: tuple[str, ...] = ()


class StackEntry(tuple[str, float, float]):
    """An entry of a LORA_STACK, ``(file name, strength_model, strength_clip)``, that keeps a convert rank and words.

    The convention of other packs has no place for them. They read and pass this on as a tuple of three.
    """

    convert_rank: int = 0
    words: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, name: str, strength_model: float, strength_clip: float, convert_rank: int, words: Sequence[str] = ()
    ) -> StackEntry:
        entry = cls((name, strength_model, strength_clip))
        entry.convert_rank, entry.words = convert_rank, tuple(words)
        return entry


def connected_loras(values: Mapping[str, object], find_file: Callable[[str], Path]) -> list[GraphLora]:
    """Return all LoRAs that a growing input received, in the order of its sockets; a stack counts as its entries.

    Args:
        values: Socket name (``lora0``, ``lora1`` ..) -> `GraphLora`, state dict of a trained LoRA, or stack: a list of
            ``(file name, strength_model, strength_clip)`` or `StackEntry`.
        find_file: Returns the path of a LoRA's file name.

    Raises:
        MergeError: Nothing is connected, or a value of another type.
    """
    loras: list[GraphLora] = []
    for socket in sorted(values, key=lambda name: (len(name), name)):
        value = values[socket]
        if isinstance(value, GraphLora):
            loras.append(value)
        elif isinstance(value, Mapping):
            loras.append(GraphLora(value, f"{socket} (trained)"))
        elif isinstance(value, (list, tuple)):
            loras += [_from_stack(entry, socket, find_file) for entry in value if not _is_blank(entry)]
        elif value is not None:
            raise MergeError("This is not a LoRA.", module=socket, found=type(value).__name__)
    if not loras:
        raise MergeError("No LoRA is connected.", expected="at least one on the loras inputs", found="none")
    return loras


def _is_blank(entry: object) -> bool:
    """Return whether a stack's entry is an empty row, as some packs' nodes leave them."""
    return not entry or (isinstance(entry, (list, tuple)) and entry[0] in (None, "", "None"))


def _from_stack(entry: object, socket: str, find_file: Callable[[str], Path]) -> GraphLora:
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
    convert_rank, words = (entry.convert_rank, entry.words) if isinstance(entry, StackEntry) else (0, ())
    return GraphLora(find_file(name), Path(name).stem, *strengths, convert_rank, words=words)
