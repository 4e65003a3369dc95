"""The form of the tables: a family of models, its components, and the names that programs give to their layers.

The canonical name of a layer is that of its weight in ComfyUI, which is the prefix `Component.root` and a path. Paths
are written as templates in which ``#`` stands for the number of a block. All other namings say which rows of which
canonical weight a name means.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Literal

Reader = Literal["comfy", "diffusers", "kohya", "peft"]
READERS: tuple[Reader, ...] = ("comfy", "diffusers", "kohya", "peft")

Naming = Mapping[str, tuple[str, Mapping[str, str]]]
"""Block -> (canonical block, {names: canonical name}), all of them templates relative to their block.

Names are separated by spaces and divide the rows of the canonical weight between them, in proportion to the numbers
after its name: ``{"to_q to_k to_v": "qkv 3 1 1"}``. ``_`` is a part without a name. ``=`` means the same name. After
``swapped`` the two halves of the rows are exchanged, after ``swapped2`` only in layers with twice as many rows as
columns. Names that ComfyUI does not read begin with ``!``. Of several names of one layer the first is written.
"""

# Prefixes before the paths of diffusion models, in files of any program.
_MODEL_PREFIXES = (
    "unet.base_model.model.",
    "transformer.base_model.model.",
    "base_model.model.",
    "diffusion_model.",
    "transformer.",
    "unet.",
    "lora_transformer_",
    "lora_unet__",
    "lora_unet_",
    "lycoris_",
    "",
)
_FLAT_NUMBER = re.compile(r"(?<=_)\d+(?=_|$)")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
_ANY_NUMBER = re.compile(r"(?<=[._])(?:\d+|#)(?=[._]|$)")


@dataclass(frozen=True)
class Part:
    """The rows of a weight that one name means.

    Args:
        shares: Relative sizes of the parts into which the weight's rows are divided.
        index: Number of the part.
        swapped: Whether the name's rows are the weight's with the halves exchanged: ``True``, ``False``, or
            ``None`` if only in layers with twice as many rows as columns.
    """

    shares: tuple[int, ...] = (1,)
    index: int = 0
    swapped: bool | None = False

    @property
    def before(self) -> int:
        return sum(self.shares[: self.index])

    @property
    def share(self) -> int:
        return self.shares[self.index]


WHOLE = Part()


@dataclass(frozen=True)
class Slot:
    """A name of a layer in one naming: a path, the rows that it means, and whether ComfyUI reads it."""

    path: str
    part: Part
    comfy: bool = True


@dataclass(frozen=True)
class Dialect:
    """One spelling of a component's names.

    Args:
        prefix: Text before every path.
        readers: Programs that read it, of ``comfy``, ``kohya`` and ``diffusers``; for the latter these are the names
            of its models, although it converts some files with other names.
        naming: Key of `Component.namings`, ``""`` for canonical paths.
        flat: Whether the paths' dots are written as underscores.
    """

    prefix: str
    readers: frozenset[str]
    naming: str = ""
    flat: bool = False

    def spell(self, path: str) -> str:
        return self.prefix + (path.replace(".", "_") if self.flat else path)


def dialect(prefix: str, naming: str = "", *, flat: bool | None = None, readers: str = "") -> Dialect:
    """A dialect; `readers` are separated by spaces, and prefixes that end in ``_`` come before flat paths."""
    return Dialect(prefix, frozenset(readers.split()), naming, prefix.endswith("_") if flat is None else flat)


@dataclass(frozen=True, eq=False)
class Component:
    """A network of a family: its diffusion model or one of its text encoders.

    Args:
        root: Prefix of its canonical names.
        layers: Block -> canonical names of its layers, separated by spaces.
        dialects: All spellings; of those with equal readers the first is preferred.
        namings: Other names of the layers.
    """

    root: str
    layers: Mapping[str, str]
    dialects: tuple[Dialect, ...]
    namings: Mapping[str, Naming] = field(default_factory=dict[str, Naming])

    def find(self, path: str) -> tuple[str, Part] | None:
        """The canonical path that a dotted or underscored path of any naming means, and its rows."""
        form, numbers = _form_and_numbers(path)
        for template, canonical, part in _templates_by_form(self).get(form, ()):
            if all(mine in ("#", number) for mine, number in zip(template, numbers, strict=True)):
                return _fill(canonical, template, numbers), part
        return None

    @lru_cache(maxsize=32768)  # noqa: B019 -- the components are constants of the tables
    def slots(self, naming: str, path: str) -> tuple[Slot, ...]:
        """The names of a canonical path in one naming; each part once, by its first name."""
        if naming == "":
            return (Slot(path, WHOLE),)
        numbers = _NUMBER.findall(path)
        result: dict[tuple[tuple[int, ...], int], Slot] = {}
        for template, slot in _slots_by_form(self, naming).get(_NUMBER.sub("#", path), ()):
            if all(mine in ("#", number) for mine, number in zip(template, numbers, strict=True)):
                name = _fill(slot.path, template, numbers)
                result.setdefault((slot.part.shares, slot.part.index), Slot(name, slot.part, slot.comfy))
        return tuple(result.values())


def _fill(path: str, template: Sequence[str], numbers: Sequence[str]) -> str:
    """The path with the numbers for which the template has ``#``, in order."""
    free = iter([number for mine, number in zip(template, numbers, strict=True) if mine == "#"])
    return "".join(next(free) if letter == "#" else letter for letter in path)


