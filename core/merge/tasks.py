"""The work of a merge: modules of like shape in batches, each of which can be done anywhere by itself."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..adapter import Adapter
from ..errors import MergeError, name_some
from ..lowrank import LowRank
from ..memory import report_out_of_memory
from .cache import GramCache
from .factors import FileFactors
from .methods import MergeMethod
from .pool import Merged, Pool, overlap, relative_error
from .report import ModuleReport

# Numbers in the factors of a batch; bounds the memory beside inputs and output.
_BATCH_NUMBERS = 16_000_000


@dataclass(frozen=True)
class Batch:
    """Modules that are merged together.

    Args:
        names: The modules. adapters: Positions of the adapters that have them. ranks: Their ranks.
    """

    names: tuple[str, ...]
    adapters: tuple[int, ...]
    ranks: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class BatchResult:
    """What came of a batch: updates and reports of its modules, and remarks on some, see `pool.Merged`."""

    modules: Mapping[str, LowRank]
    reports: tuple[ModuleReport, ...]
    remarks: Mapping[str, str]


@dataclass(frozen=True, eq=False)
class BatchMerger:
    """What is to be done with a batch. Holds no adapter, so that it can be sent to where the adapters are opened anew.

    Args:
        method: See `merge`.
        weights: Per adapter, the weight of each module.
        dtype: Of the merged factors. device: Where to compute.
        products: Of earlier merges of the same adapters.
    """

    method: MergeMethod
    weights: Sequence[Mapping[str, float]]
    dtype: torch.dtype
    device: torch.device
    cache: GramCache | None = None

    @torch.no_grad()
    def __call__(self, adapters: Sequence[Adapter], batch: Batch) -> BatchResult:
        """Merge a batch. The same adapters and the same batch give the same numbers.

        Raises:
            MergeError: Numbers that cannot be decomposed, a result that overflows the dtype, too little memory, or what
                the method says.
            FormatError: NaN in an input.
        """
        with report_out_of_memory():
            pool = self._pool(adapters, batch)
            merged = self._merged(pool)
            if self.cache is not None:
                self.cache.store(batch, pool)
            modules = dict(_unpack(adapters, pool, merged, self.dtype))
            return BatchResult(modules, tuple(_module_reports(pool, merged, self.dtype)), dict(merged.remarks))

    def _merged(self, pool: Pool) -> Merged:
        try:
            return self.method(pool)
        except torch.linalg.LinAlgError as error:  # of numbers whose products are no longer finite  # pyright: ignore[reportPrivateImportUsage]
            raise MergeError(
                "The numbers of a module are too large or too small to be decomposed.",
                module=name_some(pool.names, 3),
                found=f"weights times scales up to {float(pool.c.abs().max()):g}, factors up to "
                f"{max(float(pool.A.abs().max()), float(pool.B.abs().max())):g}",
                remedy="lower the weights; a LoRA with such numbers is broken",
            ) from error

    def _pool(self, adapters: Sequence[Adapter], batch: Batch) -> Pool:
        """The units of a batch, whose products are found and checked here."""
        parts = [[adapters[i].modules[name] for i in batch.adapters] for name in batch.names]
        weights = torch.tensor(
            [[self.weights[i][name] for i in batch.adapters] for name in batch.names], dtype=torch.float64
        )
        scales = torch.tensor([[part.scale for part in row] for row in parts], dtype=torch.float64)
        scale = scales.repeat_interleave(torch.tensor(batch.ranks), 1)
        pool = Pool(
            names=batch.names,
            factors=FileFactors(parts, self.device),
            scale=scale.to(self.device),
            weights=weights.to(self.device),
            ranks=batch.ranks,
            adapters=batch.adapters,
        )
        if self.cache is not None:
            self.cache.restore(batch, pool)
        # squares are sums of all that is in a unit, and in float64 those of no float32 overflow
        if not all(torch.isfinite(G.diagonal(dim1=1, dim2=2).sum()) for G in (pool.G_A, pool.G_B)):
            for i in batch.adapters:
                adapters[i].check_finite()
        return pool


def batches(
    adapters: Sequence[Adapter], weights: Sequence[Mapping[str, float]], size: int | None = None
) -> list[Batch]:
    """All modules, those of one shape together, in batches small enough to bound memory.

    Modules that every adapter leaves out (weight 0) are in none.

    Args:
        adapters: Under common names. weights: Per adapter, the weight of each module.
        size: Of a batch. Methods that work long on every module say one, so that they are told of and cancelled in
            time.

    Raises:
        MergeError: Modules of different shape under one name.
    """
    groups: dict[tuple[tuple[int, int], tuple[int, ...], tuple[int, ...]], list[str]] = defaultdict(list)
    for name in sorted({name for adapter in adapters for name in adapter.modules}):
        having = [i for i, adapter in enumerate(adapters) if name in adapter.modules and weights[i][name]]
        if not having:
            continue
        parts = [adapters[i].modules[name] for i in having]
        shapes = {(part.d_out, part.d_in) for part in parts}
        if len(shapes) > 1:
            raise MergeError(
                "The LoRAs do not fit the same base model: one module has different shapes.",
                module=name,
                expected="the same (d_out, d_in) in every LoRA",
                found=", ".join(
                    f"{(part.d_out, part.d_in)} in {adapters[i].label}" for i, part in zip(having, parts, strict=True)
                ),
                remedy="merge only LoRAs trained on one base model (e.g. all SDXL)",
            )
        groups[shapes.pop(), tuple(having), tuple(part.rank for part in parts)].append(name)
    found: list[Batch] = []
    for ((d_out, d_in), having, ranks), names in groups.items():
        step = size or max(1, _BATCH_NUMBERS // (sum(ranks) * (d_in + d_out)))
        found += [Batch(tuple(names[at : at + step]), having, ranks) for at in range(0, len(names), step)]
    return found


def _unpack(
    adapters: Sequence[Adapter], pool: Pool, merged: Merged, dtype: torch.dtype
) -> Iterator[tuple[str, LowRank]]:
    # the largest and smallest number tell of all; NaN is either
    extremes = torch.stack([*merged.A.aminmax(), *merged.B.aminmax()]).to(dtype)
    if not torch.isfinite(extremes).all():
        for m, name in enumerate(pool.names):
            largest = torch.maximum(merged.A[m].abs().max(), merged.B[m].abs().max())
            if not torch.isfinite(largest.to(dtype)):
                raise overflow(name, dtype, largest.item())
    A, B = merged.A.to(device="cpu", dtype=dtype), merged.B.to(device="cpu", dtype=dtype)
    k = A.shape[1]
    for m, (name, rank) in enumerate(zip(pool.names, merged.ranks.tolist(), strict=True)):
        # copies where the rest of the batch's rows would be kept for nothing
        A_m, B_m = (A[m], B[m]) if rank == k else (A[m, :rank].clone(), B[m, :, :rank].contiguous())
        kernel = max((adapters[i].modules[name].kernel for i in pool.adapters), key=len)
        yield name, LowRank(A_m, B_m, kernel=kernel)


def overflow(module: str, dtype: torch.dtype, found: float) -> MergeError:
    """The error for merged values of a magnitude that `dtype` cannot hold."""
    return MergeError(
        "The merged values overflow the output's number format.",
        module=module,
        expected=f"magnitudes up to {torch.finfo(dtype).max:g} ({dtype})",
        found=f"{found:g}",
        remedy="save with --dtype float32 (or bfloat16), or lower the weights",
    )


def _module_reports(pool: Pool, merged: Merged, dtype: torch.dtype) -> Iterator[ModuleReport]:
    errors = relative_error(pool, merged, dtype).tolist()
    norms, cosine = (table.tolist() for table in overlap(pool))
    clusters: list[list[list[int]]] | None = None
    if merged.labels is not None:
        member = torch.nn.functional.one_hot(merged.labels, merged.A.shape[1]).double()  # (M, P, k)
        owner = torch.nn.functional.one_hot(pool.owner, len(pool.ranks)).double().to(member)
        clusters = (member.mT @ owner).long().tolist()  # (M, k, N)
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
