"""The work of a merge: modules of one shape and rank in batches, each of which can be merged anywhere on its own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ..adapter import Adapter
from ..errors import MergeError, name_some
from ..lowrank import LowRank
from ..memory import report_out_of_memory
from .account import ModuleAccount, account_batch
from .cache import GramCache
from .clustering import cluster_sizes
from .factors import FileFactors
from .findings.measure import LayerValues, layer_values
from .merged import Merged, relative_error
from .methods import MergeMethod
from .pool import Pool, overlap
from .rank import Rank
from .remedies import CappedLayer, cap_parts
from .report import ModuleReport
from .statistics import Statistics

# Values in the factors of a batch; bounds the memory beside inputs and output.
_BATCH_VALUES = 16_000_000


@dataclass(frozen=True)
class ModuleBatch:
    """Modules that are merged together.

    Args:
        names: Module names. adapters: Positions of the adapters that have them. ranks: Ranks of these adapters.
    """

    names: tuple[str, ...]
    adapters: tuple[int, ...]
    ranks: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class BatchResult:
    """Result of a batch.

    Args:
        modules: Updates of its modules. reports: Their reports.
        remarks: Remarks on some of them, see `Merged`.
        accounts: What merges are predicted to keep, where there are statistics.
        values: Layer -> values for findings.
        capped: Layers whose singular values were lowered.
    """

    modules: Mapping[str, LowRank]
    reports: tuple[ModuleReport, ...]
    remarks: Mapping[str, str]
    accounts: tuple[ModuleAccount, ...] = ()
    values: Mapping[str, LayerValues] = field(default_factory=dict[str, LayerValues])
    capped: tuple[CappedLayer, ...] = ()


@dataclass(frozen=True, eq=False)
class BatchMerger:
    """Merges batches. It holds no adapter, so it can be sent to another machine that opens the adapters itself.

    Args:
        method: See `merge`.
        weights: Per adapter, the weight of each module.
        dtype: Dtype of the merged factors. device: Device to compute on.
        cache: Values from earlier merges.
        statistics: Statistics to predict with what merges keep, if there are any.
        cap: Limit of singular values, see `remedies.cap_limits`; ``None`` for none.
    """

    method: MergeMethod
    weights: Sequence[Mapping[str, float]]
    dtype: torch.dtype
    device: torch.device
    cache: GramCache | None = None
    statistics: Statistics | None = None
    cap: float | None = None

    @torch.no_grad()
    def __call__(self, adapters: Sequence[Adapter], batch: ModuleBatch) -> BatchResult:
        """Merge a batch. The same adapters and batch give the same values.

        Raises:
            MergeError: Values that cannot be decomposed, a result that overflows the dtype, too little memory, or an
                error of the method.
            FormatError: NaN in an input.
        """
        with report_out_of_memory():
            pool, capped = pool_of(adapters, batch, self.weights, self.device, cache=self.cache, cap=self.cap)
            merged = self._merge(pool)
            if self.cache is not None:
                self.cache.store(batch, pool)
            modules = dict(_updates(adapters, pool, merged, self.dtype))
            reports = tuple(_module_reports(pool, merged, self.dtype, self._lost(adapters, batch)))
            accounts = tuple(self._accounts(pool, merged))
            values = layer_values(pool, reports)
            return BatchResult(modules, reports, dict(merged.remarks), accounts, values, tuple(capped))

    def _accounts(self, pool: Pool, merged: Merged) -> Sequence[ModuleAccount]:
        if self.statistics is None:
            return ()
        return account_batch(pool, merged, getattr(self.method, "rank", None) or Rank(1, "x"), self.statistics)

    def _lost(self, adapters: Sequence[Adapter], batch: ModuleBatch) -> torch.Tensor | None:
        """Energy that approximations at reading cut off from each module's deltas, ``(M, N)``; ``None`` for nothing."""
        lost = [
            [self.weights[i][name] ** 2 * adapters[i].modules[name].lost for i in batch.adapters]
            for name in batch.names
        ]
        return torch.tensor(lost, dtype=torch.float64) if any(map(any, lost)) else None

    def _merge(self, pool: Pool) -> Merged:
        try:
            return self.method(pool)
        except torch.linalg.LinAlgError as error:  # values whose products are not finite  # pyright: ignore[reportPrivateImportUsage]
            raise MergeError(
                "The values of a module are too large or too small to be decomposed.",
                module=name_some(pool.names, 3),
                found=f"weights times scales up to {float(pool.c.abs().max()):g}, factors up to "
                f"{max(float(pool.A.abs().max()), float(pool.B.abs().max())):g}",
                remedy="lower the weights; a LoRA with such values is broken",
            ) from error


def pool_of(
    adapters: Sequence[Adapter],
    batch: ModuleBatch,
    weights: Sequence[Mapping[str, float]],
    device: torch.device,
    *,
    cache: GramCache | None = None,
    cap: float | None = None,
) -> tuple[Pool, list[CappedLayer]]:
    """The units of a batch, and the layers whose singular values were lowered.

    Gram matrices are computed, and checked to be finite.

    Args:
        adapters, batch: See `BatchMerger`. weights, device, cache, cap: Its fields.
    """
    parts = [[adapters[i].modules[name] for i in batch.adapters] for name in batch.names]
    table = torch.tensor([[weights[i][name] for i in batch.adapters] for name in batch.names], dtype=torch.float64)
    pool = _pool(parts, batch, table, device)
    if cache is not None:
        cache.restore(batch, pool)
    # a unit's square sums all its values, and in float64 no square of a float32 overflows
    if not all(torch.isfinite(G.diagonal(dim1=1, dim2=2).sum()) for G in (pool.G_A, pool.G_B)):
        for i in batch.adapters:
            adapters[i].check_finite()
    if cap is None:
        return pool, []
    capped_parts, capped = cap_parts(pool, parts, cap)
    return (_pool(capped_parts, batch, table, device) if capped else pool), capped