@dataclass(frozen=True, eq=False)
class Family:
    """Models of one architecture, whose LoRAs can be merged with each other if their sizes agree.

    Args:
        name: A short name.
        model: The diffusion model.
        encoders: The text encoders.
        ratios: Canonical template -> ``d_out / d_in`` of the layer, where that tells families apart.
        widths: Canonical template's ending -> possible ``d_in``, where that tells families apart.
        depth: Block -> number of such blocks in all models of the family, where that tells families apart.
        hints: Words in the metadata of its LoRAs that name the base model.
    """

    name: str
    model: Component
    encoders: tuple[Component, ...] = ()
    ratios: Mapping[str, float] = field(default_factory=dict[str, float])
    widths: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    depth: Mapping[str, int] = field(default_factory=dict[str, int])
    hints: tuple[str, ...] = ()

    @property
    def components(self) -> tuple[Component, ...]:
        return (self.model, *self.encoders)

    def find(self, module: str) -> tuple[Component, str, Part] | None:
        """The component, canonical path and rows of a module in any dialect; ``None`` for an unknown name."""
        for prefix, component in _prefixes(self):
            if module.startswith(prefix):
                position = component.find(module.removeprefix(prefix))
                if position is not None:
                    return component, *position
        return None


@cache
def _prefixes(family: Family) -> tuple[tuple[str, Component], ...]:
    """All prefixes with the component to which names that begin with them may belong; longest first."""
    pairs = {(prefix, family.model): None for prefix in _MODEL_PREFIXES}
    for component in family.components:
        pairs |= {(spelling.prefix, component): None for spelling in component.dialects}
    return tuple(sorted(pairs, key=lambda pair: -len(pair[0])))


def _entries(naming: Naming) -> Iterator[tuple[str, str, Part, bool]]:
    """Name, canonical path, rows, and whether ComfyUI reads the name: all of them templates."""
    for block, (canonical_block, table) in naming.items():
        for names, target in table.items():
            canonical, *modifiers = target.split()
            shares = tuple(int(word) for word in modifiers if word.isdigit())
            swapped = True if "swapped" in modifiers else None if "swapped2" in modifiers else False
            for index, name in enumerate(names.split()):
                if name == "_":
                    continue
                path = name.lstrip("!")
                part = Part(shares or (1,), index if shares else 0, swapped)
                yield _join(block, path), _join(canonical_block, path if canonical == "=" else canonical), part, (
                    not name.startswith("!")
                )  # fmt: skip


def _join(block: str, name: str) -> str:
    return ".".join(filter(None, (block, name)))


@cache
def canonical_templates(component: Component) -> tuple[str, ...]:
    """The canonical paths of a component's layers, as templates."""
    return tuple(_join(block, name) for block, names in component.layers.items() for name in names.split())


@cache
def _templates_by_form(component: Component) -> dict[str, list[tuple[list[str], str, Part]]]:
    """Underscored form without numbers -> (numbers or ``#``, canonical template, rows)."""
    result: dict[str, list[tuple[list[str], str, Part]]] = defaultdict(list)
    for path in canonical_templates(component):
        result[_form(path)].append((_ANY_NUMBER.findall(path), path, WHOLE))
    for naming in component.namings.values():
        for name, canonical, part, _ in _entries(naming):
            result[_form(name)].append((_ANY_NUMBER.findall(name), canonical, part))
    for rows in result.values():
        rows.sort(key=lambda row: row[0].count("#"))  # a template with a number goes before one for any number
    return dict(result)


@lru_cache(maxsize=65536)
def _form_and_numbers(path: str) -> tuple[str, tuple[str, ...]]:
    """The underscored form of a path without numbers, and the numbers."""
    flat = path.replace(".", "_").rstrip("_")  # some exporters leave an underscore at the end
    return _FLAT_NUMBER.sub("#", flat), tuple(_FLAT_NUMBER.findall(flat))


def _form(path: str) -> str:
    return _ANY_NUMBER.sub("#", path).replace(".", "_")


@cache
def _slots_by_form(component: Component, naming: str) -> dict[str, list[tuple[list[str], Slot]]]:
    """Canonical path without numbers -> (numbers or ``#``, name)."""
    result: dict[str, list[tuple[list[str], Slot]]] = defaultdict(list)
    for name, canonical, part, comfy in _entries(component.namings[naming]):
        result[_ANY_NUMBER.sub("#", canonical)].append((_ANY_NUMBER.findall(canonical), Slot(name, part, comfy)))
    return dict(result)
