"""Stack: the experts of one layer side by side, so that mixing N of them costs two matrix products.

``z = [D_1; ..; D_N] x`` is computed once, every expert's slice of `z` is multiplied by its gate, and one product with
``[U_1 .. U_N]`` adds the result: ``y + sum_i g_i U_i D_i x``. No matrix of size ``d_out x d_in`` is formed.

Source: arXiv:2404.13628 eq. 5 to 8 at the level of each layer (delta mixing): ``U_i D_i = strength_i scale_i B_i A_i``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..errors import MergeError
from ..layers.keymap import Spans
from ..lowrank import LowRank
from .concepts import at_least_float32


@dataclass(frozen=True, eq=False)
class ExpertSlice:
    """One expert's update of some output rows of a layer.

    Args:
        expert: Index of the expert.
        update: Its factors; ``B`` has one row per output row ``start .. stop``.
        weight: Strength of the expert, multiplied into the stacked factors together with its ``alpha / rank``.
        order: Row permutation, see `core.layers.keymap.ParameterSlice`.
    """

    expert: int
    update: LowRank
    start: int
    stop: int
    weight: float = 1.0
    order: Spans | None = None


class Stack(nn.Module):
    """The stacked factors of one layer, as buffers: they are moved and cast with a module, and get no gradients.

    Args:
        parts: In any order; parts of the same rows are stacked together.
        d_out: Output rows of the layer.
        kernel: Kernel size of a convolution, ``()`` for a linear layer.
        dtype: Dtype of the factors; default the widest dtype of the parts.

    Attributes:
        D: ``(R, d_in)``, or ``(R, channels, *kernel)``.
        owner: ``(R,)`` long, the expert of each row of `D`.
        layout: Equal for stacks with equal results of `unit_gates`.
        whole: Whether all parts cover all output rows.
    """

    D: Tensor
    U0: Tensor
    owner: Tensor

    def __init__(
        self,
        parts: Sequence[ExpertSlice],
        d_out: int,
        kernel: tuple[int, ...] = (),
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        parts = sorted(parts, key=lambda part: (part.start, part.stop, part.expert))
        downs: list[Tensor] = []
        self.groups: list[tuple[int, int, int, int]] = []  # (first row, last row, first unit, last unit) of each U
        self.d_out, self.kernel = d_out, kernel
        self.layout = (bool(kernel), *((part.expert, part.update.rank) for part in parts))
        units = 0
        for n, ((start, stop), members) in enumerate(groupby(parts, key=lambda part: (part.start, part.stop))):
            ups: list[Tensor] = []
            first = units
            for part in members:
                c = part.weight * part.update.scale
                A, B = part.update.A.float(), part.update.B.float()
                if part.order is not None:
                    B = torch.cat([B[a:b] for a, b in part.order])
                downs.append(math.sqrt(abs(c)) * A)
                ups.append(math.copysign(math.sqrt(abs(c)), c) * B)
                units += part.update.rank
            self.groups.append((start, stop, first, units))
            self.register_buffer(f"U{n}", torch.cat(ups, 1).to(dtype or _widest_dtype(parts)))
        self.whole = len(self.groups) == 1 and self.groups[0][:2] == (0, d_out)
        D = torch.cat(downs).to(dtype or _widest_dtype(parts))
        self.register_buffer("D", D.unflatten(1, (-1, *kernel)) if kernel else D)
        owner = torch.tensor([part.expert for part in parts for _ in range(part.update.rank)])
        self.register_buffer("owner", owner)

    @property
    def U(self) -> list[Tensor]:
        """One ``(rows, units)`` per group of output rows."""
        return [getattr(self, f"U{n}") for n in range(len(self.groups))]

    def down(self, layer: nn.Module, x: Tensor) -> Tensor:
        """``z = D x``: ``(B, .., R)`` for a linear layer, ``(B, R, ..)`` for a convolution."""
        D = _like(self.D, x)
        if self.kernel:
            return cast(_ConvNd, layer)._conv_forward(x, D, None)  # the layer's own stride and padding
        return nn.functional.linear(x, D)

    def unit_gates(self, g: Tensor, z: Tensor) -> Tensor:
        """Gates as one factor per unit, which broadcasts with `z`.

        Args:
            g: ``(B, N)``, ``(1, N)`` for all samples, or ``(B, T, N)`` for each position, which may also be all
                positions of a layer that sees them in one row.
            z: Result of `down`.

        Raises:
            MergeError: Gates for each position, and other positions in `z`.
        """
        if g.ndim > 2:
            return self._match_positions(g, z).to(z).index_select(-1, self.owner.to(z.device))
        g = fit_batch(g, z.shape[0]).to(z).index_select(1, self.owner.to(z.device))
        rest = (1,) * (z.ndim - 2)
        return g.view(*g.shape, *rest) if self.kernel else g.view(g.shape[0], *rest, g.shape[1])

    def _match_positions(self, g: Tensor, z: Tensor) -> Tensor:
        if self.kernel or g.shape[:-1].numel() != z.shape[:-1].numel():
            raise MergeError(
                "A gate per token was opened for other positions than a layer in its scope sees.",
                expected=f"{tuple(g.shape[:-1])} positions",
                found="an image" if self.kernel else tuple(z.shape[:-1]),
                remedy="choose granularity matrix, whose gates each read the layer they weigh, or gates that read "
                "something else",
            )
        return g.reshape(*z.shape[:-1], g.shape[-1])

    def gated(self, z: Tensor, g: Tensor) -> Tensor:
        """`z` with every expert's slice multiplied by its gate, see `unit_gates`."""
        return z * self.unit_gates(g, z)

    def add(self, y: Tensor, z: Tensor, *, in_place: bool = False) -> Tensor:
        """``y + U z`` in the dtype of `y`.

        Args:
            y: Output of the layer. z: Result of `gated`.
            in_place: Write the sum into `y`, which saves a copy. Allowed without gradients (the layer may have saved
                `y` for its backward pass) and if nothing else uses `y`.
        """
        Y = y.flatten(2) if self.kernel else y.flatten(0, -2)  # (B, d_out, positions), or (positions, d_out)
        Y = Y if in_place else Y.clone()
        Z = z if z.dtype == y.dtype else z.to(y.dtype)
        Z = Z.flatten(2) if self.kernel else Z.flatten(0, -2)
        if self.whole:
            self._add_in_place(Y, Z, self.U0)
        else:
            for (start, stop, a, b), U in zip(self.groups, self.U, strict=True):
                self._add_in_place(Y[:, start:stop], Z[:, a:b], U)
        return Y.view_as(y)

    def _add_in_place(self, Y: Tensor, Z: Tensor, U: Tensor) -> None:
        """``Y += U Z``, `Y` and `Z` flattened as in `add`."""
        U = _like(U, Y)
        if self.kernel:
            Y.baddbmm_(U.expand(Y.shape[0], -1, -1), Z)
        else:
            Y.addmm_(Z, U.mT)

    def normalised_outputs(self, z: Tensor, experts: int) -> Tensor:
        """The experts' outputs, concatenated and normalised, in rank space: ``z / rho``, ``(B, T, R)``.

        ``rho`` is the root mean square of the concatenated outputs ``E_1(x) .. E_N(x)`` of a position, computed as
        ``|U_i z_i|^2 = z_i^T (U_i^T U_i) z_i`` without forming them. Any linear map of the normalised outputs is a
        linear map of the result: ``e (E / rho) = (e U) (z / rho)``. At least float32.

        Args:
            z: Result of `down`. experts: Number of experts `N`.

        Source: arXiv:2404.13628 eq. 5, which leaves open which normalisation.
        """
        z = at_least_float32(z.flatten(2).mT if self.kernel else z.flatten(1, -2) if z.ndim > 2 else z[:, None])
        square = z.new_zeros(z.shape[:2])
        for (_, _, a, b), U in zip(self.groups, self.U, strict=True):
            same_expert = self.owner[a:b, None] == self.owner[None, a:b]
            U = at_least_float32(U)
            K = (U.mT @ U).to(z) * same_expert.to(z.device)  # each expert's own Gram matrix
            square = square + ((z[..., a:b] @ K) * z[..., a:b]).sum(-1)
        # bounded before the root, which has no gradient at 0: experts may add nothing, or less than rounding errors
        rho = (square / (experts * self.d_out)).clamp_min(1e-12).sqrt()
        return z / rho[..., None]

    def by_expert(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """`z` ``(.., R)`` with the units sorted by expert, and the owners ``(R,)`` in that order."""
        if len(self.groups) == 1:
            return z, self.owner
        order = torch.argsort(self.owner, stable=True)
        return z[..., order.to(z.device)], self.owner[order]


def fit_batch(g: Tensor, batch: int) -> Tensor:
    """Gates ``(B, N)`` for a layer whose input has `batch` rows: the frames or windows of a sample follow each other.

    A layer that sees one row for all samples gets the mean of their gates. Gates for each position, ``(B, T, N)``, are
    returned as they are.
    """
    if g.ndim > 2:
        return g
    if g.shape[0] in (1, batch):
        return g
    if batch % g.shape[0] == 0:
        return g.repeat_interleave(batch // g.shape[0], 0)
    return g.mean(0, keepdim=True)


def _like(factor: Tensor, x: Tensor) -> Tensor:
    """`factor` on the device and in the dtype of `x`."""
    # compared first: even a ``to`` that changes nothing takes longer
    return factor if factor.dtype == x.dtype and factor.device == x.device else factor.to(x.device, x.dtype)


def _widest_dtype(parts: Sequence[ExpertSlice]) -> torch.dtype:
    dtype = parts[0].update.dtype
    for part in parts[1:]:
        dtype = torch.promote_types(dtype, part.update.dtype)
    return dtype