def _pool(parts: Sequence[Sequence[LowRank]], batch: ModuleBatch, weights: torch.Tensor, device: torch.device) -> Pool:
    scales = torch.tensor([[part.scale for part in row] for row in parts], dtype=torch.float64)
    return Pool(
        names=batch.names,
        factors=FileFactors(parts, device),
        scale=scales.repeat_interleave(torch.tensor(batch.ranks), 1).to(device),
        weights=weights.to(device),
        ranks=batch.ranks,
        adapters=batch.adapters,
    )


def plan_batches(
    adapters: Sequence[Adapter], weights: Sequence[Mapping[str, float]], size: int | None = None
) -> list[ModuleBatch]:
    """Group modules of one shape and rank into batches that are small enough to bound memory.

    Modules that have weight 0 in every adapter are in none.

    Args:
        adapters: Adapters under common names. weights: Per adapter, the weight of each module.
        size: Number of modules per batch, for methods that spend long on a module: progress is reported, and a merge
            can be cancelled, after every batch.

    Raises:
        MergeError: Modules of different shape under one name.
    """
    groups: dict[tuple[tuple[int, int], tuple[int, ...], tuple[int, ...]], list[str]] = defaultdict(list)
    for name in sorted({name for adapter in adapters for name in adapter.modules}):
        positions = [i for i, adapter in enumerate(adapters) if name in adapter.modules and weights[i][name]]
        if not positions:
            continue
        parts = [adapters[i].modules[name] for i in positions]
        shapes = {(part.d_out, part.d_in) for part in parts}
        if len(shapes) > 1:
            raise MergeError(
                "The LoRAs do not fit the same base model: one module has different shapes.",
                module=name,
                expected="the same (d_out, d_in) in every LoRA",
                found=", ".join(
                    f"{(part.d_out, part.d_in)} in {adapters[i].label}"
                    for i, part in zip(positions, parts, strict=True)
                ),
                remedy="merge only LoRAs trained on one base model (e.g. all SDXL)",
            )
        groups[shapes.pop(), tuple(positions), tuple(part.rank for part in parts)].append(name)
    batches: list[ModuleBatch] = []
    for ((d_out, d_in), positions, ranks), names in groups.items():
        step = size or max(1, _BATCH_VALUES // (sum(ranks) * (d_in + d_out)))
        batches += [ModuleBatch(tuple(names[i : i + step]), positions, ranks) for i in range(0, len(names), step)]
    return batches


def _updates(
    adapters: Sequence[Adapter], pool: Pool, merged: Merged, dtype: torch.dtype
) -> Iterator[tuple[str, LowRank]]:
    """The update of each module in `dtype`, on the CPU."""
    # only the largest or smallest value can overflow; NaN counts as both
    extremes = torch.stack([*merged.A.aminmax(), *merged.B.aminmax()]).to(dtype)
    if not torch.isfinite(extremes).all():
        for m, name in enumerate(pool.names):
            largest = torch.maximum(merged.A[m].abs().max(), merged.B[m].abs().max())
            if not torch.isfinite(largest.to(dtype)):
                raise overflow_error(name, dtype, largest.item())
    A, B = merged.A.to(device="cpu", dtype=dtype), merged.B.to(device="cpu", dtype=dtype)
    k = A.shape[1]
    for m, (name, rank) in enumerate(zip(pool.names, merged.ranks.tolist(), strict=True)):
        # copied where a view would keep the unused rows of the whole batch in memory
        A_m, B_m = (A[m], B[m]) if rank == k else (A[m, :rank].clone(), B[m, :, :rank].contiguous())
        kernel = max((adapters[i].modules[name].kernel for i in pool.adapters), key=len)
        yield name, LowRank(A_m, B_m, kernel=kernel)


def overflow_error(module: str, dtype: torch.dtype, largest: float) -> MergeError:
    """The error for merged values of a magnitude that `dtype` cannot hold."""
    return MergeError(
        "The merged values overflow the dtype of the output.",
        module=module,
        expected=f"magnitudes up to {torch.finfo(dtype).max:g} ({dtype})",
        found=f"{largest:g}",
        remedy="save with --dtype float32 (or bfloat16), or lower the weights",
    )


def _module_reports(
    pool: Pool, merged: Merged, dtype: torch.dtype, lost: torch.Tensor | None
) -> Iterator[ModuleReport]:
    errors = relative_error(pool, merged, dtype, None if lost is None else lost.sum(1)).tolist()
    norms, cosine = (table.tolist() for table in overlap(pool, lost))
    clusters: list[list[list[int]]] | None = None
    if merged.labels is not None:  # the units of each adapter in each cluster, (M, k, N)
        k, n = merged.A.shape[1], len(pool.ranks)
        clusters = cluster_sizes(n * merged.labels + pool.owner, k * n).view(-1, k, n).tolist()
    for m, name in enumerate(pool.names):
        rank = int(merged.ranks[m])
        yield ModuleReport(
            name=name,
            adapters=pool.adapters,
            ranks_in=pool.ranks,
            rank_out=rank,
            norms=tuple(norms[m]),
            cosine=tuple(map(tuple, cosine[m])),
            error=errors[m],
            clusters=() if clusters is None else tuple(map(tuple, clusters[m][:rank])),
        )
