"""Statistics: second moments of each module's inputs, the data a calibrated merge needs beside the LoRAs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..adapter import Adapter
from ..digest import identity
from ..errors import FormatError, MergeError
from ..fields import Converted, ReadOnly, read_only
from ..formats.files import read_tensors, write_tensors
from ..json_text import from_json

_KIND = "legomole.statistics.1"


@dataclass(frozen=True, eq=False)
class ModuleStatistics:
    """Second moments ``C = X^T X / n`` of one module's inputs, ``(d_in, d_in)`` each, by the concepts in the prompts.

    Args:
        own: Adapter's position -> `C` for prompts that name its concept alone.
        joint: Positions of two or more adapters, ascending -> `C` for prompts that name all their concepts.
        base: `C` for prompts that name no concept.

    Raises:
        MergeError: No matrix at all, matrices that are not square and of one size, or positions of `joint` that are
            not ascending.
    """

    own: ReadOnly[int, Tensor] = Converted(read_only, None)
    joint: ReadOnly[tuple[int, ...], Tensor] = Converted(read_only, None)
    base: Tensor | None = None

    def __post_init__(self) -> None:
        tensors = list(self.tensors())
        d_in = tensors[0].shape[-1] if tensors and tensors[0].ndim else 0
        if not tensors or any(C.shape != (d_in, d_in) or not C.is_floating_point() for C in tensors):
            raise MergeError(
                "The statistics of a module are not second moments of its inputs.",
                expected="at least one (d_in, d_in) matrix, all of one d_in",
                found=[tuple(C.shape) for C in tensors],
                remedy="measure the statistics again",
            )
        if any(len(group) < 2 or list(group) != sorted(set(group)) for group in self.joint):
            raise MergeError(
                "Joint statistics belong to two or more different LoRAs.",
                expected="ascending positions like (0, 1)",
                found=list(self.joint),
            )

    def tensors(self) -> Iterator[Tensor]:
        yield from self.own.values()
        yield from self.joint.values()
        if self.base is not None:
            yield self.base

    @property
    def d_in(self) -> int:
        return next(self.tensors()).shape[0]

    def at(self, place: Mapping[int, int]) -> ModuleStatistics:
        """The same with adapters renumbered by `place`; moments of adapters that are not in it are left out."""
        return ModuleStatistics(
            {place[i]: C for i, C in self.own.items() if i in place},
            {
                tuple(sorted(place[i] for i in group)): C
                for group, C in self.joint.items()
                if all(i in place for i in group)
            },
            self.base,
        )


@dataclass(frozen=True, eq=False)
class Statistics:
    """Statistics of all modules, measured with the adapters of one merge.

    Args:
        modules: Module name, as in the aligned adapters -> its moments.
        adapters: Identities of the adapters (`core.digest.identity`), in the order of positions.
        strengths: Strengths of the adapters during the measurement, in the same order.
        metadata: Description of the measurement: model, prompts, steps.
    """

    modules: Converted[Mapping[str, ModuleStatistics], Mapping[str, ModuleStatistics]] = Converted(read_only)
    adapters: tuple[str, ...] = ()
    strengths: tuple[float, ...] = ()
    metadata: ReadOnly[str, str] = Converted(read_only, None)

    def of(self, adapters: Sequence[Adapter]) -> Statistics:
        """The statistics with positions that refer to `adapters`, which are recognised by their identities.

        Raises:
            MergeError: An adapter that was not measured.
        """
        place: dict[int, int] = {}
        for i, adapter in enumerate(adapters):
            sha256 = identity(adapter)
            measured = [j for j, other in enumerate(self.adapters) if other == sha256 and j not in place]
            if not measured:
                raise MergeError(
                    "The statistics were not measured with this LoRA.",
                    file=adapter.source.path or None,
                    expected=f"a file with sha256 {', '.join(self.adapters) or '(none recorded)'}",
                    found=sha256,
                    remedy="measure the statistics again with the LoRAs you merge",
                )
            place[measured[0]] = i
        hashes = tuple(map(identity, adapters))
        strengths = tuple(self.strengths[j] for j in place) if self.strengths else ()  # by the new positions
        return Statistics({name: m.at(place) for name, m in self.modules.items()}, hashes, strengths, self.metadata)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, atomically. Tensors are named ``<module>/own/0``, ``/joint/0,1``, ``/base``.

        Moments that several modules share are written once; the header maps the other modules to the first.

        Raises:
            SaveError: See `write_tensors`; nothing is left behind.
        """
        tensors: dict[str, Tensor] = {}
        written: dict[object, str] = {}
        same: dict[str, str] = {}
        for name, moments in self.modules.items():
            own = {f"own/{i}": C for i, C in moments.own.items()}
            own |= {f"joint/{','.join(map(str, group))}": C for group, C in moments.joint.items()}
            own |= {} if moments.base is None else {"base": moments.base}
            first = written.setdefault(tuple((kind, id(C)) for kind, C in own.items()), name)
            if first != name:
                same[name] = first
            else:
                tensors |= {f"{name}/{kind}": C for kind, C in own.items()}
        header = {"kind": _KIND, "adapters": json.dumps(self.adapters), "measured": json.dumps(dict(self.metadata))}
        header |= {"strengths": json.dumps(self.strengths)} if self.strengths else {}
        write_tensors(Path(path), tensors, header | ({"same": json.dumps(same)} if same else {}))

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Read a file written by `save`; the tensors stay on disk until they are used.

        Raises:
            FormatError: Not a statistics file, or a damaged one.
            MergeError: Matrices that do not fit together.
        """
        tensors, header = read_tensors(Path(path))
        if header.get("kind") != _KIND:
            raise FormatError(
                "This file holds no statistics.", file=path, expected=_KIND, found=header.get("kind", "none")
            )
        tables: dict[str, dict[str, Any]] = {}
        try:
            for key, C in tensors.items():
                name, kind, *group = key.rsplit("/", 1 if key.endswith("/base") else 2)
                table = tables.setdefault(name, {"own": {}, "joint": {}, "base": None})
                if kind == "base":
                    table["base"] = C
                else:
                    positions = tuple(map(int, group[0].split(",")))
                    table[kind][positions if kind == "joint" else positions[0]] = C
            adapters = tuple(str(sha256) for sha256 in from_json(header["adapters"]))
            metadata = {str(key): str(value) for key, value in dict(from_json(header["measured"])).items()}
            strengths = tuple(map(float, from_json(header.get("strengths", "[]"))))
            if strengths and len(strengths) != len(adapters):
                raise ValueError(f"{len(adapters)} adapters, {len(strengths)} strengths")
            tables |= {name: tables[first] for name, first in from_json(header.get("same", "{}")).items()}
            modules = {name: ModuleStatistics(**table) for name, table in tables.items()}
        except MergeError:
            raise
        except (LookupError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
            raise _damaged(path, error) from error
        return cls(modules, adapters, strengths, metadata)

    @property
    def size(self) -> int:
        """Size in bytes; moments that several modules share count once."""
        tensors = {id(C): C for moments in self.modules.values() for C in moments.tensors()}
        return sum(C.numel() * C.element_size() for C in tensors.values())


def _damaged(path: object, error: Exception) -> FormatError:
    return FormatError("The statistics could not be read.", file=path, found=error, remedy="measure them again")
