"""Sketches of second moments: a basis of the directions in which inputs are largest, and moments inside this basis."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor

from ..errors import MergeError
from .second_moments import flat_inputs

_Kind = TypeVar("_Kind")
_NOISE = 1e-5  # relative size below which an eigenvalue of a float32 sum is rounding noise
_OVERSAMPLING = 16  # columns of the random test matrix beyond the basis


class RangeSketch:
    """Accumulates ``G Omega`` for a weighted sum ``G`` of second moments and a random ``Omega (d_in, p)``.

    Args:
        width: Number of directions `q` of the basis to be found.
        seed: Random seed.

    Source: single-pass Nystrom approximation, Tropp, Yurtsever, Udell, Cevher, arXiv:1706.05736, algorithm 3.
    """

    def __init__(self, width: int, seed: int) -> None:
        self.width, self.seed, self.weight = width, seed, 1.0
        self._sketch: Tensor | None = None
        self._test: Tensor | None = None

    def add(self, X: Tensor) -> None:
        """Add ``weight * X^T X / n`` for inputs ``(..., d_in)``."""
        X = flat_inputs(X)
        if self._test is None:
            generator = torch.Generator().manual_seed(self.seed)
            columns = min(self.width + _OVERSAMPLING, X.shape[1])
            self._test = torch.randn(X.shape[1], columns, generator=generator).to(X)
        with torch.autocast(X.device.type, enabled=False):
            product = X.mT @ (X @ self._test)
        product *= self.weight / X.shape[0]
        self._sketch = product if self._sketch is None else self._sketch.add_(product)

    def basis(self) -> Tensor:
        """``Q (q, d_in)`` float64: orthonormal rows that span the leading eigenvectors of `G`.

        Raises:
            MergeError: Nothing was added, or values that are not finite.
        """
        if self._sketch is None or self._test is None or not torch.isfinite(self._sketch.sum()):
            raise MergeError(
                "The inputs of a layer cannot be measured.",
                expected="finite inputs",
                found="none" if self._sketch is None else "values that are not finite",
                remedy="check that the model and each LoRA work; lower the strengths, or use another dtype",
            )
        Y, test = self._sketch.cpu().double(), self._test.cpu().double()
        core = test.mT @ Y
        values, vectors = torch.linalg.eigh((core + core.mT) / 2)
        noise = _NOISE * float(values.abs().max()) or 1.0
        F = Y @ (vectors / values.clamp_min(noise).sqrt())  # G ~ F F^T
        Q, R = torch.linalg.qr(F)
        return (Q @ torch.linalg.svd(R).U[:, : self.width]).mT


class ProjectedMoments:
    """Accumulates the light second moments ``diag(Q C Q^T, rest)`` of inputs, see `core.merge.statistics`.

    Args:
        Q: The basis, ``(q, d_in)`` float32 with orthonormal rows.
    """

    def __init__(self, Q: Tensor) -> None:
        self.Q, self.n = Q, 0
        self._inside: Tensor | None = None
        self._square: Tensor | None = None

    def add(self, X: Tensor) -> None:
        """Add inputs ``(..., d_in)``."""
        X = flat_inputs(X)
        self.Q = self.Q.to(X)
        with torch.autocast(X.device.type, enabled=False):
            inside = X @ self.Q.mT
            product, square = inside.mT @ inside, X.square().sum()
        self._inside = product if self._inside is None else self._inside.add_(product)
        self._square = square if self._square is None else self._square.add_(square)
        self.n += X.shape[0]

    @property
    def value(self) -> Tensor:
        """``(q + 1, q + 1)`` float32 on the CPU.

        Raises:
            MergeError: Nothing was added.
        """
        if self._inside is None or self._square is None:
            raise MergeError("A module had no input while its statistics were measured.")
        q, d_in = self.Q.shape
        inside = self._inside.cpu() / self.n
        rest = (self._square.cpu() / self.n - inside.diagonal().sum()).clamp_min(0) / max(d_in - q, 1)
        return torch.block_diag(inside.float(), rest.float().view(1, 1))


def reduce_basis(
    Q: Tensor, moments: Mapping[_Kind, Tensor], weights: Mapping[_Kind, float], width: int
) -> tuple[Tensor, dict[_Kind, Tensor]]:
    """Keep the `width` directions of a basis in which a weighted sum of moments is largest.

    Args:
        Q: ``(p, d_in)`` with orthonormal rows.
        moments: Per kind, ``diag(Q C Q^T, rest) (p + 1, p + 1)``.
        weights: Weight of each kind.
        width: Number of directions `q`, at most `p`.

    Returns:
        The basis ``(q, d_in)`` float16 and the moments ``(q + 1, q + 1)`` float32.
    """
    p, d_in = Q.shape
    total = sum(weights[kind] * C[:-1, :-1].double() for kind, C in moments.items())
    U = torch.linalg.eigh(total).eigenvectors[:, -width:]
    reduced: dict[_Kind, Tensor] = {}
    for kind, C in moments.items():
        C = C.double()
        inside = U.mT @ C[:-1, :-1] @ U
        lost = C[:-1, :-1].trace() - inside.trace() + (d_in - p) * C[-1, -1]
        reduced[kind] = torch.block_diag(inside, (lost / max(d_in - width, 1)).view(1, 1)).float()
    return (U.mT @ Q.double()).half(), reduced
