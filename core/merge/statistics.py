"""Statistics: second moments of each module's inputs, the data a calibrated merge needs beside the LoRAs.

Full statistics hold the matrices ``C = X^T X / n (d_in, d_in)``. Light statistics hold a sketch of them: a basis
``Q (q, d_in)`` of the directions in which inputs of all kinds are largest, and for each kind the matrix inside this
basis, ``Q C Q^T``. In all other directions `C` is replaced by a multiple of the identity with the same trace:

    C ~ Q^T (Q C Q^T) Q + rest (I - Q^T Q)

Sums, multiples and inverses of such matrices have the same form, so a calibrated merge computes with ``(q + 1)^2``
values instead of ``d_in^2``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
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
    """Second moments of one module's inputs, by the concepts in the prompts.

    Args:
        own: Adapter's position -> moments for prompts that name its concept alone.
        joint: Positions of two or more adapters, ascending -> moments for prompts that name all their concepts.
        base: Moments for prompts that name no concept.
        basis: ``Q (q, d_in)`` with orthonormal rows, any floating dtype; ``None`` for full statistics.

    Moments are ``(n, n)`` matrices: ``C`` itself, ``n = d_in``; or with a basis ``diag(Q C Q^T, rest)``, ``n = q + 1``.

    Raises:
        MergeError: No matrix at all, matrices that are not square, not of one size or do not fit the basis, or
            positions of `joint` that are not ascending.
    """

    own: ReadOnly[int, Tensor] = Converted(read_only, None)
    joint: ReadOnly[tuple[int, ...], Tensor] = Converted(read_only, None)
    base: Tensor | None = None
    basis: Tensor | None = None

    def __post_init__(self) -> None:
        moments = list(self.moments())
        n = moments[0].shape[-1] if moments and moments[0].ndim else 0
        fits = self.basis is None or (self.basis.ndim == 2 and n == self.basis.shape[0] + 1 and self.basis.shape[1] > 0)
        if not moments or not fits or any(C.shape != (n, n) or not C.is_floating_point() for C in moments):
            raise MergeError(
                "The statistics of a module are not second moments of its inputs.",
                expected="at least one (d_in, d_in) matrix, all of one d_in; or (q + 1, q + 1) and a (q, d_in) basis",
                found=[tuple(C.shape) for C in self.tensors()],
                remedy="measure the statistics again",
            )
        if any(len(group) < 2 or list(group) != sorted(set(group)) for group in self.joint):
            raise MergeError(
                "Joint statistics belong to two or more different LoRAs.",
                expected="ascending positions like (0, 1)",
                found=list(self.joint),
            )

    def moments(self) -> Iterator[Tensor]:
        yield from self.own.values()
        yield from self.joint.values()
        if self.base is not None:
            yield self.base

    def tensors(self) -> Iterator[Tensor]:
        yield from self.moments()
        if self.basis is not None:
            yield self.basis

    @property
    def d_in(self) -> int:
        return next(self.moments()).shape[0] if self.basis is None else self.basis.shape[1]

    @property
    def light(self) -> bool:
        return self.basis is not None

    def space(self, A: Tensor) -> InputSpace:
        """The rows ``A (P, d_in)`` float64 in the coordinates of the moments."""
        if self.basis is None:
            return InputSpace(A, A, None)
        Q = orthonormal(self.basis.to(A)).mT
        X = A @ Q
        return InputSpace(A, torch.cat([X, torch.ones_like(X[:, :1])], 1), Q.mT)

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
            self.basis,
        )


@dataclass(frozen=True, eq=False)
class InputSpace:
    """Rows of `A` in the coordinates of a module's moments, see `ModuleStatistics.space`.

    Args:
        A: ``(P, d_in)``.
        X: ``(P, n)``: `A` itself; or with a basis ``[A Q^T, 1]``. Its last column stands for the part of each row
            outside the basis, which moments only scale.
        Q: The basis, ``(q, d_in)``.
    """

    A: Tensor
    X: Tensor
    Q: Tensor | None

    @cached_property
    def outside(self) -> Tensor:
        """``A (I - Q^T Q)``: zero for full statistics."""
        return torch.zeros_like(self.A) if self.Q is None else self.A - self.X[:, :-1] @ self.Q

    def rows(self, X: Tensor) -> Tensor:
        """The rows ``(P, d_in)`` with coordinates ``X (P, n)``."""
        return X if self.Q is None else X[:, :-1] @ self.Q + X[:, -1:] * self.outside

    def gram(self, C: Tensor) -> Tensor:
        """``A C A^T (P, P)`` for moments ``C (n, n)``."""
        if self.Q is None:
            return self.X @ C @ self.X.mT
        X = self.X[:, :-1]
        return X @ C[:-1, :-1] @ X.mT + C[-1, -1] * self._outside_gram

    @cached_property
    def _outside_gram(self) -> Tensor:
        return self.outside @ self.outside.mT

    def mean(self, C: Tensor) -> Tensor:
        """Mean eigenvalue of moments ``C (n, n)``, a scalar."""
        diagonal = C.diagonal()
        if self.Q is None:
            return diagonal.mean()
        q, d_in = self.Q.shape
        return (diagonal[:-1].sum() + (d_in - q) * diagonal[-1]) / d_in


def orthonormal(basis: Tensor) -> Tensor:
    """Make rows ``(q, d)`` orthonormal that are so up to the rounding of a short dtype; each keeps its sign."""
    Q, R = torch.linalg.qr(basis.mT)
    return (Q * R.diagonal().sign()).mT


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
        """Write a safetensors file, atomically. Tensors are named ``<module>/own/0``, ``/joint/0,1``, ``/base``,
        ``/basis``.

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
            own |= {} if moments.basis is None else {"basis": moments.basis}
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
                name, kind, *group = key.rsplit("/", 1 if key.endswith(("/base", "/basis")) else 2)
                table = tables.setdefault(name, {"own": {}, "joint": {}, "base": None, "basis": None})
                if kind in ("base", "basis"):
                    table[kind] = C
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
