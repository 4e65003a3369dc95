"""GraphLora: the value on LEGOMOLE_LORA sockets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

from torch import Tensor

from ..core.adapter import Adapter
from ..core.errors import MergeError
from ..core.recipes.recipe import Recipe

ALL_STEPS = (0.0, 1.0)


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
        note: A sentence for reports, e.g. that the file was found in another folder.
        words: Words that call for it in a prompt, in place of those in its file.
        steps: Start and end of the part of the sampling steps in which it acts, 0 .. 1; only a mix can follow them.
    """

    content: Path | Mapping[str, Tensor] | Adapter
    label: str
    strength_model: float = 1.0
    strength_clip: float = 1.0
    convert_rank: int = 0
    recipe: Recipe | None = None
    words: tuple[str, ...] = ()
    note: str = ""
    steps: tuple[float, float] = ALL_STEPS

    @classmethod
    def empty(cls) -> GraphLora:
        """A LoRA that changes nothing: the result of a merge of no LoRAs."""
        return cls(Adapter({}), "no LoRA")

    @classmethod
    def of_file(
        cls,
        name: str,
        path: Path,
        strength_model: float,
        strength_clip: float,
        convert_rank: int = 0,
        words: tuple[str, ...] = (),
        steps: tuple[float, float] = ALL_STEPS,
    ) -> GraphLora:
        """A LoRA file that a graph names.

        Args:
            name: The file's name in the graph, with ``/`` or ``\\``.
            path: Where the file was found.
            strength_model, strength_clip, convert_rank, words, steps: See the class.
        """
        parts = PureWindowsPath(name).parts  # divides at both kinds of slashes
        moved = path.parts[-len(parts) :] != parts
        note = f"{name} is not in the loras folder: {path} is used, the only file of that name" if moved else ""
        return cls(path, path.stem, strength_model, strength_clip, convert_rank, words=words, note=note, steps=steps)

    @property
    def is_empty(self) -> bool:
        """Whether this LoRA changes nothing."""
        content = self.content
        return isinstance(content, Adapter) and not (content.modules or content.diffs or content.extras)


class StackEntry(tuple[str, float, float]):
    """An entry of a LORA_STACK, ``(file name, strength_model, strength_clip)``, that keeps more.

    The convention of other packs has no place for convert rank, words and steps. They read and pass this on as a tuple
    of three.
    """

    convert_rank: int = 0
    words: tuple[str, ...] = ()
    steps: tuple[float, float] = ALL_STEPS

    @classmethod
    def of(
        cls,
        name: str,
        strength_model: float,
        strength_clip: float,
        convert_rank: int = 0,
        words: Sequence[str] = (),
        steps: tuple[float, float] = ALL_STEPS,
    ) -> StackEntry:
        entry = cls((name, strength_model, strength_clip))
        entry.convert_rank, entry.words, entry.steps = convert_rank, tuple(words), steps
        return entry


def connected_loras(
    values: Mapping[str, object], find_file: Callable[[str], Path], *, may_be_none: bool = False
) -> list[GraphLora]:
    """Return all LoRAs that a growing input received, in the order of its sockets; a stack counts as its entries.

    Merges of no LoRAs are left out.

    Args:
        values: Socket name (``lora0``, ``lora1`` ..) -> `GraphLora`, state dict of a trained LoRA, or stack: a list of
            ``(file name, strength_model, strength_clip)`` or `StackEntry`.
        find_file: Returns the path of a LoRA's file name.
        may_be_none: Return an empty list where there are no LoRAs.

    Raises:
        MergeError: There are no LoRAs, or a value of another type.
    """
    loras: list[GraphLora] = []
    for socket in sorted(values, key=lambda name: (len(name), name)):
        value = values[socket]
        if isinstance(value, GraphLora):
            loras += [] if value.is_empty else [value]
        elif isinstance(value, Mapping):
            loras.append(GraphLora(value, f"{socket} (trained)"))
        elif isinstance(value, (list, tuple)):
            loras += [_from_stack(entry, socket, find_file) for entry in value if not _is_blank(entry)]
        elif value is not None:
            raise MergeError("This is not a LoRA.", module=socket, found=type(value).__name__)
    if not loras and not may_be_none:
        raise MergeError(
            "No LoRA is connected.",
            expected="at least one on the loras inputs",
            found="none, or only lists without a LoRA that is switched on",
        )
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
    more = entry if isinstance(entry, StackEntry) else StackEntry.of(name, *strengths)
    return GraphLora.of_file(name, find_file(name), *strengths, more.convert_rank, more.words, more.steps)


def steps_in_words(steps: tuple[float, float]) -> str:
    """A part of the sampling steps for users, e.g. ``steps 0 to 40%``."""
    start, end = (f"{100 * share:.4g}" for share in steps)
    return f"steps {start} to {end}%"


def require_all_steps(loras: Sequence[GraphLora]) -> None:
    """Raise if LoRAs that shall be patched or merged into weights act in a part of the sampling steps only.

    Raises:
        MergeError: A LoRA has a start or an end step.
    """
    for lora in loras:
        if lora.steps != ALL_STEPS:
            raise MergeError(
                "A LoRA with a start or an end step cannot be merged or patched in: it would act in all steps.",
                file=lora.label,
                expected="0 to 100% of the sampling steps",
                found=steps_in_words(lora.steps),
                remedy="connect it to MoLE Mix (in LoRA List: apply mix), or set its start to 0 and its end to 100 in "
                "LoRA List",
            )
