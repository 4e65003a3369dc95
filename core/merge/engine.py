"""merge(): several adapters in, one adapter and a report out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch

from ..adapter import Adapter
from ..errors import MergeError, name_some
from ..lowrank import LowRank
from ..memory import report_out_of_memory
from ..progress import Progress
from .account import ModuleAccount, predict
from .cache import GramCache
from .findings.find import find
from .findings.measure import LayerValues
from .leftovers import merge_leftovers
from .methods import METHODS, MergeMethod
from .remedies import CappedLayer, cap_notes, check_remedies, equalizing_factors
from .report import MANY, MergeReport, ModuleReport
from .statistics import Statistics
from .tasks import BatchMerger, BatchResult, ModuleBatch, plan_batches, pool_of
from .threads import run_in_threads
from .weights import Weights

BatchRunner = Callable[[BatchMerger, Sequence[ModuleBatch]], Iterable[BatchResult]]
"""Merges every batch and yields the results in order."""


@dataclass(frozen=True, eq=False)
class MergeResult:
    """The merged adapter and the report of the merge."""

    adapter: Adapter
    report: MergeReport


def merge(
    adapters: Sequence[Adapter],
    method: MergeMethod,
    weights: Sequence[float] | None = None,
    *,
    text_encoder_weights: Sequence[float] | None = None,
    module_weights: Sequence[Mapping[str, float]] | None = None,
    normalize: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    each: BatchRunner | None = None,
    cache: GramCache | None = None,
    statistics: Statistics | None = None,
    cap: float | None = None,
    equalize: float = 0.0,
) -> MergeResult:
    """Merge adapters that name their modules alike (see `align`) into one.

    Args:
        adapters: One or more. A module that only some have is merged from those.
        method: An instance of a row of `METHODS`.
        weights: One finite number per adapter, default 1; negative subtracts, 0 leaves the adapter out.
        text_encoder_weights: Per adapter, the weight of its text encoder modules; default the same as `weights`.
        module_weights: Per adapter, patterns of module names and a factor on its weight there, e.g.
            ``{"*attn2*": 0.5, "text-encoder": 0, "!blocks.0-9": 0}``, see `layers_matching`. The factors of all
            patterns that match are multiplied.
        normalize: Divide the weights by the sum of their magnitudes: an average instead of a sum.
        dtype: Dtype of the merged factors and diffs; default the widest factor dtype of the adapters that take part.
        device: Device to compute on, ``cpu`` or ``cuda``. The result is on the CPU.
        progress: Called with (modules done, modules in all, name of the last). May raise an exception to cancel.
        each: Runs the batches elsewhere; default in threads of this process, see `run_in_threads`.
        cache: Kept by the caller between merges: the next merge of the same factors is faster.
        statistics: Statistics measured with these adapters, from which the report predicts what merges keep; default
            the method's own, if it has any.
        cap: Lower singular values of each adapter's delta that exceed this many times their module's median to the
            largest one that does not (see `cap_limits`), at least 1; diffs stay. Default: do not.
        equalize: Bring the loudness of the adapters together by this share, 0 .. 1: their weights are multiplied by
            `equalizing_factors` of their norms over all modules with a weight, after the cap.

    Returns:
        The merged adapter (scale 1: no alpha) and its report.

    Raises:
        MergeError: No adapters, weights that do not fit, modules of different shape under one name, a rank no module
            can reach, a device without float64 (MPS), or a result that overflows `dtype`.
        FormatError: NaN or infinity in an input.
    """
    if not adapters:
        raise MergeError("There is nothing to merge.", expected="at least one LoRA", found="none")
    check_remedies(cap, equalize)
    checked = Weights.of(adapters, weights, text_encoder_weights, module_weights, normalize)
    device = _checked_device(device)
    if equalize:
        checked = checked.scaled(equalizing_factors([*_loudness(adapters, checked, device, cap)], equalize))
    dtype = dtype or _widest_dtype([adapter for adapter, used in zip(adapters, checked.used, strict=True) if used])
    batches = plan_batches(adapters, checked.modules, getattr(method, "batch", None))
    _check_rank(method, batches)
    statistics = statistics or getattr(method, "statistics", None)
    merger = BatchMerger(method, checked.modules, dtype, device, cache, statistics, cap)

    modules: dict[str, LowRank] = {}
    reports: dict[str, ModuleReport] = {}
    remarks: dict[str, str] = {}
    accounts: list[ModuleAccount] = []
    values: dict[str, LayerValues] = {}
    capped: list[CappedLayer] = []
    for result in _run(merger, adapters, batches, each, progress):
        modules.update(result.modules)
        reports.update((report.name, report) for report in result.reports)
        remarks.update(result.remarks)
        accounts += result.accounts
        values.update(result.values)
        capped += result.capped
    with torch.no_grad(), report_out_of_memory():
        leftovers = merge_leftovers(adapters, checked, dtype)

    ordered = tuple(reports[name] for name in sorted(reports))
    report = MergeReport(
        inputs=tuple(adapter.label for adapter in adapters),
        weights=checked.model,
        method=next((name for name, row in METHODS.items() if isinstance(method, row)), type(method).__name__),
        modules=ordered,
        passed_on=leftovers.passed_on,
        dropped=leftovers.dropped,
        notes=(
            *checked.notes(adapters),
            *(note for adapter, used in zip(adapters, checked.used, strict=True) if used for note in adapter.notes),
            *_equalize_notes(adapters, checked.model, equalize),
            *cap_notes(adapters, cap or 0, capped),
            *_strength_notes(method, checked.model),
            *_module_notes(reports, remarks),
        ),
        predicted=predict(accounts, len(adapters)),
        findings=find(adapters, checked.modules, ordered, values),
    )
    merged = {name: modules[name] for name in sorted(modules)}
    return MergeResult(Adapter(merged, leftovers.diffs, leftovers.extras), report)


@torch.no_grad()
def _loudness(
    adapters: Sequence[Adapter], weights: Weights, device: torch.device, cap: float | None
) -> Iterator[float]:
    """Norm of each adapter's delta at weight 1, over all modules in which it has a weight."""
    for adapter, table in zip(adapters, weights.modules, strict=True):
        ones = [{name: float(weight != 0) for name, weight in table.items()}]
        batches = plan_batches([adapter], ones)
        yield math.sqrt(
            sum(float(pool_of([adapter], batch, ones, device, cap=cap)[0].inner.sum()) for batch in batches)
        )


