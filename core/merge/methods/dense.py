"""The part shared by methods on dense deltas: one module at a time, then the nearest matrix of low rank."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ...lowrank import best_rank_k
from ...precision import matmul
from ..merged import Merged
from ..pool import Pool
from ..rank import Rank


def delta(pool: Pool, m: int, i: int) -> Tensor:
    """Dense delta ``scale * B @ A`` of the pool's adapter `i` in module `m`, without the user's weight."""
    A, B, scale = (pool.split(x, dim)[i] for x, dim in ((pool.A[m], 0), (pool.B[m], 1), (pool.scale[m], 0)))
    return matmul(B * scale.to(B), A)


def merge_dense(pool: Pool, rank: Rank, build: Callable[[int], Tensor]) -> Merged:
    """Let `build` make the dense result of each module, and keep its nearest rank-k matrix.

    Only one module is dense at any time, and one adapter of it: the memory needed is a few times ``d_out * d_in`` of
    the largest module, however many adapters there are.

    Args:
        pool: The units. rank: Merged rank; a share of the energy refers to the plain sum of the deltas.
        build: Position of a module in the pool -> its merged delta, ``(d_out, d_in)`` float32.
    """
    k = rank.resolve(pool).clamp_max(pool.max_rank)
    (M, _, d_in, d_out), n = pool.factors.shape, int(k.max())
    A, B = pool.A.new_zeros(M, n, d_in), pool.B.new_zeros(M, d_out, n)
    for m, k_m in enumerate(k.tolist()):
        A[m, :k_m], B[m, :, :k_m] = best_rank_k(build(m), k_m)
    return Merged(A, B, k)
