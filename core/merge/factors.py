"""The factors of like modules: loaded in pieces that fit a processor's cache, or all at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from ..lowrank import LowRank

# Values of each factor in a piece on a CPU: as many as its caches hold while a piece is processed.
_PIECE = 250_000


class Factors(ABC):
    """Factors of `M` modules of one shape, in float32: ``A (M, P, d_in)`` and ``B (M, d_out, P)``.

    Args:
        shape: ``(M, P, d_in, d_out)``.
        device: Device that the factors are loaded to.
        short: Whether every value was stored in 16 bits or fewer.
    """

    def __init__(self, shape: tuple[int, int, int, int], device: torch.device, short: bool) -> None:
        self.shape, self.device, self.short = shape, device, short

    @cached_property
    def whole(self) -> tuple[Tensor, Tensor]:
        """`A` and `B` of all modules, loaded at once."""
        return self._load()

    @abstractmethod
    def _load(self) -> tuple[Tensor, Tensor]: ...

    @abstractmethod
    def tensors(self) -> Iterator[Tensor]:
        """The tensors that hold the factors, as they are stored."""

    @abstractmethod
    def only(self, modules: Sequence[int]) -> Factors:
        """The factors of the modules at these positions."""

    def pieces(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """A few modules at a time: their positions, and their `A` and `B`.

        The next piece may overwrite the tensors of the one before.
        """
        A, B = self.whole
        for span in self._spans():
            yield span, A[span], B[span]

    def _spans(self) -> list[slice]:
        M, P, d_in, d_out = self.shape
        step = M if self.device.type != "cpu" else max(1, _PIECE // (P * max(d_in, d_out)))
        return [slice(start, min(start + step, M)) for start in range(0, M, step)]


class InMemoryFactors(Factors):
    """Factors that were computed: ``A (M, P, d_in)``, ``B (M, d_out, P)``, float32."""

    def __init__(self, A: Tensor, B: Tensor) -> None:
        M, P, d_in = A.shape
        super().__init__((M, P, d_in, B.shape[1]), A.device, short=False)
        self._factors = A, B

    def _load(self) -> tuple[Tensor, Tensor]:
        return self._factors

    def tensors(self) -> Iterator[Tensor]:
        yield from self._factors

    def only(self, modules: Sequence[int]) -> InMemoryFactors:
        A, B = self._factors
        return InMemoryFactors(A[modules], B[modules])


class FileFactors(Factors):
    """Factors of adapters' files, read and converted every time they are used.

    Args:
        parts: For each module the updates of the adapters that have it. Their rows of `A` are stacked, their columns
            of `B` put side by side.
        device: Device to load the factors to.
    """

    def __init__(self, parts: Sequence[Sequence[LowRank]], device: torch.device) -> None:
        first = parts[0]
        shape = (len(parts), sum(part.rank for part in first), first[0].d_in, first[0].d_out)
        short = all(x.dtype.itemsize <= 2 for row in parts for part in row for x in (part.A, part.B))
        super().__init__(shape, device, short)
        self.parts = parts

    def _load(self) -> tuple[Tensor, Tensor]:
        if self.device.type == "cuda":
            return self._load_to_gpu()
        A, B = self._allocate(len(self.parts))
        _read(self.parts, A, B)
        return A.to(self.device), B.to(self.device)

    def _load_to_gpu(self) -> tuple[Tensor, Tensor]:
        """Copy the factors as they are stored, through pinned memory, and convert them there.

        torch keeps pinned memory for the next batch, and waits until a copy from it is finished: no more is used than
        for one batch per thread.
        """
        M, P, d_in, d_out = self.shape
        dtypes = {x.dtype for x in self.tensors()}
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        A = torch.empty(M, P, d_in, dtype=dtype, device="cpu", pin_memory=True)
        B = torch.empty(M, d_out, P, dtype=dtype, device="cpu", pin_memory=True)
        _read(self.parts, A, B)
        return A.to(self.device, non_blocking=True).float(), B.to(self.device, non_blocking=True).float()

    def tensors(self) -> Iterator[Tensor]:
        for row in self.parts:
            for part in row:
                yield from (part.A, part.B)

    def only(self, modules: Sequence[int]) -> FileFactors:
        return FileFactors([self.parts[m] for m in modules], self.device)

    def pieces(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        if self.device.type != "cpu" or "whole" in self.__dict__:
            yield from super().pieces()
            return
        spans = self._spans()
        A, B = self._allocate(spans[0].stop)
        for span in spans:
            A, B = A[: span.stop - span.start], B[: span.stop - span.start]
            _read(self.parts[span], A, B)
            yield span, A, B

    def _allocate(self, modules: int) -> tuple[Tensor, Tensor]:
        _, P, d_in, d_out = self.shape
        first = self.parts[0][0]
        A = first.A.new_empty(modules, P, d_in, dtype=torch.float32)
        return A, first.B.new_empty(modules, d_out, P, dtype=torch.float32)


def _read(parts: Sequence[Sequence[LowRank]], A: Tensor, B: Tensor) -> None:
    """Convert the factors of modules into ``A (M, P, d_in)`` and ``B (M, d_out, P)``."""
    # concatenated first: converting a few rows or columns at a time is several times slower
    A.flatten(0, 1).copy_(_concatenate([part.A for row in parts for part in row], 0))
    for row, B_m in zip(parts, B, strict=True):
        B_m.copy_(_concatenate([part.B for part in row], 1))


def _concatenate(factors: list[Tensor], dim: int) -> Tensor:
    return torch.cat(factors if len({x.dtype for x in factors}) == 1 else [x.float() for x in factors], dim)
