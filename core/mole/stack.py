"""Stack: the experts of one layer, side by side, so that mixing N of them costs two matrix products.

``z = [D_1; ..; D_N] x`` is taken once, every expert's slice of `z` is multiplied by its gate, and one product with
``[U_1 .. U_N]`` adds the result: ``y + sum_i g_i U_i D_i x``. Nothing of the size ``d_out x d_in`` is formed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..errors import MergeError
from ..layers.keymap import Spans
from ..lowrank import LowRank
from .gates import wide
from .mixture import Mixture


@dataclass(frozen=True, eq=False)
class ExpertSlice:
    """One expert's update of some output rows of a layer.

    Args:
        expert: Position of the expert.
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
    """The stacked factors of one layer. Buffers: they move and are cast with a module, and never get gradients.

    Args:
        parts: In any order; parts of the same rows are stacked together.
        d_out: Output rows of the layer.
        kernel: Of a convolution, ``()`` for a linear layer.
        dtype: Of the factors, default the widest of the parts'.

    Attributes:
        D: ``(R, d_in)``, or ``(R, channels, *kernel)``. owner: ``(R,)`` long, the expert of each row of `D`.
        layout: Equal for stacks that `spread` the same gates alike.
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
            self.register_buffer(f"U{n}", torch.cat(ups, 1).to(dtype or _widest(parts)))
        self.whole = len(self.groups) == 1 and self.groups[0][:2] == (0, d_out)
        D = torch.cat(downs).to(dtype or _widest(parts))
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
            return layer._conv_forward(x, D, None)  # type: ignore[operator] # the layer's own stride and padding
        return nn.functional.linear(x, D)

    def spread(self, g: Tensor, z: Tensor) -> Tensor:
        """Gates ``(B, N)``, or ``(1, N)`` for all samples, as one factor per unit; broadcasts with `z`.

        Gates of each position, ``(B, T, N)``, weigh the same positions of `z`, also where the layer sees them in a row.

        Raises:
            MergeError: Gates of each position, and other positions here.
        """
        if g.ndim > 2:
            return self._positions(g, z).to(z).index_select(-1, self.owner.to(z.device))
        g = fit_batch(g, z.shape[0]).to(z).index_select(1, self.owner.to(z.device))
        rest = (1,) * (z.ndim - 2)
        return g.view(*g.shape, *rest) if self.kernel else g.view(g.shape[0], *rest, g.shape[1])

    def _positions(self, g: Tensor, z: Tensor) -> Tensor:
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
        """`z` with every expert's slice times its gate, see `spread`."""
        return z * self.spread(g, z)

    def add(self, y: Tensor, z: Tensor, *, in_place: bool = False) -> Tensor:
        """``y + U z`` in the dtype of `y`.

        Args:
            y: Output of the layer. z: From `down`, already gated.
            in_place: Write the sum into `y`, which saves a copy. Allowed without gradients (the layer may have saved
                `y` for its backward pass) and if nothing else uses `y`.
        """
        Y = y.flatten(2) if self.kernel else y.flatten(0, -2)  # (B, d_out, positions), or (positions, d_out)
        Y = Y if in_place else Y.clone()
        Z = z if z.dtype == y.dtype else z.to(y.dtype)
        Z = Z.flatten(2) if self.kernel else Z.flatten(0, -2)
        if self.whole:
            self._add(Y, Z, self.U0)
        else:
            for (start, stop, a, b), U in zip(self.groups, self.U, strict=True):
                self._add(Y[:, start:stop], Z[:, a:b], U)
        return Y.view_as(y)

    def _add(self, Y: Tensor, Z: Tensor, U: Tensor) -> None:
        """``Y += U Z`` in place, `Y` and `Z` flattened as in `add`."""
        U = _like(U, Y)
        if self.kernel:
            Y.baddbmm_(U.expand(Y.shape[0], -1, -1), Z)
        else:
            Y.addmm_(Z, U.mT)

    def normalised(self, z: Tensor, experts: int) -> Tensor:
        """The experts' outputs in rank space, normalised: ``z / rho``, ``(B, T, R)``, at least float32.

        ``rho`` is the root mean square of the concatenated outputs ``E_1(x) .. E_N(x)`` of a position, found from
        ``|U_i z_i|^2 = z_i^T (U_i^T U_i) z_i`` without forming them. Any linear map of the normalised outputs is then a
        linear map of this: ``e (E / rho) = (e U) (z / rho)``.

        Args:
            z: From `down`. experts: Number of experts `N`.

        Source: arXiv:2404.13628 eq. 5 (normalisation of the concatenated outputs; which one is left open there).
        """
        z = wide(z.flatten(2).mT if self.kernel else z.flatten(1, -2) if z.ndim > 2 else z[:, None])
        square = z.new_zeros(z.shape[:2])
        for (_, _, a, b), U in zip(self.groups, self.U, strict=True):
            same = self.owner[a:b, None] == self.owner[None, a:b]
            U = wide(U)
            K = (U.mT @ U).to(z) * same.to(z.device)  # the experts' own Gram matrices
            square = square + ((z[..., a:b] @ K) * z[..., a:b]).sum(-1)
        # bounded before the root, which has no gradient at 0: where experts add nothing, or less than rounding tells
        rho = (square / (experts * self.d_out)).clamp_min(1e-12).sqrt()
        return z / rho[..., None]

    def by_expert(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """`z` ``(.., R)`` with the units sorted by expert, and the owners ``(R,)`` in that order."""
        if len(self.groups) == 1:
            return z, self.owner
        order = torch.argsort(self.owner, stable=True)
        return z[..., order.to(z.device)], self.owner[order]


def fit_batch(g: Tensor, batch: int) -> Tensor:
    """Gates ``(B, N)`` for a layer that sees `batch` rows: frames or windows of a sample follow each other.

    A layer that sees one row for all samples gets their mean: it cannot serve each its own. Gates of each position,
    ``(B, T, N)``, stay as they are.
    """
    if g.ndim > 2:
        return g
    if g.shape[0] in (1, batch):
        return g
    if batch % g.shape[0] == 0:
        return g.repeat_interleave(batch // g.shape[0], 0)
    return g.mean(0, keepdim=True)


def stacks(
    mixture: Mixture, layers: Mapping[str, nn.Module], place_of: Mapping[str, tuple[str, int, int, Spans | None]]
) -> dict[str, Stack]:
    """The stack of every adapted layer.

    Args:
        mixture: What to stack; its scale and strengths are folded in.
        layers: Path -> layer; the stacks come in this order.
        place_of: Module name -> path, first row, last row, row order.

    Raises:
        MergeError: An update that does not fit its layer, or a layer of a kind that cannot be mixed.
    """
    parts: dict[str, list[ExpertSlice]] = {}
    for i, (adapter, strength) in enumerate(zip(mixture.experts, mixture.strengths, strict=True)):
        for name, update in adapter.modules.items():
            if name in place_of:
                path, start, stop, order = place_of[name]
                _check(layers[path], update, start, stop, f"{path} ({adapter.label})")
                parts.setdefault(path, []).append(ExpertSlice(i, update, start, stop, strength * mixture.scale, order))
    built: dict[str, Stack] = {}
    for path, layer in layers.items():
        if path not in parts:
            continue
        kernel = tuple(layer.kernel_size) if isinstance(layer, _ConvNd) else ()
        built[path] = Stack(parts[path], rows_of(layer) or max(part.stop for part in parts[path]), kernel)
    return built


def rows_of(layer: nn.Module) -> int | None:
    """Output rows of a linear layer or convolution; ``None`` where the layer does not say."""
    for name in ("out_features", "out_channels", "nf"):  # nf: the transposed linear layer of GPT-2
        if isinstance(rows := getattr(layer, name, None), int):
            return rows
    return None


def _check(layer: nn.Module, update: LowRank, start: int, stop: int, module: str) -> None:
    if isinstance(layer, (nn.Embedding, NonDynamicallyQuantizableLinear)):
        raise MergeError(
            "A layer that is used through its weight alone cannot be mixed at run time.",
            module=module,
            found=type(layer).__name__,
            remedy="merge these LoRAs instead, or leave this layer out of them",
        )
    rows, width = rows_of(layer), getattr(layer, "in_features", getattr(layer, "nx", None))
    if isinstance(layer, _ConvNd):
        width = layer.in_channels * math.prod(layer.kernel_size)
        if layer.groups != 1 or layer.transposed:
            raise MergeError(
                "A grouped or transposed convolution cannot be mixed.",
                module=module,
                remedy="merge these LoRAs instead, or give this layer a weight of 0",
            )
    fits = update.d_out == stop - start and (rows is None or stop <= rows) and width in (None, update.d_in)
    if not fits:
        raise MergeError(
            "The LoRA was made for another base model: one of its layers has a different shape.",
            module=module,
            expected=f"(d_out, d_in) = {(stop - start, width)}",
            found=(update.d_out, update.d_in),
            remedy="use the base model the LoRA was trained for",
        )


def _like(factor: Tensor, x: Tensor) -> Tensor:
    """`factor` on the device and in the dtype of `x`."""
    # compared first: even a ``to`` that changes nothing takes longer
    return factor if factor.dtype == x.dtype and factor.device == x.device else factor.to(x.device, x.dtype)


def _widest(parts: Sequence[ExpertSlice]) -> torch.dtype:
    dtype = parts[0].update.dtype
    for part in parts[1:]:
        dtype = torch.promote_types(dtype, part.update.dtype)
    return dtype