def _run(
    merger: BatchMerger,
    adapters: Sequence[Adapter],
    batches: Sequence[ModuleBatch],
    each: BatchRunner | None,
    progress: Progress | None,
) -> Iterator[BatchResult]:
    """Merge all batches and report progress after each."""
    done, total = 0, sum(len(batch.names) for batch in batches)
    with closing(run_in_threads(merger, adapters, batches)) as in_threads:  # stops the threads if `progress` raises
        results = in_threads if each is None else each(merger, batches)
        for batch, result in zip(batches, results, strict=True):
            yield result
            done += len(batch.names)
            if progress is not None:
                progress(done, total, batch.names[-1])


def _widest_dtype(adapters: Sequence[Adapter]) -> torch.dtype:
    dtype = adapters[0].dtype
    for adapter in adapters[1:]:
        dtype = torch.promote_types(dtype, adapter.dtype)
    return dtype


def _check_rank(method: MergeMethod, batches: Sequence[ModuleBatch]) -> None:
    rank = getattr(method, "rank", None)
    largest = max((sum(batch.ranks) for batch in batches), default=0)
    if batches and rank is not None and rank.unit == "" and rank.value > largest:
        raise MergeError(
            "The rank is larger than all the LoRAs' ranks together.",
            expected=f"at most {largest} (at {largest} the merge is the exact sum)",
            found=f"{rank}",
            remedy="lower the rank; a higher one cannot add anything",
        )


def _checked_device(device: torch.device | str) -> torch.device:
    checked = torch.device(device)
    if checked.type == "mps":
        raise MergeError(
            "Merges need float64, which Apple's MPS does not have.",
            expected="the device cpu, or cuda",
            found=str(checked),
            remedy="merge on the CPU: --device cpu (device='cpu' in Python)",
        )
    if checked.type == "cuda" and checked.index is None:  # other threads have another current device
        return torch.device("cuda", torch.cuda.current_device())
    return checked


def _equalize_notes(adapters: Sequence[Adapter], weights: Sequence[float], share: float) -> Iterator[str]:
    if share:
        pairs = (f"{adapter.label} {weight:.4g}" for adapter, weight in zip(adapters, weights, strict=True))
        yield f"equalize {share:g} changed the weights: {name_some(pairs, MANY)}"


def _strength_notes(method: MergeMethod, weights: Sequence[float]) -> Iterator[str]:
    measured = getattr(getattr(method, "statistics", None), "strengths", ())
    if measured and any(not math.isclose(a, b, rel_tol=0.01) for a, b in zip(measured, weights, strict=False)):
        yield (
            f"the statistics were measured at strengths {', '.join(f'{s:g}' for s in measured)}, the weights are "
            f"{', '.join(f'{w:g}' for w in weights)}: measure again if they differ much"
        )


def _module_notes(reports: Mapping[str, ModuleReport], remarks: Mapping[str, str]) -> Iterator[str]:
    zeros = [report.name for report in reports.values() if not any(report.norms)]
    if zeros:
        yield f"{len(zeros)} modules are zero in every LoRA: {name_some(zeros)}"
    for remark in sorted(set(remarks.values())):
        names = sorted(name for name in remarks if remarks[name] == remark)
        yield f"{len(names)} modules {remark}: {name_some(names)}"
